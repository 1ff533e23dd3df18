// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package prepull

import (
	"encoding/json"
	"path/filepath"
	"strings"

	"github.com/sirupsen/logrus"
	bolt "go.etcd.io/bbolt"

	"github.com/cri-proxy/cri-proxy/ops/boltfile"
)

var (
	bucketPulls = []byte("pulls")
	bucketPins  = []byte("pins")
	// bucketUnclaimed has the images that kubelet is not shown, by ID.
	bucketUnclaimed = []byte("unclaimed")
)

// record is what is kept of a pull: never a credential, only whether there were any.
type record struct {
	Request     []byte `json:"request"`   // opsv1.PullRequest
	Operation   []byte `json:"operation"` // opsv1.PullOperation
	Credentials bool   `json:"credentials,omitempty"`
	// Private says that credentials have been used, and Had which image was there by that name before.
	Private bool   `json:"private,omitempty"`
	Had     string `json:"had,omitempty"`
}

// journal is the file of pulls and pins.
type journal struct {
	*boltfile.File
	// unread is set when the file could not be had at the start: what it holds is then not known.
	unread bool
}

// kept is what the file holds.
type kept struct {
	pulls map[string]*record
	pins  map[pinKey]*pin
	// unclaimed are the IDs of images.
	unclaimed []string
}

// openJournal opens the file and returns what is in it. One that is damaged is set aside and begun anew: nothing in it is
// needed to serve kubelet, and images stay where they are.
//
// Errors: the file is held by another process or is not permitted to this one, or there is no such directory.
func openJournal(dir string, log logrus.FieldLogger) (*journal, *kept, error) {
	path := filepath.Join(dir, "pulls.db")
	var k kept
	f, err := boltfile.Open(path, boltfile.Options{
		Buckets: [][]byte{bucketPulls, bucketPins, bucketUnclaimed}, Log: log,
		Lost: "pulls that were under way are forgotten, pins end, and images that came with secrets count as there for all pods", Missing: "images are not pulled ahead of time",
		Read: func(tx *bolt.Tx) error {
			k = kept{pulls: map[string]*record{}, pins: map[pinKey]*pin{}}
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
	err = tx.Bucket(bucketUnclaimed).ForEach(func(id, _ []byte) error {
		k.unclaimed = append(k.unclaimed, string(id))
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

func (j *journal) put(bucket []byte, key string, v any) error {
	b, err := json.Marshal(v)
	if err != nil {
		return err
	}
	return j.Update(func(tx *bolt.Tx) error { return tx.Bucket(bucket).Put([]byte(key), b) })
}

func (j *journal) putPull(uid string, r *record) error { return j.put(bucketPulls, uid, r) }

func (j *journal) removePull(uid string) error {
	return j.Update(func(tx *bolt.Tx) error { return tx.Bucket(bucketPulls).Delete([]byte(uid)) })
}

func (j *journal) putPin(k pinKey, v *pin) error {
	return j.put(bucketPins, k.imageID+"\x00"+k.owner, v)
}

func (j *journal) removePin(k pinKey) error {
	return j.Update(func(tx *bolt.Tx) error { return tx.Bucket(bucketPins).Delete([]byte(k.imageID + "\x00" + k.owner)) })
}

func (j *journal) putUnclaimed(imageID, image string) error {
	return j.put(bucketUnclaimed, imageID, image)
}

func (j *journal) removeUnclaimed(imageID string) error {
	return j.Update(func(tx *bolt.Tx) error { return tx.Bucket(bucketUnclaimed).Delete([]byte(imageID)) })
}
