// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package recreate_test

import (
	"context"
	"strings"
	"testing"

	batchv1 "k8s.io/api/batch/v1"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"

	appsv1alpha1 "github.com/cri-proxy/cri-proxy/api/apps/v1alpha1"
	opsv1 "github.com/cri-proxy/cri-proxy/api/ops/v1"
	"github.com/cri-proxy/cri-proxy/controller/jobbudget"
	"github.com/cri-proxy/cri-proxy/controller/recreate/accept"
)

// ofJob makes the pod one of Job work.
func ofJob(policy corev1.RestartPolicy) func(*corev1.Pod) {
	return func(p *corev1.Pod) {
		p.Labels = map[string]string{batchv1.ControllerUidLabel: "job-uid"}
		p.OwnerReferences = []metav1.OwnerReference{{APIVersion: "batch/v1", Kind: "Job", Name: "work", UID: "job-uid",
			Controller: pointer(true)}}
		p.Spec.RestartPolicy = policy
	}
}

// addJob adds the Job, and one pod of it for each of restarts, which are those of its container.
func (b *bed) addJob(limit int32, restarts ...int32) {
	b.t.Helper()
	job := &batchv1.Job{ObjectMeta: metav1.ObjectMeta{Namespace: "ns", Name: "work", UID: "job-uid"},
		Spec: batchv1.JobSpec{
			BackoffLimit: &limit,
			Selector:     &metav1.LabelSelector{MatchLabels: map[string]string{batchv1.ControllerUidLabel: "job-uid"}},
		}}
	if err := b.client.Create(context.Background(), job); err != nil {
		b.t.Fatal(err)
	}
	for i, n := range restarts {
		p := &corev1.Pod{ObjectMeta: metav1.ObjectMeta{Namespace: "ns", Name: "other-" + string(rune('a'+i)),
			UID: types.UID("other-" + string(rune('a'+i)))}}
		ofJob(corev1.RestartPolicyOnFailure)(p)
		p.Status = corev1.PodStatus{Phase: corev1.PodRunning,
			ContainerStatuses: []corev1.ContainerStatus{{Name: "app", ContainerID: "containerd://x", RestartCount: n}}}
		if err := b.client.Create(context.Background(), p); err != nil {
			b.t.Fatal(err)
		}
	}
}

// What the Job controller would fail the Job for is refused: restart counts of all containers of
// its pods (pastBackoffLimitOnFailure).
func TestRestartsThatEndJobs(t *testing.T) {
	const refused = "would end Job work"
	for _, tt := range []struct {
		name        string
		policy      corev1.RestartPolicy
		limit       int32
		others      []int32
		containers  []string
		strategy    how
		annotations map[string]string
		want        string
	}{
		{name: "none is left", policy: corev1.RestartPolicyOnFailure, limit: 0, containers: []string{"app"},
			want: refused},
		{name: "the first is the last", policy: corev1.RestartPolicyOnFailure, limit: 1, containers: []string{"app"},
			want: refused},
		{name: "one is left", policy: corev1.RestartPolicyOnFailure, limit: 2, containers: []string{"app"}},
		{name: "one is left and two are asked for", policy: corev1.RestartPolicyOnFailure, limit: 2,
			containers: []string{"app", "web"}, want: refused},
		{name: "other pods have used it up", policy: corev1.RestartPolicyOnFailure, limit: 6, others: []int32{2, 3},
			containers: []string{"app"}, want: "is 6 (5 so far)"},
		{name: "other pods have left one", policy: corev1.RestartPolicyOnFailure, limit: 6, others: []int32{2, 2},
			containers: []string{"app"}},
		{name: "Never does not count restarts", policy: corev1.RestartPolicyNever, limit: 0,
			containers: []string{"app"}},
		{name: "forced", policy: corev1.RestartPolicyOnFailure, limit: 0, containers: []string{"app"},
			strategy: how{ForceRecreate: true}},
		{name: "by annotation", policy: corev1.RestartPolicyOnFailure, limit: 0, containers: []string{"app"},
			annotations: map[string]string{jobbudget.IgnoreAnnotation: "true"}},
		{name: "by another annotation", policy: corev1.RestartPolicyOnFailure, limit: 0, containers: []string{"app"},
			annotations: map[string]string{jobbudget.IgnoreAnnotation: "no"}, want: refused},
	} {
		t.Run(tt.name, func(t *testing.T) {
			b := newBed(t, ofJob(tt.policy))
			b.addJob(tt.limit, tt.others...)
			s := spec{PodName: "pod", Containers: containers(tt.containers...), Strategy: &tt.strategy}
			err := accept.Check(context.Background(), b.client,
				&request{ObjectMeta: metav1.ObjectMeta{Namespace: "ns", Name: "a", Annotations: tt.annotations},
					Spec: s})
			if (err != nil) != (tt.want != "") || err != nil && !strings.Contains(err.Error(), tt.want) {
				t.Errorf("the webhook says %v", err)
			}
			b.createWith("a", s, tt.annotations)
			crr := b.until("completed", retired, "a")
			if tt.want == "" {
				b.wantStates(crr, "app Succeeded killed")
				return
			}
			wantContains(t, "message", crr.Status.Message, tt.want)
			wantContains(t, "message", crr.Status.Message, "or set spec.strategy.forceRecreate")
			if len(b.node.Requests()) > 0 {
				t.Errorf("the node was told %v", b.node.Requests())
			}
		})
	}
}

// The budget may be used up between the acceptance of a request and its command.
func TestJobFailsMeanwhile(t *testing.T) {
	b := newBed(t, ofJob(corev1.RestartPolicyOnFailure))
	b.addJob(3)
	release := b.node.Hold("app", opsv1.Phase_PHASE_STARTING)
	b.create("a", spec{Containers: containers("app", "web"), Strategy: &how{OrderedRecreate: true}})
	b.until("app is being replaced", b.phaseIs(recreating, "app"), "a")
	b.setStatus("mesh", func(s *corev1.ContainerStatus) { s.RestartCount++ }) // a crash
	release()
	crr := b.until("completed", retired, "a")
	wantContains(t, "states", states(crr),
		"app Succeeded killed; web Failed: not recreated: a restart of container web would end Job work")
	if got := b.node.Commanded(); len(got) != 1 {
		t.Errorf("the node was told to restart %v", got)
	}
}

// Two requests may each leave the Job alone, and both together not.
func TestJobOfTwoRequests(t *testing.T) {
	b := newBed(t, ofJob(corev1.RestartPolicyOnFailure))
	b.addJob(2)
	b.r.Jobs = &jobbudget.Budgets{}
	release := b.node.Hold("app", opsv1.Phase_PHASE_STAGING)
	b.create("a", spec{Containers: containers("app")})
	b.until("app is being replaced", b.phaseIs(recreating, "app"), "a")
	b.create("b", spec{Containers: containers("web")})
	crr := b.until("completed", retired, "b")
	wantContains(t, "states", states(crr), "web Failed: not recreated: a restart of container web would end Job work")
	wantContains(t, "states", states(crr), "(0 so far, 1 under way)")
	release()
	b.wantStates(b.until("completed", retired, "a"), "app Succeeded killed")
}

// A command that was given stays given: a controller that finds the budget used up by its own
// restart does not fail it.
func TestJobAfterControllerRestart(t *testing.T) {
	b := newBed(t, ofJob(corev1.RestartPolicyOnFailure))
	b.addJob(2)
	release := b.node.Hold("app", opsv1.Phase_PHASE_STAGING)
	b.create("a", spec{Containers: containers("app")})
	b.until("app is being replaced", b.phaseIs(recreating, "app"), "a")
	crr := b.get("a")
	// not written yet
	crr.Status.ContainerRecreateStates = []appsv1alpha1.ContainerRecreateRequestContainerRecreateState{
		{Name: "app", Phase: pending}}
	if err := b.client.Status().Update(context.Background(), crr); err != nil {
		t.Fatal(err)
	}
	b.start()
	b.setStatus("mesh", func(s *corev1.ContainerStatus) { s.RestartCount = 1 })
	b.until("the node's word is known", b.phaseIs(recreating, "app"), "a")
	release()
	b.wantStates(b.until("completed", retired, "a"), "app Succeeded killed")
}
