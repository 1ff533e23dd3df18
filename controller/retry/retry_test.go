// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package retry_test

import (
	"context"
	"slices"
	"testing"
	"testing/synctest"
	"time"

	"github.com/cri-proxy/cri-proxy/controller/retry"
)

func TestBackoff(t *testing.T) {
	var got []time.Duration
	for _, n := range []int{0, 1, 2, 3, 4, 100} {
		got = append(got, retry.Backoff(n, 500*time.Millisecond, 5*time.Second))
	}
	want := []time.Duration{500 * time.Millisecond, time.Second, 2 * time.Second, 4 * time.Second, 5 * time.Second,
		5 * time.Second}
	if !slices.Equal(got, want) {
		t.Errorf("%v, want %v", got, want)
	}
}

func TestSleep(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		start := time.Now()
		if !retry.Sleep(t.Context(), time.Second) || time.Since(start) != time.Second {
			t.Errorf("slept %s", time.Since(start))
		}
		ctx, cancel := context.WithCancel(t.Context())
		cancel()
		if retry.Sleep(ctx, time.Hour) || time.Since(start) != time.Second {
			t.Error("slept on")
		}
	})
}
