// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package interceptors

import (
	"context"

	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/cri-proxy/cri-proxy/proxy"
)

// containerStats does not know hidden containers.
func (d *Director) containerStats(ctx context.Context, _ string, raw []byte, next proxy.UnaryNext) ([]byte, error) {
	req, err := decode(raw, &runtimeapi.ContainerStatsRequest{})
	if err != nil {
		return nil, err
	}
	b, err := next(ctx, raw)
	if err != nil {
		return nil, err
	}
	m, err := decode(b, &runtimeapi.ContainerStatsResponse{})
	if err != nil {
		return nil, err
	}
	if d.view.hiddenStats(m.GetStats()) {
		return nil, notFound(req.GetContainerId())
	}
	return b, nil
}

func (d *Director) listContainerStats(ctx context.Context, _ string, raw []byte, next proxy.UnaryNext) ([]byte, error) {
	return forward(ctx, raw, next, &runtimeapi.ListContainerStatsResponse{}, func(m *runtimeapi.ListContainerStatsResponse) {
		m.Stats = without(m.Stats, d.view.hiddenStats)
	})
}

func (d *Director) streamContainerStats(_ context.Context, _ string, raw []byte) ([]byte, proxy.StreamFilter, error) {
	return raw, &messageFilter{need: d.view.Active, change: func(b []byte) ([]byte, error) {
		m, err := decode(b, &runtimeapi.StreamContainerStatsResponse{})
		if err != nil {
			return nil, err
		}
		m.ContainerStats = without(m.ContainerStats, d.view.hiddenStats)
		return encode(m)
	}}, nil
}

func (d *Director) podSandboxStats(ctx context.Context, _ string, raw []byte, next proxy.UnaryNext) ([]byte, error) {
	return forward(ctx, raw, next, &runtimeapi.PodSandboxStatsResponse{}, func(m *runtimeapi.PodSandboxStatsResponse) {
		d.view.showPodStats(m.GetStats())
	})
}

func (d *Director) listPodSandboxStats(ctx context.Context, _ string, raw []byte, next proxy.UnaryNext) ([]byte, error) {
	return forward(ctx, raw, next, &runtimeapi.ListPodSandboxStatsResponse{}, func(m *runtimeapi.ListPodSandboxStatsResponse) {
		for _, s := range m.GetStats() {
			d.view.showPodStats(s)
		}
	})
}

func (d *Director) streamPodSandboxStats(_ context.Context, _ string, raw []byte) ([]byte, proxy.StreamFilter, error) {
	return raw, &messageFilter{need: d.view.Active, change: func(b []byte) ([]byte, error) {
		m, err := decode(b, &runtimeapi.StreamPodSandboxStatsResponse{})
		if err != nil {
			return nil, err
		}
		for _, s := range m.GetPodSandboxStats() {
			d.view.showPodStats(s)
		}
		return encode(m)
	}}, nil
}

func (d *Director) listPodSandboxMetrics(ctx context.Context, _ string, raw []byte, next proxy.UnaryNext) ([]byte, error) {
	return forward(ctx, raw, next, &runtimeapi.ListPodSandboxMetricsResponse{}, func(m *runtimeapi.ListPodSandboxMetricsResponse) {
		for _, s := range m.GetPodMetrics() {
			d.view.showPodMetrics(s)
		}
	})
}

func (d *Director) streamPodSandboxMetrics(_ context.Context, _ string, raw []byte) ([]byte, proxy.StreamFilter, error) {
	return raw, &messageFilter{need: d.view.Active, change: func(b []byte) ([]byte, error) {
		m, err := decode(b, &runtimeapi.StreamPodSandboxMetricsResponse{})
		if err != nil {
			return nil, err
		}
		for _, s := range m.GetPodSandboxMetrics() {
			d.view.showPodMetrics(s)
		}
		return encode(m)
	}}, nil
}

func (v *View) hiddenStats(s *runtimeapi.ContainerStats) bool {
	return v.judge(s.GetAttributes().GetId(), s.GetAttributes().GetAnnotations()) == hidden
}

func (v *View) showPodStats(s *runtimeapi.PodSandboxStats) {
	if l := s.GetLinux(); l != nil {
		l.Containers = without(l.Containers, v.hiddenStats)
	}
}

func (v *View) showPodMetrics(s *runtimeapi.PodSandboxMetrics) {
	if s == nil {
		return
	}
	s.ContainerMetrics = without(s.ContainerMetrics, func(m *runtimeapi.ContainerMetrics) bool {
		return v.judge(m.GetContainerId(), nil) == hidden
	})
}
