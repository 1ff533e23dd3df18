// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package mirrorpod

import (
	"slices"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
)

// Is reports whether a node created the pod. The API server demands of nodes both the annotation
// and the Node as owner, and lets nobody remove either. Is accepts one of them.
func Is(pod *corev1.Pod) bool {
	if _, mirror := pod.Annotations[corev1.MirrorPodAnnotationKey]; mirror {
		return true
	}
	return slices.ContainsFunc(pod.OwnerReferences, func(r metav1.OwnerReference) bool {
		return r.Kind == "Node" && r.APIVersion == corev1.SchemeGroupVersion.String()
	})
}
