// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package rollout

import (
	"fmt"
	"testing"
	"time"

	policyv1 "k8s.io/api/policy/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	opsv1 "github.com/cri-proxy/cri-proxy/api/ops/v1"
)

// A preparation that gives way to requests is made again, however often that is.
func TestPreparationGivesWay(t *testing.T) {
	inBed(t, func(t *testing.T, b *bed) {
		b.addNodes(1)
		b.addPods(2, 1)
		budget := &policyv1.PodDisruptionBudget{
			ObjectMeta: metav1.ObjectMeta{Namespace: "ns", Name: "web"},
			Spec: policyv1.PodDisruptionBudgetSpec{
				Selector: &metav1.LabelSelector{MatchLabels: map[string]string{"app": "web"}},
			},
			Status: policyv1.PodDisruptionBudgetStatus{DesiredHealthy: 2},
		}
		if err := b.api.Create(t.Context(), budget); err != nil {
			t.Fatal(err)
		}
		b.create("all", spec{Target: all(), Containers: to("app:2")})
		uid := string(b.pod("web-0").UID)
		// last is the operation of the pod that has not ended.
		last := func() *simOp {
			for _, o := range b.fleet.nodes["node-0"].ops {
				if o.op.GetPod().GetUid() == uid && o.op.GetFinishTime() == nil {
					return o
				}
			}
			return nil
		}
		for n := range 2 * rounds {
			b.until("prepared", "all", time.Minute, func(*rollout) bool {
				b.fleet.mu.Lock()
				defer b.fleet.mu.Unlock()
				o := last()
				return o != nil && o.op.GetPhase() == opsv1.Phase_PHASE_PREPARED
			})
			b.fleet.mu.Lock()
			b.fleet.cancel(last(), "it gave way to restart x")
			b.fleet.mu.Unlock()
			// The restart takes a while, and the next preparation, which waits for it, finds
			// another container.
			time.Sleep(2*time.Second + time.Second)
			b.fleet.mu.Lock()
			if o := last(); o != nil {
				b.fleet.update(o, func(op *opsv1.Operation) {
					op.Phase, op.Containers[0].Reason = opsv1.Phase_PHASE_FAILED, "ExpectedIDDiffers"
				})
			}
			b.fleet.mu.Unlock()
			b.swapped(uid, "app", fmt.Sprintf("by-request-%d", n))
		}
		if r := b.get("all"); len(r.Status.Failures) > 0 || ended(r) {
			t.Errorf("status %+v", r.Status)
		}
		budget.Status.DesiredHealthy, budget.Status.DisruptionsAllowed = 1, 1
		if err := b.api.Status().Update(t.Context(), budget); err != nil {
			t.Fatal(err)
		}
		b.want(b.until("ended", "all", 5*time.Minute, ended), "True RolledOut", "2/2/2/0/0")
	})
}
