// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package rollout

import (
	"fmt"
	"testing"
	"time"

	inplace "github.com/cri-proxy/cri-proxy/api/inplace/v1alpha1"
)

const (
	podsPerNode = 10
	manyPods    = manyNodes * podsPerNode
)

// rolloutWrites are the writes of the controller to rollouts.
func (b *bed) rolloutWrites() int {
	return b.counted("patch v1alpha1.InPlaceRollout") + b.counted("status v1alpha1.InPlaceRollout")
}

// 5,000 pods on 500 nodes, half of them with gates, the controller killed twice: no more pods are
// unavailable than may be, and the API server is written to once for a pod, and twice more for one
// with a gate.
func TestManyPods(t *testing.T) {
	inBed(t, func(t *testing.T, b *bed) {
		b.addNodes(manyNodes)
		for i := range manyPods {
			if name, node := fmt.Sprintf("web-%d", i), fmt.Sprintf("node-%d", i%manyNodes); i%2 == 0 {
				b.addPod(name, node, gated)
			} else {
				b.addPod(name, node)
			}
		}
		begin := time.Now()
		b.create("all", spec{Target: all(), Containers: to("app:2"), Strategy: settings{MaxUnavailable: percent("5%")}})
		for _, share := range []int{3, 2} {
			b.until("on its way", "all", time.Hour,
				func(*rollout) bool { return b.images("app")["app:2"] >= manyPods/share })
			b.restart()
		}
		r := b.until("ended", "all", 2*time.Hour, ended)
		b.want(r, "True RolledOut", fmt.Sprintf("%d/%d/%d/0/0", manyPods, manyPods, manyPods))
		if b.peak > manyPods/20 {
			t.Errorf("%d pods were not ready at once, want at most %d", b.peak, manyPods/20)
		}
		patches, statuses := b.counted("patch v1.Pod"), b.counted("status v1.Pod")
		if patches != manyPods || statuses != manyPods || b.rolloutWrites() > 200 {
			t.Errorf("%d patches and %d status writes of pods, %d of the rollout", patches, statuses, b.rolloutWrites())
		}
		t.Logf("%d pods in %s: at most %d not ready, %d patches and %d status writes of pods, %d of the rollout, "+
			"calls of nodes %v",
			manyPods, time.Since(begin).Round(time.Second), b.peak, patches, statuses, b.rolloutWrites(), b.fleet.calls)
	})
}

// Nodes that hang hold up nobody else, and their pods are named.
func TestManyPodsSomeNodesAway(t *testing.T) {
	inBed(t, func(t *testing.T, b *bed) {
		const some = min(manyNodes, 100)
		b.addNodes(some)
		b.addPods(some*podsPerNode, some)
		for i := range 4 {
			b.fleet.change(fmt.Sprintf("node-%d", i*7), func(n *simNode) { n.silent, n.deaf = i%2 == 0, i%2 == 1 })
		}
		b.create("all", spec{Target: all(), Containers: to("app:2"), Strategy: settings{MaxUnavailable: number(50),
			OnFailure: inplace.Continue, ProgressDeadlineSeconds: 120}})
		r := b.until("over", "all", 2*time.Hour, ended)
		if condition(r, inplace.ConditionComplete) != "False PodsFailed" || r.Status.Failed != 4*podsPerNode ||
			r.Status.Updated != (some-4)*podsPerNode || len(r.Status.Failures) != maxFailures {
			t.Errorf("status %+v", r.Status)
		}
		if b.peak > 50 {
			t.Errorf("%d pods were not ready at once", b.peak)
		}
	})
}
