// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package recreate_test

import (
	"context"
	"fmt"
	"testing"
	"time"

	opsv1 "github.com/cri-proxy/cri-proxy/api/ops/v1"
	"github.com/cri-proxy/cri-proxy/controller/nodes"
)

// An operation beyond the limit of streams is polled, and still completes.
func TestWatchLimit(t *testing.T) {
	b := newBed(t)
	for i := range maxStreams {
		s := b.tracker.Ensure(nodes.Follow[*opsv1.Operation]{
			Node: nodes.Node{Name: "busy"}, UID: fmt.Sprint(i), For: requestOf("other"),
			Begin: func(ctx context.Context) (*opsv1.Operation, error) {
				<-ctx.Done()
				return nil, ctx.Err()
			},
		})
		if !s.Watched {
			t.Fatal("the limit is lower than it should be")
		}
	}
	b.create("a", spec{Containers: containers("app")})
	b.wantStates(b.until("completed", isCompleted, "a"), "app Succeeded killed")
	if _, _, active := b.r.Kept(); active != maxStreams {
		t.Errorf("%d streams", active)
	}
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
	for end := time.Now().Add(patience); ; time.Sleep(10 * time.Millisecond) {
		requests, known, active := b.r.Kept()
		if known == 0 && active == 0 && requests == 0 {
			return
		}
		if time.Now().After(end) {
			t.Fatalf("%d operations known, %d streams, %d requests remembered", known, active, requests)
		}
	}
}
