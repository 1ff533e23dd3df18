// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package mirrorpod

import (
	"testing"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
)

func TestIs(t *testing.T) {
	for name, tt := range map[string]struct {
		meta metav1.ObjectMeta
		want bool
	}{
		"a user's": {},
		"a ReplicaSet's": {
			metav1.ObjectMeta{
				OwnerReferences: []metav1.OwnerReference{{APIVersion: "apps/v1", Kind: "ReplicaSet", Name: "n"}}},
			false},
		"another group's": {
			metav1.ObjectMeta{
				OwnerReferences: []metav1.OwnerReference{{APIVersion: "example.com/v1", Kind: "Node", Name: "n"}}},
			false},
		"with the annotation": {metav1.ObjectMeta{Annotations: map[string]string{corev1.MirrorPodAnnotationKey: ""}},
			true},
		"a node's": {
			metav1.ObjectMeta{OwnerReferences: []metav1.OwnerReference{{APIVersion: "v1", Kind: "Node", Name: "n"}}},
			true},
	} {
		if got := Is(&corev1.Pod{ObjectMeta: tt.meta}); got != tt.want {
			t.Errorf("%s: %v", name, got)
		}
	}
}
