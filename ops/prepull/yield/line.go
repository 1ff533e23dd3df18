// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

// Package yield decides when our pulls give way to kubelet's.
//
// What gives way is bandwidth, not progress. Our pulls pause while kubelet's really get bytes of
// layers, which the content store tells. They do not pause while kubelet's look something up, wait
// for a registry, or unpack. A pull that something on the node waits for never pauses, and neither
// does a pull that has all its bytes.
//
//   - The line ([Line]): bytes of layers come to the node that are not ours. Our pulls are cut off,
//     and none begins. After [EvaluateAfter] kubelet's rate is compared with the rate that ours had
//     before: a trickle from a registry in trouble does not get faster because ours pause.
//   - The runtime's download slots: containerd has three for all of its pulls together
//     (plugins/transfer, max_concurrent_downloads; core/remotes/docker/fetcher.go), for manifests
//     too, first come, first served. When kubelet's pull waits for a slot and the runtime fetches
//     ours, ours is cut off. While kubelet's fetch something, our layers are fetched without the
//     runtime: then they take no slot and need none.
//   - The layers ([Layers]): containerd has one ingest for each layer, and a second writer waits
//     for the first. Our pulls let go of the layers that kubelet waits for, and go on once these
//     are there.
//
// Both are bounded: after [MaxPause] our pulls go on for as long in any case.
package yield

import (
	"fmt"
	"slices"
	"time"

	"github.com/opencontainers/go-digest"

	"github.com/cri-proxy/cri-proxy/ops/prepull/registry"
)

const (
	// MaxPause is how long pulls of ours pause before they go on for as long.
	MaxPause = 2 * time.Minute
	// CutCost is what one pause counts for at least: a pull that was cut off has to look its image
	// up again.
	CutCost = 2 * time.Second
	// EvaluateAfter is how long a pause lasts before it is judged whether kubelet's pulls gain by
	// it: containerd writes a MiB at a time.
	EvaluateAfter = 2 * time.Second
	// RateOver is the time over which kubelet's rate is measured. A line of 2 Mbit/s brings a MiB
	// in it.
	RateOver = 5 * time.Second
	// worth is which part of our rate kubelet's pulls must have for ours to pause. A pull that
	// shares a line with a few connections of ours gets more than that part.
	worth = 16
	// Trickle is the least rate, in bytes a second, for which ours pause.
	Trickle = 64 << 10
	// fade is the part of our rate that counts at the next look if the rate has become less.
	fade = .95
	// rateAge is how long our rate counts when no pull of ours has a rate yet.
	rateAge = time.Minute
	// worthUnknown is the least rate of kubelet's for which ours pause while our rate is not known:
	// in the first second of the first pull.
	worthUnknown = 8 << 20
	// probeInterval is how often ours pause in order to find out, while kubelet's pulls get little.
	probeInterval = 20 * time.Second
)

// Seen is what one look has found; see [Watcher.Look].
type Seen struct {
	// Blind is set when the runtime does not tell what comes: it is not containerd.
	Blind bool
	// Unknown is set when this look has failed.
	Unknown bool
	// Fetches are the leases under which a layer of ours is under way, and which layers.
	Fetches map[string]map[digest.Digest]bool
	// Wants are the layers of ours that kubelet's pulls want and that are not there, and whether
	// bytes of them come.
	Wants map[digest.Digest]bool

	// came is how many bytes of kubelet's have come since the last look. recent is how many have
	// come in the last RateOver, but not from before ours last paused or went on, and mean is their
	// rate.
	came, recent int64
	mean         float64
	// ours is our rate in the last second; 0 if it is not known.
	ours float64
	// idle is set when kubelet's pulls have had nothing under way for two looks.
	idle bool
	// waits is set when something of kubelet's is under way and no byte of it comes.
	waits bool
}

// Pause is why and until when pulls of ours pause. The zero Pause is none.
type Pause struct {
	since, until time.Time
	images       []string // that kubelet pulls; empty: not known
	why          string
}

// On reports whether there is a pause.
func (p Pause) On() bool { return !p.since.IsZero() }

func newPause(since, until time.Time, pulls []*KubeletPull, why string) Pause {
	p := Pause{since: since, until: until, why: why}
	for _, pull := range pulls {
		named, err := registry.Normalize(pull.image)
		if err == nil && !slices.Contains(p.images, named.String()) {
			p.images = append(p.images, named.String())
		}
	}
	return p
}

// Message describes the pause to whoever waits for our pull of the image, without what kubelet
// pulls for others.
func (p Pause) Message(image string) string {
	whose := "another image"
	switch {
	case slices.Contains(p.images, image):
		whose = "the same image"
	case len(p.images) == 0:
		whose = "an image"
	}
	return fmt.Sprintf("yields to kubelet's pull of %s%s since %s, goes on at %s in any case",
		whose, p.why, p.since.UTC().Format(time.RFC3339), p.until.UTC().Format(time.RFC3339))
}

// Line decides whether pulls of ours pause because they share the line, or the runtime's download
// slots, with kubelet's. It has no lock. The zero Line is ready.
type Line struct {
	pause Pause
	// spent is how long ours have paused since they last went on for MaxPause, and ended is when
	// the last pause ended.
	spent time.Duration
	ended time.Time
	// free is until when ours go on in any case. probe is when ours may pause again in order to
	// find out whether kubelet's gain bandwidth by it, and slot the same for the runtime's slots.
	free, probe, slot time.Time
	// gained is set when kubelet's pulls have been found to gain by this pause.
	gained bool
	// ours is our rate while ours do not pause, in bytes a second, and measured is when it was; 0:
	// not known.
	ours     float64
	measured time.Time
}

// Pause returns the pause that is on.
func (l *Line) Pause() Pause { return l.pause }

// Turned is when ours last paused or went on.
func (l *Line) Turned() time.Time {
	if l.pause.On() {
		return l.pause.since
	}
	return l.ended
}

// least is the least rate of kubelet's pulls for which ours pause.
func (l *Line) least() float64 {
	if l.ours == 0 {
		return worthUnknown
	}
	return max(Trickle, l.ours/worth)
}

// Measure takes the rate of our pulls, in bytes a second, before they share the line; 0: not known.
func (l *Line) Measure(now time.Time, rate int64) {
	switch {
	case rate > 0:
		l.ours, l.measured = float64(rate), now
	case now.Sub(l.measured) > rateAge: // the next pull may use another registry
		l.ours = 0
	}
}

// Decide begins or ends a pause by what one look has found, and reports whether it did. holdsSlot
// says that the runtime fetches a pull of ours that could pause.
func (l *Line) Decide(now time.Time, s Seen, holdsSlot bool, pulls []*KubeletPull) (changed bool) {
	if !l.pause.On() {
		if s.ours > 0 { // between two layers it is little for a moment
			l.ours, l.measured = max(s.ours, l.ours*fade), now
		}
		// A transfer that works is seen within a second. A few MiB that come at once are not enough
		// when little is known to come.
		works := float64(s.recent) >= l.least()*RateOver.Seconds()
		probe := s.came > 0 && l.ours > 0 && !now.Before(l.probe)
		slot := s.waits && holdsSlot && !now.Before(l.slot)
		due := s.Blind || probe || works || slot
		if s.Unknown || s.idle || now.Before(l.free) || !due {
			return false
		}
		if now.Sub(l.ended) >= MaxPause {
			l.spent = 0
		}
		l.pause, l.gained = newPause(now, now.Add(MaxPause-l.spent), pulls, ""), false
		return true
	}
	paused := now.Sub(l.pause.since)
	gains := s.Blind || s.Unknown || s.mean >= l.least()
	switch {
	case !now.Before(l.pause.until):
		l.End(now)
		l.spent, l.free = 0, now.Add(MaxPause)
		return true
	case s.idle, paused >= EvaluateAfter && !gains:
		if worked := s.idle && (l.gained || gains); !worked {
			l.probe, l.slot = now.Add(probeInterval), now.Add(probeInterval)
		}
		l.End(now)
		return true
	case paused >= EvaluateAfter:
		l.gained = true
	}
	return false
}

// End ends the pause, if there is one.
func (l *Line) End(now time.Time) {
	if !l.pause.On() {
		return
	}
	l.spent += max(now.Sub(l.pause.since), CutCost)
	if l.spent >= MaxPause { // there were many pauses
		l.spent, l.free = 0, now.Add(MaxPause)
	}
	l.pause, l.ended = Pause{}, now
}

// Layers decides whether one pull of ours pauses because kubelet's wants layers of it. It has no
// lock. The zero Layers is ready.
type Layers struct {
	pause Pause
	free  time.Time // until then the pull goes on in any case
}

// Pause returns the pause that is on.
func (l *Layers) Pause() Pause { return l.pause }

// Decide begins, extends or ends the pause, and reports whether that changed anything. wanted says
// that kubelet's pulls want layers which our pull holds, or would hold, and come that bytes of
// these come.
func (l *Layers) Decide(now time.Time, wanted, come bool, pulls []*KubeletPull) (changed bool) {
	before := l.pause.On()
	switch {
	case !wanted || now.Before(l.free):
		l.pause = Pause{}
	case !before, come && l.pause.until.Sub(now) < MaxPause/2: // whoever fetches the bytes
		since := now
		if before {
			since = l.pause.since
		}
		l.pause = newPause(since, now.Add(MaxPause), pulls, ", which wants the same layers,")
	default:
		return l.Expire(now)
	}
	return before != l.pause.On()
}

// Expire ends a pause that has lasted as long as it may, and reports whether it did.
func (l *Layers) Expire(now time.Time) bool {
	if !l.pause.On() || now.Before(l.pause.until) {
		return false
	}
	l.pause, l.free = Pause{}, now.Add(MaxPause)
	return true
}

// End ends the pause.
func (l *Layers) End() { l.pause = Pause{} }
