// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package interceptors

import (
	"context"

	"google.golang.org/grpc/metadata"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/cri-proxy/cri-proxy/proxy"
)

// Judge decides how containers are shown that carry a [StagedAnnotation] of which the view knows nothing: the journal with the
// operation that made them may be lost.
type Judge interface {
	// Judge returns once that is decided of all that the runtime has, at once if it was before. Errors are the runtime's.
	Judge(ctx context.Context) error
}

// States of a view's guard.
const (
	unguarded = iota // a token that the view does not hold says nothing
	unjudged         // no answer tells of containers yet
	guarded          // a container with a token that nobody knows is hidden
)

// Guard makes answers that tell of containers wait for [View.Judged]. From then on, until [View.Unguard], containers are hidden whose token
// nobody has told of, by [View.Know] or by hiding it: one may come about late. It is for the time before the first call is served.
func (v *View) Guard() {
	v.mu.Lock()
	defer v.mu.Unlock()
	v.known = map[string]struct{}{}
	for token := range v.tokens {
		v.known[token] = struct{}{}
	}
	v.guard.Store(unjudged)
}

// Know says that a container with that token is shown, unless it is hidden otherwise.
func (v *View) Know(token string) {
	v.mu.Lock()
	defer v.mu.Unlock()
	v.knowLocked(token)
}

func (v *View) knowLocked(token string) {
	if v.known != nil {
		v.known[token] = struct{}{}
	}
}

// Judged lets answers go.
func (v *View) Judged() { v.guard.CompareAndSwap(unjudged, guarded) }

// Unguard ends what [View.Guard] began.
func (v *View) Unguard() {
	v.mu.Lock()
	defer v.mu.Unlock()
	v.guard.Store(unguarded)
	v.known = nil
}

// Guarded reports whether it has not ended.
func (v *View) Guarded() bool { return v.guard.Load() != unguarded }

// suspectLocked reports whether the token is one that nobody knows, which counts as long as there is a guard.
func (v *View) suspectLocked(token string) bool {
	if v.known == nil || token == "" {
		return false
	}
	_, known := v.known[token]
	return !known
}

// Stray hides a container whose operation is lost until the claim that it returns is settled. That claim holds no slot. incumbent is the
// container beside which the stray runs, or "": it is shown running as long, for the stray takes its place should it end.
func (v *View) Stray(slot Slot, sandbox, token, id, incumbent string) *Claim {
	v.mu.Lock()
	c := &Claim{view: v, slot: slot, sandbox: sandbox, incumbent: incumbent, yielded: make(chan struct{}), done: make(chan struct{})}
	v.strays[c] = struct{}{}
	v.mu.Unlock()
	c.HideNow(token)
	c.Staged(id)
	if incumbent != "" {
		c.Mask()
	}
	return c
}

// tellsOfContainers are the methods whose answers wait for the judge.
var tellsOfContainers = map[string]bool{
	runtimeapi.RuntimeService_ListContainers_FullMethodName:          true,
	runtimeapi.RuntimeService_ContainerStatus_FullMethodName:         true,
	runtimeapi.RuntimeService_PodSandboxStatus_FullMethodName:        true,
	runtimeapi.RuntimeService_ContainerStats_FullMethodName:          true,
	runtimeapi.RuntimeService_ListContainerStats_FullMethodName:      true,
	runtimeapi.RuntimeService_PodSandboxStats_FullMethodName:         true,
	runtimeapi.RuntimeService_ListPodSandboxStats_FullMethodName:     true,
	runtimeapi.RuntimeService_ListPodSandboxMetrics_FullMethodName:   true,
	runtimeapi.RuntimeService_GetContainerEvents_FullMethodName:      true,
	runtimeapi.RuntimeService_StreamContainers_FullMethodName:        true,
	runtimeapi.RuntimeService_StreamContainerStats_FullMethodName:    true,
	runtimeapi.RuntimeService_StreamPodSandboxStats_FullMethodName:   true,
	runtimeapi.RuntimeService_StreamPodSandboxMetrics_FullMethodName: true,
	// kubelet makes a container in a slot whose containers it has seen; the name that it takes may be a stray's.
	runtimeapi.RuntimeService_CreateContainer_FullMethodName: true,
}

// judged waits for the judge. Its error is the answer: what the runtime does not tell this process it does not tell the caller either, and a
// list with a container too many, or too few, does harm that none does not.
func (d *Director) judged(ctx context.Context) error {
	if d.judge == nil || d.view.guard.Load() != unjudged {
		return nil
	}
	if md, _ := metadata.FromIncomingContext(ctx); len(md[proxy.ProbeKey]) > 0 {
		return nil // the proxy's own probe, whose answer is empty: a runtime that is away is no fault of the proxy's
	}
	return d.judge.Judge(ctx)
}

// unaryJudged has a method wait for the judge.
func (d *Director) unaryJudged(method string, take proxy.UnaryInterceptor) proxy.UnaryInterceptor {
	if !tellsOfContainers[method] {
		return take
	}
	return func(ctx context.Context, method string, req []byte, next proxy.UnaryNext) ([]byte, error) {
		if err := d.judged(ctx); err != nil {
			return nil, err
		}
		return take(ctx, method, req, next)
	}
}

// streamJudged is unaryJudged for streams.
func (d *Director) streamJudged(method string, take proxy.StreamInterceptor) proxy.StreamInterceptor {
	if !tellsOfContainers[method] {
		return take
	}
	return func(ctx context.Context, method string, req []byte) ([]byte, proxy.StreamFilter, error) {
		if err := d.judged(ctx); err != nil {
			return nil, nil, err
		}
		return take(ctx, method, req)
	}
}
