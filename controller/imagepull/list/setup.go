// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package list

import (
	"context"
	"time"

	"k8s.io/client-go/util/workqueue"
	"sigs.k8s.io/controller-runtime/pkg/builder"
	"sigs.k8s.io/controller-runtime/pkg/client"
	"sigs.k8s.io/controller-runtime/pkg/controller"
	"sigs.k8s.io/controller-runtime/pkg/event"
	"sigs.k8s.io/controller-runtime/pkg/manager"
	"sigs.k8s.io/controller-runtime/pkg/predicate"
	"sigs.k8s.io/controller-runtime/pkg/reconcile"

	"github.com/cri-proxy/cri-proxy/api/apps/v1beta1"
	root "github.com/cri-proxy/cri-proxy/controller"
	"github.com/cri-proxy/cri-proxy/controller/imagepull/spec"
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
			RateLimiter: workqueue.NewTypedItemExponentialFailureRateLimiter[reconcile.Request](
				50*time.Millisecond, 30*time.Second),
		}).
		Complete(root.TellAPIErrors(r, newList, m.GetClient(), r.Recorder))
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
