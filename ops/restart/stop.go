// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package restart

import (
	"context"
	"errors"
	"time"

	opsv1 "github.com/cri-proxy/cri-proxy/api/ops/v1"
	"github.com/cri-proxy/cri-proxy/ops/crinode"
	"github.com/cri-proxy/cri-proxy/ops/hooks"
	"github.com/cri-proxy/cri-proxy/ops/store"
)

// beforeStop masks the incumbent and runs its preStop hook, if there is one. The point of no return
// is on disk before the hook runs: the next process neither grants the grace period anew nor lets
// anyone cancel. Without a hook, the same write has the step stop. From then on kubelet's own stops
// join.
func (d *driver) beforeStop(ctx context.Context) error {
	if err := d.c.Old.Load(ctx); err != nil {
		return err
	}
	rec := d.c.Record()
	resumed := !rec.StopBy.IsZero() // it is written after the commit
	d.c.Claim.Mask()
	// From the mask on, an exit of the incumbent is ours to handle; one from before is kubelet's,
	// unless the successor runs already.
	running, err := d.c.Old.Watch(ctx)
	if err != nil {
		return err
	}
	if !resumed {
		if err := d.c.Interrupted(); err != nil { // before anything is said of an incumbent that kubelet has stopped
			return err
		}
		if !running && !d.c.Overlaps() {
			return d.c.Old.StoppedByItself(ctx)
		}
		if !d.c.Op.PassPointOfNoReturn() {
			return d.c.CancelledOutcome()
		}
	}
	grace := d.c.Old.Grace()
	var hook *opsv1.Hook
	if running {
		hook = d.preStopHook(grace)
	}
	if rec.StopBy.IsZero() {
		rec.StopBy = time.Now().Add(grace)
		d.join.listen(rec.StopBy)
		err := d.c.Write(func(c *store.Container, op *opsv1.ContainerOperation) {
			c.StopBy, op.Phase = rec.StopBy, opsv1.Phase_PHASE_STOPPING
			if hook == nil {
				c.Step = store.StepStop
			}
		})
		if err != nil {
			return err
		}
		if hook == nil && !rec.SuccessorMayRun() {
			d.c.Switcher.NothingTouched()
		}
	}
	d.c.Revealer.ProbeHold(ctx)
	if hook != nil {
		d.runPreStop(ctx, hook, grace, rec.StopBy)
	}
	if ctx.Err() != nil {
		return ctx.Err()
	}
	if err := d.c.Interrupted(); err != nil {
		return err
	}
	if d.c.Record().Step == store.StepStop {
		return nil
	}
	return d.c.Write(func(c *store.Container, _ *opsv1.ContainerOperation) { c.Step = store.StepStop })
}

// preStopHook returns the hook that is to run before the stop; nil for none. As in kubelet, no
// grace means no hook.
func (d *driver) preStopHook(grace time.Duration) *opsv1.Hook {
	hook := d.c.Spec.GetPreStop()
	if hook == nil {
		var err error
		if hook, err = hooks.RecordedPreStop(d.c.Old.Status.GetAnnotations()); err != nil {
			d.preStopFailed("preStop: %v", err)
		}
	}
	if grace <= 0 {
		return nil
	}
	return hook
}

// runPreStop runs the hook within the grace. As in kubelet, its failure does not keep the container
// from being stopped.
func (d *driver) runPreStop(ctx context.Context, hook *opsv1.Hook, grace time.Duration, by time.Time) {
	ctx, cancel := context.WithDeadline(ctx, by)
	defer cancel()
	ctx, end := crinode.EndWith(ctx, d.c.Claim.Yielded())
	defer end()
	ctx, end = crinode.EndWith(ctx, d.join.sooner)
	defer end()
	if gone := d.c.Old.Exit.Ended(); gone != nil {
		ctx, end = crinode.EndWith(ctx, gone) // nobody left to run it in
		defer end()
	}
	rec := d.c.Record()
	if err := d.c.Node.Hooks.Run(ctx, hook, rec.Incumbent, rec.Sandbox); err != nil && ctx.Err() == nil {
		d.preStopFailed("preStop hook failed: %v", err)
	} else if errors.Is(ctx.Err(), context.DeadlineExceeded) {
		d.preStopFailed("preStop hook did not end within the grace period of %s", grace)
	}
}

// preStopFailed warns of a preStop hook that could not be run, failed, or took too long. The
// warning begins with "preStop".
func (d *driver) preStopFailed(format string, args ...any) {
	d.c.Show(func(c *opsv1.ContainerOperation) { c.PreStopFailed = true })
	d.c.Warn(format, args...)
}
