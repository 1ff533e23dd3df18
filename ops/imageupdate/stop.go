// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package imageupdate

import (
	"context"
	"time"

	opsv1 "github.com/cri-proxy/cri-proxy/api/ops/v1"
	"github.com/cri-proxy/cri-proxy/ops/crinode"
	"github.com/cri-proxy/cri-proxy/ops/operation"
	"github.com/cri-proxy/cri-proxy/ops/podsapi"
	"github.com/cri-proxy/cri-proxy/ops/store"
	"github.com/cri-proxy/cri-proxy/ops/swap"
)

// armedPoll is how often a successor that runs beside its incumbent, and waits to take over, is
// looked at.
const armedPoll = time.Second

// awaitKubelet waits until kubelet, which has seen the new spec, stops the incumbent.
func (d *driver) awaitKubelet(ctx context.Context) error {
	if err := d.rearm(ctx); err != nil {
		return err
	}
	limit := orElse(d.c.Op.Upgrade().GetHoldTimeout(), swap.DefaultHold)
	hold := time.NewTimer(d.holdLeft(limit))
	defer hold.Stop()
	look := time.NewTicker(armedPoll)
	defer look.Stop()
	for {
		select {
		case q := <-d.kubelet.stops:
			if why := d.refusal(ctx); why != "" {
				d.c.Log.WithField("reason", why).Info("kubelet stops the container for another reason than the upgrade")
				q.answer <- false
				continue // it takes the slot back
			}
			return d.stopFor(q.grace, func() { d.pending = append(d.pending, q) })
		case q := <-d.kubelet.creates:
			// The incumbent has ended by itself, and kubelet makes the next one.
			if differing := d.c.Stager.Differs(ctx, q.Request); len(differing) > 0 || d.c.Successor() == "" {
				q.Yield()
				continue
			}
			d.c.Handle.SetCertain() // it is what kubelet asks for
			return d.stopFor(int64(crinode.MinGrace/time.Second), func() { d.asked = q })
		case <-look.C:
			if err := d.c.Switcher.MakeRoom(ctx); err != nil {
				return err
			}
			if d.c.Overlaps() && !d.c.Old.Exit.Over() {
				if err := d.c.Switcher.SuccessorRuns(ctx, d.c.Successor()); err != nil {
					return err
				}
			}
		case <-d.c.Claim.Yielded():
			return d.c.Interrupted()
		case <-d.c.Op.Cancelled():
			return d.c.CancelledOutcome()
		case <-hold.C:
			return operation.Failf(opsv1.ReasonHoldTimeout,
				"kubelet has not stopped the container within %s: was the pod's "+
					"spec patched?", limit)
		case <-ctx.Done():
			return ctx.Err()
		}
	}
}

// rearm makes a successor ready again that a process before this one had made so.
func (d *driver) rearm(ctx context.Context) error {
	if d.c.Old.Request != nil {
		return nil // this one has
	}
	if err := d.c.Old.Load(ctx); err != nil {
		return err
	}
	if _, err := d.c.Old.Watch(ctx); err != nil {
		return err
	}
	if d.c.Record().Method == opsv1.MethodGate {
		return d.c.Switcher.Arm(ctx)
	}
	return d.c.Stager.EnsureStaged(ctx)
}

// stopFor passes the point of no return: the incumbent is to be stopped within the grace, in
// seconds.
func (d *driver) stopFor(grace int64, accept func()) error {
	if !d.c.Op.PassPointOfNoReturn() {
		return d.c.CancelledOutcome()
	}
	d.c.Claim.Mask()
	by := time.Now().Add(time.Duration(grace) * time.Second)
	err := d.c.Write(func(c *store.Container, op *opsv1.ContainerOperation) {
		c.Step, c.Grace, c.StopBy, op.Phase = store.StepStop, grace, by, opsv1.Phase_PHASE_STOPPING
	})
	if err == nil {
		d.kubelet.stopBy(by)
		accept()
	}
	return err
}

// refusal says why a stop of the incumbent is not that of the upgrade, as far as kubelet tells;
// empty if it may be. What kubelet does next decides in the end.
func (d *driver) refusal(ctx context.Context) string {
	return d.c.AskKubelet(ctx, func(_ context.Context, pod *podsapi.Pod) string {
		if pod.Images[d.c.Spec.GetName()] != d.c.Image.Image() {
			return "the pod's spec has not the new image yet"
		}
		return ""
	})
}

// answerStops lets kubelet's stops of the incumbent return.
func (d *driver) answerStops() {
	for _, q := range d.pending {
		q.answer <- true
	}
	d.pending = nil
}

// showSuccessor shows both containers to kubelet and lets its StopContainer return.
func (d *driver) showSuccessor(ctx context.Context) error {
	if err := d.c.Interrupted(); err != nil {
		return err
	}
	d.c.Revealer.HoldProbes(ctx)
	d.c.Note(func(c *store.Container, op *opsv1.ContainerOperation) {
		c.Step, op.Phase, op.SuccessorId = store.StepReveal, opsv1.Phase_PHASE_ADOPTING, c.Successor
	})
	if !d.c.Claim.TryReveal() {
		return d.c.Interrupted()
	}
	d.revealed = true
	d.kubelet.stopBy(time.Time{})
	d.answerStops()
	d.c.Failpoint("revealed")
	d.c.Revealer.Measure(ctx, d.c.Record())
	return nil
}
