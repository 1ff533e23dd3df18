// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package prepull

import (
	"context"
	"fmt"
	"slices"
	"time"

	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	opsv1 "github.com/cri-proxy/cri-proxy/api/ops/v1"
	"github.com/cri-proxy/cri-proxy/ops/prepull/imagestore"
)

const (
	// progressInterval is how often the content store is asked how far a pull is. The question
	// takes a millisecond.
	progressInterval = 250 * time.Millisecond
	// manifestInterval is how often it is asked for the manifest during the first manifestSoon,
	// which is as long as a registry usually needs. A pull that does not fit on the disk is not
	// ended before its manifest is known.
	manifestInterval = 20 * time.Millisecond
	manifestSoon     = 5 * time.Second
	// rateWindow is the time over which the shown rate is the mean.
	rateWindow = 3 * time.Second
)

// sight is what is seen of an image while it is pulled. Once [attempt.track] runs, only that uses
// it.
type sight struct {
	search *imagestore.Search
	m      *imagestore.Manifest // nil: not known yet
	done   []int64              // bytes of each layer that are there
	before int64                // bytes that were there before
	// present is how many of the lowest layers are there as snapshots.
	present int
	// refused is why the pull is ended.
	refused error
}

// sighted takes in what the image consists of. The error says that it does not fit on the disk.
func (a *attempt) sighted(ctx context.Context, s *sight, m *imagestore.Manifest) error {
	done := make([]int64, len(m.Layers))
	snapshotter := a.snapshotter(ctx)
	present := a.store.Unpacked(ctx, snapshotter, m.Chain)
	if present > 0 {
		err := a.store.KeepSnapshot(ctx, s.search.Lease(), snapshotter, m.Chain[present-1])
		if err != nil && ctx.Err() == nil {
			a.log.WithError(err).Debug("snapshots not kept")
		}
	}
	for i := range present {
		done[i] = m.Layers[i].Size
	}
	if err := a.store.Fetched(ctx, m.Layers, done); err != nil {
		return fmt.Errorf("what is there of the image: %w", err)
	}
	s.m, s.done, s.present, s.before = m, done, present, s.search.Before(ctx, m, present, done)
	return a.checkDisk(ctx, m.Total-sum(done))
}

// track shows the progress until ended is closed. It calls stop for a pull that does not fit on the
// disk.
func (a *attempt) track(ctx context.Context, s *sight, stop context.CancelFunc, ended <-chan struct{}) {
	var pace *speed
	last := int64(0)
	began := time.Now()
	for {
		every := manifestInterval
		if time.Since(began) > manifestSoon {
			every = progressInterval
		}
		if s.m == nil {
			if err := a.seek(ctx, s); err != nil && s.m != nil {
				s.refused = err
				stop()
			} else if err != nil && ctx.Err() == nil {
				a.log.WithError(err).Debug("manifest not known")
			}
		} else if pace != nil {
			if err := a.store.Fetched(ctx, s.m.Layers, s.done); err != nil && ctx.Err() == nil {
				a.log.WithError(err).Debug("progress not known")
			}
		}
		if s.m != nil {
			every = progressInterval
			if pace == nil {
				last = s.before
				pace = newSpeed(last, began)
			}
			now := sum(s.done)
			a.show(s, max(0, now-last), pace.add(now, time.Now()))
			last = now
		}
		timer := time.NewTimer(every)
		select {
		case <-timer.C:
		case <-ended:
			timer.Stop()
			a.lastLook(ctx, s, last)
			return
		}
	}
}

// seek finds what the image consists of in what the runtime has fetched.
func (a *attempt) seek(ctx context.Context, s *sight) error {
	m, err := s.search.Look(ctx)
	if err != nil || m == nil {
		return err
	}
	return a.sighted(ctx, s, m)
}

// lastLook counts what has come since the look before, also of an attempt that was cut off.
func (a *attempt) lastLook(ctx context.Context, s *sight, last int64) {
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), time.Second)
	defer cancel()
	if s.m == nil {
		if _ = a.seek(ctx, s); s.m == nil {
			return
		}
		last = s.before
	} else if a.store.Fetched(ctx, s.m.Layers, s.done) != nil {
		return
	}
	a.show(s, max(0, sum(s.done)-last), 0)
}

// show puts the progress into the operation.
func (a *attempt) show(s *sight, fetched, rate int64) {
	a.mu.Lock()
	defer a.mu.Unlock()
	u := a.u
	if u.finished() {
		return
	}
	u.op.LastFailure = nil
	u.op.BytesDone, u.op.BytesTotal, u.op.BytesPerSecond = sum(s.done), s.m.Total, rate
	u.op.BytesFetched += fetched
	a.metrics.bytes.Add(float64(fetched))
	u.op.Phase = opsv1.PullPhase_PULL_FETCHING
	if u.op.BytesDone == s.m.Total {
		u.op.Phase = opsv1.PullPhase_PULL_UNPACKING
	}
	u.op.Layers = layerProgress(s.m.Layers, s.done)
	u.notifyLocked()
}

func layerProgress(layers []ocispec.Descriptor, done []int64) []*opsv1.LayerProgress {
	out := make([]*opsv1.LayerProgress, len(layers))
	for i, l := range layers {
		out[i] = &opsv1.LayerProgress{Digest: l.Digest.String(), BytesDone: done[i], BytesTotal: l.Size}
	}
	return out
}

func sum(n []int64) int64 {
	total := int64(0)
	for _, v := range n {
		total += v
	}
	return total
}

// speed computes the current rate.
type speed struct {
	at   []time.Time
	seen []int64
}

func newSpeed(n int64, at time.Time) *speed { return &speed{at: []time.Time{at}, seen: []int64{n}} }

// add takes what there is now and returns bytes per second.
func (r *speed) add(n int64, at time.Time) int64 {
	r.at, r.seen = append(r.at, at), append(r.seen, n)
	old := slices.IndexFunc(r.at, func(t time.Time) bool { return at.Sub(t) <= rateWindow })
	r.at, r.seen = r.at[old:], r.seen[old:]
	took := at.Sub(r.at[0])
	if took <= 0 {
		return 0
	}
	return max(0, int64(float64(n-r.seen[0])/took.Seconds()))
}
