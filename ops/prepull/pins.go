// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package prepull

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/containerd/errdefs"
	"google.golang.org/protobuf/types/known/timestamppb"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	opsv1 "github.com/cri-proxy/cri-proxy/api/ops/v1"
)

// pinKey is an image and on whose behalf it is pinned: it stays pinned as long as anybody wants it.
type pinKey struct{ imageID, owner string }

type pin struct {
	Image string    `json:"image"`
	Until time.Time `json:"until"`
	Size  uint64    `json:"size"`
}

// Pin keeps an image that is on the node from kubelet's image garbage collection until then, on behalf of owner. image is an
// image ID or a reference. A pin that owner has on it already is replaced. An image that the runtime's configuration pins
// stays as it is.
//
// Errors: NotFound (errdefs) if it is not on the node, NotImplemented or Unimplemented if the runtime is not containerd.
func (p *Puller) Pin(ctx context.Context, image, owner string, until time.Time) error {
	resp, err := p.images.ImageStatus(ctx, &runtimeapi.ImageStatusRequest{Image: &runtimeapi.ImageSpec{Image: image}})
	if err != nil {
		return fmt.Errorf("asking the runtime for the image: %w", err)
	}
	if resp.GetImage() == nil {
		return fmt.Errorf("pinning image %s: %w on this node", image, errdefs.ErrNotFound)
	}
	err = p.addPin(ctx, resp.GetImage(), nameOf(resp.GetImage(), image), owner, until)
	switch {
	case errors.Is(err, errNotOurs):
		return nil
	case err != nil:
		return fmt.Errorf("pinning image %s: %w", image, err)
	}
	return nil
}

// nameOf returns the name to show for an image that was asked for by its ID or a reference.
func nameOf(image *runtimeapi.Image, asked string) string {
	id := strings.TrimPrefix(asked, "sha256:")
	byID := strings.Trim(id, "0123456789abcdef") == "" && strings.HasPrefix(strings.TrimPrefix(image.GetId(), "sha256:"), id)
	if named, err := normalize(asked); err == nil && !byID {
		return named.String()
	}
	for _, name := range slices.Concat(image.GetRepoTags(), image.GetRepoDigests()) {
		return name
	}
	return image.GetId()
}

func (p *Puller) addPin(ctx context.Context, image *runtimeapi.Image, name, owner string, until time.Time) error {
	p.pinning.Lock()
	defer p.pinning.Unlock()
	key := pinKey{image.GetId(), owner}
	v := &pin{Image: name, Until: until, Size: image.GetSize()}
	// Written first: a pin that nobody remembers would stay for ever.
	if err := p.journal.putPin(key, v); err != nil {
		return err
	}
	p.mu.Lock()
	before := p.pins[key]
	p.pins[key] = v
	p.mu.Unlock()
	err := p.store.pin(ctx, image.GetId(), true)
	if err == nil {
		return nil
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	if before != nil {
		p.pins[key] = before
		return errors.Join(err, p.journal.putPin(key, before))
	}
	delete(p.pins, key)
	return errors.Join(err, p.journal.removePin(key))
}

// releasePins ends pins that gone names and returns how many.
func (p *Puller) releasePins(ctx context.Context, gone func(pinKey, *pin) bool) (int, error) {
	p.pinning.Lock()
	defer p.pinning.Unlock()
	p.mu.Lock()
	var ending []pinKey
	for k, v := range p.pins {
		if gone(k, v) {
			ending = append(ending, k)
		}
	}
	p.mu.Unlock()
	n := 0
	for _, k := range ending {
		p.mu.Lock()
		others := slices.ContainsFunc(p.pinKeysLocked(), func(o pinKey) bool { return o != k && o.imageID == k.imageID })
		p.mu.Unlock()
		if !others {
			if err := p.store.pin(ctx, k.imageID, false); err != nil && !errdefs.IsNotFound(err) && !errors.Is(err, errNotOurs) && !unavailable(err) {
				return n, err
			}
		}
		if err := p.journal.removePin(k); err != nil {
			return n, err
		}
		p.mu.Lock()
		delete(p.pins, k)
		p.mu.Unlock()
		n++
	}
	return n, nil
}

func (p *Puller) pinKeysLocked() []pinKey {
	keys := make([]pinKey, 0, len(p.pins))
	for k := range p.pins {
		keys = append(keys, k)
	}
	return keys
}

func (p *Puller) listPins() []*opsv1.ImagePin {
	p.mu.Lock()
	defer p.mu.Unlock()
	out := make([]*opsv1.ImagePin, 0, len(p.pins))
	for k, v := range p.pins {
		out = append(out, &opsv1.ImagePin{ImageId: k.imageID, Image: v.Image, Owner: k.owner, ExpireTime: timestamppb.New(v.Until), SizeBytes: int64(v.Size)})
	}
	slices.SortFunc(out, func(a, b *opsv1.ImagePin) int {
		return strings.Compare(a.GetImage()+"\x00"+a.GetOwner(), b.GetImage()+"\x00"+b.GetOwner())
	})
	return out
}

// sweepUntil ends pins and leases that nobody wants any more, until ctx ends.
func (p *Puller) sweepUntil(ctx context.Context) {
	tick := time.NewTicker(sweepEvery)
	defer tick.Stop()
	for {
		p.sweep(ctx, time.Now())
		select {
		case <-tick.C:
		case <-ctx.Done():
			return
		}
	}
}

func (p *Puller) sweep(ctx context.Context, now time.Time) {
	p.mu.Lock()
	p.expireLocked(now)
	p.mu.Unlock()
	ctx, cancel := context.WithTimeout(ctx, sweepEvery)
	defer cancel()
	if _, err := p.releasePins(ctx, func(_ pinKey, v *pin) bool { return now.After(v.Until) }); err != nil && ctx.Err() == nil {
		p.log.WithError(err).Warn("pins that have expired not ended, trying again in a minute")
	}
	err := errors.Join(p.alignPins(ctx), p.endLeases(ctx), p.settleClaims(ctx))
	if err != nil && ctx.Err() == nil && !unavailable(err) {
		p.log.WithError(err).Debug("leases or pins not ended, trying again in a minute")
	}
}

// endLeases ends our leases that no pull goes on from.
func (p *Puller) endLeases(ctx context.Context) error {
	p.leasing.Lock()
	defer p.leasing.Unlock()
	leases, err := p.store.ourLeases(ctx)
	if err != nil {
		return err
	}
	wanted := map[string]bool{}
	p.mu.Lock()
	for _, u := range p.pulls {
		// One that did not succeed may be tried again, and goes on from what is there.
		if u.op.GetPhase() != opsv1.PullPhase_PULL_SUCCEEDED {
			wanted[leaseID(u.key)] = true
		}
	}
	p.mu.Unlock()
	var errs []error
	for _, id := range leases {
		if !wanted[id] {
			errs = append(errs, p.store.dropLease(ctx, id))
		}
	}
	return errors.Join(errs...)
}

// alignPins ends pins that are ours and not in the journal, which was damaged or has been removed, and puts on again those that are in
// the journal and not on the image: somebody has removed the image, and it has come back.
func (p *Puller) alignPins(ctx context.Context) error {
	if p.journal.unread {
		return nil
	}
	p.pinning.Lock()
	defer p.pinning.Unlock()
	ids, err := p.store.pinned(ctx)
	if err != nil {
		return err
	}
	known := map[string]bool{}
	p.mu.Lock()
	for k := range p.pins {
		known[k.imageID] = true
	}
	p.mu.Unlock()
	var errs []error
	for _, id := range ids {
		if known[id] {
			continue
		}
		if err := p.store.pin(ctx, id, false); err != nil && !errdefs.IsNotFound(err) && !errors.Is(err, errNotOurs) {
			errs = append(errs, err)
		}
	}
	for id := range known {
		if slices.Contains(ids, id) {
			continue
		}
		if err := p.store.pin(ctx, id, true); err != nil && !errdefs.IsNotFound(err) && !errors.Is(err, errNotOurs) {
			errs = append(errs, err)
		}
	}
	return errors.Join(errs...)
}

// gone returns the IDs of the images that pins and pulls speak of and that are not on the node any more.
func (p *Puller) gone(ctx context.Context) ([]string, error) {
	list, err := p.images.ListImages(ctx, &runtimeapi.ListImagesRequest{})
	if err != nil {
		return nil, fmt.Errorf("asking the runtime for its images: %w", err)
	}
	there := map[string]bool{}
	for _, i := range list.GetImages() {
		there[i.GetId()] = true
	}
	var ids []string
	p.mu.Lock()
	defer p.mu.Unlock()
	for k := range p.pins {
		ids = append(ids, k.imageID)
	}
	for _, u := range p.pulls {
		if u.op.GetPhase() == opsv1.PullPhase_PULL_SUCCEEDED {
			ids = append(ids, u.op.GetImageId())
		}
	}
	slices.Sort(ids)
	return slices.DeleteFunc(slices.Compact(ids), func(id string) bool { return there[id] }), nil
}
