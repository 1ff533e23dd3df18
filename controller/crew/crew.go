// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

// Package crew owns goroutines that outlive the reconcile which started them.
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

// New returns a crew whose goroutines begin with Start. working counts the goroutines; it may be
// nil.
func New(working prometheus.Gauge) *Crew {
	if working == nil {
		working = prometheus.NewGauge(prometheus.GaugeOpts{Name: "unregistered"})
	}
	return &Crew{work: make(chan func(context.Context)), ended: make(chan struct{}), working: working}
}

// Start runs the functions given to Do, until ctx is done and all of them have returned. It returns
// nil.
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

// Do runs f in a goroutine as soon as Start runs. After Start has returned, Do drops f.
func (c *Crew) Do(f func(context.Context)) {
	select {
	case c.work <- f:
	case <-c.ended:
	}
}
