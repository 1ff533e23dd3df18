// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package list_test

import (
	"testing"

	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"sigs.k8s.io/controller-runtime/pkg/event"

	"github.com/cri-proxy/cri-proxy/api/apps/v1beta1"
	"github.com/cri-proxy/cri-proxy/controller/imagepull/list"
)

type job = v1beta1.ImagePullJob

// What a child does wakes the reconciler only if the list counts it.
func TestChildChanges(t *testing.T) {
	image := func(change func(*job)) *job {
		j := &job{ObjectMeta: metav1.ObjectMeta{Generation: 1}}
		change(j)
		return j
	}
	now := metav1.Now()
	sameJob := image(func(*job) {})
	for _, tt := range []struct {
		name          string
		before, after *job
		want          bool
	}{
		{"a child's progress", image(func(j *job) { j.Status.Active = 1 }),
			image(func(j *job) { j.Status.Active, j.Status.Percent = 2, 10 }), false},
		{"a child's beginning", sameJob, image(func(j *job) { j.Status.Active = 1 }), true},
		{"a child's failure", sameJob, image(func(j *job) { j.Status.Failed = 1 }), true},
		{"a child's end", sameJob, image(func(j *job) { j.Status.CompletionTime = &now }), true},
	} {
		t.Run(tt.name, func(t *testing.T) {
			if got := list.ChildChanges().
				Update(event.UpdateEvent{ObjectOld: tt.before, ObjectNew: tt.after}); got != tt.want {
				t.Errorf("got %v", got)
			}
		})
	}
}
