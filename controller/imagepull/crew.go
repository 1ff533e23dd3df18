// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package imagepull

import (
	"context"
	"sync"
)

// crew owns the goroutines that talk to nodes.
type crew struct {
	work  chan func(context.Context)
	ended chan struct{}
}

func newCrew() *crew {
	return &crew{work: make(chan func(context.Context)), ended: make(chan struct{})}
}

// Start runs what do is given until ctx is done and all of it has ended. It returns nil.
func (c *crew) Start(ctx context.Context) error {
	var wg sync.WaitGroup
	defer wg.Wait()
	defer close(c.ended)
	for {
		select {
		case <-ctx.Done():
			return nil
		case f := <-c.work:
			wg.Go(func() { f(ctx) })
		}
	}
}

// do lets f run, as soon as Start does. After Start has ended, f is dropped.
func (c *crew) do(f func(context.Context)) {
	select {
	case c.work <- f:
	case <-c.ended:
	}
}
