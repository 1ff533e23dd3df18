// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package report

import (
	"math"
	"time"
)

const (
	// WriteGap is the least time between two writes.
	WriteGap = 250 * time.Millisecond
	// RefreshFirst is how long a change may stay unwritten while nodes pull. It doubles after each
	// such write, so that the length of a job hardly counts.
	RefreshFirst = 30 * time.Second
	// quietFirst is the same when no node pulls. It doubles up to quietMax as long as nothing but
	// trifles happens.
	quietFirst = time.Second
	quietMax   = time.Minute
)

// Throttle decides when the status of a job is worth a write. Over a job of n nodes that is
// 16 + 1.5√n times for the work done, and a few times more for the rest.
type Throttle struct {
	last time.Time
	// work is what has been done since the last write, in nodes.
	work float64
	// dirty says that something has changed, urgent that somebody may wait for it.
	dirty, urgent  bool
	refresh, quiet time.Duration
}

// Add notes a change: so much work, in nodes, has been done.
func (p *Throttle) Add(work float64) { p.work, p.dirty = p.work+work, true }

// Urge notes a change that somebody may wait for.
func (p *Throttle) Urge() {
	p.urgent = true
	p.Add(0)
}

// Begin notes that the status was written before the throttle was there.
func (p *Throttle) Begin(now time.Time) { p.last = now }

// Reset begins again, for a job that has been changed.
func (p *Throttle) Reset() { p.dirty, p.urgent, p.refresh, p.quiet = true, true, 0, 0 }

func (p *Throttle) worthIt(n int) bool {
	nodes := float64(max(n, 1))
	// A hair less, for the sum of many small numbers.
	return p.urgent || p.work*1.000001 >= nodes/(16+1.5*math.Sqrt(nodes))
}

// Due says whether to write now, and if not, when to ask again; 0 means at the next change.
func (p *Throttle) Due(now time.Time, n int, idle bool) (bool, time.Duration) {
	at := p.last.Add(max(p.refresh, RefreshFirst))
	switch {
	case p.dirty && p.worthIt(n):
		at = p.last.Add(WriteGap)
	case p.dirty && idle:
		at = p.last.Add(max(p.quiet, quietFirst))
	case idle:
		return false, 0
	}
	if left := at.Sub(now); left > 0 {
		return false, left
	}
	if !p.dirty {
		return false, RefreshFirst
	}
	return true, 0
}

// Wrote notes a write about n nodes. idle says that nothing is under way.
func (p *Throttle) Wrote(now time.Time, n int, idle bool) {
	switch {
	case p.worthIt(n):
		p.quiet = 0
	case idle:
		p.quiet = min(2*max(p.quiet, quietFirst), quietMax)
	default:
		p.refresh = 2 * max(p.refresh, RefreshFirst)
	}
	p.last, p.work, p.dirty, p.urgent = now, 0, false, false
}

// Undo takes back a Wrote whose write failed. What has happened since stays.
func (p *Throttle) Undo(before Throttle) {
	p.work += before.work
	p.dirty, p.urgent = true, p.urgent || before.urgent
	p.last, p.refresh, p.quiet = before.last, before.refresh, before.quiet
}
