// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package prepull

import (
	"context"
	"fmt"

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
	info, err := p.images.ImageFsInfo(ctx, &runtimeapi.ImageFsInfoRequest{})
	if err != nil || len(info.GetImageFilesystems()) == 0 {
		return nil //nolint:nilerr // a runtime that does not tell cannot be guarded
	}
	at := info.GetImageFilesystems()[0].GetFsId().GetMountpoint()
	var fs unix.Statfs_t
	if err := unix.Statfs(at, &fs); err != nil {
		return nil //nolint:nilerr // not this machine's path
	}
	used := float64(fs.Blocks-fs.Bfree) * float64(fs.Bsize)
	size := used + float64(fs.Bavail)*float64(fs.Bsize) // as df counts
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
