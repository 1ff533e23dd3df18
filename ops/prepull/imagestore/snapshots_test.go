// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package imagestore_test

import (
	"context"
	"testing"

	introspectionapi "github.com/containerd/containerd/api/services/introspection/v1"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/cri-proxy/cri-proxy/ops/prepull/imagestore"
)

// runtime answers what tells which snapshotter unpacks images.
type runtime struct {
	grpc.ClientConnInterface
	disk   string // where the images are; empty: it does not tell
	config string // of its CRI plugin
	root   string // of the snapshotter native
}

// Invoke implements [grpc.ClientConnInterface].
func (r *runtime) Invoke(_ context.Context, method string, _, reply any, _ ...grpc.CallOption) error {
	switch reply := reply.(type) {
	case *runtimeapi.ImageFsInfoResponse:
		if r.disk == "" {
			return status.Error(codes.Unimplemented, method)
		}
		proto.Merge(reply, &runtimeapi.ImageFsInfoResponse{ImageFilesystems: []*runtimeapi.FilesystemUsage{
			{FsId: &runtimeapi.FilesystemIdentifier{Mountpoint: r.disk}},
		}})
	case *runtimeapi.StatusResponse:
		proto.Merge(reply, &runtimeapi.StatusResponse{Info: map[string]string{"config": r.config}})
	case *introspectionapi.PluginsResponse:
		proto.Merge(reply, &introspectionapi.PluginsResponse{Plugins: []*introspectionapi.Plugin{
			{ID: "native", Exports: map[string]string{"root": r.root}},
		}})
	default:
		return status.Error(codes.Unimplemented, method)
	}
	return nil
}

func TestSnapshotter(t *testing.T) {
	const overlayfs = "/var/lib/containerd/io.containerd.snapshotter.v1.overlayfs"
	const config = `{"containerd":{"runtimes":{"runc":{"snapshotter":""},"kata":{"snapshotter":"devmapper"}}}}`
	for _, tt := range []struct{ name, disk, root, handler, want string }{
		{"default", overlayfs, "", "", "overlayfs"},
		{"handler without its own", overlayfs, "", "runc", "overlayfs"},
		{"handler that is not known", overlayfs, "", "gvisor", "overlayfs"},
		{"handler with its own", overlayfs, "", "kata", "devmapper"},
		{"elsewhere", "/data/snapshots", "/data/snapshots/", "", "native"},
		{"not told", "/data/snapshots", "/data/other", "", ""},
		{"nothing", "", "", "", ""},
	} {
		t.Run(tt.name, func(t *testing.T) {
			cri := &runtime{disk: tt.disk, config: config, root: tt.root}
			images, pods := runtimeapi.NewImageServiceClient(cri), runtimeapi.NewRuntimeServiceClient(cri)
			if got := imagestore.New(cri).Snapshotter(t.Context(), images, pods, tt.handler); got != tt.want {
				t.Errorf("%q, want %q", got, tt.want)
			}
		})
	}
}
