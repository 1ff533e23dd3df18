// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package rollout

import (
	"testing"
	"time"

	inplace "github.com/cri-proxy/cri-proxy/api/inplace/v1alpha1"
)

func TestPod(t *testing.T) {
	inBed(t, func(t *testing.T, b *bed) {
		b.addNodes(1)
		b.addPods(1, 1)
		b.create("one", spec{Target: inplace.Target{PodName: "web-0"}, Containers: to("app:2")})
		r := b.until("ended", "one", time.Minute, ended)
		b.want(r, "True RolledOut", "1/1/1/0/0")
		pod := b.pod("web-0")
		if runningImage(pod, "app") != "app:2" || runningImage(pod, "side") != "side:1" || pod.Annotations["other"] != "kept" {
			t.Errorf("pod %+v", pod)
		}
		if n := b.counted("patch v1.Pod") + b.counted("status v1.Pod"); n != 1 {
			t.Errorf("%d writes for the pod", n)
		}
		if b.fleet.pinned() != 0 {
			t.Error("pins are left")
		}
		p := b.fleet.prepared()
		if len(p) != 1 || p[0].GetOwner() != "InPlaceRollout/ns/one/uid-one" || !p[0].GetContainers()[0].GetRunAsNonRoot() || p[0].GetContainers()[0].GetExpectedContainerId() == "" {
			t.Errorf("prepared %v", p)
		}
	})
}
