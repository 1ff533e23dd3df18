// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package imagepull

import (
	"fmt"
	"time"

	"google.golang.org/grpc/codes"

	opsv1 "github.com/cri-proxy/cri-proxy/api/ops/v1"
	"github.com/cri-proxy/cri-proxy/controller/imagepull/command"
	"github.com/cri-proxy/cri-proxy/controller/imagepull/pull"
	"github.com/cri-proxy/cri-proxy/controller/nodes"
)

const (
	// nodeTimeout is how long a node may be away before it counts as failed (OpenKruise's figure).
	// The controller tries it again even then.
	nodeTimeout = 10 * time.Minute
	// maxRefusals is how often a node may refuse the connection before it counts as failed: about
	// half a minute.
	maxRefusals = 6
	// reprobeInterval is how soon a node is probed again that counts as failed because it could not
	// be commanded.
	reprobeInterval = time.Minute
	// retryMin and retryMax are how soon a job that never ends pulls again on a node that failed.
	retryMin = 10 * time.Minute
	retryMax = 6 * time.Hour
	// maxConflicts is how many UIDs are passed over that the node has for something else.
	maxConflicts = 5
)

// adopt takes over what a probe has found.
func (t *table) adopt(n *nodeState, f command.Found, now time.Time) {
	stale := n.staleFailures
	mark(&n.lingering, &t.lingering, false) // the probe has cancelled what the job no longer wants
	n.round, n.retryAt, n.staleFailures = f.Rounds, time.Time{}, false
	op := f.Latest
	switch {
	case op == nil && f.Pinned:
		t.succeed(n, nil, now)
	case op == nil:
		n.answered()
		t.setPhase(n, pending)
	case op.GetPhase() == opsv1.PullPhase_PULL_SUCCEEDED:
		since := now
		if finish := op.GetFinishTime().AsTime(); finish.Before(now) {
			since = now.Add(finish.Sub(now)) // by the clock of now
		}
		t.succeed(n, op, since)
	case op.GetFinishTime() == nil:
		n.round = f.Round
		t.begin(n, now)
	// The clocks of the node and of the API server may differ. Begun is for a job that another
	// controller goes on with.
	case stale, op.GetFinishTime().AsTime().Before(t.spec.Begun),
		pull.CancelledByController(op) && pull.OverdueText(op) == "":
		n.answered()
		n.round++ // the job has begun again since
		t.setPhase(n, pending)
	default:
		n.reached()
		n.op = op
		reason, message := op.GetReason(), op.GetMessage()
		if text := pull.OverdueText(op); text != "" {
			reason, message = pull.ReasonOverdue, text
		}
		t.giveUp(n, reason, message)
		n.retryAt = now.Add(retryMin)
	}
}

// succeed notes that the node has the image, since a time.
func (t *table) succeed(n *nodeState, op *opsv1.PullOperation, since time.Time) {
	n.reached()
	mark(&n.verifying, &t.verifying, false)
	n.op, n.retries = op, 0
	t.setFraction(n, 1)
	t.setPhase(n, succeeded)
	n.retryAt = since.Add(t.spec.RenewEvery())
}

// finish notes how a pull has ended.
func (t *table) finish(n *nodeState, op *opsv1.PullOperation, now time.Time) {
	switch {
	case op.GetPhase() == opsv1.PullPhase_PULL_SUCCEEDED:
		t.succeed(n, op, now) // and not when the node says: its clock may be behind
	case pull.CancelledByController(op):
		// This controller has cancelled it, for a change that another one has overtaken.
		n.round++
		t.setPhase(n, pending)
		return
	default:
		n.reached()
		n.op = op
		message := op.GetMessage()
		if message == "" {
			message = fmt.Sprintf("the node says only: %s, %s", op.GetPhase(), op.GetReason())
		}
		t.fail(n, op.GetReason(), message)
		n.retryAt = now.Add(min(retryMin<<min(n.retries, 10), retryMax))
		n.retries++
	}
	t.metrics.pulled(op, now.Sub(n.begun))
}

// yield lets other nodes pull instead of a node that could not be told to, or has become silent.
func (t *table) yield(n *nodeState, err error, why command.Trouble, since, now time.Time) {
	conflict := nodes.Code(err) == codes.AlreadyExists
	verifying := n.verifying
	mark(&n.verifying, &t.verifying, false)
	switch {
	case conflict && n.retries < maxConflicts:
		n.round++
		n.retries++
		t.setPhase(n, pending)
	case why.Final && why.Reason == command.ReasonInvalidRequest:
		n.reached()
		t.fail(n, why.Reason, why.Message)
		n.retryAt = now.Add(retryMax)
		t.metrics.failed(why.Reason)
	case verifying:
		// It had the image when it last answered.
		t.setPhase(n, succeeded)
		n.retryAt = now.Add(retryMin)
	default:
		if n.untaken = true; n.since.IsZero() {
			n.since = since
		}
		mark(&n.lingering, &t.lingering, why.Lost || n.adopted)
		t.setPhase(n, unknown)
		t.unreached(n, why, now)
	}
}

// progress notes what a node says of its pull.
func (t *table) progress(n *nodeState, op *opsv1.PullOperation) {
	n.reached()
	if op.GetPhase() != n.op.GetPhase() || op.GetReason() != n.op.GetReason() {
		t.throttle.Add(0)
	}
	n.op = op
	t.noteRetry(n, op)
	if total := op.GetBytesTotal(); total > 0 {
		// Never the whole: unpacking and naming the image come last.
		t.setFraction(n, max(n.fraction, min(float64(op.GetBytesDone())/float64(total), 0.99)))
	}
}

// unreached notes that the node could not be commanded, and decides when to try again.
func (t *table) unreached(n *nodeState, why command.Trouble, now time.Time) {
	if n.since.IsZero() {
		n.since = now
	}
	n.tries++
	n.away = why
	t.throttle.Add(0)
	if now.Sub(n.since) >= silenceTimeout {
		mark(&n.lingering, &t.lingering, false)
	}
	switch {
	case n.phase == failed:
		n.reason, n.message = why.Reason, why.Message
		n.retryAt = now.Add(reprobeInterval)
	case why.Final || why.Reason == command.ReasonNoProxy && n.tries >= maxRefusals || now.Sub(n.since) >= nodeTimeout:
		t.fail(n, why.Reason, why.Message)
		t.metrics.failed(why.Reason)
		n.retryAt = now.Add(reprobeInterval)
	default:
		t.setPhase(n, unknown)
		n.retryAt = now.Add(min(time.Second<<min(n.tries-1, 5), 30*time.Second))
	}
}

// leaveOut notes that the node must not be commanded as it is.
func (t *table) leaveOut(n *nodeState, now time.Time) {
	mark(&n.unverified, &t.unverified, false)
	reason, message := n.target.Reason, n.target.Message
	if n.away.Reason != reason {
		n.away = command.Trouble{Reason: reason, Message: message}
		t.throttle.Add(0)
	}
	if n.since.IsZero() {
		n.since = now
	}
	if now.Sub(n.since) >= silenceTimeout {
		mark(&n.lingering, &t.lingering, false)
	}
	if n.phase != failed && now.Sub(n.since) >= nodeTimeout {
		t.fail(n, reason, message)
		t.metrics.failed(reason)
	}
}
