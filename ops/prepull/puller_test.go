// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package prepull

import (
	"errors"
	"io"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/sirupsen/logrus"
	"go.uber.org/goleak"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/types/known/durationpb"

	opsv1 "github.com/cri-proxy/cri-proxy/api/ops/v1"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

const (
	waiting   = opsv1.PullPhase_PULL_WAITING
	resolving = opsv1.PullPhase_PULL_RESOLVING
	succeeded = opsv1.PullPhase_PULL_SUCCEEDED
	failed    = opsv1.PullPhase_PULL_FAILED
	cancelled = opsv1.PullPhase_PULL_CANCELLED
)

func TestOneAfterTheOther(t *testing.T) {
	for _, parallel := range []int{0, 1, 3} {
		inBubble(t, Options{Parallel: parallel}, func(t *testing.T, b *bubble) {
			b.rt.takes = time.Minute
			began := time.Now()
			for i := range 6 {
				b.pull(&opsv1.PullRequest{Uid: name(i), Image: name(i)})
				time.Sleep(20 * time.Millisecond)
			}
			b.want(name(0), resolving, "")
			op := b.want(name(5), waiting, opsv1.PullReasonInQueue)
			if !strings.Contains(op.GetMessage(), "pulls at once are under way") {
				t.Errorf("%v", op)
			}
			var last time.Time
			for i := range 6 {
				end := b.end(name(i)).GetFinishTime().AsTime()
				if end.Before(last) {
					t.Errorf("%d has overtaken", i)
				}
				last = end
			}
			if b.rt.most != max(1, parallel) {
				t.Errorf("%d at once", b.rt.most)
			}
			want := 6 * time.Minute / time.Duration(max(1, parallel))
			if took := last.Sub(began); took < want || took > want+time.Second {
				t.Errorf("took %s", took)
			}
		})
	}
}

func TestEqualPullsJoin(t *testing.T) {
	inBubble(t, Options{Parallel: 4}, func(t *testing.T, b *bubble) {
		b.rt.takes = time.Minute
		for i := range 3 {
			b.pull(&opsv1.PullRequest{Uid: name(i), Image: "nginx"})
		}
		b.pull(&opsv1.PullRequest{Uid: "full", Image: "docker.io/library/nginx:latest"})
		b.pull(&opsv1.PullRequest{Uid: "handler", Image: "nginx", RuntimeHandler: "kata"})
		time.Sleep(time.Second)
		if op := b.want(name(1), resolving, ""); !strings.Contains(op.GetMessage(), "another pull of the image is under way: "+name(0)) {
			t.Errorf("%v", op)
		}
		for _, uid := range []string{name(0), name(1), name(2), "full", "handler"} {
			if op := b.end(uid); op.GetPhase() != succeeded {
				t.Errorf("%v", op)
			}
		}
		if n := b.rt.count(); n != 2 { // one for each handler
			t.Errorf("%d pulls", n)
		}
	})
}

func TestFollowerGoesOnWhenTheFirstIsCancelled(t *testing.T) {
	inBubble(t, Options{Parallel: 2}, func(t *testing.T, b *bubble) {
		b.rt.takes = time.Minute
		b.pull(&opsv1.PullRequest{Uid: "a", Image: "nginx"})
		b.pull(&opsv1.PullRequest{Uid: "b", Image: "nginx"})
		if _, _, err := b.cancel("a", "changed my mind", ""); err != nil {
			t.Fatal(err)
		}
		if op := b.want("a", cancelled, opsv1.PullReasonCancelled); op.GetMessage() != "changed my mind" {
			t.Errorf("%v", op)
		}
		if op := b.end("b"); op.GetPhase() != succeeded || b.rt.count() != 2 {
			t.Errorf("%d pulls, %v", b.rt.count(), op)
		}
	})
}

// A bug ends the pull that meets it, also in the next process, and none beside it.
func TestPanicEndsThePullOnly(t *testing.T) {
	inBubble(t, Options{}, func(t *testing.T, b *bubble) {
		b.rt.set(func() { b.rt.bug = true })
		b.pull(&opsv1.PullRequest{Uid: "a", Image: "nginx"})
		if op := b.end("a"); op.GetPhase() != opsv1.PullPhase_PULL_FAILED || op.GetReason() != opsv1.PullReasonInternalError || op.GetAttempt() != 1 {
			t.Errorf("ended %v", op)
		}
		b.rt.set(func() { b.rt.bug = false })
		b.pull(&opsv1.PullRequest{Uid: "b", Image: "nginx"})
		if op := b.end("b"); op.GetPhase() != opsv1.PullPhase_PULL_SUCCEEDED {
			t.Errorf("the next ended %v", op)
		}
	})
}

func TestBackOff(t *testing.T) {
	inBubble(t, Options{}, func(t *testing.T, b *bubble) {
		b.rt.fail = []error{broken()}
		began := time.Now()
		b.pull(&opsv1.PullRequest{Uid: "a", Image: "nginx"})
		op := b.want("a", waiting, opsv1.PullReasonBackOff)
		if !strings.HasPrefix(op.GetMessage(), "attempt 2 of 4 in 1s: RegistryUnavailable: registry docker.io cannot be used now") {
			t.Errorf("%v", op)
		}
		op = b.end("a")
		if op.GetPhase() != failed || op.GetReason() != opsv1.PullReasonRegistryUnavailable || op.GetAttempt() != 4 || !strings.HasSuffix(op.GetMessage(), "4 attempts") {
			t.Errorf("%v", op)
		}
		if took := time.Since(began).Round(100 * time.Millisecond); took != 7*time.Second { // 1 + 2 + 4
			t.Errorf("took %s", took)
		}
		// The wait has an upper bound.
		began = time.Now()
		b.pull(&opsv1.PullRequest{Uid: "b", Image: "nginx", MaxAttempts: 8})
		b.end("b")
		if took := time.Since(began).Round(time.Second); took != (1+2+4+8+16+30+30)*time.Second {
			t.Errorf("took %s", took)
		}
	})
}

// TestBackOffIsOfTheImage has several pulls of one image whose registry is in trouble.
func TestBackOffIsOfTheImage(t *testing.T) {
	inBubble(t, Options{Parallel: 4}, func(t *testing.T, b *bubble) {
		b.rt.fail = []error{broken(), broken(), nil}
		for i := range 5 {
			b.pull(&opsv1.PullRequest{Uid: name(i), Image: "nginx"})
		}
		b.pull(&opsv1.PullRequest{Uid: "other", Image: "busybox", MaxAttempts: 1})
		time.Sleep(100 * time.Millisecond)
		if n := b.rt.count(); n != 2 {
			t.Errorf("%d pulls at once of a registry in trouble", n)
		}
		b.want(name(0), waiting, opsv1.PullReasonBackOff)
		b.want(name(4), waiting, opsv1.PullReasonBackOff)
		for i := range 5 {
			if op := b.end(name(i)); op.GetPhase() != succeeded {
				t.Errorf("%v", op)
			}
		}
	})
}

// What went wrong with a pull keeps others of the image waiting only if the registry caused it, and an upgrade only if that asked for it.
func TestBackOffOfOthers(t *testing.T) {
	for reason, tt := range map[string]struct {
		err          error
		job, upgrade bool // whether it waits
	}{
		opsv1.PullReasonTooManyRequests:     {&failure{reason: opsv1.PullReasonTooManyRequests, message: "slow down"}, true, true},
		opsv1.PullReasonRegistryUnavailable: {broken(), true, false},
		opsv1.PullReasonTimeout:             {status.Error(codes.DeadlineExceeded, "late"), true, false},
		opsv1.PullReasonDiskPressure:        {status.Error(codes.Unknown, "no space left on device"), false, false},
		opsv1.PullReasonRuntimeError:        {status.Error(codes.Unknown, "strange"), false, false},
		opsv1.PullReasonUnauthorized:        {unauthorized(), false, false},
	} {
		t.Run(reason, func(t *testing.T) {
			for _, urgent := range []bool{false, true} {
				inBubble(t, Options{}, func(t *testing.T, b *bubble) {
					b.rt.fail = []error{tt.err, nil}
					b.pull(&opsv1.PullRequest{Uid: "first", Image: "nginx"})
					b.want("first", waiting, opsv1.PullReasonBackOff)
					waits := tt.job
					if urgent {
						waits = tt.upgrade
						if _, err := b.take(&opsv1.PullRequest{Uid: "second", Image: "nginx"}, true); err != nil {
							t.Fatal(err)
						}
					} else {
						b.pull(&opsv1.PullRequest{Uid: "second", Image: "nginx"})
					}
					synctest.Wait()
					if waits {
						b.want("second", waiting, opsv1.PullReasonBackOff)
					} else {
						b.want("second", succeeded, opsv1.PullReasonPulled)
					}
					for _, uid := range []string{"first", "second"} {
						if op := b.end(uid); op.GetPhase() != succeeded {
							t.Errorf("%v", op)
						}
					}
				})
			}
		})
	}
}

// TestRegistrySaysNo asks again, since an image or its secret may come a moment later. Who has somebody to tell is told at once.
func TestRegistrySaysNo(t *testing.T) {
	for reason, err := range map[string]error{opsv1.PullReasonUnauthorized: unauthorized(), opsv1.PullReasonNotFound: status.Error(codes.NotFound, "not found")} {
		inBubble(t, Options{}, func(t *testing.T, b *bubble) {
			b.rt.set(func() { b.rt.fail = []error{err} })
			began := time.Now()
			b.pull(&opsv1.PullRequest{Uid: "a", Image: "nginx", MaxAttempts: 3, Credentials: credentials("docker.io", "docker.io/library", "quay.io")})
			if op := b.want("a", waiting, opsv1.PullReasonBackOff); !strings.HasPrefix(op.GetMessage(), "attempt 2 of 3 in 1s: "+reason+": registry docker.io ") {
				t.Errorf("%v", op)
			}
			if len(b.rt.pulls) != 2 || b.rt.pulls[0].GetAuth().GetUsername() != "docker.io/library" {
				t.Errorf("%d pulls, the first with %s", len(b.rt.pulls), b.rt.pulls[0].GetAuth().GetUsername())
			}
			if op := b.end("a"); op.GetReason() != reason || op.GetAttempt() != 3 || time.Since(began).Round(time.Second) != 3*time.Second {
				t.Errorf("%s: %v", time.Since(began), op)
			}
			began = time.Now()
			if op, err := b.Ensure(t.Context(), &opsv1.PullRequest{Uid: "b", Image: "nginx"}, nil); err != nil || op.GetReason() != reason || op.GetAttempt() != 1 || time.Since(began) > time.Second {
				t.Errorf("%s: %v, %v", time.Since(began), op, err)
			}
		})
	}
	t.Run("image comes", func(t *testing.T) {
		inBubble(t, Options{}, func(t *testing.T, b *bubble) {
			b.rt.set(func() { b.rt.fail = []error{status.Error(codes.NotFound, "not found")} })
			b.pull(&opsv1.PullRequest{Uid: "a", Image: "nginx"})
			time.Sleep(2 * time.Second)
			b.rt.set(func() { b.rt.fail = nil })
			if op := b.end("a"); op.GetPhase() != succeeded || op.GetAttempt() != 3 {
				t.Errorf("%v", op)
			}
		})
	})
	t.Run("deadline", func(t *testing.T) {
		inBubble(t, Options{}, func(t *testing.T, b *bubble) {
			b.rt.set(func() { b.rt.fail = []error{unauthorized()} })
			b.pull(&opsv1.PullRequest{Uid: "a", Image: "nginx", MaxAttempts: 100, Deadline: durationpb.New(time.Minute)})
			op := b.end("a")
			if op.GetReason() != opsv1.PullReasonDeadlineExceeded || !strings.Contains(op.GetMessage(), opsv1.PullReasonUnauthorized) || op.GetFinishTime().AsTime().Sub(op.GetCreateTime().AsTime()).Round(time.Second) != time.Minute {
				t.Errorf("%v", op)
			}
		})
	})
}

// TestOtherCredentials come while a pull waits that the registry has said no to, or while it asks: it asks again at once.
func TestOtherCredentials(t *testing.T) {
	again := func(b *bubble, c []*opsv1.RegistryCredential) {
		b.pull(&opsv1.PullRequest{Uid: "a", Image: "nginx", MaxAttempts: 2, Credentials: c})
	}
	t.Run("waiting", func(t *testing.T) {
		inBubble(t, Options{}, func(t *testing.T, b *bubble) {
			b.rt.set(func() { b.rt.fail = []error{unauthorized(), nil} })
			again(b, nil)
			b.want("a", waiting, opsv1.PullReasonBackOff)
			again(b, credentials("docker.io"))
			if op := b.want("a", succeeded, opsv1.PullReasonPulled); op.GetAttempt() != 2 || b.rt.pulls[1].GetAuth().GetUsername() != "docker.io" {
				t.Errorf("%v", op)
			}
		})
	})
	t.Run("the same again", func(t *testing.T) {
		inBubble(t, Options{}, func(t *testing.T, b *bubble) {
			b.rt.set(func() { b.rt.fail = []error{unauthorized()} })
			again(b, credentials("docker.io"))
			again(b, credentials("docker.io"))
			b.want("a", waiting, opsv1.PullReasonBackOff)
			if n := b.rt.count(); n != 1 {
				t.Errorf("%d pulls", n)
			}
		})
	})
	t.Run("registry in trouble", func(t *testing.T) {
		inBubble(t, Options{}, func(t *testing.T, b *bubble) {
			b.rt.set(func() { b.rt.fail = []error{broken(), nil} })
			again(b, nil)
			again(b, credentials("docker.io"))
			b.want("a", waiting, opsv1.PullReasonBackOff)
		})
	})
	t.Run("during the last attempt", func(t *testing.T) {
		inBubble(t, Options{}, func(t *testing.T, b *bubble) {
			b.rt.set(func() { b.rt.late, b.rt.takes = unauthorized(), time.Minute })
			again(b, nil)
			time.Sleep(90 * time.Second) // in the second attempt
			again(b, credentials("docker.io"))
			b.rt.set(func() { b.rt.late = nil })
			if op := b.end("a"); op.GetPhase() != succeeded || op.GetAttempt() != 2 || b.rt.count() != 3 {
				t.Errorf("%d pulls, %v", b.rt.count(), op)
			}
		})
	})
	t.Run("of another pull", func(t *testing.T) {
		inBubble(t, Options{}, func(t *testing.T, b *bubble) {
			b.rt.set(func() { b.rt.fail = []error{unauthorized(), nil} })
			again(b, nil)
			b.want("a", waiting, opsv1.PullReasonBackOff)
			b.pull(&opsv1.PullRequest{Uid: "b", Image: "nginx", Credentials: credentials("docker.io")})
			b.want("b", succeeded, opsv1.PullReasonPulled)
		})
	})
}

func TestTimes(t *testing.T) {
	t.Run("attempt", func(t *testing.T) {
		inBubble(t, Options{}, func(t *testing.T, b *bubble) {
			b.rt.takes = time.Hour
			began := time.Now()
			b.pull(&opsv1.PullRequest{Uid: "a", Image: "nginx", MaxAttempts: 2, AttemptTimeout: durationpb.New(5 * time.Minute)})
			op := b.end("a")
			if op.GetPhase() != failed || op.GetReason() != opsv1.PullReasonTimeout || time.Since(began).Round(time.Second) != 10*time.Minute+time.Second {
				t.Errorf("%s: %v", time.Since(began), op)
			}
		})
	})
	t.Run("default", func(t *testing.T) {
		inBubble(t, Options{}, func(t *testing.T, b *bubble) {
			b.rt.takes = time.Hour
			began := time.Now()
			b.pull(&opsv1.PullRequest{Uid: "a", Image: "nginx", MaxAttempts: 1})
			b.end("a")
			if time.Since(began).Round(time.Second) != opsv1.DefaultAttemptTimeout {
				t.Errorf("%s", time.Since(began))
			}
		})
	})
	t.Run("deadline while it runs", func(t *testing.T) {
		inBubble(t, Options{}, func(t *testing.T, b *bubble) {
			b.rt.takes = time.Hour
			began := time.Now()
			b.pull(&opsv1.PullRequest{Uid: "a", Image: "nginx", Deadline: durationpb.New(time.Minute)})
			if op := b.end("a"); op.GetReason() != opsv1.PullReasonDeadlineExceeded || time.Since(began).Round(time.Second) != time.Minute {
				t.Errorf("%s: %v", time.Since(began), op)
			}
		})
	})
	t.Run("deadline in the queue", func(t *testing.T) {
		inBubble(t, Options{}, func(t *testing.T, b *bubble) {
			b.rt.takes = 5 * time.Minute
			b.pull(&opsv1.PullRequest{Uid: "long", Image: "busybox"})
			b.pull(&opsv1.PullRequest{Uid: "a", Image: "nginx", Deadline: durationpb.New(time.Minute)})
			op := b.end("a")
			if op.GetReason() != opsv1.PullReasonDeadlineExceeded || op.GetAttempt() != 0 || op.GetFinishTime().AsTime().Sub(op.GetCreateTime().AsTime()).Round(time.Second) != time.Minute {
				t.Errorf("%v", op)
			}
		})
	})
	t.Run("deadline is kept over a restart", func(t *testing.T) {
		inBubble(t, Options{}, func(t *testing.T, b *bubble) {
			b.rt.takes = time.Hour
			began := time.Now()
			b.pull(&opsv1.PullRequest{Uid: "a", Image: "nginx", Deadline: durationpb.New(time.Minute)})
			time.Sleep(30 * time.Second)
			b.restart()
			if op := b.end("a"); op.GetReason() != opsv1.PullReasonDeadlineExceeded || time.Since(began).Round(time.Second) != time.Minute {
				t.Errorf("%s: %v", time.Since(began), op)
			}
		})
	})
}

// TestCancelWhileGivingWay cancels a pull whose attempt is just being ended for kubelet: the end must be for good.
func TestCancelWhileGivingWay(t *testing.T) {
	inBubble(t, Options{}, func(t *testing.T, b *bubble) {
		b.rt.takes = time.Minute
		b.pull(&opsv1.PullRequest{Uid: "a", Image: "nginx"})
		b.mu.Lock()
		b.pulls["a"].stop(errYield)
		b.mu.Unlock()
		if _, _, err := b.cancel("a", "enough", ""); err != nil {
			t.Fatal(err)
		}
		if op := b.want("a", cancelled, opsv1.PullReasonCancelled); op.GetMessage() != "enough" {
			t.Errorf("%v", op)
		}
	})
}

func TestCancel(t *testing.T) {
	inBubble(t, Options{}, func(t *testing.T, b *bubble) {
		b.rt.takes = time.Minute
		s := NewServer(b.Puller)
		for i := range 2 {
			b.pull(&opsv1.PullRequest{Uid: name(i), Image: name(i)})
		}
		for _, i := range []int{1, 0} { // waiting, running
			op, err := s.CancelPull(t.Context(), &opsv1.CancelPullRequest{Uid: name(i)})
			if err != nil || op.GetPhase() != cancelled || op.GetMessage() != "cancelled" {
				t.Errorf("%v, %v", op, err)
			}
			again, err := s.CancelPull(t.Context(), &opsv1.CancelPullRequest{Uid: name(i), Reason: "again"})
			if err != nil || again.GetMessage() != "cancelled" {
				t.Errorf("%v, %v", again, err)
			}
		}
		if _, err := s.CancelPull(t.Context(), &opsv1.CancelPullRequest{Uid: "none"}); status.Code(err) != codes.NotFound {
			t.Error(err)
		}
		b.restart()
		b.want(name(0), cancelled, opsv1.PullReasonCancelled)
	})
}

func TestRestart(t *testing.T) {
	inBubble(t, Options{}, func(t *testing.T, b *bubble) {
		b.rt.takes = time.Minute
		b.rt.images["docker.io/library/there:latest"] = true
		b.pull(&opsv1.PullRequest{Uid: "done", Image: "there"})
		b.want("done", succeeded, opsv1.PullReasonPresent)
		b.pull(&opsv1.PullRequest{Uid: "plain", Image: "nginx"})
		secret := &opsv1.PullRequest{Uid: "secret", Image: "busybox", Credentials: []*opsv1.RegistryCredential{{Match: "docker.io", Username: "u", Password: "hunter2"}}}
		b.pull(secret)
		b.pull(&opsv1.PullRequest{Uid: "late", Image: "app"})
		b.pull(&opsv1.PullRequest{Uid: "late", Image: "app", Credentials: secret.GetCredentials()})
		b.restart()
		b.want("done", succeeded, opsv1.PullReasonPresent)
		b.want("plain", resolving, "")
		b.want("secret", waiting, opsv1.PullReasonCredentialsNeeded)
		b.want("late", waiting, opsv1.PullReasonCredentialsNeeded)
		raw, err := os.ReadFile(filepath.Join(b.dir, "pulls.db"))
		if err != nil || strings.Contains(string(raw), "hunter2") {
			t.Errorf("%v: a password is in the journal", err)
		}
		// Without credentials it is still the same request.
		b.pull(&opsv1.PullRequest{Uid: "secret", Image: "busybox"})
		b.want("secret", waiting, opsv1.PullReasonCredentialsNeeded)
		b.pull(secret)
		if op := b.end("secret"); op.GetPhase() != succeeded {
			t.Errorf("%v", op)
		}
		if last := b.rt.pulls[len(b.rt.pulls)-1]; last.GetAuth().GetPassword() != "hunter2" {
			t.Errorf("pulled without credentials: %v", last.GetImage())
		}
		b.pull(&opsv1.PullRequest{Uid: "late", Image: "app", Credentials: secret.GetCredentials()})
		b.end("late")
		if _, err := b.submit(&opsv1.PullRequest{Uid: "done", Image: "other"}); status.Code(err) != codes.AlreadyExists {
			t.Error(err)
		}
	})
}

func TestCredentialsDoNotCome(t *testing.T) {
	inBubble(t, Options{}, func(t *testing.T, b *bubble) {
		b.rt.takes = time.Minute
		b.pull(&opsv1.PullRequest{Uid: "a", Image: "nginx", Credentials: credentials("docker.io")})
		b.restart()
		time.Sleep(credentialsPatience - time.Minute)
		b.want("a", waiting, opsv1.PullReasonCredentialsNeeded)
		if op := b.end("a"); op.GetPhase() != failed || op.GetReason() != opsv1.PullReasonCredentialsNeeded {
			t.Errorf("%v", op)
		}
	})
}

func TestExpiry(t *testing.T) {
	inBubble(t, Options{}, func(t *testing.T, b *bubble) {
		b.pull(&opsv1.PullRequest{Uid: "a", Image: "nginx"})
		b.want("a", succeeded, opsv1.PullReasonPulled)
		time.Sleep(keepFinished + 2*sweepEvery)
		if _, err := NewServer(b.Puller).GetPull(t.Context(), &opsv1.GetPullRequest{Uid: "a"}); status.Code(err) != codes.NotFound {
			t.Error(err)
		}
		b.restart()
		if n := len(b.list(false)); n != 0 {
			t.Errorf("%d pulls", n)
		}
	})
}

func TestTooMany(t *testing.T) {
	inBubble(t, Options{}, func(t *testing.T, b *bubble) {
		b.rt.takes = time.Hour
		for i := range maxActive {
			if _, err := b.submit(&opsv1.PullRequest{Uid: name(i), Image: name(i)}); err != nil {
				t.Fatal(err)
			}
		}
		if _, err := b.submit(&opsv1.PullRequest{Uid: "more", Image: "nginx"}); status.Code(err) != codes.ResourceExhausted {
			t.Error(err)
		}
		synctest.Wait()
	})
}

func TestInvalid(t *testing.T) {
	inBubble(t, Options{}, func(t *testing.T, b *bubble) {
		long := durationpb.New(32 * 24 * time.Hour)
		for want, req := range map[string]*opsv1.PullRequest{
			"uid must be":        {Uid: "a b", Image: "nginx"},
			"image is empty":     {Uid: "a"},
			"invalid reference":  {Uid: "a", Image: "A"},
			"unknown policy":     {Uid: "a", Image: "nginx", Policy: 7},
			"max_attempts":       {Uid: "a", Image: "nginx", MaxAttempts: -1},
			"bytes_per_second":   {Uid: "a", Image: "nginx", BytesPerSecond: -1},
			"pin_for":            {Uid: "a", Image: "nginx", PinFor: long},
			"deadline":           {Uid: "a", Image: "nginx", Deadline: durationpb.New(-1)},
			"attempt_timeout":    {Uid: "a", Image: "nginx", AttemptTimeout: long},
			"owner":              {Uid: "a", Image: "nginx", Owner: strings.Repeat("o", 2000)},
			"a credential is":    {Uid: "a", Image: "nginx", Credentials: []*opsv1.RegistryCredential{{Password: strings.Repeat("x", 70<<10)}}},
			"credentials are to": {Uid: "a", Image: "nginx", Credentials: make([]*opsv1.RegistryCredential, 300)},
		} {
			_, err := NewServer(b.Puller).Pull(t.Context(), req)
			if status.Code(err) != codes.InvalidArgument || !strings.Contains(err.Error(), want) {
				t.Errorf("%s: %v", want, err)
			}
			if err != nil && strings.Contains(err.Error(), "xxx") {
				t.Errorf("a password is told: %v", err)
			}
		}
	})
}

func TestMetrics(t *testing.T) {
	reg := prometheus.NewRegistry()
	inBubble(t, Options{Registerer: reg}, func(t *testing.T, b *bubble) {
		b.pull(&opsv1.PullRequest{Uid: "a", Image: "nginx"})
		b.rt.set(func() { b.rt.fail = []error{unauthorized()} })
		b.pull(&opsv1.PullRequest{Uid: "b", Image: "busybox", MaxAttempts: 1})
		b.want("b", failed, opsv1.PullReasonUnauthorized)
		families, err := reg.Gather()
		if err != nil {
			t.Fatal(err)
		}
		got := map[string]float64{}
		for _, f := range families {
			for _, m := range f.GetMetric() {
				name := f.GetName()
				for _, l := range m.GetLabel() {
					name += "," + l.GetValue()
				}
				got[name] = m.GetCounter().GetValue()
			}
		}
		if got["criproxy_pulls_total,Pulled,succeeded"] != 1 || got["criproxy_pulls_total,Unauthorized,failed"] != 1 {
			t.Errorf("%v", got)
		}
	})
}

// TestDamagedFile begins anew with a file that is none, at every kind of damage.
func TestDamagedFile(t *testing.T) {
	whole := func(t *testing.T) []byte {
		var raw []byte
		inBubble(t, Options{}, func(t *testing.T, b *bubble) {
			b.pull(&opsv1.PullRequest{Uid: "a", Image: "nginx"})
			b.want("a", succeeded, opsv1.PullReasonPulled)
			b.over()
			var err error
			if raw, err = os.ReadFile(filepath.Join(b.dir, "pulls.db")); err != nil {
				t.Fatal(err)
			}
		})
		return raw
	}(t)
	for name, damage := range map[string]func(b []byte) []byte{
		"empty":          func([]byte) []byte { return nil },
		"text":           func([]byte) []byte { return []byte(strings.Repeat("no database ", 10000)) },
		"zeros":          func(b []byte) []byte { return make([]byte, len(b)) },
		"cut in half":    func(b []byte) []byte { return b[:len(b)/2] },
		"cut after meta": func(b []byte) []byte { return b[:2*4096] },
		"first half of zeros": func(b []byte) []byte {
			clear(b[:len(b)/2])
			return b
		},
		"data of zeros": func(b []byte) []byte {
			clear(b[2*4096:])
			return b
		},
		"data of noise": func(b []byte) []byte {
			for i := 2 * 4096; i < len(b); i++ {
				b[i] = byte(i * 7)
			}
			return b
		},
	} {
		t.Run(name, func(t *testing.T) {
			dir := t.TempDir()
			if err := os.WriteFile(filepath.Join(dir, "pulls.db"), damage(append([]byte(nil), whole...)), 0o600); err != nil {
				t.Fatal(err)
			}
			log := logrus.New()
			log.SetOutput(io.Discard)
			for range 2 { // what the first start makes of it is good for the second
				p, err := Open(Options{StateDir: dir, Conn: &fakeRuntime{images: map[string]bool{}}, Log: log})
				if err != nil {
					t.Fatal(err)
				}
				if _, err := p.submit(&opsv1.PullRequest{Uid: "b", Image: "busybox"}); err != nil {
					t.Errorf("pulls are refused: %v", err)
				}
				if err := p.Close(); err != nil {
					t.Error(err)
				}
			}
		})
	}
}

func TestFileInUse(t *testing.T) {
	if testing.Short() {
		t.Skip("waits for a lock")
	}
	inBubble(t, Options{}, func(t *testing.T, b *bubble) {
		if _, err := Open(b.opts); err == nil || errors.Is(err, os.ErrNotExist) {
			t.Error(err)
		}
	})
}

// A pull that the process does not survive is not begun for ever.
func TestAttemptsThatEndTheProcess(t *testing.T) {
	inBubble(t, Options{}, func(t *testing.T, b *bubble) {
		b.rt.takes = time.Minute
		path := filepath.Join(b.dir, "pulls.db")
		kill := func() {
			t.Helper()
			left, err := os.ReadFile(path) // what a process that is killed leaves
			if err != nil {
				t.Fatal(err)
			}
			b.over()
			if err := os.WriteFile(path, left, 0o600); err != nil {
				t.Fatal(err)
			}
			b.open()
		}
		b.pull(&opsv1.PullRequest{Uid: "a", Image: "nginx", MaxAttempts: 2})
		for range 5 { // in order
			b.restart()
			if op := b.want("a", resolving, ""); op.GetAttempt() != 1 {
				t.Errorf("%v", op)
			}
		}
		kill()
		if op := b.want("a", resolving, ""); op.GetAttempt() != 2 {
			t.Errorf("%v", op)
		}
		kill()
		if op := b.want("a", failed, opsv1.PullReasonInternalError); !strings.Contains(op.GetMessage(), "in the middle of attempt 2 of 2") {
			t.Errorf("%v", op)
		}
		if n := b.rt.count(); n != 7 {
			t.Errorf("%d pulls", n)
		}
	})
}
