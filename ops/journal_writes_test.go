// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package ops

import (
	"strings"
	"testing"

	bolt "go.etcd.io/bbolt"

	opsv1 "github.com/cri-proxy/cri-proxy/api/ops/v1"
)

// journalWrites returns how many transactions the journal's file has had. Each waits for the disk.
func journalWrites(t *testing.T, e *Engine) (n int) {
	t.Helper()
	err := e.disk.Journal.View(func(tx *bolt.Tx) error { n = tx.ID(); return nil })
	if err != nil {
		t.Fatal(err)
	}
	return n
}

// Each write of the journal waits for the disk, some of them while no container serves.
func TestJournalWritesOfARestart(t *testing.T) {
	for name, tc := range map[string]struct {
		edit func(*opsv1.RestartRequest)
		want int
	}{
		// accepted, stage, staged, StopBy, stop, started, reveal, done, finished
		"plain": {func(*opsv1.RestartRequest) {}, 9},
		// StopBy must be on disk before the hook runs
		"preStop": {func(r *opsv1.RestartRequest) { r.Containers[0].PreStop = execHook("true") }, 9},
		// that postStart has been tried, and that it has ended well
		"postStart": {func(r *opsv1.RestartRequest) { r.Containers[0].PostStart = execHook("true") }, 11},
		"both hooks": {
			func(r *opsv1.RestartRequest) {
				r.Containers[0].PreStop, r.Containers[0].PostStart = execHook("true"), execHook("true")
			}, 11,
		},
		"two ordered containers": {
			func(r *opsv1.RestartRequest) {
				r.Ordered = true
				r.Containers = append(r.Containers, &opsv1.ContainerRestart{Name: "web"})
			}, 16,
		},
	} {
		t.Run(name, func(t *testing.T) {
			n := newNode(t, podOptions{})
			n.runTidied()
			n.restart("first") // makes the file
			n.finish("first")
			before := journalWrites(t, n.engine)
			n.restart("op", tc.edit)
			if got, want := verdict(n.finish("op")), "SUCCEEDED, app SUCCEEDED"; !strings.HasPrefix(got, want) {
				t.Fatalf("operation ended %s, want %s", got, want)
			}
			if got := journalWrites(t, n.engine) - before; got != tc.want {
				t.Errorf("%d writes, want %d", got, tc.want)
			}
		})
	}
}
