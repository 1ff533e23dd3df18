// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package imagepull

import (
	"context"
	"time"

	"google.golang.org/protobuf/proto"

	opsv1 "github.com/cri-proxy/cri-proxy/api/ops/v1"
	"github.com/cri-proxy/cri-proxy/controller/nodes"
)

const (
	// silenceTimeout is how long a node that has become silent still counts as pulling.
	silenceTimeout = 30 * time.Second
	// retryInterval is how soon a node is told again.
	retryInterval, retryIntervalMax = time.Second, 5 * time.Second
)

// pull tells a node to pull, and follows the pull until it has ended or the node has been silent
// for too long. The caller holds the mutex.
func (j *jobState) pull(n *nodeState) {
	s, node, round := j.table.spec, n.target.Node, n.round
	j.talk(n, func(ctx context.Context, epoch int) {
		j.metrics.pulling(1)
		defer j.metrics.pulling(-1)
		taken := false // the node has the command
		var silent time.Time
		left, over := newAllowance(s.Request, time.Now()), ""
		var renewal renewal
		maxAge := secretsMaxAge
		for tries := 0; ; tries++ {
			op, err := j.calls.pull(ctx, s, node, round, maxAge)
			maxAge = secretsMaxAge
			if err == nil && op.GetFinishTime() == nil {
				taken = true
				j.progress(n, epoch, op)
				op, err = j.calls.watch(ctx, node, op.GetUid(), &renewal, func(op *opsv1.PullOperation) bool {
					silent, tries = time.Time{}, 0
					j.progress(n, epoch, op)
					over = left.spend(op, time.Now())
					return over == ""
				})
			}
			if ctx.Err() != nil {
				return
			}
			now := time.Now()
			if err == nil && op.GetFinishTime() != nil {
				j.change(n, epoch, func() { j.table.finish(n, op, now) })
				return
			}
			if err == nil && over != "" {
				j.endOverdue(ctx, n, epoch, node, op, over)
				return
			}
			if err == nil && renewal.due(now) {
				maxAge = secretsMaxAgeForRenewal
				continue
			}
			if err != nil && nodes.NotFound(err) {
				err = nil // the node has a new journal: tell it again
			}
			if err != nil {
				if silent.IsZero() {
					silent = now
				}
				if why := troubleOf(err); !taken || why.final || now.Sub(silent) >= silenceTimeout {
					j.change(n, epoch, func() { j.table.yield(n, err, why, silent) })
					return
				}
			}
			if !sleep(ctx, min(retryInterval<<min(tries, 3), retryIntervalMax)) {
				return
			}
		}
	})
}

// progress notes what a node says of its pull.
func (j *jobState) progress(n *nodeState, epoch int, op *opsv1.PullOperation) {
	j.change(n, epoch, func() { j.table.progress(n, op) })
}

// endOverdue ends a pull whose time is over.
func (j *jobState) endOverdue(
	ctx context.Context, n *nodeState, epoch int, node nodes.Node, op *opsv1.PullOperation, why string,
) {
	end := proto.Clone(op).(*opsv1.PullOperation)
	end.Phase, end.Reason, end.Message = opsv1.PullPhase_PULL_FAILED, reasonOverdue, why
	// The pull counts as failed even if the node does not cancel it.
	last, err := j.calls.nodes.CancelPull(ctx, node, op.GetUid(), opsv1.CancelCodeOverdue, overdueReason+why)
	if err == nil && last.GetPhase() == opsv1.PullPhase_PULL_SUCCEEDED {
		end = last
	}
	if ctx.Err() == nil {
		j.change(n, epoch, func() { j.table.finish(n, end, time.Now()) })
	}
}

// sleep waits and says whether to go on.
func sleep(ctx context.Context, d time.Duration) bool {
	timer := time.NewTimer(d)
	defer timer.Stop()
	select {
	case <-timer.C:
		return true
	case <-ctx.Done():
		return false
	}
}
