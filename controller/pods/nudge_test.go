// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package pods_test

import (
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"sigs.k8s.io/controller-runtime/pkg/client/fake"

	"github.com/cri-proxy/cri-proxy/controller/pods"
)

// One write is for all containers of a pod: kubelet looks at the whole of it.
func TestNudgeOfTwo(t *testing.T) {
	yes := true
	now := time.Now()
	status := func(name, id string) corev1.ContainerStatus {
		return corev1.ContainerStatus{
			Name: name, ContainerID: "containerd://" + id, Started: &yes,
			State: corev1.ContainerState{Running: &corev1.ContainerStateRunning{StartedAt: metav1.NewTime(now)}},
		}
	}
	probe := &corev1.Probe{PeriodSeconds: 10}
	pod := &corev1.Pod{
		Spec: corev1.PodSpec{Containers: []corev1.Container{
			{Name: "a", ReadinessProbe: probe}, {Name: "b", ReadinessProbe: probe},
		}},
		Status: corev1.PodStatus{ContainerStatuses: []corev1.ContainerStatus{status("a", "1"), status("b", "2")}},
	}
	var n pods.Nudges
	both := []string{"a", "b"}
	if c, wait := n.Due(pod, both, now); c != "" || wait != 500*time.Millisecond {
		t.Fatalf("%q, %s", c, wait)
	}
	c, _ := n.Due(pod, both, now.Add(500*time.Millisecond))
	if c != "a" {
		t.Fatalf("%q", c)
	}
	if _, err := n.Nudge(t.Context(), fake.NewClientBuilder().Build(), pod, c); err == nil {
		t.Error("a pod that is not there was patched")
	}
	if c, wait := n.Due(pod, both, now.Add(time.Hour)); c != "" || wait != 0 {
		t.Errorf("%q, %s", c, wait)
	}
}
