// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package spec_test

import (
	"testing"
	"time"

	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/util/intstr"

	"github.com/cri-proxy/cri-proxy/api/apps/v1beta1"
	"github.com/cri-proxy/cri-proxy/controller/imagepull/spec"
)

// TestHashes: nodes and objects in the cluster hold these from the version before, so they never
// change.
func TestHashes(t *testing.T) {
	half := intstr.FromString("50%")
	full := template{
		PullSecrets: []string{"key"}, Parallelism: &half,
		Selector: &v1beta1.ImagePullJobNodeSelector{Names: []string{"a", "b"}},
		PodSelector: &v1beta1.ImagePullJobPodSelector{
			LabelSelector: metav1.LabelSelector{MatchLabels: map[string]string{"app": "web"}}},
		PullPolicy: &v1beta1.PullPolicy{TimeoutSeconds: number(int32(30)), BackoffLimit: number(int32(2))},
		CompletionPolicy: v1beta1.CompletionPolicy{
			Type: v1beta1.Always, ActiveDeadlineSeconds: number(int64(600)), TTLSecondsAfterFinished: number(int32(60)),
		},
		SandboxConfig: &v1beta1.SandboxConfig{Labels: map[string]string{"l": "1"},
			Annotations: map[string]string{"a": "2"}},
		ImagePullPolicy: v1beta1.PullAlways,
	}
	for _, tt := range []struct {
		name        string
		template    template
		annotations map[string]string
		limits      spec.Limits
		want        []string
	}{
		{"the defaults", template{}, nil, spec.Limits{}, []string{
			"uid-1.4e594b7b74.beaf259cb8", "uid-1.4e594b7b74.beaf259cb8.3", "ImagePullJob/ns/job/uid-1",
			"0c81efdb74", "1620d268f1", "5c0afc2fbb", "fe96437338", "list-a7b7d945e4",
		}},
		{"all fields", full,
			map[string]string{v1beta1.PinForAnnotation: "48h", v1beta1.BytesPerSecondAnnotation: "20Mi"},
			spec.Limits{PinFor: 36 * time.Hour, PinPercent: 25}, []string{
				"uid-1.25a79b8f82.f9dc6be537", "uid-1.25a79b8f82.f9dc6be537.3", "ImagePullJob/ns/job/uid-1",
				"2e3b2974f2", "e43a17ff2a", "be4b41a377", "085981f037", "list-15009bba28",
			}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			j := jobOf("registry.example/app:1", tt.template)
			j.Namespace, j.Name, j.UID, j.Annotations = "ns", "job", "uid-1", tt.annotations
			s, err := spec.Of(j)
			if err != nil {
				t.Fatal(err)
			}
			s.Bound(tt.limits)
			l := &v1beta1.ImageListPullJob{Spec: v1beta1.ImageListPullJobSpec{
				Images: []string{"a", "b"}, ImagePullJobTemplate: tt.template,
			}}
			l.Name, l.UID, l.Annotations = "list", "uid-2", tt.annotations
			got := []string{
				s.PullUID(0), s.PullUID(3), s.Request.GetOwner(), spec.ObservedWork(j), spec.ObservedEffort(j),
				spec.ListWork(l), spec.TemplateHash(l), spec.ChildName(l, "a"),
			}
			for i, want := range tt.want {
				if got[i] != want {
					t.Errorf("got %q, want %q", got[i], want)
				}
			}
		})
	}
}

// A controller of another version finds pulls, pins and children under these names, and what it has
// observed. They must not change.
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
	job.Spec.SandboxConfig = &v1beta1.SandboxConfig{Labels: map[string]string{"a": "b"},
		Annotations: map[string]string{"c": "d"}}
	job.Spec.CompletionPolicy = v1beta1.CompletionPolicy{Type: v1beta1.Always, TTLSecondsAfterFinished: &ttl}
	s, err := spec.Of(job)
	if err != nil {
		t.Fatal(err)
	}
	bounded, err := spec.Of(job)
	if err != nil {
		t.Fatal(err)
	}
	bounded.Bound(spec.Limits{PinPercent: 40})
	list := &v1beta1.ImageListPullJob{ObjectMeta: metav1.ObjectMeta{Namespace: "ns", Name: "list", UID: "uid-list"}}
	list.Spec.Images = []string{"nginx:2", "redis"}
	list.Spec.ImagePullJobTemplate = job.Spec.ImagePullJobTemplate
	for _, tt := range []struct{ name, got, want string }{
		{"pull", s.PullUID(0), "uid-job.71ed132ac3.48e4948189"},
		{"pull, another round", s.PullUID(2), "uid-job.71ed132ac3.48e4948189.2"},
		{"pull with a bound", bounded.PullUID(0), "uid-job.71ed132ac3.bdd0987e1f"},
		{"owner", s.Request.GetOwner(), "ImagePullJob/ns/job/uid-job"},
		{"work", spec.ObservedWork(job), "6c2f88bbef"},
		{"effort", spec.ObservedEffort(job), "63e88bc685"},
		{"work of a list", spec.ListWork(list), "c6f4747097"},
		{"child", spec.ChildName(list, "nginx:2"), "list-4176c06a74"},
	} {
		if tt.got != tt.want {
			t.Errorf("%s is %s, want %s", tt.name, tt.got, tt.want)
		}
	}
}
