// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package recreate_test

import (
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/types"

	"github.com/cri-proxy/cri-proxy/controller/pods"
)

// nudges is how many times a pod was patched.
func (b *bed) nudges() int {
	b.mu.Lock()
	defer b.mu.Unlock()
	n := 0
	for _, w := range b.writes {
		if w == "patch *v1.Pod" {
			n++
		}
	}
	return n
}

// probed gives app a readinessProbe.
func probed(change ...func(*corev1.Pod)) func(*corev1.Pod) {
	yes := true
	return func(p *corev1.Pod) {
		p.Spec.Containers[0].ReadinessProbe = &corev1.Probe{PeriodSeconds: 10}
		p.Status.ContainerStatuses[0].Started = &yes
		for _, f := range change {
			f(p)
		}
	}
}

// notReady says that the new container of app runs and is not ready, and that the request waits for
// it.
func (b *bed) notReady(crr *request) bool { return b.restarted(crr) }

// A new container that kubelet does not find ready for a while is made known to it again, by one
// write.
func TestNudge(t *testing.T) {
	b := newBed(t, probed())
	b.unready.Store(true)
	b.create("a", spec{Containers: containers("app")})
	b.until("kubelet is nudged", func(*request) bool { return b.nudges() > 0 }, "a")
	var pod corev1.Pod
	if err := b.client.Get(t.Context(), types.NamespacedName{Namespace: "ns", Name: "pod"}, &pod); err != nil {
		t.Fatal(err)
	}
	if got := pod.Annotations[pods.NudgeAnnotation]; got != "new1" || len(pod.Annotations) != 1 {
		t.Errorf("annotations %v", pod.Annotations)
	}
	b.after(time.Hour) // what it suffers from is no affair of ours
	b.until("it waits", b.notReady, "a")
	b.start() // a controller that begins anew
	b.until("it waits", b.notReady, "a")
	b.after(time.Hour)
	b.until("it waits", b.notReady, "a")
	b.setStatus("app", func(s *corev1.ContainerStatus) { s.Ready = true })
	b.wantStates(b.until("completed", retired, "a"), "app Succeeded killed")
	if n := b.nudges(); n != 1 {
		t.Errorf("%d writes", n)
	}
	// The next container has a nudge of its own, and the annotation does not grow.
	b.create("b", spec{Containers: containers("app")})
	b.until("kubelet is nudged", func(*request) bool { return b.nudges() > 1 }, "b")
	if err := b.client.Get(t.Context(), types.NamespacedName{Namespace: "ns", Name: "pod"}, &pod); err != nil {
		t.Fatal(err)
	}
	if got := pod.Annotations[pods.NudgeAnnotation]; got != "new2" || len(pod.Annotations) != 1 {
		t.Errorf("annotations %v", pod.Annotations)
	}
}

// Where kubelet does not probe, or has found the container ready, nothing is written.
func TestNoNudge(t *testing.T) {
	for _, tt := range []struct {
		name  string
		pod   func(*corev1.Pod)
		ready bool
	}{
		{"ready in time", func(*corev1.Pod) {}, true},
		{"without a readinessProbe", func(p *corev1.Pod) { p.Spec.Containers[0].ReadinessProbe = nil }, false},
		{"in its initial delay", func(p *corev1.Pod) {
			p.Spec.Containers[0].ReadinessProbe.InitialDelaySeconds = 3600
		}, false},
		{"before its startupProbe has passed", func(p *corev1.Pod) {
			p.Spec.Containers[0].StartupProbe = &corev1.Probe{PeriodSeconds: 3600}
		}, false},
		{"not started", func(p *corev1.Pod) { p.Status.ContainerStatuses[0].Started = nil }, false},
	} {
		t.Run(tt.name, func(t *testing.T) {
			b := newBed(t, probed(tt.pod))
			b.unready.Store(!tt.ready)
			b.create("a", spec{Containers: containers("app")})
			if tt.ready {
				b.until("completed", retired, "a")
			} else {
				waits := func(crr *request) bool {
					op := b.r.LastHeard(onNode("a", "app"))
					return crr != nil && op.GetFinishTime() != nil
				}
				b.until("it waits", waits, "a")
				b.after(time.Minute)
				b.until("it waits", waits, "a")
				b.after(time.Minute)
				b.until("it waits", waits, "a")
			}
			if n := b.nudges(); n != 0 {
				t.Errorf("%d writes", n)
			}
		})
	}
}
