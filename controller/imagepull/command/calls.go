// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package command

import (
	"context"
	"time"

	"google.golang.org/protobuf/proto"
	"sigs.k8s.io/controller-runtime/pkg/client"

	opsv1 "github.com/cri-proxy/cri-proxy/api/ops/v1"
	"github.com/cri-proxy/cri-proxy/controller/imagepull/pull"
	"github.com/cri-proxy/cri-proxy/controller/imagepull/spec"
	"github.com/cri-proxy/cri-proxy/controller/nodes"
	"github.com/cri-proxy/cri-proxy/controller/pullsecrets"
)

// MaxAtOnce is how many nodes of a job are probed at once, or told to forget it.
const MaxAtOnce = 128

// Client calls nodes for one job. It knows nothing of the state of the job.
type Client struct {
	nodes       Nodes
	credentials credentials
}

// New returns a client that reads the pull secrets of the job from secrets. noted is called with
// the secrets of before, nil if there are none, and those just read.
func New(nodes Nodes, secrets client.Reader, noted func(before, keys *pullsecrets.Keyring)) *Client {
	return &Client{nodes: nodes, credentials: credentials{from: secrets, noted: noted}}
}

// Pull gives a node the command, with credentials that are no older than maxAge. It does not leave
// a command that is on its way: the node might take the command after a probe has looked for pulls.
func (c *Client) Pull(
	ctx context.Context, s *spec.Spec, node nodes.Node, round int, maxAge time.Duration,
) (*opsv1.PullOperation, error) {
	keys, err := c.credentials.read(ctx, s, maxAge)
	if err != nil {
		return nil, err
	}
	if ctx.Err() != nil {
		return nil, ctx.Err()
	}
	return c.nodes.Pull(context.WithoutCancel(ctx), node, s.PullRequest(round, keys.For(s.Request.GetImage())))
}

// Found is what a node says of a job.
type Found struct {
	// Latest is the most telling pull for what the job asks now, or nil; Round is its round.
	Latest *opsv1.PullOperation
	Round  int
	// Rounds is the highest round of any pull.
	Rounds int
	// Pinned says that the node keeps the image for the job.
	Pinned bool
}

// Probe asks a node what it does and has done for a job, and cancels what the job no longer wants.
// With pins, it asks for those, too.
func (c *Client) Probe(ctx context.Context, s *spec.Spec, node nodes.Node, pins bool) (Found, error) {
	f, err := c.probePulls(ctx, s, node)
	if err == nil && pins {
		err = c.probePins(ctx, s, node, &f)
	}
	return f, err
}

func (c *Client) probePulls(ctx context.Context, s *spec.Spec, node nodes.Node) (Found, error) {
	var f Found
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
			f.Rounds = max(f.Rounds, round)
		}
		if f.Latest == nil || rank(op) > rank(f.Latest) || rank(op) == rank(f.Latest) && round > f.Round {
			f.Latest, f.Round = op, round
		}
	}
	return f, nil
}

// probePins releases the pins that the job no longer wants. The others tell of pulls that the node
// has forgotten.
func (c *Client) probePins(ctx context.Context, s *spec.Spec, node nodes.Node, f *Found) error {
	pins, err := c.nodes.ListPins(ctx, node)
	if err != nil {
		return err
	}
	for _, pin := range pins {
		switch {
		case pin.GetOwner() != s.Request.GetOwner():
		case spec.SameImage(pin.GetImage(), s.Request.GetImage()):
			f.Pinned = f.Pinned || !pin.GetGone()
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
func (c *Client) cancel(ctx context.Context, node nodes.Node, uid, code string) error {
	_, err := c.nodes.CancelPull(ctx, node, uid, code, pull.CancelText(code))
	if err != nil && !nodes.NotFound(err) {
		return err
	}
	return nil
}

// EndOverdue cancels a pull whose time is over, for the reason why, and returns how the pull has
// ended: it counts as failed even if the node does not cancel it.
func (c *Client) EndOverdue(
	ctx context.Context, node nodes.Node, op *opsv1.PullOperation, why string,
) *opsv1.PullOperation {
	last, err := c.nodes.CancelPull(ctx, node, op.GetUid(), opsv1.CancelCodeOverdue, pull.OverdueReason(why))
	if err == nil && last.GetPhase() == opsv1.PullPhase_PULL_SUCCEEDED {
		return last
	}
	end := proto.Clone(op).(*opsv1.PullOperation)
	end.Phase, end.Reason, end.Message = opsv1.PullPhase_PULL_FAILED, pull.ReasonOverdue, why
	return end
}

// CleanUp cancels the job's pulls on a node, for the reason that code names, and, with pins,
// releases its pins.
func (c *Client) CleanUp(ctx context.Context, s *spec.Spec, node nodes.Node, pins bool, code string) error {
	ops, err := c.nodes.ListPulls(ctx, node)
	if err != nil {
		return err
	}
	for _, op := range ops {
		if _, _, _, ours := s.ParseUID(op.GetUid()); !ours || op.GetFinishTime() != nil {
			continue
		}
		if err := c.cancel(ctx, node, op.GetUid(), code); err != nil {
			return err
		}
	}
	if pins {
		_, err = c.nodes.ReleasePins(ctx, node, s.Request.GetOwner(), "")
	}
	return err
}
