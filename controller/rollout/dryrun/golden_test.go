// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package dryrun_test

import (
	"testing"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	inplace "github.com/cri-proxy/cri-proxy/api/inplace/v1alpha1"
	"github.com/cri-proxy/cri-proxy/controller/rollout/dryrun"
)

// One patch changes the images, the label and the annotation of a pod.
func TestPodPatch(t *testing.T) {
	pod := &corev1.Pod{
		ObjectMeta: metav1.ObjectMeta{Name: "web-1", UID: "c0ffee00-0002"},
		Spec: corev1.PodSpec{Containers: []corev1.Container{{Name: "app", Image: "app:1"},
			{Name: "side", Image: "side:1"}}},
	}
	change := &dryrun.PodChange{
		Pod: pod, Images: map[string]string{"app": "app:2"}, Label: "web-5",
		Annotations: map[string]any{inplace.PodStateAnnotation: "{}"},
	}
	got, err := change.Patch("42")
	if err != nil {
		t.Fatal(err)
	}
	want := `{"metadata":{"annotations":{"cri-proxy.io/in-place-state":"{}"},` +
		`"labels":{"controller-revision-hash":"web-5"},"resourceVersion":"42","uid":"c0ffee00-0002"},` +
		`"spec":{"containers":[{"image":"app:2","name":"app"}]}}`
	if string(got) != want {
		t.Errorf("patch\n  %s, want\n  %s", got, want)
	}
}
