// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package swap

import (
	"context"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	opsv1 "github.com/cri-proxy/cri-proxy/api/ops/v1"
	"github.com/cri-proxy/cri-proxy/ops/operation"
	"github.com/cri-proxy/cri-proxy/ops/store"
)

// Resume readies what the journal has of the container for the next step.
func (c *Container) Resume(ctx context.Context) error {
	if err := c.Node.AwaitRuntime(ctx); err != nil {
		return err
	}
	if rec := c.Record(); rec.Step == store.StepUndo {
		c := c.Status()
		out := &operation.Outcome{Phase: opsv1.Phase_PHASE_FAILED, Reason: c.GetReason(), Message: c.GetMessage()}
		if out.Reason == opsv1.ReasonCancelled {
			out.Phase = opsv1.Phase_PHASE_CANCELLED
		}
		return out
	}
	if err := c.outlived(ctx); err != nil {
		return err
	}
	if c.Record().Step == store.StepStage { // resumed: the successor may or may not exist; nothing was stopped
		if err := c.Stager.removeStaged(ctx); err != nil {
			return err
		}
		c.Stager.removeGate() // the next stage has a token and a gate of its own
		return c.Write(func(rec *store.Container, _ *opsv1.ContainerOperation) { rec.Step = store.StepNone })
	}
	return nil
}

// outlived is an outcome if the pod's sandbox has not outlived the process that began the
// operation, with the machine perhaps: all containers have ended with it, and kubelet makes others
// in a new one. What has been shown to kubelet before is not undone by that.
func (c *Container) outlived(ctx context.Context) error {
	rec := c.Record()
	if !rec.Hidden() {
		return nil
	}
	if c.Op.Rebooted() {
		return operation.Failf(opsv1.ReasonNodeRestarted,
			"the node was restarted in the middle of the %s, which ended all "+
				"containers: kubelet makes them anew, and the new container of this %s has not taken over",
			c.kind.Name(), c.kind.Name())
	}
	var st *runtimeapi.PodSandboxStatusResponse
	err := c.Node.Retry(ctx, func() (err error) {
		st, err = c.Node.Runtime.PodSandboxStatus(ctx, &runtimeapi.PodSandboxStatusRequest{PodSandboxId: rec.Sandbox})
		return err
	})
	if status.Code(err) == codes.NotFound || err == nil && st.GetStatus().
		GetState() != runtimeapi.PodSandboxState_SANDBOX_READY {
		return operation.Failf(opsv1.ReasonPodStopping, "the pod's sandbox has ended in the middle of the %s, and its "+
			"containers with it: the pod goes away, or kubelet makes them anew", c.kind.Name())
	}
	return nil // what the runtime cannot tell, the next step meets
}
