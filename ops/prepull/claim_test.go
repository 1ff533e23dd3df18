// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package prepull

import (
	"slices"
	"testing"
	"testing/synctest"
	"time"

	opsv1 "github.com/cri-proxy/cri-proxy/api/ops/v1"
)

const private = "r.io/private:1"

// hidden says whether kubelet is told that the image is not there.
func (b *bubble) hidden(image string) bool {
	return b.AnyUnclaimed() && b.Unclaimed(imageCalled(image))
}

func (b *bubble) wantHidden(image string, want bool, when string) {
	b.t.Helper()
	synctest.Wait()
	if got := b.hidden(image); got != want {
		b.t.Errorf("%s: %s is hidden: %v", when, image, got)
	}
}

// TestUnclaimed: what comes with a secret is kubelet's when kubelet has pulled it, and whatever else happens it does not count as one that
// was always there.
func TestUnclaimed(t *testing.T) {
	secret := &opsv1.PullRequest{Uid: "a", Image: private, Credentials: credentials("r.io")}
	on := Options{VerifyAccess: true}
	t.Run("until kubelet pulls it", func(t *testing.T) {
		inBubble(t, on, func(t *testing.T, b *bubble) {
			b.wantHidden(private, false, "before")
			b.rt.takes = time.Minute
			b.pull(secret)
			b.wantHidden(private, true, "the moment it comes")
			b.wantHidden("nginx", false, "another one")
			b.end("a")
			b.wantHidden(private, true, "when it has come")
			b.restart()
			b.wantHidden(private, true, "to the next process")
			time.Sleep(3 * time.Minute)
			b.wantHidden(private, true, "later")
			b.Claimed("sha256:" + private)
			b.wantHidden(private, false, "when kubelet has pulled it")
			time.Sleep(2 * time.Minute)
			b.restart()
			if b.AnyUnclaimed() {
				t.Error("the file has kept it")
			}
			b.pull(&opsv1.PullRequest{Uid: "b", Image: private, Credentials: credentials("r.io"), Policy: opsv1.PullPolicy_PULL_POLICY_ALWAYS})
			b.end("b")
			b.wantHidden(private, false, "when it was there before")
		})
	})
	t.Run("killed while it comes", func(t *testing.T) {
		inBubble(t, on, func(t *testing.T, b *bubble) {
			b.rt.takes = time.Hour
			b.pull(secret)
			b.over()
			b.rt.set(func() { b.rt.images[private] = true }) // the runtime finishes it
			b.open()
			b.wantHidden(private, true, "to the next process")
			b.pull(secret)
			b.end("a")
			b.wantHidden(private, true, "when the command has been repeated")
		})
	})
	t.Run("cancelled, and comes all the same", func(t *testing.T) {
		inBubble(t, on, func(t *testing.T, b *bubble) {
			b.rt.takes = time.Hour
			b.pull(secret)
			if _, _, err := b.cancel("a", "test", ""); err != nil {
				t.Fatal(err)
			}
			b.rt.set(func() { b.rt.images[private] = true })
			b.wantHidden(private, true, "at once")
			time.Sleep(2 * time.Minute)
			b.wantHidden(private, true, "later")
			if open, over := b.claims.list(); !slices.Equal(open, []string{"sha256:" + private}) || len(over) > 0 {
				t.Errorf("open %q, over %v", open, over)
			}
		})
	})
	t.Run("kubelet is quicker", func(t *testing.T) {
		inBubble(t, on, func(t *testing.T, b *bubble) {
			b.rt.takes = time.Minute
			b.pull(secret)
			b.Claimed("sha256:" + private)
			b.end("a")
			b.wantHidden(private, false, "after its own pull")
		})
	})
	t.Run("removed", func(t *testing.T) {
		inBubble(t, on, func(t *testing.T, b *bubble) {
			b.pull(secret)
			b.end("a")
			b.rt.set(func() { delete(b.rt.images, private) })
			time.Sleep(2 * time.Minute)
			if b.AnyUnclaimed() {
				t.Error("there is no such image any more")
			}
		})
	})
	for name, tt := range map[string]struct {
		o   Options
		req *opsv1.PullRequest
	}{
		"without secrets":                 {on, &opsv1.PullRequest{Uid: "a", Image: private}},
		"with those of another registry":  {on, &opsv1.PullRequest{Uid: "a", Image: private, Credentials: credentials("quay.io")}},
		"where it is not to be looked at": {Options{}, secret},
	} {
		t.Run(name, func(t *testing.T) {
			inBubble(t, tt.o, func(t *testing.T, b *bubble) {
				b.pull(tt.req)
				b.want("a", succeeded, opsv1.PullReasonPulled)
				b.wantHidden(private, false, "after the pull")
			})
		})
	}
}
