// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

// Package claims knows the images that have come to the node with secrets and that kubelet has not
// pulled itself yet.
//
// To kubelet, an image that it has not pulled is one that was always there, and that any pod may
// run (KEP-2535, policy NeverVerifyPreloadedImages). So kubelet is told that there is no such
// image, until it has asked the runtime to pull it with the credentials of the pod that wants it.
// The registry then decides, the layers are there, and kubelet's record is that of any other pull.
package claims

import (
	"context"
	"errors"
	"slices"
	"sync"
	"sync/atomic"

	"github.com/sirupsen/logrus"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"
)

// Journal keeps on disk which images kubelet is not shown.
type Journal interface {
	PutUnclaimed(imageID, image string) error
	RemoveUnclaimed(imageID string) error
}

// Claims are the images that kubelet has yet to claim, and the pulls that may bring more. A nil
// *Claims is one that hides nothing.
type Claims struct {
	log     logrus.FieldLogger
	images  runtimeapi.ImageServiceClient
	journal Journal

	// count is how many entries the maps have; it is read on kubelet's calls.
	count atomic.Int64

	filing sync.Mutex // held while the file and written change; taken before mu

	mu sync.Mutex // guards what follows; never held while a file is written
	// open are the IDs of the images, and written the IDs that are in the file.
	open, written map[string]bool
	// arrivals are pulls that use secrets, by UID.
	arrivals map[string]*arrival
}

// arrival is a pull with secrets, from before its first byte until its image is in open, or is
// known not to come.
type arrival struct {
	// name is the image's as the runtime has it.
	name string
	// had are the IDs of images that were there before, or that kubelet has pulled meanwhile.
	had map[string]bool
	// over says that the pull has ended without an image. One may come all the same, of a call that
	// was given up.
	over bool
}

// New returns the claims for the image IDs that the journal had.
func New(log logrus.FieldLogger, images runtimeapi.ImageServiceClient, journal Journal, had []string) *Claims {
	c := &Claims{
		log: log, images: images, journal: journal,
		open: map[string]bool{}, written: map[string]bool{}, arrivals: map[string]*arrival{},
	}
	for _, id := range had {
		c.add(id)
	}
	return c
}

// recountLocked is called after each change.
func (c *Claims) recountLocked() { c.count.Store(int64(len(c.open) + len(c.arrivals))) }

// Any reports whether there may be an image that kubelet is not shown.
func (c *Claims) Any() bool { return c != nil && c.count.Load() > 0 }

// Hides reports whether kubelet is to be told that the image is not there.
func (c *Claims) Hides(image *runtimeapi.Image) bool {
	if c == nil {
		return false
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.open[image.GetId()] {
		return true
	}
	for _, a := range c.arrivals {
		if !a.had[image.GetId()] && hasName(image, a.name) {
			return true
		}
	}
	return false
}

func hasName(image *runtimeapi.Image, name string) bool {
	return slices.Contains(image.GetRepoTags(), name) || slices.Contains(image.GetRepoDigests(), name)
}

// Claimed says that kubelet has pulled the image. It writes nothing: the file follows within a
// minute, and a process that reads an old file has kubelet pull the image once more.
func (c *Claims) Claimed(imageID string) {
	if c == nil {
		return
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.open[imageID] {
		c.log.WithField("image", imageID).
			Info("kubelet has pulled the image itself: its pods may have it from now on, as kubelet's policy says")
	}
	delete(c.open, imageID)
	for _, a := range c.arrivals {
		a.had[imageID] = true
	}
	c.recountLocked()
}

// Begin says that a pull is about to use secrets for the image with that name. Before anything is
// hidden it calls save with the ID of the image that has the name now, which the next process needs
// for [Claims.Revive]. A repeated Begin does nothing.
func (c *Claims) Begin(ctx context.Context, uid, name string, save func(had string) error) error {
	if c == nil || c.begun(uid) {
		return nil
	}
	list, err := c.images.ListImages(ctx, &runtimeapi.ListImagesRequest{})
	if err != nil {
		return err
	}
	a := &arrival{name: name, had: map[string]bool{}}
	had := ""
	for _, i := range list.GetImages() {
		a.had[i.GetId()] = true
		if hasName(i, name) {
			had = i.GetId()
		}
	}
	if err := save(had); err != nil {
		return err
	}
	c.begin(uid, a)
	return nil
}

// Revive takes up a pull with secrets of an earlier process, which may be over.
func (c *Claims) Revive(uid, name, had string, over bool) {
	if c != nil {
		c.begin(uid, &arrival{name: name, had: map[string]bool{had: true}, over: over})
	}
}

func (c *Claims) begun(uid string) bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.arrivals[uid] != nil
}

func (c *Claims) begin(uid string, a *arrival) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.arrivals[uid] == nil {
		c.arrivals[uid] = a
	}
	c.recountLocked()
}

// Arrived notes the image of a pull, if the pull uses secrets and the image was not there before.
func (c *Claims) Arrived(uid, imageID, image string) error {
	if c == nil {
		return nil
	}
	c.filing.Lock()
	defer c.filing.Unlock()
	if c.brings(uid, imageID) {
		if err := c.journal.PutUnclaimed(imageID, image); err != nil {
			return err
		}
		c.add(imageID)
	}
	return nil
}

// brings reports whether the image came with the pull.
func (c *Claims) brings(uid, imageID string) bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	a := c.arrivals[uid]
	return a != nil && !a.had[imageID]
}

func (c *Claims) add(imageID string) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.open[imageID], c.written[imageID] = true, true
	c.recountLocked()
}

func (c *Claims) drop(imageID string) {
	c.mu.Lock()
	defer c.mu.Unlock()
	delete(c.open, imageID)
	c.recountLocked()
}

// End says that a pull has ended. Without an image, one may come later of a call that was given up:
// [Claims.Settle] looks for it.
func (c *Claims) End(uid string, succeeded bool) {
	if c == nil {
		return
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	if a := c.arrivals[uid]; a != nil && !succeeded {
		a.over = true
		return
	}
	delete(c.arrivals, uid)
	c.recountLocked()
}

// Settle forgets images that are gone or claimed, and notes images that have come after their pull
// was given up.
func (c *Claims) Settle(ctx context.Context) error {
	if c == nil {
		return nil
	}
	open, over := c.List()
	var errs []error
	ask := func(image string) (*runtimeapi.Image, bool) {
		req := &runtimeapi.ImageStatusRequest{Image: &runtimeapi.ImageSpec{Image: image}}
		resp, err := c.images.ImageStatus(ctx, req)
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
			if err := c.Arrived(uid, image.GetId(), name); err != nil {
				errs = append(errs, err)
				continue
			}
		}
		c.End(uid, true)
	}
	for _, id := range open {
		if image, ok := ask(id); ok && image == nil {
			c.drop(id)
		}
	}
	c.filing.Lock()
	defer c.filing.Unlock()
	for _, id := range c.stale() {
		if err := c.journal.RemoveUnclaimed(id); err != nil {
			errs = append(errs, err)
			continue
		}
		c.erased(id)
	}
	return errors.Join(errs...)
}

// List returns the IDs of the images, and the names of the images of pulls that are over, by UID.
func (c *Claims) List() (open []string, over map[string]string) {
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

// stale returns the IDs that are in the file and need not be.
func (c *Claims) stale() []string {
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
func (c *Claims) erased(imageID string) {
	c.mu.Lock()
	defer c.mu.Unlock()
	delete(c.written, imageID)
}
