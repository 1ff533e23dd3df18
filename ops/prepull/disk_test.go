// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package prepull

import (
	"strings"
	"testing"
	"time"

	"google.golang.org/protobuf/types/known/durationpb"

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
