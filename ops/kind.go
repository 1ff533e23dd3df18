// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package ops

import (
	"context"
	"time"

	opsv1 "github.com/cri-proxy/cri-proxy/api/ops/v1"
	"github.com/cri-proxy/cri-proxy/ops/store"
)

// Kind is what a restart and an upgrade do with a container each in its own way.
type Kind interface {
	// Name is restart or upgrade.
	Name() string
	// Drive takes the container through the steps. It returns nil on success, an
	// [operation.Outcome], or the error of a call that was cut off.
	Drive(ctx context.Context) error
	// Over says that Drive has returned: kubelet is answered no more. left says that the next
	// process goes on.
	Over(left bool)
	// WantSlot says that the operation waits for the slot. The caller must call got when it waits
	// no more.
	WantSlot() (got func())
	// Taken says that the operation has the slot.
	Taken()
	// Adopted reports whether kubelet asks for the successor by a CreateContainer of its own, and
	// so takes it over. Otherwise the successor is shown to it in the place of the incumbent.
	Adopted() bool
	// NextImage is the image of the container that kubelet makes instead of taking the successor
	// over; empty if that is not known.
	NextImage() string
	// Staged makes the record that of a container whose successor has been staged.
	Staged(rec *store.Container, status *opsv1.ContainerOperation)
	// Revealed reports whether this process has shown the successor to kubelet.
	Revealed() bool
	// IsJoint reports whether the failure of one container ends the operation on the others.
	IsJoint() bool
	// Succeeded and Failed say how the operation on the container ends. Succeeded is called before
	// that is written, Failed after that.
	Succeeded()
	Failed()
}

// restarter is the [Kind] of a restart.
type restarter struct {
	c    *Container
	join *join
}

var _ Kind = (*restarter)(nil)

func newRestarter(c *Container) *restarter {
	d := &restarter{c: c}
	d.join = newJoin(d)
	return d
}

// Name implements [Kind].
func (d *restarter) Name() string { return "restart" }

// Over implements [Kind].
func (d *restarter) Over(left bool) { d.join.end(left) }

// WantSlot implements [Kind]. A restart has the upgrade that holds the slot taken back; see
// [operation.Waiters].
func (d *restarter) WantSlot() (got func()) {
	holder, got := d.c.node.Waiters.Want(d.c.slot())
	if holder != nil {
		d.c.node.TakeBack(holder, d.c.op)
	}
	return got
}

// Taken implements [Kind].
func (d *restarter) Taken() { d.joins() }

// Adopted implements [Kind].
func (d *restarter) Adopted() bool { return false }

// NextImage implements [Kind].
func (d *restarter) NextImage() string { return "" }

// Staged implements [Kind].
func (d *restarter) Staged(_ *store.Container, status *opsv1.ContainerOperation) {
	if !d.c.overlaps() {
		status.Phase = opsv1.Phase_PHASE_STOPPING
	}
}

// Revealed implements [Kind].
func (d *restarter) Revealed() bool { return d.join.isShown() }

// IsJoint implements [Kind].
func (d *restarter) IsJoint() bool { return false }

// Succeeded implements [Kind].
func (d *restarter) Succeeded() {}

// Failed implements [Kind].
func (d *restarter) Failed() {}

// upgrader is the [Kind] of an image update.
type upgrader struct {
	c       *Container
	slot    *slotHolder
	kubelet *kubelet
	adopter *adopter
	// pending are kubelet's stops that wait for the successor, and asked its creation that has come
	// before that.
	pending []stopped
	asked   *Creation
	// revealed is set once kubelet may have seen the successor.
	revealed bool
}

var _ Kind = (*upgrader)(nil)

func newUpgrader(c *Container) *upgrader {
	d := &upgrader{c: c, slot: &slotHolder{c}, kubelet: newKubelet(c.old.hurry)}
	d.adopter = &adopter{c: c, d: d}
	return d
}

// Name implements [Kind].
func (d *upgrader) Name() string { return "upgrade" }

// Over implements [Kind].
func (d *upgrader) Over(bool) { close(d.kubelet.over) }

// WantSlot implements [Kind].
func (d *upgrader) WantSlot() (got func()) { return func() {} }

// Taken implements [Kind].
func (d *upgrader) Taken() {}

// Adopted implements [Kind].
func (d *upgrader) Adopted() bool { return true }

// NextImage implements [Kind].
func (d *upgrader) NextImage() string { return d.c.image.Image() }

// Staged implements [Kind].
func (d *upgrader) Staged(rec *store.Container, status *opsv1.ContainerOperation) {
	rec.Step, rec.HoldSince, status.Phase = store.StepHeld, time.Now(), opsv1.Phase_PHASE_PREPARED
}

// Revealed implements [Kind].
func (d *upgrader) Revealed() bool { return d.revealed }

// IsJoint implements [Kind].
func (d *upgrader) IsJoint() bool { return true }

// Succeeded implements [Kind]. The image is that of the pod's spec from now on.
func (d *upgrader) Succeeded() {
	if d.c.rec().Method != opsv1.MethodKubelet {
		d.c.node.Overrides.Set(d.c.slot(), nil)
	}
}

// Failed implements [Kind].
func (d *upgrader) Failed() { d.endOthers() }
