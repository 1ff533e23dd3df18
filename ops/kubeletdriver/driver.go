// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

// Package kubeletdriver hands kubelet's StopContainer and CreateContainer in a slot to the
// operation that has the slot. [Restart] lets a stop of kubelet's join a restart that is under way.
// [Upgrade] lets kubelet's stop drive an upgrade.
package kubeletdriver

import (
	"context"
	"sync"
	"time"

	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"
)

// Creation is a CreateContainer of kubelet's in the slot. The operation calls Adopt or GiveWay at
// most once. If it calls neither, kubelet's call goes on when the operation has ended.
type Creation struct {
	Request *runtimeapi.CreateContainerRequest
	answer  chan adoption // has room for one
}

type adoption struct {
	id string
	ok bool
}

// Adopt answers kubelet with a container that exists already.
func (c Creation) Adopt(id string) { c.answer <- adoption{id: id, ok: true} }

// GiveWay lets kubelet have the slot at once.
func (c Creation) GiveWay() { c.answer <- adoption{} }

// driver is what both drivers have in common.
type driver struct {
	creates chan Creation
	over    chan struct{} // closed when the operation answers no more
	// shorten stops the incumbent within a grace that is shorter than the one it is being stopped
	// within.
	shorten func(ctx context.Context, grace time.Duration)

	mu        sync.Mutex // guards all following fields
	listening bool
	by        time.Time // when the grace of the stop under way ends; zero if none is
}

func newDriver(shorten func(ctx context.Context, grace time.Duration)) driver {
	return driver{creates: make(chan Creation), over: make(chan struct{}), shorten: shorten}
}

// Creates returns the channel of kubelet's CreateContainer calls.
func (d *driver) Creates() <-chan Creation { return d.creates }

// isSoonerLocked reports whether a stop is under way that has more time than the grace. As with the
// runtime, the shorter grace wins: it counts from now on. The caller holds d.mu.
func (d *driver) isSoonerLocked(grace time.Duration) bool {
	by := time.Now().Add(grace)
	if d.by.IsZero() || !by.Before(d.by) {
		return false
	}
	d.by = by
	return true
}

// create hands a CreateContainer to the operation. One without an answer waits for the end of the
// operation.
func (d *driver) create(ctx context.Context, req *runtimeapi.CreateContainerRequest) (string, bool) {
	c := Creation{Request: req, answer: make(chan adoption, 1)}
	a, answered, _ := ask(ctx, d.over, d.creates, c, c.answer)
	if !answered {
		return "", true
	}
	return a.id, a.ok
}

// ask hands a call to the operation and waits for the answer. There is none when the operation ends
// before, or ctx does: that is the error.
func ask[C, A any](
	ctx context.Context, over <-chan struct{}, calls chan<- C, call C, answer <-chan A,
) (a A, answered bool, err error) {
	select {
	case calls <- call:
	case <-over:
		return a, false, nil
	case <-ctx.Done():
		return a, false, ctx.Err()
	}
	select {
	case a = <-answer:
		return a, true, nil
	case <-over:
	case <-ctx.Done(): // the operation goes on
		return a, false, ctx.Err()
	}
	select {
	case a = <-answer: // its last
		return a, true, nil
	default:
		return a, false, nil
	}
}
