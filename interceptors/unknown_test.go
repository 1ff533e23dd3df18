// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package interceptors_test

import (
	"context"
	"testing"
	"testing/synctest"
	"time"

	"github.com/cri-proxy/cri-proxy/interceptors/view"
)

// What kubelet may call in years to come, or called years ago.
const methodListNew = "/runtime.v1.RuntimeService/ListContainersByPod"

// pass begins a call of a method that is not known. passed is closed when it may be forwarded, and
// then answered ends it.
type unknownCall struct {
	passed chan struct{}
	done   func()
	ok     bool
	cut    bool
}

func (b *bed) unknown(ctx context.Context, method string) *unknownCall {
	c := &unknownCall{passed: make(chan struct{})}
	go func() { // ends with ctx or what it waits for, which every test brings about
		c.done, c.ok = b.director.PassUnknown(ctx, method, func() { c.cut = true })
		close(c.passed)
	}()
	return c
}

func (c *unknownCall) waits() bool {
	synctest.Wait()
	select {
	case <-c.passed:
		return false
	default:
		return true
	}
}

func (c *unknownCall) answered() {
	if c.done != nil {
		c.done()
	}
}

func TestUnknownMethodsByName(t *testing.T) {
	for method, tells := range map[string]bool{
		methodListNew:                                     true,
		"/runtime.v1.RuntimeService/ListPods":             true,
		"/runtime.v1.RuntimeService/PodStats":             true,
		"/runtime.v1.RuntimeService/PodMetrics":           true,
		"/runtime.v1.RuntimeService/StreamPods":           true,
		"/runtime.v1.RuntimeService/GetPodEvents":         true,
		"/runtime.v1.RuntimeService/CheckpointPod":        true,
		"/runtime.v1.RuntimeService/ContainerStatuses":    true,
		"/runtime.v1alpha2.RuntimeService/ListContainers": true,
		"/runtime.v2.RuntimeService/ContainerStatus":      true,
		"/runtime.v1.RuntimeService/UpdatePod":            false,
		"/runtime.v1.RuntimeService/StopPods":             false,
		"/runtime.v1.RuntimeService/RemovePods":           false,
		"/runtime.v1.RuntimeService/RuntimeFeatures":      false,
		"/runtime.v1.ImageService/ListImagesByAge":        false,
		"/example.v9.AlienService/ListContainers":         false,
		"nothing": false,
	} {
		t.Run(method, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				b := newBed(t)
				claim := b.swapping()
				c := b.unknown(t.Context(), method)
				if c.waits() != tells {
					t.Errorf("waits while a container is hidden: %t", !tells)
				}
				claim.Release()
				if c.waits() || !c.ok {
					t.Error("waits though nothing is hidden any more")
				}
				c.answered()
			})
		})
	}
}

// An answer that is under way may show what is hidden meanwhile: it is waited for, and in the end
// cut.
func TestHideWaitsForUnknownMethods(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b := newBed(t)
		c := b.unknown(t.Context(), methodListNew)
		if c.waits() {
			t.Fatal("waits though nothing is hidden")
		}
		claim := b.claimed()
		defer claim.Release()
		hidden := later(func() error { return claim.Hide(t.Context(), token) })
		synctest.Wait()
		pending(t, "Hide", hidden)
		c.answered()
		if err := <-hidden; err != nil {
			t.Error(err)
		}
		if c.cut {
			t.Error("the call was cut")
		}
	})
	t.Run("without an end", func(t *testing.T) {
		synctest.Test(t, func(t *testing.T) {
			b := newBed(t)
			c := b.unknown(t.Context(), "/runtime.v1.RuntimeService/GetPodEvents")
			c.waits()
			claim := b.claimed()
			ctx, cancel := context.WithTimeout(t.Context(), 10*time.Second)
			defer cancel()
			if err := claim.Hide(ctx, token); err != nil {
				t.Errorf("an event stream keeps operations from beginning: %v", err)
			}
			if !c.cut {
				t.Error("the stream was not cut")
			}
			again := b.unknown(t.Context(), "/runtime.v1.RuntimeService/GetPodEvents")
			if !again.waits() {
				t.Error("the next stream passes though a container is hidden")
			}
			c.answered() // once more is nothing
			claim.Release()
			if again.waits() {
				t.Error("the next stream waits though nothing is hidden any more")
			}
			again.answered()
			if other := b.claimed(); other.Hide(t.Context(), token) != nil {
				t.Error("something is still waited for")
			} else {
				other.Release()
			}
		})
	})
}

// A checkpoint is of what there was when it began, and may take long: it is not waited for.
func TestCheckpointOfANewKindIsNotWaitedFor(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b := newBed(t)
		c := b.unknown(t.Context(), "/runtime.v1.RuntimeService/CheckpointPod")
		c.waits()
		claim := b.claimed()
		defer claim.Release()
		if err := claim.Hide(t.Context(), token); err != nil || c.cut {
			t.Errorf("%v, cut: %t", err, c.cut)
		}
		c.answered()
	})
}

// What an earlier process has left is hidden before a list of a new kind is asked for.
func TestUnknownMethodsWaitForTheJudge(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		found := make(chan struct{})
		var b *bed
		b = newJudgedBed(t, judgeFunc(func(context.Context) error {
			<-found
			b.view.Judged()
			return nil
		}))
		b.view.Guard()
		c, other := b.unknown(t.Context(), methodListNew),
			b.unknown(t.Context(), "/runtime.v1.RuntimeService/OpenSomething")
		if !c.waits() || other.waits() {
			t.Error("a list of a new kind does not wait for the judge, or something else does")
		}
		stray := b.view.Stray(slot, sandbox, token, successor, "")
		close(found)
		if !c.waits() {
			t.Error("passes though a container is hidden")
		}
		stray.Discard()
		if c.waits() {
			t.Error("waits though nothing is hidden any more")
		}
		c.answered()
	})
}

func TestUnknownMethodsWaitWithinBounds(t *testing.T) {
	t.Run("while an upgrade is held ready", func(t *testing.T) {
		synctest.Test(t, func(t *testing.T) {
			b := newBed(t)
			claim := b.swapping()
			defer claim.Release()
			began := time.Now()
			ctx, cancel := context.WithTimeout(t.Context(), 2*time.Minute) // kubelet's
			defer cancel()
			c := b.unknown(ctx, methodListNew)
			<-c.passed
			if waited := time.Since(began); waited >= 2*time.Minute || !c.ok {
				t.Errorf("kubelet's deadline has passed: %s", waited)
			}
			// The next operation waits for it like for any other.
			other, err := b.view.TryClaim(view.Slot{PodUID: "uid-1", Container: "web"})
			if err != nil {
				t.Fatal(err)
			}
			defer other.Release()
			hidden := later(func() error { return other.Hide(t.Context(), "other") })
			synctest.Wait()
			pending(t, "Hide", hidden)
			c.answered()
			if err := <-hidden; err != nil {
				t.Error(err)
			}
		})
	})
	t.Run("until the caller gives up", func(t *testing.T) {
		synctest.Test(t, func(t *testing.T) {
			b := newBed(t)
			claim := b.swapping()
			defer claim.Release()
			ctx, cancel := context.WithCancel(t.Context())
			c := b.unknown(ctx, methodListNew)
			if !c.waits() {
				t.Error("passes though a container is hidden")
			}
			cancel()
			if c.waits() {
				t.Error("waits for nobody")
			}
			c.answered()
		})
	})
	t.Run("until another process has the view", func(t *testing.T) {
		synctest.Test(t, func(t *testing.T) {
			b := newBed(t)
			claim := b.swapping()
			defer claim.Release()
			c := b.unknown(t.Context(), methodListNew)
			c.waits()
			b.view.Carry()
			if c.waits() || c.ok {
				t.Error("does not turn to who has the view now")
			}
		})
	})
}
