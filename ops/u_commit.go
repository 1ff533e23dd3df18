// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package ops

import (
	"context"
	"time"

	opsv1 "github.com/cri-proxy/cri-proxy/api/ops/v1"

	"google.golang.org/protobuf/types/known/durationpb"

	"github.com/cri-proxy/cri-proxy/ops/operation"
	"github.com/cri-proxy/cri-proxy/ops/store"
)

// holdLeast is what a process that finds an upgrade waiting gives those who may have found nobody
// there, and come again.
const holdLeast = 15 * time.Second

// holdLeft is what is left of the time for which the upgrade waits, whichever process began to.
func (d *upgrader) holdLeft(limit time.Duration) time.Duration {
	since := d.c.rec().HoldSince
	if since.IsZero() { // written by a version that did not keep it
		return limit
	}
	return min(max(limit-time.Since(since), holdLeast), limit) // the clock may have been set
}

// awaitRelease waits until the caller is about to patch the pod's spec.
func (d *upgrader) awaitRelease(ctx context.Context) error {
	var yielded <-chan struct{} // never, without a slot
	if d.c.claim != nil {
		yielded = d.c.claim.Yielded()
	}
	limit := orElse(d.c.op.Upgrade().GetHoldTimeout(), defaultHold)
	hold := time.NewTimer(d.holdLeft(limit))
	defer hold.Stop()
	select {
	case <-d.c.op.Committed():
		return nil
	case <-yielded:
		return d.c.interrupted()
	case <-d.c.op.Cancelled():
		return d.c.cancelledOutcome()
	case <-hold.C:
		return operation.Failf(opsv1.ReasonHoldTimeout, "not committed within %s", limit)
	case <-ctx.Done():
		return ctx.Err()
	}
}

// awaitCommit waits for the commit of an upgrade whose successor is staged.
func (d *upgrader) awaitCommit(ctx context.Context) error {
	if err := d.awaitRelease(ctx); err != nil {
		return err
	}
	if err := d.c.old.load(ctx); err != nil {
		return err
	}
	running, err := d.c.old.watch(ctx)
	if err != nil {
		return err
	}
	if err := d.c.interrupted(); err != nil {
		return err
	}
	if !running {
		return d.c.old.stoppedByItself(ctx)
	}
	if err := d.c.stager.renewStaged(ctx); err != nil {
		return err
	}
	if d.c.overlaps() && !d.c.isCertain() {
		d.c.warn("the new container begins beside the old one before kubelet has asked for it, with the environment " +
			"of the old one's start: a caller who knows the environment gives it with the commit")
	}
	return d.c.write(func(c *store.Container, op *opsv1.ContainerOperation) {
		c.Step, c.HoldSince, op.Phase = store.StepArm, time.Time{}, opsv1.Phase_PHASE_PREPARED
		if d.c.overlaps() {
			c.Step = store.StepStart
		}
	})
}

// makeReady brings the successor as far as it comes while the incumbent serves.
func (d *upgrader) makeReady(ctx context.Context) error {
	if err := d.c.old.load(ctx); err != nil {
		return err
	}
	if _, err := d.c.old.watch(ctx); err != nil {
		return err
	}
	if err := d.c.interrupted(); err != nil {
		return err
	}
	var err error
	switch {
	case d.c.overlaps():
		err = d.c.switcher.overlap(ctx)
	case d.c.rec().Method == opsv1.MethodGate:
		err = d.c.switcher.arm(ctx)
	default:
		err = d.c.stager.ensureStaged(ctx)
	}
	if err != nil {
		return err
	}
	if err := d.c.interrupted(); err != nil {
		return err
	}
	d.c.revealer.probeHold(ctx)
	d.kubelet.listen(true) // before anyone is told that kubelet may come
	return d.c.write(func(c *store.Container, op *opsv1.ContainerOperation) {
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
