// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package ops

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"time"

	"github.com/sirupsen/logrus"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	opsv1 "github.com/cri-proxy/cri-proxy/api/ops/v1"
	"github.com/cri-proxy/cri-proxy/interceptors/view"
	"github.com/cri-proxy/cri-proxy/ops/crinode"
	"github.com/cri-proxy/cri-proxy/ops/failpoint"
	"github.com/cri-proxy/cri-proxy/ops/guard"
	"github.com/cri-proxy/cri-proxy/ops/imagechange"
	"github.com/cri-proxy/cri-proxy/ops/operation"
	"github.com/cri-proxy/cri-proxy/ops/room"
	"github.com/cri-proxy/cri-proxy/ops/store"
)

const (
	// hideTimeout bounds the wait for answers that tell of containers and are on their way to
	// kubelet undecoded. Lists and statuses take milliseconds; if one takes this long the runtime
	// is in no state for a restart.
	hideTimeout = 10 * time.Second
)

// giveUp ends the container's part of an operation after a panic at an unknown place, such as in
// the middle of undoing it.
func (r *Container) giveUp(ctx context.Context, why error) {
	rec := r.rec()
	if rec.Step != store.StepDone {
		// not the operation's: there is more to do
		r.writeEnd(operation.Failf(opsv1.ReasonInternalError, "%v", why), r.handle.Write)
	}
	if r.claim != nil {
		r.node.Lost.Abandon(ctx, r.log, r.claim, r.op.Pod(), rec)
	}
	r.kind.Failed()
	guard.Do(r.log, func() { r.room.Lower(ctx) })
}

// Container is the operation on one container: a state machine over [store.Step].
type Container struct {
	node   *Node
	op     *operation.Operation
	handle *operation.Container // of op, at index
	index  int
	spec   *opsv1.ContainerRestart
	claim  *view.Claim
	log    logrus.FieldLogger

	old      *incumbent
	stager   *stager
	switcher *switcher
	revealer *revealer
	undoer   *undoer

	room  *room.Room
	image *imagechange.Change

	stopFirst bool // it was to be StartFirst and goes on otherwise; as in the record

	queued bool // it waits for the slot, or has ended doing so

	kind Kind
}

// newContainer has no side effects: one operation may have several on the same container.
func newContainer(node *Node, o *operation.Operation, i int) *Container {
	handle := o.Container(i)
	spec := handle.Request()
	r := &Container{
		node: node, op: o, handle: handle, index: i, spec: spec, claim: handle.Claim(),
		stopFirst: handle.Record().StopFirst,
		log:       node.Log.WithFields(logrus.Fields{"op": o.UID(), "pod": o.PodName(), "container": spec.GetName()}),
	}
	r.old, r.stager, r.switcher = &incumbent{c: r}, &stager{r}, &switcher{c: r}
	r.revealer, r.undoer = &revealer{c: r}, &undoer{r}
	r.room = node.Rooms.Of(room.Container{
		Operation: o, Index: i, Log: r.log, Write: r.write, Note: r.note, Warn: r.warn,
		Exited: func() bool { return r.old.exit.Over() }, Interrupted: r.interrupted,
	})
	r.image = node.Images.Of(imagechange.Container{
		Operation: o, Index: i, Log: r.log, Warn: r.warn, Failpoint: r.failpoint,
	})
	if o.Upgrade() != nil {
		r.kind = newUpgrader(r)
	} else {
		r.kind = newRestarter(r)
	}
	return r
}

func (r *Container) rec() store.Container { return r.handle.Record() }

// write is [operation.Container.Write], and a failpoint.
func (r *Container) write(f func(rec *store.Container, c *opsv1.ContainerOperation)) error {
	step, err := r.handle.Write(f)
	if err == nil {
		r.failpoint(string(step))
	}
	return err
}

// failpoint is where a test may end or hold the process.
func (r *Container) failpoint(name string) { failpoint.Reach(r.kind.Name() + "." + name) }

// show changes the public state only.
func (r *Container) show(f func(c *opsv1.ContainerOperation)) { r.handle.Show(f) }

func (r *Container) warn(format string, args ...any) {
	msg := fmt.Sprintf(format, args...)
	r.log.Warn(msg)
	r.show(func(c *opsv1.ContainerOperation) { c.Warnings = append(c.Warnings, msg) })
}

// runGuarded is run, and ends the container's part of the operation if that panics.
func (r *Container) runGuarded(ctx context.Context) (ok bool) {
	err := guard.Try(r.log, func() error { ok = r.run(ctx); return nil })
	if err == nil {
		return ok
	}
	guard.Do(r.log, func() { r.giveUp(ctx, err) })
	return false
}

// run returns whether the container was restarted. When ctx ends it returns early and
// leaves the rest to the next process.
func (r *Container) run(ctx context.Context) bool {
	if r.rec().Step == store.StepDone {
		ok := r.status().GetPhase() == opsv1.Phase_PHASE_SUCCEEDED
		if !ok {
			r.kind.Failed() // the process before may not have come to that
		}
		return ok
	}
	err := guard.Try(r.log, func() error { return r.kind.Drive(ctx) })
	r.kind.Over(ctx.Err() != nil) // whatever is still to be done: kubelet is not kept waiting for it
	defer func() {
		r.old.exit.Close()
		r.switcher.leaveGate()
	}()
	var out *operation.Outcome
	var bug *guard.Panic
	switch {
	case err == nil:
		out = &operation.Outcome{Phase: opsv1.Phase_PHASE_SUCCEEDED}
	case errors.As(err, &out):
	case errors.As(err, &bug):
		out = operation.Failf(opsv1.ReasonInternalError, "%v", bug)
	case ctx.Err() != nil:
		return false
	default:
		out = operation.Failf(opsv1.ReasonRuntimeError, "%v", err)
	}
	if ctx.Err() != nil && out.Phase != opsv1.Phase_PHASE_SUCCEEDED && r.rec().Step != store.StepUndo {
		// The failure may be that of a call cut off by the shutdown.
		return false
	}
	if out.Phase != opsv1.Phase_PHASE_SUCCEEDED && !r.undoer.undo(ctx, out) {
		return false // a panic in there is the caller's
	}
	if r.claim != nil {
		if !r.room.Lower(ctx) {
			return false
		}
		r.stager.removeGate() // whichever process has made or opened it
		r.switcher.tellEnd(ctx)
	}
	if out.Phase == opsv1.Phase_PHASE_SUCCEEDED {
		r.kind.Succeeded()
	}
	r.end(out)
	if r.claim != nil {
		r.claim.Release()
	}
	if out.Phase != opsv1.Phase_PHASE_SUCCEEDED {
		r.kind.Failed()
	}
	return out.Phase == opsv1.Phase_PHASE_SUCCEEDED
}

// end writes how it ended, and with the last container how the operation did. Not so for a
// container of an upgrade that did not succeed: that cancels the others first.
func (r *Container) end(out *operation.Outcome) {
	if r.kind.IsJoint() && out.Phase != opsv1.Phase_PHASE_SUCCEEDED {
		r.writeEnd(out, r.handle.Write)
	} else {
		r.writeEnd(out, r.handle.End)
	}
}

// writeEnd writes how it ended, by write.
func (r *Container) writeEnd(
	out *operation.Outcome, write func(func(*store.Container, *opsv1.ContainerOperation)) (store.Step, error),
) {
	_, err := write(func(rec *store.Container, c *opsv1.ContainerOperation) {
		rec.Step = store.StepDone
		c.Phase, c.Reason, c.Message = out.Phase, out.Reason, out.Message
	})
	if err == nil {
		r.failpoint(string(store.StepDone))
	} else {
		r.log.WithError(err).Error("end of restart not written")
		r.handle.Set(func(rec *store.Container, _ *opsv1.ContainerOperation) { rec.Step = store.StepDone })
	}
	log := r.log.WithField("phase", out.Phase)
	if out.Reason != "" {
		log = log.WithFields(logrus.Fields{"reason": out.Reason, "message": out.Message})
	}
	log.Infof("container %s ended", r.kind.Name())
}

// drive takes the container through the steps. It returns nil on success, an
// [outcome], or the error of a call that was cut off.
func (d *restarter) Drive(ctx context.Context) error {
	ready := d.prepareSpecImage
	switch {
	case d.c.claim != nil:
		d.joins()
		ready = d.c.resume
	case d.c.image.Changes():
		ready = d.prepareImage
	}
	if err := ready(ctx); err != nil {
		return err
	}
	for {
		var err error
		switch s := d.c.rec().Step; s {
		case store.StepNone:
			if err = d.c.stager.stage(ctx); d.c.image.RevertStopped(err) {
				return nil
			}
		case store.StepStaged:
			if d.c.overlaps() {
				err = d.beforeOverlap(ctx)
			} else {
				err = d.beforeStop(ctx)
			}
		case store.StepStart:
			if err = d.c.switcher.overlap(ctx); err == nil {
				err = d.beforeStop(ctx)
			}
		case store.StepStop:
			err = d.c.switcher.swap(ctx)
		case store.StepStarted:
			return d.afterStart(ctx)
		case store.StepReveal: // resumed: kubelet has been shown both
			if c := d.c.status(); c.GetReason() != "" {
				return operation.Failf(c.GetReason(), "%s", c.GetMessage())
			}
			if !d.c.op.Rebooted() { // else the runtime's times are those of the reboot
				d.c.revealer.measure(ctx, d.c.rec())
			}
			if d.c.rec().Joined {
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

// resume readies what the journal has of the container for the next step.
func (r *Container) resume(ctx context.Context) error {
	if err := r.node.AwaitRuntime(ctx); err != nil {
		return err
	}
	if rec := r.rec(); rec.Step == store.StepUndo {
		c := r.status()
		out := &operation.Outcome{Phase: opsv1.Phase_PHASE_FAILED, Reason: c.GetReason(), Message: c.GetMessage()}
		if out.Reason == opsv1.ReasonCancelled {
			out.Phase = opsv1.Phase_PHASE_CANCELLED
		}
		return out
	}
	if err := r.outlived(ctx); err != nil {
		return err
	}
	if r.rec().Step == store.StepStage { // resumed: the successor may or may not exist; nothing was stopped
		if err := r.stager.removeStaged(ctx); err != nil {
			return err
		}
		r.stager.removeGate() // the next stage has a token and a gate of its own
		return r.write(func(rec *store.Container, _ *opsv1.ContainerOperation) { rec.Step = store.StepNone })
	}
	return nil
}

// outlived is an outcome if the pod's sandbox has not outlived the process that began the
// operation, with the machine perhaps: all containers have ended with it, and kubelet makes others
// in a new one. What has been shown to kubelet before is not undone by that.
func (r *Container) outlived(ctx context.Context) error {
	rec := r.rec()
	if !rec.Hidden() {
		return nil
	}
	if r.op.Rebooted() {
		return operation.Failf(opsv1.ReasonNodeRestarted,
			"the node was restarted in the middle of the %s, which ended all "+
				"containers: kubelet makes them anew, and the new container of this %s has not taken over",
			r.kind.Name(), r.kind.Name())
	}
	var st *runtimeapi.PodSandboxStatusResponse
	err := r.node.Retry(ctx, func() (err error) {
		st, err = r.node.Runtime.PodSandboxStatus(ctx, &runtimeapi.PodSandboxStatusRequest{PodSandboxId: rec.Sandbox})
		return err
	})
	if status.Code(err) == codes.NotFound || err == nil && st.GetStatus().
		GetState() != runtimeapi.PodSandboxState_SANDBOX_READY {
		return operation.Failf(opsv1.ReasonPodStopping, "the pod's sandbox has ended in the middle of the %s, and its "+
			"containers with it: the pod goes away, or kubelet makes them anew", r.kind.Name())
	}
	return nil // what the runtime cannot tell, the next step meets
}

// overlaps reports whether the successor runs before the incumbent is stopped.
func (r *Container) overlaps() bool {
	return r.spec.GetOrder() == opsv1.Order_ORDER_START_FIRST && !r.stopFirst
}

func (r *Container) status() *opsv1.ContainerOperation { return r.handle.Status() }

// takeSlot waits for the operation's turn on the slot.
func (r *Container) takeSlot(ctx context.Context) error {
	waiting, end := crinode.EndWith(ctx, r.op.Cancelled())
	defer end()
	defer r.kind.WantSlot()()
	r.queued = true
	if err := r.node.Lost.AwaitJudged(waiting); err != nil { // what an earlier process has left in the slot comes first
		if ctx.Err() == nil {
			return r.cancelledOutcome()
		}
		return err
	}
	if err := r.node.Lost.Refuse(r.slot()); err != nil {
		return err
	}
	claim, err := r.node.View.Claim(waiting, r.slot())
	switch {
	case err == nil:
		r.claim, r.queued = claim, false
		r.kind.Taken()
		return nil
	case ctx.Err() == nil:
		return r.cancelledOutcome()
	default:
		return err
	}
}

// dropSlot gives up the slot, in which the operation has made nothing.
func (r *Container) dropSlot() {
	r.claim.Release()
	r.claim = nil
}

func (r *Container) cancelledOutcome() *operation.Outcome {
	msg := r.op.Snapshot().GetMessage()
	if msg == "" {
		msg = "cancelled"
	}
	return &operation.Outcome{Phase: opsv1.Phase_PHASE_CANCELLED, Reason: opsv1.ReasonCancelled, Message: msg}
}

// interrupted returns an outcome if the operation was cancelled or kubelet took the slot back.
func (r *Container) interrupted() error {
	if y := r.claim.YieldedTo(); y != nil {
		return operation.Failf(opsv1.ReasonTakenBackByKubelet,
			"kubelet called %s in the middle of the %s and is in charge now",
			y.Method[strings.LastIndexByte(y.Method, '/')+1:], r.kind.Name())
	}
	select {
	case <-r.op.Cancelled(): // then it has not been committed, and never is
		return r.cancelledOutcome()
	default:
		return nil
	}
}
