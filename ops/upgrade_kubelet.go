// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package ops

import (
	"context"
	"sync"
	"time"

	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	opsv1 "github.com/cri-proxy/cri-proxy/api/ops/v1"
	"github.com/cri-proxy/cri-proxy/interceptors/view"
	"github.com/cri-proxy/cri-proxy/ops/crinode"
	"github.com/cri-proxy/cri-proxy/ops/operation"
	"github.com/cri-proxy/cri-proxy/ops/podsapi"
	"github.com/cri-proxy/cri-proxy/ops/store"
)

// Pods is kubelet's own view of its pods. [*podsapi.Client] is one.
type Pods interface {
	// Pod returns the pod with that UID. [podsapi.ErrNotFound] means that kubelet has none.
	Pod(ctx context.Context, uid string) (*podsapi.Pod, error)
}

// kubelet passes on to the operation what kubelet does in its slot.
type kubelet struct {
	stops   chan stopped
	creates Creations
	over    chan struct{} // closed when the operation answers no more
	// hurry stops the incumbent within a grace that is shorter than the one it is being stopped
	// within.
	hurry func(ctx context.Context, grace time.Duration)

	mu        sync.Mutex // guards all following fields
	listening bool
	by        time.Time // when the grace of a stop under way ends
}

var _ view.Driver = (*kubelet)(nil)

// stopped is a StopContainer of the incumbent; answer has room for one.
type stopped struct {
	grace  int64
	answer chan bool
}

func newKubelet(hurry func(ctx context.Context, grace time.Duration)) *kubelet {
	return &kubelet{
		stops: make(chan stopped), creates: make(Creations), over: make(chan struct{}), hurry: hurry,
	}
}

// listen says whether the operation has something for kubelet. Until then it gives way at once.
func (k *kubelet) listen(on bool) {
	k.mu.Lock()
	defer k.mu.Unlock()
	k.listening = on
}

func (k *kubelet) listens() bool {
	k.mu.Lock()
	defer k.mu.Unlock()
	return k.listening
}

// stopBy says when the grace of the stop that is under way ends.
func (k *kubelet) stopBy(by time.Time) {
	k.mu.Lock()
	defer k.mu.Unlock()
	k.by = by
}

// sooner reports whether a stop is under way that has more time than that.
func (k *kubelet) sooner(grace time.Duration) bool {
	k.mu.Lock()
	defer k.mu.Unlock()
	by := time.Now().Add(grace)
	if k.by.IsZero() || !by.Before(k.by) {
		return false
	}
	k.by = by
	return true
}

// Stop implements [view.Driver].
func (k *kubelet) Stop(ctx context.Context, grace int64) (bool, error) {
	if !k.listens() {
		return false, nil
	}
	if d := time.Duration(grace) * time.Second; k.sooner(d) {
		k.hurry(ctx, d) // as with the runtime, the shorter grace wins
	}
	q := stopped{grace: grace, answer: make(chan bool, 1)}
	select {
	case k.stops <- q:
	case <-k.over:
		return false, nil
	case <-ctx.Done():
		return true, ctx.Err()
	}
	select {
	case ok := <-q.answer:
		return ok, nil
	case <-k.over:
	case <-ctx.Done(): // the operation goes on
		return true, ctx.Err()
	}
	select {
	case ok := <-q.answer: // its last
		return ok, nil
	default: // it has failed: kubelet's own stop does no harm
		return false, nil
	}
}

// Create implements [view.Driver].
func (k *kubelet) Create(ctx context.Context, req *runtimeapi.CreateContainerRequest) (string, bool) {
	if !k.listens() {
		return "", false
	}
	return k.creates.Ask(ctx, req, k.over)
}

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

func (r *Container) successor() string { return r.rec().Successor }

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
