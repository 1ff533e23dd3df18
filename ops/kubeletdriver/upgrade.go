// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package kubeletdriver

import (
	"context"
	"time"

	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/cri-proxy/cri-proxy/interceptors/view"
)

// Upgrade passes on to an upgrade what kubelet does in its slot.
type Upgrade struct {
	driver
	stops chan Stop
}

var _ view.Driver = (*Upgrade)(nil)

// Stop is a StopContainer of the incumbent. The operation calls Answer at most once. If it does
// not, it gives way when it has ended: kubelet's own stop does no harm then.
type Stop struct {
	Grace  int64     // in seconds
	answer chan bool // has room for one
}

// Answer tells kubelet that its stop has been done; with false the operation gives way.
func (s Stop) Answer(done bool) { s.answer <- done }

// NewUpgrade returns a driver that gives way to every call until Listen. It calls shorten when
// kubelet stops a container once more, within less time than there is left.
func NewUpgrade(shorten func(ctx context.Context, grace time.Duration)) *Upgrade {
	return &Upgrade{driver: newDriver(shorten), stops: make(chan Stop)}
}

// Stops returns the channel of kubelet's StopContainer calls.
func (u *Upgrade) Stops() <-chan Stop { return u.stops }

// Listen says that the operation has something for kubelet.
func (u *Upgrade) Listen() {
	u.mu.Lock()
	defer u.mu.Unlock()
	u.listening = true
}

func (u *Upgrade) listens() bool {
	u.mu.Lock()
	defer u.mu.Unlock()
	return u.listening
}

// StopBy says when the grace of the stop that is under way ends; the zero time if none is.
func (u *Upgrade) StopBy(by time.Time) {
	u.mu.Lock()
	defer u.mu.Unlock()
	u.by = by
}

// End says that the operation answers no more.
func (u *Upgrade) End() { close(u.over) }

// Stop implements [view.Driver].
func (u *Upgrade) Stop(ctx context.Context, grace int64) (bool, error) {
	if !u.listens() {
		return false, nil
	}
	if d := time.Duration(grace) * time.Second; u.isSooner(d) {
		u.shorten(ctx, d)
	}
	s := Stop{Grace: grace, answer: make(chan bool, 1)}
	done, _, err := ask(ctx, u.over, u.stops, s, s.answer)
	if err != nil {
		return true, err
	}
	return done, nil
}

func (u *Upgrade) isSooner(grace time.Duration) bool {
	u.mu.Lock()
	defer u.mu.Unlock()
	return u.isSoonerLocked(grace)
}

// Create implements [view.Driver].
func (u *Upgrade) Create(ctx context.Context, req *runtimeapi.CreateContainerRequest) (string, bool) {
	if !u.listens() {
		return "", false
	}
	return u.create(ctx, req)
}
