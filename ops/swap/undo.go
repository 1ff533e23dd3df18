// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package swap

import (
	"context"
	"sync"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	opsv1 "github.com/cri-proxy/cri-proxy/api/ops/v1"
	"github.com/cri-proxy/cri-proxy/ops/crinode"
	"github.com/cri-proxy/cri-proxy/ops/gate"
	"github.com/cri-proxy/cri-proxy/ops/guard"
	"github.com/cri-proxy/cri-proxy/ops/operation"
	"github.com/cri-proxy/cri-proxy/ops/store"
)

// undoer takes back what is hidden.
type undoer struct{ c *Container }

// undo takes back what is hidden, so that kubelet's policy is in charge of what is left. It
// returns false if ctx ended before that was possible.
func (u *undoer) undo(ctx context.Context, out *operation.Outcome) bool {
	rec := u.c.Record()
	if u.c.Claim == nil || !rec.HoldsSlot() {
		return true
	}
	if rec.Step == store.StepReveal && (u.c.Status().GetReason() != "" || u.c.kind.Revealed()) {
		return true // shown already
	}
	if out.Reason == opsv1.ReasonInternalError {
		serves, err := u.successorServes(ctx)
		if err != nil {
			return false
		}
		if serves {
			u.showServing(out)
			return true
		}
	}
	u.c.Image.Undo()
	u.c.Note(func(c *store.Container, op *opsv1.ContainerOperation) {
		c.Step = store.StepUndo
		op.Reason, op.Message = out.Reason, out.Message
	})
	if (out.Reason == opsv1.ReasonStartFailed || out.Reason == opsv1.ReasonPostStartHookFailed) && !u.c.kind.Adopted() {
		touched, err := u.c.Old.hasStopped(ctx)
		if err != nil {
			return false
		}
		if touched {
			// Kubelet gets to see the attempt that failed, and why.
			if out.Reason == opsv1.ReasonPostStartHookFailed {
				u.stopSuccessor(ctx, rec.Successor)
			}
			u.c.Note(func(c *store.Container, _ *opsv1.ContainerOperation) { c.Step = store.StepReveal })
			u.c.Claim.Reveal()
			u.c.Stager.removeGate()
			return true
		}
	}
	wait := 200 * time.Millisecond
	for {
		if rec.SuccessorMayRun() && !u.c.Switcher.untouched { // ask it to stop
			u.stopSuccessor(ctx, rec.Successor)
		}
		err := u.c.Stager.removeStaged(ctx)
		if err == nil {
			u.c.Claim.Discard()
			u.c.Stager.removeGate()
			return true
		}
		if ctx.Err() != nil {
			return false
		}
		u.c.Log.WithError(err).Warn("staged container not removed; trying again")
		if crinode.Sleep(ctx, wait) != nil {
			return false
		}
		wait = min(2*wait, 5*time.Second)
	}
}

// successorServes reports whether the successor has taken over, whatever has come after that: the
// incumbent has ended, the successor runs and is past its gate, and kubelet has not taken the slot
// back. It asks until the runtime answers, or ctx ends.
func (u *undoer) successorServes(ctx context.Context) (bool, error) {
	id := u.c.Successor()
	if id == "" || u.c.Switcher.held || u.c.Claim.YieldedTo() != nil {
		return false, nil
	}
	if u.c.Old.Exit.Over() {
		if err := u.c.Old.awaitExited(ctx, nil); err != nil {
			return false, err
		}
	} else if stopped, err := u.c.Old.hasStopped(ctx); err != nil || !stopped {
		return false, err
	}
	for {
		st, info, err := u.c.Node.Inspect(ctx, id)
		switch {
		case status.Code(err) == codes.NotFound:
			return false, nil
		case err == nil:
			return st.GetState() == runtimeapi.ContainerState_CONTAINER_RUNNING && !u.atGate(ctx, info.PID, id), nil
		}
		if err := crinode.Sleep(ctx, 200*time.Millisecond); err != nil {
			return false, err
		}
	}
}

// atGate reports whether a successor that runs may be waiting at its gate. One whose process cannot
// be looked at may, as long as there is a gate.
func (u *undoer) atGate(ctx context.Context, pid int, id string) bool {
	if !u.c.Node.Switchover.Gate(u.c.Record().Token).Exists() {
		return u.c.Node.Switchover.GatesLost() && u.c.Node.Switchover.StillWaits(ctx, pid, id)
	}
	return u.c.Node.Switchover.OfContainer(pid, id) != nil || gate.Waiting(pid)
}

// showServing shows a successor that serves, although the operation has failed since it took over.
func (u *undoer) showServing(out *operation.Outcome) {
	guard.Do(u.c.Log, u.c.Image.Keep) // it may be what has failed
	u.c.Note(func(c *store.Container, op *opsv1.ContainerOperation) {
		c.Step = store.StepReveal
		op.Reason, op.Message = out.Reason, out.Message
	})
	u.c.Claim.Reveal()
	u.c.Stager.removeGate()
}

// stopSuccessor stops a successor that may have been started, within the grace of
// whoever took the slot back, or takes it back meanwhile.
func (u *undoer) stopSuccessor(ctx context.Context, id string) {
	if id == "" {
		return
	}
	grace := crinode.MinGrace
	switch y := u.c.Claim.YieldedTo(); {
	case u.c.Switcher.held:
		// No application that would need time; and what waits there may be deaf to signals.
	case y != nil:
		grace = max(grace, time.Duration(y.Grace)*time.Second)
	case u.c.Old.Status != nil && u.c.Old.Request != nil:
		u.stopUntilYield(ctx, id, max(grace, u.c.Old.Grace()))
		return
	}
	u.c.Stager.StopWithin(ctx, id, grace)
}

// stopUntilYield is stopWithin, but for a shorter grace once someone waits for the slot.
func (u *undoer) stopUntilYield(ctx context.Context, id string, grace time.Duration) {
	stopped := make(chan struct{})
	var sooner sync.WaitGroup
	sooner.Go(func() {
		select {
		case <-u.c.Claim.Yielded():
			guard.Do(u.c.Log, func() {
				u.c.Stager.StopWithin(ctx, id,
					max(crinode.MinGrace, time.Duration(u.c.Claim.YieldedTo().Grace)*time.Second))
			})
		case <-stopped:
		}
	})
	defer sooner.Wait()
	defer close(stopped)
	u.c.Stager.StopWithin(ctx, id, grace)
}
