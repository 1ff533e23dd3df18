// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package imagestore

import (
	"context"
	"encoding/json"
	"slices"
	"strings"
	"time"

	"github.com/containerd/containerd/v2/core/content"
	"github.com/containerd/containerd/v2/core/images"
	"github.com/containerd/containerd/v2/core/leases"
	"github.com/containerd/containerd/v2/core/remotes"
	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

const (
	// ContentResource is the type of blobs among the resources of a lease
	// (core/metadata/buckets.go).
	ContentResource = "content"
	// IngestResource is the type of blobs that are being written.
	IngestResource = "ingests"
	// GCRefLabel begins the labels of a blob that refers to other blobs: a manifest or an index
	// (core/metadata/gc.go).
	GCRefLabel = "containerd.io/gc.ref.content"
)

// Search finds the manifest of an image while the runtime pulls the image under a lease. Each blob
// that the runtime asks for is then in the lease, even one that was on the node before
// (core/metadata/content.go, Writer). So nobody else has to ask the registry.
type Search struct {
	s     *Store
	lease string
	began time.Time
	// offsets is how far the blobs were, by their refs, that had been begun before the search.
	offsets map[string]int64
	fresh   bool
	// seen are the blobs that need not be looked at again. maybe are those that begin like a
	// manifest and have no label yet.
	seen, maybe map[digest.Digest]bool
	// heads are the indexes and manifests, in the order of their discovery.
	heads []ocispec.Descriptor
	// within are the blobs that the indexes list.
	within map[digest.Digest]bool
}

// NewSearch begins a search. Call it before the runtime is asked to pull.
func (s *Store) NewSearch(ctx context.Context, lease string) (*Search, error) {
	q := &Search{
		s: s, lease: lease, began: time.Now(), offsets: map[string]int64{},
		seen: map[digest.Digest]bool{}, maybe: map[digest.Digest]bool{}, within: map[digest.Digest]bool{},
	}
	statuses, err := s.Content.ListStatuses(ctx)
	if err != nil {
		return nil, err
	}
	for _, st := range statuses {
		q.offsets[st.Ref] = st.Offset
	}
	resources, err := s.Leases.ListResources(ctx, leases.Lease{ID: lease})
	if err != nil {
		return nil, err
	}
	q.fresh = len(resources) == 0
	// A tag may have moved since an earlier attempt, so the lease lets go of its manifests. What
	// the runtime asks for now comes back.
	if err := q.classify(ctx, resources); err != nil {
		return nil, err
	}
	for _, d := range q.heads {
		resource := leases.Resource{ID: d.Digest.String(), Type: ContentResource}
		err := s.Leases.DeleteResource(ctx, leases.Lease{ID: lease}, resource)
		if err != nil && !errdefs.IsNotFound(err) {
			return nil, err
		}
		delete(q.seen, d.Digest)
	}
	q.heads, q.within = nil, map[digest.Digest]bool{}
	return q, nil
}

// Lease returns the lease's ID.
func (q *Search) Lease() string { return q.lease }

// Fresh reports whether the lease held nothing when the search began.
func (q *Search) Fresh() bool { return q.fresh }

// Look returns the manifest, or nil as long as a part of it is missing.
func (q *Search) Look(ctx context.Context) (*Manifest, error) {
	resources, err := q.s.Leases.ListResources(ctx, leases.Lease{ID: q.lease})
	if err == nil {
		err = q.classify(ctx, resources)
	}
	if err != nil {
		return nil, err
	}
	for _, d := range q.heads {
		if q.within[d.Digest] {
			continue
		}
		m, err := ReadManifest(ctx, q.s.Content, d)
		if errdefs.IsNotFound(err) {
			return nil, nil
		}
		if errdefs.IsInvalidArgument(err) { // do not read it again
			q.heads = slices.DeleteFunc(q.heads, func(h ocispec.Descriptor) bool { return h.Digest == d.Digest })
		}
		return m, err
	}
	return nil, nil
}

// Before returns how many of the bytes that are there came before the search began. present is how
// many of the lowest layers are there as snapshots, and done how many bytes of each layer are
// there.
func (q *Search) Before(ctx context.Context, m *Manifest, present int, done []int64) int64 {
	total := int64(0)
	for i, l := range m.Layers {
		switch info, err := q.s.Content.Info(ctx, l.Digest); {
		case err == nil && info.CreatedAt.Before(q.began), err != nil && i < present:
			total += l.Size
		default:
			total += min(q.offsets[remotes.MakeRefKey(ctx, l)], done[i])
		}
	}
	return total
}

// classify finds indexes and manifests among what is new in the lease.
func (q *Search) classify(ctx context.Context, resources []leases.Resource) error {
	for _, r := range resources {
		d := ocispec.Descriptor{Digest: digest.Digest(r.ID)}
		if r.Type != ContentResource || q.seen[d.Digest] {
			continue
		}
		switch refers, err := q.refers(ctx, d.Digest); {
		case errdefs.IsNotFound(err):
			continue // containerd has collected it, or is just committing it
		case err != nil:
			return err
		case !refers:
			continue
		}
		doc, size, err := q.s.document(ctx, d)
		if errdefs.IsNotFound(err) {
			continue
		}
		if err != nil {
			return err
		}
		q.seen[d.Digest] = true
		if d.MediaType = doc.kind(); d.MediaType == "" {
			continue
		}
		d.Size = size
		q.heads = append(q.heads, d)
		for _, child := range doc.Manifests {
			q.within[child.Digest] = true
		}
	}
	return nil
}

// refers reports whether the runtime has found that a blob refers to others. Layers and configs do
// not, whatever is in them. The runtime finds that a moment after the blob has come, and before it
// asks for the others.
func (q *Search) refers(ctx context.Context, d digest.Digest) (bool, error) {
	info, err := q.s.Content.Info(ctx, d)
	if err != nil || Refers(info) {
		return err == nil, err
	}
	if q.maybe[d] {
		return false, nil
	}
	brace, err := q.s.begins(ctx, d, '{')
	if err != nil {
		return false, err
	}
	q.maybe[d], q.seen[d] = brace, !brace
	return false, nil
}

// Refers reports whether a blob has labels of the blobs that it refers to.
func Refers(info content.Info) bool {
	for label := range info.Labels {
		if strings.HasPrefix(label, GCRefLabel) {
			return true
		}
	}
	return false
}

// document has the fields by which indexes and manifests differ from other blobs.
type document struct {
	MediaType string  `json:"mediaType"`
	Manifests []child `json:"manifests"`
	Config    child   `json:"config"`
	Layers    []child `json:"layers"`
}

// child is a blob that a manifest or an index refers to.
type child struct {
	Digest digest.Digest `json:"digest"`
}

// kind returns the media type of an index or a manifest, which need not contain it; empty for other
// blobs.
func (d *document) kind() string {
	switch {
	case len(d.Manifests) > 0:
		if images.IsIndexType(d.MediaType) {
			return d.MediaType
		}
		return ocispec.MediaTypeImageIndex
	case d.Config.Digest != "" && len(d.Layers) > 0:
		if images.IsManifestType(d.MediaType) {
			return d.MediaType
		}
		return ocispec.MediaTypeImageManifest
	}
	return ""
}

// document decodes a blob. It returns an empty document for a blob that is too large or no JSON:
// the runtime will say what is wrong with it.
func (s *Store) document(ctx context.Context, d ocispec.Descriptor) (*document, int64, error) {
	raw, err := ReadBounded(ctx, s.Content, d)
	if errdefs.IsInvalidArgument(err) {
		return &document{}, 0, nil
	}
	if err != nil {
		return nil, 0, err
	}
	doc := &document{}
	if json.Unmarshal(raw, doc) != nil {
		doc = &document{}
	}
	return doc, int64(len(raw)), nil
}

// LayersOf returns the layers that a blob lists if it is a manifest. A blob that is gone, too large
// or no manifest has none: the runtime will say what is wrong with it.
func (s *Store) LayersOf(ctx context.Context, d ocispec.Descriptor) ([]digest.Digest, error) {
	raw, err := ReadBounded(ctx, s.Content, d)
	if errdefs.IsNotFound(err) || errdefs.IsInvalidArgument(err) {
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	var m struct {
		Layers []child `json:"layers"`
	}
	if json.Unmarshal(raw, &m) != nil {
		return nil, nil
	}
	var layers []digest.Digest
	for _, l := range m.Layers {
		layers = append(layers, l.Digest)
	}
	return layers, nil
}

// begins reports whether the blob's first byte is that one.
func (s *Store) begins(ctx context.Context, d digest.Digest, with byte) (bool, error) {
	r, err := s.Content.ReaderAt(ctx, ocispec.Descriptor{Digest: d})
	if err != nil {
		return false, err
	}
	defer r.Close()
	first := make([]byte, 1)
	if n, err := r.ReadAt(first, 0); n == 0 && r.Size() > 0 {
		return false, err
	}
	return first[0] == with, nil
}
