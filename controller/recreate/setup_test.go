// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package recreate_test

import (
	"testing"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"sigs.k8s.io/controller-runtime/pkg/event"

	"github.com/cri-proxy/cri-proxy/controller/recreate"
)

func TestPodChanges(t *testing.T) {
	pod := func(change func(*corev1.Pod)) *corev1.Pod {
		p := &corev1.Pod{Status: corev1.PodStatus{Phase: corev1.PodRunning,
			ContainerStatuses: []corev1.ContainerStatus{{Name: "app", ContainerID: "a"}}}}
		change(p)
		return p
	}
	tests := []struct {
		name   string
		change func(*corev1.Pod)
		want   bool
	}{
		{"nothing", func(*corev1.Pod) {}, false},
		{"condition", func(p *corev1.Pod) { p.Status.Conditions = []corev1.PodCondition{{Type: "x"}} }, false},
		{"container", func(p *corev1.Pod) { p.Status.ContainerStatuses[0].ContainerID = "b" }, true},
		{"readiness", func(p *corev1.Pod) { p.Status.ContainerStatuses[0].Ready = true }, true},
		{"sidecar", func(p *corev1.Pod) { p.Status.InitContainerStatuses = []corev1.ContainerStatus{{}} }, true},
		{"phase", func(p *corev1.Pod) { p.Status.Phase = corev1.PodFailed }, true},
		{"deletion", func(p *corev1.Pod) { p.DeletionTimestamp = pointer(metav1.Now()) }, true},
		{"another pod", func(p *corev1.Pod) { p.UID = "b" }, true},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			e := event.UpdateEvent{ObjectOld: pod(func(*corev1.Pod) {}), ObjectNew: pod(tt.change)}
			if got := recreate.PodChanges().Update(e); got != tt.want {
				t.Errorf("got %v, want %v", got, tt.want)
			}
		})
	}
}

func TestRequestsOfPod(t *testing.T) {
	b := newBed(t)
	b.create("a", spec{Containers: containers("app")})
	b.until("completed", retired, "a")
	b.create("b", spec{Containers: containers("app")})
	b.createFor("c", spec{PodName: "other", Containers: containers("app")})
	got := recreate.RequestsOfPod(b.r, t.Context(),
		&corev1.Pod{ObjectMeta: metav1.ObjectMeta{Namespace: "ns", Name: "pod"}})
	if len(got) != 1 || got[0].Name != "b" {
		t.Errorf("got %v, want only b: a is completed, c is for another pod", got)
	}
}
