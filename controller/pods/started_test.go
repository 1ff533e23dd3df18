// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package pods_test

import (
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/cri-proxy/cri-proxy/controller/pods"
)

func TestCarriesStarted(t *testing.T) {
	for version, want := range map[string]bool{
		"v1.31.14": false, "v1.34.4": false, "v1.34.4+k3s1": false, "v1.34.99-eks-1234": false,
		"v1.35.0": true, "v1.35.0-rc.1": true, "v1.37.2": true, "v1.37.2-gke.100": true, "v2.0.0": true, "": true,
		"somewhat new": true,
	} {
		node := &corev1.Node{}
		node.Status.NodeInfo.KubeletVersion = version
		if got := pods.CarriesStarted(node); got != want {
			t.Errorf("%q: %v", version, got)
		}
	}
	if !pods.CarriesStarted(nil) {
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
		{name: "just replaced", container: probed, started: true, carried: true, restarts: 1, running: time.Second,
			wait: 8 * time.Second},
		{name: "seen at once, probes held", container: probed, started: true, carried: true, restarts: 1,
			running: -7 * time.Second, seen: 2 * time.Second, wait: 7 * time.Second},
		{name: "a node's clock that is ahead", container: probed, started: true, carried: true, restarts: 1,
			running: -time.Hour, seen: 9 * time.Second, want: true},
		{name: "held, seen by nobody", container: probed, started: true, carried: true, restarts: 1,
			running: -7 * time.Second, wait: 16 * time.Second},
		{name: "long ago", container: probed, started: true, carried: true, restarts: 1, running: 9 * time.Second,
			seen: time.Second, want: true},
		{name: "the API's default period", container: &corev1.Container{StartupProbe: &corev1.Probe{}}, started: true,
			carried: true, restarts: 1, running: 10 * time.Second, wait: 4 * time.Second},
	} {
		t.Run(tt.name, func(t *testing.T) {
			s := &corev1.ContainerStatus{Started: &tt.started, RestartCount: tt.restarts,
				State: corev1.ContainerState{
					Running: &corev1.ContainerStateRunning{StartedAt: metav1.NewTime(now.Add(-tt.running))}}}
			var seen time.Time
			if tt.seen > 0 {
				seen = now.Add(-tt.seen)
			}
			if got, wait := pods.StartupPassed(tt.container, s, seen, tt.carried, now); got != tt.want ||
				wait != tt.wait {
				t.Errorf("%v, %s", got, wait)
			}
		})
	}
	if passed, _ := pods.StartupPassed(probed, nil, time.Time{}, true, now); passed {
		t.Error("without a status")
	}
}
