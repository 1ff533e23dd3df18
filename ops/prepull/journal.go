// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package prepull

import (
	"encoding/json"
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"strings"

	"github.com/sirupsen/logrus"
	bolt "go.etcd.io/bbolt"

	"github.com/cri-proxy/cri-proxy/ops/boltfile"
	"github.com/cri-proxy/cri-proxy/ops/prepull/claims"
	"github.com/cri-proxy/cri-proxy/ops/prepull/pins"
)

// fileName is the file of pulls and pins in the state directory. It has three buckets:
//
//	pulls      UID -> record (JSON)
//	pins       image ID, NUL, owner -> pins.Pin (JSON)
//	unclaimed  image ID -> name of the image (JSON); kubelet is not shown these images
const fileName = "pulls.db"

var (
	bucketPulls     = []byte("pulls")
	bucketPins      = []byte("pins")
	bucketUnclaimed = []byte("unclaimed")
)

// record is what the file has of a pull. It has no credential, only whether there were any.
type record struct {
	Request     []byte `json:"request"`   // opsv1.PullRequest
	Operation   []byte `json:"operation"` // opsv1.PullOperation
	Credentials bool   `json:"credentials,omitempty"`
	// Private says that credentials have been used, and Had is the ID of the image that had the
	// name before.
	Private bool   `json:"private,omitempty"`
	Had     string `json:"had,omitempty"`
}

// journal is the file of pulls and pins.
type journal struct {
	*boltfile.File
	// unread is set when the file could not be opened at the start: what it holds is then not
	// known.
	unread bool
}

// kept is what the file holds.
type kept struct {
	pulls map[string]*record
	pins  map[pins.Key]*pins.Pin
	// unclaimed are the IDs of images.
	unclaimed []string
}

// openJournal opens the file and returns what is in it. It sets a damaged file aside and begins a
// new one: nothing in it is needed to serve kubelet, and images stay where they are.
//
// Errors: another process holds the file, this process may not open it, or there is no such
// directory.
func openJournal(dir string, log logrus.FieldLogger) (*journal, *kept, error) {
	path := filepath.Join(dir, fileName)
	var k kept
	f, err := boltfile.Open(path, boltfile.Options{
		Buckets: [][]byte{bucketPulls, bucketPins, bucketUnclaimed}, Log: log,
		Lost: "pulls that were under way are forgotten, pins end, " +
			"and images that came with secrets count as there for all pods",
		Missing: "images are not pulled ahead of time",
		Read: func(tx *bolt.Tx) error {
			k = kept{pulls: map[string]*record{}, pins: map[pins.Key]*pins.Pin{}}
			return k.read(tx, log.WithField("file", path))
		},
	})
	if err != nil {
		return nil, nil, err
	}
	j := &journal{File: f, unread: !f.IsOpen()}
	if j.unread {
		return j, &kept{}, nil
	}
	return j, &k, nil
}

// read takes over what the file holds. It leaves out a record that cannot be read.
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
	err = tx.Bucket(bucketUnclaimed).ForEach(func(id, _ []byte) error {
		k.unclaimed = append(k.unclaimed, string(id))
		return nil
	})
	if err != nil {
		return err
	}
	return tx.Bucket(bucketPins).ForEach(func(key, v []byte) error {
		var p pins.Pin
		id, owner, _ := strings.Cut(string(key), "\x00")
		if err := json.Unmarshal(v, &p); err != nil {
			log.WithField("image", id).WithError(err).Error("pin cannot be read, left out")
			return nil
		}
		k.pins[pins.Key{ImageID: id, Owner: owner}] = &p
		return nil
	})
}

func (j *journal) put(bucket []byte, key string, v any) error {
	b, err := json.Marshal(v)
	if err != nil {
		return err
	}
	return j.Update(func(tx *bolt.Tx) error { return tx.Bucket(bucket).Put([]byte(key), b) })
}

func (j *journal) remove(bucket []byte, key string) error {
	return j.Update(func(tx *bolt.Tx) error { return tx.Bucket(bucket).Delete([]byte(key)) })
}

func (j *journal) putPull(uid string, r *record) error { return j.put(bucketPulls, uid, r) }

func (j *journal) removePull(uid string) error { return j.remove(bucketPulls, uid) }

var _ pins.Journal = (*journal)(nil)

func pinKey(k pins.Key) string { return k.ImageID + "\x00" + k.Owner }

// PutPin implements [pins.Journal].
func (j *journal) PutPin(k pins.Key, v *pins.Pin) error { return j.put(bucketPins, pinKey(k), v) }

// RemovePin implements [pins.Journal].
func (j *journal) RemovePin(k pins.Key) error { return j.remove(bucketPins, pinKey(k)) }

var _ claims.Journal = (*journal)(nil)

// PutUnclaimed implements [claims.Journal].
func (j *journal) PutUnclaimed(imageID, image string) error {
	return j.put(bucketUnclaimed, imageID, image)
}

// RemoveUnclaimed implements [claims.Journal].
func (j *journal) RemoveUnclaimed(imageID string) error { return j.remove(bucketUnclaimed, imageID) }

// ForgetPins removes the pins from a state directory that is kept: the next process must not
// believe in pins that [LetGo] has ended. No process may have the directory open.
func ForgetPins(dir string) error {
	path := filepath.Join(dir, fileName)
	if _, err := os.Stat(path); errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	db, err := boltfile.OpenDB(path, boltfile.Options{Buckets: [][]byte{bucketPulls, bucketPins}})
	if errors.Is(err, boltfile.ErrDamaged) {
		return nil // the next process sets it aside, with its pins
	}
	if err != nil {
		return boltfile.Explain(path, err)
	}
	err = db.Update(func(tx *bolt.Tx) error {
		if err := tx.DeleteBucket(bucketPins); err != nil {
			return err
		}
		_, err := tx.CreateBucket(bucketPins)
		return err
	})
	return errors.Join(err, db.Close())
}
