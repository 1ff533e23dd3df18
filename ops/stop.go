// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package ops

import (
	"context"
	"errors"
	"strconv"
	"time"

	"google.golang.org/grpc/status"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	opsv1 "github.com/cri-proxy/cri-proxy/api/ops/v1"
	"github.com/cri-proxy/cri-proxy/ops/criclone"
	"github.com/cri-proxy/cri-proxy/ops/crinode"
	"github.com/cri-proxy/cri-proxy/ops/hooks"
)

// beforeStop masks the incumbent and runs its preStop hook, if there is one. The point of no return
// is on disk before the hook runs: the next process neither grants the grace period anew nor lets
// anyone cancel. Without a hook, the same write has the step stop. From then on kubelet's own stops
// join.
func (r *restart) beforeStop(ctx context.Context) error {
	if err := r.load(ctx); err != nil {
		return err
	}
	rec := r.rec()
	resumed := !rec.StopBy.IsZero() // it is written after the commit
	r.claim.Mask()
	// From the mask on, an exit of the incumbent is ours to handle; one from before is kubelet's, unless
	// the successor runs already.
	running, err := r.watchIncumbent(ctx)
	if err != nil {
		return err
	}
	if !resumed {
		if err := r.interrupted(); err != nil { // before anything is said of an incumbent that kubelet has stopped
			return err
		}
		if !running && !r.overlaps() {
			return r.stoppedByItself(ctx)
		}
		if !r.o.PassPointOfNoReturn() {
			return r.cancelledOutcome()
		}
	}
	grace := r.grace()
	var hook *opsv1.Hook
	if running {
		hook = r.preStopHook(grace)
	}
	if rec.StopBy.IsZero() {
		rec.StopBy = time.Now().Add(grace)
		r.join.listen(rec.StopBy)
		err := r.write(func(c *containerRecord, op *opsv1.ContainerOperation) {
			c.StopBy, op.Phase = rec.StopBy, opsv1.Phase_PHASE_STOPPING
			if hook == nil {
				c.Step = stepStop
			}
		})
		if err != nil {
			return err
		}
		r.untouched = hook == nil && !rec.SuccessorMayRun()
	}
	r.probeHold(ctx)
	if hook != nil {
		r.runPreStop(ctx, hook, grace, rec.StopBy)
	}
	if ctx.Err() != nil {
		return ctx.Err()
	}
	if err := r.interrupted(); err != nil {
		return err
	}
	if r.rec().Step == stepStop {
		return nil
	}
	return r.write(func(c *containerRecord, _ *opsv1.ContainerOperation) { c.Step = stepStop })
}

// watchIncumbent finds out whether the incumbent runs and watches its process where that says something.
func (r *restart) watchIncumbent(ctx context.Context) (running bool, err error) {
	rec := r.rec()
	if r.exit != nil {
		return !r.exit.Over(), nil
	}
	st, info, err := r.inspectIncumbent(ctx)
	if err != nil {
		return false, err
	}
	if st.GetState() != runtimeapi.ContainerState_CONTAINER_RUNNING {
		return false, nil
	}
	if info.PID > 0 && r.ownPIDs() && r.node.Switchover.Maybe(opsv1.MethodPidfd) {
		if r.exit, err = r.node.Switchover.Watch(info.PID, rec.Incumbent); err != nil {
			r.log.WithError(err).Warn("process not watched")
			if rec.Method == opsv1.MethodPidfd {
				r.setMethod(opsv1.MethodPlain)
			}
		}
	}
	return true, nil
}

// stoppedByItself is the outcome of a restart whose container is gone already.
func (r *restart) stoppedByItself(ctx context.Context) error {
	code := int32(0)
	if st, _, err := r.node.Inspect(ctx, r.rec().Incumbent); err == nil {
		code = st.GetExitCode()
	}
	return failf(opsv1.ReasonContainerNotRunning, "container %q stopped by itself (exit code %d) before the "+
		"restart began; kubelet handles it", r.want.GetName(), code)
}

// grace is what preStop and stop may take together, before the floor for the stop.
func (r *restart) grace() time.Duration {
	if r.want.GracePeriodSeconds != nil {
		return time.Duration(r.want.GetGracePeriodSeconds()) * time.Second
	}
	for _, a := range []map[string]string{r.incumbent.GetAnnotations(), r.request.GetConfig().GetAnnotations()} {
		if s, err := strconv.ParseInt(a[criclone.AnnotationTerminationGrace], 10, 32); err == nil && s >= 0 {
			return time.Duration(s) * time.Second
		}
	}
	return crinode.DefaultGrace
}

// preStopHook returns the hook that is to run before the stop; nil for none. As in kubelet, no grace
// means no hook.
func (r *restart) preStopHook(grace time.Duration) *opsv1.Hook {
	hook := r.want.GetPreStop()
	if hook == nil {
		var err error
		if hook, err = hooks.RecordedPreStop(r.incumbent.GetAnnotations()); err != nil {
			r.preStopFailed("preStop: %v", err)
		}
	}
	if grace <= 0 {
		return nil
	}
	return hook
}

// runPreStop runs the hook within the grace. As in kubelet, its failure does not keep the container
// from being stopped.
func (r *restart) runPreStop(ctx context.Context, hook *opsv1.Hook, grace time.Duration, by time.Time) {
	ctx, cancel := context.WithDeadline(ctx, by)
	defer cancel()
	ctx, end := crinode.EndWith(ctx, r.claim.Yielded())
	defer end()
	ctx, end = crinode.EndWith(ctx, r.join.sooner)
	defer end()
	if gone := r.exit.Ended(); gone != nil {
		ctx, end = crinode.EndWith(ctx, gone) // nobody left to run it in
		defer end()
	}
	rec := r.rec()
	if err := r.node.Hooks.Run(ctx, hook, rec.Incumbent, rec.Sandbox); err != nil && ctx.Err() == nil {
		r.preStopFailed("preStop hook failed: %v", err)
	} else if errors.Is(ctx.Err(), context.DeadlineExceeded) {
		r.preStopFailed("preStop hook did not end within the grace period of %s", grace)
	}
}

// preStopFailed warns of a preStop hook that could not be run, failed, or took too long. The warning
// begins with "preStop".
func (r *restart) preStopFailed(format string, args ...any) {
	r.show(func(c *opsv1.ContainerOperation) { c.PreStopFailed = true })
	r.warn(format, args...)
}

// inspectIncumbent is inspect of the incumbent, which waits for a runtime that is away.
func (r *restart) inspectIncumbent(ctx context.Context) (st *runtimeapi.ContainerStatus, info crinode.Info, err error) {
	id := r.rec().Incumbent
	err = r.node.Retry(ctx, func() (err error) {
		st, info, err = r.node.Inspect(ctx, id)
		return err
	})
	if err != nil {
		return nil, info, failf(opsv1.ReasonRuntimeError, "reading container %s: %v", id, status.Convert(err).Message())
	}
	return st, info, nil
}
