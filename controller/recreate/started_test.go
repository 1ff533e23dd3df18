// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package recreate_test

import (
	"context"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/types"
)

// A request waits for the startupProbe of the new container, which kubelet takes for started at
// first.
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
				b.node.Swapped = func(uid, name, id string, attempt int32) {
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
			hold := b.node.Requests()[0].GetContainers()[0].GetHoldProbes()
			if tt.carried != (hold.AsDuration() == 14*time.Second) || !tt.carried && hold != nil {
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

// What kubelet has carried over is believed when its startup worker must have looked: then it is
// the probe's.
func TestRecreateBelievesInTheEnd(t *testing.T) {
	yes := true
	b := newBed(t, func(p *corev1.Pod) {
		p.Spec.InitContainers[1].StartupProbe = &corev1.Probe{PeriodSeconds: 1}
		p.Status.InitContainerStatuses[1].Started = &yes
	})
	begun := time.Now()
	b.create("a", spec{Containers: containers("mesh")})
	b.wantStates(b.until("completed", retired, "a"), "mesh Succeeded killed") // by its own requeue
	if took := time.Since(begun); took < 4*time.Second {                      // startedAt is cut to the second
		t.Errorf("after %s", took)
	}
	if hold := b.node.Requests()[0].GetContainers()[0].GetHoldProbes().AsDuration(); hold != 5*time.Second {
		t.Errorf("probes are held for %s", hold)
	}
}
