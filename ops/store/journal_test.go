// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package store_test

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	bolt "go.etcd.io/bbolt"

	"github.com/cri-proxy/cri-proxy/ops/boltfile"
	"github.com/cri-proxy/cri-proxy/ops/store"
)

// A journal that is not one must not keep kubelet from being served.
func TestJournalThatIsDamaged(t *testing.T) {
	whole := func() []byte {
		records := map[string]*store.Record{}
		for i := range 50 {
			uid := fmt.Sprintf("op-%d", i)
			records[uid] = entry(t, uid, store.StepStop, time.Now())
		}
		b, err := os.ReadFile(filepath.Join(journalWith(t, records), "journal.db"))
		if err != nil {
			t.Fatal(err)
		}
		return b
	}()
	page := os.Getpagesize()
	for name, content := range map[string][]byte{
		"zeroes":           make([]byte, 1<<16),
		"garbage":          bytes.Repeat([]byte("garbage "), 10_000),
		"only the metas":   whole[:2*page],
		"zeroed pages":     append(bytes.Clone(whole[:2*page]), make([]byte, len(whole)-2*page)...),
		"garbage in pages": append(bytes.Clone(whole[:2*page]), bytes.Repeat([]byte{0xa5}, len(whole)-2*page)...),
	} {
		t.Run(name, func(t *testing.T) {
			dir := t.TempDir()
			if err := os.WriteFile(filepath.Join(dir, "journal.db"), content, 0o600); err != nil {
				t.Fatal(err)
			}
			j, err := store.OpenJournal(dir, quiet())
			if err != nil {
				t.Fatal(err)
			}
			if err := errors.Join(j.Put("op", &store.Record{}, nil), j.Close()); err != nil {
				t.Fatal(err)
			}
			aside, err := filepath.Glob(filepath.Join(dir, "journal.db.unreadable-*"))
			if err != nil || len(aside) != 1 {
				t.Errorf("set aside are %q, %v", aside, err)
			}
		})
	}
}

func TestJournalFile(t *testing.T) {
	dir := t.TempDir()
	j, err := store.OpenJournal(dir, quiet())
	if err != nil {
		t.Fatal(err)
	}
	if st, err := os.Stat(filepath.Join(dir, "journal.db")); err != nil || st.Mode().Perm() != 0o600 {
		t.Errorf("mode is %v, %v", st.Mode(), err)
	}
	want := entry(t, "op", store.StepStop, time.Now())
	want.Containers[0].StopBy = time.Now().UTC()
	want.Containers[0].Retried, want.Containers[0].PostStarted = true, true
	if err := errors.Join(
		j.Put("op", want, nil), j.Put("b", &store.Record{}, nil), j.Put("c", &store.Record{}, nil),
		j.Remove(nil), j.Remove([]string{"b", "c", "never"}),
	); err != nil {
		t.Fatal(err)
	}
	n := 0
	err = j.Load(func(uid string, got *store.Record) error {
		n++
		a, b := fmt.Sprintf("%q %+v", uid, got), fmt.Sprintf("%q %+v", "op", want)
		if !got.Containers[0].StopBy.Equal(want.Containers[0].StopBy) {
			t.Errorf("got  %s\nwant %s", a, b)
		}
		got.Containers[0].StopBy = want.Containers[0].StopBy
		if a, b := fmt.Sprintf("%q %+v", uid, got), fmt.Sprintf("%q %+v", "op", want); a != b {
			t.Errorf("got  %s\nwant %s", a, b)
		}
		return nil
	}, func(uid string, _ []byte, _ *store.Record, why string) {
		t.Errorf("%s is left: %s", uid, why)
	}, func(err error) { t.Error(err) })
	if err != nil || n != 1 {
		t.Errorf("%d records, %v", n, err)
	}
	err = j.Update(func(tx *bolt.Tx) error { return tx.Bucket(bucketOperations).Put([]byte("x"), []byte("{")) })
	if err != nil {
		t.Fatal(err)
	}
	for _, want := range []string{"operation x: ", ""} { // set aside the first time, gone the second
		var bad error
		if err := j.Load(func(string, *store.Record) error { return nil }, nil,
			func(err error) { bad = err }); err != nil {
			t.Fatal(err)
		}
		if got := fmt.Sprint(bad); (bad == nil) != (want == "") || !strings.Contains(got, want) {
			t.Errorf("got %v, want %q", bad, want)
		}
	}
	if err := j.Close(); err != nil {
		t.Fatal(err)
	}
	if err := j.Put("op", want, nil); !errors.Is(err, boltfile.ErrClosed) {
		t.Errorf("a closed journal: %v", err)
	}
}

// The file says of which version it is, from the first write on; one without is read as before.
func TestJournalVersion(t *testing.T) {
	dir := t.TempDir()
	j, err := store.OpenJournal(dir, quiet())
	if err != nil {
		t.Fatal(err)
	}
	const schemaVersion = 1
	bucketMeta, keyVersion := []byte("meta"), []byte("version")
	version := func() (v uint64) {
		err := j.View(func(tx *bolt.Tx) error {
			if b := tx.Bucket(bucketMeta); b != nil {
				v, _ = binary.Uvarint(b.Get(keyVersion))
			}
			return nil
		})
		if err != nil {
			t.Fatal(err)
		}
		return v
	}
	if v := version(); v != 0 {
		t.Errorf("version %d before a write", v)
	}
	if err := j.Put("op", &store.Record{}, nil); err != nil {
		t.Fatal(err)
	}
	if v := version(); v != schemaVersion {
		t.Errorf("version %d", v)
	}
	// A newer file stays one.
	err = j.Update(func(tx *bolt.Tx) error { return tx.Bucket(bucketMeta).Put(keyVersion, []byte{schemaVersion + 5}) })
	if err := errors.Join(err, j.Put("op", &store.Record{}, nil)); err != nil {
		t.Fatal(err)
	}
	if v := version(); v != schemaVersion+5 {
		t.Errorf("version %d", v)
	}
	if err := j.Close(); err != nil {
		t.Fatal(err)
	}
}
