// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package recreate_test

import (
	"context"
	"errors"
	"fmt"
	"io"
	"sync"
	"testing"
	"time"

	"github.com/sirupsen/logrus"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/client-go/util/workqueue"
	"sigs.k8s.io/controller-runtime/pkg/client"
	"sigs.k8s.io/controller-runtime/pkg/reconcile"

	opsv1 "github.com/cri-proxy/cri-proxy/api/ops/v1"
	"github.com/cri-proxy/cri-proxy/controller/nodes"
	"github.com/cri-proxy/cri-proxy/controller/recreate"
	"github.com/cri-proxy/cri-proxy/controller/workerpool"
)

// hanging answers for one node; the others swallow every call, as one does whose kernel hangs, and
// for as long as the test goes on: what does not wait for them needs no clock to show it.
type hanging struct {
	nodes.Operations
	mu      sync.Mutex
	waiting map[string]int // calls under way, by node
	started chan string
}

func (h *hanging) swallow(ctx context.Context, n nodes.Node) error {
	h.mu.Lock()
	h.waiting[n.Name]++
	h.mu.Unlock()
	<-ctx.Done()
	h.mu.Lock()
	defer h.mu.Unlock()
	h.waiting[n.Name]--
	return &nodes.Error{Node: n, Method: "Restart", Err: status.Error(codes.DeadlineExceeded, "no answer"),
		Silent: true}
}

func (h *hanging) Restart(ctx context.Context, n nodes.Node, r *opsv1.RestartRequest) (*opsv1.Operation, error) {
	if n.Name != "healthy" {
		return nil, h.swallow(ctx, n)
	}
	h.started <- r.GetUid()
	return &opsv1.Operation{Uid: r.GetUid(), Pod: r.GetPod(),
		Containers: []*opsv1.ContainerOperation{{Name: "app", Phase: opsv1.Phase_PHASE_STOPPING}}}, nil
}

func (h *hanging) GetOperation(ctx context.Context, n nodes.Node, _ string) (*opsv1.Operation, error) {
	return nil, h.swallow(ctx, n)
}

func (h *hanging) WatchOperation(ctx context.Context, _ nodes.Node, _ string, _ func(*opsv1.Operation)) error {
	<-ctx.Done()
	return ctx.Err()
}

func (h *hanging) hung() int {
	h.mu.Lock()
	defer h.mu.Unlock()
	n := 0
	for _, waiting := range h.waiting {
		n += waiting
	}
	return n
}

// A node that hangs costs the others nothing: 1,000 requests to 200 of them, and one to a healthy
// one is begun while all of them wait. Workers that wait would never come to it.
func TestHungNodes(t *testing.T) {
	const count, requests, workers = 200, 1000, 8
	b := newBed(t)
	add := func(node string, i int) reconcile.Request {
		t.Helper()
		name := fmt.Sprintf("r-%d", i)
		pod := &corev1.Pod{
			ObjectMeta: metav1.ObjectMeta{Namespace: "hang", Name: name, UID: types.UID("pod-" + name)},
			Spec: corev1.PodSpec{NodeName: node, RestartPolicy: corev1.RestartPolicyAlways,
				Containers: []corev1.Container{{Name: "app"}}},
			Status: corev1.PodStatus{Phase: corev1.PodRunning, ContainerStatuses: []corev1.ContainerStatus{{
				Name: "app", ContainerID: "containerd://" + name, Ready: true,
				State: corev1.ContainerState{Running: &corev1.ContainerStateRunning{StartedAt: metav1.Now()}},
			}}},
		}
		crr := &request{
			ObjectMeta: metav1.ObjectMeta{Namespace: "hang", Name: name, UID: types.UID("uid-" + name),
				CreationTimestamp: metav1.Now()},
			Spec: spec{PodName: name, Containers: containers("app"), Strategy: &how{}},
		}
		for _, o := range []client.Object{pod, crr} {
			if err := b.client.Create(t.Context(), o); err != nil {
				t.Fatal(err)
			}
		}
		return reconcile.Request{NamespacedName: client.ObjectKeyFromObject(crr)}
	}
	node := func(name string) {
		t.Helper()
		n := &corev1.Node{ObjectMeta: metav1.ObjectMeta{Name: name,
			Annotations: map[string]string{nodes.AddressAnnotation: "192.0.2.1:1"}}}
		if err := b.client.Create(t.Context(), n); err != nil {
			t.Fatal(err)
		}
	}
	node("healthy")
	for i := range count {
		node(fmt.Sprintf("hung-%d", i))
	}
	var all []reconcile.Request
	for i := range requests {
		all = append(all, add(fmt.Sprintf("hung-%d", i%count), i))
	}

	h := &hanging{waiting: map[string]int{}, started: make(chan string, 1)}
	log := logrus.New()
	log.SetOutput(io.Discard)
	// Without a recorder: the bed's holds 1,000 events, and then whoever writes one waits for ever.
	r := &recreate.Reconciler{Client: b.client, APIReader: b.client, Nodes: nodes.NewPatient(h), Log: log}
	tracker := r.Prepare(h, 16)
	pool := workerpool.New(nil)
	spread := workerpool.NewSpread(r, pool, workers)
	queue := workqueue.NewTypedRateLimitingQueue(workqueue.NewTypedItemExponentialFailureRateLimiter[reconcile.Request](
		50*time.Millisecond, 30*time.Second))
	ctx, cancel := context.WithCancel(context.Background())
	if err := errors.Join(spread.Start(ctx, queue), tracker.Source().Start(ctx, queue)); err != nil {
		t.Fatal(err)
	}
	var wg sync.WaitGroup
	wg.Go(func() { _ = pool.Start(ctx) })
	wg.Go(func() { _ = tracker.Start(ctx) })
	for range workers {
		wg.Go(func() {
			for {
				req, over := queue.Get()
				if over {
					return
				}
				result, err := spread.Reconcile(ctx, req)
				switch {
				case err != nil && ctx.Err() == nil:
					t.Errorf("%s: %v", req, err)
				case result.RequeueAfter > 0:
					queue.AddAfter(req, result.RequeueAfter)
				}
				queue.Done(req)
			}
		})
	}
	defer wg.Wait()
	defer queue.ShutDown()
	defer cancel()

	for _, req := range all {
		queue.Add(req)
	}
	// All requests have been taken up, and all nodes are being waited for, before the healthy one
	// is asked.
	takenUp := func() int {
		n, _, _ := r.Kept()
		return n
	}
	for end := time.Now().Add(patience); takenUp() < requests || h.hung() < count; time.Sleep(10 * time.Millisecond) {
		if time.Now().After(end) {
			t.Fatalf("%d requests are taken up, %d calls wait for %d nodes that hang", takenUp(), h.hung(), count)
		}
	}
	req := add("healthy", requests)
	begin := time.Now()
	queue.Add(req)
	select {
	case <-h.started:
		t.Logf("the healthy node was told after %s, while %d calls waited", time.Since(begin), h.hung())
	case <-time.After(patience):
		t.Fatal("the healthy node was not told")
	}
}
