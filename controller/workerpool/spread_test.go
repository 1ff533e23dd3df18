// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package workerpool

import (
	"context"
	"errors"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"k8s.io/apimachinery/pkg/types"
	"k8s.io/client-go/util/workqueue"
	"sigs.k8s.io/controller-runtime/pkg/reconcile"
)

func request(name string) reconcile.Request {
	return reconcile.Request{NamespacedName: types.NamespacedName{Name: name}}
}

// spread runs f with a Spread of two places and one worker. said returns what Reconcile has
// returned for an object: how many results, and the last error.
func spread(
	t *testing.T, inner reconcile.Func,
	f func(queue workqueue.TypedRateLimitingInterface[reconcile.Request], said func(string) (int, error)),
) {
	t.Helper()
	synctest.Test(t, func(t *testing.T) {
		ctx, cancel := context.WithCancel(t.Context())
		c := New(nil)
		s := NewSpread(inner, c, 2)
		queue := workqueue.NewTypedRateLimitingQueue(workqueue.DefaultTypedControllerRateLimiter[reconcile.Request]())
		if err := s.Start(ctx, queue); err != nil {
			t.Fatal(err)
		}
		var mu sync.Mutex
		counts, errs := map[string]int{}, map[string]error{}
		var wg sync.WaitGroup
		wg.Go(func() { _ = c.Start(ctx) })
		wg.Go(func() {
			for {
				req, over := queue.Get()
				if over {
					return
				}
				result, err := s.Reconcile(ctx, req)
				mu.Lock()
				if result.RequeueAfter > 0 || err != nil {
					counts[req.Name]++
					errs[req.Name] = err
				}
				mu.Unlock()
				queue.Done(req)
			}
		})
		f(queue, func(name string) (int, error) {
			mu.Lock()
			defer mu.Unlock()
			return counts[name], errs[name]
		})
		cancel()
		queue.ShutDown()
		wg.Wait()
	})
}

// The controller gets results and errors as if its worker had done the work.
func TestSpreadResults(t *testing.T) {
	spread(t, func(_ context.Context, req reconcile.Request) (reconcile.Result, error) {
		if req.Name == "bad" {
			return reconcile.Result{}, errors.New("bad")
		}
		return reconcile.Result{RequeueAfter: time.Second}, nil
	}, func(queue workqueue.TypedRateLimitingInterface[reconcile.Request], said func(string) (int, error)) {
		queue.Add(request("good"))
		queue.Add(request("bad"))
		time.Sleep(time.Second)
		if n, err := said("good"); n != 1 || err != nil {
			t.Errorf("good: %d results, %v", n, err)
		}
		if n, err := said("bad"); n != 1 || err == nil {
			t.Errorf("bad: %d results, %v", n, err)
		}
	})
}

// One object is reconciled once at a time, and again after an event in the middle. Two work at
// once, and any number wait elsewhere.
func TestSpreadTurns(t *testing.T) {
	var mu sync.Mutex
	working, most, runs, same := 0, 0, map[string]int{}, map[string]int{}
	count := func(d int) {
		mu.Lock()
		defer mu.Unlock()
		working += d
		most = max(most, working)
	}
	spread(t, func(ctx context.Context, req reconcile.Request) (reconcile.Result, error) {
		mu.Lock()
		runs[req.Name]++
		if same[req.Name]++; same[req.Name] > 1 {
			t.Errorf("%s is reconciled twice at a time", req.Name)
		}
		mu.Unlock()
		count(1)
		time.Sleep(time.Second)
		count(-1)
		Away(ctx, func() { time.Sleep(time.Hour) })
		count(1)
		time.Sleep(time.Second)
		count(-1)
		mu.Lock()
		same[req.Name]--
		mu.Unlock()
		return reconcile.Result{RequeueAfter: time.Second}, nil
	}, func(queue workqueue.TypedRateLimitingInterface[reconcile.Request], said func(string) (int, error)) {
		for _, name := range []string{"a", "b", "c", "d"} {
			queue.Add(request(name))
		}
		time.Sleep(10 * time.Second)
		mu.Lock()
		if len(runs) != 4 || most != 2 {
			t.Errorf("%d have begun while all wait elsewhere, at most %d worked at a time", len(runs), most)
		}
		mu.Unlock()
		queue.Add(request("a")) // something has happened
		time.Sleep(3 * time.Hour)
		mu.Lock()
		defer mu.Unlock()
		if runs["a"] != 2 || runs["b"] != 1 {
			t.Errorf("runs %v, want a twice", runs)
		}
	})
}

func TestAwayOfNobody(t *testing.T) {
	ran := false
	Away(t.Context(), func() { ran = true })
	if !ran {
		t.Error("not run")
	}
}
