// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package imageupdate

import (
	"context"
	"time"

	"google.golang.org/protobuf/types/known/durationpb"

	opsv1 "github.com/cri-proxy/cri-proxy/api/ops/v1"
	"github.com/cri-proxy/cri-proxy/ops/operation"
	"github.com/cri-proxy/cri-proxy/ops/store"
	"github.com/cri-proxy/cri-proxy/ops/swap"
)

// HoldLeast is what a process that finds an upgrade waiting gives those who may have found nobody
// there, and come again.
const HoldLeast = 15 * time.Second

// holdLeft is what is left of the time for which the upgrade waits, whichever process began to.
func (d *driver) holdLeft(limit time.Duration) time.Duration {
	since := d.c.Record().HoldSince
	if since.IsZero() { // written by a version that did not keep it
		return limit
	}
	return min(max(limit-time.Since(since), HoldLeast), limit) // the clock may have been set
}

// awaitRelease waits until the caller is about to patch the pod's spec.
func (d *driver) awaitRelease(ctx context.Context) error {
	var yielded <-chan struct{} // never, without a slot
	if d.c.Claim != nil {
		yielded = d.c.Claim.Yielded()
	}
	limit := orElse(d.c.Op.Upgrade().GetHoldTimeout(), swap.DefaultHold)
	hold := time.NewTimer(d.holdLeft(limit))
	defer hold.Stop()
	select {
	case <-d.c.Op.Committed():
		return nil
	case <-yielded:
		return d.c.Interrupted()
	case <-d.c.Op.Cancelled():
		return d.c.CancelledOutcome()
	case <-hold.C:
		return operation.Failf(opsv1.ReasonHoldTimeout, "not committed within %s", limit)
	case <-ctx.Done():
		return ctx.Err()
	}
}

// awaitCommit waits for the commit of an upgrade whose successor is staged.
func (d *driver) awaitCommit(ctx context.Context) error {
	if err := d.awaitRelease(ctx); err != nil {
		return err
	}
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
	if err := d.c.Stager.Renew(ctx); err != nil {
		return err
	}
	if d.c.Overlaps() && !d.c.IsCertain() {
		d.c.Warn("the new container begins beside the old one before kubelet has asked for it, with the environment " +
			"of the old one's start: a caller who knows the environment gives it with the commit")
	}
	return d.c.Write(func(c *store.Container, op *opsv1.ContainerOperation) {
		c.Step, c.HoldSince, op.Phase = store.StepArm, time.Time{}, opsv1.Phase_PHASE_PREPARED
		if d.c.Overlaps() {
			c.Step = store.StepStart
		}
	})
}

// makeReady brings the successor as far as it comes while the incumbent serves.
func (d *driver) makeReady(ctx context.Context) error {
	if err := d.c.Old.Load(ctx); err != nil {
		return err
	}
	if _, err := d.c.Old.Watch(ctx); err != nil {
		return err
	}
	if err := d.c.Interrupted(); err != nil {
		return err
	}
	var err error
	switch {
	case d.c.Overlaps():
		err = d.c.Switcher.Overlap(ctx)
	case d.c.Record().Method == opsv1.MethodGate:
		err = d.c.Switcher.Arm(ctx)
	default:
		err = d.c.Stager.EnsureStaged(ctx)
	}
	if err != nil {
		return err
	}
	if err := d.c.Interrupted(); err != nil {
		return err
	}
	d.c.Revealer.ProbeHold(ctx)
	d.kubelet.listen(true) // before anyone is told that kubelet may come
	return d.c.Write(func(c *store.Container, op *opsv1.ContainerOperation) {
		c.Step, c.HoldSince, op.Phase, op.SuccessorId = store.StepArmed, time.Now(),
			opsv1.Phase_PHASE_ARMED, c.Successor
	})
}

func orElse(d *durationpb.Duration, otherwise time.Duration) time.Duration {
	if v := d.AsDuration(); v > 0 {
		return v
	}
	return otherwise
}
