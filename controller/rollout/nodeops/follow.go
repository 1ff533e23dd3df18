// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package nodeops

import (
	"context"
	"errors"
	"slices"
	"time"

	"google.golang.org/protobuf/proto"

	opsv1 "github.com/cri-proxy/cri-proxy/api/ops/v1"
	"github.com/cri-proxy/cri-proxy/controller/apierror"
	"github.com/cri-proxy/cri-proxy/controller/nodes"
	"github.com/cri-proxy/cri-proxy/controller/rollout/dryrun"
)

// run has the node carry out an operation, and follows it in the background until it has ended:
// what the node says goes into t. begin starts the operation, or finds it if it was started before.
// pod is the name of the pod.
func (s *Session) run(
	t *nodeOperation, node nodes.Node, pod string, begin func(context.Context) (*opsv1.Operation, error),
) {
	w := s.State
	s.Driver.Crew.Do(func(ctx context.Context) {
		ctx, cancel := context.WithCancel(ctx)
		defer cancel()
		w.mu.Lock()
		t.cancel = cancel
		over := t.over
		w.mu.Unlock()
		var silent time.Time // since when the node is away
		for tries := 0; !over; tries++ {
			op, err := begin(ctx)
			w.noteAPI(t, err)
			if err == nil {
				silent, tries = time.Time{}, 0
				w.note(t, op)
				if op.GetFinishTime() == nil {
					op, err = s.watch(ctx, t, node)
				}
				if err == nil && op.GetFinishTime() != nil {
					return
				}
			}
			if ctx.Err() != nil {
				return
			}
			if err != nil && w.givesUp(t, err, &silent, s.Strategy.Deadline, pod) || !Pause(ctx, backOff(tries)) {
				return
			}
		}
	})
}

// givesUp writes into t how an operation has ended for the controller because of an error, and
// returns true if it has. A node may be away until the deadline; silent is since when it is.
func (w *State) givesUp(t *nodeOperation, err error, silent *time.Time, deadline time.Duration, pod string) bool {
	if errors.Is(err, errThere) {
		w.change(t, func() { t.same = true })
		return true
	}
	why := troubleOf(err)
	switch {
	case why.final || why.stale:
	case silent.IsZero():
		*silent = time.Now()
		return false
	case time.Since(*silent) < deadline:
		return false
	case dryrun.IsAPIStatus(err):
		why.Failure = dryrun.TooLong(pod, deadline, err)
	}
	w.change(t, func() { t.failed, t.stale, t.answered = &why.Failure, why.stale, true })
	return true
}

// errThere: a container already has the image that admission makes of the goal's.
var errThere = errors.New("the image is there")

// noteAPI counts errors of the API server, so that people are told after some of them.
func (w *State) noteAPI(t *nodeOperation, err error) {
	w.mu.Lock()
	if err == nil {
		t.api = dryrun.Trouble{}
	} else if dryrun.IsAPIStatus(err) {
		t.api.Note(err, time.Now())
	}
	tell := t.api.Count == apierror.Tries
	w.mu.Unlock()
	if tell {
		w.wake()
	}
}

// watch follows the operation until it has ended, or needs credentials, or until there were no news
// for watchRenew.
func (s *Session) watch(ctx context.Context, t *nodeOperation, node nodes.Node) (*opsv1.Operation, error) {
	watching, cancel := context.WithCancel(ctx)
	defer cancel()
	quiet := time.AfterFunc(watchRenew, cancel)
	defer quiet.Stop()
	var last *opsv1.Operation
	err := s.Driver.Nodes.WatchOperation(watching, node, t.uid, func(op *opsv1.Operation) {
		quiet.Reset(watchRenew)
		last = op
		s.State.note(t, op)
		if slices.ContainsFunc(op.GetContainers(), func(c *opsv1.ContainerOperation) bool {
			return c.GetPull().GetReason() == opsv1.ReasonCredentialsNeeded
		}) {
			cancel()
		}
	})
	if watching.Err() != nil {
		err = nil // it is asked again
	}
	return last, err
}

// note keeps what the node says. An operation that has finished does not change any more.
func (w *State) note(t *nodeOperation, op *opsv1.Operation) {
	w.change(t, func() {
		t.answered = true
		if t.op.GetFinishTime() != nil {
			return
		}
		if was := t.op.GetCreateTime(); was != nil && !proto.Equal(was, op.GetCreateTime()) {
			t.commitRequested = false // the node has lost its journal and begun anew
		}
		t.op = op
	})
}

// change changes an operation that is still of interest, and wakes the reconciler.
func (w *State) change(t *nodeOperation, f func()) {
	w.mu.Lock()
	over := t.over
	if !over {
		f()
	}
	w.mu.Unlock()
	if !over {
		w.wake()
	}
}

// Pause waits and says whether to go on.
func Pause(ctx context.Context, d time.Duration) bool {
	timer := time.NewTimer(d)
	defer timer.Stop()
	select {
	case <-timer.C:
		return true
	case <-ctx.Done():
		return false
	}
}
