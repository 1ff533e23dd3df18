// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package ops

import (
	"context"
)

// wantSlot says that a restart waits for its slot, and has the upgrade that holds the slot taken
// back; see [operation.Turns]. The caller must call got when it waits no more.
func (r *Container) wantSlot() (got func()) {
	holder, got := r.node.Turns.Want(r.slot())
	if holder != nil {
		r.node.GiveWay(holder, r.op)
	}
	return got
}

// keepSlot is for an upgrade that had the slot in the process before this one. It may be taken back
// at once.
func (r *Container) keepSlot() {
	if r.node.Turns.Keep(r.slot(), r.op) {
		r.node.GiveWay(r.op, nil)
	}
}

// leaveSlot says that the upgrade has the slot no more.
func (r *Container) leaveSlot() { r.node.Turns.Leave(r.slot(), r.op) }

// takeUpgradeSlot is takeSlot for an upgrade.
func (r *Container) takeUpgradeSlot(ctx context.Context) error {
	for {
		if err := r.takeSlot(ctx); err != nil {
			return err
		}
		over := r.node.Turns.Hold(r.slot(), r.op)
		if over == nil {
			return nil
		}
		r.dropSlot()
		select {
		case <-over:
		case <-r.op.Cancelled():
			return r.cancelledOutcome()
		case <-ctx.Done():
			return ctx.Err()
		}
	}
}

// dropSlot gives up the slot of an upgrade that has nothing in the slot.
func (r *Container) dropSlot() {
	r.leaveSlot()
	r.claim.Release()
	r.claim = nil
}
