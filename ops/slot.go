// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package ops

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

// takeSlot waits for the operation's turn on the slot.
func (r *Container) takeSlot(ctx context.Context) error {
	waiting, end := crinode.EndWith(ctx, r.op.Cancelled())
	defer end()
	defer r.kind.WantSlot()()
	r.queued = true
	if err := r.node.Lost.AwaitJudged(waiting); err != nil { // what an earlier process has left in the slot comes first
		if ctx.Err() == nil {
			return r.cancelledOutcome()
		}
		return err
	}
	if err := r.node.Lost.Refuse(r.slot()); err != nil {
		return err
	}
	claim, err := r.node.View.Claim(waiting, r.slot())
	switch {
	case err == nil:
		r.claim, r.queued = claim, false
		r.kind.Taken()
		return nil
	case ctx.Err() == nil:
		return r.cancelledOutcome()
	default:
		return err
	}
}

// dropSlot gives up the slot, in which the operation has made nothing.
func (r *Container) dropSlot() {
	r.claim.Release()
	r.claim = nil
}

func (r *Container) cancelledOutcome() *operation.Outcome {
	msg := r.op.Snapshot().GetMessage()
	if msg == "" {
		msg = "cancelled"
	}
	return &operation.Outcome{Phase: opsv1.Phase_PHASE_CANCELLED, Reason: opsv1.ReasonCancelled, Message: msg}
}

// interrupted returns an outcome if the operation was cancelled or kubelet took the slot back.
func (r *Container) interrupted() error {
	if y := r.claim.YieldedTo(); y != nil {
		return operation.Failf(opsv1.ReasonTakenBackByKubelet,
			"kubelet called %s in the middle of the %s and is in charge now",
			y.Method[strings.LastIndexByte(y.Method, '/')+1:], r.kind.Name())
	}
	select {
	case <-r.op.Cancelled(): // then it has not been committed, and never is
		return r.cancelledOutcome()
	default:
		return nil
	}
}

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
