// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package prepull

import (
	"bytes"
	"cmp"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"slices"
	"strings"
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
	// maxManifest is what registries take of a manifest (distribution, maxManifestBodySize), and maxValues how many JSON values may be
	// in it: a few bytes each become a descriptor of over a hundred, so that a size alone bounds no memory. An image of 127 layers has
	// some thousand. One with more is pulled without its size being known here.
	maxManifest = 4 << 20
	maxValues   = 1 << 15
	// maxText is the longest text in a manifest: a descriptor may have the blob that it describes in itself, which containerd then
	// takes in the place of the blob (core/content, ReadBlob).
	maxText = 64 << 10
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

// bounded refuses blobs that would take too much memory when they are read and decoded, whatever they are called: who chooses
// an image chooses its bytes.
type bounded struct{ content.Provider }

// ReaderAt implements [content.Provider].
func (b bounded) ReaderAt(ctx context.Context, d ocispec.Descriptor) (content.ReaderAt, error) {
	raw, err := b.read(ctx, d)
	if err != nil {
		return nil, err
	}
	return inMemory{bytes.NewReader(raw)}, nil
}

// inMemory is a [content.ReaderAt].
type inMemory struct{ *bytes.Reader }

// Close implements [content.ReaderAt].
func (inMemory) Close() error { return nil }

// read returns a blob that may be decoded.
func (b bounded) read(ctx context.Context, d ocispec.Descriptor) ([]byte, error) {
	if err := d.Digest.Validate(); err != nil {
		return nil, fmt.Errorf("digest %q: %w: %w", d.Digest, err, errdefs.ErrInvalidArgument)
	}
	if d.Size > maxManifest {
		return nil, tooLarge(d.Digest, d.Size)
	}
	r, err := b.Provider.ReaderAt(ctx, d)
	if err != nil {
		return nil, err
	}
	defer r.Close()
	if r.Size() > maxManifest {
		return nil, tooLarge(d.Digest, r.Size())
	}
	raw := make([]byte, r.Size())
	if n, err := r.ReadAt(raw, 0); n < len(raw) {
		return nil, fmt.Errorf("%s: %w", d.Digest, cmp.Or(err, io.ErrUnexpectedEOF))
	}
	switch values, longest := measure(raw); {
	case values > maxValues:
		return nil, fmt.Errorf("%s: a manifest of %d values: %w", d.Digest, values, errdefs.ErrInvalidArgument)
	case longest > maxText && (images.IsIndexType(d.MediaType) || images.IsManifestType(d.MediaType)):
		return nil, fmt.Errorf("%s: a manifest with a text of %d bytes: %w", d.Digest, longest, errdefs.ErrInvalidArgument)
	}
	return raw, nil
}

// measure returns how many values and names JSON has at most, and how long the longest text in it is, without decoding it.
func measure(raw []byte) (values, longest int) {
	values = 1
	begin := -1 // of the text that is being read
	for i := 0; i < len(raw); i++ {
		switch c := raw[i]; {
		case begin >= 0 && c == '\\':
			i++
		case begin >= 0 && c == '"':
			longest, begin = max(longest, i-begin), -1
		case begin >= 0:
		case c == '"':
			begin = i + 1
		case c == ',', c == ':', c == '[', c == '{':
			values++
		}
	}
	return values, longest
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
	// seen is what has been looked at, maybe what begins as manifests do and has no label yet.
	seen, maybe map[digest.Digest]bool
	// heads are the indexes and manifests, in the order of their discovery.
	heads []ocispec.Descriptor
	// within has what the indexes list.
	within map[digest.Digest]bool
}

// newSearch begins a search, before the runtime is called.
func (s *store) newSearch(ctx context.Context, lease string) (*search, error) {
	q := &search{s: s, lease: lease, began: time.Now(), offsets: map[string]int64{}, seen: map[digest.Digest]bool{}, maybe: map[digest.Digest]bool{}, within: map[digest.Digest]bool{}}
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
		if errdefs.IsInvalidArgument(err) { // not to be read again
			q.heads = slices.DeleteFunc(q.heads, func(h ocispec.Descriptor) bool { return h.Digest == d.Digest })
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
		switch refers, err := q.refers(ctx, d.Digest); {
		case errdefs.IsNotFound(err):
			continue // collected, or just coming
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

// refers reports whether the runtime has found that a blob refers to others, which layers and configs do not, whatever is in them. It
// finds that a moment after the blob has come, and before it asks for the others.
func (q *search) refers(ctx context.Context, d digest.Digest) (bool, error) {
	info, err := q.s.content.Info(ctx, d)
	if err != nil || refers(info) {
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

// refers reports whether a blob has labels of what it refers to.
func refers(info content.Info) bool {
	for label := range info.Labels {
		if strings.HasPrefix(label, gcRef) {
			return true
		}
	}
	return false
}

// document is what tells indexes and manifests from other blobs.
type document struct {
	MediaType string  `json:"mediaType"`
	Manifests []child `json:"manifests"`
	Config    child   `json:"config"`
	Layers    []child `json:"layers"`
}

// child is what a manifest or an index refers to.
type child struct {
	Digest digest.Digest `json:"digest"`
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
	raw, err := bounded{s.content}.read(ctx, d)
	if errdefs.IsInvalidArgument(err) {
		return &document{}, 0, nil
	}
	if err != nil {
		return nil, 0, err
	}
	doc := &document{}
	if json.Unmarshal(raw, doc) != nil {
		doc = &document{} // the runtime says what is wrong with it
	}
	return doc, int64(len(raw)), nil
}

// begins reports whether a blob has that as its first byte.
func (s *store) begins(ctx context.Context, d digest.Digest, with byte) (bool, error) {
	r, err := s.content.ReaderAt(ctx, ocispec.Descriptor{Digest: d})
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
