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

// inflight keeps account of the calls in flight. A drain waits for all but the
// endless streams, which it ends.
type inflight struct {
	mu        sync.Mutex // guards all following fields
	total     int
	uploads   int // client-to-runtime halves of bidirectional calls
	endless   map[*call]context.CancelCauseFunc
	ended     bool             // streams that begin now are ended at once
	depending int              // calls that depend on the director, see [Server.Hold]
	held      chan struct{}    // not nil: calls that begin wait until it is closed
	divert    *grpc.ClientConn // not nil: where calls that begin go
	waiters   []chan struct{}  // closed at the next change of the counts
}

func (f *inflight) begin(c *call) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.total++
	c.m.inFlight++
}

// enter waits while calls are held, and then says where the call goes. Its error is the call's
// answer.
func (f *inflight) enter(ctx context.Context, c *call) error {
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

func (f *inflight) tryEnter(c *call) (held <-chan struct{}) {
	f.mu.Lock()
	defer f.mu.Unlock()
	switch {
	case f.held != nil:
		return f.held
	case f.divert != nil:
		c.conn, c.diverted = f.divert, true
	default:
		c.conn = c.s.up.conn
		if c.dependency = c.m.dependency; c.dependency != Independent && !c.probe {
			c.depending = true
			c.m.depending++
			f.depending++
		}
	}
	return nil
}

// forwarded is called when c is sent on.
func (f *inflight) forwarded(c *call) {
	if c.dependency != UntilForwarded {
		return
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	f.independentLocked(c)
}

func (f *inflight) independentLocked(c *call) {
	if !c.depending {
		return
	}
	c.depending = false
	c.m.depending--
	f.depending--
	f.wakeLocked()
}

// dependents returns how many calls depend on the director.
func (f *inflight) dependents() int {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.depending
}

// markEndless says that a drain may end c by cancel.
func (f *inflight) markEndless(c *call, cancel context.CancelCauseFunc) {
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

func (f *inflight) end(c *call) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.total--
	c.m.inFlight--
	f.independentLocked(c)
	delete(f.endless, c)
	f.wakeLocked()
}

func (f *inflight) beginUpload() {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.uploads++
}

func (f *inflight) endUpload() {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.uploads--
	f.wakeLocked()
}

func (f *inflight) wakeLocked() {
	for _, w := range f.waiters {
		close(w)
	}
	f.waiters = nil
}

func (f *inflight) count() int {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.total
}

// finite returns how many calls will end by themselves.
func (f *inflight) finite() int {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.total - len(f.endless)
}

// streams returns how many calls a drain has to end.
func (f *inflight) streams() int {
	f.mu.Lock()
	defer f.mu.Unlock()
	return len(f.endless)
}

// goroutines returns how many goroutines still work for calls.
func (f *inflight) goroutines() int {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.total + f.uploads
}

// wait returns nil as soon as count, a method of f, returns 0.
func (f *inflight) wait(ctx context.Context, count func() int) error {
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
func (f *inflight) endStreams(final bool) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.ended = f.ended || final
	for _, cancel := range f.endless {
		cancel(errEnded)
	}
}
