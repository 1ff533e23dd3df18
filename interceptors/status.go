// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package interceptors

import (
	"context"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/cri-proxy/cri-proxy/interceptors/view"
	"github.com/cri-proxy/cri-proxy/proxy"
)

// containerStatus does not know hidden containers, shows masked ones running, and corrects the
// start of a container that was held at a gate or whose probes are held.
func (a *answers) containerStatus(ctx context.Context, _ string, raw []byte, next proxy.UnaryNext) ([]byte, error) {
	req, err := decode(raw, &runtimeapi.ContainerStatusRequest{})
	if err != nil {
		return nil, err
	}
	snapshot := a.snapshot(ctx)
	defer snapshot.End()
	successor := a.view.Unacknowledged(req.GetContainerId())
	b, err := next(ctx, raw)
	if err != nil {
		return nil, err
	}
	m, err := decode(b, &runtimeapi.ContainerStatusResponse{})
	if err != nil {
		return nil, err
	}
	a.view.AckStatus(m.GetStatus().GetId())
	changed := false
	switch how := snapshot.judge(m.GetStatus().GetId(), m.GetStatus().GetAnnotations()); {
	case how == view.Hidden:
		return nil, notFound(req.GetContainerId())
	case how == view.Masked || successor != "" && !a.lost(ctx, successor, next):
		did(ctx, didMask)
		showRunning(m.GetStatus())
		changed = true
	}
	if snapshot.correct(m.GetStatus()) {
		changed = true
	}
	if !changed {
		return b, nil
	}
	return encode(m)
}

// lost reports whether a container that has been revealed is gone without anybody having said so:
// then nobody will ever ask for its status. next asks the runtime for that.
func (a *answers) lost(ctx context.Context, id string, next proxy.UnaryNext) bool {
	raw, err := encode(&runtimeapi.ContainerStatusRequest{ContainerId: id})
	if err != nil {
		return false
	}
	if _, err := next(ctx, raw); status.Code(err) != codes.NotFound {
		return false
	}
	a.view.Forget(id)
	return true
}

// podSandboxStatus filters the container statuses that evented PLEG reads from it. With this call
// kubelet begins to look at all of a pod.
func (a *answers) podSandboxStatus(ctx context.Context, _ string, raw []byte, next proxy.UnaryNext) ([]byte, error) {
	req, err := decode(raw, &runtimeapi.PodSandboxStatusRequest{})
	if err != nil {
		return nil, err
	}
	a.view.AckSandboxStatus(req.GetPodSandboxId())
	snapshot := a.snapshot(ctx)
	defer snapshot.End()
	return forward(ctx, raw, next, &runtimeapi.PodSandboxStatusResponse{},
		func(m *runtimeapi.PodSandboxStatusResponse) {
			m.ContainersStatuses = snapshot.showStatuses(m.ContainersStatuses)
		})
}

// showStatuses drops what is hidden and shows masked ones running.
func (s *snapshot) showStatuses(list []*runtimeapi.ContainerStatus) []*runtimeapi.ContainerStatus {
	return without(list, func(c *runtimeapi.ContainerStatus) bool {
		switch s.judge(c.GetId(), c.GetAnnotations()) {
		case view.Hidden:
			return true
		case view.Masked:
			showRunning(c)
		}
		s.correct(c)
		return false
	})
}

// showRunning makes a status that of a running container.
func showRunning(s *runtimeapi.ContainerStatus) {
	if s.GetState() == runtimeapi.ContainerState_CONTAINER_RUNNING {
		return
	}
	s.State = runtimeapi.ContainerState_CONTAINER_RUNNING
	s.FinishedAt = 0
	s.ExitCode = 0
	s.Reason = ""
	s.Message = ""
}
