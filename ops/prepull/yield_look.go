// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package prepull

import (
	"context"
	"encoding/json"
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/containerd/containerd/v2/core/content"
	"github.com/containerd/containerd/v2/core/leases"
	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

// watch looks at what comes to containerd's content store, from one look to the next.
type watch struct {
	store *store
	// before are the layers under way at the last look, and mine the leases of ours that were at work.
	before map[string]ingest
	mine   []string
	points []point
	closed int // looks at which kubelet's had no layer under way, in a row
	// known is what has been seen under way as ours, theirs are the layers that have been seen as kubelet's.
	known, theirs map[string]bool
	waiting       map[string]bool // what of kubelet's was under way at the last look
	// steady is since when bytes of ours come, came when they last did.
	steady, came time.Time
	// pulls are what kubelet's pulls want, by lease; there are layers that have been found on the node.
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
	read   map[digest.Digest]bool      // what has been looked at
	asked  map[digest.Digest]time.Time // when its labels were first asked for
}

// bareFor is how long a blob without labels is asked for again: containerd labels a manifest a moment after it is there, layers never.
const bareFor = 3 * time.Second

// barren reports whether the blob has been asked for long enough, and notes when that began.
func (w *wanted) barren(d digest.Digest) bool {
	at, asked := w.asked[d]
	if !asked {
		w.asked[d] = time.Now()
	}
	return asked && time.Since(at) >= bareFor
}

func newWatch(s *store) *watch {
	return &watch{store: s, known: map[string]bool{}, theirs: map[string]bool{}, pulls: map[string]*wanted{}, there: map[digest.Digest]bool{}}
}

// look finds what comes. since is when the oldest of kubelet's pulls began, turned when ours last began or ended to stand aside;
// running are the leases of ours at work and lacks the layers that ours have yet to get.
//
// Errors: the runtime's; [unavailable] if it is not containerd.
func (w *watch) look(ctx context.Context, now, since, turned time.Time, running []string, lacks map[digest.Digest]bool) (seen, error) {
	ctx, cancel := context.WithTimeout(inNamespace(ctx), watchPatience)
	defer cancel()
	statuses, err := w.store.content.ListStatuses(ctx)
	if err != nil {
		return seen{}, fmt.Errorf("layers under way: %w", err)
	}
	s := seen{fetches: map[string]map[digest.Digest]bool{}, wants: map[digest.Digest]bool{}}
	open := map[string]content.Status{}
	blobs := map[string]content.Status{} // of whatever kind
	for _, st := range statuses {
		blobs[st.Ref] = st
		if _, ok := layerOf(st.Ref); ok {
			open[st.Ref] = st
		}
	}
	ours := map[string]bool{}
	for _, lease := range running {
		if err := w.oursUnder(ctx, lease, blobs, ours, s.fetches); err != nil {
			return seen{}, err
		}
	}
	for _, lease := range w.mine { // cut off since: what was under way still ends
		if slices.Contains(running, lease) {
			continue
		}
		if err := w.oursUnder(ctx, lease, blobs, ours, nil); err != nil {
			return seen{}, err
		}
	}
	p := point{at: now}
	if len(w.points) > 0 {
		last := w.points[len(w.points)-1]
		p.kubelets, p.ours = last.kubelets, last.ours
	}
	grows, after, idle := map[digest.Digest]bool{}, map[string]ingest{}, true
	for ref, st := range open {
		d, _ := layerOf(ref)
		i := ingest{digest: d, offset: st.Offset, total: st.Total, ours: ours[ref]}
		after[ref] = i
		from, known := w.before[ref]
		began := !st.StartedAt.Before(since) // not of an earlier pull, and kept
		if came := i.offset - from.offset; came > 0 && (known || began) {
			grows[d] = true
			p.add(i.ours, came)
		}
		if !i.ours && (grows[d] || began && !w.known[ref]) { // no pull of ours that has been cut off
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
			return seen{}, err
		case there:
			p.add(i.ours, max(0, i.total-i.offset))
		}
	}
	if len(w.points) > 0 {
		last := w.points[len(w.points)-1]
		s.came = p.kubelets - last.kubelets
	} else {
		start := p
		if now.Sub(since) < rateOver { // so much has come since then
			s.came, start = p.kubelets, point{at: since}
		}
		w.points = append(w.points, start)
	}
	w.points = append(w.points, p)
	for len(w.points) > 2 && now.Sub(w.points[1].at) >= rateOver {
		w.points = w.points[1:]
	}
	// A manifest waits as well, before there is a layer.
	waiting := map[string]bool{}
	for ref, st := range blobs {
		if ours[ref] || w.known[ref] || st.StartedAt.Before(since) && !w.theirs[ref] {
			continue
		}
		idle = false
		waiting[ref] = true
		s.waits = s.waits || w.waiting[ref]
	}
	s.waits = s.waits && s.came == 0
	w.waiting = waiting
	if w.closed++; !idle {
		w.closed = 0
	}
	s.idle = w.closed >= 2 && s.came == 0
	switch last := w.points[max(0, len(w.points)-2)]; {
	case p.ours > last.ours && w.steady.IsZero():
		w.steady, w.came = now, now
	case p.ours > last.ours:
		w.came = now
	case now.Sub(w.came) > time.Second:
		w.steady = time.Time{}
	}
	if !w.steady.IsZero() && now.Sub(w.steady) >= time.Second {
		_, _, s.ours = w.rates(now.Add(-time.Second))
	}
	s.recent, s.mean, _ = w.rates(turned)
	w.before, w.mine = after, running
	if len(lacks) > 0 {
		if err := w.wants(ctx, since, lacks, grows, s.wants); err != nil {
			return seen{}, err
		}
	}
	return s, nil
}

func (p *point) add(ours bool, came int64) {
	if ours {
		p.ours += came
	} else {
		p.kubelets += came
	}
}

// rates returns kubelet's bytes, and rates in bytes a second, from then on or for as long as is known.
func (w *watch) rates(from time.Time) (came int64, kubelets, ours float64) {
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

// layerOf returns the layer whose ingest has that name (containerd's remotes.MakeRefKey).
func layerOf(ref string) (digest.Digest, bool) {
	kind, rest, _ := strings.Cut(ref, "-")
	d, err := digest.Parse(rest)
	return d, err == nil && (kind == "layer" || kind == "unknown")
}

// oursUnder finds what is under way under a lease, and which layers of it.
func (w *watch) oursUnder(ctx context.Context, lease string, blobs map[string]content.Status, ours map[string]bool, fetches map[string]map[digest.Digest]bool) error {
	list, err := w.store.leases.ListResources(ctx, leases.Lease{ID: lease})
	if errdefs.IsNotFound(err) { // not begun, or over
		return nil
	}
	if err != nil {
		return fmt.Errorf("lease %s: %w", lease, err)
	}
	done := map[string]bool{} // between the one question and the other
	for _, r := range list {
		if r.Type == "content" {
			done[r.ID] = true
		}
	}
	for ref := range blobs {
		if d, ok := layerOf(ref); ok && done[d.String()] {
			ours[ref], w.known[ref] = true, true
		}
	}
	for _, r := range list {
		if _, ok := blobs[r.ID]; !ok || r.Type != "ingests" {
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
func (w *watch) has(ctx context.Context, d digest.Digest) (bool, error) {
	if w.there[d] {
		return true, nil
	}
	_, err := w.store.content.Info(ctx, d)
	if errdefs.IsNotFound(err) {
		return false, nil
	}
	if err == nil {
		w.there[d] = true
	}
	return err == nil, err
}

// wants finds which of the layers that ours lack kubelet's pulls want too, and whether bytes of them come. Each pull has a lease of
// its own while it lasts (containerd, core/transfer/local and client.Pull), on which its manifest is once it is known.
func (w *watch) wants(ctx context.Context, since time.Time, lacks, grows, into map[digest.Digest]bool) error {
	list, err := w.store.leases.List(ctx)
	if err != nil {
		return fmt.Errorf("leases: %w", err)
	}
	for _, l := range list {
		if strings.HasPrefix(l.ID, leasePrefix) || l.CreatedAt.Before(since) {
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

// gcRef begins the labels of what refers to other blobs: manifests and indexes (containerd, core/metadata/gc.go).
const gcRef = "containerd.io/gc.ref.content"

// read looks for the manifest on a lease.
func (w *watch) read(ctx context.Context, l leases.Lease, into *wanted) error {
	list, err := w.store.leases.ListResources(ctx, l)
	if errdefs.IsNotFound(err) {
		return nil
	}
	if err != nil {
		return fmt.Errorf("lease %s: %w", l.ID, err)
	}
	for _, r := range list {
		d := digest.Digest(r.ID)
		if r.Type != "content" || into.read[d] || into.barren(d) {
			continue
		}
		info, err := w.store.content.Info(ctx, d)
		if errdefs.IsNotFound(err) {
			continue
		}
		if err != nil {
			return err
		}
		if !refers(info) { // it may be labelled a moment later
			continue
		}
		into.read[d] = true
		raw, err := bounded{w.store.content}.read(ctx, ocispec.Descriptor{Digest: d, Size: info.Size})
		if errdefs.IsNotFound(err) || errdefs.IsInvalidArgument(err) { // gone, or larger than is decoded here
			continue
		}
		if err != nil {
			return err
		}
		var m struct {
			Layers []child `json:"layers"`
		}
		if json.Unmarshal(raw, &m) != nil { // the runtime says what is wrong with it
			continue
		}
		for _, layer := range m.Layers {
			into.layers = append(into.layers, layer.Digest)
		}
	}
	return nil
}
