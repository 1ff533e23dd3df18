// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package ops

import (
	"context"
)

// keepSlot is for an upgrade that had the slot in the process before this one. It may be taken back
// at once.
func (d *upgrader) keepSlot() {
	if d.c.node.Turns.Keep(d.c.slot(), d.c.op) {
		d.c.node.GiveWay(d.c.op, nil)
	}
}

// leaveSlot says that the upgrade has the slot no more.
func (d *upgrader) leaveSlot() { d.c.node.Turns.Leave(d.c.slot(), d.c.op) }

// takeUpgradeSlot is takeSlot for an upgrade.
func (d *upgrader) takeUpgradeSlot(ctx context.Context) error {
	for {
		if err := d.c.takeSlot(ctx); err != nil {
			return err
		}
		over := d.c.node.Turns.Hold(d.c.slot(), d.c.op)
		if over == nil {
			return nil
		}
		d.dropSlot()
		select {
		case <-over:
		case <-d.c.op.Cancelled():
			return d.c.cancelledOutcome()
		case <-ctx.Done():
			return ctx.Err()
		}
	}
}

// dropSlot gives up the slot of an upgrade that has nothing in the slot.
func (d *upgrader) dropSlot() {
	d.leaveSlot()
	d.c.claim.Release()
	d.c.claim = nil
}
