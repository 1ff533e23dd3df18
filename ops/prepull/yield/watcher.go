// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package yield

import (
	"context"
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/containerd/containerd/v2/core/content"
	"github.com/containerd/containerd/v2/core/leases"
	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/cri-proxy/cri-proxy/ops/prepull/imagestore"
)

const (
	// WatchInterval is how often the content store is asked while kubelet pulls and a pull of ours
	// could pause, and watchTimeout bounds one look.
	WatchInterval = 200 * time.Millisecond
	watchTimeout  = 2 * time.Second
	// BareAge is how long a blob without labels is asked for again. containerd labels a manifest a
	// moment after it is there, and layers never.
	BareAge = 3 * time.Second
)

// Watcher looks at what comes to containerd's content store, and compares each look with the one
// before.
type Watcher struct {
	store *imagestore.Store
	// before are the layers that were under way at the last look, and mine the leases of ours that
	// were at work then.
	before map[string]ingest
	mine   []string
	points []point
	quiet  int // looks in a row at which kubelet's pulls had no layer under way
	// known are the ingests that were seen as ours, and theirs the layers that were seen as
	// kubelet's.
	known, theirs map[string]bool
	waiting       map[string]bool // what of kubelet's was under way at the last look
	// steady is since when bytes of ours come, and came when they last did.
	steady, came time.Time
	// pulls are what kubelet's pulls want, by lease; there are layers that were found on the node.
	pulls map[string]*wanted
	there map[digest.Digest]bool
}

// ingest is a layer under way.
type ingest struct {
	digest        digest.Digest
	offset, total int64
	ours          bool
}

// point is how many bytes have come by then.
type point struct {
	at             time.Time
	kubelets, ours int64
}

// wanted is what a pull of kubelet's is found to want.
type wanted struct {
	layers []digest.Digest
	read   map[digest.Digest]bool      // blobs that were looked at
	asked  map[digest.Digest]time.Time // when the labels of a blob were first asked for
}

// bare reports whether the blob has been without labels for long enough. It notes the first
// question.
func (w *wanted) bare(d digest.Digest) bool {
	at, asked := w.asked[d]
	if !asked {
		w.asked[d] = time.Now()
	}
	return asked && time.Since(at) >= BareAge
}

// NewWatcher returns a watcher that has seen nothing.
func NewWatcher(s *imagestore.Store) *Watcher {
	return &Watcher{
		store: s, known: map[string]bool{}, theirs: map[string]bool{}, pulls: map[string]*wanted{},
		there: map[digest.Digest]bool{},
	}
}

// Look finds what comes. since is when the oldest of kubelet's pulls began, and turned when ours
// last paused or went on. running are the leases of ours at work, and lacks the layers that ours
// have yet to get.
//
// Errors: the runtime's; [imagestore.Unavailable] if it is not containerd.
func (w *Watcher) Look(
	ctx context.Context, now, since, turned time.Time, running []string, lacks map[digest.Digest]bool,
) (Seen, error) {
	ctx, cancel := context.WithTimeout(imagestore.InNamespace(ctx), watchTimeout)
	defer cancel()
	statuses, err := w.store.Content.ListStatuses(ctx)
	if err != nil {
		return Seen{}, fmt.Errorf("layers under way: %w", err)
	}
	blobs := map[string]content.Status{} // of whatever kind, by ref
	for _, st := range statuses {
		blobs[st.Ref] = st
	}
	s := Seen{Fetches: map[string]map[digest.Digest]bool{}, Wants: map[digest.Digest]bool{}}
	ours, err := w.ours(ctx, running, blobs, s.Fetches)
	if err != nil {
		return Seen{}, err
	}
	p, grows, idle, err := w.growth(ctx, now, since, blobs, ours)
	if err != nil {
		return Seen{}, err
	}
	s.came = w.add(p, since)
	s.waits = w.stillWaits(since, blobs, ours) && s.came == 0
	if w.quiet++; !idle || len(w.waiting) > 0 {
		w.quiet = 0
	}
	s.idle = w.quiet >= 2 && s.came == 0
	s.ours = w.ourRate(now)
	s.recent, s.mean, _ = w.rates(turned)
	w.mine = running
	if len(lacks) > 0 {
		if err := w.wants(ctx, since, lacks, grows, s.Wants); err != nil {
			return Seen{}, err
		}
	}
	return s, nil
}

// ours returns the ingests of our leases. Those of the leases that are at work also go into
// fetches, by lease.
func (w *Watcher) ours(
	ctx context.Context, running []string, blobs map[string]content.Status, fetches map[string]map[digest.Digest]bool,
) (map[string]bool, error) {
	ours := map[string]bool{}
	for _, lease := range running {
		if err := w.oursUnder(ctx, lease, blobs, ours, fetches); err != nil {
			return nil, err
		}
	}
	for _, lease := range w.mine { // of a pull that was cut off since: its layers still end
		if slices.Contains(running, lease) {
			continue
		}
		if err := w.oursUnder(ctx, lease, blobs, ours, nil); err != nil {
			return nil, err
		}
	}
	return ours, nil
}

// growth counts the bytes that have come since the last look, and returns the layers that grow.
// idle is set when kubelet's pulls have no layer under way.
func (w *Watcher) growth(
	ctx context.Context, now, since time.Time, blobs map[string]content.Status, ours map[string]bool,
) (p point, grows map[digest.Digest]bool, idle bool, err error) {
	p.at = now
	if len(w.points) > 0 {
		last := w.points[len(w.points)-1]
		p.kubelets, p.ours = last.kubelets, last.ours
	}
	grows, idle = map[digest.Digest]bool{}, true
	open := map[string]ingest{}
	for ref, st := range blobs {
		d, ok := layerOf(ref)
		if !ok {
			continue
		}
		i := ingest{digest: d, offset: st.Offset, total: st.Total, ours: ours[ref]}
		open[ref] = i
		from, known := w.before[ref]
		began := !st.StartedAt.Before(since) // not kept from an earlier pull
		if came := i.offset - from.offset; came > 0 && (known || began) {
			grows[d] = true
			p.add(i.ours, came)
		}
		if !i.ours && (grows[d] || began && !w.known[ref]) { // not of a pull of ours that was cut off
			w.theirs[ref] = true
		}
		idle = idle && (i.ours || !w.theirs[ref])
	}
	for ref, i := range w.before {
		if _, ok := open[ref]; ok {
			continue
		}
		switch there, err := w.has(ctx, i.digest); {
		case err != nil:
			return point{}, nil, false, err
		case there:
			p.add(i.ours, max(0, i.total-i.offset))
		}
	}
	w.before = open
	return p, grows, idle, nil
}

// add keeps the point, and returns how many bytes of kubelet's have come since the one before.
func (w *Watcher) add(p point, since time.Time) (came int64) {
	if len(w.points) > 0 {
		came = p.kubelets - w.points[len(w.points)-1].kubelets
	} else {
		start := p
		if p.at.Sub(since) < RateOver { // all of it has come since then
			came, start = p.kubelets, point{at: since}
		}
		w.points = append(w.points, start)
	}
	w.points = append(w.points, p)
	for len(w.points) > 2 && p.at.Sub(w.points[1].at) >= RateOver {
		w.points = w.points[1:]
	}
	return came
}

// stillWaits notes what of kubelet's is under way, manifests too, and reports whether any of it was
// under way at the last look.
func (w *Watcher) stillWaits(since time.Time, blobs map[string]content.Status, ours map[string]bool) (still bool) {
	waiting := map[string]bool{}
	for ref, st := range blobs {
		if ours[ref] || w.known[ref] || st.StartedAt.Before(since) && !w.theirs[ref] {
			continue
		}
		waiting[ref] = true
		still = still || w.waiting[ref]
	}
	w.waiting = waiting
	return still
}

// ourRate returns our rate in the last second; 0 unless bytes of ours have come for as long.
func (w *Watcher) ourRate(now time.Time) float64 {
	p := w.points[len(w.points)-1]
	switch last := w.points[max(0, len(w.points)-2)]; {
	case p.ours > last.ours && w.steady.IsZero():
		w.steady, w.came = now, now
	case p.ours > last.ours:
		w.came = now
	case now.Sub(w.came) > time.Second:
		w.steady = time.Time{}
	}
	if w.steady.IsZero() || now.Sub(w.steady) < time.Second {
		return 0
	}
	_, _, ours := w.rates(now.Add(-time.Second))
	return ours
}

func (p *point) add(ours bool, came int64) {
	if ours {
		p.ours += came
	} else {
		p.kubelets += came
	}
}

// rates returns how many bytes of kubelet's have come since from, or for as long as is known, and
// the rates of kubelet's pulls and of ours in bytes a second.
func (w *Watcher) rates(from time.Time) (came int64, kubelets, ours float64) {
	last := len(w.points) - 1
	to, p := w.points[last], w.points[0]
	for i := last - 1; i > 0; i-- {
		if !w.points[i].at.After(from) {
			p = w.points[i]
			break
		}
	}
	came = to.kubelets - p.kubelets
	if took := to.at.Sub(p.at).Seconds(); took > 0 {
		kubelets, ours = float64(came)/took, float64(to.ours-p.ours)/took
	}
	return came, kubelets, ours
}

// layerOf returns the layer whose ingest has the name ref (containerd's remotes.MakeRefKey).
func layerOf(ref string) (digest.Digest, bool) {
	kind, rest, _ := strings.Cut(ref, "-")
	d, err := digest.Parse(rest)
	return d, err == nil && (kind == "layer" || kind == "unknown")
}

// oursUnder finds what is under way under a lease of ours. It marks the ingests in ours, and adds
// the layers among them to fetches, unless that is nil.
func (w *Watcher) oursUnder(
	ctx context.Context, lease string, blobs map[string]content.Status, ours map[string]bool,
	fetches map[string]map[digest.Digest]bool,
) error {
	list, err := w.store.Leases.ListResources(ctx, leases.Lease{ID: lease})
	if errdefs.IsNotFound(err) { // not begun, or over
		return nil
	}
	if err != nil {
		return fmt.Errorf("lease %s: %w", lease, err)
	}
	done := map[string]bool{} // blobs that were completed between the two questions
	for _, r := range list {
		if r.Type == imagestore.ContentResource {
			done[r.ID] = true
		}
	}
	for ref := range blobs {
		if d, ok := layerOf(ref); ok && done[d.String()] {
			ours[ref], w.known[ref] = true, true
		}
	}
	for _, r := range list {
		if _, ok := blobs[r.ID]; !ok || r.Type != imagestore.IngestResource {
			continue
		}
		ours[r.ID], w.known[r.ID] = true, true
		d, ok := layerOf(r.ID)
		if fetches == nil || !ok {
			continue
		}
		if fetches[lease] == nil {
			fetches[lease] = map[digest.Digest]bool{}
		}
		fetches[lease][d] = true
	}
	return nil
}

// has reports whether the blob is on the node.
func (w *Watcher) has(ctx context.Context, d digest.Digest) (bool, error) {
	if w.there[d] {
		return true, nil
	}
	_, err := w.store.Content.Info(ctx, d)
	if errdefs.IsNotFound(err) {
		return false, nil
	}
	if err == nil {
		w.there[d] = true
	}
	return err == nil, err
}

// wants finds which of the layers that ours lack are wanted by kubelet's pulls too, and whether
// bytes of them come. Each pull has a lease of its own while it lasts (containerd,
// core/transfer/local and client.Pull), which holds the manifest once that is known.
func (w *Watcher) wants(ctx context.Context, since time.Time, lacks, grows, into map[digest.Digest]bool) error {
	list, err := w.store.Leases.List(ctx)
	if err != nil {
		return fmt.Errorf("leases: %w", err)
	}
	for _, l := range list {
		if strings.HasPrefix(l.ID, imagestore.LeasePrefix) || l.CreatedAt.Before(since) {
			continue
		}
		pull := w.pulls[l.ID]
		if pull == nil {
			pull = &wanted{read: map[digest.Digest]bool{}, asked: map[digest.Digest]time.Time{}}
			w.pulls[l.ID] = pull
		}
		if len(pull.layers) == 0 {
			if err := w.read(ctx, l, pull); err != nil {
				return err
			}
		}
		for _, d := range pull.layers {
			if !lacks[d] {
				continue
			}
			switch there, err := w.has(ctx, d); {
			case err != nil:
				return err
			case !there:
				into[d] = grows[d]
			}
		}
	}
	return nil
}

// read looks for the manifest on a lease.
func (w *Watcher) read(ctx context.Context, l leases.Lease, into *wanted) error {
	list, err := w.store.Leases.ListResources(ctx, l)
	if errdefs.IsNotFound(err) {
		return nil
	}
	if err != nil {
		return fmt.Errorf("lease %s: %w", l.ID, err)
	}
	for _, r := range list {
		d := digest.Digest(r.ID)
		if r.Type != imagestore.ContentResource || into.read[d] || into.bare(d) {
			continue
		}
		info, err := w.store.Content.Info(ctx, d)
		if errdefs.IsNotFound(err) {
			continue
		}
		if err != nil {
			return err
		}
		if !imagestore.Refers(info) { // containerd may label it a moment later
			continue
		}
		into.read[d] = true
		layers, err := w.store.LayersOf(ctx, ocispec.Descriptor{Digest: d, Size: info.Size})
		if err != nil {
			return err
		}
		into.layers = append(into.layers, layers...)
	}
	return nil
}
