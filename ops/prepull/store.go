// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package prepull

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
	// leasePrefix begins the IDs of our leases.
	leasePrefix = "cri-proxy-pull-"
	// leaseAge is when containerd drops a lease that nobody has ended: a proxy that has been removed.
	leaseAge = 24 * time.Hour
	// pinLabel on any of an image's names makes CRI show it pinned, and kubelet's image garbage collection leave it
	// (internal/cri/labels). On the one that is the image ID it survives a pull of the tag.
	pinLabel = "io.cri-containerd.pinned"
	pinValue = "pinned"
	// pinnedByUs marks pins that are ours to take away again.
	pinnedByUs = "cri-proxy.io/pinned"
)

// store is containerd beyond CRI.
type store struct {
	content content.Store
	leases  leases.Manager
	images  imagesapi.ImagesClient
	// The following two tell which layers have been unpacked.
	snapshots     snapshotsapi.SnapshotsClient
	introspection introspectionapi.IntrospectionClient
}

func newStore(conn grpc.ClientConnInterface) *store {
	return &store{
		content: contentproxy.NewContentStore(conn),
		leases:  leasesproxy.NewLeaseManager(leasesapi.NewLeasesClient(conn)),
		images:  imagesapi.NewImagesClient(conn),

		snapshots: snapshotsapi.NewSnapshotsClient(conn), introspection: introspectionapi.NewIntrospectionClient(conn),
	}
}

// leaseID names the lease of pulls with the same key, so that the next one goes on where this one ended.
func leaseID(key string) string {
	sum := sha256.Sum256([]byte(key))
	return leasePrefix + hex.EncodeToString(sum[:12])
}

// inNamespace returns ctx for calls to containerd.
func inNamespace(ctx context.Context) context.Context {
	return namespaces.WithNamespace(ctx, namespace)
}

// lease makes sure that the lease is there and returns ctx with it: whatever is written under ctx stays as long as the
// lease, by CRI calls too.
func (s *store) lease(ctx context.Context, id string) (context.Context, error) {
	ctx = inNamespace(ctx)
	_, err := s.leases.Create(ctx, leases.WithID(id), leases.WithExpiration(leaseAge))
	if err != nil && !errdefs.IsAlreadyExists(err) {
		return nil, fmt.Errorf("lease: %w", err)
	}
	return leases.WithLease(ctx, id), nil
}

// dropLease ends the lease; what nothing else refers to is then collected.
func (s *store) dropLease(ctx context.Context, id string, how ...leases.DeleteOpt) error {
	if err := s.leases.Delete(inNamespace(ctx), leases.Lease{ID: id}, how...); err != nil && !errdefs.IsNotFound(err) {
		return fmt.Errorf("ending lease %s: %w", id, err)
	}
	return nil
}

// ourLeases returns the IDs of all our leases.
func (s *store) ourLeases(ctx context.Context) ([]string, error) {
	list, err := s.leases.List(inNamespace(ctx))
	if err != nil {
		return nil, fmt.Errorf("listing leases: %w", err)
	}
	var ids []string
	for _, l := range list {
		if strings.HasPrefix(l.ID, leasePrefix) {
			ids = append(ids, l.ID)
		}
	}
	return ids, nil
}

// fetched finds how many bytes of each blob are on the node, and writes it into done, which holds what was found before.
func (s *store) fetched(ctx context.Context, blobs []ocispec.Descriptor, done []int64) error {
	ctx = inNamespace(ctx)
	statuses, err := s.content.ListStatuses(ctx)
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
		switch _, err := s.content.Info(ctx, b.Digest); {
		case err == nil:
			done[i] = b.Size
		case errdefs.IsNotFound(err):
			// Not begun, or just being entered into the books, when it is neither under way nor there.
		default:
			return err
		}
	}
	return nil
}

// errNotOurs is returned for an image that somebody else has pinned, such as the sandbox image.
var errNotOurs = errors.New("the image is pinned by the runtime's configuration")

// pin makes the image shown as pinned, or not.
func (s *store) pin(ctx context.Context, imageID string, on bool) error {
	ctx = inNamespace(ctx)
	got, err := s.images.Get(ctx, &imagesapi.GetImageRequest{Name: imageID})
	if err != nil {
		return errgrpc.ToNative(err)
	}
	image := got.GetImage()
	if image.Labels == nil {
		image.Labels = map[string]string{}
	}
	ours := image.Labels[pinnedByUs] != ""
	switch {
	case image.Labels[pinLabel] == pinValue && !ours:
		return errNotOurs
	case !on && !ours:
		return nil
	}
	paths := []string{"labels." + pinLabel, "labels." + pinnedByUs}
	if on {
		image.Labels[pinLabel], image.Labels[pinnedByUs] = pinValue, "true"
	} else {
		delete(image.Labels, pinLabel)
		delete(image.Labels, pinnedByUs)
	}
	_, err = s.images.Update(ctx, &imagesapi.UpdateImageRequest{Image: image, UpdateMask: &fieldmaskpb.FieldMask{Paths: paths}})
	return errgrpc.ToNative(err)
}

// pinned returns the IDs of the images that we have pinned.
func (s *store) pinned(ctx context.Context) ([]string, error) {
	list, err := s.images.List(inNamespace(ctx), &imagesapi.ListImagesRequest{Filters: []string{`labels."` + pinnedByUs + `"`}})
	if err != nil {
		return nil, fmt.Errorf("listing pinned images: %w", errgrpc.ToNative(err))
	}
	var ids []string
	for _, i := range list.GetImages() {
		ids = append(ids, i.GetName())
	}
	return ids, nil
}

// unavailable reports whether err means that the runtime is not containerd.
func unavailable(err error) bool {
	return errdefs.IsNotImplemented(err) || status.Code(err) == codes.Unimplemented
}
