// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package prepull

import (
	"context"

	"github.com/prometheus/client_golang/prometheus"
	"golang.org/x/time/rate"

	opsv1 "github.com/cri-proxy/cri-proxy/api/ops/v1"
	"github.com/cri-proxy/cri-proxy/ops/prepull/claims"
	"github.com/cri-proxy/cri-proxy/ops/prepull/imagefs"
	"github.com/cri-proxy/cri-proxy/ops/prepull/imagestore"
	"github.com/cri-proxy/cri-proxy/ops/prepull/pins"
)

// The tests use a puller from outside. What is below they cannot reach from there: a runtime, a
// disk and a file in memory, and states of a pull that the fake runtime does not lead to.

const (
	SweepInterval      = sweepInterval
	ProgressInterval   = progressInterval
	CredentialsTimeout = credentialsTimeout
	KeepFinished       = keepFinished
	MaxActive          = maxActive
	UrgentParallel     = urgentParallel
)

func (p *Puller) Store() *imagestore.Store { return p.store }

func (p *Puller) Disk() *imagefs.Guard { return p.disk }

func (p *Puller) Pins() *pins.Pins { return p.pins }

func (p *Puller) Claims() *claims.Claims { return p.claims }

// Yields counts the attempts that were cut off for kubelet.
func (p *Puller) Yields() prometheus.Counter { return p.metrics.yields }

// NoSync has the file of pulls written without waiting for the disk.
func (p *Puller) NoSync() error {
	if !p.journal.IsOpen() {
		return nil
	}
	db, err := p.journal.DB()
	if err == nil {
		db.NoSync = true
	}
	return err
}

// Watch returns a pull and a channel that is closed at its next change.
func (p *Puller) Watch(uid string) (*opsv1.PullOperation, <-chan struct{}, error) {
	return p.watch(uid)
}

// List returns all pulls, or those that have not finished.
func (p *Puller) List(activeOnly bool) []*opsv1.PullOperation { return p.list(activeOnly) }

// Take accepts a pull without checking the request. Something on the node waits for it if it is
// urgent.
func (p *Puller) Take(req *opsv1.PullRequest, urgent bool) (*opsv1.PullOperation, error) {
	return p.take(req, urgent)
}

// Cancel cancels a pull and does not wait for its end.
func (p *Puller) Cancel(uid, reason string) (*opsv1.PullOperation, error) {
	op, _, err := p.cancel(uid, reason, "")
	return op, err
}

func (p *Puller) with(uid string, f func(u *pull)) {
	p.mu.Lock()
	defer p.mu.Unlock()
	f(p.pulls[uid])
}

// Hurry has something wait for a pull.
func (p *Puller) Hurry(uid string) { p.with(uid, p.hurryLocked) }

// CutOff ends the attempt of a pull that runs, as for kubelet.
func (p *Puller) CutOff(uid string) { p.with(uid, func(u *pull) { u.stop(errYield) }) }

// Change changes what a pull shows.
func (p *Puller) Change(uid string, f func(op *opsv1.PullOperation)) {
	p.with(uid, func(u *pull) { f(u.op) })
}

// SlowDown has the attempt of a pull that runs be slowed down by the limiter.
func (p *Puller) SlowDown(uid string, l *rate.Limiter) {
	p.with(uid, func(u *pull) { u.limiter.Store(l) })
}

// HoldSlot has a pull hold one of the runtime's download slots.
func (p *Puller) HoldSlot(uid string) { p.with(uid, func(u *pull) { u.slots.Store(true) }) }

// SlotsWanted reports whether somebody else may want the slot of the pull.
func (p *Puller) SlotsWanted(ctx context.Context, uid string) bool {
	var found *pull
	p.with(uid, func(u *pull) { found = u })
	return p.yielder.slotsWanted(ctx, found)
}
