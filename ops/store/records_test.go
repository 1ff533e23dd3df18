// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package store_test

import (
	"bytes"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"testing"

	"github.com/sirupsen/logrus"
	"google.golang.org/protobuf/proto"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/cri-proxy/cri-proxy/ops/store"
)

func open(t *testing.T, dir string) *store.Records {
	t.Helper()
	r, err := store.OpenRecords(dir, quiet())
	if err != nil {
		t.Fatal(err)
	}
	return r
}

func shut(t *testing.T, r *store.Records) {
	t.Helper()
	if err := r.Close(); err != nil {
		t.Fatal(err)
	}
}

func TestRecords(t *testing.T) {
	dir := t.TempDir()
	r := open(t, dir)
	req := &runtimeapi.CreateContainerRequest{PodSandboxId: "s", Config: &runtimeapi.ContainerConfig{
		Envs: []*runtimeapi.KeyValue{{Key: "A", Value: []byte{0xff}}},
	}}
	r.Created("a", wire(t, req))
	r.Created("b", wire(t, req))
	r.Updated("a", wire(t, &runtimeapi.LinuxContainerResources{CpuShares: 5, CpusetCpus: "1"}))
	// What is not set stays, as in the runtime.
	r.Updated("a", wire(t, &runtimeapi.LinuxContainerResources{CpusetCpus: "2"}))
	r.Updated("older", wire(t, &runtimeapi.LinuxContainerResources{CpusetCpus: "3"}))
	r.Updated("a", []byte{0xff})
	r.Removed("b")
	r.Removed("b")
	r.Removed("nope")
	for range 2 { // the second time as the next process reads it
		if got := r.Request("a"); !proto.Equal(got, req) {
			t.Errorf("request is %v", got)
		}
		want := &runtimeapi.LinuxContainerResources{CpuShares: 5, CpusetCpus: "2"}
		if got := r.Resources("a"); !proto.Equal(got, want) {
			t.Errorf("resources are %v, want %v", got, want)
		}
		if got := r.Resources("older"); got.GetCpusetCpus() != "3" {
			t.Errorf("resources of a container without a request are %v", got)
		}
		if r.Request("b") != nil || r.Resources("b") != nil || r.Request("older") != nil {
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
	if r.Request("a") != nil || len(r.IDs()) != 0 {
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
	if r.Len() != 0 || r.Request("a") != nil {
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
			} else if err := os.WriteFile(filepath.Join(dir, "records.boot"), []byte(store.BootID()),
				0o600); err != nil {
				t.Fatal(err)
			}
			r := open(t, dir)
			defer shut(t, r)
			r.Created("new", wire(t, &runtimeapi.CreateContainerRequest{PodSandboxId: "s"}))
			if r.Request("new").GetPodSandboxId() != "s" {
				t.Error("does not record")
			}
		})
	}
}

// A busy node: containers of realistic size come and go, and the file does not grow with their
// number.
func TestRecordsStaySmall(t *testing.T) {
	const slots, live, total = 60, 2 * 60, 1500
	r, err := store.OpenRecords(t.TempDir(), logrus.New())
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	random := rand.New(rand.NewPCG(1, 2))
	var ids []string
	bytesLive, most := 0, 0
	lengths := map[string]int{}
	sizes := map[int]int64{}
	for i := 1; i <= total; i++ {
		id := fmt.Sprintf("%064x", random.Uint64())
		// 4 to 60 KiB: environment variables, of many services, and mounts are most of it.
		request := bytes.Repeat([]byte{byte(i)}, 4<<10+random.IntN(56<<10))
		r.Created(id, request)
		ids = append(ids, id)
		lengths[id] = len(request)
		bytesLive += len(request)
		most = max(most, bytesLive)
		if len(ids) > live {
			j := random.IntN(slots) // an old one, not the oldest
			r.Removed(ids[j])
			bytesLive -= lengths[ids[j]]
			ids = append(ids[:j], ids[j+1:]...)
		}
		if i%500 == 0 {
			sizes[i] = fileSize(t, dbOf(t, r).Path())
		}
	}
	t.Logf("records.db: %v with at most %d bytes of requests", sizes, most)
	if r.Len() != live {
		t.Errorf("%d containers are recorded, want %d", r.Len(), live)
	}
	if sizes[total] > sizes[500] || sizes[total] > 4*int64(most) {
		t.Errorf("records.db has %d bytes after %d containers, %d after 500", sizes[total], total, sizes[500])
	}
}
