// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package gates

import (
	"context"

	corev1 "k8s.io/api/core/v1"
	"sigs.k8s.io/controller-runtime/pkg/builder"
	"sigs.k8s.io/controller-runtime/pkg/client"
	"sigs.k8s.io/controller-runtime/pkg/event"
	"sigs.k8s.io/controller-runtime/pkg/handler"
	"sigs.k8s.io/controller-runtime/pkg/manager"
	"sigs.k8s.io/controller-runtime/pkg/predicate"
	"sigs.k8s.io/controller-runtime/pkg/reconcile"

	inplace "github.com/cri-proxy/cri-proxy/api/inplace/v1alpha1"
	"github.com/cri-proxy/cri-proxy/controller/apierror"
	"github.com/cri-proxy/cri-proxy/controller/rollout/evaluate"
	"github.com/cri-proxy/cri-proxy/controller/rollout/requeue"
)

// SetupWithManager adds the reconciler to a manager: it then watches pods with gates.
func (r *Reconciler) SetupWithManager(_ context.Context, m manager.Manager, workers int) error {
	return builder.ControllerManagedBy(m).
		Named("inplace-gates").
		For(&corev1.Pod{}, builder.WithPredicates(gateChanges())).
		Watches(&inplace.InPlaceRollout{}, handler.EnqueueRequestsFromMapFunc(r.shutPods),
			builder.WithPredicates(endings())).
		WithOptions(requeue.Options(workers)).
		Complete(apierror.Tell(r, func() client.Object { return &corev1.Pod{} }, m.GetClient(), r.Recorder))
}

// gateChanges passes pods whose gates may have to be opened.
func gateChanges() predicate.Predicate {
	return predicate.NewPredicateFuncs(func(o client.Object) bool {
		pod, ok := o.(*corev1.Pod)
		return ok && Needs(pod)
	})
}

// endings passes rollouts that lose their finalizer: they have ended.
func endings() predicate.Predicate {
	return predicate.Funcs{
		CreateFunc:  func(event.CreateEvent) bool { return false },
		GenericFunc: func(event.GenericEvent) bool { return false },
		UpdateFunc: func(e event.UpdateEvent) bool {
			return len(e.ObjectOld.GetFinalizers()) > 0 && len(e.ObjectNew.GetFinalizers()) == 0
		},
	}
}

// shutPods returns the pods that a rollout has taken out of service.
func (r *Reconciler) shutPods(ctx context.Context, rollout client.Object) []reconcile.Request {
	var list corev1.PodList
	if err := r.Client.List(ctx, &list, client.InNamespace(rollout.GetNamespace()),
		client.UnsafeDisableDeepCopy); err != nil {
		r.Log.WithError(err).Warn("listing the pods of a rollout")
		return nil
	}
	var requests []reconcile.Request
	for i := range list.Items {
		if by, _ := evaluate.OutOfServiceBy(&list.Items[i]); by == rollout.GetUID() {
			requests = append(requests, reconcile.Request{NamespacedName: client.ObjectKeyFromObject(&list.Items[i])})
		}
	}
	return requests
}
