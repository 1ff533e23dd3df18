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

// The message of a pull is for people. What programs need of it is in fields, which must agree with
// the message: cri-controller shows both.
func TestFieldsOfFailedAttempts(t *testing.T) {
	const trouble = "registry docker.io cannot be used now"
	check := func(t *testing.T, op *opsv1.PullOperation, wait time.Duration, reason, message string) {
		t.Helper()
		got := op.GetLastFailure()
		if op.GetRetryAfter().AsDuration() != wait || got.GetReason() != reason || !strings.HasPrefix(got.GetMessage(), message) {
			t.Errorf("want %s and %q %q: %v", wait, reason, message, op)
		}
		if reason != "" && op.GetReason() == opsv1.PullReasonBackOff &&
			!strings.HasSuffix(op.GetMessage(), ": "+reason+": "+got.GetMessage()) {
			t.Errorf("message and last failure differ: %v", op)
		}
	}
	t.Run("back-off", func(t *testing.T) {
		inBubble(t, Options{}, func(t *testing.T, b *bubble) {
			b.rt.fail = []error{broken()}
			b.pull(&opsv1.PullRequest{Uid: "a", Image: "nginx", MaxAttempts: 3})
			op := b.want("a", waiting, opsv1.PullReasonBackOff)
			check(t, op, time.Second, opsv1.PullReasonRegistryUnavailable, trouble)
			if op.GetMaxAttempts() != 3 {
				t.Errorf("%v", op)
			}
			time.Sleep(time.Second)
			check(t, b.want("a", waiting, opsv1.PullReasonBackOff), 2*time.Second, opsv1.PullReasonRegistryUnavailable, trouble)
			check(t, b.end("a"), 0, "", "")
			b.pull(&opsv1.PullRequest{Uid: "b", Image: "busybox"})
			if op := b.get("b"); op.GetMaxAttempts() != opsv1.DefaultAttempts {
				t.Errorf("%v", op)
			}
		})
	})
	t.Run("another pull has failed", func(t *testing.T) {
		inBubble(t, Options{Parallel: 2}, func(t *testing.T, b *bubble) {
			b.rt.fail = []error{broken()}
			b.pull(&opsv1.PullRequest{Uid: "a", Image: "nginx"})
			b.pull(&opsv1.PullRequest{Uid: "b", Image: "nginx"})
			check(t, b.want("b", waiting, opsv1.PullReasonBackOff), 0, "", "")
		})
	})
	t.Run("the next attempt runs", func(t *testing.T) {
		inBubble(t, Options{}, func(t *testing.T, b *bubble) {
			b.rt.set(func() { b.rt.fail, b.rt.takes = []error{broken(), nil}, time.Minute })
			b.pull(&opsv1.PullRequest{Uid: "a", Image: "nginx"})
			time.Sleep(2 * time.Second)
			// Nothing has come so far: why the first attempt failed may still be what is wrong.
			check(t, b.want("a", resolving, ""), 0, opsv1.PullReasonRegistryUnavailable, trouble)
			check(t, b.end("a"), 0, "", "")
		})
	})
	t.Run("other credentials", func(t *testing.T) {
		inBubble(t, Options{}, func(t *testing.T, b *bubble) {
			b.rt.set(func() { b.rt.late, b.rt.takes = unauthorized(), time.Minute })
			req := &opsv1.PullRequest{Uid: "a", Image: "nginx"}
			b.pull(req)
			req.Credentials = credentials("docker.io")
			b.pull(req)
			time.Sleep(61 * time.Second) // the next attempt has begun at once
			check(t, b.want("a", resolving, ""), 0, opsv1.PullReasonUnauthorized, "registry docker.io refuses access")
		})
	})
}

func TestFieldsOfTheEnd(t *testing.T) {
	const limit = "without the speed limit of 1.0 MiB/s: the runtime is not containerd"
	inBubble(t, Options{}, func(t *testing.T, b *bubble) {
		b.rt.set(func() { b.rt.takes = time.Minute })
		b.pull(&opsv1.PullRequest{Uid: "a", Image: "nginx", BytesPerSecond: 1 << 20, PinFor: durationpb.New(time.Hour)})
		op := b.want("a", resolving, "")
		if op.GetLimitNotKept() != limit || op.GetMessage() != "pulling "+limit {
			t.Errorf("%v", op)
		}
		op = b.end("a")
		if op.GetLimitNotKept() != limit || op.GetNotPinned() != "the runtime has no way to" ||
			op.GetMessage() != "not pinned: "+op.GetNotPinned()+"; pulled "+limit {
			t.Errorf("%v", op)
		}

		b.pull(&opsv1.PullRequest{Uid: "b", Image: "busybox", BytesPerSecond: 1 << 20})
		b.pull(&opsv1.PullRequest{Uid: "c", Image: "app"})
		for _, uid := range []string{"c", "b"} { // waiting, running
			op, err := NewServer(b.Puller).CancelPull(t.Context(),
				&opsv1.CancelPullRequest{Uid: uid, Reason: "the job was deleted", Code: opsv1.CancelCodeDeleted})
			if err != nil || op.GetCancelCode() != opsv1.CancelCodeDeleted || op.GetMessage() != "the job was deleted" || op.GetLimitNotKept() != "" {
				t.Errorf("%v, %v", op, err)
			}
		}
		b.restart()
		if op := b.want("b", cancelled, opsv1.PullReasonCancelled); op.GetCancelCode() != opsv1.CancelCodeDeleted {
			t.Errorf("%v", op)
		}
		if _, err := NewServer(b.Puller).CancelPull(t.Context(), &opsv1.CancelPullRequest{Uid: "b", Code: strings.Repeat("x", 65)}); err == nil {
			t.Error("a code of any length is taken")
		}
	})
}
