// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package operation_test

import (
	"errors"
	"io"
	"testing"

	"github.com/sirupsen/logrus"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	opsv1 "github.com/cri-proxy/cri-proxy/api/ops/v1"
	"github.com/cri-proxy/cri-proxy/interceptors/view"
	"github.com/cri-proxy/cri-proxy/ops/operation"
	"github.com/cri-proxy/cri-proxy/ops/store"
)

func pod() *opsv1.PodRef { return &opsv1.PodRef{Namespace: "default", Name: "shop", Uid: "uid"} }

// disk returns the files of a process on a directory.
func disk(t *testing.T, dir string) *store.Store {
	t.Helper()
	log := logrus.New()
	log.SetOutput(io.Discard)
	journal, err := store.OpenJournal(dir, log)
	if err != nil {
		t.Fatal(err)
	}
	records, err := store.OpenRecords(dir, log)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := errors.Join(journal.Close(), records.Close()); err != nil {
			t.Error(err)
		}
	})
	overrides, err := store.OpenOverrides(journal, nil, log)
	if err != nil {
		t.Fatal(err)
	}
	return &store.Store{Journal: journal, Records: records, Overrides: overrides, Boot: "boot"}
}

// upgrade is an accepted upgrade of app.
func upgrade(t *testing.T, disk *store.Store) *operation.Operation {
	t.Helper()
	c := operation.UpgradeCommand(&opsv1.PrepareUpgradeRequest{
		Uid: "op", Pod: pod(), Owner: "owner",
		Containers: []*opsv1.ContainerUpgrade{{Name: "app", Image: "app:v2"}},
	}, operation.Environments{"app": {}})
	o := operation.New(c, pod(), disk)
	if err := o.Accept(); err != nil {
		t.Fatal(err)
	}
	return o
}

// prepare makes the upgrade one that waits for its commit.
func prepare(t *testing.T, o *operation.Operation) {
	t.Helper()
	_, err := o.Container(0).Write(func(rec *store.Container, c *opsv1.ContainerOperation) {
		rec.Step, c.Phase = store.StepHeld, opsv1.Phase_PHASE_PREPARED
	})
	if err != nil {
		t.Fatal(err)
	}
}

func TestCommit(t *testing.T) {
	o := upgrade(t, disk(t, t.TempDir()))
	commit := &opsv1.CommitUpgradeRequest{Uid: "op"}
	if err := o.Commit(commit); status.Code(err) != codes.FailedPrecondition {
		t.Errorf("before it is prepared: %v", err)
	}
	prepare(t, o)
	for range 2 {
		if err := o.Commit(commit); err != nil {
			t.Error(err)
		}
	}
	select {
	case <-o.Committed():
	default:
		t.Error("nobody is told of the commit")
	}
	if done, err := o.CancelUncommitted("late"); done || err != nil {
		t.Errorf("cancelled as uncommitted: %t, %v", done, err)
	}
}

func TestCancel(t *testing.T) {
	t.Run("before the point of no return", func(t *testing.T) {
		o := upgrade(t, disk(t, t.TempDir()))
		if err := o.Cancel("enough"); err != nil || !o.IsCancelled() {
			t.Errorf("%v, cancelled: %t", err, o.IsCancelled())
		}
		if o.PassPointOfNoReturn() {
			t.Error("the operation goes on")
		}
	})
	t.Run("after it", func(t *testing.T) {
		o := upgrade(t, disk(t, t.TempDir()))
		if !o.PassPointOfNoReturn() {
			t.Error("the operation does not go on")
		}
		if err := o.Cancel("enough"); status.Code(err) != codes.FailedPrecondition || o.IsCancelled() {
			t.Errorf("%v, cancelled: %t", err, o.IsCancelled())
		}
	})
}

func TestRepeat(t *testing.T) {
	o := upgrade(t, disk(t, t.TempDir()))
	request := func(image string) *opsv1.PrepareUpgradeRequest {
		return &opsv1.PrepareUpgradeRequest{
			Uid: "op", Pod: pod(), Owner: "owner", Requester: "somebody else",
			Containers:  []*opsv1.ContainerUpgrade{{Name: "app", Image: image}},
			Credentials: []*opsv1.RegistryCredential{{Username: "new"}},
		}
	}
	_, _, others := o.Credentials()
	if err := o.Repeat(operation.UpgradeCommand(request("app:v3"), nil)); status.Code(err) != codes.AlreadyExists {
		t.Errorf("with another image: %v", err)
	}
	if err := o.Repeat(operation.UpgradeCommand(request("app:v2"), nil)); err != nil {
		t.Error(err)
	}
	select {
	case <-others:
	default:
		t.Error("nobody is told of the credentials")
	}
	if c, _, _ := o.Credentials(); len(c) != 1 || c[0].GetUsername() != "new" {
		t.Errorf("credentials: %v", c)
	}
}

// What the next process knows of an operation is what has been written.
func TestDecode(t *testing.T) {
	d := disk(t, t.TempDir())
	o := upgrade(t, d)
	prepare(t, o)
	if err := o.Commit(&opsv1.CommitUpgradeRequest{Uid: "op"}); err != nil {
		t.Fatal(err)
	}
	var next *operation.Operation
	err := d.Journal.Load(func(uid string, r *store.Record) (err error) {
		next, err = operation.Decode(uid, r, &store.Store{Records: d.Records, Boot: "another"})
		return err
	}, nil, func(err error) { t.Error(err) })
	if err != nil || next == nil {
		t.Fatalf("no operation: %v", err)
	}
	if next.UID() != "op" || next.Kind() != opsv1.KindUpgrade || next.PodName() != "default/shop" ||
		!next.CommitRequested() || !next.Rebooted() || next.Finished() || next.Phase() != opsv1.Phase_PHASE_PREPARED {
		t.Errorf("operation %v, rebooted %t", next.Snapshot(), next.Rebooted())
	}
	if env, lost := next.Environment("app"); env == nil || lost {
		t.Errorf("environment %v, lost %t", env, lost)
	}
}

func TestConclude(t *testing.T) {
	o := upgrade(t, disk(t, t.TempDir()))
	told := 0
	conclude := func() {
		t.Helper()
		if err := o.Conclude(func(*opsv1.Operation, []operation.Stay) { told++ }); err != nil {
			t.Error(err)
		}
	}
	conclude() // its container has not ended
	_, err := o.Container(0).Write(func(rec *store.Container, c *opsv1.ContainerOperation) {
		rec.Step, c.Phase, c.Message = store.StepDone, opsv1.Phase_PHASE_FAILED, "no such luck"
	})
	if err != nil || told != 0 {
		t.Fatalf("told %d times, %v", told, err)
	}
	conclude()
	op := o.Snapshot()
	if told != 1 || op.GetFinishTime() == nil || op.GetPhase() != opsv1.Phase_PHASE_FAILED ||
		op.GetMessage() != "app: no such luck" {
		t.Errorf("told %d times, operation %v", told, op)
	}
	if _, lost := o.Environment("app"); !lost {
		t.Error("the environment is kept")
	}
}

// stored returns the operation as the next process finds it.
func stored(t *testing.T, d *store.Store) (o *operation.Operation) {
	t.Helper()
	err := d.Journal.Load(func(uid string, r *store.Record) (err error) {
		o, err = operation.Decode(uid, r, d)
		return err
	}, nil, func(err error) { t.Error(err) })
	if err != nil || o == nil {
		t.Fatalf("no operation: %v", err)
	}
	return o
}

// The end of the last container is the end of the operation in the journal. Watchers are told
// later.
func TestEnd(t *testing.T) {
	d := disk(t, t.TempDir())
	c := operation.RestartCommand(&opsv1.RestartRequest{
		Uid: "op", Pod: pod(), Containers: []*opsv1.ContainerRestart{{Name: "app"}, {Name: "web"}},
		Credentials: []*opsv1.RegistryCredential{{Username: "somebody"}},
	}, nil)
	o := operation.New(c, pod(), d)
	if err := o.Accept(); err != nil {
		t.Fatal(err)
	}
	end := func(i int) {
		t.Helper()
		_, err := o.Container(i).End(func(rec *store.Container, c *opsv1.ContainerOperation) {
			rec.Step, c.Phase = store.StepDone, opsv1.Phase_PHASE_SUCCEEDED
		})
		if err != nil {
			t.Fatal(err)
		}
	}
	end(0)
	if stored(t, d).Finished() {
		t.Error("the journal has the end before the last container's")
	}
	end(1)
	if !stored(t, d).Finished() || o.Finished() {
		t.Errorf("finished: %t in the journal, %t for watchers", stored(t, d).Finished(), o.Finished())
	}
	if _, forgotten, _ := stored(t, d).Credentials(); forgotten {
		t.Error("the next process asks for credentials")
	}

	// What comes now changes nothing of the end, and is not lost.
	if err := o.Cancel("enough"); err != nil || o.IsCancelled() {
		t.Errorf("cancelled: %t, %v", o.IsCancelled(), err)
	}
	if done, err := o.CancelUncommitted("enough"); err != nil || done {
		t.Errorf("cancelled: %t, %v", done, err)
	}
	_, err := o.Container(0).Write(func(rec *store.Container, c *opsv1.ContainerOperation) {
		rec.Joined = true
		c.Warnings = append(c.Warnings, "late")
	})
	if err != nil {
		t.Error(err)
	}
	o.Container(1).Show(func(c *opsv1.ContainerOperation) { c.PreStopFailed = true })
	told := 0
	if err := o.Conclude(func(*opsv1.Operation, []operation.Stay) { told++ }); err != nil || told != 1 {
		t.Errorf("told %d times, %v", told, err)
	}
	for who, op := range map[string]*opsv1.Operation{"watchers": o.Snapshot(), "the journal": stored(t, d).Snapshot()} {
		app := op.GetContainers()[0]
		if op.GetPhase() != opsv1.Phase_PHASE_SUCCEEDED || op.GetFinishTime() == nil || len(app.GetWarnings()) != 1 {
			t.Errorf("%s: %v", who, op)
		}
	}
	if !o.Snapshot().GetContainers()[1].GetPreStopFailed() || !stored(t, d).Records()[0].Joined {
		t.Error("a late change is lost")
	}
}

// An end that cannot be written is that of the container in memory; Conclude tries again.
func TestEndIsNotWritten(t *testing.T) {
	d := disk(t, t.TempDir())
	o := upgrade(t, d)
	if err := d.Journal.Close(); err != nil {
		t.Fatal(err)
	}
	change := func(rec *store.Container, c *opsv1.ContainerOperation) {
		rec.Step, c.Phase = store.StepDone, opsv1.Phase_PHASE_SUCCEEDED
	}
	if _, err := o.Container(0).End(change); err == nil || o.Container(0).Record().Step == store.StepDone {
		t.Errorf("step %s, %v", o.Container(0).Record().Step, err)
	}
	ended := func(*opsv1.Operation, []operation.Stay) {}
	if err := o.Conclude(ended); err != nil || o.Finished() {
		t.Errorf("finished: %t, %v", o.Finished(), err)
	}
	o.Container(0).Set(change)
	if err := o.Conclude(ended); err == nil || !o.Finished() {
		t.Errorf("finished: %t, %v", o.Finished(), err)
	}
	d.Journal.Reopen()
	if err := o.Save(); err != nil || !stored(t, d).Finished() {
		t.Errorf("finished: %t, %v", stored(t, d).Finished(), err)
	}
}

func TestWaiters(t *testing.T) {
	waiters, slot := operation.NewWaiters(), view.Slot{PodUID: "uid", Container: "app"}
	up := upgrade(t, disk(t, t.TempDir()))
	if over := waiters.Hold(slot, up); over != nil {
		t.Error("an upgrade does not get a slot that nobody wants")
	}
	holder, got := waiters.Want(slot)
	if holder != up {
		t.Errorf("the slot is held by %v", holder)
	}
	waiters.Leave(slot, up)
	over := waiters.Hold(slot, up)
	if over == nil {
		t.Fatal("an upgrade gets a slot that a restart waits for")
	}
	got()
	<-over
	if over := waiters.Hold(slot, up); over != nil || waiters.Keep(slot, up) {
		t.Error("an upgrade does not get the slot after the restart")
	}
}
