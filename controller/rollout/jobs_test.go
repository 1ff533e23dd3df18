// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package rollout

import (
	"context"
	"strings"
	"testing"
	"time"

	batchv1 "k8s.io/api/batch/v1"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	inplace "github.com/cri-proxy/cri-proxy/api/inplace/v1alpha1"
	"github.com/cri-proxy/cri-proxy/controller/jobbudget"
	"github.com/cri-proxy/cri-proxy/controller/pods"
	"github.com/cri-proxy/cri-proxy/controller/rollout/check"
	"github.com/cri-proxy/cri-proxy/controller/rollout/evaluate"
)

// A new container is a restart for the Job of its pod, whether it has a new image or not.
func TestJobs(t *testing.T) {
	for _, tt := range []struct {
		name    string
		limit   int32
		policy  corev1.RestartPolicy
		changes []change
		allowed bool
		updated int32
		failed  int
	}{
		{name: "an image, and none is left", limit: 1, policy: corev1.RestartPolicyOnFailure, changes: to("app:2"),
			failed: 1},
		{name: "a restart, and none is left", limit: 0, policy: corev1.RestartPolicyOnFailure,
			changes: []change{{Name: "app"}}, failed: 1},
		{name: "one is left for three pods", limit: 2, policy: corev1.RestartPolicyOnFailure, changes: to("app:2"),
			updated: 1, failed: 1},
		{name: "enough are left", limit: 6, policy: corev1.RestartPolicyOnFailure, changes: to("app:2"), updated: 3},
		{name: "Never", limit: 0, policy: corev1.RestartPolicyNever, changes: to("app:2"), updated: 3},
		{name: "by annotation", limit: 0, policy: corev1.RestartPolicyOnFailure, changes: to("app:2"), allowed: true,
			updated: 3},
	} {
		t.Run(tt.name, func(t *testing.T) {
			inBed(t, func(t *testing.T, b *bed) {
				yes := true
				job := &batchv1.Job{ObjectMeta: metav1.ObjectMeta{Namespace: "ns", Name: "work", UID: "job-uid"},
					Spec: batchv1.JobSpec{
						BackoffLimit: &tt.limit,
						Selector:     &metav1.LabelSelector{MatchLabels: map[string]string{"app": "web"}},
					}}
				if err := b.api.Create(context.Background(), job); err != nil {
					t.Fatal(err)
				}
				b.addNodes(1)
				b.addPods(3, 1, func(p *corev1.Pod) {
					p.OwnerReferences = []metav1.OwnerReference{{APIVersion: "batch/v1", Kind: "Job", Name: "work",
						UID: "job-uid", Controller: &yes}}
					p.Spec.RestartPolicy = tt.policy
				})
				r := &rollout{ObjectMeta: metav1.ObjectMeta{Namespace: "ns", Name: "all"},
					Spec: spec{Target: all(), Containers: tt.changes, Strategy: settings{OnFailure: inplace.Pause,
						MaxUnavailable: number(3)}}}
				if tt.allowed {
					r.Annotations = map[string]string{jobbudget.IgnoreAnnotation: "true"}
				}
				_, err := check.Rollout(t.Context(), b.r.APIReader, nil, r)
				if (err != nil) != (tt.failed > 0 && tt.updated == 0) || err != nil &&
					!strings.Contains(err.Error(), "a restart of container app would end Job work") {
					t.Errorf("the webhook says %v", err)
				}
				b.create("all", r.Spec)
				if tt.allowed {
					b.edit("all", func(now *rollout) { now.Annotations = r.Annotations })
				}
				got := b.until("settled", "all", 10*time.Minute, func(r *rollout) bool {
					return ended(r) || tt.failed > 0 && len(r.Status.Failures) >= tt.failed &&
						r.Status.Updated == tt.updated
				})
				if got.Status.Updated != tt.updated || tt.failed > 0 &&
					(got.Status.Failures[0].Reason != evaluate.FailEndsJob ||
						!strings.Contains(got.Status.Failures[0].Message, "would end Job work")) {
					t.Errorf("status %+v", got.Status)
				}
				restarts := int32(0)
				for _, pod := range b.pods() {
					restarts += pods.Status(pod, "app").RestartCount
				}
				if restarts != tt.updated {
					t.Errorf("%d restarts", restarts)
				}
			})
		})
	}
}
