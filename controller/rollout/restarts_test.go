// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package rollout

import (
	"testing"
	"time"
)

// A rollout that only restarts goes from pod to pod as fast as one of an image: the write that lets a pod be restarted is noticed at once.
func TestRestartsDoNotPause(t *testing.T) {
	for _, tt := range []struct {
		name   string
		change func(*bed)
	}{
		{"without a gate", func(b *bed) { b.addPods(4, 2) }},
		{"with a gate", func(b *bed) { b.addPods(4, 2, gated) }},
	} {
		t.Run(tt.name, func(t *testing.T) {
			inBed(t, func(t *testing.T, b *bed) {
				b.addNodes(2)
				tt.change(b)
				begun := time.Now()
				b.create("all", spec{Target: all(), Containers: []change{{Name: "app"}}, Strategy: settings{MinReadySeconds: 5, ProgressDeadlineSeconds: 30}})
				b.want(b.until("ended", "all", 5*time.Minute, ended), "True RolledOut", "4/4/4/0/0")
				// The node takes a second for each, then it must have been ready for long enough.
				if took := time.Since(begun); took > 4*8*time.Second {
					t.Errorf("4 pods took %s", took)
				}
			})
		})
	}
}
