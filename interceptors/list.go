// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package interceptors

import (
	"context"

	"google.golang.org/protobuf/proto"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/cri-proxy/cri-proxy/interceptors/view"
	"github.com/cri-proxy/cri-proxy/proxy"
)

// listContainers shows the list as kubelet must see it. It evaluates a filter by state itself, on
// the state shown, because the runtime would evaluate it on the real one.
func (a *answers) listContainers(ctx context.Context, _ string, raw []byte, next proxy.UnaryNext) ([]byte, error) {
	req, err := decode(raw, &runtimeapi.ListContainersRequest{})
	if err != nil {
		return nil, err
	}
	all := everything(req.GetFilter())
	upstream, want, err := withoutState(raw, req, req.GetFilter())
	if err != nil {
		return nil, err
	}
	snapshot := a.snapshot(ctx)
	defer snapshot.End()
	snapshot.HideUnacknowledged(all)
	return forward(ctx, upstream, next, &runtimeapi.ListContainersResponse{},
		func(m *runtimeapi.ListContainersResponse) {
			m.Containers = snapshot.showContainers(m.Containers, want)
			if want == nil {
				a.view.AckList(m.Containers)
			}
		})
}

// streamContainers is listContainers for the streaming form.
func (a *answers) streamContainers(ctx context.Context, _ string, raw []byte) ([]byte, proxy.StreamFilter, error) {
	req, err := decode(raw, &runtimeapi.StreamContainersRequest{})
	if err != nil {
		return nil, nil, err
	}
	all := everything(req.GetFilter())
	// The state filter is always evaluated here: an operation may begin while the stream is open.
	// An active one may end in the middle; then kubelet has been told of what the stream lists.
	upstream, want, err := withoutState(raw, req, req.GetFilter())
	if err != nil {
		return nil, nil, err
	}
	snapshot := a.snapshot(ctx)
	snapshot.HideUnacknowledged(all)
	change := func(b []byte) ([]byte, error) {
		m, err := decode(b, &runtimeapi.StreamContainersResponse{})
		if err != nil {
			return nil, err
		}
		had := len(m.Containers)
		m.Containers = snapshot.showContainers(m.Containers, want)
		if want == nil {
			a.view.AckList(m.Containers)
		}
		if had > 0 && len(m.Containers) == 0 {
			return nil, nil // a runtime sends no empty messages either
		}
		return encode(m)
	}
	return upstream, &messageFilter{snapshot: snapshot, always: want != nil || a.view.Active(), change: change}, nil
}

// everything reports whether the filter lets all through.
func everything(f *runtimeapi.ContainerFilter) bool {
	return f.GetId() == "" && f.GetPodSandboxId() == "" && f.GetState() == nil && len(f.GetLabelSelector()) == 0
}

// withoutState takes the state out of the request's filter, which is part of req,
// and returns the request to send and the state asked for.
func withoutState[M interface {
	*runtimeapi.ListContainersRequest | *runtimeapi.StreamContainersRequest
	proto.Message
}](raw []byte, req M, f *runtimeapi.ContainerFilter) ([]byte, *runtimeapi.ContainerState, error) {
	if f.GetState() == nil {
		return raw, nil, nil
	}
	want := f.GetState().GetState()
	f.State = nil
	b, err := encode(req)
	return b, &want, err
}

// showContainers drops what is hidden, shows masked ones running, and keeps those in state want
// (nil: all).
func (s *snapshot) showContainers(
	list []*runtimeapi.Container, want *runtimeapi.ContainerState,
) []*runtimeapi.Container {
	return without(list, func(c *runtimeapi.Container) bool {
		switch s.judge(c.GetId(), c.GetAnnotations()) {
		case view.Hidden:
			return true
		case view.Masked:
			c.State = runtimeapi.ContainerState_CONTAINER_RUNNING
		}
		return want != nil && c.GetState() != *want
	})
}
