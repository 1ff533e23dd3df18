// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package store_test

import (
	"io"
	"os"
	"testing"
	"time"

	"github.com/sirupsen/logrus"
	bolt "go.etcd.io/bbolt"
	"go.uber.org/goleak"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/timestamppb"

	opsv1 "github.com/cri-proxy/cri-proxy/api/ops/v1"
	"github.com/cri-proxy/cri-proxy/ops/store"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

const podUID = "11111111-2222-3333-4444-555555555555"

// bucketOperations is in journal.db; see schema.go.
var bucketOperations = []byte("operations")

func quiet() logrus.FieldLogger {
	log := logrus.New()
	log.SetOutput(io.Discard)
	return log
}

func wire(t testing.TB, m proto.Message) []byte {
	t.Helper()
	b, err := proto.Marshal(m)
	if err != nil {
		t.Fatal(err)
	}
	return b
}

// entry is a journal record of a restart of app at a step.
func entry(t testing.TB, uid string, at store.Step, created time.Time) *store.Record {
	t.Helper()
	pod := &opsv1.PodRef{Namespace: "default", Name: "shop", Uid: podUID}
	return &store.Record{
		Operation: wire(t, &opsv1.Operation{
			Uid: uid, Kind: opsv1.KindRestart, Pod: pod, CreateTime: timestamppb.New(created),
			Phase:      opsv1.Phase_PHASE_PENDING,
			Containers: []*opsv1.ContainerOperation{{Name: "app", Phase: opsv1.Phase_PHASE_PENDING}},
		}),
		Request: wire(t, &opsv1.RestartRequest{
			Uid: uid, Pod: pod, Containers: []*opsv1.ContainerRestart{{Name: "app"}}, Requester: "test",
		}),
		Containers: []store.Container{{
			Step: at, Sandbox: "s", Incumbent: "old", Successor: "new", Token: "0123456789abcdef0123456789abcdef",
		}},
	}
}

// journalWith returns a directory with a journal that has the records.
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

// dbOf returns the file of records.
func dbOf(t testing.TB, r *store.Records) (db *bolt.DB) {
	t.Helper()
	if err := r.View(func(tx *bolt.Tx) error { db = tx.DB(); return nil }); err != nil {
		t.Fatal(err)
	}
	return db
}

func fileSize(t testing.TB, path string) int64 {
	t.Helper()
	fi, err := os.Stat(path)
	if err != nil {
		t.Fatal(err)
	}
	return fi.Size()
}
