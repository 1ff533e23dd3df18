// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package ops

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/sirupsen/logrus"

	opsv1 "github.com/cri-proxy/cri-proxy/api/ops/v1"
	"github.com/cri-proxy/cri-proxy/interceptors/view"
	"github.com/cri-proxy/cri-proxy/ops/failpoint"
	"github.com/cri-proxy/cri-proxy/ops/guard"
	"github.com/cri-proxy/cri-proxy/ops/imagechange"
	"github.com/cri-proxy/cri-proxy/ops/operation"
	"github.com/cri-proxy/cri-proxy/ops/podsapi"
	"github.com/cri-proxy/cri-proxy/ops/room"
	"github.com/cri-proxy/cri-proxy/ops/store"
)

// What an upgrade does whose command does not say otherwise.
const (
	defaultPrepare = 30 * time.Minute
	defaultHold    = 10 * time.Minute
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
func newContainer(node *Node, o *operation.Operation, i int, kind func(*Container) Kind) *Container {
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
	r.kind = kind(r)
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

// note is [operation.Container.Note], and a failpoint.
func (r *Container) note(f func(rec *store.Container, c *opsv1.ContainerOperation)) {
	step, err := r.handle.Note(f)
	if err != nil {
		r.log.WithError(err).Error("step not written")
		return
	}
	r.failpoint(string(step))
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

// overlaps reports whether the successor runs before the incumbent is stopped.
func (r *Container) overlaps() bool {
	return r.spec.GetOrder() == opsv1.Order_ORDER_START_FIRST && !r.stopFirst
}

func (r *Container) status() *opsv1.ContainerOperation { return r.handle.Status() }

// askKubelet says why a stop is for another reason than the operation's, as far as kubelet tells;
// more is asked of a pod that does not go away.
func (r *Container) askKubelet(ctx context.Context, more func(ctx context.Context, pod *podsapi.Pod) string) string {
	if r.node.Pods == nil {
		return ""
	}
	ctx, cancel := context.WithTimeout(ctx, podsapi.Timeout)
	defer cancel()
	pod, err := r.node.Pods.Pod(ctx, r.op.Pod().GetUid())
	switch {
	case errors.Is(err, podsapi.ErrNotFound):
		return "kubelet has no such pod any more"
	case err != nil:
		return ""
	}
	if why := pod.Leaving(); why != "" {
		return why
	}
	return more(ctx, pod)
}

// successor is the ID of the new container; empty if there is none.
func (r *Container) successor() string { return r.rec().Successor }

// isCertain reports whether the successor of an upgrade is known to be what kubelet will ask for.
// If not, it begins only when kubelet has asked.
func (r *Container) isCertain() bool {
	return !r.kind.Adopted() || r.handle.IsCertain()
}
