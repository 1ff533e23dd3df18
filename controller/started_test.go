// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package controller

import (
	"context"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
)

func TestCarriesStarted(t *testing.T) {
	for version, want := range map[string]bool{
		"v1.31.14": false, "v1.34.4": false, "v1.34.4+k3s1": false, "v1.34.99-eks-1234": false,
		"v1.35.0": true, "v1.35.0-rc.1": true, "v1.37.2": true, "v1.37.2-gke.100": true, "v2.0.0": true, "": true, "somewhat new": true,
	} {
		node := &corev1.Node{}
		node.Status.NodeInfo.KubeletVersion = version
		if got := CarriesStarted(node); got != want {
			t.Errorf("%q: %v", version, got)
		}
		slim, err := slimNode(node)
		if err != nil || CarriesStarted(slim.(*corev1.Node)) != want {
			t.Errorf("%q: the cache says otherwise, error %v", version, err)
		}
	}
	if !CarriesStarted(nil) {
		t.Error("an unknown node")
	}
}

func TestStartupPassed(t *testing.T) {
	now := time.Now()
	probed := &corev1.Container{Name: "app", StartupProbe: &corev1.Probe{PeriodSeconds: 5}}
	for _, tt := range []struct {
		name      string
		container *corev1.Container
		started   bool
		restarts  int32
		running   time.Duration // ago
		seen      time.Duration // ago; 0 for never
		carried   bool
		want      bool
		wait      time.Duration
	}{
		{name: "without a probe", container: &corev1.Container{}, carried: true, restarts: 1, want: true},
		{name: "not started", container: probed, carried: true, restarts: 1, running: time.Hour},
		{name: "an older kubelet", container: probed, started: true, restarts: 1, want: true},
		{name: "the first container", container: probed, started: true, carried: true, want: true},
		{name: "just replaced", container: probed, started: true, carried: true, restarts: 1, running: time.Second, wait: 8 * time.Second},
		{name: "seen at once, probes held", container: probed, started: true, carried: true, restarts: 1, running: -7 * time.Second, seen: 2 * time.Second, wait: 7 * time.Second},
		{name: "a node's clock that is ahead", container: probed, started: true, carried: true, restarts: 1, running: -time.Hour, seen: 9 * time.Second, want: true},
		{name: "held, seen by nobody", container: probed, started: true, carried: true, restarts: 1, running: -7 * time.Second, wait: 16 * time.Second},
		{name: "long ago", container: probed, started: true, carried: true, restarts: 1, running: 9 * time.Second, seen: time.Second, want: true},
		{name: "the API's default period", container: &corev1.Container{StartupProbe: &corev1.Probe{}}, started: true, carried: true, restarts: 1, running: 10 * time.Second, wait: 4 * time.Second},
	} {
		t.Run(tt.name, func(t *testing.T) {
			s := &corev1.ContainerStatus{Started: &tt.started, RestartCount: tt.restarts, State: corev1.ContainerState{Running: &corev1.ContainerStateRunning{StartedAt: metav1.NewTime(now.Add(-tt.running))}}}
			var seen time.Time
			if tt.seen > 0 {
				seen = now.Add(-tt.seen)
			}
			if got, wait := StartupPassed(tt.container, s, seen, tt.carried, now); got != tt.want || wait != tt.wait {
				t.Errorf("%v, %s", got, wait)
			}
		})
	}
	if passed, _ := StartupPassed(probed, nil, time.Time{}, true, now); passed {
		t.Error("without a status")
	}
}

// A request waits for the startupProbe of the new container, which kubelet takes for started at first.
func TestRecreateWaitsForStartupProbe(t *testing.T) {
	for _, tt := range []struct {
		version string
		carried bool
	}{{"v1.37.2", true}, {"v1.34.4", false}} {
		t.Run(tt.version, func(t *testing.T) {
			yes, no := true, false
			b := newBed(t, func(p *corev1.Pod) {
				p.Spec.Containers[0].StartupProbe = &corev1.Probe{PeriodSeconds: 10}
				p.Status.ContainerStatuses[0].Started = &yes
			})
			var node corev1.Node
			if err := b.client.Get(context.Background(), types.NamespacedName{Name: "node-1"}, &node); err != nil {
				t.Fatal(err)
			}
			node.Status.NodeInfo.KubeletVersion = tt.version
			if err := b.client.Status().Update(context.Background(), &node); err != nil {
				t.Fatal(err)
			}
			if !tt.carried {
				b.node.swapped = func(uid, name, id string, attempt int32) {
					b.kubelet(uid, name, id, attempt)
					b.setStatus(name, func(s *corev1.ContainerStatus) { s.Started, s.Ready = &no, false })
				}
			}
			b.create("a", spec{Containers: containers("app")})
			waits := func(crr *request) bool {
				return states(crr) == "app Recreating killed: the new container runs; waiting for its startupProbe"
			}
			b.until("it waits", waits, "a")
			b.stopClock()
			if hold := b.node.requests[0].GetContainers()[0].GetHoldProbes(); tt.carried != (hold.AsDuration() == 14*time.Second) || !tt.carried && hold != nil {
				t.Errorf("probes are held for %s", hold)
			}
			// The startup worker's first look.
			b.setStatus("app", func(s *corev1.ContainerStatus) { s.Started, s.Ready = &no, false })
			b.after(20 * time.Second)
			b.until("it still waits", waits, "a")
			b.setStatus("app", func(s *corev1.ContainerStatus) { s.Started, s.Ready = &yes, true })
			b.wantStates(b.until("completed", retired, "a"), "app Succeeded killed")
		})
	}
}

// What kubelet has carried over is believed when its startup worker must have looked: then it is the probe's.
func TestRecreateBelievesInTheEnd(t *testing.T) {
	yes := true
	b := newBed(t, func(p *corev1.Pod) {
		p.Spec.InitContainers[1].StartupProbe = &corev1.Probe{PeriodSeconds: 1}
		p.Status.InitContainerStatuses[1].Started = &yes
	})
	begun := time.Now()
	b.create("a", spec{Containers: containers("mesh")})
	b.wantStates(b.until("completed", retired, "a"), "mesh Succeeded killed") // by its own requeue
	if took := time.Since(begun); took < startedSlack { // startedAt is cut to the second
		t.Errorf("after %s", took)
	}
	if hold := b.node.requests[0].GetContainers()[0].GetHoldProbes().AsDuration(); hold != 5*time.Second {
		t.Errorf("probes are held for %s", hold)
	}
}
