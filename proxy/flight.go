// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package proxy

import (
	"context"
	"errors"
	"sync"
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
	ended   bool            // streams that begin now are ended at once
	waiters []chan struct{} // closed at the next change of the counts
}

func (f *flight) begin() {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.total++
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

// endStreams ends the endless streams, and those still to come.
func (f *flight) endStreams() {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.ended = true
	for _, cancel := range f.endless {
		cancel(errEnded)
	}
}
