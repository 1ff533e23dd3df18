// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package store_test

import (
	"bytes"
	"encoding/json"
	"errors"
	"os"
	"path/filepath"
	"reflect"
	"testing"
	"time"

	bolt "go.etcd.io/bbolt"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/durationpb"
	"google.golang.org/protobuf/types/known/timestamppb"

	opsv1 "github.com/cri-proxy/cri-proxy/api/ops/v1"
	"github.com/cri-proxy/cri-proxy/ops/cgroup"
	"github.com/cri-proxy/cri-proxy/ops/store"
)

// goldenTime is when everything in the golden records has happened.
var goldenTime = time.Date(2026, 11, 30, 12, 0, 0, 123456789, time.UTC)

// goldenUpgrade is the request of the golden upgrade.
func goldenUpgrade() *opsv1.PrepareUpgradeRequest {
	return &opsv1.PrepareUpgradeRequest{
		Uid: "golden", Pod: &opsv1.PodRef{Namespace: "default", Name: "shop", Uid: podUID}, Requester: "test",
		Owner:       "owner",
		Containers:  []*opsv1.ContainerUpgrade{{Name: "app", ExpectedContainerId: "old", Image: "app:v2"}},
		HoldTimeout: durationpb.New(time.Minute),
	}
}

// goldenRecord is the record of an operation at a step, with everything in it that a record can
// have.
func goldenRecord(t *testing.T, upgrade bool, at store.Step) *store.Record {
	t.Helper()
	pod := &opsv1.PodRef{Namespace: "default", Name: "shop", Uid: podUID}
	op := &opsv1.Operation{
		Uid: "golden", Kind: "Restart", Pod: pod, CreateTime: timestamppb.New(goldenTime), Requester: "test",
		Phase:      opsv1.Phase_PHASE_STOPPING,
		Containers: []*opsv1.ContainerOperation{{Name: "app", Phase: opsv1.Phase_PHASE_STOPPING, Image: "app:v2"}},
	}
	req := &opsv1.RestartRequest{
		Uid: "golden", Pod: pod, Requester: "test",
		Containers: []*opsv1.ContainerRestart{{Name: "app", ExpectedContainerId: "old"}},
	}
	r := &store.Record{Version: 1, Boot: "boot", Credentials: true, Environments: []string{"app"}}
	if upgrade {
		op.Kind = "Upgrade"
		r.Upgrade, r.CommitRequested = wire(t, goldenUpgrade()), true
	} else {
		r.Cancelled = at == store.StepUndo
	}
	r.Operation, r.Request = wire(t, op), wire(t, req)
	r.Containers = []store.Container{{
		Step: at, Sandbox: "sandbox", Incumbent: "old", Successor: "new", Token: "0123456789abcdef0123456789abcdef",
		Retried: true, StopBy: goldenTime, PostStarted: true, PostDone: true, Method: "gate",
		Override: &store.Override{
			PodUID: podUID, Namespace: "default", Pod: "shop", Container: "app", Image: "app:debug",
			ImageID:   "sha256:debug",
			SpecImage: "app:v1", NonRoot: true, Since: goldenTime, Requester: "test", Operation: "golden",
		},
		Grace: 30, HoldSince: goldenTime, Asked: true, StopFirst: true, Joined: true,
		Raised: &cgroup.Raise{Dir: "/sys/fs/cgroup/pod", V2: true, Base: 64 << 20, By: 32 << 20, Swap: 64 << 20},
	}}
	return r
}

// The golden records were written by cri-proxy as of commit a296463, which is before package store:
// a node may be upgraded in the middle of an operation. This binary reads them, and writes the
// same.
func TestGoldenRecords(t *testing.T) {
	for kind, upgrade := range map[string]bool{"restart": false, "upgrade": true} {
		for _, at := range allSteps {
			name := string(at)
			if at == store.StepNone {
				name = "none"
			}
			t.Run(kind+" "+name, func(t *testing.T) {
				raw, err := os.ReadFile(filepath.Join("testdata", "journal", kind+"-"+name+".json"))
				if err != nil {
					t.Fatal(err)
				}
				got, want := loadRaw(t, raw), goldenRecord(t, upgrade, at)
				for _, m := range []struct {
					message   proto.Message
					got, want *[]byte
				}{
					{&opsv1.Operation{}, &got.Operation, &want.Operation},
					{&opsv1.RestartRequest{}, &got.Request, &want.Request},
					{&opsv1.PrepareUpgradeRequest{}, &got.Upgrade, &want.Upgrade},
				} {
					other := proto.Clone(m.message)
					err := errors.Join(proto.Unmarshal(*m.got, m.message), proto.Unmarshal(*m.want, other))
					if err != nil || !proto.Equal(m.message, other) {
						t.Errorf("got %v, want %v", m.message, other)
					}
					*m.want = *m.got // the same message may have other bytes
				}
				if !reflect.DeepEqual(got, want) {
					t.Errorf("got  %+v\nwant %+v", got, want)
				}
				if again, err := json.Marshal(got); err != nil || !bytes.Equal(again, raw) {
					t.Errorf("%v, written again it is\n%s\nit was\n%s", err, again, raw)
				}
			})
		}
	}
}

// loadRaw is what the journal makes of the bytes of a record.
func loadRaw(t *testing.T, raw []byte) (out *store.Record) {
	t.Helper()
	j, err := store.OpenJournal(t.TempDir(), quiet())
	if err != nil {
		t.Fatal(err)
	}
	defer j.Close()
	err = j.Update(func(tx *bolt.Tx) error { return tx.Bucket(bucketOperations).Put([]byte("golden"), raw) })
	if err != nil {
		t.Fatal(err)
	}
	err = j.Load(
		func(_ string, r *store.Record) error { out = r; return nil },
		func(_ string, _ []byte, _ *store.Record, why string) { t.Error("left alone: " + why) },
		func(err error) { t.Error(err) },
	)
	if err != nil || out == nil {
		t.Fatalf("not loaded: %v", err)
	}
	return out
}

// The golden override is of the same commit.
func TestGoldenOverride(t *testing.T) {
	raw, err := os.ReadFile(filepath.Join("testdata", "journal", "override.json"))
	if err != nil {
		t.Fatal(err)
	}
	j, err := store.OpenJournal(t.TempDir(), quiet())
	if err != nil {
		t.Fatal(err)
	}
	defer j.Close()
	err = j.Update(func(tx *bolt.Tx) error {
		b, err := tx.CreateBucketIfNotExists([]byte("overrides"))
		if err != nil {
			return err
		}
		return b.Put([]byte(podUID+"/app"), raw)
	})
	if err != nil {
		t.Fatal(err)
	}
	s, err := store.OpenOverrides(j, nil, quiet())
	if err != nil {
		t.Fatal(err)
	}
	want := goldenRecord(t, false, store.StepStop).Containers[0].Override
	if got := s.List(); len(got) != 1 || !reflect.DeepEqual(got[0], want) {
		t.Errorf("got %+v, want %+v", got, want)
	}
	if again, err := json.Marshal(want); err != nil || !bytes.Equal(again, raw) {
		t.Errorf("%v, written again it is\n%s\nit was\n%s", err, again, raw)
	}
}
