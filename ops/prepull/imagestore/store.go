// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

// Package imagestore is what containerd keeps of images beyond CRI: blobs in its content store,
// leases that hold them, snapshots, and the labels that pin an image. It also reads manifests, with
// bounds on what a manifest may cost.
package imagestore

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"strings"
	"time"

	imagesapi "github.com/containerd/containerd/api/services/images/v1"
	introspectionapi "github.com/containerd/containerd/api/services/introspection/v1"
	leasesapi "github.com/containerd/containerd/api/services/leases/v1"
	snapshotsapi "github.com/containerd/containerd/api/services/snapshots/v1"
	"github.com/containerd/containerd/v2/core/content"
	contentproxy "github.com/containerd/containerd/v2/core/content/proxy"
	"github.com/containerd/containerd/v2/core/leases"
	leasesproxy "github.com/containerd/containerd/v2/core/leases/proxy"
	"github.com/containerd/containerd/v2/core/remotes"
	"github.com/containerd/containerd/v2/pkg/namespaces"
	"github.com/containerd/errdefs"
	"github.com/containerd/errdefs/pkg/errgrpc"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/types/known/fieldmaskpb"
)

const (
	// namespace is where containerd's CRI plugin keeps its images (internal/cri/constants).
	namespace = "k8s.io"
	// LeasePrefix begins the IDs of our leases.
	LeasePrefix = "cri-proxy-pull-"
	// leaseAge is when containerd drops a lease that nobody has ended because the proxy was
	// removed.
	leaseAge = 24 * time.Hour
	// PinLabel with the value [PinValue], on any of an image's names, makes CRI show the image as
	// pinned, so that kubelet's image garbage collection leaves it (containerd,
	// internal/cri/labels). On the name that is the image ID the label survives a pull of the tag.
	PinLabel = "io.cri-containerd.pinned"
	// PinValue is the value of [PinLabel].
	PinValue = "pinned"
	// PinnedByUs marks the pins that are ours to take away again.
	PinnedByUs = "cri-proxy.io/pinned"
)

// Store is containerd beyond CRI. With another runtime its methods return errors that are
// [Unavailable].
type Store struct {
	Content content.Store
	Leases  leases.Manager
	Images  imagesapi.ImagesClient
	// Snapshots and Introspection tell which layers are unpacked.
	Snapshots     snapshotsapi.SnapshotsClient
	Introspection introspectionapi.IntrospectionClient
}

// New returns the store behind the runtime's socket.
func New(conn grpc.ClientConnInterface) *Store {
	return &Store{
		Content:       contentproxy.NewContentStore(conn),
		Leases:        leasesproxy.NewLeaseManager(leasesapi.NewLeasesClient(conn)),
		Images:        imagesapi.NewImagesClient(conn),
		Snapshots:     snapshotsapi.NewSnapshotsClient(conn),
		Introspection: introspectionapi.NewIntrospectionClient(conn),
	}
}

// Unavailable reports whether err means that the runtime is not containerd.
func Unavailable(err error) bool {
	return errdefs.IsNotImplemented(err) || status.Code(err) == codes.Unimplemented
}

// InNamespace returns ctx for calls to containerd.
func InNamespace(ctx context.Context) context.Context {
	return namespaces.WithNamespace(ctx, namespace)
}

// LeaseID names the lease of pulls with the same key, so that the next pull goes on where the one
// before ended.
func LeaseID(key string) string {
	sum := sha256.Sum256([]byte(key))
	return LeasePrefix + hex.EncodeToString(sum[:12])
}

// Lease creates the lease unless it is there, and returns ctx with it. The lease holds whatever is
// written under that ctx, by CRI calls too.
func (s *Store) Lease(ctx context.Context, id string) (context.Context, error) {
	ctx = InNamespace(ctx)
	_, err := s.Leases.Create(ctx, leases.WithID(id), leases.WithExpiration(leaseAge))
	if err != nil && !errdefs.IsAlreadyExists(err) {
		return nil, fmt.Errorf("lease: %w", err)
	}
	return leases.WithLease(ctx, id), nil
}

// DropLease ends the lease. containerd then collects what nothing else refers to.
func (s *Store) DropLease(ctx context.Context, id string, how ...leases.DeleteOpt) error {
	if err := s.Leases.Delete(InNamespace(ctx), leases.Lease{ID: id}, how...); err != nil && !errdefs.IsNotFound(err) {
		return fmt.Errorf("ending lease %s: %w", id, err)
	}
	return nil
}

// OurLeases returns the IDs of all our leases.
func (s *Store) OurLeases(ctx context.Context) ([]string, error) {
	list, err := s.Leases.List(InNamespace(ctx))
	if err != nil {
		return nil, fmt.Errorf("listing leases: %w", err)
	}
	var ids []string
	for _, l := range list {
		if strings.HasPrefix(l.ID, LeasePrefix) {
			ids = append(ids, l.ID)
		}
	}
	return ids, nil
}

// Fetched finds how many bytes of each blob are on the node and writes them into done, which holds
// what an earlier call found.
func (s *Store) Fetched(ctx context.Context, blobs []ocispec.Descriptor, done []int64) error {
	ctx = InNamespace(ctx)
	statuses, err := s.Content.ListStatuses(ctx)
	if err != nil {
		return err
	}
	offsets := make(map[string]int64, len(statuses))
	for _, st := range statuses {
		offsets[st.Ref] = st.Offset
	}
	for i, b := range blobs {
		if done[i] == b.Size {
			continue
		}
		if offset, ok := offsets[remotes.MakeRefKey(ctx, b)]; ok {
			done[i] = min(offset, b.Size)
			continue
		}
		switch _, err := s.Content.Info(ctx, b.Digest); {
		case err == nil:
			done[i] = b.Size
		case errdefs.IsNotFound(err):
			// The blob is not begun, or containerd is just committing it and lists it nowhere.
		default:
			return err
		}
	}
	return nil
}

// ErrNotOurs is returned for an image that somebody else has pinned, such as the sandbox image.
var ErrNotOurs = errors.New("the image is pinned by the runtime's configuration")

// Pin makes CRI show the image as pinned, or ends that.
//
// Errors: [ErrNotOurs], NotFound (errdefs), or [Unavailable].
func (s *Store) Pin(ctx context.Context, imageID string, on bool) error {
	ctx = InNamespace(ctx)
	got, err := s.Images.Get(ctx, &imagesapi.GetImageRequest{Name: imageID})
	if err != nil {
		return errgrpc.ToNative(err)
	}
	image := got.GetImage()
	if image.Labels == nil {
		image.Labels = map[string]string{}
	}
	ours := image.Labels[PinnedByUs] != ""
	switch {
	case image.Labels[PinLabel] == PinValue && !ours:
		return ErrNotOurs
	case !on && !ours:
		return nil
	}
	paths := []string{"labels." + PinLabel, "labels." + PinnedByUs}
	if on {
		image.Labels[PinLabel], image.Labels[PinnedByUs] = PinValue, "true"
	} else {
		delete(image.Labels, PinLabel)
		delete(image.Labels, PinnedByUs)
	}
	_, err = s.Images.Update(ctx, &imagesapi.UpdateImageRequest{
		Image: image, UpdateMask: &fieldmaskpb.FieldMask{Paths: paths},
	})
	return errgrpc.ToNative(err)
}

// Pinned returns the IDs of the images that we have pinned.
func (s *Store) Pinned(ctx context.Context) ([]string, error) {
	list, err := s.Images.List(InNamespace(ctx), &imagesapi.ListImagesRequest{
		Filters: []string{`labels."` + PinnedByUs + `"`},
	})
	if err != nil {
		return nil, fmt.Errorf("listing pinned images: %w", errgrpc.ToNative(err))
	}
	var ids []string
	for _, i := range list.GetImages() {
		ids = append(ids, i.GetName())
	}
	return ids, nil
}
