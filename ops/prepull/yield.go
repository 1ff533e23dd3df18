// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package prepull

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/containerd/containerd/v2/core/content"
	"github.com/opencontainers/go-digest"
	"golang.org/x/time/rate"

	opsv1 "github.com/cri-proxy/cri-proxy/api/ops/v1"
	"github.com/cri-proxy/cri-proxy/ops/guard"
)

// What gives way to kubelet's pulls is bandwidth, and not progress. Ours stand aside while kubelet's really get bytes of
// layers, which the content store tells; not while these look something up, wait for a registry, or unpack. Pulls that
// something on the node waits for never do, nor those that have all their bytes.
//
//   - The line: bytes of layers come to the node that are not ours. Ours are cut off, and none begins. After judgeAfter
//     kubelet's bytes are compared with what ours got before: a trickle from a registry in trouble does not get faster by our
//     standing aside.
//   - The runtime's download slots: containerd has three for all of its pulls together (plugins/transfer, max_concurrent_downloads;
//     core/remotes/docker/fetcher.go), for manifests too, and who comes first is served first. When kubelet's pull waits for one and
//     the runtime fetches ours, ours is cut off. While kubelet's fetch something, ours are fetched without the runtime,
//     see [Puller.slotsWanted]: then they take no slot, and need none.
//   - The layers: containerd has one ingest for each, and who comes second waits for the first. What kubelet waits for, ours
//     let go of, and take up again when it is there.
//
// Both are bounded: after yieldMost ours go on for as long in any case.
const (
	// kubeletPatience is how long a pull of kubelet's is not looked at: one of an image that is there takes milliseconds.
	kubeletPatience = 100 * time.Millisecond
	// watchEvery is how often the content store is asked while kubelet pulls and a pull of ours could stand aside.
	watchEvery = 200 * time.Millisecond
	// watchPatience bounds one look.
	watchPatience = 2 * time.Second
	// yieldMost is how long pulls of ours stand aside before they go on for as long.
	yieldMost = 2 * time.Minute
	// cutCost is what standing aside counts for at least: what was cut off has to look its image up again.
	cutCost = 2 * time.Second
	// judgeAfter is when it is judged whether kubelet's pulls gain by it: containerd writes a MiB at a time.
	judgeAfter = 2 * time.Second
	// rateOver is what the judged rate is the mean of. A line of 2 Mbit/s brings a MiB meanwhile.
	rateOver = 5 * time.Second
	// worth is the part of our rate that kubelet's pulls must have for ours to stand aside. Who shares a line with a few
	// connections of ours gets more.
	worth = 16
	// trickle is a rate, in bytes a second, for which nothing stands aside.
	trickle = 64 << 10
	// fades is what counts of our rate at the next look if it has become less.
	fades = .95
	// rateKept is how long a rate counts for pulls of which none is known yet.
	rateKept = time.Minute
	// worthUnknown is the least rate of kubelet's as long as ours is not known, which is so for the first second of the first.
	worthUnknown = 8 << 20
	// probeEvery is how often ours stand aside to find out, while kubelet's pulls get little.
	probeEvery = 20 * time.Second
)

// kubeletPulls are the pulls of kubelet's that are under way. Its lock is held for no time: kubelet waits for it.
type kubeletPulls struct {
	mu      sync.Mutex // guards running
	running map[*kubeletPull]bool
	changed chan struct{} // somebody is to look
}

type kubeletPull struct {
	image string // empty: not known
	began time.Time
}

func newKubeletPulls() *kubeletPulls {
	return &kubeletPulls{running: map[*kubeletPull]bool{}, changed: make(chan struct{}, 1)}
}

// wake has somebody look.
func (k *kubeletPulls) wake() {
	select {
	case k.changed <- struct{}{}:
	default:
	}
}

// lasting returns the pulls that have lasted for a while, the oldest first.
func (k *kubeletPulls) lasting(now time.Time) []*kubeletPull {
	k.mu.Lock()
	defer k.mu.Unlock()
	var all []*kubeletPull
	for pull := range k.running {
		if now.Sub(pull.began) >= kubeletPatience {
			all = append(all, pull)
		}
	}
	slices.SortFunc(all, func(a, b *kubeletPull) int {
		return cmp.Or(a.began.Compare(b.began), strings.Compare(a.image, b.image))
	})
	return all
}

// since is when the oldest began; zero if that is not known.
func since(pulls []*kubeletPull) time.Time {
	if slices.ContainsFunc(pulls, func(k *kubeletPull) bool { return k.image == "" }) { // of a process before this one
		return time.Time{}
	}
	return pulls[0].began
}

// named says whose pulls these are, for the node's log: who reads the status of a pull may not read what other namespaces run.
func named(pulls []*kubeletPull) string {
	var images []string
	for _, pull := range pulls {
		if pull.image != "" && !slices.Contains(images, pull.image) {
			images = append(images, pull.image)
		}
	}
	return cmp.Or(strings.Join(images, ", "), "an image")
}

// KubeletPulls says that kubelet pulls an image, until done is called; an empty name is one that is not known. Ours may
// have to give way: what they have fetched stays, so that kubelet's goes on from there at full speed if it needs the same.
func (p *Puller) KubeletPulls(image string) (done func()) {
	pull := &kubeletPull{image: image, began: time.Now()}
	k := p.kubelet
	k.mu.Lock()
	k.running[pull] = true
	k.mu.Unlock()
	timer := time.AfterFunc(kubeletPatience, k.wake)
	return func() {
		timer.Stop()
		k.mu.Lock()
		delete(k.running, pull)
		none := len(k.running) == 0
		k.mu.Unlock()
		if none {
			k.wake()
		}
	}
}

// aside is why and how long pulls stand aside. A zero one: they do not.
type aside struct {
	since, until time.Time
	images       []string // that kubelet pulls; empty: not known
	why          string
}

func (a aside) on() bool { return !a.since.IsZero() }

func newAside(since, until time.Time, pulls []*kubeletPull, why string) aside {
	a := aside{since: since, until: until, why: why}
	for _, pull := range pulls {
		named, err := normalize(pull.image)
		if err == nil && !slices.Contains(a.images, named.String()) {
			a.images = append(a.images, named.String())
		}
	}
	return a
}

// message says it to who waits for a pull of ours, without what kubelet pulls for others.
func (a aside) message(u *pull) string {
	whose := "another image"
	switch {
	case slices.Contains(a.images, u.named.String()):
		whose = "the same image"
	case len(a.images) == 0:
		whose = "an image"
	}
	return fmt.Sprintf("yields to kubelet's pull of %s%s since %s, goes on at %s in any case",
		whose, a.why, a.since.UTC().Format(time.RFC3339), a.until.UTC().Format(time.RFC3339))
}

// way is how pulls of ours share the line with kubelet's. Its fields are guarded by Puller.mu.
type way struct {
	aside aside
	// spent is how long ours have stood aside, since they last went on for yieldMost; left is when they did last.
	spent time.Duration
	left  time.Time
	// free is until when they go on in any case, probe when it may be found out again whether kubelet's gain by it, and turn when
	// it may be whether they gain by slots of the runtime's.
	free, probe, turn time.Time
	// holds is set when the runtime fetches one that could give way.
	holds bool
	// gained is set when kubelet's have been found to gain by it, this time.
	gained bool
	// ours is how many bytes a second ours get when they go on, measured then; 0: not known.
	ours     float64
	measured time.Time
}

// least is the rate of kubelet's pulls for which ours stand aside.
func (w *way) least() float64 {
	if w.ours == 0 {
		return worthUnknown
	}
	return max(trickle, w.ours/worth)
}

// seen is what one look has found.
type seen struct {
	// blind is set when the runtime does not tell what comes: it is not containerd.
	blind bool
	// unknown is set when this look has failed.
	unknown bool
	// came are bytes of kubelet's since the last look, recent those of rateOver at most, since ours began or ended to stand aside, and
	// mean is their rate. ours is our rate in the last second, 0 if it is not known.
	came, recent int64
	mean, ours   float64
	idle         bool // kubelet's pulls have had nothing under way for two looks
	// waits is set when something of kubelet's is under way, and nothing comes of it.
	waits bool
	// fetches are the leases under which a layer of ours is under way, and which layers.
	fetches map[string]map[digest.Digest]bool
	// wants are layers of ours that kubelet's pulls want and that are not there, and whether bytes of them come.
	wants map[digest.Digest]bool
}

// lineLocked decides whether ours stand aside for the line, and reports whether that has changed.
func (w *way) lineLocked(now time.Time, s seen, pulls []*kubeletPull) bool {
	if !w.aside.on() {
		if s.ours > 0 { // between two layers it is little for a moment
			w.ours, w.measured = max(s.ours, w.ours*fades), now
		}
		// One that works is seen within a second, and a few MiB that come at once are not enough when it is known that little comes.
		works := float64(s.recent) >= w.least()*rateOver.Seconds()
		probe := s.came > 0 && w.ours > 0 && !now.Before(w.probe)
		slot := s.waits && w.holds && !now.Before(w.turn)
		due := s.blind || probe || works || slot
		if s.unknown || s.idle || now.Before(w.free) || !due {
			return false
		}
		if now.Sub(w.left) >= yieldMost {
			w.spent = 0
		}
		w.aside, w.gained = newAside(now, now.Add(yieldMost-w.spent), pulls, ""), false
		return true
	}
	stood := now.Sub(w.aside.since)
	gains := s.blind || s.unknown || s.mean >= w.least()
	switch {
	case !now.Before(w.aside.until):
		w.leave(now)
		w.spent, w.free = 0, now.Add(yieldMost)
		return true
	case s.idle, stood >= judgeAfter && !gains:
		if worked := s.idle && (w.gained || gains); !worked {
			w.probe, w.turn = now.Add(probeEvery), now.Add(probeEvery)
		}
		w.leave(now)
		return true
	case stood >= judgeAfter:
		w.gained = true
	}
	return false
}

// leave ends standing aside.
func (w *way) leave(now time.Time) {
	if !w.aside.on() {
		return
	}
	w.spent += max(now.Sub(w.aside.since), cutCost)
	if w.spent >= yieldMost { // it was many times
		w.spent, w.free = 0, now.Add(yieldMost)
	}
	w.aside, w.left = aside{}, now
}

// layersLocked decides whether the pull stands aside because kubelet's wants layers of it, and reports whether that has changed.
func (u *pull) layersLocked(now time.Time, s seen, holds bool, pulls []*kubeletPull) bool {
	wants, come := false, false
	for _, l := range u.op.GetLayers() {
		if grows, ok := s.wants[digest.Digest(l.GetDigest())]; ok {
			wants, come = true, come || grows
		}
	}
	before := u.aside.on()
	switch {
	case !wants || now.Before(u.free) || (u.stop != nil && !holds):
		u.aside = aside{}
	case !before, come && u.aside.until.Sub(now) < yieldMost/2: // bytes of ours come, whoever fetches them
		since := now
		if before {
			since = u.aside.since
		}
		u.aside = newAside(since, now.Add(yieldMost), pulls, ", which wants the same layers,")
	default:
		return u.pastLocked(now)
	}
	return before != u.aside.on()
}

// pastLocked ends that the pull stands aside for its layers once it has for as long as it said, and reports whether it has.
func (u *pull) pastLocked(now time.Time) bool {
	if !u.aside.on() || now.Before(u.aside.until) {
		return false
	}
	u.aside, u.free = aside{}, now.Add(yieldMost)
	return true
}

// asideLocked says why a pull must not go on; empty: it may.
func (p *Puller) asideLocked(u *pull) string {
	switch {
	case p.aheadLocked(u):
		return ""
	case u.aside.on():
		return u.aside.message(u)
	case p.way.aside.on() && !u.complete():
		return p.way.aside.message(u)
	}
	return ""
}

// aheadLocked reports whether the pull gives way to nothing: something on the node waits for it, or for another of the same image that
// waits until this one has ended. The latter is so only while it is: what else is different for an urgent pull is that one's own.
func (p *Puller) aheadLocked(u *pull) bool {
	if u.urgent || u.stop == nil {
		return u.urgent
	}
	for _, other := range p.pulls {
		if other.urgent && other.key == u.key && other.op.GetFinishTime() == nil {
			return true
		}
	}
	return false
}

// complete reports whether all bytes are there.
func (u *pull) complete() bool {
	return u.op.GetBytesTotal() > 0 && u.op.GetBytesDone() == u.op.GetBytesTotal()
}

// minded returns the lease IDs of pulls that run, the layers that pulls lack, and whether any could give way.
func (p *Puller) minded() (running []string, lacks map[digest.Digest]bool, could bool) {
	p.mu.Lock()
	defer p.mu.Unlock()
	lacks = map[digest.Digest]bool{}
	for _, u := range p.pulls {
		if u.op.GetFinishTime() != nil {
			continue
		}
		if u.stop != nil {
			running = append(running, leaseID(u.key))
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

// act does what one look asks for.
func (p *Puller) act(now time.Time, s seen, pulls []*kubeletPull) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.way.holds = false
	for _, u := range p.pulls {
		p.way.holds = p.way.holds || u.stop != nil && u.slots.Load() && !p.aheadLocked(u) && len(s.fetches[leaseID(u.key)]) > 0
	}
	changed := p.way.lineLocked(now, s, pulls)
	if changed && p.way.aside.on() {
		p.log.WithField("image", named(pulls)).Debug("kubelet's pull gets bytes, ours stand aside")
	}
	for _, u := range p.pulls {
		if u.op.GetFinishTime() != nil {
			continue
		}
		if s.unknown {
			changed = u.pastLocked(now) || changed
			continue
		}
		fetches := s.fetches[leaseID(u.key)]
		holds := false
		for d := range fetches {
			_, wanted := s.wants[d]
			holds = holds || wanted
		}
		if p.aheadLocked(u) {
			if l := u.limiter.Load(); holds && l != nil && u.stop != nil {
				l.SetLimit(rate.Inf) // what kubelet waits for comes as fast as it would for kubelet
			}
			continue
		}
		if u.layersLocked(now, s, holds, pulls) {
			changed = true
			p.log.WithFields(u.fields()).WithField("kubelets", named(pulls)).WithField("aside", u.aside.on()).Debug("kubelet's pull wants layers of ours")
		}
		if u.stop != nil && !u.cut && p.asideLocked(u) != "" && len(fetches) > 0 {
			u.cut = true
			u.stop(errYield)
			p.metrics.yields.Inc()
		}
	}
	if changed {
		p.nudge()
	}
}

// goOn ends all standing aside: kubelet has no pull left.
func (p *Puller) goOn() {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.way.leave(time.Now())
	for _, u := range p.pulls {
		u.aside = aside{}
	}
	p.nudge()
}

// watchKubelet looks at what kubelet's pulls do while they last.
func (p *Puller) watchKubelet(ctx context.Context) {
	for {
		select {
		case <-p.kubelet.changed:
			p.watchOnce(ctx)
		case <-ctx.Done():
			return
		}
	}
}

// watchOnce looks until kubelet has no pull, or there is none of ours that could give way.
func (p *Puller) watchOnce(ctx context.Context) {
	w := newWatch(p.store)
	looked := false
	defer func() {
		if looked {
			p.goOn()
		}
	}()
	tick := time.NewTicker(watchEvery)
	defer tick.Stop()
	for {
		now := time.Now()
		pulls := p.kubelet.lasting(now)
		running, lacks, could := p.minded()
		if len(pulls) == 0 || !could {
			return
		}
		if !looked {
			p.measure()
		}
		looked = true
		s, err := w.look(ctx, now, since(pulls), p.turned(), running, lacks)
		switch {
		case unavailable(err):
			s = seen{blind: true}
		case err != nil:
			s = seen{unknown: true}
			p.log.WithError(err).Debug("what kubelet's pulls get is not known")
		}
		p.act(now, s, pulls)
		for due := false; !due; {
			select {
			case <-tick.C:
				due = true
			case <-p.kubelet.changed: // not a look for each of many short ones
				due = len(p.kubelet.lasting(time.Now())) == 0
			case <-ctx.Done():
				return
			}
		}
	}
}

// measure takes the rate of ours from their progress, before they share the line.
func (p *Puller) measure() {
	p.mu.Lock()
	defer p.mu.Unlock()
	var all int64
	for _, u := range p.pulls {
		if u.stop != nil {
			all += u.op.GetBytesPerSecond()
		}
	}
	switch now := time.Now(); {
	case all > 0:
		p.way.ours, p.way.measured = float64(all), now
	case now.Sub(p.way.measured) > rateKept: // the next is of another registry
		p.way.ours = 0
	}
}

// turned is when ours last began or ended to stand aside.
func (p *Puller) turned() time.Time {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.way.aside.on() {
		return p.way.aside.since
	}
	return p.way.left
}

// slotsWanted reports whether somebody else may want the runtime's download slots: kubelet, or one of ours before which this one goes.
// Then the layers are fetched here, as those of pulls with a limit are.
func (p *Puller) slotsWanted(ctx context.Context, u *pull) bool {
	if pulls := p.kubelet.lasting(time.Now()); len(pulls) > 0 {
		// What has been begun since then is kubelet's. One that has not come as far may hang for ever.
		statuses, err := p.store.content.ListStatuses(inNamespace(ctx))
		if from := since(pulls); err == nil && slices.ContainsFunc(statuses, func(st content.Status) bool { return !st.StartedAt.Before(from) }) {
			return true
		}
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	for _, other := range p.pulls {
		if u.urgent && other != u && other.stop != nil && other.slots.Load() {
			return true
		}
	}
	return false
}

// errOvertaken ends a slow pull that is in the way of one that something waits for.
var errOvertaken = errors.New("a pull that something waits for takes over")

// overtakenLocked deals with a pull that is urgent and finds that another of the same image runs: that one gives way to nothing, see
// [Puller.aheadLocked]. One that is held back by a speed limit of its own, and has bytes to fetch, is ended: the urgent one goes on
// from there.
func (p *Puller) overtakenLocked(u, leader *pull) {
	if limit, own := p.limitOf(leader), p.limitOf(u); limit > 0 && (own == 0 || own > limit) && !leader.complete() && !leader.urgent {
		leader.stop(errOvertaken)
	}
}

// limitOf returns the bound of the pull's speed; 0: none.
func (p *Puller) limitOf(u *pull) int64 {
	if limit := u.req.GetBytesPerSecond(); limit != 0 {
		return limit
	}
	return p.limit
}

// keepWatching is [Puller.watchKubelet] for as long as ctx.
func (p *Puller) keepWatching(ctx context.Context) {
	guard.Keep(ctx, p.log, func() { p.watchKubelet(ctx) })
}

// yieldedLocked puts a pull that has been cut off back to those that wait.
func (p *Puller) yieldedLocked(u *pull) {
	u.op.Attempt--
	p.keepLocked(u)
	if why := p.asideLocked(u); why != "" {
		u.waitLocked(opsv1.PullReasonYieldsToKubelet, why)
		return
	}
	u.op.Phase, u.op.Reason, u.op.BytesPerSecond = opsv1.PullPhase_PULL_WAITING, opsv1.PullReasonInQueue, 0
	u.notifyLocked()
}
