// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package swap

import (
	"context"
	"errors"
	"strings"
	"time"

	opsv1 "github.com/cri-proxy/cri-proxy/api/ops/v1"
	"github.com/cri-proxy/cri-proxy/interceptors/view"
	"github.com/cri-proxy/cri-proxy/ops/crinode"
	"github.com/cri-proxy/cri-proxy/ops/operation"
)

// TakeSlot waits for the operation's turn on the slot.
func (c *Container) TakeSlot(ctx context.Context) error {
	waiting, end := crinode.EndWith(ctx, c.Op.Cancelled())
	defer end()
	defer c.kind.WantSlot()()
	c.queued = true
	if err := c.Node.Lost.AwaitJudged(waiting); err != nil { // what an earlier process has left in the slot comes first
		if ctx.Err() == nil {
			return c.CancelledOutcome()
		}
		return err
	}
	if err := c.Node.Lost.Refuse(c.Slot()); err != nil {
		return err
	}
	claim, err := c.Node.View.Claim(waiting, c.Slot())
	switch {
	case err == nil:
		c.Claim, c.queued = claim, false
		c.kind.Taken()
		return nil
	case ctx.Err() == nil:
		return c.CancelledOutcome()
	default:
		return err
	}
}

// DropSlot gives up the slot, in which the operation has made nothing.
func (c *Container) DropSlot() {
	c.Claim.Release()
	c.Claim = nil
}

// CancelledOutcome is how the container's part of an operation ends that was cancelled.
func (c *Container) CancelledOutcome() *operation.Outcome {
	msg := c.Op.Snapshot().GetMessage()
	if msg == "" {
		msg = "cancelled"
	}
	return &operation.Outcome{Phase: opsv1.Phase_PHASE_CANCELLED, Reason: opsv1.ReasonCancelled, Message: msg}
}

// Interrupted returns an outcome if the operation was cancelled or kubelet took the slot back.
func (c *Container) Interrupted() error {
	if y := c.Claim.YieldedTo(); y != nil {
		return operation.Failf(opsv1.ReasonTakenBackByKubelet,
			"kubelet called %s in the middle of the %s and is in charge now",
			y.Method[strings.LastIndexByte(y.Method, '/')+1:], c.kind.Name())
	}
	select {
	case <-c.Op.Cancelled(): // then it has not been committed, and never is
		return c.CancelledOutcome()
	default:
		return nil
	}
}

// Slot is the slot of the container.
func (c *Container) Slot() view.Slot { return c.Handle.Slot() }

// Within runs f until it is done, ctx ends, the operation is cancelled or the limit, which is
// counted from began, is over.
func (c *Container) Within(
	ctx context.Context, began time.Time, limit time.Duration, f func(context.Context) error,
) error {
	ready, cancel := context.WithDeadline(ctx, began.Add(limit))
	defer cancel()
	call, end := crinode.EndWith(ready, c.Op.Cancelled())
	defer end()
	err := f(call)
	var out *operation.Outcome
	switch {
	case err != nil && c.Op.IsCancelled():
		return c.CancelledOutcome()
	case err != nil && !errors.As(err, &out) && ctx.Err() == nil && ready.Err() != nil:
		return operation.Failf(opsv1.ReasonPrepareTimeout, "not ready within %s, %s", limit, c.awaited())
	}
	return err
}

// awaited says what an operation that is not ready is at.
func (c *Container) awaited() string {
	if c.queued {
		return "waiting for the container, which " + orOther(c.Node.Holder(c.Slot())) + " has"
	}
	return "in phase " + operation.PhaseName(c.Status().GetPhase())
}

func orOther(uid string) string {
	if uid == "" {
		return "another operation"
	}
	return "operation " + uid
}
