// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package ops_test

import (
	"bytes"
	"encoding/json"
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	bolt "go.etcd.io/bbolt"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	opsv1 "github.com/cri-proxy/cri-proxy/api/ops/v1"
	"github.com/cri-proxy/cri-proxy/interceptors/view"
	"github.com/cri-proxy/cri-proxy/ops/store"
	"github.com/cri-proxy/cri-proxy/test/fakenode"
)

// foreignRecord makes the record of the operation in the state directory one that this version does
// not understand, and returns it.
func foreignRecord(t *testing.T, state, uid string, change func(record map[string]any)) []byte {
	t.Helper()
	var out []byte
	db, err := bolt.Open(filepath.Join(state, "journal.db"), 0o600, nil)
	if err != nil {
		t.Fatal(err)
	}
	err = db.Update(func(tx *bolt.Tx) error {
		b, r := tx.Bucket(bucketOperations), map[string]any{}
		if err := json.Unmarshal(b.Get([]byte(uid)), &r); err != nil {
			return err
		}
		change(r)
		var err error
		out, err = json.Marshal(r)
		return errors.Join(err, b.Put([]byte(uid), out))
	})
	if err := errors.Join(err, db.Close()); err != nil {
		t.Fatal(err)
	}
	return out
}

// foreigners are the ways in which a record is not this version's.
var foreigners = map[string]func(record map[string]any){
	"an unknown step": func(r map[string]any) { r["containers"].([]any)[0].(map[string]any)["step"] = "polish" },
	"a newer version": func(r map[string]any) { r["version"] = 2 },
	"a newer version in another form": func(r map[string]any) {
		r["version"] = 2
		r["slots"] = map[string]any{"app": r["containers"]}
		r["containers"] = "see slots"
	},
	"a newer version that keeps its command elsewhere": func(r map[string]any) {
		r["version"] = 2
		delete(r, "operation")
		delete(r, "request")
	},
}

// An operation of another version is neither undone nor forgotten, and what it has left is shown
// unless that would do harm.
func TestForeignOperationsAreLeftAlone(t *testing.T) {
	for _, tc := range []struct {
		at          string // the call that the process dies at
		done        bool
		sees, there string
	}{
		{"CreateContainer app/1", true, "app/0 RUNNING, web/0 RUNNING", "app/0 RUNNING, app/1 CREATED, web/0 RUNNING"},
		{"StopContainer app/0 30s", false, "app/0 RUNNING, web/0 RUNNING",
			"app/0 RUNNING, app/1 RUNNING, web/0 RUNNING"},
		// The only one that runs was removed when the step was not known.
		{"StopContainer app/0 30s", true, "app/0 EXITED, app/1 RUNNING, web/0 RUNNING",
			"app/0 EXITED, app/1 RUNNING, web/0 RUNNING"},
	} {
		for name, change := range foreigners {
			when := "before "
			if tc.done {
				when = "after "
			}
			t.Run(when+tc.at+", "+name, func(t *testing.T) {
				t.Parallel()
				n := newNode(t, podOptions{processes: true})
				n.runTidied()
				crashed, state := make(chan struct{}), ""
				die := func(done bool) func(string) error {
					return func(call string) error {
						if call != tc.at || done != tc.done {
							return nil
						}
						state = n.crash()
						close(crashed)
						return status.Error(codes.Unavailable, "the caller is gone")
					}
				}
				n.rt.Set(func(f *fakenode.Runtime) { f.Before, f.After = die(false), die(true) })
				n.restart("op")
				<-crashed
				n.rt.Set(func(f *fakenode.Runtime) { f.Before, f.After = nil, nil })
				raw := foreignRecord(t, state, "op", change)
				n.boot(state)
				n.state = state
				if got := n.sees(); got != tc.sees {
					t.Errorf("kubelet sees %s, want %s", got, tc.sees)
				}
				n.engine.node.LateCreate = 1
				n.run()
				// until all has been tidied up
				for late := time.Now().Add(waitLong); n.view.Guarded(); time.Sleep(time.Millisecond) {
					if time.Now().After(late) {
						t.Fatal("still guarded")
					}
				}
				if got := n.sees(); got != tc.sees || n.rt.State() != tc.there {
					t.Errorf("kubelet sees %s, want %s; there is %s, want %s", got, tc.sees, n.rt.State(), tc.there)
				}
				op, err := n.api.GetOperation(t.Context(), &opsv1.GetOperationRequest{Uid: "op"})
				if err != nil || op.GetPhase() != opsv1.Phase_PHASE_FAILED ||
					!strings.Contains(op.GetMessage(), "left alone") {
					t.Errorf("it is told of as %v, %v", op, err)
				}
				if _, err := n.api.Restart(t.Context(), restartRequest("op")); op.GetPod() == nil &&
					(status.Code(err) != codes.AlreadyExists || !strings.Contains(err.Error(), "choose a new UID")) {
					t.Errorf("its UID for another restart: %v", err)
				}
				_, err = n.api.Restart(t.Context(), restartRequest("op2"))
				if hidden := tc.sees != tc.there; hidden && (status.Code(err) != codes.FailedPrecondition ||
					!strings.Contains(err.Error(), "install that version again")) {
					t.Errorf("another restart: %v", err)
				} else if !hidden && err != nil {
					t.Errorf("another restart: %v", err)
				}
				if tc.sees != tc.there {
					// kubelet's policy goes before: the name is free when it makes the next one.
					n.rt.Exit(t, "app/0", 1)
					n.makeNextAt(t, 1)
					if got, want := n.sees(), "app/0 EXITED, app/1 RUNNING, web/0 RUNNING"; got != want ||
						n.rt.State() != want {
						t.Errorf("kubelet sees %s, there is %s", got, n.rt.State())
					}
				}
				err = n.engine.disk.Journal.View(func(tx *bolt.Tx) error {
					if !bytes.Equal(tx.Bucket(bucketOperations).Get([]byte("op")), raw) ||
						tx.Bucket(bucketUnreadable) != nil {
						t.Error("the record has been changed")
					}
					return nil
				})
				n.must(err)
			})
		}
	}
}

// makeNextAt makes an attempt of app, as kubelet does.
func (n *node) makeNextAt(t *testing.T, attempt uint32) {
	t.Helper()
	made, err := n.kubelet.CreateContainer(t.Context(), &runtimeapi.CreateContainerRequest{
		PodSandboxId: n.sandbox, Config: n.containerConfig("app", attempt), SandboxConfig: n.sandboxConfig(),
	})
	n.must(err)
	_, err = n.kubelet.StartContainer(t.Context(),
		&runtimeapi.StartContainerRequest{ContainerId: made.GetContainerId()})
	n.must(err)
}

// What an older cri-proxy has left of an operation, at any step, is taken up. The records are those
// of package store.
func TestOpenTakesUpGoldenRecords(t *testing.T) {
	files, err := filepath.Glob("store/testdata/journal/*-*.json")
	if err != nil || len(files) != 26 {
		t.Fatalf("%d records, %v", len(files), err)
	}
	for _, file := range files {
		t.Run(filepath.Base(file), func(t *testing.T) {
			raw, err := os.ReadFile(file)
			if err != nil {
				t.Fatal(err)
			}
			dir := t.TempDir()
			j, err := store.OpenJournal(dir, quiet())
			if err != nil {
				t.Fatal(err)
			}
			err = j.Update(func(tx *bolt.Tx) error { return tx.Bucket(bucketOperations).Put([]byte("golden"), raw) })
			if err := errors.Join(err, j.Close()); err != nil {
				t.Fatal(err)
			}
			v := view.New()
			e, err := openEngine(dir, v)
			if err != nil {
				t.Fatal(err)
			}
			o := e.Lookup("golden")
			if o == nil || o.IsLeftAlone() || len(e.Waiting()) != 1 {
				t.Fatalf("operations: %v", e.List())
			}
			at := o.Records()[0].Step
			if claimed, want := v.Claimed(appSlot), at != store.StepNone && at != store.StepDone; claimed != want {
				t.Errorf("the slot is claimed: %t, want %t", claimed, want)
			}
			if active, want := v.Active(), at != store.StepNone && at != store.StepDone &&
				at != store.StepReveal; active != want {
				t.Errorf("the view is active: %t, want %t", active, want)
			}
			if err := e.Close(); err != nil {
				t.Error(err)
			}
		})
	}
}
