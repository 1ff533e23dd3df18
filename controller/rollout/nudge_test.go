// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package rollout

import (
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"

	"github.com/cri-proxy/cri-proxy/controller/pods"
)

// Kubelet is made to look at a pod again, once, whose new container is not ready at once.
func TestNudge(t *testing.T) {
	for _, tt := range []struct {
		name   string
		start  time.Duration
		probe  *corev1.Probe
		writes int // for each pod
	}{
		{"ready at once", 100 * time.Millisecond, &corev1.Probe{PeriodSeconds: 10}, 1},
		{"ready later", 40 * time.Second, &corev1.Probe{PeriodSeconds: 10}, 2},
		{"without a readinessProbe", 40 * time.Second, nil, 1},
	} {
		t.Run(tt.name, func(t *testing.T) {
			inBed(t, func(t *testing.T, b *bed) {
				b.kubelet.start = tt.start
				b.addNodes(1)
				b.addPods(3, 1, func(p *corev1.Pod) { p.Spec.Containers[0].ReadinessProbe = tt.probe })
				b.create("all", spec{Target: all(), Containers: to("app:2")})
				b.want(b.until("ended", "all", 5*time.Minute, ended), "True RolledOut", "3/3/3/0/0")
				if n := b.counted("patch v1.Pod"); n != 3*tt.writes {
					t.Errorf("%d writes", n)
				}
				for _, pod := range b.pods() {
					if got := pod.Annotations[pods.NudgeAnnotation]; (got != "") != (tt.writes > 1) {
						t.Errorf("%s has %q", pod.Name, got)
					}
				}
			})
		})
	}
}
