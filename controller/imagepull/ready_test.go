// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package imagepull

import (
	"testing"
	"time"

	"k8s.io/apimachinery/pkg/api/meta"

	"github.com/cri-proxy/cri-proxy/api/apps/v1beta1"
	"github.com/cri-proxy/cri-proxy/controller/kstatus"
)

// What kstatus makes of them is in deploy's TestHealth.
func TestTellReady(t *testing.T) {
	for _, tt := range []struct {
		name, reason string
		complete     bool
		failed       int32
		want         string
	}{
		{"at work", completePulling, false, 0, kstatus.Reconciling},
		{"at work, one has failed", completePulling, false, 1, kstatus.Reconciling},
		{"paused", completePaused, false, 0, kstatus.Reconciling},
		{"nodes are away", completeWaiting, false, 0, kstatus.Reconciling},
		{"done", completeSucceeded, true, 0, kstatus.Ready},
		{"no node", completeNoNodes, true, 0, kstatus.Stalled},
		{"never ends, no node", completeNoNodes, false, 0, kstatus.Ready},
		{"failed", completeNodesFailed, true, 2, kstatus.Stalled},
		{"late", completeDeadline, true, 2, kstatus.Stalled},
		{"never ends, all have it", completeUpToDate, false, 0, kstatus.Ready},
		{"never ends, some have it not", completeUpToDate, false, 1, kstatus.Stalled},
		{"cannot be read", completeInvalidSpec, false, 0, kstatus.Stalled},
	} {
		s := &v1beta1.ImagePullJobStatus{ObservedGeneration: 3, Failed: tt.failed}
		setCondition(s, v1beta1.ConditionComplete, tt.complete, tt.reason, "")
		if tt.complete {
			setCondition(s, v1beta1.ConditionSucceeded, tt.reason == completeSucceeded, tt.reason, "")
		}
		tellReady(s)
		for _, kind := range []string{kstatus.Ready, kstatus.Reconciling, kstatus.Stalled} {
			if c := meta.FindStatusCondition(s.Conditions, kind); c == nil || meta.IsStatusConditionTrue(s.Conditions, kind) != (kind == tt.want) || c.ObservedGeneration != 3 {
				t.Errorf("%s: %s is %+v, want True only for %s", tt.name, kind, c, tt.want)
			}
		}
	}
}

// The status of a job or list that has ended is about the spec as it is, also when what was changed does not begin it again.
func TestChangedAfterTheEnd(t *testing.T) {
	inBed(t, func(t *testing.T, b *bed) {
		b.addMany(1, time.Second)
		b.create("job", spec{})
		b.createList("list", v1beta1.ImageListPullJobSpec{Images: []string{"a"}})
		j := b.until("completed", "job", time.Minute, completed)
		l := b.untilList("completed", "list", time.Minute, func(l *list) bool { return l.Status.CompletionTime != nil })
		for _, conditions := range []bool{meta.IsStatusConditionTrue(j.Status.Conditions, kstatus.Ready), meta.IsStatusConditionTrue(l.Status.Conditions, kstatus.Ready)} {
			if !conditions {
				t.Errorf("not Ready at the end: %+v, %+v", j.Status.Conditions, l.Status.Conditions)
			}
		}
		b.edit("job", func(j *job) { j.Spec.CompletionPolicy.TTLSecondsAfterFinished = number(int32(3600)) })
		j = b.until("seen", "job", time.Minute, func(j *job) bool { return j.Status.ObservedGeneration == j.Generation })
		if !completed(j) || b.fleet.begun()["node-0"] > 2 {
			t.Errorf("begun again: %+v", j.Status)
		}
	})
}
