// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package prepull

import (
	"context"
	"errors"
	"slices"
	"sync"
	"sync/atomic"

	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	opsv1 "github.com/cri-proxy/cri-proxy/api/ops/v1"
)

// claims knows the images that have come with secrets and that kubelet has not pulled itself yet. To kubelet, an image that it has not pulled
// is one that was always there, and that any pod may run (KEP-2535, policy NeverVerifyPreloadedImages). So it is told that there is no such
// image until it has asked the runtime to pull it, with the credentials of the pod that wants it: the registry then decides, the layers are
// there, and kubelet's record is the one of any other pull.
type claims struct {
	// count is how many entries there are below; it is read on kubelet's calls.
	count atomic.Int64

	filing sync.Mutex // held while the file and written change; taken before mu

	mu sync.Mutex // guards what follows; never held while a file is written
	// open are the IDs of the images, and written those that the file has.
	open, written map[string]bool
	// arrivals are pulls that use secrets, by UID.
	arrivals map[string]*arrival
}

// arrival is a pull with secrets, from before its first byte until its image is in open, or known not to come.
type arrival struct {
	// name is the image's as the runtime has it.
	name string
	// had are the IDs of images that were there before, or that kubelet has pulled meanwhile.
	had map[string]bool
	// over says that the pull has ended without an image: one may come all the same, of a call that was given up.
	over bool
}

func newClaims() *claims {
	return &claims{open: map[string]bool{}, written: map[string]bool{}, arrivals: map[string]*arrival{}}
}

// recountLocked is called after each change.
func (c *claims) recountLocked() { c.count.Store(int64(len(c.open) + len(c.arrivals))) }

func (c *claims) begin(uid string, a *arrival) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.arrivals[uid] == nil {
		c.arrivals[uid] = a
	}
	c.recountLocked()
}

func (c *claims) begun(uid string) bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.arrivals[uid] != nil
}

// fresh reports whether the image came with the pull.
func (c *claims) fresh(uid, imageID string) bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	a := c.arrivals[uid]
	return a != nil && !a.had[imageID]
}

func (c *claims) add(imageID string) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.open[imageID], c.written[imageID] = true, true
	c.recountLocked()
}

func (c *claims) drop(imageID string) {
	c.mu.Lock()
	defer c.mu.Unlock()
	delete(c.open, imageID)
	c.recountLocked()
}

func (c *claims) end(uid string) {
	c.mu.Lock()
	defer c.mu.Unlock()
	delete(c.arrivals, uid)
	c.recountLocked()
}

func (c *claims) over(uid string) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if a := c.arrivals[uid]; a != nil {
		a.over = true
	}
}

// stale returns the IDs that the file has and need not.
func (c *claims) stale() []string {
	c.mu.Lock()
	defer c.mu.Unlock()
	var ids []string
	for id := range c.written {
		if !c.open[id] {
			ids = append(ids, id)
		}
	}
	return ids
}

// erased says that the file no longer has the ID.
func (c *claims) erased(imageID string) {
	c.mu.Lock()
	defer c.mu.Unlock()
	delete(c.written, imageID)
}

// list returns the IDs, and the arrivals that are over.
func (c *claims) list() (open []string, over map[string]string) {
	c.mu.Lock()
	defer c.mu.Unlock()
	over = map[string]string{}
	for id := range c.open {
		open = append(open, id)
	}
	for uid, a := range c.arrivals {
		if a.over {
			over[uid] = a.name
		}
	}
	return open, over
}

// AnyUnclaimed reports whether there may be an image for [Puller.Unclaimed].
func (p *Puller) AnyUnclaimed() bool { return p.claims.count.Load() > 0 }

// Unclaimed reports whether kubelet is to be told that the image is not there.
func (p *Puller) Unclaimed(image *runtimeapi.Image) bool {
	c := p.claims
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.open[image.GetId()] {
		return true
	}
	for _, a := range c.arrivals {
		if !a.had[image.GetId()] && (slices.Contains(image.GetRepoTags(), a.name) || slices.Contains(image.GetRepoDigests(), a.name)) {
			return true
		}
	}
	return false
}

// Claimed says that kubelet has pulled the image. It writes nothing: the file follows within a minute, and an image that is not shown for
// once too often is pulled once more.
func (p *Puller) Claimed(imageID string) {
	c := p.claims
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.open[imageID] {
		p.log.WithField("image", imageID).Info("kubelet has pulled the image itself: its pods may have it from now on, as kubelet's policy says")
	}
	delete(c.open, imageID)
	for _, a := range c.arrivals {
		a.had[imageID] = true
	}
	c.recountLocked()
}

// arriving notes, on the disk first, that the image of the pull will come with a secret.
func (p *Puller) arriving(ctx context.Context, u *pull) error {
	if !p.verify || p.claims.begun(u.op.GetUid()) {
		return nil
	}
	list, err := p.images.ListImages(ctx, &runtimeapi.ListImagesRequest{})
	if err != nil {
		return err
	}
	a := &arrival{name: u.named.String(), had: map[string]bool{}}
	had := ""
	for _, i := range list.GetImages() {
		a.had[i.GetId()] = true
		if slices.Contains(i.GetRepoTags(), a.name) || slices.Contains(i.GetRepoDigests(), a.name) {
			had = i.GetId()
		}
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	u.private, u.had = true, had
	if err := p.saveLocked(u); err != nil {
		return err
	}
	p.claims.begin(u.op.GetUid(), a)
	return nil
}

// arrived notes the image of a pull with secrets, if it was not there before.
func (p *Puller) arrived(uid, imageID, image string) error {
	p.claims.filing.Lock()
	defer p.claims.filing.Unlock()
	if p.claims.fresh(uid, imageID) {
		if err := p.journal.putUnclaimed(imageID, image); err != nil {
			return err
		}
		p.claims.add(imageID)
	}
	return nil
}

// settleClaims takes away what is about images that are gone, or claimed, and notes those that have come after their pull was given up.
func (p *Puller) settleClaims(ctx context.Context) error {
	open, over := p.claims.list()
	var errs []error
	ask := func(image string) (*runtimeapi.Image, bool) {
		resp, err := p.images.ImageStatus(ctx, &runtimeapi.ImageStatusRequest{Image: &runtimeapi.ImageSpec{Image: image}})
		if err != nil {
			errs = append(errs, err)
		}
		return resp.GetImage(), err == nil
	}
	for uid, name := range over {
		image, ok := ask(name)
		if !ok {
			continue
		}
		if image != nil {
			if err := p.arrived(uid, image.GetId(), name); err != nil {
				errs = append(errs, err)
				continue
			}
		}
		p.claims.end(uid)
	}
	for _, id := range open {
		if image, ok := ask(id); ok && image == nil {
			p.claims.drop(id)
		}
	}
	p.claims.filing.Lock()
	defer p.claims.filing.Unlock()
	for _, id := range p.claims.stale() {
		if err := p.journal.removeUnclaimed(id); err != nil {
			errs = append(errs, err)
			continue
		}
		p.claims.erased(id)
	}
	return errors.Join(errs...)
}

// reviveClaim takes up a pull with secrets of an earlier process.
func (p *Puller) reviveClaim(u *pull) {
	if !p.verify || !u.private || u.op.GetPhase() == opsv1.PullPhase_PULL_SUCCEEDED {
		return
	}
	p.claims.begin(u.op.GetUid(), &arrival{name: u.named.String(), had: map[string]bool{u.had: true}, over: u.op.GetFinishTime() != nil})
}
