// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package imagefs_test

import (
	"context"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
	"google.golang.org/grpc"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/cri-proxy/cri-proxy/ops/prepull/imagefs"
)

// runtime tells where its images are, and nothing else.
type runtime struct {
	runtimeapi.ImageServiceClient
	at string
}

func at(path string) runtime { return runtime{at: path} }

func (r runtime) ImageFsInfo(
	context.Context, *runtimeapi.ImageFsInfoRequest, ...grpc.CallOption,
) (*runtimeapi.ImageFsInfoResponse, error) {
	return &runtimeapi.ImageFsInfoResponse{ImageFilesystems: []*runtimeapi.FilesystemUsage{
		{FsId: &runtimeapi.FilesystemIdentifier{Mountpoint: r.at}},
	}}, nil
}

// Below the threshold of kubelet's own collection images are pulled, above it they are not. A pull
// that something waits for is refused only if the image does not fit. A number in the configuration
// counts as it is.
func TestDiskIsMeasuredAsKubeletDoes(t *testing.T) {
	const gib = 1 << 30
	disk := func(free float64) func(string, *unix.Statfs_t) error {
		// 100 GiB, of which 5 are root's.
		return func(_ string, fs *unix.Statfs_t) error {
			*fs = unix.Statfs_t{
				Bsize: 4096, Blocks: 100 * gib / 4096, Bavail: uint64(free*gib) / 4096,
				Bfree: uint64((free+5)*gib) / 4096,
			}
			return nil
		}
	}
	high := func(percent int) func() int { return func() int { return percent } }
	gc := "kubelet removes images from 85 % on (imageGCHighThresholdPercent)"
	for _, tt := range []struct {
		name    string
		high    func() int
		max     float64
		free    float64 // GiB
		missing float64 // GiB, as fetched
		urgent  bool
		want    string // in the message; empty: pulled
	}{
		{"at 82 %", high(85), 0, 18, .1, false, ""},
		{"up to just below the threshold", high(85), 0, 18, .5, false, ""},
		{"to the threshold", high(85), 0, 18, 1, false, "would then be 86 % full, and " + gc},
		{"kubelet begins a little before 85 %", high(85), 0, 16.2, .1, false, "would then be 85 % full, and " + gc},
		{"of unknown size, at 82 %", high(85), 0, 18, imagefs.UnknownSize, false, ""},
		{"of unknown size, at 85 %", high(85), 0, 15, imagefs.UnknownSize, false, "is 85 % full, and " + gc},
		{"another threshold", high(95), 0, 15, 1, false, ""},
		{"no collection", high(100), 0, 5, 1, false, ""},
		{"waited for", high(85), 0, 8, 1, true, ""},
		{"waited for, of unknown size", high(85), 0, 1, imagefs.UnknownSize, true, ""},
		{"waited for, and does not fit", high(85), 0, 8, 4, true, "needs about 14.0 GiB more " +
			"(4.0 GiB to fetch, and unpacked), and the image file system at /images has 8.0 GiB left"},
		{"number", nil, 80, 21, .1, false, ""},
		{"number, above", nil, 80, 21, 1, false, "would then be 82 % full, of 80 % allowed"},
		{"number, waited for", nil, 80, 10, 1, true, ""},
		{"off", nil, 0, 1, 10, false, ""},
		{"nothing to fetch", high(85), 0, 1, 0, false, ""},
	} {
		t.Run(tt.name, func(t *testing.T) {
			guard := &imagefs.Guard{Images: at("/images"), MaxPercent: tt.max, HighThreshold: tt.high,
				Statfs: disk(tt.free)}
			missing := int64(imagefs.UnknownSize)
			if tt.missing != imagefs.UnknownSize {
				missing = int64(tt.missing * gib)
			}
			got := ""
			if err := guard.Check(t.Context(), tt.urgent, missing); err != nil {
				got = err.Error()
			}
			if (got == "") != (tt.want == "") || !strings.Contains(got, tt.want) {
				t.Errorf("%q, want %q", got, tt.want)
			}
		})
	}
}
