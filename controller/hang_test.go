// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package controller

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
	"github.com/cri-proxy/cri-proxy/controller/crew"
)

// hanging answers for one node; the others swallow every call, as one does whose kernel hangs.
type hanging struct {
	NodeClient
	mu      sync.Mutex
	waiting map[string]int // calls under way, by node
	started chan string
}

func (h *hanging) swallow(ctx context.Context, n Node) error {
	h.mu.Lock()
	h.waiting[n.Name]++
	h.mu.Unlock()
	timer := time.NewTimer(callTimeout)
	defer timer.Stop()
	select {
	case <-timer.C:
	case <-ctx.Done():
	}
	h.mu.Lock()
	defer h.mu.Unlock()
	h.waiting[n.Name]--
	return &NodeError{Node: n, Method: "Restart", Err: status.Error(codes.DeadlineExceeded, "no answer"), Silent: true}
}

func (h *hanging) Restart(ctx context.Context, n Node, r *opsv1.RestartRequest) (*opsv1.Operation, error) {
	if n.Name != "healthy" {
		return nil, h.swallow(ctx, n)
	}
	h.started <- r.GetUid()
	return &opsv1.Operation{Uid: r.GetUid(), Pod: r.GetPod(), Containers: []*opsv1.ContainerOperation{{Name: "app", Phase: opsv1.Phase_PHASE_STOPPING}}}, nil
}

func (h *hanging) GetOperation(ctx context.Context, n Node, _ string) (*opsv1.Operation, error) {
	return nil, h.swallow(ctx, n)
}

func (h *hanging) WatchOperation(ctx context.Context, _ Node, _ string, _ func(*opsv1.Operation)) error {
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

// A node that hangs costs the others nothing: 1,000 requests to 200 of them, and one to a healthy one starts within a second. With the
// workers that used to wait it took minutes.
func TestHungNodes(t *testing.T) {
	const nodes, requests, workers = 200, 1000, 8
	b := newBed(t)
	add := func(node string, i int) reconcile.Request {
		t.Helper()
		name := fmt.Sprintf("r-%d", i)
		pod := &corev1.Pod{
			ObjectMeta: metav1.ObjectMeta{Namespace: "hang", Name: name, UID: types.UID("pod-" + name)},
			Spec:       corev1.PodSpec{NodeName: node, RestartPolicy: corev1.RestartPolicyAlways, Containers: []corev1.Container{{Name: "app"}}},
			Status: corev1.PodStatus{Phase: corev1.PodRunning, ContainerStatuses: []corev1.ContainerStatus{{
				Name: "app", ContainerID: "containerd://" + name, Ready: true,
				State: corev1.ContainerState{Running: &corev1.ContainerStateRunning{StartedAt: metav1.Now()}},
			}}},
		}
		crr := &request{
			ObjectMeta: metav1.ObjectMeta{Namespace: "hang", Name: name, UID: types.UID("uid-" + name), CreationTimestamp: metav1.Now()},
			Spec:       spec{PodName: name, Containers: containers("app"), Strategy: &how{}},
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
		n := &corev1.Node{ObjectMeta: metav1.ObjectMeta{Name: name, Annotations: map[string]string{OpsAddressAnnotation: "192.0.2.1:1"}}}
		if err := b.client.Create(t.Context(), n); err != nil {
			t.Fatal(err)
		}
	}
	node("healthy")
	for i := range nodes {
		node(fmt.Sprintf("hung-%d", i))
	}
	var all []reconcile.Request
	for i := range requests {
		all = append(all, add(fmt.Sprintf("hung-%d", i%nodes), i))
	}

	h := &hanging{waiting: map[string]int{}, started: make(chan string, 1)}
	log := logrus.New()
	log.SetOutput(io.Discard)
	r := &ContainerRecreateReconciler{Client: b.client, APIReader: b.client, Nodes: newUnhurried(h), Recorder: b.recorder, Log: log}
	r.watches = newOperationWatches(h, nil, log, 16)
	hands := crew.New(nil)
	spread := crew.NewSpread(r, hands, workers)
	queue := workqueue.NewTypedRateLimitingQueue(workqueue.NewTypedItemExponentialFailureRateLimiter[reconcile.Request](50*time.Millisecond, 30*time.Second))
	ctx, cancel := context.WithCancel(context.Background())
	if err := spread.Start(ctx, queue); err != nil {
		t.Fatal(err)
	}
	var wg sync.WaitGroup
	wg.Go(func() { _ = hands.Start(ctx) })
	wg.Go(func() { _ = r.watches.Start(ctx) })
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
	// All requests have been taken up, and all nodes are being waited for, before the healthy one is asked.
	takenUp := func() int {
		r.mu.Lock()
		defer r.mu.Unlock()
		return len(r.memories)
	}
	for end := time.Now().Add(patience); takenUp() < requests || h.hung() < nodes; time.Sleep(10 * time.Millisecond) {
		if time.Now().After(end) {
			t.Fatalf("%d requests are taken up, %d calls wait for %d nodes that hang", takenUp(), h.hung(), nodes)
		}
	}
	req := add("healthy", requests)
	begin := time.Now()
	queue.Add(req)
	select {
	case <-h.started:
		if took := time.Since(begin); took > time.Second {
			t.Errorf("the healthy node was told after %s", took)
		} else {
			t.Logf("the healthy node was told after %s, while %d calls waited", took, h.hung())
		}
	case <-time.After(patience):
		t.Fatal("the healthy node was not told")
	}
}

// While a node is silent only one call at a time finds out about it; an answer ends that.
func TestDoubt(t *testing.T) {
	u := newUnhurried(nil)
	n := Node{Name: "n"}
	silent := &NodeError{Node: n, Err: status.Error(codes.Unavailable, "away"), Silent: true}
	call := func(err error) error {
		_, got := unhurriedly(t.Context(), u, n, func() (int, error) { return 0, err })
		return got
	}
	if err := call(silent); !errors.Is(err, silent) {
		t.Fatal(err)
	}
	if _, err := unhurriedly(t.Context(), u, n, func() (int, error) {
		if err := call(nil); !errors.Is(err, silent) {
			t.Errorf("a second call was made: %v", err)
		}
		return 1, nil
	}); err != nil {
		t.Errorf("the first one was not made: %v", err)
	}
	if len(u.nodes) != 0 {
		t.Error("still in doubt after an answer")
	}
	refusal := &NodeError{Node: n, Err: status.Error(codes.NotFound, "none")}
	if err := call(refusal); !errors.Is(err, refusal) || len(u.nodes) != 0 {
		t.Errorf("%v; a node that answers is not in doubt", err)
	}
}
