// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package boltfile

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"runtime/debug"
	"sync"
	"syscall"
	"time"

	"github.com/sirupsen/logrus"
	bolt "go.etcd.io/bbolt"
	bolterrors "go.etcd.io/bbolt/errors"
)

// LockPatience is how long opening waits for another process to let go of a file: a predecessor
// that drains holds it until its operations have ended.
const LockPatience = 10 * time.Second

// ErrDamaged is returned for a file that is not what was written.
var ErrDamaged = errors.New("the file is damaged")

// Options of [Open] and [OpenDB].
type Options struct {
	// Buckets are made when they do not exist.
	Buckets [][]byte
	// Read, if not nil, is called whenever the file is opened, with the buckets there. It should
	// read whatever is read later, so that damage is found here.
	Read func(*bolt.Tx) error
	// Lost says what a damaged file takes with it, Missing what does not work while there is no
	// file; both go into the log. Log must be set for [Open].
	Lost, Missing string
	Log           logrus.FieldLogger
	// Unsynced is for files that need not outlive the boot: writes do not wait for the disk.
	Unsynced bool
}

// File is a bolt file of mode 0600 that may be missing for a time.
type File struct {
	path string
	o    Options

	mu sync.Mutex // guards all following fields
	// db is nil while the file cannot be had: every use tries again until the file is closed.
	db     *bolt.DB
	closed bool
}

// ErrClosed is returned for a file that has been closed: another process may have it by then.
var ErrClosed = errors.New("the file has been closed")

// Open opens the file, which is made if it does not exist. One that is damaged is set aside under
// another name, for a person to look at, and a new one begun. One that cannot be had for another
// reason is logged, and tried again by [File.DB].
//
// Errors, in words for a person: the file is held by another process or is not permitted to this
// one, or there is no such directory.
func Open(path string, o Options) (*File, error) {
	f := &File{path: path, o: o}
	log := o.Log.WithField("file", path)
	db, err := OpenDB(path, o)
	if errors.Is(err, ErrDamaged) {
		aside := fmt.Sprintf("%s.unreadable-%d", path, time.Now().Unix())
		log.WithError(err).WithField("aside", aside).Error("setting it aside and starting anew: " + o.Lost)
		if err := os.Rename(path, aside); err != nil {
			log.WithError(err).Error("not set aside: " + o.Missing)
			return f, nil
		}
		db, err = OpenDB(path, o)
	}
	if Hopeless(err) || errors.Is(err, fs.ErrNotExist) {
		return nil, Explain(path, err)
	}
	if err != nil {
		log.WithError(err).Error("cannot be opened: " + o.Missing)
	}
	f.db = db
	return f, nil
}

// Hopeless says that opening will go on failing until a person does something: another process has
// the file, or this one may not.
func Hopeless(err error) bool {
	return errors.Is(err, bolterrors.ErrTimeout) || errors.Is(err, fs.ErrPermission)
}

// Explain says in words for a person why the file at path could not be opened.
func Explain(path string, err error) error {
	switch {
	case errors.Is(err, bolterrors.ErrTimeout):
		return fmt.Errorf("%s is held by another process: is a cri-proxy with the same state directory running? Stop "+
			"it or choose another stateDir (%w)", path, err)
	case errors.Is(err, fs.ErrPermission):
		return fmt.Errorf("opening %s: %w (cri-proxy must run as root)", path, err)
	default:
		return fmt.Errorf("opening %s: %w", path, err)
	}
}

// OpenDB opens a file, makes its buckets and reads it, once. Damage of any kind is an [ErrDamaged]:
// bolt panics at a page that is not what it should be, and a file that has become shorter is a
// fault of memory.
func OpenDB(path string, o Options) (db *bolt.DB, err error) {
	defer debug.SetPanicOnFault(debug.SetPanicOnFault(true))
	defer func() {
		if r := recover(); r != nil {
			db, err = nil, fmt.Errorf("%w: %v", ErrDamaged, r) // what is open of it stays so: closing would panic too
		}
	}()
	// The list of free pages is kept in the file: the other way to have it (NoFreelistSync) walks
	// the pages in a goroutine whose panic nobody can catch.
	db, err = bolt.Open(path, 0o600,
		&bolt.Options{Timeout: LockPatience, NoSync: o.Unsynced, FreelistType: bolt.FreelistMapType})
	if err != nil {
		if pathErr := (*fs.PathError)(nil); errors.As(err, &pathErr) || errors.Is(err, bolterrors.ErrTimeout) ||
			errors.As(err, new(syscall.Errno)) {
			return nil, err
		}
		return nil, fmt.Errorf("%w: %w", ErrDamaged, err)
	}
	if err := ensureBuckets(db, o.Buckets); err != nil {
		return nil, errors.Join(err, db.Close())
	}
	if o.Read == nil {
		return db, nil
	}
	if err := db.View(o.Read); err != nil {
		return nil, errors.Join(err, db.Close())
	}
	return db, nil
}

// ensureBuckets makes the buckets that do not exist. It writes only then: the disk may be full.
func ensureBuckets(db *bolt.DB, names [][]byte) error {
	missing := false
	err := db.View(func(tx *bolt.Tx) error {
		for _, name := range names {
			missing = missing || tx.Bucket(name) == nil
		}
		return nil
	})
	if err != nil || !missing {
		return err
	}
	return db.Update(func(tx *bolt.Tx) error {
		for _, name := range names {
			if _, err := tx.CreateBucketIfNotExists(name); err != nil {
				return err
			}
		}
		return nil
	})
}

// IsOpen says whether the file could be had.
func (f *File) IsOpen() bool {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.db != nil
}

// DB returns the open file, which it opens if that has not been possible before. After [File.Close]
// the error is [ErrClosed].
func (f *File) DB() (*bolt.DB, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.closed {
		return nil, fmt.Errorf("%s: %w", f.path, ErrClosed)
	}
	if f.db == nil {
		db, err := OpenDB(f.path, f.o)
		if err != nil {
			return nil, fmt.Errorf("%s: %w", f.path, err)
		}
		f.db = db
	}
	return f.db, nil
}

// Update writes in one transaction.
func (f *File) Update(change func(*bolt.Tx) error) error {
	db, err := f.DB()
	if err != nil {
		return err
	}
	return db.Update(change)
}

// Reopen takes a closed file up again; what uses it next opens it.
func (f *File) Reopen() {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.closed = false
}

// Close lets go of the file, for good unless it is followed by [File.Reopen]: nothing opens it
// again meanwhile, so that another process can have it.
func (f *File) Close() error {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.closed = true
	db := f.db
	f.db = nil
	if db == nil {
		return nil
	}
	return db.Close()
}
