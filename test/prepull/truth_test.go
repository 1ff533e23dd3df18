// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package prepull

import (
	"errors"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"google.golang.org/protobuf/types/known/durationpb"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	opsv1 "github.com/cri-proxy/cri-proxy/api/ops/v1"
)

// TestPinOfAnImageThatIsGone: the list says so, and when kubelet has pulled the image again the pin
// holds.
func TestPinOfAnImageThatIsGone(t *testing.T) {
	f := newFront(t, "gone-pin.test")
	image := f.image(push(t, "gone-pin:1", 1, 1).name)
	op := succeeds(t, begin(t, &opsv1.PullRequest{Image: image, Owner: "gone", PinFor: durationpb.New(time.Hour)}))
	defer release(t, "gone", "")
	isGone := func() (gone bool) {
		list, err := bed.pulls.ListPins(t.Context(), &opsv1.ListPinsRequest{})
		must(t, err)
		i := slices.IndexFunc(list.GetPins(), func(p *opsv1.ImagePin) bool { return p.GetOwner() == "gone" })
		if i < 0 {
			t.Fatalf("no pin: %v", list)
		}
		if gone = list.GetPins()[i].GetGone(); gone != slices.Contains(list.GetGoneImageIds(), op.GetImageId()) {
			t.Errorf("%v", list)
		}
		return gone
	}
	if isGone() {
		t.Error("gone")
	}
	_, err := bed.direct.RemoveImage(t.Context(), &runtimeapi.RemoveImageRequest{Image: spec(image)})
	must(t, err)
	eventually(t, func() error {
		if !isGone() {
			return errors.New("not gone")
		}
		return nil
	})
	_, err = bed.kubelet.PullImage(t.Context(), &runtimeapi.PullImageRequest{Image: spec(image)})
	must(t, err)
	// The next process looks at once, a running one within a minute.
	must(t, bed.RestartProxy(t.Context(), syscall.SIGTERM))
	pinned(t, image, true)
	if isGone() {
		t.Error("still gone")
	}
}

// TestOtherCredentials come while a pull waits that the registry has said no to.
func TestOtherCredentials(t *testing.T) {
	f := newFront(t, "later.test")
	p := push(t, "later/app:1", 1, 1)
	f.protect("robot", password)
	req := &opsv1.PullRequest{Image: f.image(p.name), MaxAttempts: 20}
	uid := begin(t, req)
	follow(t, uid, func(op *opsv1.PullOperation) bool {
		return op.GetReason() == "BackOff" &&
			strings.Contains(op.GetMessage(), ": Unauthorized: registry later.test refuses access")
	})
	req.Credentials = []*opsv1.RegistryCredential{{Match: "later.test", Username: "robot", Password: password}}
	began := time.Now()
	begin(t, req)
	op := succeeds(t, uid)
	t.Logf("%s after the credentials had come, attempt %d", time.Since(began), op.GetAttempt())
	if op.GetAttempt() < 2 || op.GetAttempt() == 20 {
		t.Errorf("%v", op)
	}
}
