// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package boltfile

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/sirupsen/logrus"
	bolt "go.etcd.io/bbolt"
)

var bucket = []byte("things")

// options keep what was read of the file.
func options(read map[string]string) (Options, *bytes.Buffer) {
	var out bytes.Buffer
	log := logrus.New()
	log.SetOutput(&out)
	return Options{
		Buckets: [][]byte{bucket}, Lost: "things are lost", Missing: "no things", Log: log,
		Read: func(tx *bolt.Tx) error {
			return tx.Bucket(bucket).ForEach(func(k, v []byte) error {
				read[string(k)] = string(v)
				return nil
			})
		},
	}, &out
}

func put(f *File, n int) error {
	return f.Update(func(tx *bolt.Tx) error {
		for i := range n {
			if err := tx.Bucket(bucket).
				Put(fmt.Appendf(nil, "key %d", i), bytes.Repeat([]byte("value"), 100)); err != nil {
				return err
			}
		}
		return nil
	})
}

func open(t *testing.T, path string) (*File, map[string]string, string) {
	t.Helper()
	read := map[string]string{}
	o, out := options(read)
	f, err := Open(path, o)
	if err != nil {
		t.Fatal(err)
	}
	return f, read, out.String()
}

func TestKeeps(t *testing.T) {
	path := filepath.Join(t.TempDir(), "things.db")
	f, read, _ := open(t, path)
	if len(read) != 0 || !f.IsOpen() {
		t.Errorf("a new file has %v, open %t", read, f.IsOpen())
	}
	if err := errors.Join(put(f, 3), f.Close()); err != nil {
		t.Fatal(err)
	}
	if st, err := os.Stat(path); err != nil || st.Mode().Perm() != 0o600 {
		t.Errorf("%v, %v", st, err)
	}
	f, read, said := open(t, path)
	defer f.Close()
	if len(read) != 3 || said != "" {
		t.Errorf("read %v, said %q", read, said)
	}
}

func TestDamaged(t *testing.T) {
	path := filepath.Join(t.TempDir(), "things.db")
	f, _, _ := open(t, path)
	if err := errors.Join(put(f, 200), f.Close()); err != nil {
		t.Fatal(err)
	}
	whole, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	page := os.Getpagesize()
	for name, content := range map[string][]byte{
		"zeroes":           make([]byte, 1<<16),
		"garbage":          bytes.Repeat([]byte("garbage "), 10_000),
		"only the metas":   whole[:2*page],
		"shorter":          whole[:len(whole)/2/page*page],
		"zeroed pages":     append(bytes.Clone(whole[:2*page]), make([]byte, len(whole)-2*page)...),
		"garbage in pages": append(bytes.Clone(whole[:2*page]), bytes.Repeat([]byte{0xa5}, len(whole)-2*page)...),
	} {
		t.Run(name, func(t *testing.T) {
			path := filepath.Join(t.TempDir(), "things.db")
			if err := os.WriteFile(path, content, 0o600); err != nil {
				t.Fatal(err)
			}
			f, _, said := open(t, path)
			if err := errors.Join(put(f, 1), f.Close()); err != nil {
				t.Fatal(err)
			}
			aside, err := filepath.Glob(path + ".unreadable-*")
			if err != nil || len(aside) != 1 || !strings.Contains(said, "starting anew: things are lost") {
				t.Fatalf("set aside are %q, %v; said %s", aside, err, said)
			}
			if kept, err := os.ReadFile(aside[0]); err != nil ||
				!bytes.HasPrefix(kept, content[:page]) && !bytes.Equal(kept, content) {
				t.Errorf("what was set aside is something else, %v", err)
			}
		})
	}
}

// What cannot be had now may be had later.
func TestCannotBeMade(t *testing.T) {
	path := filepath.Join(t.TempDir(), "things.db")
	if err := os.MkdirAll(filepath.Join(path, "in the way"), 0o700); err != nil {
		t.Fatal(err)
	}
	f, _, said := open(t, path)
	if f.IsOpen() || !strings.Contains(said, "cannot be opened: no things") {
		t.Errorf("open %t, said %s", f.IsOpen(), said)
	}
	if err := put(f, 1); err == nil || !strings.Contains(err.Error(), path) {
		t.Errorf("got %v", err)
	}
	if err := os.RemoveAll(path); err != nil {
		t.Fatal(err)
	}
	if err := errors.Join(put(f, 1), f.Close()); err != nil {
		t.Error(err)
	}
}

// A file that has been given to another process is not taken from it by who still asks here,
// whether it could be had before or not.
func TestClosed(t *testing.T) {
	for name, missing := range map[string]bool{"had before": false, "not had before": true} {
		t.Run(name, func(t *testing.T) {
			path := filepath.Join(t.TempDir(), "things.db")
			if missing {
				if err := os.Mkdir(path, 0o700); err != nil {
					t.Fatal(err)
				}
			}
			f, _, _ := open(t, path)
			if f.IsOpen() == missing {
				t.Fatalf("open %t", f.IsOpen())
			}
			if err := f.Close(); err != nil {
				t.Fatal(err)
			}
			if err := os.Remove(path); err != nil {
				t.Fatal(err)
			}
			if _, err := f.DB(); !errors.Is(err, ErrClosed) || !strings.Contains(err.Error(), path) {
				t.Errorf("got %v", err)
			}
			if err := put(f, 1); !errors.Is(err, ErrClosed) || f.IsOpen() {
				t.Errorf("got %v, open %t", err, f.IsOpen())
			}
			if _, err := os.Lstat(path); !errors.Is(err, fs.ErrNotExist) {
				t.Errorf("made anew: %v", err)
			}
			next, _, _ := open(t, path)
			if err := errors.Join(put(next, 1), next.Close(), f.Close()); err != nil {
				t.Error(err)
			}
			f.Reopen()
			if err := errors.Join(put(f, 2), f.Close()); err != nil {
				t.Errorf("taken back: %v", err)
			}
		})
	}
}

func TestRefused(t *testing.T) {
	dir := t.TempDir()
	o, _ := options(map[string]string{})
	o.Log.(*logrus.Logger).SetOutput(io.Discard)
	if _, err := Open(filepath.Join(dir, "nowhere", "things.db"), o); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("no directory: %v", err)
	}
	// A reader that refuses is no damage.
	o.Read = func(*bolt.Tx) error { return errors.New("not now") }
	if _, err := OpenDB(filepath.Join(dir, "things.db"), o); err == nil || errors.Is(err, ErrDamaged) {
		t.Errorf("got %v", err)
	}
}
