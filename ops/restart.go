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
	"github.com/cri-proxy/cri-proxy/interceptors"
	"github.com/cri-proxy/cri-proxy/ops/cgroup"
	"github.com/cri-proxy/cri-proxy/ops/crinode"
	"github.com/cri-proxy/cri-proxy/ops/gate"
	"github.com/cri-proxy/cri-proxy/ops/guard"
	"github.com/cri-proxy/cri-proxy/ops/operation"
	"github.com/cri-proxy/cri-proxy/ops/store"
	"github.com/cri-proxy/cri-proxy/ops/switchover"
)

const (
	// hidePatience bounds the wait for answers that tell of containers and are on their way to
	// kubelet undecoded. Lists and statuses take milliseconds; if one takes this long the runtime
	// is in no state for a restart.
	hidePatience = 10 * time.Second
)

// giveUp ends the container's part of an operation after a panic at an unknown place, such as in the
// middle of undoing it.
func (r *restart) giveUp(ctx context.Context, why error) {
	rec := r.rec()
	if rec.Step != stepDone {
		r.writeEnd(failf(opsv1.ReasonInternalError, "%v", why), r.c.Write) // not the operation's: there is more to do
	}
	if r.claim != nil {
		r.node.Lost.Abandon(ctx, r.log, r.claim, r.o.Pod(), rec)
	}
	if r.up != nil {
		r.endOthers()
	}
	guard.Do(r.log, func() { r.lower(ctx) })
}

// restart is the restart of one container: a state machine over [step].
type restart struct {
	node  *Node
	o     *operation.Operation
	c     *operation.Container // of o, at i
	i     int
	want  *opsv1.ContainerRestart
	claim *interceptors.Claim
	log   logrus.FieldLogger

	incumbent *runtimeapi.ContainerStatus
	request   *runtimeapi.CreateContainerRequest // of the incumbent
	// applied is what the resources in request have become, with all that has been recorded up to recorded.
	applied, recorded *runtimeapi.LinuxContainerResources

	exit *switchover.Exit // of the incumbent; nil where there is none
	gate *gate.Gate       // of the successor, once it waits there
	pid  int              // of the process that waits there; 0 if this process cannot look at it
	held bool             // the successor has been started behind a gate that is not open
	// untouched is set while the step is stop and nothing has been stopped or started yet. Only the
	// process that has written the step knows.
	untouched bool

	// asked is when this process asked the incumbent to stop. From beside to besideUntil it had the
	// successor started beside the incumbent.
	asked, beside, besideUntil time.Time
	// pod is where the pod of a successor that waits at its gate is looked at; nil if that cannot be.
	pod *cgroup.Pod
	// shortSince is since when that pod has had too little memory, by each look.
	shortSince time.Time

	stopFirst bool // it was to be StartFirst and goes on otherwise; as in the record

	queued bool // it waits for the slot, or has ended doing so

	probes *time.Duration // for how long kubelet's probes of the successor are held; nil until that is known

	change *newImage // nil if the image stays
	up     *upgrade  // nil if it is no upgrade
	join   *join     // nil if it is one
}

func (e *Engine) newRestart(o *operation.Operation, i int) *restart {
	c := o.Container(i)
	want := c.Request()
	r := &restart{
		node: e.node, o: o, c: c, i: i, want: want, claim: c.Claim(), stopFirst: c.Record().StopFirst,
		log: e.log.WithFields(logrus.Fields{"op": o.UID(), "pod": o.PodName(), "container": want.GetName()}),
	}
	if upgrade := o.Upgrade(); upgrade != nil {
		r.up = newUpgrade()
		r.up.hurry = r.hurry
		r.change = &newImage{want: upgrade.GetContainers()[i]}
		return r
	}
	r.join = newJoin(r)
	if want.GetImage() != "" || want.GetRevertImage() {
		r.change = &newImage{want: &opsv1.ContainerUpgrade{
			Name: want.GetName(), Image: c.Status().GetImage(), PullPolicy: want.GetPullPolicy(),
		}}
	}
	return r
}

func (r *restart) rec() store.Container { return r.c.Record() }

// write is [operation.Container.Write], and a failpoint.
func (r *restart) write(f func(rec *containerRecord, c *opsv1.ContainerOperation)) error {
	step, err := r.c.Write(f)
	if err == nil {
		r.failpoint(string(step))
	}
	return err
}

// failpoint is where a test may end or hold the process.
func (r *restart) failpoint(name string) { failpoint(r.kind() + "." + name) }

// kind is restart or upgrade.
func (r *restart) kind() string {
	if r.up != nil {
		return "upgrade"
	}
	return "restart"
}

// show changes the public state only.
func (r *restart) show(f func(c *opsv1.ContainerOperation)) { r.c.Show(f) }

func (r *restart) warn(format string, args ...any) {
	msg := fmt.Sprintf(format, args...)
	r.log.Warn(msg)
	r.show(func(c *opsv1.ContainerOperation) { c.Warnings = append(c.Warnings, msg) })
}

// runGuarded is run, and ends the container's part of the operation if that panics.
func (r *restart) runGuarded(ctx context.Context) (ok bool) {
	err := guard.Try(r.log, func() error { ok = r.run(ctx); return nil })
	if err == nil {
		return ok
	}
	guard.Do(r.log, func() { r.giveUp(ctx, err) })
	return false
}

// run returns whether the container was restarted. When ctx ends it returns early and
// leaves the rest to the next process.
func (r *restart) run(ctx context.Context) bool {
	if r.rec().Step == stepDone {
		ok := r.container().GetPhase() == opsv1.Phase_PHASE_SUCCEEDED
		if r.up != nil && !ok {
			r.endOthers() // the process before may not have come to that
		}
		return ok
	}
	drive := r.drive
	if r.up != nil {
		drive = r.driveUpgrade
	}
	err := guard.Try(r.log, func() error { return drive(ctx) })
	if r.up != nil {
		close(r.up.over) // whatever is still to be done: kubelet is not kept waiting for it
	} else {
		r.join.end(ctx.Err() != nil)
	}
	defer func() {
		r.exit.Close()
		r.leaveGate()
	}()
	var out *outcome
	var bug *guard.Panic
	switch {
	case err == nil:
		out = &outcome{Phase: opsv1.Phase_PHASE_SUCCEEDED}
	case errors.As(err, &out):
	case errors.As(err, &bug):
		out = failf(opsv1.ReasonInternalError, "%v", bug)
	case ctx.Err() != nil:
		return false
	default:
		out = failf(opsv1.ReasonRuntimeError, "%v", err)
	}
	if ctx.Err() != nil && out.Phase != opsv1.Phase_PHASE_SUCCEEDED && r.rec().Step != stepUndo {
		// The failure may be that of a call cut off by the shutdown.
		return false
	}
	if out.Phase != opsv1.Phase_PHASE_SUCCEEDED && !r.undo(ctx, out) {
		return false // a panic in there is the caller's
	}
	if r.claim != nil {
		if !r.lower(ctx) {
			return false
		}
		r.removeGate() // whichever process has made or opened it
		r.tellEnd(ctx)
	}
	if r.up != nil && out.Phase == opsv1.Phase_PHASE_SUCCEEDED && r.rec().Method != opsv1.MethodKubelet {
		r.node.Overrides.Set(r.slot(), nil) // the image is that of the pod's spec
	}
	r.end(out)
	if r.claim != nil {
		r.claim.Release()
	}
	if r.up != nil && out.Phase != opsv1.Phase_PHASE_SUCCEEDED {
		r.endOthers()
	}
	return out.Phase == opsv1.Phase_PHASE_SUCCEEDED
}

// end writes how it ended, and with the last container how the operation did. Not so for a container of
// an upgrade that did not succeed: that cancels the others first.
func (r *restart) end(out *outcome) {
	if r.up != nil && out.Phase != opsv1.Phase_PHASE_SUCCEEDED {
		r.writeEnd(out, r.c.Write)
	} else {
		r.writeEnd(out, r.c.End)
	}
}

// writeEnd writes how it ended, by write.
func (r *restart) writeEnd(
	out *outcome, write func(func(*containerRecord, *opsv1.ContainerOperation)) (step, error),
) {
	_, err := write(func(rec *containerRecord, c *opsv1.ContainerOperation) {
		rec.Step = stepDone
		c.Phase, c.Reason, c.Message = out.Phase, out.Reason, out.Message
	})
	if err == nil {
		r.failpoint(string(stepDone))
	} else {
		r.log.WithError(err).Error("end of restart not written")
		r.c.Set(func(rec *containerRecord, _ *opsv1.ContainerOperation) { rec.Step = stepDone })
	}
	log := r.log.WithField("phase", out.Phase)
	if out.Reason != "" {
		log = log.WithFields(logrus.Fields{"reason": out.Reason, "message": out.Message})
	}
	log.Infof("container %s ended", r.kind())
}

// drive takes the container through the steps. It returns nil on success, an
// [outcome], or the error of a call that was cut off.
func (r *restart) drive(ctx context.Context) error {
	ready := r.prepareSpecImage
	switch {
	case r.claim != nil:
		r.joins()
		ready = r.resume
	case r.change != nil:
		ready = r.prepareImage
	}
	if err := ready(ctx); err != nil {
		return err
	}
	for {
		var err error
		switch s := r.rec().Step; s {
		case stepNone:
			if err = r.stage(ctx); r.revertStopped(err) {
				return nil
			}
		case stepStaged:
			if r.overlaps() {
				err = r.beforeOverlap(ctx)
			} else {
				err = r.beforeStop(ctx)
			}
		case stepStart:
			switch err = r.overlap(ctx); {
			case err == nil:
				err = r.beforeStop(ctx)
			case besideFails(err):
				err = r.giveUpOverlap(ctx, err)
			}
		case stepStop:
			err = r.swap(ctx)
		case stepStarted:
			return r.afterStart(ctx)
		case stepReveal: // resumed: kubelet has been shown both
			if c := r.container(); c.GetReason() != "" {
				return failf(c.GetReason(), "%s", c.GetMessage())
			}
			if !r.o.Rebooted() { // else the runtime's times are those of the reboot
				r.measure(ctx, r.rec())
			}
			if r.rec().Joined {
				return r.awaitRecreation(ctx)
			}
			return nil
		default:
			return failf(opsv1.ReasonJournalError, "the journal has the unknown step %q", s)
		}
		if err != nil {
			return err
		}
	}
}

// prepareSpecImage takes the slot once the image of the pod's spec is on the node.
func (r *restart) prepareSpecImage(ctx context.Context) error {
	if err := r.ensureImage(ctx); err != nil {
		return err
	}
	return r.takeSlot(ctx)
}

// resume readies what the journal has of the container for the next step.
func (r *restart) resume(ctx context.Context) error {
	if err := r.node.AwaitRuntime(ctx); err != nil {
		return err
	}
	if rec := r.rec(); rec.Step == stepUndo {
		c := r.container()
		out := &outcome{Phase: opsv1.Phase_PHASE_FAILED, Reason: c.GetReason(), Message: c.GetMessage()}
		if out.Reason == opsv1.ReasonCancelled {
			out.Phase = opsv1.Phase_PHASE_CANCELLED
		}
		return out
	}
	if err := r.outlived(ctx); err != nil {
		return err
	}
	if r.rec().Step == stepStage { // resumed: the successor may or may not exist; nothing was stopped
		if err := r.removeStaged(ctx); err != nil {
			return err
		}
		r.removeGate() // the next stage has a token and a gate of its own
		return r.write(func(rec *containerRecord, _ *opsv1.ContainerOperation) { rec.Step = stepNone })
	}
	return nil
}

// outlived is an outcome if the pod's sandbox has not outlived the process that began the operation, with the machine perhaps: all containers have ended
// with it, and kubelet makes others in a new one. What has been shown to kubelet before is not undone by that.
func (r *restart) outlived(ctx context.Context) error {
	rec := r.rec()
	if !rec.Hidden() {
		return nil
	}
	if r.o.Rebooted() {
		return failf(opsv1.ReasonNodeRestarted, "the node was restarted in the middle of the %s, which ended all "+
			"containers: kubelet makes them anew, and the new container of this %s has not taken over",
			r.kind(), r.kind())
	}
	var st *runtimeapi.PodSandboxStatusResponse
	err := r.node.Retry(ctx, func() (err error) {
		st, err = r.node.Runtime.PodSandboxStatus(ctx, &runtimeapi.PodSandboxStatusRequest{PodSandboxId: rec.Sandbox})
		return err
	})
	if status.Code(err) == codes.NotFound || err == nil && st.GetStatus().GetState() != runtimeapi.PodSandboxState_SANDBOX_READY {
		return failf(opsv1.ReasonPodStopping, "the pod's sandbox has ended in the middle of the %s, and its "+
			"containers with it: the pod goes away, or kubelet makes them anew", r.kind())
	}
	return nil // what the runtime cannot tell, the next step meets
}

// overlaps reports whether the successor runs before the incumbent is stopped.
func (r *restart) overlaps() bool {
	return r.want.GetOrder() == opsv1.Order_ORDER_START_FIRST && !r.stopFirst
}

func (r *restart) container() *opsv1.ContainerOperation { return r.c.Status() }

// takeSlot waits for the operation's turn on the slot.
func (r *restart) takeSlot(ctx context.Context) error {
	waiting, end := crinode.EndWith(ctx, r.o.Cancelled())
	defer end()
	if r.up == nil {
		defer r.wantSlot()()
	}
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
		if r.join != nil {
			r.joins()
		}
		return nil
	case ctx.Err() == nil:
		return r.cancelledOutcome()
	default:
		return err
	}
}

func (r *restart) cancelledOutcome() *outcome {
	msg := r.o.Snapshot().GetMessage()
	if msg == "" {
		msg = "cancelled"
	}
	return &outcome{Phase: opsv1.Phase_PHASE_CANCELLED, Reason: opsv1.ReasonCancelled, Message: msg}
}

// interrupted returns an outcome if the operation was cancelled or kubelet took the slot back.
func (r *restart) interrupted() error {
	if y := r.claim.YieldedTo(); y != nil {
		return failf(opsv1.ReasonTakenBackByKubelet, "kubelet called %s in the middle of the %s and is in charge now",
			y.Method[strings.LastIndexByte(y.Method, '/')+1:], r.kind())
	}
	select {
	case <-r.o.Cancelled(): // then it has not been committed, and never is
		return r.cancelledOutcome()
	default:
		return nil
	}
}
