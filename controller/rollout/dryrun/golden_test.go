// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package dryrun_test

import (
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/cri-proxy/cri-proxy/controller/rollout/dryrun"
	"github.com/cri-proxy/cri-proxy/controller/rollout/evaluate"
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
		State: &evaluate.InPlaceState{Rollout: "r", Revision: "0123456789", Operation: "o",
			Time:       metav1.NewMicroTime(time.Unix(1, 2000).UTC()),
			Containers: map[string]evaluate.Previous{"app": {Image: "app:1", Base: "app:1", ID: "c"}}},
	}
	got, err := change.Patch("42")
	if err != nil {
		t.Fatal(err)
	}
	want := `{"metadata":{"annotations":{"cri-proxy.io/in-place-state":"{` +
		`\"rollout\":\"r\",\"revision\":\"0123456789\",\"operation\":\"o\",` +
		`\"time\":\"1970-01-01T00:00:01.000002Z\",` +
		`\"containers\":{\"app\":{\"image\":\"app:1\",\"base\":\"app:1\",\"id\":\"c\"}}}"},` +
		`"labels":{"controller-revision-hash":"web-5"},"resourceVersion":"42","uid":"c0ffee00-0002"},` +
		`"spec":{"containers":[{"image":"app:2","name":"app"}]}}`
	if string(got) != want {
		t.Errorf("patch\n  %s, want\n  %s", got, want)
	}
}
