// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package atomicfile_test

import (
	"errors"
	"os"
	"path/filepath"
	"testing"
	"testing/iotest"

	"github.com/cri-proxy/cri-proxy/internal/atomicfile"
)

func TestWrite(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "new")
	path := filepath.Join(dir, "file")
	for content, mode := range map[string]os.FileMode{"one": 0o600, "another": 0o755} {
		if err := atomicfile.Write(path, []byte(content), mode); err != nil {
			t.Fatal(err)
		}
		b, err := os.ReadFile(path)
		if err != nil || string(b) != content {
			t.Errorf("%q, %v", b, err)
		}
		if fi, err := os.Stat(path); err != nil || fi.Mode() != mode {
			t.Errorf("%v, %v", fi.Mode(), err)
		}
	}
	before, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	broken := errors.New("broken")
	if err := atomicfile.Copy(path, iotest.ErrReader(broken), 0o600); !errors.Is(err, broken) {
		t.Error(err)
	}
	after, err := os.ReadFile(path)
	if err != nil || string(after) != string(before) {
		t.Errorf("%q, %v", after, err)
	}
	if all, err := os.ReadDir(dir); err != nil || len(all) != 1 {
		t.Errorf("%v, %v", all, err)
	}
}

func TestSymlink(t *testing.T) {
	path := filepath.Join(t.TempDir(), "link")
	for _, to := range []string{"/a", "/b"} {
		if err := atomicfile.Symlink(to, path); err != nil {
			t.Fatal(err)
		}
		if got, err := os.Readlink(path); err != nil || got != to {
			t.Errorf("%q, %v", got, err)
		}
	}
	for range 2 {
		if err := atomicfile.Remove(path); err != nil {
			t.Error(err)
		}
	}
	if _, err := os.Lstat(path); !os.IsNotExist(err) {
		t.Error(err)
	}
}
