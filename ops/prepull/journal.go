// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package prepull

import (
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"runtime/debug"
	"strings"
	"sync"
	"syscall"
	"time"

	"github.com/sirupsen/logrus"
	bolt "go.etcd.io/bbolt"
	bolterrors "go.etcd.io/bbolt/errors"
)

var (
	bucketPulls = []byte("pulls")
	bucketPins  = []byte("pins")
)

// lockPatience is how long opening waits for another process to let go of the file.
const lockPatience = 10 * time.Second

// record is what is kept of a pull: never a credential, only whether there were any.
type record struct {
	Request     []byte `json:"request"`   // opsv1.PullRequest
	Operation   []byte `json:"operation"` // opsv1.PullOperation
	Credentials bool   `json:"credentials,omitempty"`
}

// journal is the file of pulls and pins.
type journal struct {
	path string
	log  logrus.FieldLogger
	// unread is set when the file could not be had at the start: what it holds is then not known.
	unread bool

	mu sync.Mutex // guards db
	// db is nil while the file cannot be had, on a full disk for example: every write tries again.
	db *bolt.DB
}

// kept is what the file holds.
type kept struct {
	pulls map[string]*record
	pins  map[pinKey]*pin
}

// errDamaged is returned for a file that is not what was written.
var errDamaged = errors.New("the file is damaged")

// openJournal opens the file and returns what is in it. One that is damaged is set aside and begun anew: nothing in it is
// needed to serve kubelet, and images stay where they are.
//
// Errors: the file is held by another process or is not permitted to this one, or there is no such directory.
func openJournal(dir string, log logrus.FieldLogger) (*journal, *kept, error) {
	j := &journal{path: filepath.Join(dir, "pulls.db"), log: log}
	j.log = log.WithField("file", j.path)
	db, k, err := openFile(j.path, j.log)
	if errors.Is(err, errDamaged) {
		aside := fmt.Sprintf("%s.unreadable-%d", j.path, time.Now().Unix())
		j.log.WithError(err).WithField("aside", aside).Error("setting it aside and starting anew; pulls that were under way are forgotten, and pins end")
		if err = os.Rename(j.path, aside); err == nil {
			db, k, err = openFile(j.path, j.log)
		}
	}
	if errors.Is(err, bolterrors.ErrTimeout) || errors.Is(err, fs.ErrPermission) || errors.Is(err, fs.ErrNotExist) {
		return nil, nil, fmt.Errorf("%s: %w", j.path, err)
	}
	if err != nil {
		j.log.WithError(err).Error("cannot be opened: images are not pulled ahead of time")
		k, j.unread = &kept{}, true
	}
	j.db = db
	return j, k, nil
}

// openFile opens the file and reads all of it, so that damage is found here: bolt panics at a page that is not what it should be, and a
// file that has become shorter is a fault of memory. It reads its list of free pages from the file, for the
// other way to make it (NoFreelistSync) walks the pages in a goroutine whose panic nobody can catch.
func openFile(path string, log logrus.FieldLogger) (db *bolt.DB, k *kept, err error) {
	defer debug.SetPanicOnFault(debug.SetPanicOnFault(true))
	defer func() {
		if r := recover(); r != nil {
			db, k, err = nil, nil, fmt.Errorf("%w: %v", errDamaged, r) // what is open of it stays so: closing would panic too
		}
	}()
	db, err = bolt.Open(path, 0o600, &bolt.Options{Timeout: lockPatience, FreelistType: bolt.FreelistMapType})
	if err != nil {
		if pathErr := (*fs.PathError)(nil); errors.As(err, &pathErr) || errors.Is(err, bolterrors.ErrTimeout) || errors.As(err, new(syscall.Errno)) {
			return nil, nil, err
		}
		return nil, nil, fmt.Errorf("%w: %w", errDamaged, err)
	}
	if err := ensureBuckets(db); err != nil {
		return nil, nil, errors.Join(err, db.Close())
	}
	k = &kept{pulls: map[string]*record{}, pins: map[pinKey]*pin{}}
	if err := db.View(func(tx *bolt.Tx) error { return k.read(tx, log) }); err != nil {
		return nil, nil, errors.Join(err, db.Close())
	}
	return db, k, nil
}

// ensureBuckets makes the buckets that do not exist. It writes only then: the disk may be full.
func ensureBuckets(db *bolt.DB) error {
	missing := false
	err := db.View(func(tx *bolt.Tx) error {
		missing = tx.Bucket(bucketPulls) == nil || tx.Bucket(bucketPins) == nil
		return nil
	})
	if err != nil || !missing {
		return err
	}
	return db.Update(func(tx *bolt.Tx) error {
		_, err := tx.CreateBucketIfNotExists(bucketPulls)
		_, perr := tx.CreateBucketIfNotExists(bucketPins)
		return errors.Join(err, perr)
	})
}

// read takes over what the file holds. A record that cannot be read is left out.
func (k *kept) read(tx *bolt.Tx, log logrus.FieldLogger) error {
	err := tx.Bucket(bucketPulls).ForEach(func(uid, v []byte) error {
		var r record
		if err := json.Unmarshal(v, &r); err != nil {
			log.WithField("op", string(uid)).WithError(err).Error("pull cannot be read, left out")
			return nil
		}
		k.pulls[string(uid)] = &r
		return nil
	})
	if err != nil {
		return err
	}
	return tx.Bucket(bucketPins).ForEach(func(key, v []byte) error {
		var p pin
		id, owner, _ := strings.Cut(string(key), "\x00")
		if err := json.Unmarshal(v, &p); err != nil {
			log.WithField("image", id).WithError(err).Error("pin cannot be read, left out")
			return nil
		}
		k.pins[pinKey{id, owner}] = &p
		return nil
	})
}

func (j *journal) update(f func(tx *bolt.Tx) error) error {
	j.mu.Lock()
	defer j.mu.Unlock()
	if j.db == nil {
		db, _, err := openFile(j.path, j.log)
		if err != nil {
			return fmt.Errorf("%s: %w", j.path, err)
		}
		j.db = db
	}
	return j.db.Update(f)
}

func (j *journal) put(bucket []byte, key string, v any) error {
	b, err := json.Marshal(v)
	if err != nil {
		return err
	}
	return j.update(func(tx *bolt.Tx) error { return tx.Bucket(bucket).Put([]byte(key), b) })
}

func (j *journal) putPull(uid string, r *record) error { return j.put(bucketPulls, uid, r) }

func (j *journal) removePull(uid string) error {
	return j.update(func(tx *bolt.Tx) error { return tx.Bucket(bucketPulls).Delete([]byte(uid)) })
}

func (j *journal) putPin(k pinKey, v *pin) error {
	return j.put(bucketPins, k.imageID+"\x00"+k.owner, v)
}

func (j *journal) removePin(k pinKey) error {
	return j.update(func(tx *bolt.Tx) error { return tx.Bucket(bucketPins).Delete([]byte(k.imageID + "\x00" + k.owner)) })
}

func (j *journal) close() error {
	j.mu.Lock()
	defer j.mu.Unlock()
	if j.db == nil {
		return nil
	}
	return j.db.Close()
}
