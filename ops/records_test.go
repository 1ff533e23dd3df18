// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package ops

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"sync"
	"testing"

	"github.com/sirupsen/logrus"
	bolt "go.etcd.io/bbolt"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/timestamppb"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/cri-proxy/cri-proxy/interceptors"
)

func quiet() logrus.FieldLogger {
	log := logrus.New()
	log.SetOutput(io.Discard)
	return log
}

func open(t *testing.T, dir string) *Records {
	t.Helper()
	r, err := openRecords(dir, quiet())
	if err != nil {
		t.Fatal(err)
	}
	return r
}

func shut(t *testing.T, r *Records) {
	t.Helper()
	if err := r.close(); err != nil {
		t.Fatal(err)
	}
}

func wire(t testing.TB, m proto.Message) []byte {
	t.Helper()
	b, err := proto.Marshal(m)
	if err != nil {
		t.Fatal(err)
	}
	return b
}

func TestRecords(t *testing.T) {
	dir := t.TempDir()
	r := open(t, dir)
	req := &runtimeapi.CreateContainerRequest{PodSandboxId: "s", Config: &runtimeapi.ContainerConfig{Envs: []*runtimeapi.KeyValue{{Key: "A", Value: []byte{0xff}}}}}
	r.Created("a", wire(t, req))
	r.Created("b", wire(t, req))
	r.Updated("a", wire(t, &runtimeapi.LinuxContainerResources{CpuShares: 5, CpusetCpus: "1"}))
	r.Updated("a", wire(t, &runtimeapi.LinuxContainerResources{CpusetCpus: "2"})) // what is not set stays, as in the runtime
	r.Updated("older", wire(t, &runtimeapi.LinuxContainerResources{CpusetCpus: "3"}))
	r.Updated("a", []byte{0xff})
	r.Removed("b")
	r.Removed("b")
	r.Removed("nope")
	for range 2 { // the second time as the next process reads it
		if got := r.request("a"); !proto.Equal(got, req) {
			t.Errorf("request is %v", got)
		}
		if got, want := r.resources("a"), (&runtimeapi.LinuxContainerResources{CpuShares: 5, CpusetCpus: "2"}); !proto.Equal(got, want) {
			t.Errorf("resources are %v, want %v", got, want)
		}
		if got := r.resources("older"); got.GetCpusetCpus() != "3" {
			t.Errorf("resources of a container without a request are %v", got)
		}
		if r.request("b") != nil || r.resources("b") != nil || r.request("older") != nil {
			t.Error("there is more than was recorded")
		}
		if r.Len() != 1 {
			t.Errorf("%d recorded", r.Len())
		}
		shut(t, r)
		r = open(t, dir)
	}
	shut(t, r)
	st, err := os.Stat(filepath.Join(dir, "records.db"))
	if err != nil || st.Mode().Perm() != 0o600 {
		t.Errorf("the file, which holds environments, has mode %v, %v", st.Mode(), err)
	}
	// A closed store, or a request that cannot be read, is not the caller's business.
	r.Created("a", nil)
	r.Removed("a")
	if r.request("a") != nil || len(r.ids()) != 0 {
		t.Error("a closed store answers")
	}
}

func TestRecordsOfAnotherBoot(t *testing.T) {
	dir := t.TempDir()
	r := open(t, dir)
	r.Created("a", nil)
	shut(t, r)
	if err := os.WriteFile(filepath.Join(dir, "records.boot"), []byte("another"), 0o600); err != nil {
		t.Fatal(err)
	}
	r = open(t, dir)
	defer shut(t, r)
	if r.Len() != 0 || r.request("a") != nil {
		t.Error("containers of another boot are recorded")
	}
}

// The file is not synced, so that a power cut may leave anything.
func TestRecordsThatAreTorn(t *testing.T) {
	dir := t.TempDir()
	r := open(t, dir)
	big := bytes.Repeat([]byte("x"), 3000)
	for i := range 200 {
		r.Created(string(rune('a'+i%26))+string(rune('a'+i/26)), big)
	}
	shut(t, r)
	whole, err := os.ReadFile(filepath.Join(dir, "records.db"))
	if err != nil {
		t.Fatal(err)
	}
	page := os.Getpagesize()
	cases := map[string][]byte{
		"empty":            {},
		"one byte":         {1},
		"garbage":          bytes.Repeat([]byte("garbage "), 10_000),
		"only the metas":   whole[:2*page],
		"half":             whole[:len(whole)/2],
		"zeroed metas":     append(make([]byte, 2*page), whole[2*page:]...),
		"zeroed pages":     append(bytes.Clone(whole[:2*page]), make([]byte, len(whole)-2*page)...),
		"garbage in pages": append(bytes.Clone(whole[:2*page]), bytes.Repeat([]byte{0xa5}, len(whole)-2*page)...),
	}
	for name, torn := range cases {
		t.Run(name, func(t *testing.T) {
			dir := t.TempDir()
			path := filepath.Join(dir, "records.db")
			if err := os.WriteFile(path, torn, 0o600); err != nil {
				t.Fatal(err)
			}
			if name != "garbage" { // which is refused without a panic, of whatever boot
				if err := os.WriteFile(filepath.Join(dir, "records.boot"), []byte("another"), 0o600); err != nil {
					t.Fatal(err)
				}
			} else if err := os.WriteFile(filepath.Join(dir, "records.boot"), []byte(bootID()), 0o600); err != nil {
				t.Fatal(err)
			}
			r := open(t, dir)
			defer shut(t, r)
			r.Created("new", wire(t, &runtimeapi.CreateContainerRequest{PodSandboxId: "s"}))
			if r.request("new").GetPodSandboxId() != "s" {
				t.Error("does not record")
			}
		})
	}
}

func TestRecordsAreTidied(t *testing.T) {
	n := newNode(t, podOptions{})
	n.engine.records.Created("gone", nil)
	n.engine.records.Updated("gone too", nil)
	n.engine.tidy(t.Context(), &sync.WaitGroup{})
	if n.engine.records.Len() != 2 || len(n.engine.records.ids()) != 2 {
		t.Errorf("recorded are %q, want those of the two containers there are", n.engine.records.ids())
	}
}

// The environments of an operation that is not accepted are not kept.
func TestEnvironmentsOfRefusedOperations(t *testing.T) {
	dir := t.TempDir()
	if err := os.MkdirAll(filepath.Join(dir, "journal.db", "in the way"), 0o700); err != nil {
		t.Fatal(err)
	}
	e, err := openEngine(dir, interceptors.NewView())
	if err != nil {
		t.Fatal(err)
	}
	defer func() {
		if err := e.Close(); err != nil {
			t.Error(err)
		}
	}()
	if _, err := e.submit(restartRequest("op"), environments{"app": environmentOf(1)}, podRef()); err == nil {
		t.Fatal("accepted without a journal")
	}
	if e.records.environment("op", "app") != nil {
		t.Error("the environment is still there")
	}
}

// What a process could not forget, the next one does, but for operations that go on or are not this binary's.
func TestEnvironmentsAreTidied(t *testing.T) {
	dir := t.TempDir()
	e, err := openEngine(dir, interceptors.NewView())
	if err != nil {
		t.Fatal(err)
	}
	for _, uid := range []string{"waits", "a/b", "ended"} {
		o, err := e.submit(restartRequest(uid), environments{"app": environmentOf(1)}, podRef())
		if err != nil {
			t.Fatal(err)
		}
		if uid == "ended" {
			o.op.FinishTime = timestamppb.Now()
			if err := e.save(o); err != nil {
				t.Fatal(err)
			}
		}
	}
	e.records.setEnvironment("unknown", "app", environmentOf(1))
	e.records.setEnvironment("newer", "app", environmentOf(1))
	err = e.journal.update(func(tx *bolt.Tx) error {
		return tx.Bucket(bucketOperations).Put([]byte("newer"), fmt.Appendf(nil, `{"Version": %d}`, schemaVersion+1))
	})
	if err := errors.Join(err, e.Close()); err != nil {
		t.Fatal(err)
	}
	if e, err = openEngine(dir, interceptors.NewView()); err != nil {
		t.Fatal(err)
	}
	for uid, want := range map[string]bool{"waits": true, "a/b": true, "newer": true, "ended": false, "unknown": false} {
		if got := e.records.environment(uid, "app") != nil; got != want {
			t.Errorf("the environment of operation %s is there: %v, want %v", uid, got, want)
		}
	}
	if err := e.Close(); err != nil {
		t.Fatal(err)
	}
}
