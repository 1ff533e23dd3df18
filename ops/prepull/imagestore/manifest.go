// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package imagestore

import (
	"bytes"
	"cmp"
	"context"
	"encoding/json"
	"fmt"
	"io"

	"github.com/containerd/containerd/v2/core/content"
	"github.com/containerd/containerd/v2/core/images"
	"github.com/containerd/errdefs"
	"github.com/containerd/platforms"
	"github.com/opencontainers/go-digest"
	"github.com/opencontainers/image-spec/identity"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

const (
	// maxManifest is the largest manifest that registries take (distribution, maxManifestBodySize).
	// maxValues is how many JSON values may be in it: a value of a few bytes becomes a descriptor
	// of over a hundred, so the size alone does not bound the memory. An image of 127 layers has
	// some thousand values. An image with more is pulled, but its size is not known here.
	maxManifest = 4 << 20
	maxValues   = 1 << 15
	// maxText is the longest text in a manifest. A descriptor may contain the blob that it
	// describes, which containerd then takes instead of the blob (core/content, ReadBlob).
	maxText = 64 << 10
	// maxLayer keeps sums of the sizes that a registry claims from overflowing.
	maxLayer = 1 << 50
)

// Manifest is what must be fetched of an image for this node's platform.
type Manifest struct {
	Layers []ocispec.Descriptor
	// Total is the size of all layers, compressed, in bytes.
	Total int64
	// Chain has for each layer the name that its snapshot has, or will have. It is empty when the
	// image's config does not fit the layers.
	Chain []digest.Digest
}

// ReadManifest reads an image's manifest for this node's platform, and its config.
//
// Errors: NotFound (errdefs) while a part is missing, InvalidArgument if a part is wrong or too
// large.
func ReadManifest(ctx context.Context, from content.Provider, image ocispec.Descriptor) (*Manifest, error) {
	from = bounded{from}
	found, err := images.Manifest(ctx, from, image, platforms.Default())
	if err != nil {
		return nil, err
	}
	m := &Manifest{Layers: found.Layers}
	for _, l := range m.Layers {
		if err := l.Digest.Validate(); err != nil || l.Size < 0 || l.Size > maxLayer {
			return nil, fmt.Errorf("manifest %s: layer %q of %d bytes: %w",
				image.Digest, l.Digest, l.Size, errdefs.ErrInvalidArgument)
		}
		m.Total += l.Size
	}
	raw, err := content.ReadBlob(ctx, from, found.Config)
	if err != nil {
		return nil, fmt.Errorf("config of %s: %w", image.Digest, err)
	}
	var config struct {
		RootFS ocispec.RootFS `json:"rootfs"`
	}
	if json.Unmarshal(raw, &config) == nil && len(config.RootFS.DiffIDs) == len(m.Layers) {
		m.Chain = identity.ChainIDs(config.RootFS.DiffIDs)
	}
	return m, nil
}

// bounded refuses blobs that would take too much memory to read and decode, whatever their media
// type: whoever chooses an image chooses its bytes.
type bounded struct{ content.Provider }

// ReaderAt implements [content.Provider].
func (b bounded) ReaderAt(ctx context.Context, d ocispec.Descriptor) (content.ReaderAt, error) {
	raw, err := ReadBounded(ctx, b.Provider, d)
	if err != nil {
		return nil, err
	}
	return inMemory{bytes.NewReader(raw)}, nil
}

// inMemory is a [content.ReaderAt].
type inMemory struct{ *bytes.Reader }

// Close implements [content.ReaderAt].
func (inMemory) Close() error { return nil }

// ReadBounded returns a blob that is small enough to be decoded.
//
// Errors: NotFound (errdefs), or InvalidArgument for a blob that is too large.
func ReadBounded(ctx context.Context, from content.Provider, d ocispec.Descriptor) ([]byte, error) {
	if err := d.Digest.Validate(); err != nil {
		return nil, fmt.Errorf("digest %q: %w: %w", d.Digest, err, errdefs.ErrInvalidArgument)
	}
	if d.Size > maxManifest {
		return nil, tooLarge(d.Digest, d.Size)
	}
	r, err := from.ReaderAt(ctx, d)
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
		return nil, fmt.Errorf("%s: a manifest with a text of %d bytes: %w", d.Digest, longest,
			errdefs.ErrInvalidArgument)
	}
	return raw, nil
}

// measure returns an upper bound of the values and names in a JSON text, and the length of the
// longest string in it, without decoding it.
func measure(raw []byte) (values, longest int) {
	values = 1
	begin := -1 // of the string that is being read
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
