// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package prepull

import (
	"context"
	"slices"
	"time"

	"github.com/containerd/containerd/v2/core/content"
	"github.com/opencontainers/go-digest"
	"golang.org/x/time/rate"

	"github.com/cri-proxy/cri-proxy/ops/prepull/imagestore"
	"github.com/cri-proxy/cri-proxy/ops/prepull/yield"
)

// yielder has the pulls of a puller give way to kubelet's.
type yielder struct {
	p       *Puller
	kubelet *yield.KubeletPulls
	line    yield.Line // guarded by Puller.mu
}

func newYielder(p *Puller) *yielder { return &yielder{p: p, kubelet: yield.NewKubeletPulls()} }

// watch looks at what kubelet's pulls do, while there are any, until ctx ends.
func (y *yielder) watch(ctx context.Context) {
	for {
		select {
		case <-y.kubelet.Changed():
			y.watchOnce(ctx)
		case <-ctx.Done():
			return
		}
	}
}

// watchOnce looks until kubelet has no pull, or until no pull of ours could give way.
func (y *yielder) watchOnce(ctx context.Context) {
	w := yield.NewWatcher(y.p.store)
	looked := false
	defer func() {
		if looked {
			y.goOn()
		}
	}()
	tick := time.NewTicker(yield.WatchInterval)
	defer tick.Stop()
	for {
		now := time.Now()
		pulls := y.kubelet.Lasting(now)
		running, lacks, could := y.state()
		if len(pulls) == 0 || !could {
			return
		}
		if !looked {
			y.measure()
		}
		looked = true
		s, err := w.Look(ctx, now, yield.Since(pulls), y.turned(), running, lacks)
		switch {
		case imagestore.Unavailable(err):
			s = yield.Seen{Blind: true}
		case err != nil:
			s = yield.Seen{Unknown: true}
			y.p.log.WithError(err).Debug("what kubelet's pulls get is not known")
		}
		y.act(now, s, pulls)
		for due := false; !due; {
			select {
			case <-tick.C:
				due = true
			case <-y.kubelet.Changed(): // do not look for each of many short pulls
				due = len(y.kubelet.Lasting(time.Now())) == 0
			case <-ctx.Done():
				return
			}
		}
	}
}

// state returns the leases of the pulls that run, the layers that pulls lack, and whether any pull
// could give way.
func (y *yielder) state() (running []string, lacks map[digest.Digest]bool, could bool) {
	y.p.mu.Lock()
	defer y.p.mu.Unlock()
	lacks = map[digest.Digest]bool{}
	for _, u := range y.p.pulls {
		if u.finished() {
			continue
		}
		if u.stop != nil {
			running = append(running, u.lease())
		}
		could = could || !u.urgent
		for _, l := range u.op.GetLayers() {
			if l.GetBytesDone() < l.GetBytesTotal() {
				lacks[digest.Digest(l.GetDigest())] = true
			}
		}
	}
	return running, lacks, could
}

// measure takes our rate from the progress of the pulls, before they share the line.
func (y *yielder) measure() {
	y.p.mu.Lock()
	defer y.p.mu.Unlock()
	var all int64
	for _, u := range y.p.pulls {
		if u.stop != nil {
			all += u.op.GetBytesPerSecond()
		}
	}
	y.line.Measure(time.Now(), all)
}

// turned is when ours last paused or went on.
func (y *yielder) turned() time.Time {
	y.p.mu.Lock()
	defer y.p.mu.Unlock()
	return y.line.Turned()
}

// act does what one look asks for.
func (y *yielder) act(now time.Time, s yield.Seen, pulls []*yield.KubeletPull) {
	p := y.p
	p.mu.Lock()
	defer p.mu.Unlock()
	holdsSlot := false
	for _, u := range p.pulls {
		fetches := u.stop != nil && u.slots.Load() && len(s.Fetches[u.lease()]) > 0
		holdsSlot = holdsSlot || fetches && !y.aheadLocked(u)
	}
	changed := y.line.Decide(now, s, holdsSlot, pulls)
	if changed && y.line.Pause().On() {
		p.log.WithField("image", yield.Names(pulls)).Debug("kubelet's pull gets bytes, ours stand aside")
	}
	for _, u := range p.pulls {
		if !u.finished() {
			changed = y.actOnLocked(u, now, s, pulls) || changed
		}
	}
	if changed {
		p.nudge()
	}
}

// actOnLocked does what one look asks for with a pull, and reports whether something has changed
// that other pulls may depend on.
func (y *yielder) actOnLocked(u *pull, now time.Time, s yield.Seen, pulls []*yield.KubeletPull) (changed bool) {
	if s.Unknown {
		return u.layers.Expire(now)
	}
	p := y.p
	fetches := s.Fetches[u.lease()]
	holds := false // a layer that kubelet's pulls want
	for d := range fetches {
		_, wanted := s.Wants[d]
		holds = holds || wanted
	}
	if y.aheadLocked(u) {
		if l := u.limiter.Load(); holds && l != nil && u.stop != nil {
			l.SetLimit(rate.Inf) // what kubelet waits for comes as fast as it would for kubelet
		}
		return false
	}
	wanted, come := false, false
	for _, l := range u.op.GetLayers() {
		if grows, ok := s.Wants[digest.Digest(l.GetDigest())]; ok {
			wanted, come = true, come || grows
		}
	}
	if u.stop != nil && !holds {
		wanted = false
	}
	if changed = u.layers.Decide(now, wanted, come, pulls); changed {
		p.log.WithFields(u.fields()).WithField("kubelets", yield.Names(pulls)).
			WithField("aside", u.layers.Pause().On()).
			Debug("kubelet's pull wants layers of ours")
	}
	if u.stop != nil && !u.cut && y.pauseLocked(u) != "" && len(fetches) > 0 {
		u.cut = true
		u.stop(errYield)
		p.metrics.yields.Inc()
	}
	return changed
}

// goOn ends all pauses: kubelet has no pull left.
func (y *yielder) goOn() {
	y.p.mu.Lock()
	defer y.p.mu.Unlock()
	y.line.End(time.Now())
	for _, u := range y.p.pulls {
		u.layers.End()
	}
	y.p.nudge()
}

// pauseLocked says why a pull must not go on; empty if it may.
func (y *yielder) pauseLocked(u *pull) string {
	switch {
	case y.aheadLocked(u):
		return ""
	case u.layers.Pause().On():
		return u.layers.Pause().Message(u.named.String())
	case y.line.Pause().On() && !u.complete():
		return y.line.Pause().Message(u.named.String())
	}
	return ""
}

// aheadLocked reports whether the pull gives way to nothing: something on the node waits for it, or
// for another pull of the same image that waits until this one has ended. Only while that is so:
// otherwise the pull is not urgent itself.
func (y *yielder) aheadLocked(u *pull) bool {
	if u.urgent || u.stop == nil {
		return u.urgent
	}
	for _, other := range y.p.pulls {
		if other.urgent && other.key == u.key && !other.finished() {
			return true
		}
	}
	return false
}

// slotsWanted reports whether somebody else may want the runtime's download slots: kubelet, or one
// of our pulls that this one goes before. Then the layers are fetched here, as those of pulls with
// a limit are.
func (y *yielder) slotsWanted(ctx context.Context, u *pull) bool {
	if pulls := y.kubelet.Lasting(time.Now()); len(pulls) > 0 {
		// What was begun since then is kubelet's. A pull that has not come as far may hang for
		// ever.
		statuses, err := y.p.store.Content.ListStatuses(imagestore.InNamespace(ctx))
		from := yield.Since(pulls)
		begun := func(st content.Status) bool { return !st.StartedAt.Before(from) }
		if err == nil && slices.ContainsFunc(statuses, begun) {
			return true
		}
	}
	y.p.mu.Lock()
	defer y.p.mu.Unlock()
	for _, other := range y.p.pulls {
		if u.urgent && other != u && other.stop != nil && other.slots.Load() {
			return true
		}
	}
	return false
}
