// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package ops

import (
	"context"
)

// wantSlot says that a restart waits for its slot, and has the upgrade that holds the slot taken
// back; see [operation.Turns]. The caller must call got when it waits no more.
func (r *restart) wantSlot() (got func()) {
	holder, got := r.node.Turns.Want(r.slot())
	if holder != nil {
		r.node.GiveWay(holder, r.o)
	}
	return got
}

// keepSlot is for an upgrade that had the slot in the process before this one. It may be taken back
// at once.
func (r *restart) keepSlot() {
	if r.node.Turns.Keep(r.slot(), r.o) {
		r.node.GiveWay(r.o, nil)
	}
}

// leaveSlot says that the upgrade has the slot no more.
func (r *restart) leaveSlot() { r.node.Turns.Leave(r.slot(), r.o) }

// takeUpgradeSlot is takeSlot for an upgrade.
func (r *restart) takeUpgradeSlot(ctx context.Context) error {
	for {
		if err := r.takeSlot(ctx); err != nil {
			return err
		}
		over := r.node.Turns.Hold(r.slot(), r.o)
		if over == nil {
			return nil
		}
		r.dropSlot()
		select {
		case <-over:
		case <-r.o.Cancelled():
			return r.cancelledOutcome()
		case <-ctx.Done():
			return ctx.Err()
		}
	}
}

// dropSlot gives up the slot of an upgrade that has nothing in the slot.
func (r *restart) dropSlot() {
	r.leaveSlot()
	r.claim.Release()
	r.claim = nil
}
