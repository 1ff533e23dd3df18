// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package rollout

import (
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	inplace "github.com/cri-proxy/cri-proxy/api/inplace/v1alpha1"
	"github.com/cri-proxy/cri-proxy/controller/pods"
	"github.com/cri-proxy/cri-proxy/controller/rollout/evaluate"
)

// starting gives the pod's application a startupProbe, which it has passed.
func starting(p *corev1.Pod) {
	yes := true
	running := corev1.ContainerState{Running: &corev1.ContainerStateRunning{StartedAt: metav1.Now()}}
	p.Spec.Containers[0].StartupProbe = &corev1.Probe{PeriodSeconds: 10}
	p.Status.ContainerStatuses = []corev1.ContainerStatus{
		{Name: "app", Image: "docker.io/library/app:1", ImageID: "id of app:1", ContainerID: "containerd://first-" +
			string(p.UID), Ready: true, Started: &yes, State: running},
		{Name: "side", Image: "docker.io/library/side:1", ImageID: "id of side:1", ContainerID: "containerd://side-" +
			string(p.UID), Ready: true, Started: &yes, State: running},
	}
	setReady(p, true)
}

// The pods of a rollout go one after another, though kubelet says that their new containers have
// started, and are ready, as soon as they run.
func TestStartupProbe(t *testing.T) {
	for _, tt := range []struct {
		name, version string
		hold          bool
		changes       []change
		restart       bool // of the controller, all the time
	}{
		{name: "kubelet 1.37", version: "v1.37.2", hold: true, changes: to("app:2")},
		{name: "nodes that do not hold probes", version: "v1.35.0", changes: to("app:2")},
		{name: "a version that cannot be read", changes: to("app:2")},
		{name: "kubelet 1.34", version: "v1.34.4+k3s1", changes: to("app:2")},
		{name: "restarts", version: "v1.37.2", hold: true, changes: []change{{Name: "app"}}},
		{name: "restarts that are not held", version: "v1.37.2", changes: []change{{Name: "app"}}},
		{name: "controllers that do not live long", version: "v1.37.2", changes: to("app:2"), restart: true},
	} {
		t.Run(tt.name, func(t *testing.T) {
			inBed(t, func(t *testing.T, b *bed) {
				b.kubelet.start, b.kubelet.hold = 25*time.Second, tt.hold
				b.addNodes(1)
				b.nodes["node-0"].Status.NodeInfo.KubeletVersion = tt.version
				b.addPods(4, 1, starting)
				time.Sleep(time.Minute)
				peak := 0
				b.create("all", spec{Target: all(), Containers: tt.changes,
					Strategy: settings{ProgressDeadlineSeconds: 120}})
				looks := 0
				r := b.until("ended", "all", 5*time.Minute, func(r *rollout) bool {
					b.mu.Lock()
					down := 0
					for _, at := range b.serves {
						if time.Now().Before(at) {
							down++
						}
					}
					b.mu.Unlock()
					peak = max(peak, down)
					if looks++; tt.restart && looks%30 == 0 {
						b.restart()
					}
					return ended(r)
				})
				b.want(r, "True RolledOut", "4/4/4/0/0")
				if peak != 1 {
					t.Errorf("%d pods did not serve at the same time", peak)
				}
				for _, pod := range b.pods() {
					if cs := pods.Status(pod, "app"); cs.RestartCount != 1 || time.Now().Before(b.serves[pod.UID]) {
						t.Errorf("%s has %+v when the rollout is complete", pod.Name, cs)
					}
				}
				carried := tt.version != "v1.34.4+k3s1"
				for _, p := range b.fleet.prepared() {
					if hold := p.GetContainers()[0].GetHoldProbes().
						AsDuration(); hold != map[bool]time.Duration{true: 14 * time.Second}[carried] {
						t.Errorf("probes are held for %s", hold)
					}
				}
				for _, p := range b.fleet.nodes["node-0"].restarts {
					if !p.GetContainers()[0].GetRunAsNonRoot() {
						t.Error("the node is not told that the container must not be root")
					}
					if hold := p.GetContainers()[0].GetHoldProbes().AsDuration(); hold != 14*time.Second {
						t.Errorf("probes are held for %s", hold)
					}
				}
			})
		})
	}
}

// A pod whose application never starts is the rollout's failure, however kubelet begins to tell of
// it.
func TestStartupProbeNeverPasses(t *testing.T) {
	inBed(t, func(t *testing.T, b *bed) {
		b.kubelet.start = time.Hour
		b.addNodes(1)
		b.nodes["node-0"].Status.NodeInfo.KubeletVersion = "v1.37.2"
		b.addPods(2, 1, func(p *corev1.Pod) { starting(p); p.Spec.Containers[0].StartupProbe.PeriodSeconds = 30 })
		time.Sleep(time.Minute)
		b.create("all", spec{Target: all(), Containers: to("app:2"), Strategy: settings{ProgressDeadlineSeconds: 120,
			OnFailure: inplace.Pause}})
		r := b.until("failed", "all", 5*time.Minute, func(r *rollout) bool { return len(r.Status.Failures) > 0 })
		if f := r.Status.Failures[0]; f.Reason != evaluate.FailDeadline || r.Status.Updated != 0 {
			t.Errorf("status %+v", r.Status)
		}
		if got := b.images("app"); got["app:2"] != 1 {
			t.Errorf("images %v", got)
		}
	})
}
