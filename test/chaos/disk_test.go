// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package chaos

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"

	bolt "go.etcd.io/bbolt"
	"golang.org/x/sys/unix"
)

// diskSize is room for the state of a node many times over, and quickly filled.
const diskSize = 24 << 20

// disk is a small file system of its own for the proxy's state.
type disk struct{ dir string }

func mountDisk(dir string) (*disk, error) {
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return nil, err
	}
	if err := unix.Mount("chaos", dir, "tmpfs", 0, fmt.Sprintf("size=%d,mode=0755", diskSize)); err != nil {
		return nil, fmt.Errorf("mount %s: %w", dir, err)
	}
	return &disk{dir: dir}, os.Mkdir(filepath.Join(dir, "state"), 0o700)
}

func (d *disk) state() string { return filepath.Join(d.dir, "state") }

func (d *disk) close() error { return unix.Unmount(d.dir, unix.MNT_DETACH) }

// fill leaves no space, not even for the journal's next write: its free pages, which it would use
// again without asking the file system for more, are given back first.
func (d *disk) fill() error {
	if err := dropFreePages(filepath.Join(d.state(), "journal.db")); err != nil {
		return err
	}
	f, err := os.Create(filepath.Join(d.dir, "filler"))
	if err != nil {
		return err
	}
	defer f.Close()
	var at int64
	for chunk := int64(diskSize); chunk >= int64(os.Getpagesize()); {
		switch err := unix.Fallocate(int(f.Fd()), 0, at, chunk); {
		case err == nil:
			at += chunk
		case errors.Is(err, unix.ENOSPC):
			chunk /= 2
		default:
			return fmt.Errorf("fill %s: %w", d.dir, err)
		}
	}
	return nil
}

// free undoes fill.
func (d *disk) free() error {
	if err := os.Remove(filepath.Join(d.dir, "filler")); err != nil && !errors.Is(err, os.ErrNotExist) {
		return err
	}
	return nil
}

// dropFreePages makes holes of the pages of a bbolt file that hold nothing.
func dropFreePages(path string) error {
	b, err := os.ReadFile(path)
	if err != nil {
		return err
	}
	shadow, err := os.CreateTemp("", "journal-*.db")
	if err != nil {
		return err
	}
	defer os.Remove(shadow.Name())
	_, err = shadow.Write(b)
	if err := errors.Join(err, shadow.Close()); err != nil {
		return err
	}
	db, err := bolt.Open(shadow.Name(), 0o600, &bolt.Options{ReadOnly: true, PreLoadFreelist: true})
	if err != nil {
		return err
	}
	defer db.Close()
	f, err := os.OpenFile(path, os.O_RDWR, 0)
	if err != nil {
		return err
	}
	defer f.Close()
	size := int64(db.Info().PageSize)
	return db.View(func(tx *bolt.Tx) error {
		for at := int64(0); at < int64(len(b)); at += size {
			page, err := tx.Page(int(at / size))
			if err != nil {
				return err
			}
			if page != nil && page.Type != "free" {
				at += int64(page.OverflowCount) * size // these have no header of their own
				continue
			}
			if err := unix.Fallocate(int(f.Fd()), unix.FALLOC_FL_PUNCH_HOLE|unix.FALLOC_FL_KEEP_SIZE, at,
				size); err != nil {
				return fmt.Errorf("hole in %s: %w", path, err)
			}
		}
		return nil
	})
}
