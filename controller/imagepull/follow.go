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
	// answerTimeout bounds the wait for the first answer of a stream, newsTimeout the wait for news
	// on it. A stream without news begins again, which notices a node that has vanished without a
	// word.
	answerTimeout = 5 * time.Second
	newsTimeout   = 20 * time.Second
	// silenceTimeout is how long a node that has become silent still counts as pulling.
	silenceTimeout = 30 * time.Second
	// retryInterval is how soon a node is told again.
	retryInterval, retryIntervalMax = time.Second, 5 * time.Second
)

// pull tells a node to pull, and follows the pull until it has ended or the node has been silent
// for too long.
func (j *jobState) pull(n *nodeState) {
	c := &call{}
	f := j.follow(n, c)
	c.key = f.Key()
	c.stop = func() { j.tracker.Forget(f.Key()) }
	n.call = c
	n.quiet = j.tracker.Ensure(f).Ended
}

// follow says how to follow the pull on a node.
func (j *jobState) follow(n *nodeState, c *call) nodes.Follow[*opsv1.PullOperation] {
	s, node, round := j.table.spec, n.target.Node, n.round
	left, over := pull.NewAllowance(s.Request, time.Now()), ""
	var renewal pull.Renewal
	return nodes.Follow[*opsv1.PullOperation]{
		Node: node, UID: s.PullUID(round), For: j.request,
		First: answerTimeout, Renew: newsTimeout, StreamNews: true,
		Begin: func(ctx context.Context) (*opsv1.PullOperation, error) {
			maxAge := command.SecretsMaxAge
			if renewal.Due(time.Now()) {
				maxAge = command.SecretsMaxAgeForRenewal
			}
			return j.command.Pull(ctx, s, node, round, maxAge)
		},
		Each: func(_ context.Context, _, op *opsv1.PullOperation) (wake bool) {
			op.Layers = nil // many, and never looked at
			over = left.Spend(op, time.Now())
			j.inbox.note(n)
			return op.GetFinishTime() == nil // else End wakes
		},
		Until: func(op *opsv1.PullOperation) (nodes.Next, time.Duration) {
			switch {
			case over != "":
				return nodes.Stop, 0
			case op.GetReason() == opsv1.PullReasonCredentialsNeeded:
				return nodes.Again, 0
			}
			return nodes.GoOn, renewal.Note(op, time.Now())
		},
		GiveUp: func(err error, silent time.Duration, taken bool) bool {
			// Tell a node again that has a new journal.
			return !nodes.NotFound(err) && (!taken || command.TroubleOf(err).Final || silent >= silenceTimeout)
		},
		End: func(ctx context.Context, s nodes.State[*opsv1.PullOperation]) (wake bool) {
			r := result{over: true}
			if over != "" && !s.Finished() {
				r.overdue = j.command.EndOverdue(ctx, node, s.Op, over)
			}
			j.inbox.noteEnd(n, c, r)
			return true
		},
		Retry: func(tries int) time.Duration { return min(retryInterval<<min(tries, 3), retryIntervalMax) },
	}
}
