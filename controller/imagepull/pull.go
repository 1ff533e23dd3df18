// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package imagepull

import (
	"context"
	"time"

	opsv1 "github.com/cri-proxy/cri-proxy/api/ops/v1"
	"github.com/cri-proxy/cri-proxy/controller/imagepull/command"
	"github.com/cri-proxy/cri-proxy/controller/imagepull/pull"
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
		left, over := pull.NewAllowance(s.Request, time.Now()), ""
		var renewal pull.Renewal
		maxAge := command.SecretsMaxAge
		for tries := 0; ; tries++ {
			op, err := j.calls.Pull(ctx, s, node, round, maxAge)
			maxAge = command.SecretsMaxAge
			if err == nil && op.GetFinishTime() == nil {
				taken = true
				j.progress(n, epoch, op)
				op, err = j.calls.Watch(ctx, node, op.GetUid(), &renewal, func(op *opsv1.PullOperation) bool {
					silent, tries = time.Time{}, 0
					j.progress(n, epoch, op)
					over = left.Spend(op, time.Now())
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
			if err == nil && renewal.Due(now) {
				maxAge = command.SecretsMaxAgeForRenewal
				continue
			}
			if err != nil && nodes.NotFound(err) {
				err = nil // the node has a new journal: tell it again
			}
			if err != nil {
				if silent.IsZero() {
					silent = now
				}
				if why := command.TroubleOf(err); !taken || why.Final || now.Sub(silent) >= silenceTimeout {
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
	end := j.calls.EndOverdue(ctx, node, op, why)
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
