// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package store_test

import (
	"fmt"
	"sync"
	"testing"

	bolt "go.etcd.io/bbolt"
	"google.golang.org/protobuf/proto"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/cri-proxy/cri-proxy/interceptors/view"
	"github.com/cri-proxy/cri-proxy/ops/store"
)

// hangs makes every write of a file wait, as one whose disk hangs does, until letGo is called.
func hangs(t *testing.T, db *bolt.DB) (letGo func()) {
	t.Helper()
	tx, err := db.Begin(true) // there is one writer at a time
	if err != nil {
		t.Fatal(err)
	}
	letGo = sync.OnceFunc(func() {
		if err := tx.Rollback(); err != nil {
			t.Error(err)
		}
	})
	t.Cleanup(letGo)
	return letGo
}

// TestOverridesDoNotWaitForTheDisk writes one override to a disk that hangs; kubelet creates
// containers in its slot and in others meanwhile.
func TestOverridesDoNotWaitForTheDisk(t *testing.T) {
	dir := t.TempDir()
	j, err := store.OpenJournal(dir, quiet())
	if err != nil {
		t.Fatal(err)
	}
	images := map[string]*runtimeapi.Image{"sha256:debug": {Id: "sha256:debug"}, "sha256:spec": {Id: "sha256:spec"}}
	s, err := store.OpenOverrides(j, &nodeImages{images: images}, quiet())
	if err != nil {
		t.Fatal(err)
	}
	db, err := j.DB()
	if err != nil {
		t.Fatal(err)
	}
	letGo := hangs(t, db)
	web := someOverride()
	web.Container = "web"
	s.Set(appSlot, someOverride())
	var writer sync.WaitGroup
	begun := make(chan struct{})
	writer.Go(func() {
		err := s.Write(func(changes map[string][]byte) error {
			close(begun)
			return j.Put("op", &store.Record{}, changes)
		})
		if err != nil {
			t.Error(err)
		}
	})
	<-begun
	request := func(spec string) *runtimeapi.CreateContainerRequest {
		image := &runtimeapi.ImageSpec{Image: "sha256:spec", UserSpecifiedImage: spec}
		return &runtimeapi.CreateContainerRequest{Config: &runtimeapi.ContainerConfig{Image: image}}
	}
	// Each of these would wait for ever.
	other := view.Slot{PodUID: "other", Container: "app"}
	if applied, err := s.Apply(t.Context(), other, request("x:1")); applied || err != nil {
		t.Errorf("in another slot: %v, %v", applied, err)
	}
	if applied, err := s.Apply(t.Context(), appSlot, request("app:v1")); !applied || err != nil {
		t.Errorf("in its own slot: %v, %v", applied, err)
	}
	if applied, err := s.Apply(t.Context(), appSlot, request("app:v2")); applied || err != nil || s.Any() {
		t.Errorf("with another image in the spec, which ends it: %v, %v", applied, err)
	}
	s.Set(web.Slot(), web) // later than the write that is under way
	letGo()
	writer.Wait()
	// What came during the write is not taken for written.
	s.Flush()
	if err := j.Close(); err != nil {
		t.Fatal(err)
	}
	again := overridesIn(t, dir, nil)
	if got := again.List(); len(got) != 1 || got[0].Container != "web" {
		t.Errorf("on disk: %+v", got)
	}
}

// TestRecordsDoNotWaitForTheDisk: kubelet creates, updates and removes containers while the disk
// hangs. Nothing is forgotten.
func TestRecordsDoNotWaitForTheDisk(t *testing.T) {
	dir := t.TempDir()
	r := open(t, dir)
	letGo := hangs(t, dbOf(t, r))
	req := &runtimeapi.CreateContainerRequest{PodSandboxId: "s"}
	raw := wire(t, req)
	r.Created("a", raw) // each would wait for ever
	clear(raw)          // it belongs to the call
	r.Created("b", wire(t, req))
	r.Updated("a", wire(t, &runtimeapi.LinuxContainerResources{CpuShares: 5}))
	r.Updated("a", wire(t, &runtimeapi.LinuxContainerResources{CpusetCpus: "1"}))
	r.Removed("b")
	letGo()
	for range 2 { // the second time as the next process reads it
		if got := r.Request("a"); !proto.Equal(got, req) || r.Request("b") != nil || r.Len() != 1 {
			t.Errorf("%v, %v, %d recorded", got, r.Request("b"), r.Len())
		}
		want := &runtimeapi.LinuxContainerResources{CpuShares: 5, CpusetCpus: "1"}
		if got := r.Resources("a"); !proto.Equal(got, want) {
			t.Errorf("resources are %v, want %v", got, want)
		}
		shut(t, r)
		r = open(t, dir)
	}
	shut(t, r)
}

// TestRecordsOfADiskThatHangsAreBounded: what waits is in memory.
func TestRecordsOfADiskThatHangsAreBounded(t *testing.T) {
	r := open(t, t.TempDir())
	letGo := hangs(t, dbOf(t, r))
	var callers sync.WaitGroup
	const maxUnwritten = 1024 // of package store
	for i := range maxUnwritten + 10 {
		callers.Go(func() { r.Created(fmt.Sprint(i), []byte{}) })
	}
	callers.Wait()
	letGo()
	r.IDs() // waits for them
	if n := r.Len(); n != maxUnwritten {
		t.Errorf("%d recorded", n)
	}
	shut(t, r)
}
