// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package report_test

import (
	"testing"

	"k8s.io/apimachinery/pkg/api/meta"

	"github.com/cri-proxy/cri-proxy/api/apps/v1beta1"
	"github.com/cri-proxy/cri-proxy/controller/imagepull/report"
	"github.com/cri-proxy/cri-proxy/controller/kstatus"
)

// What kstatus makes of them is in deploy's TestHealth.
func TestSetReady(t *testing.T) {
	for _, tt := range []struct {
		name, reason string
		complete     bool
		failed       int32
		want         string
	}{
		{"at work", report.Pulling, false, 0, kstatus.Reconciling},
		{"at work, one has failed", report.Pulling, false, 1, kstatus.Reconciling},
		{"paused", report.Paused, false, 0, kstatus.Reconciling},
		{"nodes are away", report.Waiting, false, 0, kstatus.Reconciling},
		{"done", report.Succeeded, true, 0, kstatus.Ready},
		{"no node", report.NoNodes, true, 0, kstatus.Stalled},
		{"never ends, no node", report.NoNodes, false, 0, kstatus.Ready},
		{"failed", report.NodesFailed, true, 2, kstatus.Stalled},
		{"late", report.DeadlineExceeded, true, 2, kstatus.Stalled},
		{"never ends, all have it", report.UpToDate, false, 0, kstatus.Ready},
		{"never ends, some have it not", report.UpToDate, false, 1, kstatus.Stalled},
		{"cannot be read", report.InvalidSpec, false, 0, kstatus.Stalled},
	} {
		s := &v1beta1.ImagePullJobStatus{ObservedGeneration: 3, Failed: tt.failed}
		report.SetCondition(s, v1beta1.ConditionComplete, tt.complete, tt.reason, "")
		if tt.complete {
			report.SetCondition(s, v1beta1.ConditionSucceeded, tt.reason == report.Succeeded, tt.reason, "")
		}
		report.SetReady(s)
		for _, kind := range []string{kstatus.Ready, kstatus.Reconciling, kstatus.Stalled} {
			if c := meta.FindStatusCondition(s.Conditions, kind); c == nil ||
				meta.IsStatusConditionTrue(s.Conditions, kind) != (kind == tt.want) || c.ObservedGeneration != 3 {
				t.Errorf("%s: %s is %+v, want True only for %s", tt.name, kind, c, tt.want)
			}
		}
	}
}
