// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package nodecondition

import (
	"context"
	"time"

	"golang.org/x/time/rate"
	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/client-go/util/workqueue"
	"sigs.k8s.io/controller-runtime/pkg/builder"
	ctrl "sigs.k8s.io/controller-runtime/pkg/controller"
	"sigs.k8s.io/controller-runtime/pkg/event"
	"sigs.k8s.io/controller-runtime/pkg/handler"
	"sigs.k8s.io/controller-runtime/pkg/manager"
	"sigs.k8s.io/controller-runtime/pkg/reconcile"

	"github.com/cri-proxy/cri-proxy/controller/nodes"
	"github.com/cri-proxy/cri-proxy/controller/workerpool"
)

const (
	// startRate is how many nodes a second the controller asks for the first time. After it starts,
	// that is all of them.
	startRate = 50
	// workers is enough for the nodes of a large cluster. A node that lets a question run into its
	// timeout of 5 seconds holds no worker.
	workers = 16
)

// SetupWithManager adds the reconciler to a manager: it then asks each node, again and again.
func (r *Reconciler) SetupWithManager(m manager.Manager) error {
	pool := workerpool.New(nil)
	if err := m.Add(pool); err != nil {
		return err
	}
	spread := workerpool.NewSpread(r, pool, workers)
	return builder.ControllerManagedBy(m).
		Named("nodecondition").
		Watches(&corev1.Node{}, r.changes()).
		WatchesRawSource(spread).
		WithOptions(ctrl.Options{
			MaxConcurrentReconciles: workers,
			RateLimiter: workqueue.NewTypedItemExponentialFailureRateLimiter[reconcile.Request](time.Second,
				5*time.Minute),
		}).
		Complete(spread)
}

// changes enqueues nodes that are new, that have another address, or that can be asked again. Other
// changes of a Node are no reason to ask; most of them are heartbeats.
func (r *Reconciler) changes() handler.EventHandler {
	pace := rate.NewLimiter(startRate, startRate)
	ask := func(name string, q workqueue.TypedRateLimitingInterface[reconcile.Request]) {
		q.AddAfter(reconcile.Request{NamespacedName: types.NamespacedName{Name: name}}, pace.Reserve().Delay())
	}
	return handler.Funcs{
		CreateFunc: func(_ context.Context, e event.CreateEvent,
			q workqueue.TypedRateLimitingInterface[reconcile.Request]) {
			ask(e.Object.GetName(), q)
		},
		UpdateFunc: func(_ context.Context, e event.UpdateEvent,
			q workqueue.TypedRateLimitingInterface[reconcile.Request]) {
			before, ok1 := e.ObjectOld.(*corev1.Node)
			after, ok2 := e.ObjectNew.(*corev1.Node)
			if !ok1 || !ok2 {
				return
			}
			was, _ := nodes.Of(before, 0)
			is, _ := nodes.Of(after, 0)
			if was != is || ready(before) != ready(after) {
				ask(after.Name, q)
			}
		},
		DeleteFunc: func(_ context.Context, e event.DeleteEvent,
			_ workqueue.TypedRateLimitingInterface[reconcile.Request]) {
			r.forget(e.Object.GetName())
		},
	}
}

func ready(n *corev1.Node) bool {
	c := conditionOf(n, corev1.NodeReady)
	return c != nil && c.Status == corev1.ConditionTrue
}
