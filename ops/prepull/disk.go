// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package prepull

import (
	"context"
	"fmt"
	"math"
	"strings"

	"golang.org/x/sys/unix"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	opsv1 "github.com/cri-proxy/cri-proxy/api/ops/v1"
)

// unpacked is what a compressed byte takes on the disk beside itself once it is unpacked; layers of programs
// compress to some 35–45 %.
const unpacked = 2.5

// unknown is the size of an image that the registry does not tell.
const unknown = -1

// checkDisk refuses a pull that would fill the image file system above what is allowed. One that something waits for is only refused if it
// would not fit: kubelet would pull the image in its place, and make room by removing others.
func (p *Puller) checkDisk(ctx context.Context, u *pull, missing int64) error {
	if p.high == nil && p.maxDisk <= 0 || missing == 0 {
		return nil
	}
	at, used, size := p.imageFS(ctx)
	if size == 0 {
		return nil
	}
	p.mu.Lock()
	urgent := u.urgent
	p.mu.Unlock()
	need := float64(max(missing, 0)) * (1 + unpacked)
	takes := fmt.Sprintf("the image needs about %s more (%s to fetch, and unpacked), and the image file system at %s", bytesText(int64(need)), bytesText(missing), at)
	if urgent {
		if left := size - used; need > left {
			return &failure{reason: opsv1.PullReasonDiskPressure, message: fmt.Sprintf("%s has %s left: free space", takes, bytesText(int64(left)))}
		}
		return nil
	}
	percent, allowed := p.filled(used+need, size)
	if allowed == "" {
		return nil
	}
	if missing == unknown {
		return &failure{reason: opsv1.PullReasonDiskPressure, message: fmt.Sprintf("the image file system at %s is %.0f %% full, %s", at, percent, allowed)}
	}
	return &failure{reason: opsv1.PullReasonDiskPressure, message: fmt.Sprintf("%s would then be %.0f %% full, %s", takes, percent, allowed)}
}

// filled returns how full a file system is with so much on it, in percent, and what is to be said if that is too much.
func (p *Puller) filled(used, size float64) (percent float64, tooMuch string) {
	if p.high == nil {
		if percent = 100 * used / size; percent <= p.maxDisk {
			return percent, ""
		}
		return percent, fmt.Sprintf("of %g %% allowed: free space, or raise images.maxDiskPercent", p.maxDisk)
	}
	// What is free is rounded down, and the threshold itself is too much, as in kubelet's image_gc_manager.go.
	percent = 100 - math.Floor(100*max(size-used, 0)/size)
	if high := p.high(); percent >= float64(high) {
		return percent, fmt.Sprintf("and kubelet removes images from %d %% on (imageGCHighThresholdPercent): free space, or set images.maxDiskPercent", high)
	}
	return percent, ""
}

// imageFS is where the images are, how much of it is used, and its size, in bytes as kubelet's image garbage collection counts: what is kept for
// root is used. Zero where the runtime does not tell, or not of this machine's paths: that cannot be guarded.
func (p *Puller) imageFS(ctx context.Context) (at string, used, size float64) {
	info, err := p.images.ImageFsInfo(ctx, &runtimeapi.ImageFsInfoRequest{})
	if err != nil || len(info.GetImageFilesystems()) == 0 {
		return "", 0, 0
	}
	at = info.GetImageFilesystems()[0].GetFsId().GetMountpoint()
	var fs unix.Statfs_t
	if err := p.statfs(at, &fs); err != nil {
		return "", 0, 0
	}
	return at, float64(fs.Blocks-min(fs.Bavail, fs.Blocks)) * float64(fs.Bsize), float64(fs.Blocks) * float64(fs.Bsize)
}

// checkPins says why the image of a pull is not to be pinned, nothing if it is: those of its kind would hold too much of the disk, which kubelet
// could not free any more.
func (p *Puller) checkPins(ctx context.Context, u *pull, image *runtimeapi.Image) string {
	kind, _, _ := strings.Cut(u.req.GetOwner(), "/")
	percent := float64(u.req.GetPinPercent())
	if percent <= 0 {
		return ""
	}
	_, _, size := p.imageFS(ctx)
	if size == 0 {
		return ""
	}
	pinned := map[string]uint64{}
	p.mu.Lock()
	for k, v := range p.pins {
		if strings.HasPrefix(k.owner, kind+"/") {
			pinned[k.imageID] = v.Size
		}
	}
	p.mu.Unlock()
	if _, ok := pinned[image.GetId()]; ok {
		return ""
	}
	var held float64
	for _, n := range pinned {
		held += float64(n) * (1 + unpacked)
	}
	need := float64(image.GetSize()) * (1 + unpacked)
	if held+need <= size*percent/100 {
		return ""
	}
	return fmt.Sprintf("the images that are pinned for objects of kind %s hold about %s, this one takes %s, and the cluster allows them %g %% of the image file system's %s (--image-pin-percent of cri-controller)",
		kind, bytesText(int64(held)), bytesText(int64(need)), percent, bytesText(int64(size)))
}

// bytesText is a size for people.
func bytesText(n int64) string {
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
