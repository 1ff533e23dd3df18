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
	look := d.view.look(decidedIn(ctx))
	defer look.end()
	b, err := next(ctx, raw)
	if err != nil {
		return nil, err
	}
	m, err := decode(b, &runtimeapi.ContainerStatsResponse{})
	if err != nil {
		return nil, err
	}
	if look.hiddenStats(m.GetStats()) {
		return nil, notFound(req.GetContainerId())
	}
	return b, nil
}

func (d *Director) listContainerStats(ctx context.Context, _ string, raw []byte, next proxy.UnaryNext) ([]byte, error) {
	look := d.view.look(decidedIn(ctx))
	defer look.end()
	return forward(ctx, raw, next, &runtimeapi.ListContainerStatsResponse{}, func(m *runtimeapi.ListContainerStatsResponse) {
		m.Stats = without(m.Stats, look.hiddenStats)
	})
}

func (d *Director) streamContainerStats(ctx context.Context, _ string, raw []byte) ([]byte, proxy.StreamFilter, error) {
	look := d.view.look(decidedIn(ctx))
	return raw, &messageFilter{look: look, change: func(b []byte) ([]byte, error) {
		m, err := decode(b, &runtimeapi.StreamContainerStatsResponse{})
		if err != nil {
			return nil, err
		}
		m.ContainerStats = without(m.ContainerStats, look.hiddenStats)
		return encode(m)
	}}, nil
}

func (d *Director) podSandboxStats(ctx context.Context, _ string, raw []byte, next proxy.UnaryNext) ([]byte, error) {
	look := d.view.look(decidedIn(ctx))
	defer look.end()
	return forward(ctx, raw, next, &runtimeapi.PodSandboxStatsResponse{}, func(m *runtimeapi.PodSandboxStatsResponse) {
		look.showPodStats(m.GetStats())
	})
}

func (d *Director) listPodSandboxStats(ctx context.Context, _ string, raw []byte, next proxy.UnaryNext) ([]byte, error) {
	look := d.view.look(decidedIn(ctx))
	defer look.end()
	return forward(ctx, raw, next, &runtimeapi.ListPodSandboxStatsResponse{}, func(m *runtimeapi.ListPodSandboxStatsResponse) {
		for _, s := range m.GetStats() {
			look.showPodStats(s)
		}
	})
}

func (d *Director) streamPodSandboxStats(ctx context.Context, _ string, raw []byte) ([]byte, proxy.StreamFilter, error) {
	look := d.view.look(decidedIn(ctx))
	return raw, &messageFilter{look: look, change: func(b []byte) ([]byte, error) {
		m, err := decode(b, &runtimeapi.StreamPodSandboxStatsResponse{})
		if err != nil {
			return nil, err
		}
		for _, s := range m.GetPodSandboxStats() {
			look.showPodStats(s)
		}
		return encode(m)
	}}, nil
}

func (d *Director) listPodSandboxMetrics(ctx context.Context, _ string, raw []byte, next proxy.UnaryNext) ([]byte, error) {
	look := d.view.look(decidedIn(ctx))
	defer look.end()
	return forward(ctx, raw, next, &runtimeapi.ListPodSandboxMetricsResponse{}, func(m *runtimeapi.ListPodSandboxMetricsResponse) {
		for _, s := range m.GetPodMetrics() {
			look.showPodMetrics(s)
		}
	})
}

func (d *Director) streamPodSandboxMetrics(ctx context.Context, _ string, raw []byte) ([]byte, proxy.StreamFilter, error) {
	look := d.view.look(decidedIn(ctx))
	return raw, &messageFilter{look: look, change: func(b []byte) ([]byte, error) {
		m, err := decode(b, &runtimeapi.StreamPodSandboxMetricsResponse{})
		if err != nil {
			return nil, err
		}
		for _, s := range m.GetPodSandboxMetrics() {
			look.showPodMetrics(s)
		}
		return encode(m)
	}}, nil
}

func (l *look) hiddenStats(s *runtimeapi.ContainerStats) bool {
	return l.judge(s.GetAttributes().GetId(), s.GetAttributes().GetAnnotations()) == hidden
}

func (l *look) showPodStats(s *runtimeapi.PodSandboxStats) {
	if linux := s.GetLinux(); linux != nil {
		linux.Containers = without(linux.Containers, l.hiddenStats)
	}
}

func (l *look) showPodMetrics(s *runtimeapi.PodSandboxMetrics) {
	if s == nil {
		return
	}
	s.ContainerMetrics = without(s.ContainerMetrics, func(m *runtimeapi.ContainerMetrics) bool {
		return l.judge(m.GetContainerId(), nil) == hidden
	})
}
