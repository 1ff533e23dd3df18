// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package prepull_test

import (
	"context"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"
	"google.golang.org/protobuf/types/known/durationpb"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	opsv1 "github.com/cri-proxy/cri-proxy/api/ops/v1"
	"github.com/cri-proxy/cri-proxy/ops/prepull"
	"github.com/cri-proxy/cri-proxy/ops/prepull/imagefs"
)

// TestPinsAreBounded: what would take more of the disk than the pins of its kind may is pulled and
// not pinned.
func TestPinsAreBounded(t *testing.T) {
	inBubble(t, prepull.Options{}, func(t *testing.T, b *bubble) {
		dir := t.TempDir()
		b.rt.set(func() {
			b.rt.labels = map[string]map[string]string{}
			for i := range 4 {
				b.rt.labels["sha256:docker.io/library/"+name(i)+":latest"] = map[string]string{}
			}
			b.rt.disk = dir
		})
		_, _, total := b.Disk().Size(t.Context())
		if total == 0 {
			t.Fatal("the size of the disk is not known")
		}
		b.rt.set(func() {
			b.rt.size = uint64(total * 0.15 / (1 +
				imagefs.Unpacked))
		}) // an image and what it is unpacked are 15 %
		pull := func(uid, image, owner string, percent int32) *opsv1.PullOperation {
			t.Helper()
			b.pull(&opsv1.PullRequest{Uid: uid, Image: image, Owner: owner, PinFor: durationpb.New(time.Hour),
				PinPercent: percent})
			return b.want(uid, succeeded, b.get(uid).GetReason())
		}
		for _, tt := range []struct {
			uid, image, owner string
			percent           int32
			pinned            bool
		}{
			{"first", name(0), "ImagePullJob/ns/a/1", 40, true},
			{"second", name(1), "ImagePullJob/other/b/2", 40, true},
			{"no room", name(2), "ImagePullJob/ns/c/3", 40, false},
			{"again", name(0), "ImagePullJob/ns/d/4", 40, true}, // it takes nothing more
			{"another kind", name(3), "InPlaceRollout/ns/r/5", 40, true},
			{"no bound", name(2), "ImagePullJob/ns/e/6", 0, true},
		} {
			op := pull(strings.ReplaceAll(tt.uid, " ", "-"), tt.image, tt.owner, tt.percent)
			pinned := false
			for _, p := range b.Pins().List() {
				pinned = pinned || p.GetOwner() == tt.owner
			}
			if pinned != tt.pinned || strings.HasPrefix(op.GetMessage(),
				"not pinned: the images that are pinned for objects of kind ImagePullJob hold about ") == tt.pinned {
				t.Errorf("%s: pinned %v, %q", tt.uid, pinned, op.GetMessage())
			}
		}
	})
}

// TestUpgradesAreNotKeptByTheDiskGuard: on a disk where nothing is pulled ahead of time any more,
// what an upgrade waits for is.
func TestUpgradesAreNotKeptByTheDiskGuard(t *testing.T) {
	for _, limit := range []int64{0, 1 << 30} {
		inContainerd(t, prepull.Options{HighThreshold: func() int { return 85 }}, func(t *testing.T, n *node) {
			n.rt.set(func() { n.rt.disk = "/images" })
			n.Disk().Statfs = func(_ string, fs *unix.Statfs_t) error {
				*fs = unix.Statfs_t{Bsize: 4096, Blocks: 1000, Bavail: 100}
				return nil
			}
			image := sampleOf(layer("a", 1000))
			n.answer = image.serve
			n.rt.pulling = func(ctx context.Context, _ *runtimeapi.PullImageRequest) error {
				return n.bring(ctx, image.manifest, image.config, image.layers[0])
			}
			n.pull(&opsv1.PullRequest{Uid: "job", Image: "r.io/a", MaxAttempts: 1, BytesPerSecond: limit})
			if op := n.end("job"); op.GetReason() != opsv1.PullReasonDiskPressure ||
				!strings.Contains(op.GetMessage(), "91 % full, and kubelet removes images from 85 % on") {
				t.Errorf("%v", op)
			}
			op, err := n.Ensure(t.Context(), &opsv1.PullRequest{Uid: "upgrade", Image: "r.io/a", MaxAttempts: 1,
				BytesPerSecond: limit}, nil)
			if err != nil || op.GetReason() != opsv1.PullReasonPulled {
				t.Errorf("%v %v", op, err)
			}
			n.Disk().Statfs = func(_ string, fs *unix.Statfs_t) error {
				*fs = unix.Statfs_t{Bsize: 1024, Blocks: 1000, Bavail: 3} // 3.5 KiB are needed
				return nil
			}
			image = sampleOf(layer("b", 1024))
			n.answer = image.serve
			op, err = n.Ensure(t.Context(), &opsv1.PullRequest{Uid: "too-large", Image: "r.io/b", MaxAttempts: 1,
				BytesPerSecond: limit}, nil)
			if err != nil || op.GetReason() != opsv1.PullReasonDiskPressure ||
				!strings.Contains(op.GetMessage(), "has 3.0 KiB left: free space") {
				t.Errorf("%v %v", op, err)
			}
		})
	}
}
