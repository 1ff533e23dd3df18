// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package atomicfile_test

import (
	"errors"
	"io"
	"os"
	"path/filepath"
	"testing"
	"testing/iotest"

	"golang.org/x/sys/unix"

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

// TestNothingLeft looks at the directory while the content is written: a process that is killed
// then leaves what is there.
func TestNothingLeft(t *testing.T) {
	dir := t.TempDir()
	fd, err := unix.Open(dir, unix.O_TMPFILE|unix.O_RDWR, 0o600)
	if err != nil {
		t.Skipf("this file system has no files without a name: %v", err)
	}
	_ = unix.Close(fd)
	looked := false
	content := readerFunc(func([]byte) (int, error) {
		looked = true
		if all, err := os.ReadDir(dir); err != nil || len(all) != 0 {
			t.Errorf("%v, %v", all, err)
		}
		return 0, io.EOF
	})
	if err := atomicfile.Copy(filepath.Join(dir, "file"), content, 0o600); err != nil || !looked {
		t.Errorf("%v, looked: %v", err, looked)
	}
}

type readerFunc func([]byte) (int, error)

func (f readerFunc) Read(b []byte) (int, error) { return f(b) }

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
