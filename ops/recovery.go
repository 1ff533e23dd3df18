// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package ops

import (
	"fmt"

	"github.com/sirupsen/logrus"

	opsv1 "github.com/cri-proxy/cri-proxy/api/ops/v1"
	"github.com/cri-proxy/cri-proxy/interceptors/view"
	"github.com/cri-proxy/cri-proxy/ops/operation"
	"github.com/cri-proxy/cri-proxy/ops/store"
	"github.com/cri-proxy/cri-proxy/ops/swap"
)

// recovery takes up the operations of the processes before this one.
type recovery struct {
	node       *swap.Node
	disk       *store.Store
	log        logrus.FieldLogger
	operations *operations
}

// recover reads the journal.
func (r *recovery) recover() error {
	err := r.disk.Journal.Load(r.revive, r.leaveAlone, func(err error) {
		r.log.WithError(err).Error("journal record set aside; what its operation has staged is removed")
	})
	if err != nil {
		return err
	}
	r.forgetEndedEnvironments()
	r.operations.sortWaiting()
	return nil
}

// revive takes one operation from the journal, and makes the view show what its containers need.
func (r *recovery) revive(uid string, record *store.Record) error {
	o, err := operation.Decode(uid, record, r.disk)
	if err != nil {
		return err
	}
	finished, status := o.Finished(), o.Snapshot()
	var claims []*view.Claim
	for i, rec := range o.Records() {
		if finished || !rec.HoldsSlot() {
			r.node.Lost.Settled(rec.Token, status.GetContainers()[i].GetPhase() == opsv1.Phase_PHASE_SUCCEEDED)
			continue
		}
		claim, err := r.reclaim(o, o.Container(i), &rec)
		if err != nil {
			for _, c := range claims {
				c.Release()
			}
			return err
		}
		claims = append(claims, claim)
	}
	r.operations.add(o)
	if !finished {
		r.log.WithFields(logrus.Fields{"op": uid, "pod": o.PodName(), "phase": status.GetPhase()}).
			Info("resuming operation from the journal")
	}
	return nil
}

// reclaim takes the slot of a container whose operation the process before this one had begun, and
// makes the view show what the container's step needs.
func (r *recovery) reclaim(
	o *operation.Operation, c *operation.Container, rec *store.Container,
) (*view.Claim, error) {
	isUpgrade := o.Upgrade() != nil
	r.node.Lost.Replaced(rec.Incumbent)
	claim, err := r.node.View.TryClaim(c.Slot())
	if err != nil {
		return nil, fmt.Errorf("slot %s: %w", c.Slot(), err)
	}
	claim.Bind(rec.Sandbox, rec.Incumbent)
	c.SetClaim(claim)
	if rec.Driven(isUpgrade) {
		claim.WillDrive()
	}
	if !rec.Hidden() {
		r.node.Lost.Settled(rec.Token, true)
		return claim, nil // what kubelet has seen must not vanish again
	}
	r.node.Tokens.Add(rec.Token)
	claim.HideNow(rec.Token)
	claim.Staged(rec.Successor)
	if !o.Rebooted() && rec.Masked(isUpgrade) {
		claim.Mask()
	}
	return claim, nil
}

// leaveAlone takes an operation from the journal that this binary does not understand. The
// operation is reported as failed. Nothing of it is undone, removed or changed in the file.
func (r *recovery) leaveAlone(uid string, raw []byte, record *store.Record, why string) {
	r.node.Lost.LeaveAlone(raw)
	message := why + ": it is left alone, with its containers, until that version is installed again"
	o, wasRunning := operation.LeftAlone(uid, record, message, r.disk)
	if wasRunning {
		r.log.WithFields(logrus.Fields{"op": uid, "pod": o.PodName()}).
			Error("an operation of the journal is left alone: " + message)
	}
	r.operations.add(o)
}

// forgetEndedEnvironments drops the environments that the process before this one could not forget:
// those of operations that have ended, or that the journal does not have.
func (r *recovery) forgetEndedEnvironments() {
	r.node.Records.KeepEnvironments(func(uid string) bool {
		o := r.operations.lookup(uid)
		return o != nil && (o.IsLeftAlone() || !o.Finished())
	})
}
