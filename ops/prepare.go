// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package ops

import (
	"context"
	"errors"
	"time"

	"google.golang.org/protobuf/types/known/durationpb"

	opsv1 "github.com/cri-proxy/cri-proxy/api/ops/v1"
	"github.com/cri-proxy/cri-proxy/interceptors/view"
	"github.com/cri-proxy/cri-proxy/ops/crinode"
	"github.com/cri-proxy/cri-proxy/ops/operation"
)

// slot is the slot of the container.
func (r *Container) slot() view.Slot { return r.handle.Slot() }

// within runs f until it is done, ctx ends, the operation is cancelled or the limit, which is
// counted from began, is over.
func (r *Container) within(
	ctx context.Context, began time.Time, limit time.Duration, f func(context.Context) error,
) error {
	ready, cancel := context.WithDeadline(ctx, began.Add(limit))
	defer cancel()
	call, end := crinode.EndWith(ready, r.op.Cancelled())
	defer end()
	err := f(call)
	var out *operation.Outcome
	switch {
	case err != nil && r.op.IsCancelled():
		return r.cancelledOutcome()
	case err != nil && !errors.As(err, &out) && ctx.Err() == nil && ready.Err() != nil:
		return operation.Failf(opsv1.ReasonPrepareTimeout, "not ready within %s, %s", limit, r.awaited())
	}
	return err
}

// awaited says what an operation that is not ready is at.
func (r *Container) awaited() string {
	if r.queued {
		return "waiting for the container, which " + orOther(r.node.Holder(r.slot())) + " has"
	}
	return "in phase " + operation.PhaseName(r.status().GetPhase())
}

func orOther(uid string) string {
	if uid == "" {
		return "another operation"
	}
	return "operation " + uid
}

func orElse(d *durationpb.Duration, otherwise time.Duration) time.Duration {
	if v := d.AsDuration(); v > 0 {
		return v
	}
	return otherwise
}

// prepareSpecImage takes the slot once the image of the pod's spec is on the node: a pull may take
// long.
func (d *restarter) prepareSpecImage(ctx context.Context) error {
	want, err := d.c.image.OfSpec(ctx)
	if err != nil {
		return err
	}
	if want != nil {
		err := d.c.within(ctx, d.c.op.CreateTime(), defaultPrepare, func(ctx context.Context) error {
			return d.c.image.EnsureSpec(ctx, want)
		})
		if err != nil {
			return err
		}
	}
	return d.c.takeSlot(ctx)
}

// prepareImage pulls the image of a restart with another one and takes the slot. Whatever else
// needs a check is checked once the slot is taken.
func (d *restarter) prepareImage(ctx context.Context) error {
	if d.c.spec.GetRevertImage() {
		return d.prepareRevert(ctx)
	}
	if err := d.c.within(ctx, time.Now(), defaultPrepare, d.c.image.Pull); err != nil {
		return err
	}
	d.c.failpoint("pulled")
	return d.c.takeSlot(ctx)
}

// prepareRevert takes the slot once the image of the pod's spec is on the node.
func (d *restarter) prepareRevert(ctx context.Context) error {
	for pulled := ""; ; {
		if err := d.c.takeSlot(ctx); err != nil {
			return err
		}
		image, ready, err := d.c.image.RevertTo(ctx, pulled)
		if err != nil || ready {
			return err
		}
		// Not while the slot is taken: kubelet could not make the container anew.
		d.c.dropSlot()
		if err := d.c.within(ctx, time.Now(), defaultPrepare, d.c.image.Pull); err != nil {
			return err
		}
		pulled = image
	}
}
