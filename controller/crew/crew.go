// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

// Package crew owns goroutines that outlive the reconcile which wanted them.
package crew

import (
	"context"
	"sync"

	"github.com/prometheus/client_golang/prometheus"
)

// Crew owns goroutines. It is a manager.Runnable.
type Crew struct {
	work    chan func(context.Context)
	ended   chan struct{}
	working prometheus.Gauge
}

// New returns a crew whose work begins with Start. working gets how many goroutines work; nil: nobody wants to know.
func New(working prometheus.Gauge) *Crew {
	if working == nil {
		working = prometheus.NewGauge(prometheus.GaugeOpts{Name: "unregistered"})
	}
	return &Crew{work: make(chan func(context.Context)), ended: make(chan struct{}), working: working}
}

// Start runs what Do is given until ctx is done and all of it has ended. It returns nil.
func (c *Crew) Start(ctx context.Context) error {
	var wg sync.WaitGroup
	defer wg.Wait()
	defer close(c.ended)
	for {
		select {
		case <-ctx.Done():
			return nil
		case f := <-c.work:
			c.working.Inc()
			wg.Go(func() {
				defer c.working.Dec()
				f(ctx)
			})
		}
	}
}

// Do lets f run, as soon as Start does. After Start has ended, f is dropped.
func (c *Crew) Do(f func(context.Context)) {
	select {
	case c.work <- f:
	case <-c.ended:
	}
}
