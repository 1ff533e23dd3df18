// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package recreate

import (
	"context"
	"slices"

	corev1 "k8s.io/api/core/v1"
	"sigs.k8s.io/controller-runtime/pkg/builder"
	"sigs.k8s.io/controller-runtime/pkg/client"
	"sigs.k8s.io/controller-runtime/pkg/controller"
	"sigs.k8s.io/controller-runtime/pkg/event"
	"sigs.k8s.io/controller-runtime/pkg/handler"
	"sigs.k8s.io/controller-runtime/pkg/manager"
	"sigs.k8s.io/controller-runtime/pkg/predicate"
	"sigs.k8s.io/controller-runtime/pkg/reconcile"

	appsv1alpha1 "github.com/cri-proxy/cri-proxy/api/apps/v1alpha1"
	opsv1 "github.com/cri-proxy/cri-proxy/api/ops/v1"
	"github.com/cri-proxy/cri-proxy/controller/apierror"
	"github.com/cri-proxy/cri-proxy/controller/nodes"
	"github.com/cri-proxy/cri-proxy/controller/retry"
	"github.com/cri-proxy/cri-proxy/controller/workerpool"
)

// maxWatches bounds the streams to nodes. The reconciler polls the operations beyond it.
const maxWatches = 1024

// podNameIndex finds the unfinished requests of a pod.
const podNameIndex = "spec.podName"

// SetupWithManager adds the reconciler to a manager: it then watches requests, pods and running
// operations with the given number of workers. Reconciles that wait for a node do not count.
func (r *Reconciler) SetupWithManager(ctx context.Context, m manager.Manager, workers int) error {
	r.tracker = r.newTracker(r.Nodes, maxWatches)
	r.Nodes = nodes.NewPatient(r.Nodes) // not for the tracker: a stream is how a silent node is found to be back
	pool := workerpool.New(nil)
	if err := m.Add(pool); err != nil {
		return err
	}
	newRequest := func() client.Object { return &appsv1alpha1.ContainerRecreateRequest{} }
	spread := workerpool.NewSpread(apierror.Tell(r, newRequest, m.GetClient(), r.Recorder), pool, workers)
	r.Gate.OnClose(r.standDown)
	if err := m.Add(r.tracker); err != nil {
		return err
	}
	indexer := m.GetFieldIndexer()
	if err := indexer.IndexField(ctx, &appsv1alpha1.ContainerRecreateRequest{}, podNameIndex,
		indexPodName); err != nil {
		return err
	}
	return builder.ControllerManagedBy(m).
		Named("containerrecreaterequest").
		For(&appsv1alpha1.ContainerRecreateRequest{}).
		Watches(&corev1.Pod{}, handler.EnqueueRequestsFromMapFunc(r.requestsOfPod),
			builder.WithPredicates(podChanges())).
		WatchesRawSource(spread).
		WatchesRawSource(r.tracker.Source()).
		WithOptions(controller.Options{MaxConcurrentReconciles: workers, RateLimiter: retry.RateLimiter()}).
		Complete(spread)
}

// newTracker returns what follows operations on nodes, at most limit at once.
func (r *Reconciler) newTracker(client nodes.Operations, limit int) *nodes.Tracker[*opsv1.Operation] {
	return nodes.NewTracker(client, nodes.TrackerOptions{Limit: limit, Following: r.Metrics.watching, Log: r.Log})
}

// indexPodName leaves out completed requests: their pod does not matter any more.
func indexPodName(o client.Object) []string {
	crr, ok := o.(*appsv1alpha1.ContainerRecreateRequest)
	if !ok || crr.Status.CompletionTime != nil {
		return nil
	}
	return []string{crr.Spec.PodName}
}

// requestsOfPod returns the unfinished requests for a pod.
func (r *Reconciler) requestsOfPod(ctx context.Context, pod client.Object) []reconcile.Request {
	var list appsv1alpha1.ContainerRecreateRequestList
	ofPod := client.MatchingFields{podNameIndex: pod.GetName()}
	if err := r.Client.List(ctx, &list, client.InNamespace(pod.GetNamespace()), ofPod); err != nil {
		r.Log.WithError(err).WithField("pod", client.ObjectKeyFromObject(pod).String()).
			Warn("listing the requests of a pod")
		return nil
	}
	var requests []reconcile.Request
	for i := range list.Items {
		requests = append(requests, reconcile.Request{NamespacedName: client.ObjectKeyFromObject(&list.Items[i])})
	}
	return requests
}

// podChanges lets through what can take a request further: a container changed, or the pod is
// going.
func podChanges() predicate.Predicate {
	return predicate.Funcs{
		CreateFunc:  func(event.CreateEvent) bool { return false },
		GenericFunc: func(event.GenericEvent) bool { return false },
		UpdateFunc: func(e event.UpdateEvent) bool {
			before, ok1 := e.ObjectOld.(*corev1.Pod)
			after, ok2 := e.ObjectNew.(*corev1.Pod)
			return !ok1 || !ok2 || before.UID != after.UID || before.Status.Phase != after.Status.Phase ||
				(before.DeletionTimestamp == nil) != (after.DeletionTimestamp == nil) ||
				!slices.EqualFunc(before.Status.ContainerStatuses, after.Status.ContainerStatuses, sameStatus) ||
				!slices.EqualFunc(before.Status.InitContainerStatuses, after.Status.InitContainerStatuses, sameStatus)
		},
	}
}

func isTrue(b *bool) bool { return b != nil && *b }

// sameStatus compares what observe reads.
func sameStatus(a, b corev1.ContainerStatus) bool {
	return a.Name == b.Name && a.ContainerID == b.ContainerID && a.Ready == b.Ready &&
		isTrue(a.Started) == isTrue(b.Started) && a.RestartCount == b.RestartCount &&
		(a.State.Running == nil) == (b.State.Running == nil) &&
		(a.State.Terminated == nil) == (b.State.Terminated == nil) &&
		(a.State.Waiting == nil) == (b.State.Waiting == nil)
}
