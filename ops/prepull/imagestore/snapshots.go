// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package imagestore

import (
	"context"
	"encoding/json"
	"path/filepath"
	"strings"

	introspectionapi "github.com/containerd/containerd/api/services/introspection/v1"
	snapshotsapi "github.com/containerd/containerd/api/services/snapshots/v1"
	"github.com/containerd/containerd/v2/core/leases"
	"github.com/opencontainers/go-digest"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"
)

// snapshotPlugin is the type of snapshotters among containerd's plugins (plugins/types.go).
const snapshotPlugin = "io.containerd.snapshotter.v1"

// Snapshotter returns the name of the snapshotter that unpacks images of a runtime handler; empty
// when the runtime, which is asked by CRI, does not tell.
func (s *Store) Snapshotter(
	ctx context.Context, images runtimeapi.ImageServiceClient, runtime runtimeapi.RuntimeServiceClient, handler string,
) string {
	if handler != "" {
		if name := snapshotterOf(ctx, runtime, handler); name != "" {
			return name
		}
	}
	info, err := images.ImageFsInfo(ctx, &runtimeapi.ImageFsInfoRequest{})
	if err != nil || len(info.GetImageFilesystems()) == 0 {
		return ""
	}
	// The first is that of the default snapshotter (internal/cri/server/images/imagefs_info.go).
	return s.snapshotterAt(ctx, info.GetImageFilesystems()[0].GetFsId().GetMountpoint())
}

// snapshotterOf returns a handler's own snapshotter, if it has one.
func snapshotterOf(ctx context.Context, runtime runtimeapi.RuntimeServiceClient, handler string) string {
	status, err := runtime.Status(ctx, &runtimeapi.StatusRequest{Verbose: true})
	if err != nil {
		return ""
	}
	var config struct {
		Containerd struct {
			Runtimes map[string]struct {
				Snapshotter string `json:"snapshotter"`
			} `json:"runtimes"`
		} `json:"containerd"`
	}
	if json.Unmarshal([]byte(status.GetInfo()["config"]), &config) != nil {
		return ""
	}
	return config.Containerd.Runtimes[handler].Snapshotter
}

// snapshotterAt returns the name of the snapshotter that keeps its files at root; empty if none is
// known to.
func (s *Store) snapshotterAt(ctx context.Context, root string) string {
	if root == "" {
		return ""
	}
	list, err := s.Introspection.Plugins(ctx, &introspectionapi.PluginsRequest{
		Filters: []string{"type==" + snapshotPlugin},
	})
	if err == nil {
		for _, plugin := range list.GetPlugins() {
			if at := plugin.GetExports()["root"]; at != "" && filepath.Clean(at) == filepath.Clean(root) {
				return plugin.GetID()
			}
		}
	}
	// A plugin that does not say where it is, such as a proxy plugin, has the default place.
	if name, ok := strings.CutPrefix(filepath.Base(root), snapshotPlugin+"."); ok {
		return name
	}
	return ""
}

// Unpacked returns how many of an image's layers, from the lowest, the runtime has as snapshots. It
// needs no blobs of these (core/unpack/unpacker.go), and with discard_unpacked_layers it has none.
// A snapshot holds the snapshots below it, so the layers that are there are the lowest ones.
func (s *Store) Unpacked(ctx context.Context, snapshotter string, chain []digest.Digest) int {
	if snapshotter == "" {
		return 0
	}
	for i, id := range chain {
		// Whatever the error says, the layer can still be fetched.
		_, err := s.Snapshots.Stat(ctx, &snapshotsapi.StatSnapshotRequest{Snapshotter: snapshotter, Key: id.String()})
		if err != nil {
			return i
		}
	}
	return len(chain)
}

// KeepSnapshot has the lease hold a snapshot and those below it, so that they stay if somebody
// removes their image now.
func (s *Store) KeepSnapshot(ctx context.Context, lease, snapshotter string, id digest.Digest) error {
	resource := leases.Resource{ID: id.String(), Type: "snapshots/" + snapshotter}
	return s.Leases.AddResource(ctx, leases.Lease{ID: lease}, resource)
}
