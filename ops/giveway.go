// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package ops

import (
	"context"

	"github.com/sirupsen/logrus"

	"github.com/cri-proxy/cri-proxy/ops/operation"
)

// wantSlot says that a restart waits for its slot, and has the upgrade that holds the slot taken
// back; see [operation.Turns]. The caller must call got when it waits no more.
func (r *restart) wantSlot() (got func()) {
	holder, got := r.turns.Want(r.slot())
	if holder != nil {
		r.giveWay(holder, r.o)
	}
	return got
}

// keepSlot is for an upgrade that had the slot in the process before this one. It may be taken back
// at once.
func (r *restart) keepSlot() {
	if r.turns.Keep(r.slot(), r.o) {
		r.giveWay(r.o, nil)
	}
}

// leaveSlot says that the upgrade has the slot no more.
func (r *restart) leaveSlot() { r.turns.Leave(r.slot(), r.o) }

// giveWay takes an upgrade back that nobody has committed, for a restart, which may be nil.
func (e *Engine) giveWay(upgrade, to *operation.Operation) {
	why := "it gave way to a restart, and can be prepared again"
	if to != nil {
		why = "it gave way to restart " + to.UID() + ", and can be prepared again"
	}
	log := e.log.WithFields(logrus.Fields{"op": upgrade.UID(), "pod": upgrade.PodName(), "reason": why})
	switch done, err := upgrade.CancelUncommitted(why); {
	case err != nil:
		log.WithError(err).Warn("a prepared upgrade was not taken back")
	case done:
		log.Info("a prepared upgrade is taken back")
	}
}

// takeUpgradeSlot is takeSlot for an upgrade.
func (r *restart) takeUpgradeSlot(ctx context.Context) error {
	for {
		if err := r.takeSlot(ctx); err != nil {
			return err
		}
		over := r.turns.Hold(r.slot(), r.o)
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
