// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package ops

import (
	"context"
	"time"

	"google.golang.org/protobuf/types/known/durationpb"
	"google.golang.org/protobuf/types/known/timestamppb"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	opsv1 "github.com/cri-proxy/cri-proxy/api/ops/v1"
	"github.com/cri-proxy/cri-proxy/ops/crinode"
)

// afterStart runs postStart and reveals.
func (r *restart) afterStart(ctx context.Context) error {
	rec := r.rec()
	r.logLink(ctx, rec.Successor)
	if err := r.postStartOnce(ctx); err != nil {
		return err
	}
	if err := r.interrupted(); err != nil {
		return err
	}
	r.keepOverride()
	r.holdProbes(ctx)
	r.note(func(c *containerRecord, op *opsv1.ContainerOperation) {
		c.Step = stepReveal
		op.Phase = opsv1.Phase_PHASE_REVEALING
	})
	if !r.claim.TryReveal() {
		return r.interrupted()
	}
	joined := r.join.show()
	r.failpoint("revealed")
	r.measure(ctx, rec)
	if joined {
		return r.awaitRecreation(ctx)
	}
	return nil
}

// postStartOnce runs the postStart hook, if there is one that has not been run.
func (r *restart) postStartOnce(ctx context.Context) error {
	rec, hook := r.rec(), r.want.GetPostStart()
	switch {
	case hook == nil || rec.PostDone:
		return nil
	case rec.PostStarted: // resumed
		r.warn("cri-proxy was restarted while the postStart hook ran: how it ended is not known, and it is not run again")
		r.note(func(c *containerRecord, _ *opsv1.ContainerOperation) { c.PostDone = true })
		return nil
	}
	r.note(func(c *containerRecord, _ *opsv1.ContainerOperation) { c.PostStarted = true })
	if err := r.postStart(ctx, hook, rec); err != nil {
		return err
	}
	r.note(func(c *containerRecord, _ *opsv1.ContainerOperation) { c.PostDone = true })
	return nil
}

// note is [operation.Container.Note], and a failpoint.
func (r *restart) note(f func(rec *containerRecord, c *opsv1.ContainerOperation)) {
	step, err := r.c.Note(f)
	if err != nil {
		r.log.WithError(err).Error("step not written")
		return
	}
	r.failpoint(string(step))
}

// postStart runs the hook. As in kubelet, the container is not shown before it has
// ended, and is stopped when it fails (kuberuntime_container.go startContainer).
func (r *restart) postStart(ctx context.Context, hook *opsv1.Hook, rec containerRecord) error {
	call, end := crinode.EndWith(ctx, r.claim.Yielded())
	defer end()
	err := r.node.Hooks.Run(call, hook, rec.Successor, rec.Sandbox)
	if err == nil || call.Err() != nil {
		return ctx.Err()
	}
	return failf(opsv1.ReasonPostStartHookFailed, "postStart hook failed and the new container was stopped: %v", err)
}

// measure fills in what the runtime reports of the swap.
func (r *restart) measure(ctx context.Context, rec containerRecord) {
	before, err := r.node.Runtime.ContainerStatus(ctx, &runtimeapi.ContainerStatusRequest{ContainerId: rec.Incumbent})
	if err != nil {
		return
	}
	after, err := r.node.Runtime.ContainerStatus(ctx, &runtimeapi.ContainerStatusRequest{ContainerId: rec.Successor})
	if err != nil {
		return
	}
	stopped, started := time.Unix(0, before.GetStatus().GetFinishedAt()), time.Unix(0, after.GetStatus().GetStartedAt())
	if r.exit.Over() {
		stopped = r.exit.At() // the runtime's own is that of its next start if it was away
	}
	if at := r.node.Records.Started(rec.Successor); !at.IsZero() {
		started = at
	}
	if !r.overlaps() && started.Before(stopped) {
		stopped = started // the end is noticed in two places, and what waits for it may have been the faster one
	}
	r.show(func(c *opsv1.ContainerOperation) {
		c.ExitCode = before.GetStatus().GetExitCode()
		c.StopTime, c.StartTime = timestamppb.New(stopped), timestamppb.New(started)
		c.Gap = durationpb.New(started.Sub(stopped)) // negative for overlap
	})
	r.node.Metrics.Gap.WithLabelValues(r.o.Kind(), rec.Method).Observe(max(0, started.Sub(stopped).Seconds()))
}
