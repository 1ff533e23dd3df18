// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package ops_test

import (
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"testing"

	"github.com/sirupsen/logrus"
	bolt "go.etcd.io/bbolt"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/timestamppb"

	opsv1 "github.com/cri-proxy/cri-proxy/api/ops/v1"
	"github.com/cri-proxy/cri-proxy/interceptors/view"
	"github.com/cri-proxy/cri-proxy/ops/operation"
)

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

func TestRecordsAreTidied(t *testing.T) {
	n := newNode(t, podOptions{})
	n.engine.node.Records.Created("gone", nil)
	n.engine.node.Records.Updated("gone too", nil)
	n.engine.Tidy(t.Context())
	if n.engine.node.Records.Len() != 2 || len(n.engine.node.Records.IDs()) != 2 {
		t.Errorf("recorded are %q, want those of the two containers there are", n.engine.node.Records.IDs())
	}
}

// The environments of an operation that is not accepted are not kept.
func TestEnvironmentsOfRefusedOperations(t *testing.T) {
	dir := t.TempDir()
	if err := os.MkdirAll(filepath.Join(dir, "journal.db", "in the way"), 0o700); err != nil {
		t.Fatal(err)
	}
	e, err := openEngine(dir, view.New())
	if err != nil {
		t.Fatal(err)
	}
	defer func() {
		if err := e.Close(); err != nil {
			t.Error(err)
		}
	}()
	given := operation.Environments{"app": environmentOf(1)}
	if _, err := e.Submit(operation.RestartCommand(restartRequest("op"), given), podRef()); err == nil {
		t.Fatal("accepted without a journal")
	}
	if e.node.Records.Environment("op", "app") != nil {
		t.Error("the environment is still there")
	}
}

// What a process could not forget, the next one does, but for operations that go on or are not this
// binary's.
func TestEnvironmentsAreTidied(t *testing.T) {
	dir := t.TempDir()
	e, err := openEngine(dir, view.New())
	if err != nil {
		t.Fatal(err)
	}
	for _, uid := range []string{"waits", "a/b", "ended"} {
		given := operation.Environments{"app": environmentOf(1)}
		o, err := e.Submit(operation.RestartCommand(restartRequest(uid), given), podRef())
		if err != nil {
			t.Fatal(err)
		}
		if uid == "ended" {
			o.Change(func(op *opsv1.Operation) { op.FinishTime = timestamppb.Now() })
			if err := o.Save(); err != nil {
				t.Fatal(err)
			}
		}
	}
	e.node.Records.SetEnvironment("unknown", "app", environmentOf(1))
	e.node.Records.SetEnvironment("newer", "app", environmentOf(1))
	err = e.disk.Journal.Update(func(tx *bolt.Tx) error {
		return tx.Bucket(bucketOperations).Put([]byte("newer"), fmt.Appendf(nil, `{"Version": %d}`, 2))
	})
	if err := errors.Join(err, e.Close()); err != nil {
		t.Fatal(err)
	}
	if e, err = openEngine(dir, view.New()); err != nil {
		t.Fatal(err)
	}
	for uid, want := range map[string]bool{"waits": true, "a/b": true, "newer": true, "ended": false,
		"unknown": false} {
		if got := e.node.Records.Environment(uid, "app") != nil; got != want {
			t.Errorf("the environment of operation %s is there: %v, want %v", uid, got, want)
		}
	}
	if err := e.Close(); err != nil {
		t.Fatal(err)
	}
}
