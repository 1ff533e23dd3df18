// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package prepull

import (
	"context"
	"fmt"
	"strings"

	"golang.org/x/sys/unix"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"
)

// unpacked is what a compressed byte takes on the disk beside itself once it is unpacked; layers of programs
// compress to some 35–45 %.
const unpacked = 2.5

// unknown is the size of an image that the registry does not tell.
const unknown = -1

// checkDisk refuses a pull that would fill the image file system above the threshold, in percent.
func (p *Puller) checkDisk(ctx context.Context, missing int64) error {
	if p.maxDisk <= 0 || missing == 0 {
		return nil
	}
	at, used, size := p.imageFS(ctx)
	if size == 0 {
		return nil
	}
	if now := 100 * used / size; missing == unknown {
		if now > p.maxDisk {
			return &failure{reason: ReasonDiskPressure, message: fmt.Sprintf(
				"the image file system at %s is %.0f %% full, of %g %% allowed: free space, or raise images.maxDiskPercent", at, now, p.maxDisk)}
		}
		return nil
	}
	need := float64(missing) * (1 + unpacked)
	if after := 100 * (used + need) / size; after > p.maxDisk {
		return &failure{reason: ReasonDiskPressure, message: fmt.Sprintf(
			"the image needs about %s more (%s to fetch, and unpacked), and the image file system at %s would then be %.0f %% full, of %g %% allowed: free space, or raise images.maxDiskPercent",
			bytesText(int64(need)), bytesText(missing), at, after, p.maxDisk)}
	}
	return nil
}

// imageFS is where the images are, how much of it is used, and its size, in bytes as df counts; zero where the runtime does not tell, or not of
// this machine's paths: that cannot be guarded.
func (p *Puller) imageFS(ctx context.Context) (at string, used, size float64) {
	info, err := p.images.ImageFsInfo(ctx, &runtimeapi.ImageFsInfoRequest{})
	if err != nil || len(info.GetImageFilesystems()) == 0 {
		return "", 0, 0
	}
	at = info.GetImageFilesystems()[0].GetFsId().GetMountpoint()
	var fs unix.Statfs_t
	if err := unix.Statfs(at, &fs); err != nil {
		return "", 0, 0
	}
	used = float64(fs.Blocks-fs.Bfree) * float64(fs.Bsize)
	return at, used, used + float64(fs.Bavail)*float64(fs.Bsize)
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
