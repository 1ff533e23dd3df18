// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package prepull

import (
	"context"
	"errors"
	"fmt"
	"reflect"
	"slices"
	"syscall"
	"testing"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/protobuf/types/known/durationpb"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	opsv1 "github.com/cri-proxy/cri-proxy/api/ops/v1"
	"github.com/cri-proxy/cri-proxy/ops/prepull"
)

func pinned(t testing.TB, image string, want bool) {
	t.Helper()
	// containerd's CRI plugin learns of labels by an event.
	eventually(t, func() error {
		if present(t, image).GetPinned() != want {
			return errors.New("pinned is not as it should be")
		}
		return nil
	})
}

func release(t testing.TB, owner, imageID string) int32 {
	t.Helper()
	r, err := bed.pulls.ReleasePins(t.Context(), &opsv1.ReleasePinsRequest{Owner: owner, ImageId: imageID})
	must(t, err)
	return r.GetReleased()
}

func TestPins(t *testing.T) {
	f := newFront(t, "pins.test")
	p := push(t, "pins:1", 1, 1)
	image := f.image(p.name)
	pull := func(owner string, keep time.Duration) *opsv1.PullOperation {
		return succeeds(t, begin(t, &opsv1.PullRequest{Image: image, Owner: owner, PinFor: durationpb.New(keep)}))
	}
	pull("nobody", 0)
	pinned(t, image, false)

	t.Run("two owners", func(t *testing.T) {
		id := pull("a", time.Hour).GetImageId()
		pinned(t, image, true)
		pull("b", 2*time.Hour)
		list, err := bed.pulls.ListPins(t.Context(), &opsv1.ListPinsRequest{})
		must(t, err)
		if pins := list.GetPins(); len(pins) != 2 || pins[0].GetOwner() != "a" || pins[1].GetOwner() != "b" ||
			pins[0].GetImageId() != id ||
			pins[0].GetImage() != image || pins[0].GetSizeBytes() < p.size ||
			time.Until(pins[1].GetExpireTime().AsTime()) < 119*time.Minute {
			t.Errorf("%v", list)
		}
		if n := release(t, "a", ""); n != 1 {
			t.Errorf("%d released", n)
		}
		pinned(t, image, true)
		if n := release(t, "b", "sha256:other"); n != 0 {
			t.Errorf("%d released", n)
		}
		if n := release(t, "b", id); n != 1 {
			t.Errorf("%d released", n)
		}
		pinned(t, image, false)
	})
	t.Run("stays when the tag is pulled again", func(t *testing.T) {
		pull("a", time.Hour)
		_, err := bed.kubelet.PullImage(t.Context(), &runtimeapi.PullImageRequest{Image: spec(image)})
		must(t, err)
		pinned(t, image, true)
		must(t, bed.RestartContainerd(t.Context()))
		must(t, bed.WaitProxyReady(t.Context()))
		pinned(t, image, true)
		release(t, "a", "")
		pinned(t, image, false)
	})
	t.Run("expires", func(t *testing.T) {
		pull("a", time.Second)
		pinned(t, image, true)
		time.Sleep(1100 * time.Millisecond)
		// The next process looks at once, a running one within a minute.
		must(t, bed.RestartProxy(t.Context(), syscall.SIGTERM))
		pinned(t, image, false)
		eventually(t, func() error { // written after the label was taken away, which kubelet sees at once
			list, err := bed.pulls.ListPins(t.Context(), &opsv1.ListPinsRequest{})
			if err == nil && len(list.GetPins()) != 0 {
				err = fmt.Errorf("there are pins: %v", list)
			}
			return err
		})
	})
	t.Run("image is gone", func(t *testing.T) {
		pull("a", time.Hour)
		_, err := bed.direct.RemoveImage(t.Context(), &runtimeapi.RemoveImageRequest{Image: spec(image)})
		must(t, err)
		if n := release(t, "a", ""); n != 1 {
			t.Errorf("%d released", n)
		}
		pull("nobody", 0)
		pinned(t, image, false)
	})
}

// TestSandboxImage pins and releases the image that pods' sandboxes are made of, which containerd
// itself keeps pinned.
func TestSandboxImage(t *testing.T) {
	image := bed.Image("pause:3.10")
	for name, first := range map[string]func() error{
		"there before": func() error {
			_, err := bed.direct.PullImage(t.Context(), &runtimeapi.PullImageRequest{Image: spec(image)})
			return err
		},
		"not there before": func() error {
			_, err := bed.direct.RemoveImage(t.Context(), &runtimeapi.RemoveImageRequest{Image: spec(image)})
			return err
		},
	} {
		t.Run(name, func(t *testing.T) {
			must(t, first())
			op := succeeds(t, begin(t, &opsv1.PullRequest{Image: image, Owner: "a", PinFor: durationpb.New(time.Hour)}))
			pinned(t, image, true)
			t.Logf("%v", op.GetMessage())
			release(t, "a", "")
			pinned(t, image, true)
			again := succeeds(t,
				begin(t, &opsv1.PullRequest{Image: image, Owner: "a", PinFor: durationpb.New(time.Hour),
					Policy: opsv1.PullPolicy_PULL_POLICY_ALWAYS}))
			release(t, "a", "")
			pinned(t, image, true)
			if op.GetImageId() != again.GetImageId() {
				t.Errorf("%v and %v", op, again)
			}
		})
	}
}

// TestLetGo takes everything of ours off containerd once the proxy is gone, and off what the next
// one would believe in.
func TestLetGo(t *testing.T) {
	f := newFront(t, "let-go.test")
	kept, cut := push(t, "let-go:1", 1, 1), push(t, "let-go-cut:1", 4, 8)
	image := f.image(kept.name)
	day := durationpb.New(24 * time.Hour)
	id := succeeds(t, begin(t, &opsv1.PullRequest{Image: image, Owner: "a", PinFor: day})).GetImageId()
	pinned(t, image, true)
	sandbox := bed.Image("pause:3.10")
	_, err := bed.direct.PullImage(t.Context(), &runtimeapi.PullImageRequest{Image: spec(sandbox)})
	must(t, err)
	// Of what this front sends, let-go is a part, and fetchers keep a part to themselves.
	f.hold(cut, 2)
	before := len(ourLeases(t)) // of pulls that have failed
	uid := begin(t, &opsv1.PullRequest{Image: f.image(cut.name)})
	follow(t, uid, upTo(cut, 1))
	must(t, bed.KillProxy(t.Context(), syscall.SIGKILL))
	started := false
	t.Cleanup(func() {
		f.goOn()
		if !started {
			must(t, bed.StartProxy(context.WithoutCancel(t.Context())))
		}
	})
	if len(ourLeases(t)) <= before {
		t.Fatal("the pull that was cut off has no lease")
	}

	conn, err := grpc.NewClient("unix://"+bed.RuntimeSocket, grpc.WithTransportCredentials(insecure.NewCredentials()))
	must(t, err)
	defer conn.Close()
	holds, err := prepull.Holds(t.Context(), conn)
	must(t, err)
	got, err := prepull.LetGo(t.Context(), conn)
	must(t, err)
	if !reflect.DeepEqual(holds, got) || !slices.Equal(got.Images, []string{image}) || got.Leases != before+1 {
		t.Errorf("%v, then %v", holds, got)
	}
	must(t, prepull.ForgetPins(bed.StateDir))
	if l := ourLeases(t); len(l) > 0 {
		t.Errorf("leases: %v", l)
	}
	shown := func(image string) *runtimeapi.Image {
		st, err := bed.direct.ImageStatus(t.Context(), &runtimeapi.ImageStatusRequest{Image: spec(image)})
		must(t, err)
		return st.GetImage()
	}
	eventually(t, func() error {
		if i := shown(image); i.GetId() != id || i.GetPinned() {
			return fmt.Errorf("kubelet finds %v", i)
		}
		return nil
	})
	if !shown(sandbox).GetPinned() {
		t.Error("the sandbox image, which the runtime's configuration pins, is not pinned any more")
	}
	if again, err := prepull.LetGo(t.Context(), conn); err != nil || again.Any() {
		t.Errorf("once more: %v, %v", again, err)
	}

	f.goOn()
	must(t, bed.StartProxy(t.Context()))
	started = true
	list, err := bed.pulls.ListPins(t.Context(), &opsv1.ListPinsRequest{})
	if err != nil || len(list.GetPins()) != 0 {
		t.Errorf("the next process believes in %v, %v", list, err)
	}
	succeeds(t, uid) // it goes on all the same
}
