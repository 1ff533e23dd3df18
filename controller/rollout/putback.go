// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package rollout

import (
	"context"
	"fmt"

	appsv1 "k8s.io/api/apps/v1"
	corev1 "k8s.io/api/core/v1"
	"sigs.k8s.io/controller-runtime/pkg/client"
)

// putBackAnnotation of a workload's own rollout is the generation of the workload in which a rollback has put back its template, and
// hashes of the rest of its spec and of what kubectl apply has noted there.
const putBackAnnotation = "cri-proxy.io/put-back-generation"

// putBack returns the value of putBackAnnotation for a workload in a generation.
func putBack(o client.Object, generation int64) string {
	return fmt.Sprintf("%d %s %s", generation, shapeOf(o), appliedTo(o))
}

// appliedTo returns a hash of the manifest that kubectl apply last wrote on the client's side.
func appliedTo(o client.Object) string {
	return hash(o.GetAnnotations()[corev1.LastAppliedConfigAnnotation])
}

// shapeOf returns a hash of the spec of a workload without its template.
func shapeOf(o client.Object) string {
	switch o := o.(type) {
	case *appsv1.StatefulSet:
		spec := o.Spec.DeepCopy()
		spec.Template = corev1.PodTemplateSpec{}
		return hash(spec)
	case *appsv1.DaemonSet:
		spec := o.Spec.DeepCopy()
		spec.Template = corev1.PodTemplateSpec{}
		return hash(spec)
	}
	return ""
}

// notePutBack writes into the workload's own rollout that the next write of the template is a rollback.
func (e *env) notePutBack(ctx context.Context, o client.Object) error {
	before := e.rollout.DeepCopy()
	if e.rollout.Annotations == nil {
		e.rollout.Annotations = map[string]string{}
	}
	e.rollout.Annotations[putBackAnnotation] = putBack(o, o.GetGeneration()+1)
	return e.patchRollout(ctx, before)
}
