// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package workerpool

import (
	"context"
	"sync"

	"k8s.io/client-go/util/workqueue"
	"sigs.k8s.io/controller-runtime/pkg/reconcile"
)

// Spread is a reconcile.Reconciler that runs each reconcile in a goroutine of its own. Only a
// limited number run at once; reconciles that wait for somebody else ([Away]) do not count. So
// nodes that hang, however many, do not keep a controller's workers from the other nodes. As with a
// controller's workers, an object is reconciled by one goroutine at a time, and again if something
// has happened meanwhile.
type Spread struct {
	inner reconcile.Reconciler
	pool  *Pool
	slots chan struct{}

	mu    sync.Mutex
	queue workqueue.TypedRateLimitingInterface[reconcile.Request]
	runs  map[reconcile.Request]*spreadRun
}

// spreadRun is a reconcile under way, or one whose result the controller has not fetched yet.
type spreadRun struct {
	again, over bool
	result      reconcile.Result
	err         error
}

// NewSpread returns a Spread around inner. The pool must be started, and [Spread.Start] must be a
// source of the controller.
func NewSpread(inner reconcile.Reconciler, p *Pool, atOnce int) *Spread {
	return &Spread{inner: inner, pool: p, slots: make(chan struct{}, atOnce), runs: map[reconcile.Request]*spreadRun{}}
}

// Start implements source.Source: it delivers results through the controller's queue.
func (s *Spread) Start(_ context.Context, queue workqueue.TypedRateLimitingInterface[reconcile.Request]) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.queue = queue
	return nil
}

// Reconcile starts a reconcile and returns at once, or returns the result of a reconcile that has
// ended.
func (s *Spread) Reconcile(_ context.Context, req reconcile.Request) (reconcile.Result, error) {
	s.mu.Lock()
	run := s.runs[req]
	switch {
	case run != nil && !run.over:
		run.again = true
		s.mu.Unlock()
		return reconcile.Result{}, nil
	case run != nil && !run.again:
		delete(s.runs, req)
		s.mu.Unlock()
		return run.result, run.err
	}
	run = &spreadRun{}
	s.runs[req] = run
	s.mu.Unlock()
	s.pool.Do(func(ctx context.Context) { s.carryOut(ctx, req, run) })
	return reconcile.Result{}, nil
}

func (s *Spread) carryOut(ctx context.Context, req reconcile.Request, run *spreadRun) {
	slot := &slot{s.slots}
	if !slot.take(ctx) {
		return
	}
	result, err := s.inner.Reconcile(context.WithValue(ctx, slotKey{}, slot), req)
	slot.giveBack()
	s.mu.Lock()
	run.over, run.result, run.err = true, result, err
	queue := s.queue
	s.mu.Unlock()
	queue.Add(req)
}

type slotKey struct{}

type slot struct{ of chan struct{} }

func (s *slot) take(ctx context.Context) bool {
	select {
	case s.of <- struct{}{}:
		return true
	case <-ctx.Done():
		return false
	}
}

func (s *slot) giveBack() { <-s.of }

// Away runs f, which waits for somebody else, and frees the reconcile's slot meanwhile. ctx is the
// context that a [Spread] gave to the reconcile. With any other context, Away only runs f.
func Away(ctx context.Context, f func()) {
	slot, _ := ctx.Value(slotKey{}).(*slot)
	if slot == nil {
		f()
		return
	}
	slot.giveBack()
	// Take a slot again even if ctx is done: the reconcile goes on, and returns the slot.
	defer func() { slot.of <- struct{}{} }()
	f()
}
