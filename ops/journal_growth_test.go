// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package ops_test

import (
	"context"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"runtime"
	"testing"
	"time"

	"github.com/sirupsen/logrus"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/durationpb"
	"google.golang.org/protobuf/types/known/timestamppb"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	opsv1 "github.com/cri-proxy/cri-proxy/api/ops/v1"
	"github.com/cri-proxy/cri-proxy/interceptors/view"
	"github.com/cri-proxy/cri-proxy/ops"
	"github.com/cri-proxy/cri-proxy/ops/operation"
	"github.com/cri-proxy/cri-proxy/ops/store"
	"github.com/cri-proxy/cri-proxy/test/fakenode"
)

// What is kept of restarts is bounded, in memory and on disk: the oldest operations go, and so do
// the records of containers that kubelet removes.
func TestOperationsStayFew(t *testing.T) {
	const total = 40
	newBubble(t).run(func(t *testing.T, n *bubbleNode) {
		n.engine.fill(t)
		previous := ""
		for i := range total {
			time.Sleep(time.Millisecond) // in a bubble all would happen at the same moment
			op := n.restart(fmt.Sprintf("op-%d", i))
			if got, want := verdict(op), "SUCCEEDED, app SUCCEEDED"; got != want {
				t.Fatalf("operation %d ended %s (%s)", i, got, op.GetMessage())
			}
			// kubelet keeps the last container that has exited.
			if previous != "" {
				if _, err := n.rt.RemoveContainer(t.Context(),
					&runtimeapi.RemoveContainerRequest{ContainerId: previous}); err != nil {
					t.Fatal(err)
				}
				n.engine.node.Records.Removed(previous)
			}
			previous = op.GetContainers()[0].GetIncumbentId()
		}
		if got := len(n.engine.List()); got > ops.MaxFinished+1 {
			t.Errorf("%d operations are kept, at most %d finished ones should be", got, ops.MaxFinished)
		}
		if n.engine.Lookup(uidOf(0)) != nil || n.engine.Lookup("op-0") == nil {
			t.Error("the oldest is kept, or a new one is not")
		}
		if got := n.engine.node.Records.Len(); got != 2 {
			t.Errorf("%d containers are recorded, 2 exist", got)
		}
	})
}

// Finished operations are forgotten after their time though nobody asks for anything, and so are
// records of containers that went away with their sandbox.
func TestOldOperationsGoByThemselves(t *testing.T) {
	newBubble(t).run(func(t *testing.T, n *bubbleNode) {
		op := n.restart("op")
		for _, id := range []string{op.GetContainers()[0].GetIncumbentId(), op.GetContainers()[0].GetSuccessorId()} {
			if _, err := n.rt.RemoveContainer(t.Context(),
				&runtimeapi.RemoveContainerRequest{ContainerId: id}); err != nil {
				t.Fatal(err)
			}
		}
		time.Sleep(ops.KeepFinished)
		if n.engine.Lookup("op") == nil {
			t.Error("forgotten before its time")
		}
		time.Sleep(ops.ForgetEvery + time.Second)
		if n.engine.Lookup("op") != nil {
			t.Error("the operation is kept")
		}
		if got := n.engine.node.Records.Len(); got != 0 {
			t.Errorf("%d containers are recorded, none exists", got)
		}
		err := n.engine.disk.Journal.Load(func(uid string, _ *store.Record) error {
			return fmt.Errorf("operation %s is in the journal", uid)
		}, nil, func(err error) { t.Error(err) })
		if err != nil {
			t.Error(err)
		}
	})
}

// A journal that is full stays as large as it is: new operations take the room of old ones.
func TestJournalStaysSmall(t *testing.T) {
	const total = ops.MaxFinished + 1000
	dir := t.TempDir()
	j, err := store.OpenJournal(dir, logrus.New())
	if err != nil {
		t.Fatal(err)
	}
	defer j.Close()
	unsynced(j)
	sizes := map[int]int64{}
	for i := 1; i <= total; i++ {
		r := finishedRecord(t, i, time.Now())
		if err := j.Put(uidOf(i), r, nil); err != nil {
			t.Fatal(err)
		}
		if old := i - ops.MaxFinished; old > 0 {
			if err := j.Remove([]string{uidOf(old)}); err != nil {
				t.Fatal(err)
			}
		}
		if i%500 == 0 {
			sizes[i] = fileSize(t, filepath.Join(dir, "journal.db"))
		}
	}
	t.Logf("journal.db by operations: %v", sizes)
	if sizes[total] > sizes[ops.MaxFinished] || sizes[total] > 16<<20 {
		t.Errorf("journal.db by operations: %v", sizes)
	}
}

func fileSize(t testing.TB, path string) int64 {
	t.Helper()
	fi, err := os.Stat(path)
	if err != nil {
		t.Fatal(err)
	}
	return fi.Size()
}

func uidOf(i int) string { return fmt.Sprintf("3f0e2f5c-8f5e-4d7e-9d55-%012d.app", i) }

// finishedOperation is an operation that has ended.
func finishedOperation(t testing.TB, i int, at time.Time, disk *store.Store) *operation.Operation {
	t.Helper()
	o, err := operation.Decode(uidOf(i), finishedRecord(t, i, at), disk)
	if err != nil {
		t.Fatal(err)
	}
	return o
}

// finishedRecord is the record of an operation on one container as the controller commands it, with
// its end.
func finishedRecord(t testing.TB, i int, at time.Time) *store.Record {
	t.Helper()
	id := func(k int) string { return fmt.Sprintf("%064x", k) }
	uid := uidOf(i)
	pod := &opsv1.PodRef{Namespace: "shop", Name: fmt.Sprintf("shop-7c9f8d6b5-%05d", i),
		Uid: fmt.Sprintf("11111111-2222-3333-4444-%012d", i)}
	return &store.Record{
		Request: wire(t, &opsv1.RestartRequest{
			Uid: uid, Pod: pod, Requester: "ContainerRecreateRequest/shop/restart-" + uid,
			Containers: []*opsv1.ContainerRestart{{Name: "app", ExpectedContainerId: id(2 * i)}},
		}),
		Operation: wire(t, &opsv1.Operation{
			Uid: uid, Kind: opsv1.KindRestart, Pod: proto.Clone(pod).(*opsv1.PodRef),
			Phase:     opsv1.Phase_PHASE_SUCCEEDED,
			Requester: "ContainerRecreateRequest/shop/restart-" + uid, CreateTime: timestamppb.New(at),
			FinishTime: timestamppb.New(at),
			Containers: []*opsv1.ContainerOperation{{
				Name: "app", Phase: opsv1.Phase_PHASE_SUCCEEDED, IncumbentId: id(2 * i), SuccessorId: id(2*i + 1),
				Attempt: 1, Method: "gate",
				StopTime: timestamppb.New(at), StartTime: timestamppb.New(at),
				Gap: durationpb.New(6 * time.Millisecond),
			}},
		}),
		Containers: []store.Container{{
			Step: store.StepDone, Sandbox: id(1), Incumbent: id(2 * i), Successor: id(2*i + 1),
			Token: operation.RandomToken(), StopBy: at,
		}},
	}
}

// fullEngine is an engine that keeps as many finished operations as it may.
func fullEngine(b *testing.B, dir string) *engine {
	b.Helper()
	log := logrus.New()
	log.SetOutput(io.Discard)
	e, err := open(ops.Options{StateDir: dir, Conn: fakenode.Direct(fakenode.New()), View: view.New(),
		Log: log, LegacyLogDir: b.TempDir()})
	if err != nil {
		b.Fatal(err)
	}
	b.Cleanup(func() { _ = e.Close() })
	unsynced(e.disk.Journal)
	e.fill(b)
	return e
}

// fill gives the engine as many finished operations as it may keep, the oldest first.
func (e *engine) fill(t testing.TB) {
	t.Helper()
	for i := range ops.MaxFinished {
		o := finishedOperation(t, i, time.Now().Add(time.Duration(i-ops.MaxFinished)*time.Millisecond), e.disk)
		if err := o.Save(); err != nil {
			t.Fatal(err)
		}
		e.Add(o)
	}
}

// BenchmarkFullJournal is what a journal that is full costs: per operation accepted, per scrape of
// the metrics, per start of the process, and in memory and on disk.
func BenchmarkFullJournal(b *testing.B) {
	b.Run("expire", func(b *testing.B) {
		e := fullEngine(b, b.TempDir())
		for b.Loop() {
			if err := e.Expire(); err != nil {
				b.Fatal(err)
			}
		}
	})
	b.Run("list", func(b *testing.B) {
		e := fullEngine(b, b.TempDir())
		for b.Loop() {
			if n := len(e.List()); n != ops.MaxFinished {
				b.Fatalf("%d operations", n)
			}
		}
	})
	b.Run("open", func(b *testing.B) {
		dir := b.TempDir()
		e := fullEngine(b, dir)
		b.ReportMetric(float64(fileSize(b, filepath.Join(dir, "journal.db"))), "file-bytes")
		if err := e.Close(); err != nil {
			b.Fatal(err)
		}
		log := logrus.New()
		log.SetOutput(io.Discard)
		for b.Loop() {
			e, err := ops.Open(context.Background(),
				ops.Options{StateDir: dir, Conn: fakenode.Direct(fakenode.New()), View: view.New(), Log: log,
					LegacyLogDir: dir})
			if err != nil {
				b.Fatal(err)
			}
			if err := e.Close(); err != nil {
				b.Fatal(err)
			}
		}
	})
	b.Run("memory", func(b *testing.B) {
		for b.Loop() {
			var before, after runtime.MemStats
			runtime.GC()
			runtime.ReadMemStats(&before)
			kept := make([]*operation.Operation, ops.MaxFinished)
			for i := range kept {
				kept[i] = finishedOperation(b, i, time.Now(), &store.Store{})
			}
			runtime.GC()
			runtime.ReadMemStats(&after)
			b.ReportMetric(float64(after.HeapAlloc-before.HeapAlloc)/ops.MaxFinished, "bytes/operation")
			runtime.KeepAlive(kept)
		}
	})
}
