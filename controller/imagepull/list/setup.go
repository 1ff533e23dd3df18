// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package list

import (
	"context"

	"sigs.k8s.io/controller-runtime/pkg/builder"
	"sigs.k8s.io/controller-runtime/pkg/client"
	"sigs.k8s.io/controller-runtime/pkg/controller"
	"sigs.k8s.io/controller-runtime/pkg/event"
	"sigs.k8s.io/controller-runtime/pkg/manager"
	"sigs.k8s.io/controller-runtime/pkg/predicate"

	"github.com/cri-proxy/cri-proxy/api/apps/v1beta1"
	"github.com/cri-proxy/cri-proxy/controller/apierror"
	"github.com/cri-proxy/cri-proxy/controller/imagepull/spec"
	"github.com/cri-proxy/cri-proxy/controller/retry"
)

// SetupWithManager adds the reconciler to a manager with the given number of workers.
func (r *Reconciler) SetupWithManager(_ context.Context, m manager.Manager, workers int) error {
	newList := func() client.Object { return &v1beta1.ImageListPullJob{} }
	return builder.ControllerManagedBy(m).
		Named("imagelistpulljob").
		For(&v1beta1.ImageListPullJob{}, builder.WithPredicates(spec.JobChanges())).
		Owns(&v1beta1.ImagePullJob{}, builder.WithPredicates(childChanges())).
		WithOptions(controller.Options{
			MaxConcurrentReconciles: workers,
			RateLimiter:             retry.RateLimiter(),
		}).
		Complete(apierror.Tell(r, newList, m.GetClient(), r.Recorder))
}

// childChanges lets through what the list counts.
func childChanges() predicate.Predicate {
	return predicate.Funcs{
		UpdateFunc: func(e event.UpdateEvent) bool {
			before, ok1 := e.ObjectOld.(*v1beta1.ImagePullJob)
			after, ok2 := e.ObjectNew.(*v1beta1.ImagePullJob)
			return !ok1 || !ok2 || (before.DeletionTimestamp == nil) != (after.DeletionTimestamp == nil) ||
				done(before) != done(after) || (before.Status.Active > 0) != (after.Status.Active > 0) ||
				before.Status.Failed != after.Status.Failed || (retriesOf(before) == "") != (retriesOf(after) == "") ||
				before.Generation != after.Generation
		},
	}
}
