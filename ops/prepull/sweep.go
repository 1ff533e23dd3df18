// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package prepull

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"time"

	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	opsv1 "github.com/cri-proxy/cri-proxy/api/ops/v1"
	"github.com/cri-proxy/cri-proxy/ops/prepull/imagestore"
	"github.com/cri-proxy/cri-proxy/ops/prepull/pins"
)

// sweeper ends, once a minute, what nobody wants any more: pulls, pins, leases and claims.
type sweeper struct{ *Puller }

// run sweeps until ctx ends.
func (s *sweeper) run(ctx context.Context) {
	tick := time.NewTicker(sweepInterval)
	defer tick.Stop()
	for {
		s.sweep(ctx, time.Now())
		select {
		case <-tick.C:
		case <-ctx.Done():
			return
		}
	}
}

func (s *sweeper) sweep(ctx context.Context, now time.Time) {
	s.mu.Lock()
	s.expireLocked(now)
	s.mu.Unlock()
	ctx, cancel := context.WithTimeout(ctx, sweepInterval)
	defer cancel()
	expired := func(_ pins.Key, v *pins.Pin) bool { return now.After(v.Until) }
	if _, err := s.pins.Release(ctx, expired); err != nil && ctx.Err() == nil {
		s.log.WithError(err).Warn("pins that have expired not ended, trying again in a minute")
	}
	var errs []error
	if !s.journal.unread { // else nobody knows which pins there are
		errs = append(errs, s.pins.Align(ctx))
	}
	err := errors.Join(append(errs, s.endLeases(ctx), s.claims.Settle(ctx))...)
	if err != nil && ctx.Err() == nil && !imagestore.Unavailable(err) {
		s.log.WithError(err).Debug("leases or pins not ended, trying again in a minute")
	}
}

// expireLocked forgets finished pulls that are too old or too many. The caller holds p.mu.
func (p *Puller) expireLocked(now time.Time) {
	var finished []*pull
	for _, u := range p.pulls {
		if u.finished() {
			finished = append(finished, u)
		}
	}
	slices.SortFunc(finished, func(a, b *pull) int {
		return a.op.GetFinishTime().AsTime().Compare(b.op.GetFinishTime().AsTime())
	})
	for i, u := range finished {
		if now.Sub(u.op.GetFinishTime().AsTime()) <= keepFinished && len(finished)-i <= maxFinished {
			break
		}
		if err := p.journal.removePull(u.op.GetUid()); err != nil {
			p.log.WithError(err).Warn("finished pull not forgotten")
			return
		}
		delete(p.pulls, u.op.GetUid())
	}
}

// endLeases ends our leases that no pull goes on from.
func (s *sweeper) endLeases(ctx context.Context) error {
	s.leasing.Lock()
	defer s.leasing.Unlock()
	leases, err := s.store.OurLeases(ctx)
	if err != nil {
		return err
	}
	wanted := map[string]bool{}
	s.mu.Lock()
	for _, u := range s.pulls {
		// A pull that did not succeed may be repeated, and then goes on from what is there.
		if u.op.GetPhase() != opsv1.PullPhase_PULL_SUCCEEDED {
			wanted[u.lease()] = true
		}
	}
	s.mu.Unlock()
	var errs []error
	for _, id := range leases {
		if !wanted[id] {
			errs = append(errs, s.store.DropLease(ctx, id))
		}
	}
	return errors.Join(errs...)
}

// gone returns the sorted IDs of images that are no longer on the node although they are pinned, or
// a pull that is still known has brought them.
func (p *Puller) gone(ctx context.Context) ([]string, error) {
	list, err := p.images.ListImages(ctx, &runtimeapi.ListImagesRequest{})
	if err != nil {
		return nil, fmt.Errorf("asking the runtime for its images: %w", err)
	}
	there := map[string]bool{}
	for _, i := range list.GetImages() {
		there[i.GetId()] = true
	}
	var ids []string
	for _, pin := range p.pins.List() {
		ids = append(ids, pin.GetImageId())
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	for _, u := range p.pulls {
		if u.op.GetPhase() == opsv1.PullPhase_PULL_SUCCEEDED {
			ids = append(ids, u.op.GetImageId())
		}
	}
	slices.Sort(ids)
	return slices.DeleteFunc(slices.Compact(ids), func(id string) bool { return there[id] }), nil
}
