// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package prepull

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"

	imagesapi "github.com/containerd/containerd/api/services/images/v1"
	"github.com/containerd/errdefs"
	"github.com/containerd/errdefs/pkg/errgrpc"
	bolt "go.etcd.io/bbolt"
	"google.golang.org/grpc"

	"github.com/cri-proxy/cri-proxy/ops/boltfile"
)

// Held is what a runtime keeps because of us.
type Held struct {
	// Images are pinned, so that kubelet's image garbage collection leaves them: by a name, or by
	// their ID.
	Images []string
	// Leases of pulls keep what has been fetched so far; they end by themselves after a day.
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

// Holds returns what the runtime at conn keeps because of us: nothing if it is not containerd.
func Holds(ctx context.Context, conn grpc.ClientConnInterface) (Held, error) {
	s := newStore(conn)
	ids, leases, err := s.holds(ctx)
	if err != nil {
		return Held{}, err
	}
	names, err := s.names(ctx, ids)
	return Held{Images: names, Leases: len(leases)}, err
}

// LetGo takes our pins off the images of a runtime, and ends our leases, and returns what these
// were. No image is removed, and one that the runtime's configuration pins stays so. It is for a
// node from which cri-proxy is taken away: no process of it may run.
func LetGo(ctx context.Context, conn grpc.ClientConnInterface) (Held, error) {
	s := newStore(conn)
	ids, leases, err := s.holds(ctx)
	if err != nil {
		return Held{}, err
	}
	names, err := s.names(ctx, ids)
	errs := []error{err}
	for _, id := range ids {
		if err := s.pin(ctx, id, false); err != nil && !errdefs.IsNotFound(err) && !errors.Is(err, errNotOurs) {
			errs = append(errs, fmt.Errorf("taking the pin off image %s: %w", id, err))
		}
	}
	for _, id := range leases {
		errs = append(errs, s.dropLease(ctx, id))
	}
	return Held{Images: names, Leases: len(leases)}, errors.Join(errs...)
}

// holds returns the IDs of pinned images and of leases.
func (s *store) holds(ctx context.Context) (images, leases []string, err error) {
	images, err = s.pinned(ctx)
	if err == nil {
		leases, err = s.ourLeases(ctx)
	}
	if unavailable(err) {
		return nil, nil, nil
	}
	return images, leases, err
}

// names returns a name for each of the images, which are given by ID: containerd's CRI plugin has a
// record for each name, with the same target as that for the ID.
func (s *store) names(ctx context.Context, ids []string) ([]string, error) {
	if len(ids) == 0 {
		return nil, nil
	}
	list, err := s.images.List(inNamespace(ctx), &imagesapi.ListImagesRequest{})
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

// ForgetPins takes the pins out of a state directory that is kept: the next process must not
// believe in what [LetGo] has taken off. No process may have it.
func ForgetPins(dir string) error {
	path := filepath.Join(dir, "pulls.db")
	if _, err := os.Stat(path); errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	db, err := boltfile.OpenDB(path, boltfile.Options{Buckets: [][]byte{bucketPulls, bucketPins}})
	if errors.Is(err, boltfile.ErrDamaged) {
		return nil // it is set aside by the next process, with its pins
	}
	if err != nil {
		return boltfile.Explain(path, err)
	}
	err = db.Update(func(tx *bolt.Tx) error {
		if err := tx.DeleteBucket(bucketPins); err != nil {
			return err
		}
		_, err := tx.CreateBucket(bucketPins)
		return err
	})
	return errors.Join(err, db.Close())
}
