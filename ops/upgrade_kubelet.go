// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package ops

import (
	"context"
	"slices"
	"strings"
	"sync"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	opsv1 "github.com/cri-proxy/cri-proxy/api/ops/v1"
	"github.com/cri-proxy/cri-proxy/interceptors/view"
	"github.com/cri-proxy/cri-proxy/ops/criclone"
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
	creates chan created
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

// created is a CreateContainer in the slot; answer has room for one.
type created struct {
	req    *runtimeapi.CreateContainerRequest
	answer chan adoption
}

type adoption struct {
	id string
	ok bool
}

func newKubelet() kubelet {
	return kubelet{stops: make(chan stopped), creates: make(chan created), over: make(chan struct{})}
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
	q := created{req: req, answer: make(chan adoption, 1)}
	select {
	case k.creates <- q:
	case <-k.over:
		return "", true
	case <-ctx.Done():
		return "", true
	}
	select {
	case a := <-q.answer:
		return a.id, a.ok
	case <-k.over:
	case <-ctx.Done():
		return "", true
	}
	select {
	case a := <-q.answer: // its last
		return a.id, a.ok
	default:
		return "", true
	}
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
	if err := d.c.renewStaged(ctx); err != nil {
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
		if err = d.c.switcher.overlap(ctx); besideFails(err) {
			err = d.c.switcher.giveUpOverlap(ctx, err)
		}
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
	d.up.listen(true) // before anyone is told that kubelet may come
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
		case q := <-d.up.stops:
			if why := d.refusal(ctx); why != "" {
				d.c.log.WithField("reason", why).Info("kubelet stops the container for another reason than the upgrade")
				q.answer <- false
				continue // it takes the slot back
			}
			return d.stopFor(q.grace, func() { d.up.pending = append(d.up.pending, q) })
		case q := <-d.up.creates:
			// The incumbent has ended by itself, and kubelet makes the next one.
			if differing := d.c.differs(ctx, q.req); len(differing) > 0 || d.c.successor() == "" {
				q.answer <- adoption{}
				continue
			}
			d.sure()
			return d.stopFor(int64(crinode.MinGrace/time.Second), func() { d.up.asked = &q })
		case <-look.C:
			if err := d.c.makeRoom(ctx); err != nil {
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
		d.up.stopBy(by)
		accept()
	}
	return err
}

// hurry stops the incumbent, whose stop is under way, within that grace.
func (r *Container) hurry(ctx context.Context, grace time.Duration) {
	grace = max(grace, crinode.MinGrace)
	call, cancel := context.WithTimeout(context.WithoutCancel(ctx), grace+crinode.CallTimeout)
	defer cancel()
	r.log.WithField("grace", grace).Info("kubelet stops the container within a shorter time than before")
	if _, err := r.node.Runtime.StopContainer(call, &runtimeapi.StopContainerRequest{ContainerId: r.rec().Incumbent,
		Timeout: int64(grace / time.Second)}); err != nil {
		r.log.WithError(err).Warn("container not stopped sooner")
	}
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

// sure says that the successor is what kubelet asks for.
func (d *upgrader) sure() {
	d.c.handle.SetCertain()
}

// awaitRequest answers kubelet's stop of an incumbent whose successor need not be what kubelet asks
// for, and waits for the request: the successor has run nothing yet. ended says that nothing is
// left to do.
func (d *upgrader) awaitRequest(ctx context.Context) (ended bool, err error) {
	if err := d.rearm(ctx); err != nil {
		return true, err
	}
	d.up.stopBy(time.Time{})
	for _, q := range d.up.pending {
		q.answer <- true
	}
	d.up.pending = nil
	d.c.failpoint("asking")
	limit := orElse(d.c.op.Upgrade().GetHoldTimeout(), defaultHold)
	patience := time.NewTimer(limit)
	defer patience.Stop()
	for {
		select {
		case q := <-d.up.stops:
			q.answer <- true // it has been
		case q := <-d.up.creates:
			if differing := d.c.differs(ctx, q.req); len(differing) > 0 {
				err := d.leaveCreation(ctx, differing, 0)
				if err == nil {
					d.c.revealer.holdNext(ctx, adoptPatience)
				}
				return true, err
			}
			// Before it begins, for the next process.
			d.c.note(func(c *store.Container, _ *opsv1.ContainerOperation) { c.Step, c.Asked = store.StepStop, true })
			d.up.asked = &q
			return false, nil
		case <-d.c.claim.Yielded():
			return true, d.c.interrupted()
		case <-patience.C:
			return true, operation.Failf(opsv1.ReasonHoldTimeout,
				"kubelet has stopped the container and not asked for the "+
					"new one within %s", limit)
		case <-ctx.Done():
			return true, ctx.Err()
		}
	}
}

// leaveCreation lets kubelet make the container, because it asks for another one than the
// successor, which has this time to end.
func (d *upgrader) leaveCreation(ctx context.Context, differing []string, grace time.Duration) error {
	d.c.log.WithField("differing", differing).
		Warn("kubelet asks for another container than was prepared: it makes its own")
	if grace > 0 {
		d.c.stager.stopWithin(ctx, d.c.successor(), grace)
	}
	if err := d.c.stager.removeContainer(ctx, d.c.successor()); err != nil {
		return operation.Failf(opsv1.ReasonRuntimeError, "%v", err)
	}
	if slices.Contains(differing, "image") || slices.Contains(differing, "annotations."+criclone.AnnotationHash) {
		return tookAnotherImage()
	}
	d.c.warn("kubelet made the container itself, because it asked for another one than was prepared: %s",
		strings.Join(differing, ", "))
	d.c.show(func(c *opsv1.ContainerOperation) { // those of the successor that is gone
		c.SuccessorId, c.Gap, c.StartTime = "", nil, nil
	})
	d.c.setMethod(opsv1.MethodKubelet)
	return nil
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
	d.up.revealed = true
	d.up.stopBy(time.Time{})
	for _, q := range d.up.pending {
		q.answer <- true
	}
	d.up.pending = nil
	d.c.failpoint("revealed")
	d.c.revealer.measure(ctx, d.c.rec())
	return nil
}

// adoptPatience is how long kubelet may take from the stop of the old container to the creation of
// the new one: with pull policy Always it asks the registry in between. If it does not come at all,
// because it was restarted in between, it has found the successor running and has nothing to do.
const adoptPatience = 2 * time.Minute

// awaitAdoption answers kubelet's CreateContainer with the successor, if that is what it asks for.
func (d *upgrader) awaitAdoption(ctx context.Context) error {
	d.up.revealed = true
	if err := d.c.room.TryLower(); err != nil {
		d.c.log.WithError(err).Info("the pod's limit of memory is not taken back yet")
	}
	if d.c.op.Rebooted() {
		return nil // the spec has the new image, of which kubelet makes the container anew
	}
	if d.c.rec().Asked && d.up.asked == nil {
		// The process before this one was asked. If its answer was cut off, kubelet looks again,
		// finds the successor, and asks no more.
		return d.unasked(ctx)
	}
	patience := time.NewTimer(adoptPatience)
	defer patience.Stop()
	if q := d.up.asked; q != nil {
		d.up.asked = nil
		if ended, err := d.adopt(ctx, *q); ended || err != nil {
			return err
		}
	}
	for {
		select {
		case q := <-d.up.stops:
			q.answer <- true // it has been: kubelet repeats a call that was cut off
		case q := <-d.up.creates:
			if ended, err := d.adopt(ctx, q); ended || err != nil {
				return err
			}
		case <-d.c.claim.Yielded():
			d.c.log.Info("the pod goes away, stopping the new container")
			d.c.stager.stopWithin(ctx, d.c.successor(),
				time.Duration(min(max(d.c.rec().Grace, 2), int64(crinode.MaxLateGrace/time.Second)))*time.Second)
			return d.c.interrupted()
		case <-patience.C:
			return d.unasked(ctx)
		case <-ctx.Done():
			return ctx.Err()
		}
	}
}

// unasked ends an upgrade whose successor kubelet has found by itself, if it is there.
func (d *upgrader) unasked(ctx context.Context) error {
	if _, err := d.c.node.Runtime.ContainerStatus(ctx,
		&runtimeapi.ContainerStatusRequest{ContainerId: d.c.successor()}); status.Code(err) == codes.NotFound {
		return operation.Failf(opsv1.ReasonTakenBackByKubelet,
			"the new container was removed before kubelet asked for it: "+
				"has the pod gone away?")
	}
	d.c.revealer.logLink(ctx, d.c.successor())
	return nil
}

// adopt answers one CreateContainer. ended says that nothing is left to wait for.
func (d *upgrader) adopt(ctx context.Context, q created) (ended bool, err error) {
	asked, ours := q.req.GetConfig().GetMetadata().GetAttempt(), d.c.status().GetAttempt()
	var differing []string
	if asked <= ours {
		if differing = d.c.differs(ctx, q.req); len(differing) == 0 {
			// Before anything else, for the next process.
			if _, err := d.c.handle.Write(func(c *store.Container,
				_ *opsv1.ContainerOperation) {
				c.Asked = true
			}); err != nil {
				d.c.log.WithError(err).Warn("not written that kubelet has asked for the new container")
			}
		}
	}
	d.c.failpoint("adopt")
	if asked > ours {
		// Kubelet knows the successor, which has ended or been stopped since.
		if !d.isOurs(q.req) {
			return true, tookAnotherImage()
		}
		return true, nil
	}
	if len(differing) == 0 {
		d.c.matchResources(ctx, q.req)
		q.answer <- adoption{id: d.c.successor(), ok: true}
		return true, nil
	}
	err = d.leaveCreation(ctx, differing, min(max(d.c.podGrace(ctx), crinode.MinGrace), crinode.MaxLateGrace))
	if err == nil {
		d.c.revealer.holdNext(ctx, adoptPatience)
	}
	return true, err
}

// isOurs reports whether what kubelet asks for has the image of the upgrade.
func (d *upgrader) isOurs(asked *runtimeapi.CreateContainerRequest) bool {
	return asked.GetConfig().GetAnnotations()[criclone.AnnotationHash] == criclone.KubeletHash(d.c.spec.GetName(),
		d.c.image.Image())
}

func tookAnotherImage() *operation.Outcome {
	return operation.Failf(opsv1.ReasonTakenBackByKubelet,
		"kubelet restarted the container with another image than the "+
			"upgrade's: was the pod's spec patched?")
}

// podGrace is the grace of the pod's containers.
func (r *Container) podGrace(ctx context.Context) time.Duration {
	if r.old.load(ctx) != nil {
		return crinode.MinGrace
	}
	return r.old.grace()
}

// differs names what kubelet asks for otherwise than it was prepared.
func (r *Container) differs(ctx context.Context, asked *runtimeapi.CreateContainerRequest) []string {
	ours, err := r.node.RequestOf(ctx, r.successor(), r.rec().Sandbox)
	if err != nil {
		r.log.WithError(err).Warn("prepared container cannot be compared")
		return []string{"unknown"}
	}
	return criclone.Diff(criclone.AlignMounts(ours, asked), asked)
}

// matchResources gives the successor the resources that kubelet asks for, if they have changed
// since it was made.
func (r *Container) matchResources(ctx context.Context, asked *runtimeapi.CreateContainerRequest) {
	if err := r.node.MatchResources(ctx, r.successor(), asked); err != nil {
		r.warn("the new container did not take the resources that kubelet asked for: %v", err)
	}
}
