// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package imagepull

import (
	"context"
	"maps"
	"time"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/labels"
	"k8s.io/client-go/util/workqueue"
	"sigs.k8s.io/controller-runtime/pkg/builder"
	"sigs.k8s.io/controller-runtime/pkg/client"
	"sigs.k8s.io/controller-runtime/pkg/controller"
	"sigs.k8s.io/controller-runtime/pkg/event"
	"sigs.k8s.io/controller-runtime/pkg/handler"
	"sigs.k8s.io/controller-runtime/pkg/manager"
	"sigs.k8s.io/controller-runtime/pkg/predicate"
	"sigs.k8s.io/controller-runtime/pkg/reconcile"
	"sigs.k8s.io/controller-runtime/pkg/source"

	"github.com/cri-proxy/cri-proxy/api/apps/v1beta1"
	"github.com/cri-proxy/cri-proxy/controller/apierror"
	"github.com/cri-proxy/cri-proxy/controller/nodes"
)

// gather is how long events of nodes and pods are collected: they come in crowds.
const gather = 500 * time.Millisecond

// SetupWithManager adds the reconciler to a manager: it then watches jobs, nodes and pods, and talks to nodes, with the
// given number of workers.
func (r *Reconciler) SetupWithManager(_ context.Context, m manager.Manager, workers int) error {
	r.prepare()
	r.Gate.OnClose(r.standDown)
	if err := m.Add(r.crew); err != nil {
		return err
	}
	return builder.ControllerManagedBy(m).
		Named("imagepulljob").
		For(&v1beta1.ImagePullJob{}, builder.WithPredicates(jobChanges())).
		Watches(&v1beta1.ImagePullJob{}, r.deletions()).
		Watches(&corev1.Node{}, crowd(r.jobsOfNode), builder.WithPredicates(nodeChanges())).
		Watches(&corev1.Pod{}, crowd(r.jobsOfPod), builder.WithPredicates(podChanges())).
		WatchesRawSource(source.Channel(r.wakes, &handler.TypedEnqueueRequestForObject[*v1beta1.ImagePullJob]{})).
		WithOptions(options(workers)).
		Complete(apierror.Tell(r, func() client.Object { return &v1beta1.ImagePullJob{} }, m.GetClient(), r.Recorder))
}

// deletions see what a job was when it was deleted.
func (r *Reconciler) deletions() handler.EventHandler {
	return handler.Funcs{DeleteFunc: func(_ context.Context, e event.DeleteEvent, _ workqueue.TypedRateLimitingInterface[reconcile.Request]) {
		if job, ok := e.Object.(*v1beta1.ImagePullJob); ok {
			r.deleted(job)
		}
	}}
}

func options(workers int) controller.Options {
	return controller.Options{
		MaxConcurrentReconciles: workers,
		RateLimiter:             workqueue.NewTypedItemExponentialFailureRateLimiter[reconcile.Request](50*time.Millisecond, 30*time.Second),
	}
}

// jobChanges leaves out what the controller itself writes.
func jobChanges() predicate.Predicate {
	return predicate.Or[client.Object](predicate.GenerationChangedPredicate{}, predicate.AnnotationChangedPredicate{})
}

// crowd enqueues requests after a while, so that many events make one.
func crowd(requests func(context.Context, client.Object) []reconcile.Request) handler.EventHandler {
	add := func(ctx context.Context, o client.Object, q workqueue.TypedRateLimitingInterface[reconcile.Request]) {
		for _, r := range requests(ctx, o) {
			q.AddAfter(r, gather)
		}
	}
	return handler.Funcs{
		CreateFunc: func(ctx context.Context, e event.CreateEvent, q workqueue.TypedRateLimitingInterface[reconcile.Request]) {
			add(ctx, e.Object, q)
		},
		UpdateFunc: func(ctx context.Context, e event.UpdateEvent, q workqueue.TypedRateLimitingInterface[reconcile.Request]) {
			add(ctx, e.ObjectOld, q)
			add(ctx, e.ObjectNew, q)
		},
		DeleteFunc: func(ctx context.Context, e event.DeleteEvent, q workqueue.TypedRateLimitingInterface[reconcile.Request]) {
			add(ctx, e.Object, q)
		},
	}
}

func (r *Reconciler) jobs(ctx context.Context, mine func(*v1beta1.ImagePullJob) bool, opts ...client.ListOption) []reconcile.Request {
	var list v1beta1.ImagePullJobList
	if err := r.Client.List(ctx, &list, opts...); err != nil {
		r.Log.WithError(err).Warn("listing the jobs of a node or pod")
		return nil
	}
	var requests []reconcile.Request
	for i := range list.Items {
		if job := &list.Items[i]; job.Status.CompletionTime == nil && mine(job) {
			requests = append(requests, reconcile.Request{NamespacedName: client.ObjectKeyFromObject(job)})
		}
	}
	return requests
}

// jobsOfNode are all unfinished jobs: which nodes they choose is found out in one go.
func (r *Reconciler) jobsOfNode(ctx context.Context, _ client.Object) []reconcile.Request {
	return r.jobs(ctx, func(*v1beta1.ImagePullJob) bool { return true })
}

// jobsOfPod are the unfinished jobs that choose the pod's node by it.
func (r *Reconciler) jobsOfPod(ctx context.Context, pod client.Object) []reconcile.Request {
	return r.jobs(ctx, func(job *v1beta1.ImagePullJob) bool {
		pods := podSelectorOf(job)
		if pods == nil {
			return false
		}
		selector, err := metav1.LabelSelectorAsSelector(pods)
		return err == nil && selector.Matches(labels.Set(pod.GetLabels()))
	}, client.InNamespace(pod.GetNamespace()))
}

// nodeChanges lets through what decides whether and where a node is commanded.
func nodeChanges() predicate.Predicate {
	return predicate.Funcs{
		GenericFunc: func(event.GenericEvent) bool { return false },
		UpdateFunc: func(e event.UpdateEvent) bool {
			before, ok1 := e.ObjectOld.(*corev1.Node)
			after, ok2 := e.ObjectNew.(*corev1.Node)
			if !ok1 || !ok2 {
				return true
			}
			was, _ := nodes.Of(before, 0)
			is, _ := nodes.Of(after, 0)
			return was != is || nodeReady(before) != nodeReady(after) || !maps.Equal(before.Labels, after.Labels) ||
				(before.DeletionTimestamp == nil) != (after.DeletionTimestamp == nil)
		},
	}
}

// podChanges lets through what puts a pod on a node, or takes it off.
func podChanges() predicate.Predicate {
	return predicate.Funcs{
		GenericFunc: func(event.GenericEvent) bool { return false },
		UpdateFunc: func(e event.UpdateEvent) bool {
			before, ok1 := e.ObjectOld.(*corev1.Pod)
			after, ok2 := e.ObjectNew.(*corev1.Pod)
			return !ok1 || !ok2 || before.UID != after.UID || activePod(before) != activePod(after) || !maps.Equal(before.Labels, after.Labels)
		},
	}
}
