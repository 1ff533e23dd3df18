// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package ops

import (
	"context"
	"time"

	opsv1 "github.com/cri-proxy/cri-proxy/api/ops/v1"

	"github.com/cri-proxy/cri-proxy/ops/crinode"
	"github.com/cri-proxy/cri-proxy/ops/operation"
	"github.com/cri-proxy/cri-proxy/ops/podsapi"
	"github.com/cri-proxy/cri-proxy/ops/store"
)

// armedPoll is how often a successor that runs beside its incumbent, and waits to take over, is
// looked at.
const armedPoll = time.Second

// awaitKubelet waits until kubelet, which has seen the new spec, stops the incumbent.
func (d *upgrader) awaitKubelet(ctx context.Context) error {
	if err := d.rearm(ctx); err != nil {
		return err
	}
	limit := orElse(d.c.op.Upgrade().GetHoldTimeout(), defaultHold)
	hold := time.NewTimer(d.holdLeft(limit))
	defer hold.Stop()
	look := time.NewTicker(armedPoll)
	defer look.Stop()
	for {
		select {
		case q := <-d.kubelet.stops:
			if why := d.refusal(ctx); why != "" {
				d.c.log.WithField("reason", why).Info("kubelet stops the container for another reason than the upgrade")
				q.answer <- false
				continue // it takes the slot back
			}
			return d.stopFor(q.grace, func() { d.pending = append(d.pending, q) })
		case q := <-d.kubelet.creates:
			// The incumbent has ended by itself, and kubelet makes the next one.
			if differing := d.c.stager.differs(ctx, q.Request); len(differing) > 0 || d.c.successor() == "" {
				q.Yield()
				continue
			}
			d.c.handle.SetCertain() // it is what kubelet asks for
			return d.stopFor(int64(crinode.MinGrace/time.Second), func() { d.asked = q })
		case <-look.C:
			if err := d.c.switcher.makeRoom(ctx); err != nil {
				return err
			}
			if d.c.overlaps() && !d.c.old.exit.Over() {
				if err := d.c.switcher.successorRuns(ctx, d.c.successor()); err != nil {
					return err
				}
			}
		case <-d.c.claim.Yielded():
			return d.c.interrupted()
		case <-d.c.op.Cancelled():
			return d.c.cancelledOutcome()
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
func (d *upgrader) rearm(ctx context.Context) error {
	if d.c.old.request != nil {
		return nil // this one has
	}
	if err := d.c.old.load(ctx); err != nil {
		return err
	}
	if _, err := d.c.old.watch(ctx); err != nil {
		return err
	}
	if d.c.rec().Method == opsv1.MethodGate {
		return d.c.switcher.arm(ctx)
	}
	return d.c.stager.ensureStaged(ctx)
}

// stopFor passes the point of no return: the incumbent is to be stopped within the grace, in
// seconds.
func (d *upgrader) stopFor(grace int64, accept func()) error {
	if !d.c.op.PassPointOfNoReturn() {
		return d.c.cancelledOutcome()
	}
	d.c.claim.Mask()
	by := time.Now().Add(time.Duration(grace) * time.Second)
	err := d.c.write(func(c *store.Container, op *opsv1.ContainerOperation) {
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
func (d *upgrader) refusal(ctx context.Context) string {
	return d.c.askKubelet(ctx, func(_ context.Context, pod *podsapi.Pod) string {
		if pod.Images[d.c.spec.GetName()] != d.c.image.Image() {
			return "the pod's spec has not the new image yet"
		}
		return ""
	})
}

// answerStops lets kubelet's stops of the incumbent return.
func (d *upgrader) answerStops() {
	for _, q := range d.pending {
		q.answer <- true
	}
	d.pending = nil
}

// showSuccessor shows both containers to kubelet and lets its StopContainer return.
func (d *upgrader) showSuccessor(ctx context.Context) error {
	if err := d.c.interrupted(); err != nil {
		return err
	}
	d.c.revealer.holdProbes(ctx)
	d.c.note(func(c *store.Container, op *opsv1.ContainerOperation) {
		c.Step, op.Phase, op.SuccessorId = store.StepReveal, opsv1.Phase_PHASE_ADOPTING, c.Successor
	})
	if !d.c.claim.TryReveal() {
		return d.c.interrupted()
	}
	d.revealed = true
	d.kubelet.stopBy(time.Time{})
	d.answerStops()
	d.c.failpoint("revealed")
	d.c.revealer.measure(ctx, d.c.rec())
	return nil
}
