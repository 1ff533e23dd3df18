// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package prepull

import (
	"context"
	"encoding/json"
	"fmt"
	"time"

	"github.com/containerd/containerd/v2/core/content"
	"github.com/containerd/containerd/v2/core/images"
	"github.com/containerd/containerd/v2/core/leases"
	"github.com/containerd/containerd/v2/core/remotes"
	"github.com/containerd/errdefs"
	"github.com/containerd/platforms"
	"github.com/opencontainers/go-digest"
	"github.com/opencontainers/image-spec/identity"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

const (
	// maxManifest is what containerd takes of a manifest, too (core/images, maxManifestSize). Configs have no bound there.
	maxManifest = 8 << 20
	// maxLayer keeps sums of what a registry says from running over.
	maxLayer = 1 << 50
	// contentResource is the type of blobs in a lease (core/metadata/buckets.go).
	contentResource = "content"
)

// manifest is what is to be fetched for this node's platform.
type manifest struct {
	layers []ocispec.Descriptor
	total  int64
	// chain has for each layer the name that its snapshot has, or would have; nothing when the config does not fit the layers.
	chain []digest.Digest
}

// readManifest reads an image's manifest for this node's platform, and its config.
func readManifest(ctx context.Context, from content.Provider, image ocispec.Descriptor) (*manifest, error) {
	from = bounded{from}
	found, err := images.Manifest(ctx, from, image, platforms.Default())
	if err != nil {
		return nil, err
	}
	m := &manifest{layers: found.Layers}
	for _, l := range m.layers {
		if err := l.Digest.Validate(); err != nil || l.Size < 0 || l.Size > maxLayer {
			return nil, fmt.Errorf("manifest %s: layer %q of %d bytes: %w", image.Digest, l.Digest, l.Size, errdefs.ErrInvalidArgument)
		}
		m.total += l.Size
	}
	raw, err := content.ReadBlob(ctx, from, found.Config)
	if err != nil {
		return nil, fmt.Errorf("config of %s: %w", image.Digest, err)
	}
	var config struct {
		RootFS ocispec.RootFS `json:"rootfs"`
	}
	if json.Unmarshal(raw, &config) == nil && len(config.RootFS.DiffIDs) == len(m.layers) {
		m.chain = identity.ChainIDs(config.RootFS.DiffIDs)
	}
	return m, nil
}

// bounded refuses blobs that are too large to be held in memory, whatever they are called.
type bounded struct{ content.Provider }

// ReaderAt implements [content.Provider].
func (b bounded) ReaderAt(ctx context.Context, d ocispec.Descriptor) (content.ReaderAt, error) {
	if err := d.Digest.Validate(); err != nil {
		return nil, fmt.Errorf("digest %q: %w: %w", d.Digest, err, errdefs.ErrInvalidArgument)
	}
	if d.Size > maxManifest {
		return nil, tooLarge(d.Digest, d.Size)
	}
	r, err := b.Provider.ReaderAt(ctx, d)
	if err == nil && r.Size() > maxManifest {
		_ = r.Close()
		return nil, tooLarge(d.Digest, r.Size())
	}
	return r, err
}

func tooLarge(d digest.Digest, size int64) error {
	return fmt.Errorf("%s: a manifest of %d bytes: %w", d, size, errdefs.ErrInvalidArgument)
}

// search finds the manifest of an image while the runtime pulls it under a lease: each blob that the runtime asks for is then
// in the lease, one that was on the node before too (core/metadata/content.go, Writer). So nobody else has to ask the registry.
type search struct {
	s     *store
	lease string
	began time.Time
	// offsets is how far blobs were that had been begun before, by their refs.
	offsets map[string]int64
	// fresh is set when the lease held nothing.
	fresh bool
	seen  map[digest.Digest]bool
	// heads are the indexes and manifests, in the order of their discovery.
	heads []ocispec.Descriptor
	// within has what the indexes list.
	within map[digest.Digest]bool
}

// newSearch begins a search, before the runtime is called.
func (s *store) newSearch(ctx context.Context, lease string) (*search, error) {
	q := &search{s: s, lease: lease, began: time.Now(), offsets: map[string]int64{}, seen: map[digest.Digest]bool{}, within: map[digest.Digest]bool{}}
	statuses, err := s.content.ListStatuses(ctx)
	if err != nil {
		return nil, err
	}
	for _, st := range statuses {
		q.offsets[st.Ref] = st.Offset
	}
	resources, err := s.leases.ListResources(ctx, leases.Lease{ID: lease})
	if err != nil {
		return nil, err
	}
	q.fresh = len(resources) == 0
	// A tag may have moved since an earlier attempt. What the runtime asks for now comes back.
	if err := q.classify(ctx, resources); err != nil {
		return nil, err
	}
	for _, d := range q.heads {
		if err := s.leases.DeleteResource(ctx, leases.Lease{ID: lease}, leases.Resource{ID: d.Digest.String(), Type: contentResource}); err != nil && !errdefs.IsNotFound(err) {
			return nil, err
		}
		delete(q.seen, d.Digest)
	}
	q.heads, q.within = nil, map[digest.Digest]bool{}
	return q, nil
}

// look returns the manifest, nil as long as it is not all there.
func (q *search) look(ctx context.Context) (*manifest, error) {
	resources, err := q.s.leases.ListResources(ctx, leases.Lease{ID: q.lease})
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
		m, err := readManifest(ctx, q.s.content, d)
		if errdefs.IsNotFound(err) {
			return nil, nil
		}
		return m, err
	}
	return nil, nil
}

// classify finds indexes and manifests among what is new.
func (q *search) classify(ctx context.Context, resources []leases.Resource) error {
	for _, r := range resources {
		d := ocispec.Descriptor{Digest: digest.Digest(r.ID)}
		if r.Type != contentResource || q.seen[d.Digest] {
			continue
		}
		doc, size, err := q.s.document(ctx, d)
		if errdefs.IsNotFound(err) {
			continue // collected, or just coming
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

// document is what tells indexes and manifests from other blobs.
type document struct {
	MediaType string               `json:"mediaType"`
	Manifests []ocispec.Descriptor `json:"manifests"`
	Config    ocispec.Descriptor   `json:"config"`
	Layers    []ocispec.Descriptor `json:"layers"`
}

// kind is the media type of an index or a manifest, which need not say it; empty for what is neither.
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

// document reads a blob as far as it may be JSON.
func (s *store) document(ctx context.Context, d ocispec.Descriptor) (*document, int64, error) {
	doc := &document{}
	r, err := s.content.ReaderAt(ctx, d)
	if err != nil {
		return nil, 0, err
	}
	defer r.Close()
	first := make([]byte, 1)
	if n, err := r.ReadAt(first, 0); n == 0 || first[0] != '{' || r.Size() > maxManifest {
		if n == 0 && r.Size() > 0 {
			return nil, 0, err
		}
		return doc, r.Size(), nil
	}
	raw := make([]byte, r.Size())
	if n, err := r.ReadAt(raw, 0); n < len(raw) {
		return nil, 0, err
	}
	if json.Unmarshal(raw, doc) != nil {
		doc = &document{} // a config, or whatever else begins with a brace
	}
	return doc, r.Size(), nil
}

// before returns how many of the bytes that are there came before the search began.
func (q *search) before(ctx context.Context, m *manifest, present int, done []int64) int64 {
	total := int64(0)
	for i, l := range m.layers {
		switch info, err := q.s.content.Info(ctx, l.Digest); {
		case err == nil && info.CreatedAt.Before(q.began), err != nil && i < present:
			total += l.Size
		default:
			total += min(q.offsets[remotes.MakeRefKey(ctx, l)], done[i])
		}
	}
	return total
}
