// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package rollout

import (
	"testing"

	"k8s.io/apimachinery/pkg/api/meta"

	inplace "github.com/cri-proxy/cri-proxy/api/inplace/v1alpha1"
	"github.com/cri-proxy/cri-proxy/controller/kstatus"
	"github.com/cri-proxy/cri-proxy/controller/rollout/notice"
)

// What kstatus makes of them is in deploy's TestHealth.
func TestTellReady(t *testing.T) {
	for _, tt := range []struct {
		reason                string
		complete, progressing bool
		failed                int32
		want                  string
	}{
		{inplace.ReasonRollingOut, false, true, 0, kstatus.Reconciling},
		{inplace.ReasonRolledOut, true, true, 0, kstatus.Ready},
		{inplace.ReasonPartitioned, false, true, 0, kstatus.Ready},
		{inplace.ReasonPartitioned, false, true, 1, kstatus.Reconciling},
		{inplace.ReasonPaused, false, true, 0, kstatus.Reconciling},
		{inplace.ReasonQueued, false, true, 0, kstatus.Reconciling},
		{inplace.ReasonBudget, false, true, 0, kstatus.Reconciling},
		{inplace.ReasonRollingBack, false, true, 1, kstatus.Reconciling},
		{inplace.ReasonPodsFailed, false, true, 1, kstatus.Reconciling},
		{inplace.ReasonPodsFailed, false, false, 1, kstatus.Stalled},
		{inplace.ReasonRolledBack, false, false, 1, kstatus.Stalled},
		{inplace.ReasonStopped, false, false, 1, kstatus.Stalled},
		{inplace.ReasonStuck, false, false, 0, kstatus.Stalled},
		{inplace.ReasonInvalidTarget, false, false, 0, kstatus.Stalled},
		{inplace.ReasonNotInPlace, false, false, 0, kstatus.Stalled},
	} {
		s := &inplace.InPlaceRolloutStatus{ObservedGeneration: 3, Failed: tt.failed}
		setKstatus(s)
		if len(s.Conditions) != 0 {
			t.Errorf("%s: conditions before anything is known: %v", tt.reason, s.Conditions)
		}
		notice.SetCondition(s, inplace.ConditionComplete, tt.complete, tt.reason, "")
		notice.SetCondition(s, inplace.ConditionProgressing, tt.progressing, tt.reason, "")
		setKstatus(s)
		for _, kind := range []string{kstatus.Ready, kstatus.Reconciling, kstatus.Stalled} {
			c := meta.FindStatusCondition(s.Conditions, kind)
			if c == nil || meta.IsStatusConditionTrue(s.Conditions, kind) != (kind == tt.want) ||
				c.Reason != tt.reason || c.ObservedGeneration != 3 {
				t.Errorf("%s: %s is %+v, want True only for %s", tt.reason, kind, c, tt.want)
			}
		}
	}
}
