// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package interceptors_test

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"google.golang.org/protobuf/proto"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/cri-proxy/cri-proxy/interceptors"
)

func TestClaimsAreFirstComeFirstServed(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		v := interceptors.NewView()
		first, err := v.Claim(t.Context(), slot)
		if err != nil {
			t.Fatal(err)
		}
		if _, err := v.TryClaim(slot); !errors.Is(err, interceptors.ErrClaimed) {
			t.Errorf("TryClaim of a taken slot: %v", err)
		}
		other, err := v.TryClaim(interceptors.Slot{PodUID: slot.PodUID, Container: "web"})
		if err != nil {
			t.Errorf("another slot is taken too: %v", err)
		}
		other.Release()

		var mu sync.Mutex
		var order []int
		for i := range 5 {
			go func() {
				c, err := v.Claim(t.Context(), slot)
				if err != nil {
					t.Error(err)
					return
				}
				mu.Lock()
				order = append(order, i)
				mu.Unlock()
				if c.Slot() != slot || c.YieldedTo() != nil {
					t.Error("a claim that is not fresh")
				}
				c.Release()
			}()
			synctest.Wait() // in line
		}
		if len(order) != 0 {
			t.Errorf("%v were served while the slot was held", order)
		}
		if _, err := v.TryClaim(slot); !errors.Is(err, interceptors.ErrClaimed) {
			t.Errorf("TryClaim before those in line: %v", err)
		}
		first.Release()
		synctest.Wait()
		if got := fmt.Sprint(order); got != "[0 1 2 3 4]" {
			t.Errorf("served in order %s", got)
		}
		if v.Claimed(slot) {
			t.Error("still claimed")
		}
		last, err := v.TryClaim(slot)
		if err != nil {
			t.Fatal(err)
		}
		last.Release()
	})
}

func TestClaimGivesUpItsPlace(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		v := interceptors.NewView()
		first, err := v.TryClaim(slot)
		if err != nil {
			t.Fatal(err)
		}
		ctx, cancel := context.WithCancel(t.Context())
		impatient, patient := make(chan error, 1), make(chan error, 1)
		go func() {
			_, err := v.Claim(ctx, slot)
			impatient <- err
		}()
		synctest.Wait()
		go func() {
			c, err := v.Claim(t.Context(), slot)
			if err == nil {
				c.Release()
			}
			patient <- err
		}()
		synctest.Wait()
		cancel()
		if err := <-impatient; !errors.Is(err, context.Canceled) {
			t.Errorf("got %v", err)
		}
		first.Release()
		if err := <-patient; err != nil {
			t.Error(err)
		}
		if v.Claimed(slot) {
			t.Error("the slot is lost")
		}
	})
}

// Giving up at the very moment of one's turn must not lose the slot.
func TestClaimGivesUpAsItsTurnComes(t *testing.T) {
	for range 200 {
		v := interceptors.NewView()
		first, err := v.TryClaim(slot)
		if err != nil {
			t.Fatal(err)
		}
		ctx, cancel := context.WithCancel(t.Context())
		var wg sync.WaitGroup
		wg.Go(func() {
			if c, err := v.Claim(ctx, slot); err == nil {
				c.Release()
			}
		})
		wg.Go(cancel)
		wg.Go(first.Release)
		wg.Wait()
		last, err := v.TryClaim(slot)
		if err != nil {
			t.Fatal("the slot is lost")
		}
		last.Release()
	}
}

func TestReleaseTwiceKeepsTheNextClaim(t *testing.T) {
	v := interceptors.NewView()
	first, err := v.TryClaim(slot)
	if err != nil {
		t.Fatal(err)
	}
	first.Release()
	second, err := v.TryClaim(slot)
	if err != nil {
		t.Fatal(err)
	}
	first.Release()
	if !v.Claimed(slot) {
		t.Error("releasing the first claim again released the second")
	}
	second.Release()
}

// passing begins a list that goes through undecoded; the returned functions wait until the
// runtime has it, and let the runtime answer.
func passing(b *bed) (seen <-chan struct{}, answer func(), answered *sync.WaitGroup) {
	arrived, gate := make(chan struct{}), make(chan struct{})
	b.on(methodList, func(context.Context, []byte) (proto.Message, error) {
		close(arrived)
		<-gate
		return &runtimeapi.ListContainersResponse{Containers: containers()}, nil
	})
	answered = &sync.WaitGroup{}
	answered.Go(func() {
		if _, err := b.raw(b.t.Context(), methodList, nil); err != nil {
			b.t.Error(err)
		}
	})
	return arrived, func() { close(gate) }, answered
}

func TestHideWaitsForCallsThatPassedUndecoded(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b := newBed(t)
		seen, answer, answered := passing(b)
		<-seen
		// Every operation waits, not only the one that made the view active.
		var hidden sync.WaitGroup
		done := make([]bool, 3)
		for i := range done {
			c, err := b.view.TryClaim(interceptors.Slot{PodUID: "uid-1", Container: fmt.Sprint(i)})
			if err != nil {
				t.Fatal(err)
			}
			defer c.Release()
			hidden.Go(func() {
				if err := c.Hide(t.Context(), fmt.Sprint(i)); err != nil {
					t.Error(err)
				}
				done[i] = true
			})
			synctest.Wait()
		}
		for i, d := range done {
			if d {
				t.Errorf("operation %d hides already, though a list is on its way undecoded", i)
			}
		}
		// Calls that begin now are decoded and need not be waited for.
		b.on(methodStatus, always(&runtimeapi.ContainerStatusResponse{}, nil))
		if _, err := b.raw(t.Context(), methodStatus, nil); err != nil {
			t.Error(err)
		}
		answer()
		answered.Wait()
		hidden.Wait()
	})
}

func TestHideGivesUp(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b := newBed(t)
		seen, answer, answered := passing(b)
		<-seen
		c := b.claimed()
		defer c.Release()
		ctx, cancel := context.WithTimeout(t.Context(), time.Second)
		defer cancel()
		if err := c.Hide(ctx, token); !errors.Is(err, context.DeadlineExceeded) {
			t.Errorf("got %v", err)
		}
		if b.view.Active() {
			t.Error("hides although it gave up")
		}
		// The same claim may try again, and others are not disturbed.
		ctx, cancel = context.WithTimeout(t.Context(), time.Second)
		defer cancel()
		if err := c.Hide(ctx, token); !errors.Is(err, context.DeadlineExceeded) {
			t.Errorf("got %v", err)
		}
		answer()
		answered.Wait()
		if err := c.Hide(t.Context(), token); err != nil {
			t.Error(err)
		}
	})
}

// Calls of methods that never carry a container are not waited for.
func TestPassWatchesOnlyWhatMayShowContainers(t *testing.T) {
	d := newBed(t).director
	if done, ok := d.Pass(runtimeapi.RuntimeService_Version_FullMethodName); done != nil || !ok {
		t.Error("Version is watched")
	}
	done, ok := d.Pass(methodList)
	if done == nil || !ok {
		t.Fatal("ListContainers is not watched")
	}
	done()
}

func TestPassTurnsBackOnceActive(t *testing.T) {
	b := newBed(t)
	if b.director.Unary(methodList) != nil {
		t.Fatal("takes a list with nothing to say")
	}
	c := b.swapping() // between Unary and Pass
	defer c.Release()
	if _, ok := b.director.Pass(methodList); ok {
		t.Error("a list passes undecoded though there is something to hide")
	}
	if b.director.Unary(methodList) == nil {
		t.Error("does not take the list")
	}
}

func TestTryRevealYields(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b := newBed(t)
		b.serveList()
		b.on(methodStop, always(&runtimeapi.StopContainerResponse{}, nil))
		c := b.swapping()
		var kubelet sync.WaitGroup
		kubelet.Go(func() {
			if _, err := call[runtimeapi.StopContainerResponse](t.Context(), b, methodStop, &runtimeapi.StopContainerRequest{ContainerId: incumbent}); err != nil {
				t.Error(err)
			}
		})
		<-c.Yielded()
		if c.TryReveal() {
			t.Error("revealed though kubelet takes the slot back")
		}
		resp, err := call[runtimeapi.ListContainersResponse](t.Context(), b, methodList, &runtimeapi.ListContainersRequest{})
		if err != nil {
			t.Fatal(err)
		}
		if got := show(resp.GetContainers()); got != "old RUNNING, web RUNNING, web-before EXITED" {
			t.Errorf("list shows %q", got)
		}
		c.Release()
		kubelet.Wait()
	})
}

// All methods from many goroutines, for the race detector.
func TestViewUnderLoad(t *testing.T) {
	b := newBed(t)
	b.serveList()
	b.on(methodStop, always(&runtimeapi.StopContainerResponse{}, nil))
	ctx, cancel := context.WithCancel(t.Context())
	var kubelet, ops sync.WaitGroup
	for range 2 {
		kubelet.Go(func() {
			for ctx.Err() == nil {
				resp, err := call[runtimeapi.ListContainersResponse](t.Context(), b, methodList, &runtimeapi.ListContainersRequest{})
				if err != nil {
					t.Error(err)
					return
				}
				// The runtime's list is that of a swap throughout, so either both are as they are or
				// neither is.
				if got := show(resp.GetContainers()); got != "old RUNNING, web RUNNING, web-before EXITED" && got != "new CREATED, old EXITED, web RUNNING, web-before EXITED" {
					t.Errorf("list shows %q", got)
					return
				}
			}
		})
	}
	kubelet.Go(func() {
		for ctx.Err() == nil {
			_, filter, err := b.director.Stream(methodEvents)(ctx, methodEvents, nil)
			if err != nil {
				t.Error(err)
				return
			}
			if _, err := filter.Message(marshal(t, event(incumbent, stopped, exited(incumbent)))); err != nil {
				t.Error(err)
			}
			filter.Close()
		}
	})
	kubelet.Go(func() {
		for ctx.Err() == nil {
			if _, err := call[runtimeapi.StopContainerResponse](ctx, b, methodStop, &runtimeapi.StopContainerRequest{ContainerId: web}); err != nil && ctx.Err() == nil {
				t.Error(err)
				return
			}
		}
	})
	for range 2 {
		ops.Go(func() {
			for i := range 300 {
				c, err := b.view.Claim(t.Context(), slot)
				if err != nil {
					t.Error(err)
					return
				}
				c.Bind(sandbox, incumbent)
				c.Mask() // silent until Hide, so that both begin at once
				c.Staged(successor)
				if err := c.Hide(t.Context(), token); err != nil {
					t.Error(err)
				}
				_ = c.Stopping()
				if i%2 == 0 {
					c.TryReveal()
				}
				c.Release()
			}
		})
	}
	ops.Wait()
	cancel()
	kubelet.Wait()
	if b.view.Active() {
		t.Error("the view still has something to say")
	}
}
