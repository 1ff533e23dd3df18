// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package podtemplate_test

import (
	"testing"

	appsv1 "k8s.io/api/apps/v1"
	corev1 "k8s.io/api/core/v1"

	"github.com/cri-proxy/cri-proxy/controller/rollout/podtemplate"
)

// The patch of a template names the containers whose images change, and no others.
func TestPatch(t *testing.T) {
	set := &appsv1.StatefulSet{}
	set.Spec.Template.Spec.Containers = []corev1.Container{{Name: "app", Image: "app:1"},
		{Name: "side", Image: "side:1"}}
	got, err := podtemplate.Patch(set, map[string]string{"app": "app:2"}, map[string]any{"a": "b"},
		nil)
	if err != nil {
		t.Fatal(err)
	}
	want := `{"metadata":{"annotations":{"a":"b"},"resourceVersion":"","uid":""},` +
		`"spec":{"template":{"spec":{"containers":[{"image":"app:2","name":"app"}]}}}}`
	if string(got) != want {
		t.Errorf("patch\n  %s, want\n  %s", got, want)
	}
}
