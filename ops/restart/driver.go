// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package restart

import (
	"context"

	opsv1 "github.com/cri-proxy/cri-proxy/api/ops/v1"
	"github.com/cri-proxy/cri-proxy/ops/operation"
	"github.com/cri-proxy/cri-proxy/ops/store"
	"github.com/cri-proxy/cri-proxy/ops/swap"
)

// driver is the [swap.Kind] of a restart.
type driver struct {
	c    *swap.Container
	join *join
}

var _ swap.Kind = (*driver)(nil)

// New returns the kind of a restart, for its work on one container.
func New(c *swap.Container) swap.Kind {
	d := &driver{c: c}
	d.join = newJoin(d)
	return d
}

// Name implements [swap.Kind].
func (d *driver) Name() string { return "restart" }

// Over implements [swap.Kind].
func (d *driver) Over(left bool) { d.join.end(left) }

// WantSlot implements [swap.Kind]. A restart has the upgrade that holds the slot taken back; see
// [operation.Waiters].
func (d *driver) WantSlot() (got func()) {
	holder, got := d.c.Node.Waiters.Want(d.c.Slot())
	if holder != nil {
		d.c.Node.TakeBack(holder, d.c.Op)
	}
	return got
}

// Taken implements [swap.Kind].
func (d *driver) Taken() { d.joins() }

// Adopted implements [swap.Kind].
func (d *driver) Adopted() bool { return false }

// NextImage implements [swap.Kind].
func (d *driver) NextImage() string { return "" }

// Staged implements [swap.Kind].
func (d *driver) Staged(_ *store.Container, status *opsv1.ContainerOperation) {
	if !d.c.Overlaps() {
		status.Phase = opsv1.Phase_PHASE_STOPPING
	}
}

// Revealed implements [swap.Kind].
func (d *driver) Revealed() bool { return d.join.isShown() }

// IsJoint implements [swap.Kind].
func (d *driver) IsJoint() bool { return false }

// Succeeded implements [swap.Kind].
func (d *driver) Succeeded() {}

// Failed implements [swap.Kind].
func (d *driver) Failed() {}

// Drive takes the container through the steps. It returns nil on success, an
// [outcome], or the error of a call that was cut off.
func (d *driver) Drive(ctx context.Context) error {
	ready := d.prepareSpecImage
	switch {
	case d.c.Claim != nil:
		d.joins()
		ready = d.c.Resume
	case d.c.Image.Changes():
		ready = d.prepareImage
	}
	if err := ready(ctx); err != nil {
		return err
	}
	for {
		var err error
		switch s := d.c.Record().Step; s {
		case store.StepNone:
			if err = d.c.Stager.Stage(ctx); d.c.Image.RevertStopped(err) {
				return nil
			}
		case store.StepStaged:
			if d.c.Overlaps() {
				err = d.beforeOverlap(ctx)
			} else {
				err = d.beforeStop(ctx)
			}
		case store.StepStart:
			if err = d.c.Switcher.Overlap(ctx); err == nil {
				err = d.beforeStop(ctx)
			}
		case store.StepStop:
			err = d.c.Switcher.Swap(ctx)
		case store.StepStarted:
			return d.afterStart(ctx)
		case store.StepReveal: // resumed: kubelet has been shown both
			if c := d.c.Status(); c.GetReason() != "" {
				return operation.Failf(c.GetReason(), "%s", c.GetMessage())
			}
			if !d.c.Op.Rebooted() { // else the runtime's times are those of the reboot
				d.c.Revealer.Measure(ctx, d.c.Record())
			}
			if d.c.Record().Joined {
				return d.awaitRecreation(ctx)
			}
			return nil
		default:
			return operation.Failf(opsv1.ReasonJournalError, "the journal has the unknown step %q", s)
		}
		if err != nil {
			return err
		}
	}
}

// beforeOverlap writes that the successor is about to run beside the incumbent.
func (d *driver) beforeOverlap(ctx context.Context) error {
	if err := d.c.Old.Load(ctx); err != nil {
		return err
	}
	running, err := d.c.Old.Watch(ctx)
	if err != nil {
		return err
	}
	if err := d.c.Interrupted(); err != nil {
		return err
	}
	if !running {
		return d.c.Old.StoppedByItself(ctx)
	}
	d.c.Switcher.MaskWhenGone()
	return d.c.Write(func(c *store.Container, op *opsv1.ContainerOperation) {
		c.Step, op.Phase = store.StepStart, opsv1.Phase_PHASE_STARTING
	})
}

// afterStart runs postStart and reveals.
func (d *driver) afterStart(ctx context.Context) error {
	rec := d.c.Record()
	d.c.Revealer.LogLink(ctx, rec.Successor)
	if err := d.c.Revealer.PostStart(ctx); err != nil {
		return err
	}
	if err := d.c.Interrupted(); err != nil {
		return err
	}
	d.c.Image.Keep()
	d.c.Revealer.HoldProbes(ctx)
	d.c.Note(func(c *store.Container, op *opsv1.ContainerOperation) {
		c.Step = store.StepReveal
		op.Phase = opsv1.Phase_PHASE_REVEALING
	})
	if !d.c.Claim.TryReveal() {
		return d.c.Interrupted()
	}
	joined := d.join.show()
	d.c.Failpoint("revealed")
	d.c.Revealer.Measure(ctx, rec)
	if joined {
		return d.awaitRecreation(ctx)
	}
	return nil
}
