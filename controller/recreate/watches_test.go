// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package recreate_test

import (
	"testing"
	"time"

	opsv1 "github.com/cri-proxy/cri-proxy/api/ops/v1"
)

// An operation beyond the limit of streams is polled, and still completes.
func TestWatchLimit(t *testing.T) {
	b := newBed(t)
	b.r.LimitStreams(0)
	b.create("a", spec{Containers: containers("app")})
	b.wantStates(b.until("completed", isCompleted, "a"), "app Succeeded killed")
}

// No stream outlives its operation's request.
func TestWatchForgotten(t *testing.T) {
	b := newBed(t)
	release := b.node.Hold("app", opsv1.Phase_PHASE_STARTING)
	defer release()
	b.create("a", spec{Containers: containers("app"), ActiveDeadlineSeconds: pointer(int64(300))})
	b.until("under way", b.phaseIs(recreating, "app"), "a")
	b.after(301 * time.Second)
	b.until("completed", retired, "a")
	for end := time.Now().Add(patience); ; {
		requests, known, active := b.r.Kept()
		if known == 0 && active == 0 && requests == 0 {
			return
		}
		if time.Now().After(end) {
			t.Fatalf("%d operations known, %d streams, %d requests remembered", known, active, requests)
		}
		select {
		case <-b.r.Wakes():
		case <-time.After(10 * time.Millisecond):
		}
	}
}
