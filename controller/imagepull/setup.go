// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package imagepull

import (
	"context"
	"time"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/labels"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/client-go/util/workqueue"
	"sigs.k8s.io/controller-runtime/pkg/builder"
	"sigs.k8s.io/controller-runtime/pkg/client"
	"sigs.k8s.io/controller-runtime/pkg/controller"
	"sigs.k8s.io/controller-runtime/pkg/event"
	"sigs.k8s.io/controller-runtime/pkg/handler"
	"sigs.k8s.io/controller-runtime/pkg/manager"
	"sigs.k8s.io/controller-runtime/pkg/reconcile"

	"github.com/cri-proxy/cri-proxy/api/apps/v1beta1"
	"github.com/cri-proxy/cri-proxy/controller/apierror"
	"github.com/cri-proxy/cri-proxy/controller/imagepull/spec"
	"github.com/cri-proxy/cri-proxy/controller/nodes"
	"github.com/cri-proxy/cri-proxy/controller/retry"
	"github.com/cri-proxy/cri-proxy/controller/workerpool"
)

// gatherInterval is how long events of nodes and pods are collected: they come in crowds.
const gatherInterval = 500 * time.Millisecond

type queue = workqueue.TypedRateLimitingInterface[reconcile.Request]

// SetupWithManager adds the reconciler to a manager: it then watches jobs, nodes and pods, and
// calls nodes, with the given number of workers.
func (r *Reconciler) SetupWithManager(_ context.Context, m manager.Manager, workers int) error {
	r.prepare()
	r.Gate.OnClose(r.forgetAll)
	for _, runnable := range []manager.Runnable{r.workers, r.tracker} {
		if err := m.Add(runnable); err != nil {
			return err
		}
	}
	newJob := func() client.Object { return &v1beta1.ImagePullJob{} }
	return builder.ControllerManagedBy(m).
		Named("imagepulljob").
		For(&v1beta1.ImagePullJob{}, builder.WithPredicates(spec.JobChanges())).
		Watches(&v1beta1.ImagePullJob{}, r.deletions()).
		Watches(&corev1.Node{}, gathered(r.jobsOfNode), builder.WithPredicates(spec.NodeChanges())).
		Watches(&corev1.Pod{}, gathered(r.jobsOfPod), builder.WithPredicates(spec.PodChanges())).
		WatchesRawSource(r.tracker.Source()).
		WithOptions(controller.Options{
			MaxConcurrentReconciles: workers,
			RateLimiter:             retry.RateLimiter(),
		}).
		Complete(apierror.Tell(r, newJob, m.GetClient(), r.Recorder))
}

// prepare makes what a reconcile needs.
func (r *Reconciler) prepare() {
	r.workers, r.memories = workerpool.New(r.Metrics.workers()), map[types.NamespacedName]*memory{}
	r.tracker = nodes.NewPullTracker(r.Nodes, nodes.TrackerOptions{Gather: r.gather, Following: r.Metrics.pulling})
}

// deletions see a job as it was when it was deleted.
func (r *Reconciler) deletions() handler.EventHandler {
	return handler.Funcs{DeleteFunc: func(_ context.Context, e event.DeleteEvent, _ queue) {
		if job, ok := e.Object.(*v1beta1.ImagePullJob); ok {
			r.deleted(job)
		}
	}}
}

// gathered enqueues requests after a while, so that many events make one request.
func gathered(requests func(context.Context, client.Object) []reconcile.Request) handler.EventHandler {
	add := func(ctx context.Context, o client.Object, q queue) {
		for _, r := range requests(ctx, o) {
			q.AddAfter(r, gatherInterval)
		}
	}
	return handler.Funcs{
		CreateFunc: func(ctx context.Context, e event.CreateEvent, q queue) { add(ctx, e.Object, q) },
		UpdateFunc: func(ctx context.Context, e event.UpdateEvent, q queue) {
			add(ctx, e.ObjectOld, q)
			add(ctx, e.ObjectNew, q)
		},
		DeleteFunc: func(ctx context.Context, e event.DeleteEvent, q queue) { add(ctx, e.Object, q) },
	}
}

// jobs are the unfinished jobs that are chosen, and those that begin again: the cache may not have
// the status yet that says so. They find out again which nodes they choose.
func (r *Reconciler) jobs(
	ctx context.Context, chosen func(*v1beta1.ImagePullJob) bool, opts ...client.ListOption,
) []reconcile.Request {
	var list v1beta1.ImagePullJobList
	if err := r.Client.List(ctx, &list, opts...); err != nil {
		r.Log.WithError(err).Warn("listing the jobs of a node or pod")
		return nil
	}
	var requests []reconcile.Request
	for i := range list.Items {
		job := &list.Items[i]
		if (job.Status.CompletionTime == nil || spec.BeginsAnew(job)) && chosen(job) {
			key := client.ObjectKeyFromObject(job)
			r.rematch(key)
			requests = append(requests, reconcile.Request{NamespacedName: key})
		}
	}
	return requests
}

// jobsOfNode are all unfinished jobs: a reconcile finds out which nodes a job chooses in one go.
func (r *Reconciler) jobsOfNode(ctx context.Context, _ client.Object) []reconcile.Request {
	return r.jobs(ctx, func(*v1beta1.ImagePullJob) bool { return true })
}

// jobsOfPod are the unfinished jobs that choose the pod's node because of the pod.
func (r *Reconciler) jobsOfPod(ctx context.Context, pod client.Object) []reconcile.Request {
	return r.jobs(ctx, func(job *v1beta1.ImagePullJob) bool {
		pods := spec.PodSelector(job)
		if pods == nil {
			return false
		}
		selector, err := metav1.LabelSelectorAsSelector(pods)
		return err == nil && selector.Matches(labels.Set(pod.GetLabels()))
	}, client.InNamespace(pod.GetNamespace()))
}
