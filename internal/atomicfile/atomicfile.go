// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package atomicfile

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"syscall"

	"golang.org/x/sys/unix"
)

// dirMode is that of directories that are made on the way.
const dirMode = 0o755

// Write makes a file with this content and mode, and the directories that it is in. The file is on
// the disk when Write returns. It has the owner of the file that it replaces.
func Write(path string, content []byte, mode os.FileMode) error {
	return Copy(path, bytes.NewReader(content), mode)
}

// Copy is [Write] with the content of a reader.
func Copy(path string, content io.Reader, mode os.FileMode) (err error) {
	if err := os.MkdirAll(filepath.Dir(path), dirMode); err != nil {
		return err
	}
	f, err := create(path)
	if err != nil {
		return err
	}
	defer func() {
		if err != nil {
			_ = f.Close() // once more does no harm
			_ = os.Remove(f.Name())
		}
	}()
	_, err = io.Copy(f, content)
	if err = errors.Join(err, f.Chmod(mode), keepOwner(f.File, path), f.Sync()); err != nil {
		return err
	}
	if err := f.link(); err != nil {
		return err
	}
	if err := f.Close(); err != nil {
		return err
	}
	return os.Rename(f.Name(), path)
}

// file is a file that is to replace another one. It is renamed as soon as it is complete.
type file struct {
	*os.File
	nameless bool // it has no name in its directory yet
}

// create returns an empty file in the directory of path. Where the file system can do it, the file
// has no name until all of its content is on the disk: a process that is killed meanwhile leaves
// nothing behind.
func create(path string) (*file, error) {
	dir, base := filepath.Dir(path), filepath.Base(path)
	fd, err := unix.Open(dir, unix.O_TMPFILE|unix.O_RDWR|unix.O_CLOEXEC, 0o600)
	if err == nil {
		name := filepath.Join(dir, fmt.Sprintf(".%s.%d.%d", base, os.Getpid(), fd))
		return &file{File: os.NewFile(uintptr(fd), name), nameless: true}, nil
	}
	f, err := os.CreateTemp(dir, "."+base+".*")
	if err != nil {
		return nil, err
	}
	return &file{File: f}, nil
}

// link gives the file its name, in place of what another process with the same ID left there.
func (f *file) link() error {
	if !f.nameless {
		return nil
	}
	if err := Remove(f.Name()); err != nil {
		return err
	}
	from := fmt.Sprintf("/proc/self/fd/%d", f.Fd())
	if err := unix.Linkat(unix.AT_FDCWD, from, unix.AT_FDCWD, f.Name(), unix.AT_SYMLINK_FOLLOW); err != nil {
		return &os.LinkError{Op: "link", Old: from, New: f.Name(), Err: err}
	}
	return nil
}

// keepOwner gives f the owner of the file that it is to replace.
func keepOwner(f *os.File, path string) error {
	fi, err := os.Stat(path)
	if err != nil {
		return nil
	}
	st, ok := fi.Sys().(*syscall.Stat_t)
	if !ok {
		return nil
	}
	return f.Chown(int(st.Uid), int(st.Gid))
}

// Symlink makes path a symlink to another path. It replaces what is at path, unless that is a
// directory. The directory of path must be there.
func Symlink(to, path string) error {
	temporary := fmt.Sprintf("%s.%d", path, os.Getpid())
	if err := Remove(temporary); err != nil {
		return err
	}
	if err := os.Symlink(to, temporary); err != nil {
		return err
	}
	return os.Rename(temporary, path)
}

// Remove removes a file or a symlink, if it is there.
func Remove(path string) error {
	if err := os.Remove(path); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	return nil
}
