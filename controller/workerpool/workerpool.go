// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

// Package workerpool owns goroutines that outlive the reconcile which started them.
package workerpool

import (
	"context"
	"sync"

	"github.com/prometheus/client_golang/prometheus"
)

// Pool owns goroutines. It is a manager.Runnable.
type Pool struct {
	work    chan func(context.Context)
	ended   chan struct{}
	working prometheus.Gauge
}

// New returns a pool whose goroutines begin with Start. working counts the goroutines; it may be
// nil.
func New(working prometheus.Gauge) *Pool {
	if working == nil {
		working = prometheus.NewGauge(prometheus.GaugeOpts{Name: "unregistered"})
	}
	return &Pool{work: make(chan func(context.Context)), ended: make(chan struct{}), working: working}
}

// Start runs the functions given to Do, until ctx is done and all of them have returned. It returns
// nil.
func (p *Pool) Start(ctx context.Context) error {
	var wg sync.WaitGroup
	defer wg.Wait()
	defer close(p.ended)
	for {
		select {
		case <-ctx.Done():
			return nil
		case f := <-p.work:
			p.working.Inc()
			wg.Go(func() {
				defer p.working.Dec()
				f(ctx)
			})
		}
	}
}

// Do runs f in a goroutine as soon as Start runs. After Start has returned, Do drops f.
func (p *Pool) Do(f func(context.Context)) {
	select {
	case p.work <- f:
	case <-p.ended:
	}
}
