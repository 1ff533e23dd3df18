// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package interceptors

import (
	"context"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/cri-proxy/cri-proxy/proxy"
)

// containerStatus does not know hidden containers, shows masked ones running, and tells when a container that had been
// held at a gate really began, or one whose probes are held is to be taken to begin.
func (d *Director) containerStatus(ctx context.Context, _ string, raw []byte, next proxy.UnaryNext) ([]byte, error) {
	req, err := decode(raw, &runtimeapi.ContainerStatusRequest{})
	if err != nil {
		return nil, err
	}
	look := d.view.look(decidedIn(ctx))
	defer look.end()
	heir := d.view.untoldHeir(req.GetContainerId())
	b, err := next(ctx, raw)
	if err != nil {
		return nil, err
	}
	m, err := decode(b, &runtimeapi.ContainerStatusResponse{})
	if err != nil {
		return nil, err
	}
	d.view.asked(m.GetStatus().GetId())
	changed := false
	switch how := look.judge(m.GetStatus().GetId(), m.GetStatus().GetAnnotations()); {
	case how == hidden:
		return nil, notFound(req.GetContainerId())
	case how == masked || heir != "" && !d.lost(ctx, heir, next):
		did(ctx, didMask)
		showRunning(m.GetStatus())
		changed = true
	}
	if d.view.correct(m.GetStatus()) {
		did(ctx, didCorrect)
		changed = true
	}
	if !changed {
		return b, nil
	}
	return encode(m)
}

// lost reports whether a container that has been revealed is gone without anybody having said so: then nobody will ever ask for its
// status. next asks the runtime for that.
func (d *Director) lost(ctx context.Context, id string, next proxy.UnaryNext) bool {
	raw, err := encode(&runtimeapi.ContainerStatusRequest{ContainerId: id})
	if err != nil {
		return false
	}
	if _, err := next(ctx, raw); status.Code(err) != codes.NotFound {
		return false
	}
	d.view.Forget(id)
	return true
}

// podSandboxStatus filters the container statuses that evented PLEG reads from it. With this call kubelet begins to look at all of a
// pod.
func (d *Director) podSandboxStatus(ctx context.Context, _ string, raw []byte, next proxy.UnaryNext) ([]byte, error) {
	req, err := decode(raw, &runtimeapi.PodSandboxStatusRequest{})
	if err != nil {
		return nil, err
	}
	d.view.inspect(req.GetPodSandboxId())
	look := d.view.look(decidedIn(ctx))
	defer look.end()
	return forward(ctx, raw, next, &runtimeapi.PodSandboxStatusResponse{}, func(m *runtimeapi.PodSandboxStatusResponse) {
		m.ContainersStatuses = look.showStatuses(m.ContainersStatuses)
	})
}

// showStatuses drops what is hidden and shows masked ones running.
func (l *look) showStatuses(list []*runtimeapi.ContainerStatus) []*runtimeapi.ContainerStatus {
	return without(list, func(s *runtimeapi.ContainerStatus) bool {
		switch l.judge(s.GetId(), s.GetAnnotations()) {
		case hidden:
			return true
		case masked:
			showRunning(s)
		}
		if l.view.correct(s) {
			l.did.add(didCorrect)
		}
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
