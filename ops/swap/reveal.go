// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package swap

import (
	"context"
	"time"

	"google.golang.org/protobuf/types/known/durationpb"
	"google.golang.org/protobuf/types/known/timestamppb"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	opsv1 "github.com/cri-proxy/cri-proxy/api/ops/v1"
	"github.com/cri-proxy/cri-proxy/ops/crinode"
	"github.com/cri-proxy/cri-proxy/ops/operation"
	"github.com/cri-proxy/cri-proxy/ops/store"
)

// Revealer shows the successor to kubelet.
type Revealer struct {
	c      *Container
	probes *time.Duration // for how long kubelet's probes of the successor are held; nil until that is known
}

// PostStart runs the postStart hook, if there is one that has not been run.
func (v *Revealer) PostStart(ctx context.Context) error {
	rec, hook := v.c.Record(), v.c.Spec.GetPostStart()
	switch {
	case hook == nil || rec.PostDone:
		return nil
	case rec.PostStarted: // resumed
		v.c.Warn("cri-proxy was restarted while the postStart hook ran: how it ended is not known, and it is " +
			"not run again")
		v.c.Note(func(c *store.Container, _ *opsv1.ContainerOperation) { c.PostDone = true })
		return nil
	}
	v.c.Note(func(c *store.Container, _ *opsv1.ContainerOperation) { c.PostStarted = true })
	if err := v.postStart(ctx, hook, rec); err != nil {
		return err
	}
	v.c.Note(func(c *store.Container, _ *opsv1.ContainerOperation) { c.PostDone = true })
	return nil
}

// postStart runs the hook. As in kubelet, the container is not shown before it has
// ended, and is stopped when it fails (kuberuntime_container.go startContainer).
func (v *Revealer) postStart(ctx context.Context, hook *opsv1.Hook, rec store.Container) error {
	call, end := crinode.EndWith(ctx, v.c.Claim.Yielded())
	defer end()
	err := v.c.Node.Hooks.Run(call, hook, rec.Successor, rec.Sandbox)
	if err == nil || call.Err() != nil {
		return ctx.Err()
	}
	return operation.Failf(opsv1.ReasonPostStartHookFailed,
		"postStart hook failed and the new container was stopped: %v", err)
}

// Measure fills in what the runtime reports of the swap.
func (v *Revealer) Measure(ctx context.Context, rec store.Container) {
	before, err := v.c.Node.Runtime.ContainerStatus(ctx, &runtimeapi.ContainerStatusRequest{ContainerId: rec.Incumbent})
	if err != nil {
		return
	}
	after, err := v.c.Node.Runtime.ContainerStatus(ctx, &runtimeapi.ContainerStatusRequest{ContainerId: rec.Successor})
	if err != nil {
		return
	}
	stopped, started := time.Unix(0, before.GetStatus().GetFinishedAt()), time.Unix(0, after.GetStatus().GetStartedAt())
	if v.c.Old.Exit.Over() {
		stopped = v.c.Old.Exit.At() // the runtime's own is that of its next start if it was away
	}
	if at := v.c.Node.Records.Started(rec.Successor); !at.IsZero() {
		started = at
	}
	if !v.c.Overlaps() && started.Before(stopped) {
		stopped = started // the end is noticed in two places, and what waits for it may have been the faster one
	}
	v.c.Show(func(c *opsv1.ContainerOperation) {
		c.ExitCode = before.GetStatus().GetExitCode()
		c.StopTime, c.StartTime = timestamppb.New(stopped), timestamppb.New(started)
		c.Gap = durationpb.New(started.Sub(stopped)) // negative for overlap
	})
	v.c.Node.Metrics.Gap.WithLabelValues(v.c.Op.Kind(), rec.Method).Observe(max(0, started.Sub(stopped).Seconds()))
}
