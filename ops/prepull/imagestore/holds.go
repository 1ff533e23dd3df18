// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package imagestore

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"

	imagesapi "github.com/containerd/containerd/api/services/images/v1"
	"github.com/containerd/errdefs"
	"github.com/containerd/errdefs/pkg/errgrpc"
)

// Held is what a runtime keeps because of us.
type Held struct {
	// Images are the pinned images, by a name or by their ID. Kubelet's image garbage collection
	// leaves them.
	Images []string
	// Leases is how many leases of pulls keep what has been fetched so far. Each ends by itself
	// after a day.
	Leases int
}

// Any reports whether there is anything.
func (h Held) Any() bool { return len(h.Images) > 0 || h.Leases > 0 }

func (h Held) String() string {
	s := fmt.Sprintf("pins of images: %d", len(h.Images))
	if len(h.Images) > 0 {
		s += " (" + strings.Join(h.Images, ", ") + ")"
	}
	return fmt.Sprintf("%s, leases of pulls: %d", s, h.Leases)
}

// Holds returns what the runtime keeps because of us: nothing if it is not containerd.
func (s *Store) Holds(ctx context.Context) (Held, error) {
	ids, leases, err := s.holds(ctx)
	if err != nil {
		return Held{}, err
	}
	names, err := s.names(ctx, ids)
	return Held{Images: names, Leases: len(leases)}, err
}

// LetGo takes our pins off all images, ends our leases, and returns what these were. It removes no
// image, and an image that the runtime's configuration pins stays pinned. LetGo is for a node from
// which cri-proxy is removed: no process of it may run.
func (s *Store) LetGo(ctx context.Context) (Held, error) {
	ids, leases, err := s.holds(ctx)
	if err != nil {
		return Held{}, err
	}
	names, err := s.names(ctx, ids)
	errs := []error{err}
	for _, id := range ids {
		if err := s.Pin(ctx, id, false); err != nil && !errdefs.IsNotFound(err) && !errors.Is(err, ErrNotOurs) {
			errs = append(errs, fmt.Errorf("taking the pin off image %s: %w", id, err))
		}
	}
	for _, id := range leases {
		errs = append(errs, s.DropLease(ctx, id))
	}
	return Held{Images: names, Leases: len(leases)}, errors.Join(errs...)
}

// holds returns the IDs of pinned images and of leases.
func (s *Store) holds(ctx context.Context) (images, leases []string, err error) {
	images, err = s.Pinned(ctx)
	if err == nil {
		leases, err = s.OurLeases(ctx)
	}
	if Unavailable(err) {
		return nil, nil, nil
	}
	return images, leases, err
}

// names returns a name for each image ID. containerd's CRI plugin has one record for each name of
// an image and one for its ID, all with the same target.
func (s *Store) names(ctx context.Context, ids []string) ([]string, error) {
	if len(ids) == 0 {
		return nil, nil
	}
	list, err := s.Images.List(InNamespace(ctx), &imagesapi.ListImagesRequest{})
	if err != nil {
		return ids, fmt.Errorf("listing images: %w", errgrpc.ToNative(err))
	}
	targets, named := map[string]string{}, map[string]string{}
	for _, i := range list.GetImages() {
		digest := i.GetTarget().GetDigest()
		if slices.Contains(ids, i.GetName()) {
			targets[i.GetName()] = digest
		} else if before := named[digest]; before == "" || strings.Contains(before, "@") { // a tag says more
			named[digest] = i.GetName()
		}
	}
	names := make([]string, len(ids))
	for i, id := range ids {
		if names[i] = named[targets[id]]; names[i] == "" {
			names[i] = id
		}
	}
	slices.Sort(names)
	return names, nil
}
