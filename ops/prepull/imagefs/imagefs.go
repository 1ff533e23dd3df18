// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

// Package imagefs keeps pulls and pins from filling the file system of the images.
package imagefs

import (
	"context"
	"fmt"
	"math"

	"golang.org/x/sys/unix"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	opsv1 "github.com/cri-proxy/cri-proxy/api/ops/v1"
	"github.com/cri-proxy/cri-proxy/ops/prepull/registry"
)

const (
	// Unpacked is what a compressed byte takes on the disk, beside itself, once it is unpacked.
	// Layers of programs compress to some 35–45 %.
	Unpacked = 2.5
	// UnknownSize is the size of an image that the registry does not tell.
	UnknownSize = -1
)

// Guard refuses what would fill the file system of the images.
type Guard struct {
	Images runtimeapi.ImageServiceClient
	// MaxPercent is how full the file system may be; 0 or less: any.
	MaxPercent float64
	// HighThreshold, unless nil, returns kubelet's imageGCHighThresholdPercent, which counts
	// instead.
	HighThreshold func() int
	// Statfs is [unix.Statfs].
	Statfs func(path string, fs *unix.Statfs_t) error
}

// Check refuses a pull of so many missing compressed bytes if it would fill the file system above
// what is allowed. It refuses an urgent pull only if the image would not fit: otherwise kubelet
// would pull the image instead, and make room by removing others. The error is a
// [registry.Failure].
func (g *Guard) Check(ctx context.Context, urgent bool, missing int64) error {
	if g.HighThreshold == nil && g.MaxPercent <= 0 || missing == 0 {
		return nil
	}
	at, used, size := g.Size(ctx)
	if size == 0 {
		return nil
	}
	full := func(format string, args ...any) error {
		return &registry.Failure{Reason: opsv1.PullReasonDiskPressure, Message: fmt.Sprintf(format, args...)}
	}
	need := float64(max(missing, 0)) * (1 + Unpacked)
	takes := fmt.Sprintf("the image needs about %s more (%s to fetch, and unpacked), and the image file system at %s",
		Bytes(int64(need)), Bytes(missing), at)
	if urgent {
		if left := size - used; need > left {
			return full("%s has %s left: free space", takes, Bytes(int64(left)))
		}
		return nil
	}
	percent, allowed := g.filled(used+need, size)
	if allowed == "" {
		return nil
	}
	if missing == UnknownSize {
		return full("the image file system at %s is %.0f %% full, %s", at, percent, allowed)
	}
	return full("%s would then be %.0f %% full, %s", takes, percent, allowed)
}

// filled returns how full a file system is with so much on it, in percent, and what to say if that
// is too much.
func (g *Guard) filled(used, size float64) (percent float64, tooMuch string) {
	if g.HighThreshold == nil {
		if percent = 100 * used / size; percent <= g.MaxPercent {
			return percent, ""
		}
		return percent, fmt.Sprintf("of %g %% allowed: free space, or raise images.maxDiskPercent", g.MaxPercent)
	}
	// What is free is rounded down, and the threshold itself is too much, as in kubelet's
	// image_gc_manager.go.
	percent = 100 - math.Floor(100*max(size-used, 0)/size)
	if high := g.HighThreshold(); percent >= float64(high) {
		return percent, fmt.Sprintf("and kubelet removes images from %d %% on (imageGCHighThresholdPercent): "+
			"free space, or set images.maxDiskPercent", high)
	}
	return percent, ""
}

// Size returns where the images are, how much of that file system is used, and its size, in bytes.
// Kubelet's image garbage collection counts in the same way: what is kept for root is used. All is
// zero if the runtime does not tell, or tells no path of this machine: then nothing can be guarded.
func (g *Guard) Size(ctx context.Context) (at string, used, size float64) {
	info, err := g.Images.ImageFsInfo(ctx, &runtimeapi.ImageFsInfoRequest{})
	if err != nil || len(info.GetImageFilesystems()) == 0 {
		return "", 0, 0
	}
	at = info.GetImageFilesystems()[0].GetFsId().GetMountpoint()
	var fs unix.Statfs_t
	if err := g.Statfs(at, &fs); err != nil {
		return "", 0, 0
	}
	return at, float64(fs.Blocks-min(fs.Bavail, fs.Blocks)) * float64(fs.Bsize), float64(fs.Blocks) * float64(fs.Bsize)
}

// PinsFull says why an image is not to be pinned for an owner of the kind: the images that are
// pinned for owners of that kind, by ID, would hold more than percent of the disk, and kubelet
// could not free it. It returns nothing if the image may be pinned.
func (g *Guard) PinsFull(
	ctx context.Context, kind string, percent float64, pinned map[string]uint64, image *runtimeapi.Image,
) string {
	if percent <= 0 {
		return ""
	}
	_, _, size := g.Size(ctx)
	if size == 0 {
		return ""
	}
	if _, ok := pinned[image.GetId()]; ok {
		return ""
	}
	var held float64
	for _, n := range pinned {
		held += float64(n) * (1 + Unpacked)
	}
	need := float64(image.GetSize()) * (1 + Unpacked)
	if held+need <= size*percent/100 {
		return ""
	}
	return fmt.Sprintf("the images that are pinned for objects of kind %s hold about %s, this one takes %s, "+
		"and the cluster allows them %g %% of the image file system's %s (--image-pin-percent of cri-controller)",
		kind, Bytes(int64(held)), Bytes(int64(need)), percent, Bytes(int64(size)))
}

// Bytes is a size for people.
func Bytes(n int64) string {
	units := []string{"B", "KiB", "MiB", "GiB", "TiB"}
	f, i := float64(n), 0
	for f >= 1024 && i < len(units)-1 {
		f, i = f/1024, i+1
	}
	if i == 0 {
		return fmt.Sprintf("%d B", n)
	}
	return fmt.Sprintf("%.1f %s", f, units[i])
}
