// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package kubeletdriver_test

import (
	"context"
	"errors"
	"io"
	"testing"
	"testing/synctest"
	"time"

	"github.com/sirupsen/logrus"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/cri-proxy/cri-proxy/ops/kubeletdriver"
)

// The last answer of an operation gets to kubelet, however fast the operation ends after it.
func TestLastAnswerIsNotLost(t *testing.T) {
	for range 50 {
		u := kubeletdriver.NewUpgrade(nil)
		u.Listen()
		done := make(chan struct{})
		go func() {
			defer close(done)
			c := <-u.Creates()
			c.Adopt("new")
			u.End()
		}()
		if id, ok := u.Create(t.Context(), &runtimeapi.CreateContainerRequest{}); id != "new" || !ok {
			t.Fatalf("got %q, %v", id, ok)
		}
		<-done
	}
	for range 50 {
		u := kubeletdriver.NewUpgrade(nil)
		u.Listen()
		done := make(chan struct{})
		go func() {
			defer close(done)
			s := <-u.Stops()
			s.Answer(true)
			u.End()
		}()
		if ok, err := u.Stop(t.Context(), 30); !ok || err != nil {
			t.Fatalf("got %v, %v", ok, err)
		}
		<-done
	}
}

// Before it listens, and once the upgrade has ended, nobody waits.
func TestUpgradeGivesWay(t *testing.T) {
	u := kubeletdriver.NewUpgrade(nil)
	if ok, err := u.Stop(t.Context(), 30); ok || err != nil {
		t.Errorf("a stop before: %t, %v", ok, err)
	}
	if id, ok := u.Create(t.Context(), nil); id != "" || ok {
		t.Errorf("a creation before: %q, %t", id, ok)
	}
	u.Listen()
	cut, cancel := context.WithCancel(t.Context())
	cancel()
	if ok, err := u.Stop(cut, 30); !ok || !errors.Is(err, context.Canceled) {
		t.Errorf("a stop that is cut off: %t, %v", ok, err)
	}
	u.End()
	if ok, err := u.Stop(t.Context(), 30); ok || err != nil {
		t.Errorf("a stop after: %t, %v", ok, err)
	}
	if id, ok := u.Create(t.Context(), nil); id != "" || !ok {
		t.Errorf("a creation after: %q, %t", id, ok)
	}
}

// restart returns a driver of a restart that refuses for that reason, and what it has shortened to.
func restart(refusal string) (r *kubeletdriver.Restart, shortened *[]time.Duration) {
	log := logrus.New()
	log.SetOutput(io.Discard)
	shortened = new([]time.Duration)
	return kubeletdriver.NewRestart(kubeletdriver.RestartOptions{
		Refusal: func(context.Context) string { return refusal },
		Joined:  func() {},
		Shorten: func(_ context.Context, grace time.Duration) { *shortened = append(*shortened, grace) },
		Log:     log,
	}), shortened
}

// A stop of kubelet's is answered when the successor is shown, or the restart ends.
func TestStopJoinsARestart(t *testing.T) {
	for name, tc := range map[string]struct {
		refusal string
		end     func(*kubeletdriver.Restart)
		done    bool
		code    codes.Code
	}{
		"refused": {refusal: "the pod is being deleted"},
		"shown":   {end: func(r *kubeletdriver.Restart) { r.Show(false) }, done: true},
		"failed":  {end: func(r *kubeletdriver.Restart) { r.End(false) }},
		"left":    {end: func(r *kubeletdriver.Restart) { r.End(true) }, done: true, code: codes.Unavailable},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				r, shortened := restart(tc.refusal)
				if done, err := r.Stop(t.Context(), 3); done || err != nil {
					t.Errorf("before it listens: %t, %v", done, err)
				}
				r.Listen(time.Now().Add(30 * time.Second))
				ended := false
				go func() {
					if done, err := r.Stop(t.Context(), 3); done != tc.done || status.Code(err) != tc.code {
						t.Errorf("answered %t, %v", done, err)
					}
					ended = true
				}()
				synctest.Wait()
				if tc.end == nil {
					if !ended || len(*shortened) > 0 || r.Show(false) {
						t.Errorf("a stop that is refused waits, or joins: %t, %v", ended, *shortened)
					}
					return
				}
				if ended || len(*shortened) != 1 {
					t.Errorf("answered: %t; shortened to %v", ended, *shortened)
				}
				select {
				case <-r.Shortened():
				default:
					t.Error("nobody is told of the shorter grace")
				}
				tc.end(r)
				synctest.Wait()
				if !ended {
					t.Error("no answer")
				}
			})
		})
	}
}

// Only a creation that follows a stop which has joined gets to the restart.
func TestCreationAfterAStop(t *testing.T) {
	r, _ := restart("")
	if id, ok := r.Create(t.Context(), nil); id != "" || !ok {
		t.Errorf("without a stop: %q, %t", id, ok)
	}
	r.SetJoined()
	if !r.Show(false) || !r.IsShown() {
		t.Error("the stop that has joined is forgotten")
	}
	done := make(chan struct{})
	go func() {
		defer close(done)
		c := <-r.Creates()
		c.Adopt("new")
	}()
	if id, ok := r.Create(t.Context(), nil); id != "new" || !ok {
		t.Errorf("got %q, %t", id, ok)
	}
	<-done
}
