// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package workload

import (
	"context"
	"fmt"

	appsv1 "k8s.io/api/apps/v1"
	corev1 "k8s.io/api/core/v1"
	"sigs.k8s.io/controller-runtime/pkg/client"

	"github.com/cri-proxy/cri-proxy/controller/objects"
)

// PutBackAnnotation of a workload's own rollout is the generation of the workload in which a
// rollback has put back its template, and hashes of the rest of its spec and of what kubectl apply
// has noted there.
const PutBackAnnotation = "cri-proxy.io/put-back-generation"

// PutBack returns the value of PutBackAnnotation for a workload in a generation.
func PutBack(o client.Object, generation int64) string {
	return fmt.Sprintf("%d %s %s", generation, ShapeOf(o), AppliedTo(o))
}

// AppliedTo returns a hash of the manifest that kubectl apply last wrote on the client's side.
func AppliedTo(o client.Object) string {
	return objects.Hash(o.GetAnnotations()[corev1.LastAppliedConfigAnnotation])
}

// ShapeOf returns a hash of the spec of a workload without its template.
func ShapeOf(o client.Object) string {
	switch o := o.(type) {
	case *appsv1.StatefulSet:
		spec := o.Spec.DeepCopy()
		spec.Template = corev1.PodTemplateSpec{}
		return objects.Hash(spec)
	case *appsv1.DaemonSet:
		spec := o.Spec.DeepCopy()
		spec.Template = corev1.PodTemplateSpec{}
		return objects.Hash(spec)
	}
	return ""
}

// notePutBack writes into the workload's own rollout that the next write of the template is a
// rollback.
func (e *Env) notePutBack(ctx context.Context, o client.Object) error {
	before := e.Rollout.DeepCopy()
	if e.Rollout.Annotations == nil {
		e.Rollout.Annotations = map[string]string{}
	}
	e.Rollout.Annotations[PutBackAnnotation] = PutBack(o, o.GetGeneration()+1)
	return e.PatchRollout(ctx, before)
}
