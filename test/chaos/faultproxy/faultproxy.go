// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package faultproxy

import (
	"context"
	"errors"
	"slices"
	"strings"
	"sync"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/cri-proxy/cri-proxy/interceptors/view"
	"github.com/cri-proxy/cri-proxy/proxy"
)

// Labels that kubelet puts on containers (pkg/kubelet/kuberuntime/labels.go).
const (
	labelPodUID    = "io.kubernetes.pod.uid"
	labelContainer = "io.kubernetes.container.name"
)

// Fault is what shall go wrong.
type Fault struct {
	// PodUID and Container name the slot.
	PodUID, Container string
	// Incumbent is the ID of the slot's container; those that a restart creates are noticed as they
	// come.
	Incumbent string
	// Methods are the short names of the calls to hit, such as StopContainer. Empty: every call
	// that changes a container.
	Methods []string
	// Times is how many calls fail; they pass afterwards.
	Times int
	// Code is what they fail with.
	Code codes.Code
	// Lost lets the runtime do what it is asked and loses its answer.
	Lost bool
}

// Proxy is a running fault proxy.
type Proxy struct {
	server   *proxy.Server
	upstream *proxy.Upstream
	served   chan error

	mu     sync.Mutex      // guards all following fields
	fault  Fault           // Times is what is left
	staged map[string]bool // IDs of containers that restarts created in the fault's slot
	hits   []string
}

// Start listens on socket and forwards to the runtime's socket. Close ends it.
func Start(socket, runtime string) (*Proxy, error) {
	upstream, err := proxy.NewUpstream(runtime, proxy.UpstreamOptions{})
	if err != nil {
		return nil, err
	}
	l, err := proxy.Listen(socket, proxy.ListenOptions{UID: -1, GID: -1})
	if err != nil {
		return nil, errors.Join(err, upstream.Close())
	}
	p := &Proxy{upstream: upstream, served: make(chan error, 1), staged: map[string]bool{}}
	p.server = proxy.NewServer(upstream, proxy.Options{Director: p})
	go func() { p.served <- p.server.Serve(l) }()
	return p, nil
}

// Close cuts all calls and stops listening.
func (p *Proxy) Close() error {
	p.server.Stop()
	return errors.Join(<-p.served, p.upstream.Close())
}

// Arm replaces the fault and forgets the hits of the one before.
func (p *Proxy) Arm(f Fault) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if f.PodUID != p.fault.PodUID || f.Container != p.fault.Container {
		clear(p.staged)
	}
	p.fault, p.hits = f, nil
}

// Disarm lets all calls pass and returns the short names of those that failed since Arm, in order.
func (p *Proxy) Disarm() []string {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.fault.Times = 0
	return slices.Clone(p.hits)
}

// Watch says which slot the next Arm will be about, so that what is created in it until then is
// known.
func (p *Proxy) Watch(podUID, container string) {
	p.Arm(Fault{PodUID: podUID, Container: container})
}

var _ proxy.Director = (*Proxy)(nil)

// mutating are the calls that a restart changes containers with.
var mutating = []string{
	runtimeapi.RuntimeService_CreateContainer_FullMethodName,
	runtimeapi.RuntimeService_StartContainer_FullMethodName,
	runtimeapi.RuntimeService_StopContainer_FullMethodName,
	runtimeapi.RuntimeService_RemoveContainer_FullMethodName,
	runtimeapi.RuntimeService_UpdateContainerResources_FullMethodName,
}

// Unary implements [proxy.Director].
func (p *Proxy) Unary(method string) proxy.UnaryInterceptor {
	if slices.Contains(mutating, method) {
		return p.call
	}
	return nil
}

// Stream implements [proxy.Director].
func (p *Proxy) Stream(string) proxy.StreamInterceptor { return nil }

func (p *Proxy) call(ctx context.Context, method string, req []byte, next proxy.UnaryNext) ([]byte, error) {
	name := method[strings.LastIndexByte(method, '/')+1:]
	mine, err := p.mine(name, req)
	if err != nil {
		return nil, &proxy.PassError{Err: err}
	}
	if !mine {
		return next(ctx, req)
	}
	f, hit := p.hit(name)
	if hit && !f.Lost {
		return nil, status.Errorf(f.Code, "%s: fault injected by the test", name)
	}
	resp, err := next(ctx, req)
	if err == nil && name == "CreateContainer" {
		m := &runtimeapi.CreateContainerResponse{}
		if err := proto.Unmarshal(resp, m); err != nil {
			return nil, &proxy.PassError{Err: err}
		}
		p.mu.Lock()
		p.staged[m.GetContainerId()] = true
		p.mu.Unlock()
	}
	if hit {
		return nil, status.Errorf(f.Code, "%s: answer lost by the test", name)
	}
	return resp, err
}

// mine says whether a restart of the fault's slot made the call.
func (p *Proxy) mine(name string, req []byte) (bool, error) {
	id := interface{ GetContainerId() string }(nil)
	switch name {
	case "CreateContainer":
		m := &runtimeapi.CreateContainerRequest{}
		err := proto.Unmarshal(req, m)
		p.mu.Lock()
		defer p.mu.Unlock()
		labels := m.GetConfig().GetLabels()
		return labels[labelPodUID] == p.fault.PodUID && labels[labelContainer] == p.fault.Container &&
			m.GetConfig().GetAnnotations()[view.StagedAnnotation] != "", err
	case "StartContainer":
		id = &runtimeapi.StartContainerRequest{}
	case "StopContainer":
		id = &runtimeapi.StopContainerRequest{}
	case "RemoveContainer":
		id = &runtimeapi.RemoveContainerRequest{}
	default:
		id = &runtimeapi.UpdateContainerResourcesRequest{}
	}
	if err := proto.Unmarshal(req, id.(proto.Message)); err != nil {
		return false, err
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.staged[id.GetContainerId()] || (id.GetContainerId() != "" && id.GetContainerId() == p.fault.Incumbent), nil
}

// hit uses the fault up by one call, if it is about such calls.
func (p *Proxy) hit(name string) (Fault, bool) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.fault.Times <= 0 || (len(p.fault.Methods) > 0 && !slices.Contains(p.fault.Methods, name)) {
		return Fault{}, false
	}
	p.fault.Times--
	p.hits = append(p.hits, name)
	return p.fault, true
}
