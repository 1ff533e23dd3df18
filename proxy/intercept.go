// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package proxy

import (
	"context"
	"errors"
	"fmt"
	"runtime/debug"
	"sync"

	"github.com/sirupsen/logrus"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
)

// directUnary asks the director for a unary method. done is not nil if the
// director wants to know when a call is over that it let pass; see [Passer].
func (c *call) directUnary() (take UnaryInterceptor, done func()) {
	s, name := c.s, c.name
	d := s.director.Load()
	if d == nil || c.diverted {
		return nil, nil
	}
	defer s.catch(name, func() { take, done = nil, nil })
	passer, _ := (*d).(Passer)
	for {
		if take := (*d).Unary(name); take != nil || passer == nil {
			return take, nil
		}
		if done, ok := passer.Pass(name); ok {
			return nil, done
		}
	}
}

// errCut is the cause of the context of a call that the director has ended, and its answer.
var errCut = status.Error(codes.Unavailable,
	"cri-proxy does not know this method and has ended the call, because a container is being replaced; call again")

// directUnknown tells the director of a call whose method is not known. done is not nil if it wants
// to know when the call is over. An error is the call's answer.
func (c *call) directUnknown(ctx context.Context, cancel context.CancelCauseFunc) (done func(), err error) {
	defer c.s.catch(c.name, func() { done, err = nil, nil })
	for {
		d := c.s.director.Load()
		if d == nil || c.diverted {
			return nil, nil
		}
		passer, _ := (*d).(UnknownPasser)
		if passer == nil {
			return nil, nil
		}
		done, ok := passer.PassUnknown(ctx, c.name, func() { cancel(errCut) })
		if ok {
			return done, nil
		}
		// Calls are held until it is known who has the view, and then go there.
		if err := c.s.inflight.enter(ctx, c); err != nil {
			return nil, err
		}
		if c.s.director.Load() == d && !c.diverted {
			return nil, nil
		}
	}
}

// directStream asks the director for a server-streaming method.
func (c *call) directStream() (take StreamInterceptor) {
	d := c.s.director.Load()
	if d == nil || c.diverted {
		return nil
	}
	defer c.s.catch(c.name, func() { take = nil })
	return (*d).Stream(c.name)
}

// catch is deferred around code of an interceptor: a panic becomes a fault.
func (s *Server) catch(name string, then func()) {
	if p := recover(); p != nil {
		s.fault(name, &panicError{value: p, stack: debug.Stack()})
		then()
	}
}

// fault counts and logs that an interceptor could not do its work.
func (s *Server) fault(name string, err error) {
	s.faults.Add(1)
	m := s.methods[name]
	if m == nil {
		m = s.unknown
	}
	m.metrics.fault()
	fields := logrus.Fields{"method": name, logrus.ErrorKey: err}
	var p *panicError
	if errors.As(err, &p) {
		fields["stack"] = string(p.stack)
	}
	s.log.WithFields(fields).Warn("interceptor fault, the call passes unchanged")
}

type panicError struct {
	value any
	stack []byte
}

func (e *panicError) Error() string { return fmt.Sprintf("panic: %v", e.value) }

// lastAnswer is what next returned most recently.
type lastAnswer struct {
	mu     sync.Mutex // guards all following fields
	called bool
	resp   []byte
	err    error
	over   bool // the interceptor has returned: next is of no use any more
}

// interceptUnary lets take answer the call. Whatever goes wrong inside it, the
// caller gets the runtime's answer.
func (c *call) interceptUnary(take UnaryInterceptor, req *frame) error {
	if !c.probe {
		c.s.intercepted.Add(1)
	}
	// A copy of its own: an early cancel leaves the transport holding the
	// request after the interceptor has returned.
	raw := req.data.Materialize()
	req.free()

	var last lastAnswer
	next := func(ctx context.Context, b []byte) ([]byte, error) {
		last.mu.Lock()
		defer last.mu.Unlock()
		if last.over {
			return nil, status.Error(codes.Canceled, "the call is over")
		}
		var resp frame
		last.called = true
		c.s.inflight.forwarded(c)
		last.resp, last.err = nil, c.invoke(ctx, newFrame(b), &resp)
		if last.err == nil {
			last.resp = resp.data.Materialize()
		}
		resp.free()
		return last.resp, last.err
	}
	resp, err := c.runUnary(take, raw, next)

	last.mu.Lock()
	defer last.mu.Unlock()
	last.over = true
	switch {
	case err == nil:
		return c.answer(newFrame(resp), nil)
	case last.err != nil && errors.Is(err, last.err):
		return c.answer(new(frame), last.err) // not what it may be wrapped in
	case c.isAnswer(err):
		return c.answer(new(frame), err)
	}
	var p *panicError
	if !errors.As(err, &p) { // a panic is counted where it is caught
		c.s.fault(c.name, err)
	}
	if last.called {
		return c.answer(newFrame(last.resp), last.err)
	}
	return c.passUnary(newFrame(raw))
}

// runUnary calls take and turns a panic into an error.
func (c *call) runUnary(take UnaryInterceptor, req []byte, next UnaryNext) (resp []byte, err error) {
	defer c.s.catch(c.name, func() { resp, err = nil, &panicError{value: "interceptor"} })
	return take(c.client.Context(), c.name, req, next)
}

// isAnswer says whether an interceptor's error is meant for the caller: a gRPC
// status, or the end of the caller's own context.
func (c *call) isAnswer(err error) bool {
	var pass *PassError
	if errors.As(err, &pass) {
		return false
	}
	var st interface{ GRPCStatus() *status.Status }
	if errors.As(err, &st) {
		return true
	}
	ended := c.client.Context().Err()
	return ended != nil && errors.Is(err, ended)
}

// interceptStream lets take change the request and filter the answers.
func (c *call) interceptStream(
	ctx context.Context, cancel context.CancelCauseFunc, take StreamInterceptor, req *frame,
) error {
	c.s.intercepted.Add(1)
	raw := req.data.Materialize()
	req.free()
	changed, filter, err := c.runStream(ctx, take, raw)
	if err != nil {
		if c.isAnswer(err) {
			return err
		}
		var p *panicError
		if !errors.As(err, &p) {
			c.s.fault(c.name, err)
		}
		changed, filter = raw, nil
	}
	if filter != nil {
		defer closeFilter(c, filter)
	}
	runtime, err := c.openServerStream(ctx, newFrame(changed))
	if err != nil {
		return err
	}
	if filter == nil {
		return c.download(ctx, runtime, nil)
	}
	f := filteredStream{call: c, runtime: runtime, filter: filter}
	return f.download(ctx, cancel)
}

// runStream calls take and turns a panic into an error.
func (c *call) runStream(
	ctx context.Context, take StreamInterceptor, req []byte,
) (changed []byte, filter StreamFilter, err error) {
	defer c.s.catch(c.name, func() { changed, filter, err = nil, nil, &panicError{value: "interceptor"} })
	return take(ctx, c.name, req)
}

func closeFilter(c *call, f StreamFilter) {
	defer c.s.catch(c.name, func() {})
	f.Close()
}

// filteredStream is one stream of answers with a filter between.
type filteredStream struct {
	call    *call
	runtime grpc.ClientStream
	filter  StreamFilter
}

// download sends what the filter makes of the answers. The calling goroutine alone sends to the
// caller and calls the filter; a second one only reads the runtime and passes on one message at a
// time, so that back-pressure holds. cancel ends the upstream, and with it the reader.
func (s *filteredStream) download(ctx context.Context, cancel context.CancelCauseFunc) error {
	c := s.call
	steps := make(chan step)
	var reader sync.WaitGroup
	reader.Go(func() { readSteps(ctx, s.runtime, steps) })
	defer reader.Wait()
	defer cancel(nil)

	extra := s.filter.Extra()
	for {
		select {
		case <-ctx.Done():
			return c.upstreamError(ctx, status.FromContextError(ctx.Err()).Err())
		case msg, ok := <-extra:
			if !ok {
				extra = nil
				continue
			}
			if err := c.send(newFrame(msg)); err != nil {
				return err
			}
		case st := <-steps:
			switch {
			case st.err != nil:
				if err := s.sendPending(extra); err != nil {
					return err
				}
				return c.endStream(ctx, s.runtime, st.err)
			case st.msg == nil:
				// Too late if a message out of turn has gone first.
				_ = c.client.SetHeader(st.header)
				_ = c.client.SendHeader(nil)
			default:
				if err := s.sendFiltered(st.msg); err != nil {
					return err
				}
			}
		}
	}
}

// sendPending sends what the filter has ready out of turn, without waiting.
func (s *filteredStream) sendPending(extra <-chan []byte) error {
	for {
		select {
		case msg, ok := <-extra:
			if !ok {
				return nil
			}
			if err := s.call.send(newFrame(msg)); err != nil {
				return err
			}
		default:
			return nil
		}
	}
}

func (s *filteredStream) sendFiltered(f *frame) error {
	msg := f.data.Materialize()
	f.free()
	out, err := s.runFilter(msg)
	if err != nil {
		out = [][]byte{msg}
	}
	for _, b := range out {
		if err := s.call.send(newFrame(b)); err != nil {
			return err
		}
	}
	return nil
}

// runFilter calls the filter; errors and panics are counted.
func (s *filteredStream) runFilter(msg []byte) (out [][]byte, err error) {
	c := s.call
	defer c.s.catch(c.name, func() { err = &panicError{value: "filter"} })
	if out, err = s.filter.Message(msg); err != nil {
		c.s.fault(c.name, err)
	}
	return out, err
}

// step is what the runtime did: sent its header, a message, or the end.
type step struct {
	header map[string][]string
	msg    *frame
	err    error
}

// readSteps reads the stream to its end or until ctx is done.
func readSteps(ctx context.Context, runtime grpc.ClientStream, steps chan<- step) {
	hand := func(st step) bool {
		select {
		case steps <- st:
			return true
		case <-ctx.Done():
			// The handler sees the same and does not wait for more.
			if st.msg != nil {
				st.msg.free()
			}
			return false
		}
	}
	if header, err := runtime.Header(); err == nil && header != nil {
		if !hand(step{header: header}) {
			return
		}
	}
	for {
		f := new(frame)
		if err := runtime.RecvMsg(f); err != nil {
			hand(step{err: err})
			return
		}
		if !hand(step{msg: f}) {
			return
		}
	}
}
