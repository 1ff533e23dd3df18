// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package check_test

import (
	"strings"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"sigs.k8s.io/controller-runtime/pkg/client/fake"

	inplace "github.com/cri-proxy/cri-proxy/api/inplace/v1alpha1"
	"github.com/cri-proxy/cri-proxy/controller/rollout/check"
	"github.com/cri-proxy/cri-proxy/controller/rollout/evaluate"
)

// TestRivals: a rollout that has ended is in nobody's way, unless it has been given more to do.
// Package admission has the other cases.
func TestRivals(t *testing.T) {
	scheme := runtime.NewScheme()
	for _, add := range []func(*runtime.Scheme) error{corev1.AddToScheme, inplace.AddToScheme} {
		if err := add(scheme); err != nil {
			t.Fatal(err)
		}
	}
	made := func(name string) *inplace.InPlaceRollout {
		return &inplace.InPlaceRollout{
			ObjectMeta: metav1.ObjectMeta{Namespace: "ns", Name: name},
			Spec: inplace.InPlaceRolloutSpec{Target: inplace.Target{PodName: "p"},
				Containers: []inplace.ContainerChange{{Name: "app", Image: "a:1"}}},
		}
	}
	now := metav1.NewTime(time.Now())
	for _, tt := range []struct {
		name   string
		change func(*inplace.InPlaceRollout)
		rival  bool
	}{
		{"at work", func(*inplace.InPlaceRollout) {}, true},
		{"ended", func(r *inplace.InPlaceRollout) {
			r.Status.CompletionTime, r.Status.ObservedRevision = &now, evaluate.RevisionOf(r)
		}, false},
		{"changed since its end", func(r *inplace.InPlaceRollout) {
			r.Status.CompletionTime,
				r.Status.ObservedRevision = &now, "another"
		}, true},
		{"to be tried again", func(r *inplace.InPlaceRollout) {
			r.Status.CompletionTime, r.Status.ObservedRevision = &now, evaluate.RevisionOf(r)
			r.Annotations = map[string]string{inplace.RetryAnnotation: "1"}
		}, true},
		{"in another namespace", func(r *inplace.InPlaceRollout) { r.Namespace = "other" }, false},
	} {
		t.Run(tt.name, func(t *testing.T) {
			other := made("other")
			tt.change(other)
			api := fake.NewClientBuilder().WithScheme(scheme).WithObjects(other).Build()
			_, err := check.Rollout(t.Context(), api, nil, made("new"))
			if (err != nil) != tt.rival || tt.rival && !strings.Contains(err.Error(),
				"InPlaceRollout other is at work on container app of pod p") {
				t.Errorf("error %v", err)
			}
		})
	}
}
