// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package rollout

import (
	"context"
	"strings"

	appsv1 "k8s.io/api/apps/v1"
	"sigs.k8s.io/controller-runtime/pkg/builder"
	"sigs.k8s.io/controller-runtime/pkg/client"
	"sigs.k8s.io/controller-runtime/pkg/manager"

	inplace "github.com/cri-proxy/cri-proxy/api/inplace/v1alpha1"
	root "github.com/cri-proxy/cri-proxy/controller"
)

// SetupWithManager adds the reconciler to a manager: it then watches workloads of its kind and their rollouts.
func (r *FollowReconciler) SetupWithManager(_ context.Context, m manager.Manager, workers int) error {
	newOwner := func() client.Object {
		if r.Kind == kindStatefulSet {
			return &appsv1.StatefulSet{}
		}
		return &appsv1.DaemonSet{}
	}
	return builder.ControllerManagedBy(m).
		Named("inplace-"+strings.ToLower(r.Kind)).
		For(newOwner(), builder.WithPredicates(rolloutChanges())).
		Owns(&inplace.InPlaceRollout{}).
		WithOptions(options(workers)).
		Complete(root.TellAPIErrors(r, newOwner, m.GetClient(), r.Recorder))
}
