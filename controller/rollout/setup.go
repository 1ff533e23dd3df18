// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package rollout

import (
	"context"
	"maps"
	"slices"
	"time"

	appsv1 "k8s.io/api/apps/v1"
	corev1 "k8s.io/api/core/v1"
	apiequality "k8s.io/apimachinery/pkg/api/equality"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/util/workqueue"
	"sigs.k8s.io/controller-runtime/pkg/builder"
	"sigs.k8s.io/controller-runtime/pkg/client"
	"sigs.k8s.io/controller-runtime/pkg/event"
	"sigs.k8s.io/controller-runtime/pkg/handler"
	"sigs.k8s.io/controller-runtime/pkg/manager"
	"sigs.k8s.io/controller-runtime/pkg/predicate"
	"sigs.k8s.io/controller-runtime/pkg/reconcile"

	inplace "github.com/cri-proxy/cri-proxy/api/inplace/v1alpha1"
	"github.com/cri-proxy/cri-proxy/controller/apierror"
	"github.com/cri-proxy/cri-proxy/controller/pods"
	"github.com/cri-proxy/cri-proxy/controller/rollout/requeue"
	"github.com/cri-proxy/cri-proxy/controller/rollout/workload"
)

// gatherFor is how long to collect events of pods and nodes before a reconcile: they come in
// crowds, and a reconcile looks at all pods. It is that much longer for each gatherPods pods of the
// rollout.
const (
	gatherFor  = 50 * time.Millisecond
	gatherPods = 1000
)

// gather returns how long to collect events of a rollout.
func (r *Reconciler) gather(request reconcile.Request) time.Duration {
	return r.knownWork(request.NamespacedName).gather()
}

// gather returns how long to collect events of a rollout; the work may be nil.
func (w *work) gather() time.Duration {
	if w == nil {
		return gatherFor
	}
	return gatherFor + gatherFor*time.Duration(w.ops.Size())/gatherPods
}

// SetupWithManager adds the reconciler to a manager: it then watches rollouts, pods and workloads,
// and talks to nodes, with the given number of workers.
func (r *Reconciler) SetupWithManager(_ context.Context, m manager.Manager, workers int) error {
	r.prepare()
	if err := m.Add(r.workers); err != nil {
		return err
	}
	if err := m.Add(r.tracker); err != nil {
		return err
	}
	return builder.ControllerManagedBy(m).
		Named("inplacerollout").
		For(&inplace.InPlaceRollout{}, builder.WithPredicates(requeue.RolloutChanges())).
		Watches(&corev1.Pod{}, r.crowd(r.rolloutsOfPod), builder.WithPredicates(podChanges())).
		Watches(&appsv1.StatefulSet{}, r.crowd(r.rolloutsOfWorkload(workload.KindStatefulSet))).
		Watches(&appsv1.DaemonSet{}, r.crowd(r.rolloutsOfWorkload(workload.KindDaemonSet))).
		Watches(&appsv1.Deployment{}, r.crowd(r.rolloutsOfWorkload(workload.KindDeployment))).
		Watches(&appsv1.ReplicaSet{}, r.crowd(r.rolloutsOfReplicaSet)).
		WatchesRawSource(r.tracker.Source()).
		WithOptions(requeue.Options(workers)).
		Complete(apierror.Tell(r, func() client.Object { return &inplace.InPlaceRollout{} }, m.GetClient(), r.Recorder))
}

type queue = workqueue.TypedRateLimitingInterface[reconcile.Request]

// crowd enqueues requests after a while, so that many events make one.
func (r *Reconciler) crowd(requests func(context.Context, client.Object) []reconcile.Request) handler.EventHandler {
	add := func(ctx context.Context, o client.Object, q queue) {
		for _, request := range requests(ctx, o) {
			q.AddAfter(request, r.gather(request))
		}
	}
	return handler.Funcs{
		CreateFunc: func(ctx context.Context, e event.CreateEvent, q queue) { add(ctx, e.Object, q) },
		UpdateFunc: func(ctx context.Context, e event.UpdateEvent, q queue) { add(ctx, e.ObjectNew, q) },
		DeleteFunc: func(ctx context.Context, e event.DeleteEvent, q queue) { add(ctx, e.Object, q) },
	}
}

// rolloutsOf returns the unfinished rollouts that an object of their namespace concerns.
func (r *Reconciler) rolloutsOf(
	ctx context.Context, o client.Object, mine func(*work, *inplace.InPlaceRollout) bool,
) []reconcile.Request {
	var list inplace.InPlaceRolloutList
	if err := r.Client.List(ctx, &list, client.InNamespace(o.GetNamespace()),
		client.UnsafeDisableDeepCopy); err != nil {
		r.Log.WithError(err).Warn("listing rollouts")
		return nil
	}
	var requests []reconcile.Request
	for i := range list.Items {
		key := client.ObjectKeyFromObject(&list.Items[i])
		if list.Items[i].Status.CompletionTime == nil && mine(r.knownWork(key), &list.Items[i]) {
			requests = append(requests, reconcile.Request{NamespacedName: key})
		}
	}
	return requests
}

func (r *Reconciler) rolloutsOfPod(ctx context.Context, pod client.Object) []reconcile.Request {
	return r.rolloutsOf(ctx, pod, func(w *work, rollout *inplace.InPlaceRollout) bool { return w.about(rollout, pod) })
}

// rolloutsOfWorkload returns the unfinished rollouts of a workload of the kind.
func (r *Reconciler) rolloutsOfWorkload(kind string) func(context.Context, client.Object) []reconcile.Request {
	return func(ctx context.Context, o client.Object) []reconcile.Request {
		return r.rolloutsNaming(ctx, o, kind, o.GetName())
	}
}

func (r *Reconciler) rolloutsOfReplicaSet(ctx context.Context, set client.Object) []reconcile.Request {
	owner := metav1.GetControllerOf(set)
	if owner == nil || owner.Kind != workload.KindDeployment {
		return nil
	}
	return r.rolloutsNaming(ctx, set, workload.KindDeployment, owner.Name)
}

func (r *Reconciler) rolloutsNaming(ctx context.Context, o client.Object, kind, name string) []reconcile.Request {
	return r.rolloutsOf(ctx, o, func(_ *work, rollout *inplace.InPlaceRollout) bool {
		ref := rollout.Spec.Target.WorkloadRef
		return ref != nil && ref.Kind == kind && ref.Name == name
	})
}

// podChanges passes changes of what package evaluate reads.
func podChanges() predicate.Predicate {
	return predicate.Funcs{
		GenericFunc: func(event.GenericEvent) bool { return false },
		UpdateFunc: func(e event.UpdateEvent) bool {
			before, ok1 := e.ObjectOld.(*corev1.Pod)
			after, ok2 := e.ObjectNew.(*corev1.Pod)
			return !ok1 || !ok2 || before.UID != after.UID || pods.Active(before) != pods.Active(after) ||
				before.Spec.NodeName != after.Spec.NodeName ||
				before.Annotations[inplace.PodStateAnnotation] != after.Annotations[inplace.PodStateAnnotation] ||
				!maps.Equal(before.Labels, after.Labels) || !slices.EqualFunc(before.Status.Conditions,
				after.Status.Conditions, sameCondition) ||
				!slices.EqualFunc(before.Status.ContainerStatuses, after.Status.ContainerStatuses, sameStatus) ||
				!slices.EqualFunc(before.Status.InitContainerStatuses, after.Status.InitContainerStatuses,
					sameStatus) ||
				!slices.EqualFunc(before.Spec.Containers, after.Spec.Containers,
					func(a, b corev1.Container) bool { return a.Image == b.Image }) ||
				!slices.EqualFunc(before.Spec.InitContainers, after.Spec.InitContainers,
					func(a, b corev1.Container) bool { return a.Image == b.Image })
		},
	}
}

func sameCondition(a, b corev1.PodCondition) bool { return a.Type == b.Type && a.Status == b.Status }

func sameStatus(a, b corev1.ContainerStatus) bool { return apiequality.Semantic.DeepEqual(a, b) }
