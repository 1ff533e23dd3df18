// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

// Package pins keeps images from kubelet's image garbage collection for a time, on behalf of
// owners.
package pins

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/containerd/errdefs"
	"google.golang.org/protobuf/types/known/timestamppb"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	opsv1 "github.com/cri-proxy/cri-proxy/api/ops/v1"
	"github.com/cri-proxy/cri-proxy/ops/prepull/imagestore"
	"github.com/cri-proxy/cri-proxy/ops/prepull/registry"
)

// Key is an image and on whose behalf it is pinned. An image stays pinned as long as it has a pin.
type Key struct{ ImageID, Owner string }

// Pin is one pin. Its JSON form is in the file of pulls and pins.
type Pin struct {
	// Image is the name to show.
	Image string    `json:"image"`
	Until time.Time `json:"until"`
	Size  uint64    `json:"size"`
}

// Journal keeps pins on disk.
type Journal interface {
	PutPin(Key, *Pin) error
	RemovePin(Key) error
}

// Pins are the pins of a node.
type Pins struct {
	images  runtimeapi.ImageServiceClient
	store   *imagestore.Store
	journal Journal

	changing sync.Mutex // held while the pins of images change; taken before mu

	mu   sync.Mutex // guards pins
	pins map[Key]*Pin
}

// New returns the pins that the journal had.
func New(images runtimeapi.ImageServiceClient, store *imagestore.Store, journal Journal, had map[Key]*Pin) *Pins {
	p := &Pins{images: images, store: store, journal: journal, pins: map[Key]*Pin{}}
	for k, v := range had {
		p.pins[k] = v
	}
	return p
}

// Pin pins an image that is on the node, on behalf of owner; image is an image ID or a reference.
// It replaces a pin that owner has on the image. An image that the runtime's configuration pins
// stays as it is.
//
// Errors: NotFound (errdefs) if it is not on the node, [imagestore.Unavailable] if the runtime is
// not containerd.
func (p *Pins) Pin(ctx context.Context, image, owner string, until time.Time) error {
	resp, err := p.images.ImageStatus(ctx, &runtimeapi.ImageStatusRequest{Image: &runtimeapi.ImageSpec{Image: image}})
	if err != nil {
		return fmt.Errorf("asking the runtime for the image: %w", err)
	}
	if resp.GetImage() == nil {
		return fmt.Errorf("pinning image %s: %w on this node", image, errdefs.ErrNotFound)
	}
	err = p.Add(ctx, resp.GetImage(), NameOf(resp.GetImage(), image), owner, until)
	switch {
	case errors.Is(err, imagestore.ErrNotOurs):
		return nil
	case err != nil:
		return fmt.Errorf("pinning image %s: %w", image, err)
	}
	return nil
}

// NameOf returns the name to show for an image that was asked for by its ID or by a reference.
func NameOf(image *runtimeapi.Image, asked string) string {
	id := strings.TrimPrefix(asked, "sha256:")
	isHex := strings.Trim(id, "0123456789abcdef") == ""
	byID := isHex && strings.HasPrefix(strings.TrimPrefix(image.GetId(), "sha256:"), id)
	if named, err := registry.Normalize(asked); err == nil && !byID {
		return named.String()
	}
	for _, name := range slices.Concat(image.GetRepoTags(), image.GetRepoDigests()) {
		return name
	}
	return image.GetId()
}

// Add pins an image that the runtime has.
//
// Errors: [imagestore.ErrNotOurs], those of [Pins.Pin], or the journal's.
func (p *Pins) Add(ctx context.Context, image *runtimeapi.Image, name, owner string, until time.Time) error {
	p.changing.Lock()
	defer p.changing.Unlock()
	key := Key{image.GetId(), owner}
	v := &Pin{Image: name, Until: until, Size: image.GetSize()}
	// The journal comes first: nothing would ever end a pin that is not in it.
	if err := p.journal.PutPin(key, v); err != nil {
		return err
	}
	p.mu.Lock()
	before := p.pins[key]
	p.pins[key] = v
	p.mu.Unlock()
	err := p.store.Pin(ctx, image.GetId(), true)
	if err == nil {
		return nil
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	if before != nil {
		p.pins[key] = before
		return errors.Join(err, p.journal.PutPin(key, before))
	}
	delete(p.pins, key)
	return errors.Join(err, p.journal.RemovePin(key))
}

// Release ends the pins for which ends returns true, and returns how many these were.
func (p *Pins) Release(ctx context.Context, ends func(Key, *Pin) bool) (int, error) {
	p.changing.Lock()
	defer p.changing.Unlock()
	p.mu.Lock()
	var ending []Key
	for k, v := range p.pins {
		if ends(k, v) {
			ending = append(ending, k)
		}
	}
	p.mu.Unlock()
	n := 0
	for _, k := range ending {
		if !p.pinnedByOthers(k) {
			if err := p.setOn(ctx, k.ImageID, false); err != nil && !imagestore.Unavailable(err) {
				return n, err
			}
		}
		if err := p.journal.RemovePin(k); err != nil {
			return n, err
		}
		p.mu.Lock()
		delete(p.pins, k)
		p.mu.Unlock()
		n++
	}
	return n, nil
}

// pinnedByOthers reports whether the image has another pin.
func (p *Pins) pinnedByOthers(k Key) bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	for other := range p.pins {
		if other != k && other.ImageID == k.ImageID {
			return true
		}
	}
	return false
}

// setOn pins an image that may be gone, or that the runtime's configuration pins, or ends that.
func (p *Pins) setOn(ctx context.Context, imageID string, on bool) error {
	err := p.store.Pin(ctx, imageID, on)
	if errdefs.IsNotFound(err) || errors.Is(err, imagestore.ErrNotOurs) {
		return nil
	}
	return err
}

// List returns all pins, sorted by image and owner.
func (p *Pins) List() []*opsv1.ImagePin {
	p.mu.Lock()
	defer p.mu.Unlock()
	out := make([]*opsv1.ImagePin, 0, len(p.pins))
	for k, v := range p.pins {
		out = append(out, &opsv1.ImagePin{
			ImageId: k.ImageID, Image: v.Image, Owner: k.Owner, ExpireTime: timestamppb.New(v.Until),
			SizeBytes: int64(v.Size),
		})
	}
	slices.SortFunc(out, func(a, b *opsv1.ImagePin) int {
		return strings.Compare(a.GetImage()+"\x00"+a.GetOwner(), b.GetImage()+"\x00"+b.GetOwner())
	})
	return out
}

// Sizes returns the sizes of the images that are pinned for owners of a kind, by image ID.
func (p *Pins) Sizes(kind string) map[string]uint64 {
	p.mu.Lock()
	defer p.mu.Unlock()
	sizes := map[string]uint64{}
	for k, v := range p.pins {
		if strings.HasPrefix(k.Owner, kind+"/") {
			sizes[k.ImageID] = v.Size
		}
	}
	return sizes
}

// Align ends pins of ours that are not in the journal, because it was damaged or removed. It also
// pins images again that lost their pin: somebody has removed the image, and it has come back.
func (p *Pins) Align(ctx context.Context) error {
	p.changing.Lock()
	defer p.changing.Unlock()
	ids, err := p.store.Pinned(ctx)
	if err != nil {
		return err
	}
	known := map[string]bool{}
	p.mu.Lock()
	for k := range p.pins {
		known[k.ImageID] = true
	}
	p.mu.Unlock()
	var errs []error
	for _, id := range ids {
		if !known[id] {
			errs = append(errs, p.setOn(ctx, id, false))
		}
	}
	for id := range known {
		if !slices.Contains(ids, id) {
			errs = append(errs, p.setOn(ctx, id, true))
		}
	}
	return errors.Join(errs...)
}
