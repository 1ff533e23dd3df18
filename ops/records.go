// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package ops

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"sync/atomic"

	"github.com/sirupsen/logrus"
	bolt "go.etcd.io/bbolt"
	"google.golang.org/protobuf/proto"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/cri-proxy/cri-proxy/interceptors"
)

var (
	bucketRequests  = []byte("requests")
	bucketResources = []byte("resources")
	bucketMeta      = []byte("meta")
	keyBoot         = []byte("boot")
)

// Records keeps, by container ID, the CreateContainer request as kubelet sent it and the
// resources last applied. It outlives the process but not the boot: containers
// don't either, which is why writes need not wait for the disk.
type Records struct {
	db  *bolt.DB
	log logrus.FieldLogger
	n   atomic.Int64
}

var _ interceptors.Records = (*Records)(nil)

func openRecords(dir string, log logrus.FieldLogger) (*Records, error) {
	path := filepath.Join(dir, "records.db")
	r, err := openRecordsFile(path, log)
	if err == nil || errors.Is(err, errOtherBoot) {
		if err == nil {
			return r, nil
		}
		log.WithField("file", path).Info("records are of an earlier boot: starting anew")
	} else {
		if _, statErr := os.Stat(path); statErr != nil {
			return nil, err
		}
		var held *heldError
		if errors.As(err, &held) {
			return nil, err
		}
		// A power cut can tear the file, because it is not synced; then it is of an earlier boot as well.
		log.WithField("file", path).WithError(err).Warn("records cannot be read: starting anew; containers made before now are cloned from the runtime's own record")
	}
	if err := os.Remove(path); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return nil, fmt.Errorf("removing old records: %w", err)
	}
	return openRecordsFile(path, log)
}

var errOtherBoot = errors.New("records of another boot")

type heldError struct{ error }

func (e *heldError) Unwrap() error { return e.error }

func openRecordsFile(path string, log logrus.FieldLogger) (_ *Records, err error) {
	db, err := bolt.Open(path, 0o600, &bolt.Options{Timeout: lockPatience, NoSync: true, NoFreelistSync: true, FreelistType: bolt.FreelistMapType})
	if err != nil {
		err = openError(path, err)
		if errors.Is(err, fs.ErrPermission) {
			return nil, &heldError{err}
		}
		return nil, err
	}
	defer func() {
		if err != nil {
			err = errors.Join(err, db.Close())
		}
	}()
	r := &Records{db: db, log: log}
	boot := []byte(bootID())
	err = db.Update(func(tx *bolt.Tx) error {
		for _, b := range [][]byte{bucketRequests, bucketResources, bucketMeta} {
			if _, err := tx.CreateBucketIfNotExists(b); err != nil {
				return err
			}
		}
		meta := tx.Bucket(bucketMeta)
		if old := meta.Get(keyBoot); old != nil && string(old) != string(boot) {
			return errOtherBoot
		}
		r.n.Store(int64(tx.Bucket(bucketRequests).Stats().KeyN))
		return meta.Put(keyBoot, boot)
	})
	if err != nil {
		return nil, err
	}
	return r, nil
}

// Created implements [interceptors.Records].
func (r *Records) Created(id string, request []byte) { r.put(bucketRequests, id, request, 1) }

// Updated implements [interceptors.Records]. Only what is set overrides what was set before, as in the runtime.
func (r *Records) Updated(id string, resources []byte) {
	next := &runtimeapi.LinuxContainerResources{}
	if err := proto.Unmarshal(resources, next); err != nil {
		r.log.WithField("container", id).WithError(err).Warn("resources not recorded")
		return
	}
	merged, err := proto.Marshal(overlayResources(r.resources(id), next))
	if err != nil {
		r.log.WithField("container", id).WithError(err).Warn("resources not recorded")
		return
	}
	r.put(bucketResources, id, merged, 0)
}

func (r *Records) put(bucket []byte, id string, value []byte, grow int64) {
	err := r.db.Update(func(tx *bolt.Tx) error { return tx.Bucket(bucket).Put([]byte(id), value) })
	if err != nil {
		// Not kubelet's business: the verbose status is the fallback.
		r.log.WithField("container", id).WithError(err).Warn("container not recorded")
		return
	}
	r.n.Add(grow)
}

// Removed implements [interceptors.Records]. An ID prefix removes nothing; the next start tidies up.
func (r *Records) Removed(id string) {
	err := r.db.Update(func(tx *bolt.Tx) error {
		if tx.Bucket(bucketRequests).Get([]byte(id)) != nil {
			r.n.Add(-1)
		}
		return errors.Join(tx.Bucket(bucketRequests).Delete([]byte(id)), tx.Bucket(bucketResources).Delete([]byte(id)))
	})
	if err != nil {
		r.log.WithField("container", id).WithError(err).Warn("record not removed")
	}
}

// Len returns how many containers are recorded.
func (r *Records) Len() int { return int(r.n.Load()) }

// request returns the recorded request, or nil.
func (r *Records) request(id string) *runtimeapi.CreateContainerRequest {
	req := &runtimeapi.CreateContainerRequest{}
	if !r.get(bucketRequests, id, req) {
		return nil
	}
	return req
}

// resources returns the resources last applied, or nil.
func (r *Records) resources(id string) *runtimeapi.LinuxContainerResources {
	res := &runtimeapi.LinuxContainerResources{}
	if !r.get(bucketResources, id, res) {
		return nil
	}
	return res
}

func (r *Records) get(bucket []byte, id string, m proto.Message) bool {
	found := false
	err := r.db.View(func(tx *bolt.Tx) error {
		b := tx.Bucket(bucket).Get([]byte(id))
		if b == nil {
			return nil
		}
		found = true
		return proto.Unmarshal(b, m)
	})
	if err != nil {
		r.log.WithField("container", id).WithError(err).Warn("record cannot be read")
		return false
	}
	return found
}

// ids returns the containers that are recorded.
func (r *Records) ids() []string {
	var ids []string
	err := r.db.View(func(tx *bolt.Tx) error {
		for _, b := range [][]byte{bucketRequests, bucketResources} {
			err := tx.Bucket(b).ForEach(func(k, _ []byte) error {
				ids = append(ids, string(k))
				return nil
			})
			if err != nil {
				return err
			}
		}
		return nil
	})
	if err != nil {
		r.log.WithError(err).Warn("records cannot be listed")
	}
	return ids
}

func (r *Records) close() error { return r.db.Close() }
