// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package prepull

import (
	"context"
	"errors"
	"slices"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/containerd/errdefs"
	"google.golang.org/protobuf/types/known/durationpb"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	opsv1 "github.com/cri-proxy/cri-proxy/api/ops/v1"
)

// course is what an Ensure has been told, without repetitions. States that last no time may be missing.
type course []string

func (c *course) add(op *opsv1.PullOperation) {
	text := strings.TrimSpace(strings.TrimPrefix(op.GetPhase().String(), "PULL_") + " " + op.GetReason())
	if n := len(*c); n == 0 || (*c)[n-1] != text {
		*c = append(*c, text)
	}
}

func TestEnsure(t *testing.T) {
	for _, tt := range []struct {
		name    string
		prepare func(rt *fakeRuntime)
		phase   opsv1.PullPhase
		reason  string
		course  []string
	}{
		{name: "pulled", prepare: func(*fakeRuntime) {}, phase: succeeded, reason: opsv1.PullReasonPulled, course: []string{"RESOLVING", "SUCCEEDED Pulled"}},
		{name: "there", prepare: func(rt *fakeRuntime) { rt.images["docker.io/library/nginx:latest"] = true }, phase: succeeded, reason: opsv1.PullReasonPresent, course: []string{"SUCCEEDED Present"}},
		{name: "refused", prepare: func(rt *fakeRuntime) { rt.fail = []error{unauthorized()} }, phase: failed, reason: opsv1.PullReasonUnauthorized, course: []string{"FAILED Unauthorized"}},
		{name: "tried again", prepare: func(rt *fakeRuntime) { rt.fail = []error{broken(), nil} }, phase: succeeded, reason: opsv1.PullReasonPulled, course: []string{"WAITING BackOff", "RESOLVING", "SUCCEEDED Pulled"}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			inBubble(t, Options{}, func(t *testing.T, b *bubble) {
				b.rt.takes = time.Minute
				tt.prepare(b.rt)
				var seen course
				op, err := b.Ensure(t.Context(), &opsv1.PullRequest{Uid: "a", Image: "nginx"}, seen.add)
				if err != nil || op.GetPhase() != tt.phase || op.GetReason() != tt.reason || op.GetFinishTime() == nil {
					t.Errorf("%v, %v", op, err)
				}
				if len(seen) < len(tt.course) || !slices.Equal(seen[len(seen)-len(tt.course):], tt.course) {
					t.Errorf("told %q, want %q in the end", seen, tt.course)
				}
			})
		})
	}
}

func TestEnsureJoins(t *testing.T) {
	inBubble(t, Options{}, func(t *testing.T, b *bubble) {
		b.rt.takes = time.Minute
		req := &opsv1.PullRequest{Uid: "a", Image: "nginx"}
		b.pull(req)
		time.Sleep(30 * time.Second)
		began := time.Now()
		for range 2 { // the second finds it finished
			if op, err := b.Ensure(t.Context(), req, nil); err != nil || op.GetPhase() != succeeded {
				t.Errorf("%v, %v", op, err)
			}
		}
		if took := time.Since(began).Round(time.Second); took != 30*time.Second || b.rt.count() != 1 {
			t.Errorf("%d pulls, took %s", b.rt.count(), took)
		}
	})
}

func TestEnsureCancels(t *testing.T) {
	for _, tt := range []struct {
		name  string
		queue bool
	}{{"running", false}, {"in the queue", true}} {
		t.Run(tt.name, func(t *testing.T) {
			inBubble(t, Options{}, func(t *testing.T, b *bubble) {
				b.rt.takes = time.Minute
				if tt.queue {
					for _, image := range []string{"busybox", "redis", "httpd"} { // the first has a place of its own
						b.pull(&opsv1.PullRequest{Uid: image, Image: image})
						b.hurry(image)
					}
					synctest.Wait()
				}
				ctx, cancel := context.WithTimeout(t.Context(), 10*time.Second)
				defer cancel()
				if op, err := b.Ensure(ctx, &opsv1.PullRequest{Uid: "a", Image: "nginx"}, nil); !errors.Is(err, context.DeadlineExceeded) || op != nil {
					t.Errorf("%v, %v", op, err)
				}
				b.want("a", cancelled, opsv1.PullReasonCancelled)
				// One more of the same image is not held up.
				if op, err := b.Ensure(t.Context(), &opsv1.PullRequest{Uid: "again", Image: "nginx"}, nil); err != nil || op.GetPhase() != succeeded {
					t.Errorf("%v, %v", op, err)
				}
				// And nothing is begun for who is gone already.
				if _, err := b.Ensure(ctx, &opsv1.PullRequest{Uid: "late", Image: "nginx"}, nil); !errors.Is(err, context.DeadlineExceeded) {
					t.Error(err)
				}
				if _, _, err := b.watch("late"); err == nil {
					t.Error("a pull was begun")
				}
			})
		})
	}
}

// An image that something waits for does not stand behind one that takes its time.
func TestEnsurePasses(t *testing.T) {
	inBubble(t, Options{}, func(t *testing.T, b *bubble) {
		b.rt.takes = time.Hour
		b.pull(&opsv1.PullRequest{Uid: "slow", Image: "busybox"})
		b.pull(&opsv1.PullRequest{Uid: "next", Image: "redis"})
		synctest.Wait()
		b.rt.takes = time.Second
		b.rt.images["docker.io/library/there:latest"] = true
		for image, reason := range map[string]string{"there": opsv1.PullReasonPresent, "nginx": opsv1.PullReasonPulled} {
			began := time.Now()
			if op, err := b.Ensure(t.Context(), &opsv1.PullRequest{Uid: image, Image: image}, nil); err != nil || op.GetReason() != reason || time.Since(began) > 2*time.Second {
				t.Errorf("%s: %v, %v after %s", image, op, err, time.Since(began))
			}
		}
		b.want("next", opsv1.PullPhase_PULL_WAITING, opsv1.PullReasonInQueue)
	})
}

// What something waits for takes a place of the others' if its own are taken and one of these is free.
func TestUrgentTakesAFreePlace(t *testing.T) {
	inBubble(t, Options{}, func(t *testing.T, b *bubble) {
		b.rt.takes = time.Minute
		for i := range urgentParallel + 2 {
			if _, err := b.take(&opsv1.PullRequest{Uid: name(i), Image: name(i)}, true); err != nil {
				t.Fatal(err)
			}
			synctest.Wait()
		}
		for i := range urgentParallel + 1 {
			b.want(name(i), resolving, "")
		}
		op := b.want(name(urgentParallel+1), waiting, opsv1.PullReasonInQueue)
		if want := "2 pulls that something waits for and 1 of 1 others at once are under way"; op.GetMessage() != want {
			t.Errorf("%v", op)
		}
		for i := range urgentParallel + 2 {
			if op := b.end(name(i)); op.GetPhase() != succeeded {
				t.Errorf("%v", op)
			}
		}
	})
}

func TestEnsureCancelledByAnother(t *testing.T) {
	inBubble(t, Options{}, func(t *testing.T, b *bubble) {
		b.rt.takes = time.Minute
		ended := make(chan *opsv1.PullOperation, 1)
		go func() {
			op, err := b.Ensure(t.Context(), &opsv1.PullRequest{Uid: "a", Image: "nginx"}, nil)
			if err != nil {
				t.Error(err)
			}
			ended <- op
		}()
		synctest.Wait()
		if _, _, err := b.cancel("a", "enough", ""); err != nil {
			t.Fatal(err)
		}
		if op := <-ended; op.GetPhase() != cancelled || op.GetMessage() != "enough" {
			t.Errorf("%v", op)
		}
	})
}

func TestEnsureRefused(t *testing.T) {
	inBubble(t, Options{}, func(t *testing.T, b *bubble) {
		b.pull(&opsv1.PullRequest{Uid: "taken", Image: "nginx"})
		for want, req := range map[string]*opsv1.PullRequest{
			`image "A": invalid reference format`:            {Uid: "a", Image: "A"},
			"pull taken exists with another request; choose": {Uid: "taken", Image: "busybox"},
		} {
			if _, err := b.Ensure(t.Context(), req, nil); err == nil || !strings.HasPrefix(err.Error(), want) {
				t.Errorf("%v, want %s", err, want)
			}
		}
	})
}

func TestPin(t *testing.T) {
	const id = "sha256:docker.io/library/nginx:latest" // as the fake has it
	inBubble(t, Options{}, func(t *testing.T, b *bubble) {
		b.rt.set(func() {
			b.rt.images["docker.io/library/nginx:latest"], b.rt.images["nginx"] = true, true
			b.rt.labels = map[string]map[string]string{id: {}, "sha256:nginx": {}}
		})
		pinned := func() (yes bool) {
			b.rt.set(func() { yes = b.rt.labels[id][pinLabel] == pinValue })
			return yes
		}

		until := time.Now().Add(time.Hour)
		if err := b.Pin(t.Context(), "docker.io/library/nginx:latest", "me", until); err != nil || !pinned() {
			t.Fatalf("not pinned: %v", err)
		}
		if pins := b.listPins(); len(pins) != 1 || pins[0].GetImageId() != id || pins[0].GetImage() != "docker.io/library/nginx:latest" || pins[0].GetOwner() != "me" || !pins[0].GetExpireTime().AsTime().Equal(until) {
			t.Errorf("%v", pins)
		}
		// Again, for longer; it outlives the process, and ends by itself.
		if err := b.Pin(t.Context(), "docker.io/library/nginx:latest", "me", until.Add(time.Hour)); err != nil {
			t.Fatal(err)
		}
		b.restart()
		time.Sleep(time.Until(until) + 10*sweepEvery)
		if !pinned() {
			t.Error("not pinned any more")
		}
		time.Sleep(time.Hour)
		if pinned() || len(b.listPins()) != 0 {
			t.Errorf("still pinned: %v", b.listPins())
		}
		if err := b.Pin(t.Context(), "none", "me", until); !errdefs.IsNotFound(err) {
			t.Errorf("an image that is not there: %v", err)
		}
		b.rt.set(func() { b.rt.labels[id] = map[string]string{pinLabel: pinValue} })
		if err := b.Pin(t.Context(), "docker.io/library/nginx:latest", "me", until); err != nil || len(b.listPins()) != 0 {
			t.Errorf("an image that the configuration pins: %v, %v", err, b.listPins())
		}
		b.rt.set(func() { b.rt.labels = nil })
		if err := b.Pin(t.Context(), "nginx", "me", until); !unavailable(err) || len(b.listPins()) != 0 {
			t.Errorf("a runtime that is not containerd: %v, %v", err, b.listPins())
		}
	})
}

// TestPinOfAnImageThatIsGone: the list says so, and the pin holds again when the image is back.
func TestPinOfAnImageThatIsGone(t *testing.T) {
	const name, id = "docker.io/library/nginx:latest", "sha256:docker.io/library/nginx:latest" // as the fake has it
	inBubble(t, Options{}, func(t *testing.T, b *bubble) {
		b.rt.set(func() { b.rt.labels = map[string]map[string]string{id: {}} })
		b.pull(&opsv1.PullRequest{Uid: "a", Image: "nginx", Owner: "me", PinFor: durationpb.New(time.Hour)})
		b.want("a", succeeded, opsv1.PullReasonPulled)
		pinned := func() (yes bool) {
			b.rt.set(func() { yes = b.rt.labels[id][pinLabel] == pinValue })
			return yes
		}
		list := func(gone bool) {
			t.Helper()
			l, err := NewServer(b.Puller).ListPins(t.Context(), &opsv1.ListPinsRequest{})
			if err != nil || len(l.GetPins()) != 1 || l.GetPins()[0].GetGone() != gone || (len(l.GetGoneImageIds()) == 1) != gone {
				t.Errorf("%v, %v; want gone %v", l, err, gone)
			}
		}
		list(false)
		b.rt.set(func() { delete(b.rt.images, name); delete(b.rt.labels, id) })
		list(true)
		time.Sleep(2 * sweepEvery)
		list(true)
		b.rt.set(func() { b.rt.images[name], b.rt.labels[id] = true, map[string]string{} })
		list(false)
		time.Sleep(2 * sweepEvery)
		if !pinned() {
			t.Error("the image is back, and not pinned")
		}
		time.Sleep(time.Hour)
		if pinned() {
			t.Error("pinned after its time")
		}
	})
}

func TestNameOf(t *testing.T) {
	image := &runtimeapi.Image{Id: "sha256:0123456789abcdef", RepoTags: []string{"docker.io/library/nginx:1"}, RepoDigests: []string{"docker.io/library/nginx@sha256:00"}}
	for _, tt := range []struct {
		asked string
		image *runtimeapi.Image
		want  string
	}{
		{"nginx:1", image, "docker.io/library/nginx:1"},
		{"nginx", image, "docker.io/library/nginx:latest"},
		{image.GetId(), image, "docker.io/library/nginx:1"},
		{"0123456789ab", image, "docker.io/library/nginx:1"},
		{image.GetId(), &runtimeapi.Image{Id: image.GetId(), RepoDigests: image.GetRepoDigests()}, "docker.io/library/nginx@sha256:00"},
		{image.GetId(), &runtimeapi.Image{Id: image.GetId()}, image.GetId()},
	} {
		t.Run(tt.asked, func(t *testing.T) {
			if got := nameOf(tt.image, tt.asked); got != tt.want {
				t.Errorf("nameOf(%q): %s, want %s", tt.asked, got, tt.want)
			}
		})
	}
}
