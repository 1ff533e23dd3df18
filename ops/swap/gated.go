// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package swap

import (
	"context"
	"errors"
	"fmt"
	"time"

	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	opsv1 "github.com/cri-proxy/cri-proxy/api/ops/v1"
	"github.com/cri-proxy/cri-proxy/ops/crinode"
	"github.com/cri-proxy/cri-proxy/ops/gate"
	"github.com/cri-proxy/cri-proxy/ops/operation"
	"github.com/cri-proxy/cri-proxy/ops/store"
	"github.com/cri-proxy/cri-proxy/ops/switchover"
)

// errNoHook is the one failure of a gate that an application may notice: its successor has begun
// beside it.
var errNoHook = fmt.Errorf("%w: the runtime has not run the hook", gate.ErrNotHeld)

// Arm starts the successor up to its gate, while the incumbent serves. When the gate does not work
// for this container, it leaves a fresh successor without one.
func (s *Switcher) Arm(ctx context.Context) error {
	for {
		if err := s.c.Stager.EnsureStaged(ctx); err != nil {
			return err
		}
		rec := s.c.Record()
		if rec.Method != opsv1.MethodGate { // just now
			return nil
		}
		// In the middle of the stop, and in the next process, the successor may wait there already.
		if !s.held && s.c.Room.Unstarted(ctx) {
			if why := s.c.Room.RefuseGate(ctx); why != "" {
				if err := s.stopFirstFor(ctx, why); err != nil {
					return err
				}
				continue
			}
			s.beside = time.Now()
		}
		err := s.startGated(ctx, rec)
		s.besideUntil = time.Now()
		var out *operation.Outcome
		switch {
		case err == nil:
		case besideFails(err):
			if err := s.stopFirstFor(ctx,
				"the new container does not start beside the old one ("+err.Error()+")"); err != nil {
				return err
			}
			continue
		case errors.Is(err, gate.ErrNotHeld):
			s.c.Stager.dropGate(err)
			if err := s.c.Stager.stageAnew(ctx, ""); err != nil {
				return err
			}
			continue
		case !errors.As(err, &out) || out.Reason != opsv1.ReasonStartFailed || rec.Retried:
			return err // nothing has been stopped
		default:
			if err := s.c.Stager.stageAnew(ctx, out.Message); err != nil {
				return err
			}
			continue
		}
		if s.gate != nil {
			s.c.Failpoint("gated")
		}
		return nil
	}
}

// startGated starts the successor and waits until it waits at its gate, or finds it past that and
// the incumbent gone, as a process before this one may have left them. ErrNotHeld means that the
// gate does not hold it; it has been stopped then.
func (s *Switcher) startGated(ctx context.Context, rec store.Container) error {
	// A gate is opened in one step only, and what this process holds it has not opened.
	mayBeOpen := rec.Step == store.StepStop && !s.held
	if !s.c.Node.Switchover.Gate(rec.Token).Exists() {
		// Opened at the end of the incumbent, of which the runtime may be late to know; or given
		// up, and the container is one that nothing would hold.
		if gone, err := s.c.Old.awaitGone(ctx, switchover.HookTimeout); err != nil {
			return err
		} else if !gone || !mayBeOpen {
			s.c.Stager.StopWithin(ctx, rec.Successor, crinode.MinGrace)
			return gate.ErrNotHeld
		}
	}
	s.held = true
	if err := s.c.Node.StartOnce(ctx, rec.Successor); err != nil {
		return err
	}
	err := s.awaitGate(ctx, rec)
	if err == nil {
		if _, info, err := s.c.Node.Inspect(ctx, rec.Successor); err == nil &&
			s.c.Node.Switchover.OfContainer(info.PID, rec.Successor) == nil {
			s.pid = info.PID
		}
		if err := s.c.Stager.checkParts(ctx, rec); err != nil {
			s.c.Stager.StopWithin(ctx, rec.Successor, crinode.MinGrace)
			return err
		}
		return nil
	}
	if ctx.Err() != nil {
		return ctx.Err()
	}
	if err := s.c.Interrupted(); err != nil {
		return err
	}
	gone, gerr := s.c.Old.isGone(ctx)
	if gerr != nil {
		return gerr
	}
	if gone && mayBeOpen && errors.Is(err, gate.ErrNotHeld) {
		// A process before this one has opened the gate; or nothing can be said, and then the
		// successor is in the state that kubelet's policy is for.
		s.c.Log.WithError(err).Info("the successor is past its gate")
		s.held = false
		s.passed(ctx, rec)
		return nil
	}
	if errors.Is(err, errNoHook) {
		s.c.Node.Switchover.HookNotRun()
	}
	// It may run, beside the incumbent; or come to its gate when nobody waits for that any more.
	s.c.Stager.StopWithin(ctx, rec.Successor, crinode.MinGrace)
	if errors.Is(err, gate.ErrNotHeld) {
		return err
	}
	return fmt.Errorf("%w: it has not come there within %s", gate.ErrNotHeld, s.c.Node.Switchover.GateTimeout)
}

// passed says when the successor began if the process that opened its gate did not come to that: it
// did so when the incumbent ended.
func (s *Switcher) passed(ctx context.Context, rec store.Container) {
	if !s.c.Node.Records.Started(rec.Successor).IsZero() {
		return
	}
	st, err := s.c.Node.Runtime.ContainerStatus(ctx, &runtimeapi.ContainerStatusRequest{ContainerId: rec.Incumbent})
	if at := st.GetStatus().GetFinishedAt(); err == nil && at != 0 {
		s.c.Node.SetStarted(rec.Successor, time.Unix(0, at))
	}
}

// awaitGate waits until the successor waits at its gate. The error says why it does not.
func (s *Switcher) awaitGate(ctx context.Context, rec store.Container) error {
	g := s.c.Node.Switchover.Gate(rec.Token)
	ctx, cancel := context.WithTimeout(ctx, s.c.Node.Switchover.GateTimeout)
	defer cancel()
	ctx, end := crinode.EndWith(ctx, s.c.Claim.Yielded())
	defer end()
	began, asked := time.Now(), time.Now()
	err := g.Await(ctx, func() error {
		if time.Since(asked) < 100*time.Millisecond {
			return nil
		}
		asked = time.Now()
		st, info, err := s.c.Node.Inspect(ctx, rec.Successor)
		switch {
		case err != nil:
			return nil // the runtime may be restarting
		case st.GetState() != runtimeapi.ContainerState_CONTAINER_RUNNING:
			return fmt.Errorf("%w: it has ended with exit code %d: %s", gate.ErrNotHeld, st.GetExitCode(),
				st.GetMessage())
		case time.Since(began) > switchover.HookTimeout &&
			s.c.Node.Switchover.OfContainer(info.PID, rec.Successor) == nil && !gate.Waiting(info.PID):
			return errNoHook
		}
		return nil
	})
	if err == nil {
		s.leaveGate() // an upgrade's that has been held before
		s.gate = g
	}
	return err
}

// openGate lets the successor pass its gate.
func (s *Switcher) openGate(ctx context.Context) error {
	if s.gate == nil { // a process before this one has opened it
		return nil
	}
	waits, _ := gate.ProgramOf(s.pid) // none of a process that cannot be looked at
	if err := s.gate.Open(); err != nil {
		s.c.Stager.dropGate(err)
		if err := s.c.Stager.stageAnew(ctx, ""); err != nil {
			return err
		}
		return s.start(ctx)
	}
	s.held = false
	// The hook ends and the runtime's process, whatever its name is, executes the entrypoint: that
	// is the start of the application. Like the end of the old one it is the kernel's word, noticed
	// here. The runtime's own times are those of its bookkeeping.
	for opened := time.Now(); s.pid != 0 && time.Since(opened) < time.Second; {
		if now, err := gate.ProgramOf(s.pid); err != nil || now != waits ||
			crinode.Sleep(ctx, 100*time.Microsecond) != nil {
			break
		}
	}
	s.c.Node.SetStarted(s.c.Record().Successor, time.Now())
	if err := s.gate.Remove(); err != nil {
		s.c.Log.WithError(err).Warn("gate not removed")
	}
	s.gate = nil
	return nil
}

// leaveGate gives up a gate that is held: the hook goes on waiting, for the next process.
func (s *Switcher) leaveGate() {
	if s.gate != nil {
		s.gate.Leave()
		s.gate = nil
	}
}
