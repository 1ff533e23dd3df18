// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package ops_test

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	bolt "go.etcd.io/bbolt"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"

	opsv1 "github.com/cri-proxy/cri-proxy/api/ops/v1"
	"github.com/cri-proxy/cri-proxy/ops/criclone"
	"github.com/cri-proxy/cri-proxy/ops/gate"
	"github.com/cri-proxy/cri-proxy/ops/store"
	"github.com/cri-proxy/cri-proxy/test/fakenode"
)

// breakJournal makes writes fail during the call; the returned function makes them work again.
func (n *node) breakJournal(during string) (mend func()) {
	n.during(during, func() { n.must(n.engine.disk.Journal.Close()) })
	return n.engine.disk.Journal.Reopen // as on a disk that was full at the start: opened with the next write
}

// endOf returns the end of an operation as the next process would find it.
func endOf(t *testing.T, j *store.Journal, uid string) string {
	t.Helper()
	op := &opsv1.Operation{}
	err := j.View(func(tx *bolt.Tx) error {
		r, err := store.DecodeRecord(tx.Bucket(bucketOperations).Get([]byte(uid)))
		if err != nil {
			return err
		}
		return proto.Unmarshal(r.Operation, op)
	})
	if err != nil {
		t.Fatal(err)
	}
	if op.GetFinishTime() == nil {
		return "unfinished"
	}
	return verdict(op)
}

// What an operation has said of its end must be what the next process says: a restart that was
// reported as failed and taken back must not begin again.
func TestEndIsWrittenWhenTheJournalIsBack(t *testing.T) {
	for _, tc := range []struct{ during, want string }{
		{"CreateContainer app/1", "FAILED, app FAILED JournalError"},
		{"StopContainer app/0", "SUCCEEDED, app SUCCEEDED"},
	} {
		t.Run(tc.during, func(t *testing.T) {
			t.Run("while it runs", func(t *testing.T) {
				n := newNode(t, podOptions{})
				n.runTidied()
				mend := n.breakJournal(tc.during)
				n.restart("op")
				n.finish("op")
				mend()
				late := time.Now().Add(waitLong)
				for got := ""; got != tc.want; got = endOf(t, n.engine.disk.Journal, "op") {
					if time.Now().After(late) {
						t.Fatalf("the journal has %q, want %q", got, tc.want)
					}
					time.Sleep(50 * time.Millisecond) // it is tried once in a while
				}
			})
			t.Run("before it ends", func(t *testing.T) {
				n := newNode(t, podOptions{})
				n.runTidied()
				mend := n.breakJournal(tc.during)
				n.restart("op")
				n.finish("op")
				mend()
				n.stop()
				n.ran.Wait()
				n.must(n.engine.Close())
				j, err := store.OpenJournal(n.state, quiet())
				n.must(err)
				if got := endOf(t, j, "op"); got != tc.want {
					t.Errorf("the journal has %q, want %q", got, tc.want)
				}
				n.must(j.Close())
			})
		})
	}
}

// The process before died while it staged the successor: its gate goes with the container.
func TestGateOfALostStageIsRemoved(t *testing.T) {
	n := newNode(t, podOptions{})
	r := entry(t, "op", store.StepStage, time.Now())
	r.Containers[0] = store.Container{Step: store.StepStage, Sandbox: n.sandbox, Incumbent: n.rt.ID(t, "app/0"),
		Token: someToken, Method: opsv1.MethodGate}
	n.must(n.engine.disk.Journal.Put("op", r, nil))
	state := n.copyState()
	gates := filepath.Join(state, "gates")
	n.must(os.MkdirAll(gates, 0o700))
	n.must(gate.At(filepath.Join(gates, someToken)).Make())
	n.boot(state)
	n.state = state
	n.run()
	if got, want := verdict(n.finish("op")), "SUCCEEDED, app SUCCEEDED"; got != want {
		t.Errorf("operation ended %s, want %s", got, want)
	}
	left, err := os.ReadDir(gates)
	n.must(err)
	if len(left) > 0 {
		t.Errorf("gates are left: %v", left)
	}
}

// Kubelet removes the log and the link of a container that it knows. One that it has never seen
// leaves neither; with StartFirst the log stays, for it says what was wrong.
func TestTracesOfARemovedSuccessor(t *testing.T) {
	for order, logStays := range map[opsv1.Order]bool{opsv1.Order_ORDER_STOP_FIRST: false,
		opsv1.Order_ORDER_START_FIRST: true} {
		t.Run(order.String(), func(t *testing.T) {
			n := newNode(t, podOptions{})
			links := filepath.Join(n.dir, "links")
			n.must(os.Mkdir(links, 0o755))
			n.runTidied()
			log := filepath.Join(n.dir, "1.log")
			var link string
			n.rt.Set(func(f *fakenode.Runtime) {
				f.Before = func(call string) error {
					if !strings.HasPrefix(call, "StopContainer app/0") {
						return nil
					}
					c := n.rt.Get(t, "app/1")
					n.rt.Set(func(*fakenode.Runtime) { c.Status.LogPath = log })
					link = filepath.Join(links, criclone.LogLinkName("shop", "default", "app", c.Status.GetId()))
					if err := os.WriteFile(log, nil, 0o600); err != nil {
						t.Error(err)
					}
					if err := os.Symlink(log, link); err != nil && !errors.Is(err, fs.ErrExist) {
						t.Error(err)
					}
					return status.Error(codes.Unknown, "no such luck")
				}
			})
			n.restart("op", func(r *opsv1.RestartRequest) { r.Containers[0].Order = order })
			if got, want := verdict(n.finish("op")), "FAILED, app FAILED StopFailed"; got != want {
				t.Fatalf("operation ended %s, want %s", got, want)
			}
			if _, err := os.Lstat(link); !errors.Is(err, fs.ErrNotExist) {
				t.Errorf("the link is left: %v", err)
			}
			if _, err := os.Stat(log); (err == nil) != logStays {
				t.Error(fmt.Errorf("the log: %w, want it to stay: %t", err, logStays))
			}
		})
	}
}
