// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package ops_test

import (
	"encoding/json"
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	bolt "go.etcd.io/bbolt"
	bolterrors "go.etcd.io/bbolt/errors"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/timestamppb"

	opsv1 "github.com/cri-proxy/cri-proxy/api/ops/v1"
	"github.com/cri-proxy/cri-proxy/interceptors/view"
	"github.com/cri-proxy/cri-proxy/ops"
	"github.com/cri-proxy/cri-proxy/ops/boltfile"
	"github.com/cri-proxy/cri-proxy/ops/crinode"
	"github.com/cri-proxy/cri-proxy/ops/lost"
	"github.com/cri-proxy/cri-proxy/ops/operation"
	"github.com/cri-proxy/cri-proxy/ops/store"
	"github.com/cri-proxy/cri-proxy/ops/swap"
	"github.com/cri-proxy/cri-proxy/test/fakenode"
)

// entry is a journal record of an operation on app at a step.
func entry(t testing.TB, uid string, at store.Step, created time.Time) *store.Record {
	t.Helper()
	return &store.Record{
		Operation: wire(t, &opsv1.Operation{
			Uid: uid, Kind: opsv1.KindRestart, Pod: podRef(), CreateTime: timestamppb.New(created),
			Phase:      opsv1.Phase_PHASE_PENDING,
			Containers: []*opsv1.ContainerOperation{{Name: "app", Phase: opsv1.Phase_PHASE_PENDING}},
		}),
		Request:    wire(t, restartRequest(uid)),
		Containers: []store.Container{{Step: at, Sandbox: "s", Incumbent: "old", Successor: "new", Token: someToken}},
	}
}

func journalWith(t testing.TB, records map[string]*store.Record) string {
	t.Helper()
	dir := t.TempDir()
	j, err := store.OpenJournal(dir, quiet())
	if err != nil {
		t.Fatal(err)
	}
	for uid, r := range records {
		if err := j.Put(uid, r, nil); err != nil {
			t.Fatal(err)
		}
	}
	if err := j.Close(); err != nil {
		t.Fatal(err)
	}
	return dir
}

func openEngine(dir string, v *view.View) (*engine, error) {
	return open(
		ops.Options{StateDir: dir, Conn: fakenode.Direct(fakenode.New()), View: v, Log: quiet()})
}

// What the view shows as soon as the journal has been read, by step.
func TestOpenArmsTheView(t *testing.T) {
	for at, want := range map[store.Step]bool{
		store.StepNone: false, store.StepStage: true, store.StepStaged: true, store.StepStop: true,
		store.StepStarted: true, store.StepUndo: true, store.StepReveal: false, store.StepDone: false,
	} {
		t.Run(string(at), func(t *testing.T) {
			v := view.New()
			e, err := openEngine(journalWith(t, map[string]*store.Record{"op": entry(t, "op", at, time.Now())}), v)
			if err != nil {
				t.Fatal(err)
			}
			if got := v.Active(); got != want {
				t.Errorf("the view is active: %t, want %t", got, want)
			}
			claimed := v.Claimed(view.Slot{PodUID: podUID, Container: "app"})
			if wantClaim := at != store.StepNone && at != store.StepDone; claimed != wantClaim {
				t.Errorf("the slot is claimed: %t, want %t", claimed, wantClaim)
			}
			if err := e.Close(); err != nil {
				t.Error(err)
			}
		})
	}
}

func TestOpenKeepsTheOrderOfOperations(t *testing.T) {
	now := time.Now()
	e, err := openEngine(journalWith(t, map[string]*store.Record{
		"a": entry(t, "a", store.StepNone, now.Add(2*time.Second)), "b": entry(t, "b", store.StepNone, now),
		"c": entry(t, "c", store.StepNone, now.Add(time.Second)),
	}), view.New())
	if err != nil {
		t.Fatal(err)
	}
	var got []string
	for _, o := range e.Waiting() {
		got = append(got, o.UID())
	}
	if s := strings.Join(got, " "); s != "b c a" {
		t.Errorf("they are resumed as %s", s)
	}
	if err := e.Close(); err != nil {
		t.Error(err)
	}
}

// A record that cannot be used must not keep kubelet from the runtime: it is set aside.
func TestOpenSetsBadRecordsAside(t *testing.T) {
	broken := entry(t, "op", store.StepNone, time.Now())
	broken.Containers = nil
	for name, r := range map[string]*store.Record{
		"lengths differ": broken, "another UID": entry(t, "other", store.StepNone, time.Now()),
		"not protobuf": {Operation: []byte{0xff}},
	} {
		t.Run(name, func(t *testing.T) {
			dir := journalWith(t,
				map[string]*store.Record{"op": r, "good": entry(t, "good", store.StepNone, time.Now())})
			e, err := openEngine(dir, view.New())
			if err != nil {
				t.Fatal(err)
			}
			if e.Lookup("op") != nil || e.Lookup("good") == nil ||
				len(e.Waiting()) != 1 {
				t.Errorf("operations: %v", e.List())
			}
			err = e.disk.Journal.View(func(tx *bolt.Tx) error {
				if tx.Bucket(bucketUnreadable).Get([]byte("op")) == nil || tx.Bucket(bucketOperations).
					Get([]byte("op")) != nil {
					t.Error("the record is not set aside")
				}
				return nil
			})
			if err := errors.Join(err, e.Close()); err != nil {
				t.Error(err)
			}
		})
	}
	t.Run("two on one slot", func(t *testing.T) {
		v := view.New()
		dir := journalWith(t, map[string]*store.Record{
			"a": entry(t, "a", store.StepStop, time.Now()), "b": entry(t, "b", store.StepStop, time.Now()),
		})
		e, err := openEngine(dir, v)
		if err != nil {
			t.Fatal(err)
		}
		if len(e.Waiting()) != 1 || !v.Active() {
			t.Errorf("%d operations wait", len(e.Waiting()))
		}
		if err := e.Close(); err != nil {
			t.Error(err)
		}
	})
}

func TestOpenRefuses(t *testing.T) {
	t.Run("no directory", func(t *testing.T) {
		_, err := openEngine(filepath.Join(t.TempDir(), "no"), view.New())
		if !errors.Is(err, fs.ErrNotExist) {
			t.Errorf("got %v", err)
		}
	})
	t.Run("held", func(t *testing.T) {
		err := boltfile.Explain("journal.db", bolterrors.ErrTimeout)
		if !errors.Is(err, bolterrors.ErrTimeout) || !strings.Contains(err.Error(), "is held by another process") {
			t.Errorf("got %v", err)
		}
		if err := boltfile.Explain("journal.db", fs.ErrPermission); !strings.Contains(err.Error(), "must run as root") {
			t.Errorf("got %v", err)
		}
	})
}

// Without a file there are no operations, until there is one.
func TestJournalThatCannotBeMade(t *testing.T) {
	dir := t.TempDir()
	for _, name := range []string{"journal.db", "records.db"} {
		if err := os.MkdirAll(filepath.Join(dir, name, "in the way"), 0o700); err != nil {
			t.Fatal(err)
		}
	}
	e, err := openEngine(dir, view.New())
	if err != nil {
		t.Fatal(err)
	}
	e.node.Records.Created("c", nil)
	if e.node.Records.Request("c") != nil || len(e.node.Records.IDs()) != 0 {
		t.Error("records without a file")
	}
	if _, err := e.Submit(operation.RestartCommand(restartRequest("op"), nil), podRef()); err == nil ||
		!strings.Contains(err.Error(), "nothing was done") {
		t.Errorf("got %v", err)
	}
	if err := os.RemoveAll(filepath.Join(dir, "journal.db")); err != nil {
		t.Fatal(err)
	}
	if _, err := e.Submit(operation.RestartCommand(restartRequest("op"), nil), podRef()); err != nil {
		t.Errorf("the file can be had now, but: %v", err)
	}
	if err := e.Close(); err != nil {
		t.Fatal(err)
	}
}

// A process that has handed over may be asked once more whether its journal is usable, in the
// middle of that. It must not take the file from the process that has it by then.
func TestJournalIsNotOpenedAfterTheEnd(t *testing.T) {
	dir := t.TempDir()
	path := filepath.Join(dir, "journal.db")
	if err := os.Mkdir(path, 0o700); err != nil { // in the way: it is opened as soon as it can be
		t.Fatal(err)
	}
	e, err := openEngine(dir, view.New())
	if err != nil {
		t.Fatal(err)
	}
	if err := errors.Join(e.Close(), os.Remove(path)); err != nil {
		t.Fatal(err)
	}
	if err := e.JournalError(); !errors.Is(err, boltfile.ErrClosed) {
		t.Errorf("got %v", err)
	}
	next, err := openEngine(dir, view.New())
	if err != nil {
		t.Fatal(err)
	}
	if err := errors.Join(next.JournalError(), next.Close()); err != nil {
		t.Error(err)
	}
}

// FuzzJournal reads any bytes as a record of the journal.
func FuzzJournal(f *testing.F) {
	for _, s := range []store.Step{store.StepNone, store.StepStage, store.StepStaged, store.StepStop, store.StepStarted,
		store.StepReveal, store.StepUndo, store.StepDone, "other"} {
		b, err := json.Marshal(entry(f, "op", s, time.Unix(0, 0)))
		if err != nil {
			f.Fatal(err)
		}
		f.Add(b)
	}
	f.Add([]byte(`{}`))
	f.Add([]byte(`{"containers":[{"step":"stop"}]}`))
	f.Fuzz(func(t *testing.T, b []byte) {
		r, err := store.DecodeRecord(b)
		if err != nil {
			return
		}
		node := &swap.Node{Client: &crinode.Client{Log: quiet()}, View: view.New(), Tokens: lost.NewTokens(),
			Lost: lost.New(lost.Options{})}
		if o := ops.Revive(node, quiet(), "op", r); o != nil {
			_ = verdict(o.Snapshot())
		}
	})
}

// FuzzRestartRequest checks any bytes as a request; an accepted one must hold what the engine
// relies on.
func FuzzRestartRequest(f *testing.F) {
	f.Add(wire(f, restartRequest("op")), true)
	f.Add(wire(f, restartRequest("op", func(r *opsv1.RestartRequest) {
		r.Containers[0].PreStop, r.Containers[0].PostStart = execHook("a"), httpHook("HTTP", 1)
	})), false)
	f.Add([]byte(nil), false)
	f.Fuzz(func(t *testing.T, b []byte, remote bool) {
		req := &opsv1.RestartRequest{}
		if proto.Unmarshal(b, req) != nil {
			return
		}
		if ops.ValidateRestart(req, remote) != nil {
			return
		}
		c := operation.Command{Restart: req}
		if req.GetPod() == nil || len(req.GetContainers()) == 0 || req.GetUid() == "" || !c.Same(c) {
			t.Errorf("accepted: %v", req)
		}
	})
}
