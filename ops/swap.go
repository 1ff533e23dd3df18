// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package ops

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	opsv1 "github.com/cri-proxy/cri-proxy/api/ops/v1"
	"github.com/cri-proxy/cri-proxy/ops/crinode"
	"github.com/cri-proxy/cri-proxy/ops/gate"
	"github.com/cri-proxy/cri-proxy/ops/guard"
	"github.com/cri-proxy/cri-proxy/ops/switchover"
)

// errNoHook is the one failure of a gate that an application may notice: its successor has begun beside it.
var errNoHook = fmt.Errorf("%w: the runtime has not run the hook", gate.ErrNotHeld)

// swap stops the incumbent and lets the successor run. It is the only part that the
// application notices, so nothing in it waits for the disk.
func (r *restart) swap(ctx context.Context) error {
	r.untouched = false
	if err := r.load(ctx); err != nil {
		return err
	}
	running, err := r.watchIncumbent(ctx)
	if err != nil {
		return err
	}
	by, began := r.rec().StopBy, time.Now()
	switch {
	case r.rec().Method == opsv1.MethodGate:
		err = r.arm(ctx)
	case r.overlaps() && running: // still so after the preStop hook, or in the next process?
		err = r.successorRuns(ctx, r.rec().Successor)
	}
	if err != nil {
		return err
	}
	if err := r.interrupted(); err != nil {
		return err
	}
	by = by.Add(time.Since(began)) // the incumbent's grace is for what it does, not for what we do
	r.asked = time.Now()
	stopped := make(chan error, 1)
	go func() {
		stopped <- guard.Try(r.log, func() error { return r.node.Stop(ctx, r.rec().Incumbent, by) })
	}() // ends with the call, which is waited for below
	gone := r.exit.Ended()
	if r.rec().Method == opsv1.MethodPlain {
		gone = nil
	}
	var stopErr error
	select {
	case <-gone:
		err = r.handOver(ctx)
		stopErr = <-stopped
	case err = <-stopped:
		if err == nil {
			err = r.handOver(ctx)
		}
	}
	if err == nil {
		err = r.awaitExited(ctx, stopErr)
	}
	if err != nil {
		return err
	}
	begun, err := r.hasBegun(ctx)
	if err != nil {
		return err
	}
	r.note(func(rec *containerRecord, c *opsv1.ContainerOperation) {
		rec.Step = stepStarted
		if !begun {
			rec.Step = stepAsk
		}
		c.Phase = opsv1.Phase_PHASE_STARTING
		c.SuccessorId = rec.Successor
	})
	return nil
}

// hasBegun reports whether the successor has begun, or may have. That of an upgrade has not if it is to wait for kubelet's request,
// unless a process before this one knew that it need not.
func (r *restart) hasBegun(ctx context.Context) (bool, error) {
	switch rec := r.rec(); {
	case r.isCertain() || r.overlaps():
		return true, nil
	case rec.Method == opsv1.MethodGate:
		return r.gate == nil, nil
	case rec.Successor == "":
		return false, nil
	default:
		var st *runtimeapi.ContainerStatusResponse
		err := r.node.Retry(ctx, func() (err error) {
			st, err = r.node.Runtime.ContainerStatus(ctx, &runtimeapi.ContainerStatusRequest{ContainerId: rec.Successor})
			return err
		})
		if err != nil {
			return false, failf(opsv1.ReasonRuntimeError, "reading the new container: %v", status.Convert(err).Message())
		}
		return st.GetStatus().GetState() != runtimeapi.ContainerState_CONTAINER_CREATED, nil
	}
}

// handOver lets the successor run, now that the incumbent's processes are gone.
func (r *restart) handOver(ctx context.Context) error {
	r.failpoint("stopped")
	if err := r.interrupted(); err != nil { // after the failpoint: a test takes the slot back while the restart waits there
		return err
	}
	var err error
	switch method := r.rec().Method; {
	case method == opsv1.MethodOverlap: // it does
	case !r.isCertain(): // it begins when kubelet has asked for it
		return nil
	case method == opsv1.MethodGate:
		err = r.openGate(ctx)
	default:
		err = r.start(ctx)
	}
	if err == nil && !r.overlaps() {
		r.failpoint("running")
	}
	return err
}

// exitPatience is how long a runtime that has answered a stop may take to show the container exited; kubelet may wait for that.
const exitPatience = 15 * time.Second

// awaitExited waits until the runtime knows what the kernel does: that the incumbent's process is gone. Until then both
// would be shown running. stopErr is why it does not know yet. Without one it may be late as well: containerd answers a stop at
// once when the process had ended before, and it is still clearing that away (internal/cri/server/container_stop.go).
func (r *restart) awaitExited(ctx context.Context, stopErr error) error {
	limit := exitPatience
	if stopErr != nil {
		limit = crinode.CallTimeout // it may be restarting
		r.log.WithError(stopErr).Warn("the container's process has ended, but the runtime did not say so")
	}
	deadline, cancel := context.WithTimeout(ctx, limit)
	defer cancel()
	waiting, end := crinode.EndWith(deadline, r.claim.Yielded())
	defer end()
	for wait := 5 * time.Millisecond; ; wait = min(2*wait, 100*time.Millisecond) {
		st, err := r.node.Runtime.ContainerStatus(deadline, &runtimeapi.ContainerStatusRequest{ContainerId: r.rec().Incumbent})
		if status.Code(err) == codes.NotFound || err == nil && st.GetStatus().GetState() != runtimeapi.ContainerState_CONTAINER_RUNNING {
			return nil
		}
		if crinode.Sleep(waiting, wait) == nil {
			continue
		}
		if ctx.Err() != nil {
			return ctx.Err()
		}
		if deadline.Err() != nil {
			why := "it shows it running"
			if e := cmp.Or(stopErr, err); e != nil {
				why = status.Convert(e).Message()
			}
			r.warn("the runtime did not say within %s that the old container has ended: %s", limit, why)
		}
		return nil // the successor serves; or kubelet has come, which is asked for before anything is shown
	}
}

// arm starts the successor up to its gate, while the incumbent serves. When the gate does not work for this
// container, it leaves a fresh successor without one.
func (r *restart) arm(ctx context.Context) error {
	for {
		if err := r.ensureStaged(ctx); err != nil {
			return err
		}
		rec := r.rec()
		if rec.Method != opsv1.MethodGate { // just now
			return nil
		}
		// In the middle of the stop, and in the next process, the successor may wait there already.
		if !r.held && r.unstarted(ctx) {
			if why := r.noRoomForGate(ctx); why != "" {
				if err := r.stopFirstFor(ctx, why); err != nil {
					return err
				}
				continue
			}
			r.beside = time.Now()
		}
		err := r.startGated(ctx, rec)
		r.besideUntil = time.Now()
		var out *outcome
		switch {
		case err == nil:
		case besideFails(err):
			if err := r.stopFirstFor(ctx, "the new container does not start beside the old one ("+err.Error()+")"); err != nil {
				return err
			}
			continue
		case errors.Is(err, gate.ErrNotHeld):
			r.dropGate(err)
			if err := r.stageAnew(ctx, ""); err != nil {
				return err
			}
			continue
		case !errors.As(err, &out) || out.Reason != opsv1.ReasonStartFailed || rec.Retried:
			return err // nothing has been stopped
		default:
			if err := r.stageAnew(ctx, out.Message); err != nil {
				return err
			}
			continue
		}
		if r.gate != nil {
			r.failpoint("gated")
		}
		return nil
	}
}

// startGated starts the successor and waits until it waits at its gate, or finds it past that and the incumbent gone, as a process
// before this one may have left them. ErrNotHeld means that the gate does not hold it; it has been stopped then.
func (r *restart) startGated(ctx context.Context, rec containerRecord) error {
	// A gate is opened in one step only, and what this process holds it has not opened.
	mayBeOpen := rec.Step == stepStop && !r.held
	if !r.node.Switchover.Gate(rec.Token).Exists() {
		// Opened at the end of the incumbent, of which the runtime may be late to know; or given up, and the
		// container is one that nothing would hold.
		if gone, err := r.awaitGone(ctx, switchover.HookTimeout); err != nil {
			return err
		} else if !gone || !mayBeOpen {
			r.stopWithin(ctx, rec.Successor, crinode.MinGrace)
			return gate.ErrNotHeld
		}
	}
	r.held = true
	if err := r.startOnce(ctx, rec.Successor); err != nil {
		return err
	}
	err := r.awaitGate(ctx, rec)
	if err == nil {
		if _, info, err := r.node.Inspect(ctx, rec.Successor); err == nil && r.node.Switchover.OfContainer(info.PID, rec.Successor) == nil {
			r.pid = info.PID
		}
		if err := r.checkParts(ctx, rec); err != nil {
			r.stopWithin(ctx, rec.Successor, crinode.MinGrace)
			return err
		}
		return nil
	}
	if ctx.Err() != nil {
		return ctx.Err()
	}
	if err := r.interrupted(); err != nil {
		return err
	}
	gone, gerr := r.incumbentGone(ctx)
	if gerr != nil {
		return gerr
	}
	if gone && mayBeOpen && errors.Is(err, gate.ErrNotHeld) {
		// A process before this one has opened the gate; or nothing can be said, and then the
		// successor is in the state that kubelet's policy is for.
		r.log.WithError(err).Info("the successor is past its gate")
		r.held = false
		r.passed(ctx, rec)
		return nil
	}
	if errors.Is(err, errNoHook) {
		r.node.Switchover.HookNotRun()
	}
	// It may run, beside the incumbent; or come to its gate when nobody waits for that any more.
	r.stopWithin(ctx, rec.Successor, crinode.MinGrace)
	if errors.Is(err, gate.ErrNotHeld) {
		return err
	}
	return fmt.Errorf("%w: it has not come there within %s", gate.ErrNotHeld, r.node.Switchover.GateTimeout)
}

// incumbentGone reports whether the incumbent's process has ended, by the kernel's word where there is one: the runtime's
// comes later.
func (r *restart) incumbentGone(ctx context.Context) (bool, error) {
	if r.exit.Over() {
		return true, nil
	}
	runs, err := r.incumbentRuns(ctx)
	if err != nil {
		return false, fmt.Errorf("asking for the old container: %w", err)
	}
	return !runs, nil
}

// awaitGone waits for the incumbent to be gone, for that long at most; it asks once more when that is over.
func (r *restart) awaitGone(ctx context.Context, patience time.Duration) (bool, error) {
	for until := time.Now().Add(patience); ; {
		last := time.Now().After(until)
		if gone, err := r.incumbentGone(ctx); gone || err != nil || last {
			return gone, err
		}
		if err := crinode.Sleep(ctx, 50*time.Millisecond); err != nil {
			return false, err
		}
	}
}

// passed says when the successor began if the process that opened its gate did not come to that: it did so
// when the incumbent ended.
func (r *restart) passed(ctx context.Context, rec containerRecord) {
	if !r.node.Records.Started(rec.Successor).IsZero() {
		return
	}
	st, err := r.node.Runtime.ContainerStatus(ctx, &runtimeapi.ContainerStatusRequest{ContainerId: rec.Incumbent})
	if at := st.GetStatus().GetFinishedAt(); err == nil && at != 0 {
		r.began(rec.Successor, time.Unix(0, at))
	}
}

// began notes when the application of the successor began.
func (r *restart) began(id string, at time.Time) { r.node.SetStarted(id, at) }

// awaitGate waits until the successor waits at its gate. The error says why it does not.
func (r *restart) awaitGate(ctx context.Context, rec containerRecord) error {
	g := r.node.Switchover.Gate(rec.Token)
	ctx, cancel := context.WithTimeout(ctx, r.node.Switchover.GateTimeout)
	defer cancel()
	ctx, end := crinode.EndWith(ctx, r.claim.Yielded())
	defer end()
	began, asked := time.Now(), time.Now()
	err := g.Await(ctx, func() error {
		if time.Since(asked) < 100*time.Millisecond {
			return nil
		}
		asked = time.Now()
		st, info, err := r.node.Inspect(ctx, rec.Successor)
		switch {
		case err != nil:
			return nil // the runtime may be restarting
		case st.GetState() != runtimeapi.ContainerState_CONTAINER_RUNNING:
			return fmt.Errorf("%w: it has ended with exit code %d: %s", gate.ErrNotHeld, st.GetExitCode(), st.GetMessage())
		case time.Since(began) > switchover.HookTimeout && r.node.Switchover.OfContainer(info.PID, rec.Successor) == nil && !gate.Waiting(info.PID):
			return errNoHook
		}
		return nil
	})
	if err == nil {
		r.leaveGate() // an upgrade's that has been held before
		r.gate = g
	}
	return err
}

// openGate lets the successor pass its gate.
func (r *restart) openGate(ctx context.Context) error {
	if r.gate == nil { // a process before this one has opened it
		return nil
	}
	waits, _ := gate.ProgramOf(r.pid) // none of a process that cannot be looked at
	if err := r.gate.Open(); err != nil {
		r.dropGate(err)
		if err := r.stageAnew(ctx, ""); err != nil {
			return err
		}
		return r.start(ctx)
	}
	r.held = false
	// The hook ends and the runtime's process, whatever its name is, executes the entrypoint: that is the start of the application. Like the end of
	// the old one it is the kernel's word, noticed here. The runtime's own times are those of its bookkeeping.
	for opened := time.Now(); r.pid != 0 && time.Since(opened) < time.Second; {
		if now, err := gate.ProgramOf(r.pid); err != nil || now != waits || crinode.Sleep(ctx, 100*time.Microsecond) != nil {
			break
		}
	}
	r.began(r.rec().Successor, time.Now())
	if err := r.gate.Remove(); err != nil {
		r.log.WithError(err).Warn("gate not removed")
	}
	r.gate = nil
	return nil
}

// leaveGate gives up a gate that is held: the hook goes on waiting, for the next process.
func (r *restart) leaveGate() {
	if r.gate != nil {
		r.gate.Leave()
		r.gate = nil
	}
}

// ensureStaged creates the successor if there is none.
func (r *restart) ensureStaged(ctx context.Context) error {
	rec := r.rec()
	if rec.Successor != "" {
		return nil
	}
	id, err := r.node.FindStaged(ctx, rec.Sandbox, rec.Token)
	if err != nil {
		return err
	}
	if id == "" {
		if id, err = r.create(ctx, rec.Token); err != nil {
			return err
		}
	}
	// On disk with the next step; until then the token finds the successor.
	r.c.Set(func(c *containerRecord, _ *opsv1.ContainerOperation) { c.Successor = id })
	r.claim.Staged(id)
	return nil
}

// stageAnew removes the successor, so that the next ensureStaged makes a fresh one. why is what was wrong with
// the container itself; that is tried once.
func (r *restart) stageAnew(ctx context.Context, why string) error {
	if why != "" {
		r.log.WithField("message", why).Warn("the new container did not start; trying once more from a fresh one")
	}
	rec := r.rec()
	token := r.node.Tokens.New()
	if err := r.removeContainer(ctx, rec.Successor); err != nil {
		return err
	}
	if err := r.node.Switchover.Gate(rec.Token).Remove(); err != nil {
		r.log.WithError(err).Warn("gate not removed")
	}
	r.claim.HideNow(token)
	r.claim.Staged("")
	return r.write(func(c *containerRecord, op *opsv1.ContainerOperation) {
		c.Token, c.Successor = token, ""
		if why != "" {
			c.Retried = true
			op.Warnings = append(op.Warnings, why)
		}
	})
}

// start starts the successor; once, from a fresh stage, if that fails.
func (r *restart) start(ctx context.Context) error {
	for {
		if err := r.ensureStaged(ctx); err != nil {
			return err
		}
		rec := r.rec()
		err := r.startOnce(ctx, rec.Successor)
		if err == nil {
			return nil
		}
		var out *outcome
		if !errors.As(err, &out) || rec.Retried || r.overlaps() && besideFails(err) {
			return err
		}
		if err := r.stageAnew(ctx, out.Message); err != nil {
			return err
		}
	}
}

// startOnce starts the container, whatever state a crash or a runtime restart left it in.
func (r *restart) startOnce(ctx context.Context, id string) error {
	return r.node.StartOnce(ctx, id)
}
