// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package imageupdate

import (
	"context"
	"sync"
	"time"

	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/cri-proxy/cri-proxy/interceptors/view"
)

// kubelet passes on to the operation what kubelet does in its slot.
type kubelet struct {
	stops   chan stopped
	creates view.Creations
	over    chan struct{} // closed when the operation answers no more
	// hurry stops the incumbent within a grace that is shorter than the one it is being stopped
	// within.
	hurry func(ctx context.Context, grace time.Duration)

	mu        sync.Mutex // guards all following fields
	listening bool
	by        time.Time // when the grace of a stop under way ends
}

var _ view.Driver = (*kubelet)(nil)

// stopped is a StopContainer of the incumbent; answer has room for one.
type stopped struct {
	grace  int64
	answer chan bool
}

func newKubelet(hurry func(ctx context.Context, grace time.Duration)) *kubelet {
	return &kubelet{
		stops: make(chan stopped), creates: make(view.Creations), over: make(chan struct{}), hurry: hurry,
	}
}

// listen says whether the operation has something for kubelet. Until then it gives way at once.
func (k *kubelet) listen(on bool) {
	k.mu.Lock()
	defer k.mu.Unlock()
	k.listening = on
}

func (k *kubelet) listens() bool {
	k.mu.Lock()
	defer k.mu.Unlock()
	return k.listening
}

// stopBy says when the grace of the stop that is under way ends.
func (k *kubelet) stopBy(by time.Time) {
	k.mu.Lock()
	defer k.mu.Unlock()
	k.by = by
}

// sooner reports whether a stop is under way that has more time than that.
func (k *kubelet) sooner(grace time.Duration) bool {
	k.mu.Lock()
	defer k.mu.Unlock()
	by := time.Now().Add(grace)
	if k.by.IsZero() || !by.Before(k.by) {
		return false
	}
	k.by = by
	return true
}

// Stop implements [view.Driver].
func (k *kubelet) Stop(ctx context.Context, grace int64) (bool, error) {
	if !k.listens() {
		return false, nil
	}
	if d := time.Duration(grace) * time.Second; k.sooner(d) {
		k.hurry(ctx, d) // as with the runtime, the shorter grace wins
	}
	q := stopped{grace: grace, answer: make(chan bool, 1)}
	select {
	case k.stops <- q:
	case <-k.over:
		return false, nil
	case <-ctx.Done():
		return true, ctx.Err()
	}
	select {
	case ok := <-q.answer:
		return ok, nil
	case <-k.over:
	case <-ctx.Done(): // the operation goes on
		return true, ctx.Err()
	}
	select {
	case ok := <-q.answer: // its last
		return ok, nil
	default: // it has failed: kubelet's own stop does no harm
		return false, nil
	}
}

// Create implements [view.Driver].
func (k *kubelet) Create(ctx context.Context, req *runtimeapi.CreateContainerRequest) (string, bool) {
	if !k.listens() {
		return "", false
	}
	return k.creates.Ask(ctx, req, k.over)
}
