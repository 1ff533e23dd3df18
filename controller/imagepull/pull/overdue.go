// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package pull

import (
	"fmt"
	"strings"
	"time"

	opsv1 "github.com/cri-proxy/cri-proxy/api/ops/v1"
	"github.com/cri-proxy/cri-proxy/controller/imagepull/spec"
)

const (
	// overdueSlack is how much longer than its node was told a pull may take before the controller
	// ends it.
	overdueSlack = 2 * time.Minute

	// ReasonOverdue is why a node fails that answers and does not come to an end.
	ReasonOverdue = "Overdue"
	overdueReason = cancelReason + ReasonOverdue + ": "
)

// Allowance is the time that a pull has left, at work and in its node's queue.
type Allowance struct {
	bound, work, queue time.Duration
	queued             bool
	since              time.Time
}

// NewAllowance returns what a pull has that a node is told at a time.
func NewAllowance(r *opsv1.PullRequest, now time.Time) *Allowance {
	bound := spec.WorkBound(r)
	return &Allowance{bound: bound, work: bound + overdueSlack, queue: spec.QueueAllowance + overdueSlack, since: now}
}

// Spend takes off the time that has passed. It says why the pull has to end, or nothing.
func (b *Allowance) Spend(op *opsv1.PullOperation, now time.Time) string {
	passed := now.Sub(b.since)
	if b.queued {
		b.queue -= passed
	} else {
		b.work -= passed
	}
	b.since, b.queued = now, opsv1.InQueue(op)
	const see = "see cri-proxy ctl pulls on the node"
	switch {
	case op.GetFinishTime() != nil:
	case b.work < 0:
		return fmt.Sprintf("the node answers and does not come to an end, though its attempts may take %s together: "+
			"%s, and its log", b.bound, see)
	case b.queue < 0:
		return fmt.Sprintf("the pull has waited for others on the node for %s: %s", spec.QueueAllowance, see)
	}
	return ""
}

// OverdueText is why the controller ended a pull that was overdue; empty if it did not.
func OverdueText(op *opsv1.PullOperation) string {
	text, ok := strings.CutPrefix(op.GetMessage(), overdueReason)
	if op.GetPhase() != opsv1.PullPhase_PULL_CANCELLED || !ok && op.GetCancelCode() != opsv1.CancelCodeOverdue {
		return ""
	}
	return text
}

// OverdueReason is what a node is told whose pull is cancelled because it is overdue.
func OverdueReason(why string) string { return overdueReason + why }
