// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package follow

import (
	"context"
	"strings"

	appsv1 "k8s.io/api/apps/v1"
	"sigs.k8s.io/controller-runtime/pkg/builder"
	"sigs.k8s.io/controller-runtime/pkg/client"
	"sigs.k8s.io/controller-runtime/pkg/manager"

	inplace "github.com/cri-proxy/cri-proxy/api/inplace/v1alpha1"
	"github.com/cri-proxy/cri-proxy/controller/apierror"
	"github.com/cri-proxy/cri-proxy/controller/rollout/requeue"
	"github.com/cri-proxy/cri-proxy/controller/rollout/workload"
)

// SetupWithManager adds the reconciler to a manager: it then watches workloads of its kind and
// their rollouts.
func (r *Reconciler) SetupWithManager(_ context.Context, m manager.Manager, workers int) error {
	newOwner := func() client.Object {
		if r.Kind == workload.KindStatefulSet {
			return &appsv1.StatefulSet{}
		}
		return &appsv1.DaemonSet{}
	}
	return builder.ControllerManagedBy(m).
		Named("inplace-"+strings.ToLower(r.Kind)).
		For(newOwner(), builder.WithPredicates(requeue.RolloutChanges())).
		Owns(&inplace.InPlaceRollout{}).
		WithOptions(requeue.Options(workers)).
		Complete(apierror.Tell(r, newOwner, m.GetClient(), r.Recorder))
}
