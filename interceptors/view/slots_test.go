// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package view_test

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"testing"
	"testing/synctest"

	"go.uber.org/goleak"

	"github.com/cri-proxy/cri-proxy/interceptors/view"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

var slot = view.Slot{PodUID: "uid-1", Container: "app"}

func TestClaimsAreFirstComeFirstServed(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		v := view.New()
		first, err := v.Claim(t.Context(), slot)
		if err != nil {
			t.Fatal(err)
		}
		if _, err := v.TryClaim(slot); !errors.Is(err, view.ErrClaimed) {
			t.Errorf("TryClaim of a taken slot: %v", err)
		}
		other, err := v.TryClaim(view.Slot{PodUID: slot.PodUID, Container: "web"})
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
		if _, err := v.TryClaim(slot); !errors.Is(err, view.ErrClaimed) {
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
		v := view.New()
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
func TestClaimGivesUpAsItIsAdmitted(t *testing.T) {
	for range 200 {
		v := view.New()
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
	v := view.New()
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
