// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package imagepull

import (
	"context"
	"sync"
	"time"

	"github.com/sirupsen/logrus"
	"golang.org/x/sync/errgroup"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	opsv1 "github.com/cri-proxy/cri-proxy/api/ops/v1"
	"github.com/cri-proxy/cri-proxy/controller/imagepull/spec"
	"github.com/cri-proxy/cri-proxy/controller/nodes"
	"github.com/cri-proxy/cri-proxy/controller/retry"
)

const (
	// answerTimeout bounds the wait for the first answer of a stream, newsTimeout the wait for news
	// on it. A stream without news begins again, which notices a node that has vanished without a
	// word.
	answerTimeout = 5 * time.Second
	newsTimeout   = 20 * time.Second

	// cancelReason begins what the controller says when it cancels a pull.
	cancelReason = "ImagePullJob: "
)

// calls are the calls to nodes for one job. They know nothing of the state of the job.
type calls struct {
	nodes       Nodes
	credentials credentials
	log         logrus.FieldLogger
}

// pull gives a node the command, with credentials that are no older than maxAge.
func (c *calls) pull(
	ctx context.Context, s *spec.Spec, node nodes.Node, round int, maxAge time.Duration,
) (*opsv1.PullOperation, error) {
	keys, err := c.credentials.read(ctx, s, maxAge)
	if err != nil {
		return nil, err
	}
	return c.nodes.Pull(ctx, node, s.PullRequest(round, keys.For(s.Request.GetImage())))
}

// watch follows a pull and returns its last state: once it has ended, when it needs credentials,
// when each returns false, when the renewal is due, or when there has been no news for a while.
func (c *calls) watch(
	ctx context.Context, node nodes.Node, uid string, renewal *renewal, each func(*opsv1.PullOperation) bool,
) (*opsv1.PullOperation, error) {
	watching, cancel := context.WithCancel(ctx)
	defer cancel()
	timeout := time.AfterFunc(answerTimeout, cancel)
	defer timeout.Stop()
	var last *opsv1.PullOperation
	err := c.nodes.WatchPull(watching, node, uid, func(op *opsv1.PullOperation) bool {
		timeout.Reset(retry.Sooner(newsTimeout, renewal.note(op, time.Now())))
		last = op
		return each(op) && op.GetFinishTime() == nil && op.GetReason() != opsv1.PullReasonCredentialsNeeded
	})
	if watching.Err() != nil && ctx.Err() == nil && last.GetFinishTime() == nil {
		if last != nil {
			return last, nil
		}
		noAnswer := status.Error(codes.DeadlineExceeded, "no answer")
		return nil, &nodes.Error{Node: node, Method: "WatchPull", Err: noAnswer, Silent: true}
	}
	return last, err
}

// found is what a node says of a job.
type found struct {
	// latest is the most telling pull for what the job asks now, or nil; round is its round.
	latest *opsv1.PullOperation
	round  int
	// rounds is the highest round of any pull.
	rounds int
	// pinned says that the node keeps the image for the job.
	pinned bool
}

// probe asks a node what it does and has done for a job, and cancels what the job no longer wants.
// With pins, it asks for those, too.
func (c *calls) probe(ctx context.Context, s *spec.Spec, node nodes.Node, pins bool) (found, error) {
	f, err := c.probePulls(ctx, s, node)
	if err == nil && pins {
		err = c.probePins(ctx, s, node, &f)
	}
	return f, err
}

func (c *calls) probePulls(ctx context.Context, s *spec.Spec, node nodes.Node) (found, error) {
	var f found
	ops, err := c.nodes.ListPulls(ctx, node)
	if err != nil {
		return f, err
	}
	for _, op := range ops {
		work, params, round, ours := s.ParseUID(op.GetUid())
		if !ours {
			continue
		}
		over := op.GetFinishTime() != nil
		if work != s.Work || params != s.Params && op.GetPhase() != opsv1.PullPhase_PULL_SUCCEEDED {
			if over {
				continue
			}
			if err := c.cancel(ctx, node, op.GetUid(), opsv1.CancelCodeChanged); err != nil {
				return f, err
			}
			continue
		}
		if params == s.Params {
			f.rounds = max(f.rounds, round)
		}
		if f.latest == nil || rank(op) > rank(f.latest) || rank(op) == rank(f.latest) && round > f.round {
			f.latest, f.round = op, round
		}
	}
	return f, nil
}

// probePins releases the pins that the job no longer wants. The others tell of pulls that the node
// has forgotten.
func (c *calls) probePins(ctx context.Context, s *spec.Spec, node nodes.Node, f *found) error {
	pins, err := c.nodes.ListPins(ctx, node)
	if err != nil {
		return err
	}
	for _, pin := range pins {
		switch {
		case pin.GetOwner() != s.Request.GetOwner():
		case spec.SameImage(pin.GetImage(), s.Request.GetImage()):
			f.pinned = f.pinned || !pin.GetGone()
		default:
			if _, err := c.nodes.ReleasePins(ctx, node, pin.GetOwner(), pin.GetImageId()); err != nil {
				return err
			}
		}
	}
	return nil
}

// rank orders pulls by how much they tell: a pull that succeeded, one that runs, one that failed.
func rank(op *opsv1.PullOperation) int {
	switch {
	case op.GetPhase() == opsv1.PullPhase_PULL_SUCCEEDED:
		return 2
	case op.GetFinishTime() == nil:
		return 1
	}
	return 0
}

// cancel cancels a pull. It is no error if the node does not have the pull.
func (c *calls) cancel(ctx context.Context, node nodes.Node, uid, code string) error {
	_, err := c.nodes.CancelPull(ctx, node, uid, code, cancelReason+cancelText(code))
	if err != nil && !nodes.NotFound(err) {
		return err
	}
	return nil
}

// cancelText says to people why a pull is cancelled.
func cancelText(code string) string {
	switch code {
	case opsv1.CancelCodeChanged:
		return "it has been changed"
	case opsv1.CancelCodeNotChosen:
		return "the node is no longer chosen"
	case opsv1.CancelCodeDeadline:
		return "activeDeadlineSeconds is over"
	}
	return "the job was deleted"
}

// removedNode is a node that has to forget a job.
type removedNode struct {
	node nodes.Node
	// quiet is closed when the goroutine that talks to the node has ended; nil when there is none.
	quiet <-chan struct{}
}

// cleanUp tries once on each node to cancel the job's pulls, for the reason that code names, and,
// with pins, to release its pins. It returns the nodes that have not answered.
func (c *calls) cleanUp(ctx context.Context, s *spec.Spec, nodes []removedNode, pins bool, code string) []removedNode {
	var mu sync.Mutex
	var left []removedNode
	var g errgroup.Group
	g.SetLimit(maxProbes)
	for _, n := range nodes {
		g.Go(func() error {
			if err := c.cleanUpNode(ctx, s, n, pins, code); err != nil && !troubleOf(err).final {
				mu.Lock()
				defer mu.Unlock()
				left = append(left, n)
			}
			return nil
		})
	}
	_ = g.Wait() // none returns an error
	return left
}

func (c *calls) cleanUpNode(ctx context.Context, s *spec.Spec, n removedNode, pins bool, code string) error {
	if n.quiet != nil {
		select {
		case <-n.quiet:
		case <-ctx.Done():
			return ctx.Err()
		}
	}
	ops, err := c.nodes.ListPulls(ctx, n.node)
	if err != nil {
		return err
	}
	for _, op := range ops {
		if _, _, _, ours := s.ParseUID(op.GetUid()); !ours || op.GetFinishTime() != nil {
			continue
		}
		if err := c.cancel(ctx, n.node, op.GetUid(), code); err != nil {
			return err
		}
	}
	if pins {
		_, err = c.nodes.ReleasePins(ctx, n.node, s.Request.GetOwner(), "")
	}
	return err
}
