// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package prepull

import (
	"context"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"
	"google.golang.org/protobuf/types/known/durationpb"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	opsv1 "github.com/cri-proxy/cri-proxy/api/ops/v1"
)

// TestPinsAreBounded: what would take more of the disk than the pins of its kind may is pulled and not pinned.
func TestPinsAreBounded(t *testing.T) {
	inBubble(t, Options{}, func(t *testing.T, b *bubble) {
		dir := t.TempDir()
		b.rt.set(func() {
			b.rt.labels = map[string]map[string]string{}
			for i := range 4 {
				b.rt.labels["sha256:docker.io/library/"+name(i)+":latest"] = map[string]string{}
			}
			b.rt.disk = dir
		})
		_, _, total := b.imageFS(t.Context())
		if total == 0 {
			t.Fatal("the size of the disk is not known")
		}
		b.rt.set(func() { b.rt.size = uint64(total * 0.15 / (1 + unpacked)) }) // an image and what it is unpacked are 15 %
		pull := func(uid, image, owner string, percent int32) *opsv1.PullOperation {
			t.Helper()
			b.pull(&opsv1.PullRequest{Uid: uid, Image: image, Owner: owner, PinFor: durationpb.New(time.Hour), PinPercent: percent})
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
			for _, p := range b.listPins() {
				pinned = pinned || p.GetOwner() == tt.owner
			}
			if pinned != tt.pinned || strings.HasPrefix(op.GetMessage(), "not pinned: the images that are pinned for objects of kind ImagePullJob hold about ") == tt.pinned {
				t.Errorf("%s: pinned %v, %q", tt.uid, pinned, op.GetMessage())
			}
		}
	})
}

// TestDiskIsMeasuredAsKubeletDoes: where its own collection keeps the disk, below its threshold, images are pulled, what something waits for
// is pulled as long as it fits, and a number in the configuration counts as it always did.
func TestDiskIsMeasuredAsKubeletDoes(t *testing.T) {
	const gib = 1 << 30
	disk := func(free float64) func(string, *unix.Statfs_t) error {
		// 100 GiB, of which 5 are root's.
		return func(_ string, fs *unix.Statfs_t) error {
			*fs = unix.Statfs_t{Bsize: 4096, Blocks: 100 * gib / 4096, Bavail: uint64(free*gib) / 4096, Bfree: uint64((free+5)*gib) / 4096}
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
		{"of unknown size, at 82 %", high(85), 0, 18, unknown, false, ""},
		{"of unknown size, at 85 %", high(85), 0, 15, unknown, false, "is 85 % full, and " + gc},
		{"another threshold", high(95), 0, 15, 1, false, ""},
		{"no collection", high(100), 0, 5, 1, false, ""},
		{"waited for", high(85), 0, 8, 1, true, ""},
		{"waited for, of unknown size", high(85), 0, 1, unknown, true, ""},
		{"waited for, and does not fit", high(85), 0, 8, 4, true, "needs about 14.0 GiB more (4.0 GiB to fetch, and unpacked), and the image file system at /images has 8.0 GiB left"},
		{"number", nil, 80, 21, .1, false, ""},
		{"number, above", nil, 80, 21, 1, false, "would then be 82 % full, of 80 % allowed"},
		{"number, waited for", nil, 80, 10, 1, true, ""},
		{"off", nil, 0, 1, 10, false, ""},
		{"nothing to fetch", high(85), 0, 1, 0, false, ""},
	} {
		t.Run(tt.name, func(t *testing.T) {
			inBubble(t, Options{HighThreshold: tt.high, MaxDiskPercent: tt.max}, func(t *testing.T, b *bubble) {
				b.rt.set(func() { b.rt.disk = "/images" })
				b.statfs = disk(tt.free)
				missing := int64(unknown)
				if tt.missing != unknown {
					missing = int64(tt.missing * gib)
				}
				got := ""
				if err := b.checkDisk(t.Context(), &pull{urgent: tt.urgent}, missing); err != nil {
					got = err.Error()
				}
				if (got == "") != (tt.want == "") || !strings.Contains(got, tt.want) {
					t.Errorf("%q, want %q", got, tt.want)
				}
			})
		})
	}
}

// TestUpgradesAreNotKeptByTheDiskGuard: on a disk where nothing is pulled ahead of time any more, what an upgrade waits for is.
func TestUpgradesAreNotKeptByTheDiskGuard(t *testing.T) {
	for _, limit := range []int64{0, 1 << 30} {
		inContainerd(t, Options{HighThreshold: func() int { return 85 }}, func(t *testing.T, n *node) {
			n.rt.set(func() { n.rt.disk = "/images" })
			n.statfs = func(_ string, fs *unix.Statfs_t) error {
				*fs = unix.Statfs_t{Bsize: 4096, Blocks: 1000, Bavail: 100}
				return nil
			}
			image := sampleOf(layer("a", 1000))
			n.answer = image.serve
			n.rt.pulling = func(ctx context.Context, _ *runtimeapi.PullImageRequest) error {
				return n.bring(ctx, image.manifest, image.config, image.layers[0])
			}
			n.pull(&opsv1.PullRequest{Uid: "job", Image: "r.io/a", MaxAttempts: 1, BytesPerSecond: limit})
			if op := n.end("job"); op.GetReason() != opsv1.PullReasonDiskPressure || !strings.Contains(op.GetMessage(), "91 % full, and kubelet removes images from 85 % on") {
				t.Errorf("%v", op)
			}
			op, err := n.Ensure(t.Context(), &opsv1.PullRequest{Uid: "upgrade", Image: "r.io/a", MaxAttempts: 1, BytesPerSecond: limit}, nil)
			if err != nil || op.GetReason() != opsv1.PullReasonPulled {
				t.Errorf("%v %v", op, err)
			}
			n.statfs = func(_ string, fs *unix.Statfs_t) error {
				*fs = unix.Statfs_t{Bsize: 1024, Blocks: 1000, Bavail: 3} // 3.5 KiB are needed
				return nil
			}
			image = sampleOf(layer("b", 1024))
			n.answer = image.serve
			op, err = n.Ensure(t.Context(), &opsv1.PullRequest{Uid: "too-large", Image: "r.io/b", MaxAttempts: 1, BytesPerSecond: limit}, nil)
			if err != nil || op.GetReason() != opsv1.PullReasonDiskPressure || !strings.Contains(op.GetMessage(), "has 3.0 KiB left: free space") {
				t.Errorf("%v %v", op, err)
			}
		})
	}
}
