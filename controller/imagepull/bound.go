// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package imagepull

import (
	"context"
	"fmt"
	"strings"
	"time"

	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/durationpb"

	"github.com/cri-proxy/cri-proxy/api/apps/v1beta1"
	opsv1 "github.com/cri-proxy/cri-proxy/api/ops/v1"
	"github.com/cri-proxy/cri-proxy/controller/nodes"
)

const (
	// backOffMin and backOffMax are the node's: the wait between attempts doubles from the one to the other.
	backOffMin = time.Second
	backOffMax = 30 * time.Second
	// queueAllowance is how long a pull may wait on its node for kubelet's pulls and for those of other jobs, of which a list
	// has up to 255.
	queueAllowance = 6 * time.Hour
	// boundSlack is what a pull may take longer than its node was told, before the controller takes the node's turn away.
	boundSlack = 2 * time.Minute

	// reasonOverdue is why a node fails that answers and does not come to an end.
	reasonOverdue = "Overdue"
	// overdueReason begins what such a node is told.
	overdueReason = cancelReason + reasonOverdue + ": "
)

// workBound is how long all attempts of a pull may take, with the waits between them.
func workBound(r *opsv1.PullRequest) time.Duration {
	bound := time.Duration(r.GetMaxAttempts()) * r.GetAttemptTimeout().AsDuration()
	for i := range r.GetMaxAttempts() - 1 {
		bound += backOffAfter(i + 1)
	}
	return bound
}

// backOffAfter is how long a node waits after an attempt, counted from 1.
func backOffAfter(attempt int32) time.Duration {
	return min(backOffMin<<min(attempt-1, 10), backOffMax)
}

// deadlineOf is when a node is to give up, counted from the command; the same for all nodes, since a command must not change. It
// keeps a node from going on for ever when the controller is gone.
func deadlineOf(job *v1beta1.ImagePullJob, r *opsv1.PullRequest) *durationpb.Duration {
	d := min(workBound(r)+queueAllowance, maxSpan)
	if p := job.Spec.CompletionPolicy; p.Type != v1beta1.Never && p.ActiveDeadlineSeconds != nil && *p.ActiveDeadlineSeconds > 0 {
		d = min(d, time.Duration(min(*p.ActiveDeadlineSeconds, int64(maxSpan/time.Second)))*time.Second)
	}
	return durationpb.New(d)
}

// allowance is what a pull has left of its time, at work and in its node's queue.
type allowance struct {
	bound, work, queue time.Duration
	queued             bool
	since              time.Time
}

func newAllowance(r *opsv1.PullRequest, now time.Time) *allowance {
	return &allowance{bound: workBound(r), work: workBound(r) + boundSlack, queue: queueAllowance + boundSlack, since: now}
}

// spend takes off what has passed and says why the pull has to end, or nothing.
func (b *allowance) spend(op *opsv1.PullOperation, now time.Time) string {
	passed := now.Sub(b.since)
	if b.queued {
		b.queue -= passed
	} else {
		b.work -= passed
	}
	b.since, b.queued = now, inQueue(op)
	const see = "see cri-proxy ctl pulls on the node"
	switch {
	case op.GetFinishTime() != nil:
	case b.work < 0:
		return fmt.Sprintf("the node answers and does not come to an end, though its attempts may take %s together: %s, and its log", b.bound, see)
	case b.queue < 0:
		return fmt.Sprintf("the pull has waited for others on the node for %s: %s", queueAllowance, see)
	}
	return ""
}

// inQueue says that the pull waits for something else than its registry.
func inQueue(op *opsv1.PullOperation) bool {
	if op.GetAttempt() == 0 { // or follows another pull of the image
		return true
	}
	switch op.GetReason() {
	case "InQueue", "YieldsToKubelet", reasonCredentials:
		return true
	}
	return false
}

// overdueText is why a pull was ended that was overdue, else nothing.
func overdueText(op *opsv1.PullOperation) string {
	if text, ok := strings.CutPrefix(op.GetMessage(), overdueReason); ok && op.GetPhase() == opsv1.PullPhase_PULL_CANCELLED {
		return text
	}
	return ""
}

// overdue ends a pull whose time is over.
func (u *run) overdue(ctx context.Context, m *member, epoch int, node nodes.Node, op *opsv1.PullOperation, why string) {
	end := proto.Clone(op).(*opsv1.PullOperation)
	end.Phase, end.Reason, end.Message = opsv1.PullPhase_PULL_FAILED, reasonOverdue, why
	// A node that does not cancel is failed all the same.
	if last, err := u.nodes.CancelPull(ctx, node, op.GetUid(), overdueReason+why); err == nil && last.GetPhase() == opsv1.PullPhase_PULL_SUCCEEDED {
		end = last
	}
	if ctx.Err() == nil {
		u.change(m, epoch, func() { u.settle(m, end, time.Now()) })
	}
}
