// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package imagepull

import (
	"testing"

	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/cri-proxy/cri-proxy/api/apps/v1beta1"
)

// A controller of another version finds pulls, pins and children under these names, and what it has observed. They must not change.
func TestGolden(t *testing.T) {
	limit, timeout, ttl := int32(3), int32(60), int32(30)
	job := &v1beta1.ImagePullJob{
		ObjectMeta: metav1.ObjectMeta{Namespace: "ns", Name: "job", UID: "uid-job", Annotations: map[string]string{
			v1beta1.PinForAnnotation: "36h", v1beta1.BytesPerSecondAnnotation: "20Mi",
		}},
	}
	job.Spec.Image = "nginx:2"
	job.Spec.ImagePullPolicy = v1beta1.PullAlways
	job.Spec.PullSecrets = []string{"secret"}
	job.Spec.PullPolicy = &v1beta1.PullPolicy{BackoffLimit: &limit, TimeoutSeconds: &timeout}
	job.Spec.SandboxConfig = &v1beta1.SandboxConfig{Labels: map[string]string{"a": "b"}, Annotations: map[string]string{"c": "d"}}
	job.Spec.CompletionPolicy = v1beta1.CompletionPolicy{Type: v1beta1.Always, TTLSecondsAfterFinished: &ttl}
	w, err := wishOf(job)
	if err != nil {
		t.Fatal(err)
	}
	bounded, err := wishOf(job)
	if err != nil {
		t.Fatal(err)
	}
	bounded.bound(Limits{PinPercent: 40})
	list := &v1beta1.ImageListPullJob{ObjectMeta: metav1.ObjectMeta{Namespace: "ns", Name: "list", UID: "uid-list"}}
	list.Spec.Images = []string{"nginx:2", "redis"}
	list.Spec.ImagePullJobTemplate = job.Spec.ImagePullJobTemplate
	for _, tt := range []struct{ name, got, want string }{
		{"pull", w.pullUID(0), "uid-job.71ed132ac3.48e4948189"},
		{"pull, another round", w.pullUID(2), "uid-job.71ed132ac3.48e4948189.2"},
		{"pull with a bound", bounded.pullUID(0), "uid-job.71ed132ac3.bdd0987e1f"},
		{"owner", owner(job), "ImagePullJob/ns/job/uid-job"},
		{"work", observedWork(job), "6c2f88bbef"},
		{"effort", observedEffort(job), "63e88bc685"},
		{"work of a list", listWork(list), "c6f4747097"},
		{"child", childName(list, "nginx:2"), "list-4176c06a74"},
	} {
		if tt.got != tt.want {
			t.Errorf("%s is %s, want %s", tt.name, tt.got, tt.want)
		}
	}
}
