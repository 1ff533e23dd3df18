// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package nodes

import (
	"cmp"
	"context"
	"time"

	"github.com/sirupsen/logrus"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/cri-proxy/cri-proxy/controller/retry"
)

// launch starts the goroutine of an entry. The caller holds the mutex.
func (t *Tracker[O]) launch(e *tracked[O]) {
	e.launched = true
	t.running.Go(func() {
		t.options.Following(1)
		defer func() {
			t.options.Following(-1)
			t.mu.Lock()
			t.discount(e)
			t.mu.Unlock()
			close(e.ended)
		}()
		if t.run(e) {
			t.end(e)
		}
	})
}

// run follows an operation until it is over. It returns false if the operation was forgotten.
func (t *Tracker[O]) run(e *tracked[O]) bool {
	f := e.follow
	for tries := 0; ; tries++ {
		next, due, err := t.try(e, &tries)
		s, live := t.fail(e, err)
		switch {
		case !live:
			return false
		case s.Finished(), next == Stop:
			return true
		case err != nil && (f.GiveUp == nil || f.GiveUp(err, time.Since(s.Since), s.Taken)):
			return true
		case f.Retry == nil:
			return true
		case err == nil && due:
		case !retry.Sleep(e.ctx, f.Retry(tries)):
			return false
		}
	}
}

// fail notes an error, if there is one. live says that the operation has not been forgotten.
func (t *Tracker[O]) fail(e *tracked[O], err error) (s State[O], live bool) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if err != nil {
		if e.state.Err = err; e.state.Since.IsZero() {
			e.state.Since = time.Now()
		}
	}
	return e.state, e.ctx.Err() == nil
}

// end says that a follow has come to its end.
func (t *Tracker[O]) end(e *tracked[O]) {
	t.mu.Lock()
	t.discount(e)
	e.state.Over = true
	if e.state.Finished() {
		e.state.Err, e.state.Since = nil, time.Time{}
	}
	s, f := e.state, e.follow
	t.mu.Unlock()
	if s.Err != nil && t.options.Log != nil {
		t.options.Log.WithError(s.Err).WithFields(logrus.Fields{"node": f.Node.Name, "op": f.UID}).
			Debug("operation watch ended early")
	}
	if f.End == nil || f.End(e.ctx, s) {
		t.wakeFor(e)
	}
}

// try begins the operation and listens to one stream. due says that it is time to begin again at
// once.
func (t *Tracker[O]) try(e *tracked[O], tries *int) (next Next, due bool, err error) {
	f := e.follow
	if f.Begin != nil {
		op, err := f.Begin(e.ctx)
		if err != nil {
			return GoOn, false, err
		}
		if !f.StreamNews {
			*tries = 0
		}
		if !t.take(e, op, true) || op.GetFinishTime() != nil {
			return GoOn, false, nil
		}
	}
	return t.listen(e, tries)
}

// listen follows one stream to its end.
func (t *Tracker[O]) listen(e *tracked[O], tries *int) (next Next, due bool, err error) {
	f := e.follow
	ctx, cancel := context.WithCancel(e.ctx)
	defer cancel()
	bound := time.AfterFunc(time.Hour, cancel)
	defer bound.Stop()
	limit := func(d time.Duration) {
		if bound.Stop(); d > 0 {
			bound.Reset(d)
		}
	}
	limit(cmp.Or(f.First, f.Renew))
	heard := false
	var again time.Time
	err = t.watch(ctx, f.Node, f.UID, func(op O) bool {
		heard, *tries, again = true, 0, time.Time{}
		if !t.take(e, op, false) || op.GetFinishTime() != nil {
			return false
		}
		wait := f.Renew
		if f.Until != nil {
			var after time.Duration
			if next, after = f.Until(op); after > 0 {
				again, wait = time.Now().Add(after), retry.Sooner(wait, after)
			}
		}
		limit(wait)
		return next == GoOn
	})
	if ctx.Err() != nil && e.ctx.Err() == nil { // no news for too long
		err = nil
		if !heard && f.First > 0 {
			noAnswer := status.Error(codes.DeadlineExceeded, "no answer")
			err = &Error{Node: f.Node, Method: t.method, Err: noAnswer, Silent: true}
		}
	}
	return next, !again.IsZero() && !time.Now().Before(again), err
}

// take takes in a message. It returns false if the operation was forgotten.
func (t *Tracker[O]) take(e *tracked[O], op O, begun bool) bool {
	t.mu.Lock()
	if e.ctx.Err() != nil {
		t.mu.Unlock()
		return false
	}
	before, known := e.state.Op, e.state.Finished()
	e.state.hear(op)
	e.state.Taken = e.state.Taken || begun
	if !begun || !e.follow.StreamNews {
		e.state.Err, e.state.Since = nil, time.Time{}
	}
	t.mu.Unlock()
	if each := e.follow.Each; !known && (each == nil || each(e.ctx, before, op)) {
		t.wakeFor(e)
	}
	return true
}

// hear takes in a message. A finished operation stays as it is.
func (s *State[O]) hear(op O) {
	if !s.Finished() {
		s.Op, s.Heard = op, time.Now()
	}
}

// wakeFor wakes the object of an operation that has not been forgotten.
func (t *Tracker[O]) wakeFor(e *tracked[O]) {
	if e.ctx.Err() == nil {
		t.Wake(e.follow.For)
	}
}
