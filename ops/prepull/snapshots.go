// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package prepull

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

// snapshotter returns the name of the snapshotter that images of a runtime handler are unpacked with; empty when the runtime does
// not tell.
func (p *Puller) snapshotter(ctx context.Context, handler string) string {
	if handler != "" {
		if name := p.snapshotterOf(ctx, handler); name != "" {
			return name
		}
	}
	info, err := p.images.ImageFsInfo(ctx, &runtimeapi.ImageFsInfoRequest{})
	if err != nil || len(info.GetImageFilesystems()) == 0 {
		return ""
	}
	// The first is that of the default snapshotter (internal/cri/server/images/imagefs_info.go).
	return p.store.snapshotterAt(ctx, info.GetImageFilesystems()[0].GetFsId().GetMountpoint())
}

// needsLayers reports whether the image is surely unpacked from whole layers. Other snapshotters may fetch what is read of them, when it
// is read: stargz, soci, nydus, gcfs.
func (p *Puller) needsLayers(ctx context.Context, u *pull) bool {
	switch p.snapshotter(ctx, u.req.GetRuntimeHandler()) {
	case "overlayfs", "fuse-overlayfs", "native", "btrfs", "zfs", "devmapper", "erofs", "blockfile":
		return true
	}
	return false
}

// snapshotterOf returns a handler's own snapshotter, if it has one.
func (p *Puller) snapshotterOf(ctx context.Context, handler string) string {
	status, err := p.runtime.Status(ctx, &runtimeapi.StatusRequest{Verbose: true})
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

// snapshotterAt returns the name of the snapshotter with its files at root.
func (s *store) snapshotterAt(ctx context.Context, root string) string {
	if root == "" {
		return ""
	}
	list, err := s.introspection.Plugins(ctx, &introspectionapi.PluginsRequest{Filters: []string{"type==" + snapshotPlugin}})
	if err == nil {
		for _, plugin := range list.GetPlugins() {
			if at := plugin.GetExports()["root"]; at != "" && filepath.Clean(at) == filepath.Clean(root) {
				return plugin.GetID()
			}
		}
	}
	// One that does not say where it is, such as a proxy plugin, has the place of one that does not choose.
	if name, ok := strings.CutPrefix(filepath.Base(root), snapshotPlugin+"."); ok {
		return name
	}
	return ""
}

// unpacked returns how many of an image's layers, from the lowest, the runtime has as snapshots: it needs no blobs of these
// (core/unpack/unpacker.go), and with discard_unpacked_layers it has none. A snapshot holds the ones below, so those that are
// there are the lowest ones.
func (s *store) unpacked(ctx context.Context, snapshotter string, chain []digest.Digest) int {
	if snapshotter == "" {
		return 0
	}
	for i, id := range chain {
		// Whatever the error says, the layer can still be fetched.
		if _, err := s.snapshots.Stat(ctx, &snapshotsapi.StatSnapshotRequest{Snapshotter: snapshotter, Key: id.String()}); err != nil {
			return i
		}
	}
	return len(chain)
}

// keepSnapshot has the lease hold a snapshot and those below it, so that they stay if their image is removed now.
func (s *store) keepSnapshot(ctx context.Context, lease, snapshotter string, id digest.Digest) error {
	return s.leases.AddResource(ctx, leases.Lease{ID: lease}, leases.Resource{ID: id.String(), Type: "snapshots/" + snapshotter})
}
