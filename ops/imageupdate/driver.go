// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package imageupdate

import (
	"context"
	"fmt"
	"time"

	opsv1 "github.com/cri-proxy/cri-proxy/api/ops/v1"
	"github.com/cri-proxy/cri-proxy/interceptors/view"
	"github.com/cri-proxy/cri-proxy/ops/operation"
	"github.com/cri-proxy/cri-proxy/ops/store"
	"github.com/cri-proxy/cri-proxy/ops/swap"
)

// driver is the [swap.Kind] of an image update.
type driver struct {
	c       *swap.Container
	slot    *slotHolder
	kubelet *kubelet
	adopter *adopter
	// pending are kubelet's stops that wait for the successor, and asked its creation that has come
	// before that.
	pending []stopped
	asked   *view.Creation
	// revealed is set once kubelet may have seen the successor.
	revealed bool
}

var _ swap.Kind = (*driver)(nil)

// New returns the kind of an image update, for its work on one container.
func New(c *swap.Container) swap.Kind {
	d := &driver{c: c, slot: &slotHolder{c}, kubelet: newKubelet(c.Old.Hurry)}
	d.adopter = &adopter{c: c, d: d}
	return d
}

// Name implements [swap.Kind].
func (d *driver) Name() string { return "upgrade" }

// Over implements [swap.Kind].
func (d *driver) Over(bool) { close(d.kubelet.over) }

// WantSlot implements [swap.Kind].
func (d *driver) WantSlot() (got func()) { return func() {} }

// Taken implements [swap.Kind].
func (d *driver) Taken() {}

// Adopted implements [swap.Kind].
func (d *driver) Adopted() bool { return true }

// NextImage implements [swap.Kind].
func (d *driver) NextImage() string { return d.c.Image.Image() }

// Staged implements [swap.Kind].
func (d *driver) Staged(rec *store.Container, status *opsv1.ContainerOperation) {
	rec.Step, rec.HoldSince, status.Phase = store.StepHeld, time.Now(), opsv1.Phase_PHASE_PREPARED
}

// Revealed implements [swap.Kind].
func (d *driver) Revealed() bool { return d.revealed }

// IsJoint implements [swap.Kind].
func (d *driver) IsJoint() bool { return true }

// Succeeded implements [swap.Kind]. The image is that of the pod's spec from now on.
func (d *driver) Succeeded() {
	if d.c.Record().Method != opsv1.MethodKubelet {
		d.c.Node.Overrides.Set(d.c.Slot(), nil)
	}
}

// Failed implements [swap.Kind].
func (d *driver) Failed() { d.endOthers() }

// Drive implements [swap.Kind]. Everything that takes time is done before kubelet is involved, and
// what stops the incumbent is kubelet's own StopContainer.
func (d *driver) Drive(ctx context.Context) error {
	defer d.slot.leave()
	if d.c.Claim != nil {
		d.slot.keep()
		d.drives()
		if err := d.c.Resume(ctx); err != nil {
			return err
		}
		if d.c.Record().Step == store.StepNone {
			// Nothing is staged any more. The image comes first again, which may take long: not
			// while kubelet waits for the slot.
			d.slot.drop()
		}
	}
	for {
		var err error
		switch s := d.c.Record().Step; s {
		case store.StepNone:
			if d.c.Record().Method != opsv1.MethodKubelet {
				err = d.prepare(ctx)
			}
			if err == nil && d.c.Record().Method == opsv1.MethodKubelet {
				return d.leaveToKubelet(ctx)
			}
		case store.StepHeld:
			err = d.awaitCommit(ctx)
		case store.StepStart, store.StepArm:
			err = d.makeReady(ctx)
		case store.StepArmed:
			err = d.awaitKubelet(ctx)
		case store.StepStop:
			err = d.c.Switcher.Swap(ctx)
		case store.StepAsk:
			ended := false
			if ended, err = d.adopter.awaitRequest(ctx); ended {
				return err
			}
		case store.StepStarted:
			err = d.showSuccessor(ctx)
		case store.StepReveal:
			return d.adopter.awaitAdoption(ctx)
		default:
			return operation.Failf(opsv1.ReasonJournalError, "the journal has the unknown step %q", s)
		}
		if err != nil {
			return err
		}
	}
}

// drives lets kubelet drive.
func (d *driver) drives() {
	switch d.c.Record().Step {
	case store.StepArmed, store.StepStop, store.StepAsk, store.StepStarted, store.StepReveal:
		d.kubelet.listen(true)
	}
	// What waited at its gate in the process before this one waits still, and needs no time to
	// stop.
	if s := d.c.Record().Step; d.c.Record().Method == opsv1.MethodGate && (s == store.StepArm || s == store.StepArmed ||
		s == store.StepAsk) {
		d.c.Switcher.WaitsAtGate()
	}
	if rec := d.c.Record(); rec.Step == store.StepStop {
		d.kubelet.stopBy(rec.StopBy)
	}
	d.c.Claim.Drive(d.kubelet)
}

// prepare pulls the image, checks it, takes the slot and stages the successor.
func (d *driver) prepare(ctx context.Context) error {
	limit := orElse(d.c.Op.Upgrade().GetPrepareTimeout(), swap.DefaultPrepare)
	return d.c.Within(ctx, d.c.Op.CreateTime(), limit, func(ctx context.Context) error {
		if err := d.c.Image.Pull(ctx); err != nil {
			return err
		}
		if err := d.c.Image.EnsureVolumes(ctx); err != nil {
			return err
		}
		// Before the slot is taken, another operation may have a container of its own in it.
		if err := d.slot.take(ctx); err != nil {
			return err
		}
		d.drives()
		why, err := d.c.Image.CheckUpgrade(ctx)
		if err != nil {
			return err
		}
		if why != "" {
			d.toKubelet(why)
		}
		if d.c.Record().Method == opsv1.MethodKubelet {
			d.slot.drop()
			return nil
		}
		return d.c.Stager.Stage(ctx)
	})
}

// toKubelet has kubelet make the successor.
func (d *driver) toKubelet(why string) {
	d.c.Warn("only the image is put ready, kubelet makes the container: %s", why)
	d.c.SetMethod(opsv1.MethodKubelet)
}

// leaveToKubelet waits for the commit of an upgrade of which only the image has been prepared.
func (d *driver) leaveToKubelet(ctx context.Context) error {
	// The next process needs not do it again.
	err := d.c.Write(func(rec *store.Container, c *opsv1.ContainerOperation) {
		c.Phase = opsv1.Phase_PHASE_PREPARED
		if rec.HoldSince.IsZero() {
			rec.HoldSince = time.Now()
		}
	})
	if err != nil {
		return err
	}
	if err := d.awaitRelease(ctx); err != nil {
		return err
	}
	d.c.Revealer.HoldNext(ctx, orElse(d.c.Op.Upgrade().GetHoldTimeout(), swap.DefaultHold))
	return nil
}

// endOthers takes the rest of the upgrade back: a pod with one of two images new is what nobody
// asked for.
func (d *driver) endOthers() {
	c := d.c.Status()
	if c.GetReason() == opsv1.ReasonCancelled {
		return
	}
	if err := d.c.Op.Cancel(fmt.Sprintf("container %s: %s", c.GetName(), c.GetMessage())); err != nil {
		d.c.Log.WithError(err).Info("the other containers of the upgrade go on")
	}
}
