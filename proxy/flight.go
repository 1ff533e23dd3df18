// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package proxy

import (
	"context"
	"errors"
	"sync"

	"google.golang.org/grpc"
	"google.golang.org/grpc/status"
)

// errEnded is the cause of the context of a stream that a drain has ended.
var errEnded = errors.New("stream ended by the drain")

// flight keeps account of the calls in flight. A drain waits for all but the
// endless streams, which it ends.
type flight struct {
	mu      sync.Mutex // guards all following fields
	total   int
	uploads int // client-to-runtime halves of bidirectional calls
	endless map[*call]context.CancelCauseFunc
	ended   bool             // streams that begin now are ended at once
	looking int              // calls that look, see [Server.Hold]
	held    chan struct{}    // not nil: calls that begin wait until it is closed
	divert  *grpc.ClientConn // not nil: where calls that begin go
	waiters []chan struct{}  // closed at the next change of the counts
}

func (f *flight) begin(c *call) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.total++
	c.m.inFlight++
}

// enter waits while calls are held, and then says where the call goes. Its error is the call's answer.
func (f *flight) enter(ctx context.Context, c *call) error {
	for {
		held := f.tryEnter(c)
		if held == nil {
			return nil
		}
		select {
		case <-held:
		case <-ctx.Done():
			return status.FromContextError(ctx.Err()).Err()
		}
	}
}

func (f *flight) tryEnter(c *call) (held <-chan struct{}) {
	f.mu.Lock()
	defer f.mu.Unlock()
	switch {
	case f.held != nil:
		return f.held
	case f.divert != nil:
		c.conn, c.diverted = f.divert, true
	default:
		c.conn = c.s.up.conn
		if c.looks = c.m.looks; c.looks != LooksNever && !c.probe {
			c.looking = true
			c.m.looking++
			f.looking++
		}
	}
	return nil
}

// forwarded is called when c is sent on.
func (f *flight) forwarded(c *call) {
	if c.looks != LooksAtFirst {
		return
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	f.lookedLocked(c)
}

func (f *flight) lookedLocked(c *call) {
	if !c.looking {
		return
	}
	c.looking = false
	c.m.looking--
	f.looking--
	f.wakeLocked()
}

// looks returns how many calls look.
func (f *flight) looks() int {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.looking
}

// markEndless says that a drain may end c by cancel.
func (f *flight) markEndless(c *call, cancel context.CancelCauseFunc) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.ended {
		cancel(errEnded)
	}
	if f.endless == nil {
		f.endless = make(map[*call]context.CancelCauseFunc)
	}
	f.endless[c] = cancel
	f.wakeLocked()
}

func (f *flight) end(c *call) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.total--
	c.m.inFlight--
	f.lookedLocked(c)
	delete(f.endless, c)
	f.wakeLocked()
}

func (f *flight) beginUpload() {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.uploads++
}

func (f *flight) endUpload() {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.uploads--
	f.wakeLocked()
}

func (f *flight) wakeLocked() {
	for _, w := range f.waiters {
		close(w)
	}
	f.waiters = nil
}

func (f *flight) count() int {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.total
}

// finite returns how many calls will end by themselves.
func (f *flight) finite() int {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.total - len(f.endless)
}

// streams returns how many calls a drain has to end.
func (f *flight) streams() int {
	f.mu.Lock()
	defer f.mu.Unlock()
	return len(f.endless)
}

// goroutines returns how many goroutines still work for calls.
func (f *flight) goroutines() int {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.total + f.uploads
}

// wait returns nil as soon as count, a method of f, returns 0.
func (f *flight) wait(ctx context.Context, count func() int) error {
	for {
		changed := make(chan struct{})
		f.mu.Lock()
		f.waiters = append(f.waiters, changed)
		f.mu.Unlock()
		if count() == 0 {
			return nil
		}
		select {
		case <-changed:
		case <-ctx.Done():
			return ctx.Err()
		}
	}
}

// endStreams ends the endless streams, and with final those still to come.
func (f *flight) endStreams(final bool) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.ended = f.ended || final
	for _, cancel := range f.endless {
		cancel(errEnded)
	}
}
