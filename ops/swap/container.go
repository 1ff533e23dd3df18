// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package swap

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
	DefaultPrepare = 30 * time.Minute
	DefaultHold    = 10 * time.Minute
)

// GiveUp ends the container's part of an operation after a panic at an unknown place, such as in
// the middle of undoing it.
func (c *Container) GiveUp(ctx context.Context, why error) {
	rec := c.Record()
	if rec.Step != store.StepDone {
		// not the operation's: there is more to do
		c.writeEnd(operation.Failf(opsv1.ReasonInternalError, "%v", why), c.Handle.Write)
	}
	if c.Claim != nil {
		c.Node.Lost.Abandon(ctx, c.Log, c.Claim, c.Op.Pod(), rec)
	}
	c.kind.Failed()
	guard.Do(c.Log, func() { c.Room.Lower(ctx) })
}

// Container is the operation on one container: a state machine over [store.Step].
type Container struct {
	Node   *Node
	Op     *operation.Operation
	Handle *operation.Container // of op, at index
	index  int
	Spec   *opsv1.ContainerRestart
	Claim  *view.Claim
	Log    logrus.FieldLogger

	Old      *Incumbent
	Stager   *Stager
	Switcher *Switcher
	Revealer *Revealer
	undoer   *undoer

	Room  *room.Room
	Image *imagechange.Change

	stopFirst bool // it was to be StartFirst and goes on otherwise; as in the record

	queued bool // it waits for the slot, or has ended doing so

	kind Kind
}

// New has no side effects: one operation may have several on the same container.
func New(node *Node, o *operation.Operation, i int, kind func(*Container) Kind) *Container {
	handle := o.Container(i)
	spec := handle.Request()
	c := &Container{
		Node: node, Op: o, Handle: handle, index: i, Spec: spec, Claim: handle.Claim(),
		stopFirst: handle.Record().StopFirst,
		Log:       node.Log.WithFields(logrus.Fields{"op": o.UID(), "pod": o.PodName(), "container": spec.GetName()}),
	}
	c.Old, c.Stager, c.Switcher = &Incumbent{c: c}, &Stager{c}, &Switcher{c: c}
	c.Revealer, c.undoer = &Revealer{c: c}, &undoer{c}
	c.Room = node.Rooms.Of(room.Container{
		Operation: o, Index: i, Log: c.Log, Write: c.Write, Note: c.Note, Warn: c.Warn,
		Exited: func() bool { return c.Old.Exit.Over() }, Interrupted: c.Interrupted,
	})
	c.Image = node.Images.Of(imagechange.Container{
		Operation: o, Index: i, Log: c.Log, Warn: c.Warn, Failpoint: c.Failpoint,
	})
	c.kind = kind(c)
	return c
}

// Record returns a copy of the journal's part.
func (c *Container) Record() store.Container { return c.Handle.Record() }

// Write is [operation.Container.Write], and a failpoint.
func (c *Container) Write(f func(rec *store.Container, c *opsv1.ContainerOperation)) error {
	step, err := c.Handle.Write(f)
	if err == nil {
		c.Failpoint(string(step))
	}
	return err
}

// Note is [operation.Container.Note], and a failpoint.
func (c *Container) Note(f func(rec *store.Container, c *opsv1.ContainerOperation)) {
	step, err := c.Handle.Note(f)
	if err != nil {
		c.Log.WithError(err).Error("step not written")
		return
	}
	c.Failpoint(string(step))
}

// Failpoint is where a test may end or hold the process.
func (c *Container) Failpoint(name string) { failpoint.Reach(c.kind.Name() + "." + name) }

// Show changes the public state only.
func (c *Container) Show(f func(c *opsv1.ContainerOperation)) { c.Handle.Show(f) }

// Warn logs a warning and adds it to the public state.
func (c *Container) Warn(format string, args ...any) {
	msg := fmt.Sprintf(format, args...)
	c.Log.Warn(msg)
	c.Show(func(c *opsv1.ContainerOperation) { c.Warnings = append(c.Warnings, msg) })
}

// Run is run, and ends the container's part of the operation if that panics.
func (c *Container) Run(ctx context.Context) (ok bool) {
	err := guard.Try(c.Log, func() error { ok = c.carryOut(ctx); return nil })
	if err == nil {
		return ok
	}
	guard.Do(c.Log, func() { c.GiveUp(ctx, err) })
	return false
}

// carryOut returns whether the container was restarted. When ctx ends it returns early and
// leaves the rest to the next process.
func (c *Container) carryOut(ctx context.Context) bool {
	if c.Record().Step == store.StepDone {
		ok := c.Status().GetPhase() == opsv1.Phase_PHASE_SUCCEEDED
		if !ok {
			c.kind.Failed() // the process before may not have come to that
		}
		return ok
	}
	err := guard.Try(c.Log, func() error { return c.kind.Drive(ctx) })
	c.kind.Over(ctx.Err() != nil) // whatever is still to be done: kubelet is not kept waiting for it
	defer func() {
		c.Old.Exit.Close()
		c.Switcher.leaveGate()
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
	if ctx.Err() != nil && out.Phase != opsv1.Phase_PHASE_SUCCEEDED && c.Record().Step != store.StepUndo {
		// The failure may be that of a call cut off by the shutdown.
		return false
	}
	if out.Phase != opsv1.Phase_PHASE_SUCCEEDED && !c.undoer.undo(ctx, out) {
		return false // a panic in there is the caller's
	}
	if c.Claim != nil {
		if !c.Room.Lower(ctx) {
			return false
		}
		c.Stager.removeGate() // whichever process has made or opened it
		c.Switcher.tellEnd(ctx)
	}
	if out.Phase == opsv1.Phase_PHASE_SUCCEEDED {
		c.kind.Succeeded()
	}
	c.End(out)
	if c.Claim != nil {
		c.Claim.Release()
	}
	if out.Phase != opsv1.Phase_PHASE_SUCCEEDED {
		c.kind.Failed()
	}
	return out.Phase == opsv1.Phase_PHASE_SUCCEEDED
}

// End writes how it ended, and with the last container how the operation did. Not so for a
// container of an upgrade that did not succeed: that cancels the others first.
func (c *Container) End(out *operation.Outcome) {
	if c.kind.IsJoint() && out.Phase != opsv1.Phase_PHASE_SUCCEEDED {
		c.writeEnd(out, c.Handle.Write)
	} else {
		c.writeEnd(out, c.Handle.End)
	}
}

// writeEnd writes how it ended, by write.
func (c *Container) writeEnd(
	out *operation.Outcome, write func(func(*store.Container, *opsv1.ContainerOperation)) (store.Step, error),
) {
	_, err := write(func(rec *store.Container, c *opsv1.ContainerOperation) {
		rec.Step = store.StepDone
		c.Phase, c.Reason, c.Message = out.Phase, out.Reason, out.Message
	})
	if err == nil {
		c.Failpoint(string(store.StepDone))
	} else {
		c.Log.WithError(err).Error("end of restart not written")
		c.Handle.Set(func(rec *store.Container, _ *opsv1.ContainerOperation) { rec.Step = store.StepDone })
	}
	log := c.Log.WithField("phase", out.Phase)
	if out.Reason != "" {
		log = log.WithFields(logrus.Fields{"reason": out.Reason, "message": out.Message})
	}
	log.Infof("container %s ended", c.kind.Name())
}

// Overlaps reports whether the successor runs before the incumbent is stopped.
func (c *Container) Overlaps() bool {
	return c.Spec.GetOrder() == opsv1.Order_ORDER_START_FIRST && !c.stopFirst
}

// Status returns a copy of the public state.
func (c *Container) Status() *opsv1.ContainerOperation { return c.Handle.Status() }

// AskKubelet says why a stop is for another reason than the operation's, as far as kubelet tells;
// more is asked of a pod that does not go away.
func (c *Container) AskKubelet(ctx context.Context, more func(ctx context.Context, pod *podsapi.Pod) string) string {
	if c.Node.Pods == nil {
		return ""
	}
	ctx, cancel := context.WithTimeout(ctx, podsapi.Timeout)
	defer cancel()
	pod, err := c.Node.Pods.Pod(ctx, c.Op.Pod().GetUid())
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

// Successor is the ID of the new container; empty if there is none.
func (c *Container) Successor() string { return c.Record().Successor }

// IsCertain reports whether the successor of an upgrade is known to be what kubelet will ask for.
// If not, it begins only when kubelet has asked.
func (c *Container) IsCertain() bool {
	return !c.kind.Adopted() || c.Handle.IsCertain()
}
