// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package ops

import (
	"context"
	"fmt"
	"path/filepath"
	"sync"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	opsv1 "github.com/cri-proxy/cri-proxy/api/ops/v1"
	"github.com/cri-proxy/cri-proxy/ops/criclone"
	"github.com/cri-proxy/cri-proxy/ops/crinode"
	"github.com/cri-proxy/cri-proxy/ops/gate"
	"github.com/cri-proxy/cri-proxy/ops/guard"
)

// undo takes back what is hidden, so that kubelet's policy is in charge of what is left. It
// returns false if ctx ended before that was possible.
func (r *restart) undo(ctx context.Context, out *outcome) bool {
	rec := r.rec()
	if r.claim == nil || !rec.HoldsSlot() {
		return true
	}
	if rec.Step == stepReveal && (r.container().GetReason() != "" || r.up != nil && r.up.revealed || r.join != nil && r.join.isShown()) {
		return true // shown already
	}
	if out.Reason == opsv1.ReasonInternalError {
		serves, err := r.successorServes(ctx)
		if err != nil {
			return false
		}
		if serves {
			r.showServing(out)
			return true
		}
	}
	r.undoOverride()
	r.note(func(c *containerRecord, op *opsv1.ContainerOperation) {
		c.Step = stepUndo
		op.Reason, op.Message = out.Reason, out.Message
	})
	if (out.Reason == opsv1.ReasonStartFailed || out.Reason == opsv1.ReasonPostStartHookFailed) && r.up == nil {
		touched, err := r.incumbentStopped(ctx)
		if err != nil {
			return false
		}
		if touched {
			// Kubelet gets to see the attempt that failed, and why.
			if out.Reason == opsv1.ReasonPostStartHookFailed {
				r.stopSuccessor(ctx, rec.Successor)
			}
			r.note(func(c *containerRecord, _ *opsv1.ContainerOperation) { c.Step = stepReveal })
			r.claim.Reveal()
			r.removeGate()
			return true
		}
	}
	wait := 200 * time.Millisecond
	for {
		if rec.SuccessorMayRun() && !r.untouched { // ask it to stop
			r.stopSuccessor(ctx, rec.Successor)
		}
		err := r.removeStaged(ctx)
		if err == nil {
			r.claim.Discard()
			r.removeGate()
			return true
		}
		if ctx.Err() != nil {
			return false
		}
		r.log.WithError(err).Warn("staged container not removed; trying again")
		if crinode.Sleep(ctx, wait) != nil {
			return false
		}
		wait = min(2*wait, 5*time.Second)
	}
}

// successorServes reports whether the successor has taken over, whatever has come after that: the incumbent has ended, the successor runs and is past
// its gate, and kubelet has not taken the slot back. It asks until the runtime answers, or ctx ends.
func (r *restart) successorServes(ctx context.Context) (bool, error) {
	id := r.successor()
	if id == "" || r.held || r.claim.YieldedTo() != nil {
		return false, nil
	}
	if r.exit.Over() {
		if err := r.awaitExited(ctx, nil); err != nil {
			return false, err
		}
	} else if stopped, err := r.incumbentStopped(ctx); err != nil || !stopped {
		return false, err
	}
	for {
		st, info, err := r.node.Inspect(ctx, id)
		switch {
		case status.Code(err) == codes.NotFound:
			return false, nil
		case err == nil:
			return st.GetState() == runtimeapi.ContainerState_CONTAINER_RUNNING && !r.atGate(ctx, info.PID, id), nil
		}
		if err := crinode.Sleep(ctx, 200*time.Millisecond); err != nil {
			return false, err
		}
	}
}

// atGate reports whether a successor that runs may be waiting at its gate. One whose process cannot be looked at may, as long as there is a gate.
func (r *restart) atGate(ctx context.Context, pid int, id string) bool {
	if !r.node.Switchover.Gate(r.rec().Token).Exists() {
		return r.node.Switchover.GatesLost() && r.node.Switchover.StillWaits(ctx, pid, id)
	}
	return r.node.Switchover.OfContainer(pid, id) != nil || gate.Waiting(pid)
}

// showServing shows a successor that serves, although the operation has failed since it took over.
func (r *restart) showServing(out *outcome) {
	if r.change != nil && !r.change.changed {
		guard.Do(r.log, r.keepOverride) // it may be what has failed
	}
	r.note(func(c *containerRecord, op *opsv1.ContainerOperation) {
		c.Step = stepReveal
		op.Reason, op.Message = out.Reason, out.Message
	})
	r.claim.Reveal()
	r.removeGate()
}

// incumbentStopped asks until the runtime answers, or ctx ends.
func (r *restart) incumbentStopped(ctx context.Context) (bool, error) {
	for {
		runs, err := r.incumbentRuns(ctx)
		if err == nil {
			return !runs, nil
		}
		if err := crinode.Sleep(ctx, 200*time.Millisecond); err != nil {
			return false, err
		}
	}
}

// incumbentRuns reports whether the incumbent is still running; false if it is gone.
func (r *restart) incumbentRuns(ctx context.Context) (bool, error) {
	st, err := r.node.Runtime.ContainerStatus(ctx, &runtimeapi.ContainerStatusRequest{ContainerId: r.rec().Incumbent})
	if status.Code(err) == codes.NotFound {
		return false, nil
	}
	return st.GetStatus().GetState() == runtimeapi.ContainerState_CONTAINER_RUNNING, err
}

// removeGate removes the gate's files, if any.
func (r *restart) removeGate() {
	if err := r.node.Switchover.Gate(r.rec().Token).Remove(); err != nil {
		r.log.WithError(err).Warn("gate not removed")
	}
}

// stopSuccessor stops a successor that may have been started, within the grace of
// whoever took the slot back, or takes it back meanwhile.
func (r *restart) stopSuccessor(ctx context.Context, id string) {
	if id == "" {
		return
	}
	grace := crinode.MinGrace
	switch y := r.claim.YieldedTo(); {
	case r.held:
		// No application that would need time; and what waits there may be deaf to signals.
	case y != nil:
		grace = max(grace, time.Duration(y.Grace)*time.Second)
	case r.incumbent != nil && r.request != nil:
		r.stopUntilYield(ctx, id, max(grace, r.grace()))
		return
	}
	r.stopWithin(ctx, id, grace)
}

// stopUntilYield is stopWithin, but for a shorter grace once someone waits for the slot.
func (r *restart) stopUntilYield(ctx context.Context, id string, grace time.Duration) {
	stopped := make(chan struct{})
	var sooner sync.WaitGroup
	sooner.Go(func() {
		select {
		case <-r.claim.Yielded():
			guard.Do(r.log, func() {
				r.stopWithin(ctx, id, max(crinode.MinGrace, time.Duration(r.claim.YieldedTo().Grace)*time.Second))
			})
		case <-stopped:
		}
	})
	defer sooner.Wait()
	defer close(stopped)
	r.stopWithin(ctx, id, grace)
}

// stopWithin stops a container of ours.
func (r *restart) stopWithin(ctx context.Context, id string, grace time.Duration) {
	if err := r.node.StopWithin(ctx, id, grace); err != nil {
		r.log.WithError(err).Warn("new container not stopped")
	}
}

// removeStaged removes every container that carries the token.
func (r *restart) removeStaged(ctx context.Context) error {
	rec := r.rec()
	id, err := r.node.FindStaged(ctx, rec.Sandbox, rec.Token)
	if err != nil || id == "" {
		return err
	}
	return r.removeContainer(ctx, id)
}

// removeContainer removes a container that kubelet has not seen, and its traces: kubelet removes those of
// containers that it knows.
func (r *restart) removeContainer(ctx context.Context, id string) error {
	traces := r.traces(ctx, id)
	call, cancel := context.WithTimeout(context.WithoutCancel(ctx), crinode.CallTimeout)
	defer cancel()
	if _, err := r.node.Runtime.RemoveContainer(call, &runtimeapi.RemoveContainerRequest{ContainerId: id}); err != nil {
		return fmt.Errorf("removing container %s: %w", id, err)
	}
	r.node.Records.Removed(id)
	r.node.View.Forget(id)
	r.node.RemoveTraces(traces)
	return nil
}

// traces are the files that a start of the container has left on the node: the link for log shippers and the log. The log of a
// successor that ran beside its incumbent is kept: it says why the restart failed.
func (r *restart) traces(ctx context.Context, id string) []string {
	pod := r.o.Pod()
	files := []string{filepath.Join(r.node.LogLinks, criclone.LogLinkName(pod.GetName(), pod.GetNamespace(), r.want.GetName(), id))}
	if r.overlaps() {
		return files
	}
	st, err := r.node.Runtime.ContainerStatus(ctx, &runtimeapi.ContainerStatusRequest{ContainerId: id})
	if err != nil || st.GetStatus().GetLogPath() == "" {
		return files
	}
	return append(files, st.GetStatus().GetLogPath())
}
