// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package prepull

import (
	"context"
	"errors"

	"google.golang.org/grpc/status"

	opsv1 "github.com/cri-proxy/cri-proxy/api/ops/v1"
)

// hurryLocked lets a pull go past those that nobody waits for, and past kubelet's, and end when the registry says no: who waits has
// somebody to tell, and kubelet asks again in any case. The caller holds p.mu.
func (p *Puller) hurryLocked(u *pull) {
	if !u.urgent {
		u.urgent = true // one that runs keeps the place it has
		p.nudge()
	}
}

// Ensure begins the pull, or joins the one that has its UID, and returns it when it has finished, however it ended. It does not stand in the queue of [Puller]'s
// other pulls: something waits for it. each, if not nil, is called
// with the pull as it is and after each change, the last included. When ctx ends the pull is cancelled, whoever began it; what it has
// fetched counts for the next pull of the image within an hour.
//
// Errors: ctx's, or why the pull is not taken on, in words for a person: the request is invalid, another request has
// its UID, too many pulls are unfinished, or the puller is closed.
func (p *Puller) Ensure(ctx context.Context, req *opsv1.PullRequest, each func(*opsv1.PullOperation)) (*opsv1.PullOperation, error) {
	if err := ctx.Err(); err != nil {
		return nil, err
	}
	err := validate(req)
	if err == nil {
		_, err = p.take(req, true)
	}
	if err != nil {
		return nil, errors.New(status.Convert(err).Message())
	}
	for {
		op, changed, err := p.watch(req.GetUid())
		if err != nil {
			return nil, errors.New(status.Convert(err).Message())
		}
		if each != nil {
			each(op)
		}
		if op.GetFinishTime() != nil {
			return op, nil
		}
		select {
		case <-changed:
		case <-ctx.Done():
			if _, _, err := p.cancel(req.GetUid(), "whoever asked for it no longer needs it", ""); err != nil {
				p.log.WithField("op", req.GetUid()).WithError(err).Warn("pull not cancelled")
			}
			return nil, ctx.Err()
		}
	}
}
