// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package interceptors

import (
	"context"

	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/cri-proxy/cri-proxy/proxy"
)

// listContainers shows the list as kubelet must see it. A filter by state is
// evaluated here, on the state shown, because the runtime would evaluate it on the real one.
func (d *Director) listContainers(ctx context.Context, _ string, raw []byte, next proxy.UnaryNext) ([]byte, error) {
	req, err := decode(raw, &runtimeapi.ListContainersRequest{})
	if err != nil {
		return nil, err
	}
	all := everything(req.GetFilter())
	upstream, want, err := withoutState(raw, req, req.GetFilter())
	if err != nil {
		return nil, err
	}
	look := d.view.look(decidedIn(ctx))
	defer look.end()
	look.hideUntold(all)
	return forward(ctx, upstream, next, &runtimeapi.ListContainersResponse{}, func(m *runtimeapi.ListContainersResponse) {
		m.Containers = look.showContainers(m.Containers, want)
		if want == nil {
			d.view.told(m.Containers)
		}
	})
}

// streamContainers is listContainers for the streaming form.
func (d *Director) streamContainers(ctx context.Context, _ string, raw []byte) ([]byte, proxy.StreamFilter, error) {
	req, err := decode(raw, &runtimeapi.StreamContainersRequest{})
	if err != nil {
		return nil, nil, err
	}
	all := everything(req.GetFilter())
	// The state filter is always evaluated here: an operation may begin while the stream is open. One that is active
	// may end in the middle; then what the stream lists counts as told.
	upstream, want, err := withoutState(raw, req, req.GetFilter())
	if err != nil {
		return nil, nil, err
	}
	look := d.view.look(decidedIn(ctx))
	look.hideUntold(all)
	return upstream, &messageFilter{look: look, always: want != nil || d.view.Active(), change: func(b []byte) ([]byte, error) {
		m, err := decode(b, &runtimeapi.StreamContainersResponse{})
		if err != nil {
			return nil, err
		}
		had := len(m.Containers)
		m.Containers = look.showContainers(m.Containers, want)
		if want == nil {
			d.view.told(m.Containers)
		}
		if had > 0 && len(m.Containers) == 0 {
			return nil, nil // a runtime sends no empty messages either
		}
		return encode(m)
	}}, nil
}

// everything reports whether the filter lets all through.
func everything(f *runtimeapi.ContainerFilter) bool {
	return f.GetId() == "" && f.GetPodSandboxId() == "" && f.GetState() == nil && len(f.GetLabelSelector()) == 0
}

// withoutState takes the state out of the request's filter, which is part of req,
// and returns the request to send and the state asked for.
func withoutState[M interface {
	*runtimeapi.ListContainersRequest | *runtimeapi.StreamContainersRequest
	protoMessage
}](raw []byte, req M, f *runtimeapi.ContainerFilter) ([]byte, *runtimeapi.ContainerState, error) {
	if f.GetState() == nil {
		return raw, nil, nil
	}
	want := f.GetState().GetState()
	f.State = nil
	b, err := encode(req)
	return b, &want, err
}

// showContainers drops what is hidden, shows masked ones running, and keeps those in state want (nil: all).
func (l *look) showContainers(list []*runtimeapi.Container, want *runtimeapi.ContainerState) []*runtimeapi.Container {
	return without(list, func(c *runtimeapi.Container) bool {
		switch l.judge(c.GetId(), c.GetAnnotations()) {
		case hidden:
			return true
		case masked:
			c.State = runtimeapi.ContainerState_CONTAINER_RUNNING
		}
		return want != nil && c.GetState() != *want
	})
}
