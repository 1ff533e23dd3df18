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
	"strings"
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
	db  *bolt.DB // nil: see why
	why error
	log logrus.FieldLogger
}

// openJournal opens the file. One that is damaged is begun anew: nothing in it is needed to serve kubelet, and images
// stay where they are. Without a file, pulls are refused.
func openJournal(dir string, log logrus.FieldLogger) (*journal, error) {
	path := filepath.Join(dir, "pulls.db")
	j := &journal{log: log.WithField("file", path)}
	j.db, j.why = openFile(path)
	if errors.Is(j.why, bolterrors.ErrTimeout) || errors.Is(j.why, fs.ErrPermission) || errors.Is(j.why, fs.ErrNotExist) {
		return nil, fmt.Errorf("%s: %w", path, j.why)
	}
	if errors.Is(j.why, bolterrors.ErrInvalid) || errors.Is(j.why, bolterrors.ErrChecksum) || errors.Is(j.why, bolterrors.ErrVersionMismatch) {
		j.log.WithError(j.why).Error("damaged, starting anew; pins of before are not ended")
		if j.why = os.Remove(path); j.why == nil {
			j.db, j.why = openFile(path)
		}
	}
	if j.why != nil {
		j.log.WithError(j.why).Error("cannot be opened: images are not pulled ahead of time")
	}
	return j, nil
}

func openFile(path string) (*bolt.DB, error) {
	db, err := bolt.Open(path, 0o600, &bolt.Options{Timeout: lockPatience, NoFreelistSync: true, FreelistType: bolt.FreelistMapType})
	if err != nil {
		return nil, err
	}
	missing := false
	err = db.View(func(tx *bolt.Tx) error {
		missing = tx.Bucket(bucketPulls) == nil || tx.Bucket(bucketPins) == nil
		return nil
	})
	if err == nil && missing {
		err = db.Update(func(tx *bolt.Tx) error {
			_, err := tx.CreateBucketIfNotExists(bucketPulls)
			_, perr := tx.CreateBucketIfNotExists(bucketPins)
			return errors.Join(err, perr)
		})
	}
	if err != nil {
		return nil, errors.Join(err, db.Close())
	}
	return db, nil
}

func (j *journal) update(f func(tx *bolt.Tx) error) error {
	if j.db == nil {
		return j.why
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

// load calls the functions for what is kept. What cannot be read is left out.
func (j *journal) load(pull func(*record) error, pinned func(pinKey, *pin)) error {
	if j.db == nil {
		return nil
	}
	return j.db.View(func(tx *bolt.Tx) error {
		err := tx.Bucket(bucketPulls).ForEach(func(k, v []byte) error {
			var r record
			err := json.Unmarshal(v, &r)
			if err == nil {
				err = pull(&r)
			}
			if err != nil {
				j.log.WithField("op", string(k)).WithError(err).Error("pull cannot be read, left out")
			}
			return nil
		})
		if err != nil {
			return err
		}
		return tx.Bucket(bucketPins).ForEach(func(k, v []byte) error {
			var p pin
			id, owner, _ := strings.Cut(string(k), "\x00")
			if err := json.Unmarshal(v, &p); err != nil {
				j.log.WithField("image", id).WithError(err).Error("pin cannot be read, left out")
				return nil
			}
			pinned(pinKey{id, owner}, &p)
			return nil
		})
	})
}

func (j *journal) close() error {
	if j.db == nil {
		return nil
	}
	return j.db.Close()
}
