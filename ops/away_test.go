// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package ops_test

import (
	"fmt"
	"strings"
	"sync"
	"testing"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	opsv1 "github.com/cri-proxy/cri-proxy/api/ops/v1"
	"github.com/cri-proxy/cri-proxy/test/fakenode"
)

// A runtime that is away for a moment when a restart reads a container's state does not end the
// restart, whichever read it is.
func TestRuntimeAwayAtARead(t *testing.T) {
	// run restarts app; from the read with that number on, three go unanswered. It returns how many
	// reads there were.
	run := func(t *testing.T, from int, order opsv1.Order) (reads int) {
		n := newNode(t, podOptions{})
		n.runTidied()
		var mu sync.Mutex
		n.rt.Set(func(f *fakenode.Runtime) {
			f.Before = func(call string) error {
				if !strings.HasPrefix(call, "ContainerStatus") {
					return nil
				}
				mu.Lock()
				defer mu.Unlock()
				reads++
				if from > 0 && reads >= from && reads < from+3 {
					return status.Error(codes.Unavailable, "connection refused")
				}
				return nil
			}
		})
		n.restart("op", func(r *opsv1.RestartRequest) { r.Containers[0].Order = order })
		op := n.finish("op")
		if got, want := verdict(op), "SUCCEEDED, app SUCCEEDED"; got != want {
			t.Errorf("operation ended %s (%s), want %s", got, op.GetMessage(), want)
		}
		if got, want := n.rt.State(), "app/0 EXITED, app/1 RUNNING, web/0 RUNNING"; got != want || n.sees() != want {
			t.Errorf("runtime has %s, kubelet sees %s, want %s", got, n.sees(), want)
		}
		mu.Lock()
		defer mu.Unlock()
		return reads
	}
	for _, order := range []opsv1.Order{opsv1.Order_ORDER_STOP_FIRST, opsv1.Order_ORDER_START_FIRST} {
		for from := range run(t, 0, order) {
			t.Run(fmt.Sprintf("%s read %d", order, from+1), func(t *testing.T) { run(t, from+1, order) })
		}
	}
}
