// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package imagepull

import (
	"time"

	apiequality "k8s.io/apimachinery/pkg/api/equality"

	"github.com/cri-proxy/cri-proxy/api/apps/v1beta1"
	"github.com/cri-proxy/cri-proxy/controller/imagepull/report"
	"github.com/cri-proxy/cri-proxy/controller/retry"
)

// review is what a reconcile learns of a job at work.
type review struct {
	// status is what the status is to say.
	status *v1beta1.ImagePullJobStatus
	// finished says that no node has anything left to do.
	finished bool
	// due says that the status is to be written now.
	due bool
	// wait is when to look again; 0 means at the next change.
	wait time.Duration
	// throttle is as it was before the write that is due.
	throttle report.Throttle
}

// review looks at all nodes. before is the status that the job has. observe sets in a status about
// which job it is. If a write is due, review counts it as done; unwritten takes that back.
func (j *jobState) review(
	before *v1beta1.ImagePullJobStatus, observe func(*v1beta1.ImagePullJobStatus), now time.Time,
) review {
	j.mu.Lock()
	defer j.mu.Unlock()
	t := j.table
	r := review{status: t.status(before), finished: t.finished()}
	observe(r.status)
	n, idle := len(t.nodes), t.idle()
	if t.setRunning(r.status); !apiequality.Semantic.DeepEqual(r.status.Conditions, before.Conditions) {
		t.throttle.Add(0)
	}
	r.due, r.wait = t.throttle.Due(now, n, idle)
	if r.status.ObservedGeneration != before.ObservedGeneration {
		r.due = true
	}
	if wakeup := t.nextWakeup(now); wakeup > 0 {
		r.wait = retry.Sooner(r.wait, wakeup)
	}
	r.throttle = t.throttle
	if r.due {
		t.throttle.Wrote(now, n, idle)
	}
	j.woken, j.planned = !r.due && r.wait > 0 && r.wait <= report.WriteGap, time.Time{}
	if r.wait > 0 {
		j.planned = now.Add(r.wait)
	}
	return r
}

// unwritten notes that the write of a review has failed.
func (j *jobState) unwritten(r review) {
	j.mu.Lock()
	defer j.mu.Unlock()
	j.table.throttle.Undo(r.throttle)
}

// lateFailures are the nodes that have failed, or were not done at the job's deadline.
func (j *jobState) lateFailures() []v1beta1.NodePullFailure {
	j.mu.Lock()
	defer j.mu.Unlock()
	return j.table.nodes.lateFailures()
}
