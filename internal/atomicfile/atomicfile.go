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
	f, err := os.CreateTemp(filepath.Dir(path), "."+filepath.Base(path)+".*")
	if err != nil {
		return err
	}
	defer func() {
		if err != nil {
			_ = os.Remove(f.Name())
		}
	}()
	_, err = io.Copy(f, content)
	if err = errors.Join(err, f.Chmod(mode), keepOwner(f, path), f.Sync(), f.Close()); err != nil {
		return err
	}
	return os.Rename(f.Name(), path)
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
