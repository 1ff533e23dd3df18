// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package ops

import (
	"context"

	"github.com/sirupsen/logrus"

	"github.com/cri-proxy/cri-proxy/interceptors"
)

// An upgrade that has been prepared keeps its slot until its caller commits it, which a budget or a
// pause may put off for an hour, and nothing would be lost if it were taken back and prepared
// again. A restart is asked for now. So a restart that comes to its slot has such an upgrade taken
// back, and none takes the slot while a restart waits for it. One that is committed runs on: the
// pod's spec may have been changed for it, and it ends soon.

// turns says who has a slot, or waits for it, as far as that decides who goes first. The mutex of
// Engine guards it.
type turns struct {
	// held are the slots of upgrades.
	held map[interceptors.Slot]*operation
	// wanted are the slots that restarts wait for.
	wanted map[interceptors.Slot]*wanted
}

// wanted is how many restarts wait for a slot.
type wanted struct {
	restarts int
	over     chan struct{} // closed when none does any more
}

// wantSlot says that a restart waits for its slot, and has the upgrade that holds it taken back.
// The caller must call got when it waits no more.
func (r *restart) wantSlot() (got func()) {
	slot := r.slot()
	r.mu.Lock()
	w := r.turns.wanted[slot]
	if w == nil {
		w = &wanted{over: make(chan struct{})}
		r.turns.wanted[slot] = w
	}
	w.restarts++
	holder := r.turns.held[slot]
	r.mu.Unlock()
	if holder != nil {
		r.giveWay(holder, r.o)
	}
	return func() {
		r.mu.Lock()
		defer r.mu.Unlock()
		if w.restarts--; w.restarts == 0 {
			delete(r.turns.wanted, slot)
			close(w.over)
		}
	}
}

// holdSlot says that an upgrade has its slot. If restarts wait for it, it returns a channel that is
// closed when none does any more: until then the upgrade must not keep it.
func (r *restart) holdSlot() <-chan struct{} {
	r.mu.Lock()
	defer r.mu.Unlock()
	if w := r.turns.wanted[r.slot()]; w != nil {
		return w.over
	}
	r.turns.held[r.slot()] = r.o
	return nil
}

// keepSlot is holdSlot for an upgrade that had the slot in the process before this one. It may be
// taken back at once.
func (r *restart) keepSlot() {
	r.mu.Lock()
	r.turns.held[r.slot()] = r.o
	w := r.turns.wanted[r.slot()]
	r.mu.Unlock()
	if w != nil {
		r.giveWay(r.o, nil)
	}
}

// leaveSlot ends holdSlot.
func (r *restart) leaveSlot() {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.turns.held[r.slot()] == r.o {
		delete(r.turns.held, r.slot())
	}
}

// giveWay takes an upgrade back that nobody has committed, for a restart, which may be nil.
func (e *Engine) giveWay(upgrade, to *operation) {
	why := "it gave way to a restart, and can be prepared again"
	if to != nil {
		why = "it gave way to restart " + to.req.GetUid() + ", and can be prepared again"
	}
	log := e.log.WithFields(logrus.Fields{
		"op": upgrade.req.GetUid(), "pod": podName(upgrade.op.GetPod()), "reason": why, // they never change
	})
	switch done, err := e.cancelUncommitted(upgrade, why); {
	case err != nil:
		log.WithError(err).Warn("a prepared upgrade was not taken back")
	case done:
		log.Info("a prepared upgrade is taken back")
	}
}

// cancelUncommitted cancels an upgrade unless its caller has committed it, and says whether it did.
func (e *Engine) cancelUncommitted(o *operation, reason string) (bool, error) {
	o.mu.Lock()
	defer o.mu.Unlock()
	if o.isReleased || o.committed || o.cancelSaid || o.op.GetFinishTime() != nil {
		return false, nil
	}
	return true, e.cancelLocked(o, reason)
}

// takeUpgradeSlot is takeSlot for an upgrade.
func (r *restart) takeUpgradeSlot(ctx context.Context) error {
	for {
		if err := r.takeSlot(ctx); err != nil {
			return err
		}
		over := r.holdSlot()
		if over == nil {
			return nil
		}
		r.dropSlot()
		select {
		case <-over:
		case <-r.o.cancelled:
			return r.cancelledOutcome()
		case <-ctx.Done():
			return ctx.Err()
		}
	}
}

// dropSlot gives the slot of an upgrade away that has nothing in it.
func (r *restart) dropSlot() {
	r.leaveSlot()
	r.claim.Release()
	r.claim = nil
}
