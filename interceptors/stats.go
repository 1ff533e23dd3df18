// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package interceptors

import (
	"context"

	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/cri-proxy/cri-proxy/interceptors/view"
	"github.com/cri-proxy/cri-proxy/proxy"
)

// containerStats does not know hidden containers.
func (a *answers) containerStats(ctx context.Context, _ string, raw []byte, next proxy.UnaryNext) ([]byte, error) {
	req, err := decode(raw, &runtimeapi.ContainerStatsRequest{})
	if err != nil {
		return nil, err
	}
	snapshot := a.snapshot(ctx)
	defer snapshot.End()
	b, err := next(ctx, raw)
	if err != nil {
		return nil, err
	}
	m, err := decode(b, &runtimeapi.ContainerStatsResponse{})
	if err != nil {
		return nil, err
	}
	if snapshot.hiddenStats(m.GetStats()) {
		return nil, notFound(req.GetContainerId())
	}
	return b, nil
}

func (a *answers) listContainerStats(ctx context.Context, _ string, raw []byte, next proxy.UnaryNext) ([]byte, error) {
	snapshot := a.snapshot(ctx)
	defer snapshot.End()
	return forward(ctx, raw, next, &runtimeapi.ListContainerStatsResponse{}, func(
		m *runtimeapi.ListContainerStatsResponse,
	) {
		m.Stats = without(m.Stats, snapshot.hiddenStats)
	})
}

func (a *answers) streamContainerStats(ctx context.Context, _ string, raw []byte) ([]byte, proxy.StreamFilter, error) {
	snapshot := a.snapshot(ctx)
	return raw, &messageFilter{snapshot: snapshot, change: func(b []byte) ([]byte, error) {
		m, err := decode(b, &runtimeapi.StreamContainerStatsResponse{})
		if err != nil {
			return nil, err
		}
		m.ContainerStats = without(m.ContainerStats, snapshot.hiddenStats)
		return encode(m)
	}}, nil
}

func (a *answers) podSandboxStats(ctx context.Context, _ string, raw []byte, next proxy.UnaryNext) ([]byte, error) {
	snapshot := a.snapshot(ctx)
	defer snapshot.End()
	return forward(ctx, raw, next, &runtimeapi.PodSandboxStatsResponse{}, func(m *runtimeapi.PodSandboxStatsResponse) {
		snapshot.showPodStats(m.GetStats())
	})
}

func (a *answers) listPodSandboxStats(
	ctx context.Context, _ string, raw []byte, next proxy.UnaryNext,
) ([]byte, error) {
	snapshot := a.snapshot(ctx)
	defer snapshot.End()
	return forward(ctx, raw, next, &runtimeapi.ListPodSandboxStatsResponse{}, func(
		m *runtimeapi.ListPodSandboxStatsResponse,
	) {
		for _, s := range m.GetStats() {
			snapshot.showPodStats(s)
		}
	})
}

func (a *answers) streamPodSandboxStats(
	ctx context.Context, _ string, raw []byte,
) ([]byte, proxy.StreamFilter, error) {
	snapshot := a.snapshot(ctx)
	return raw, &messageFilter{snapshot: snapshot, change: func(b []byte) ([]byte, error) {
		m, err := decode(b, &runtimeapi.StreamPodSandboxStatsResponse{})
		if err != nil {
			return nil, err
		}
		for _, s := range m.GetPodSandboxStats() {
			snapshot.showPodStats(s)
		}
		return encode(m)
	}}, nil
}

func (a *answers) listPodSandboxMetrics(
	ctx context.Context, _ string, raw []byte, next proxy.UnaryNext,
) ([]byte, error) {
	snapshot := a.snapshot(ctx)
	defer snapshot.End()
	return forward(ctx, raw, next, &runtimeapi.ListPodSandboxMetricsResponse{}, func(
		m *runtimeapi.ListPodSandboxMetricsResponse,
	) {
		for _, s := range m.GetPodMetrics() {
			snapshot.showPodMetrics(s)
		}
	})
}

func (a *answers) streamPodSandboxMetrics(
	ctx context.Context, _ string, raw []byte,
) ([]byte, proxy.StreamFilter, error) {
	snapshot := a.snapshot(ctx)
	return raw, &messageFilter{snapshot: snapshot, change: func(b []byte) ([]byte, error) {
		m, err := decode(b, &runtimeapi.StreamPodSandboxMetricsResponse{})
		if err != nil {
			return nil, err
		}
		for _, s := range m.GetPodSandboxMetrics() {
			snapshot.showPodMetrics(s)
		}
		return encode(m)
	}}, nil
}

func (s *snapshot) hiddenStats(c *runtimeapi.ContainerStats) bool {
	return s.judge(c.GetAttributes().GetId(), c.GetAttributes().GetAnnotations()) == view.Hidden
}

func (s *snapshot) showPodStats(pod *runtimeapi.PodSandboxStats) {
	if linux := pod.GetLinux(); linux != nil {
		linux.Containers = without(linux.Containers, s.hiddenStats)
	}
}

func (s *snapshot) showPodMetrics(pod *runtimeapi.PodSandboxMetrics) {
	if pod == nil {
		return
	}
	pod.ContainerMetrics = without(pod.ContainerMetrics, func(c *runtimeapi.ContainerMetrics) bool {
		return s.judge(c.GetContainerId(), nil) == view.Hidden
	})
}
