// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package ops

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"sync/atomic"
	"time"

	"github.com/sirupsen/logrus"
	bolt "go.etcd.io/bbolt"
	"google.golang.org/protobuf/proto"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	opsv1 "github.com/cri-proxy/cri-proxy/api/ops/v1"
	"github.com/cri-proxy/cri-proxy/interceptors"
	"github.com/cri-proxy/cri-proxy/ops/boltfile"
)

var (
	bucketRequests  = []byte("requests")
	bucketResources = []byte("resources")
	bucketStarted   = []byte("started")
	// bucketEnvironments has the environments of unfinished operations, by operation and container.
	bucketEnvironments = []byte("environments")
)

// Records keeps, by container ID, the CreateContainer request as kubelet sent it and the
// resources last applied, and when the process of a gated one began. It outlives the process but not the boot: containers
// don't either, which is why writes need not wait for the disk.
type Records struct {
	db  *bolt.DB
	log logrus.FieldLogger
	n   atomic.Int64
}

var _ interceptors.Records = (*Records)(nil)

// openRecords opens the records in dir. Without a file, on a full disk for example, nothing is recorded: containers
// are then cloned from the runtime's own record.
//
// Errors: the file is held by another process, or is not permitted to this one.
func openRecords(dir string, log logrus.FieldLogger) (*Records, error) {
	path := filepath.Join(dir, "records.db")
	log = log.WithField("file", path)
	r := &Records{log: log}
	err := dropOldRecords(path, filepath.Join(dir, "records.boot"), log)
	if err == nil {
		r.db, err = openRecordsFile(path)
	}
	if boltfile.Hopeless(err) {
		return nil, boltfile.Explain(path, err)
	}
	if err != nil {
		log.WithError(err).Warn("records cannot be read: starting anew; containers made before now are cloned from the runtime's own record")
		if err = removeRecords(path); err == nil {
			r.db, err = openRecordsFile(path)
		}
	}
	if err != nil {
		log.WithError(err).Error("no records: containers are cloned from the runtime's own record")
		return r, nil
	}
	return r, r.view(func(tx *bolt.Tx) error {
		r.n.Store(int64(tx.Bucket(bucketRequests).Stats().KeyN))
		return nil
	})
}

// dropOldRecords removes the records of an earlier boot before they are opened: a power
// cut can tear the file, because it is not synced, and bbolt panics on some torn files. mark
// is a file that names the boot the records are of.
func dropOldRecords(path, mark string, log logrus.FieldLogger) error {
	boot := bootID()
	if old, err := os.ReadFile(mark); err == nil && string(old) == boot {
		return nil
	}
	if _, err := os.Stat(path); err == nil {
		log.Info("records are of an earlier boot: starting anew")
	}
	if err := removeRecords(path); err != nil {
		return err
	}
	if err := os.WriteFile(mark, []byte(boot), 0o600); err != nil {
		return fmt.Errorf("marking the records' boot: %w", err)
	}
	return nil
}

func removeRecords(path string) error {
	if err := os.Remove(path); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("removing old records: %w", err)
	}
	return nil
}

func openRecordsFile(path string) (*bolt.DB, error) {
	return boltfile.OpenDB(path, boltfile.Options{Buckets: [][]byte{bucketRequests, bucketResources, bucketStarted, bucketEnvironments}, Unsynced: true})
}

// errNoRecords is what becomes of a write without a file.
var errNoRecords = errors.New("there is no file of records")

func (r *Records) update(f func(tx *bolt.Tx) error) error {
	if r.db == nil {
		return errNoRecords
	}
	return r.db.Update(f)
}

// view does nothing without a file.
func (r *Records) view(f func(tx *bolt.Tx) error) error {
	if r.db == nil {
		return nil
	}
	return r.db.View(f)
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
	err := r.update(func(tx *bolt.Tx) error { return tx.Bucket(bucket).Put([]byte(id), value) })
	if err != nil {
		// Not kubelet's business: the verbose status is the fallback.
		r.log.WithField("container", id).WithError(err).Warn("container not recorded")
		return
	}
	r.n.Add(grow)
}

// Removed implements [interceptors.Records]. An ID prefix removes nothing; the next start tidies up.
func (r *Records) Removed(id string) {
	err := r.update(func(tx *bolt.Tx) error {
		if tx.Bucket(bucketRequests).Get([]byte(id)) != nil {
			r.n.Add(-1)
		}
		return errors.Join(tx.Bucket(bucketRequests).Delete([]byte(id)), tx.Bucket(bucketResources).Delete([]byte(id)), tx.Bucket(bucketStarted).Delete([]byte(id)))
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

// setStarted records when the container's process passed its gate.
func (r *Records) setStarted(id string, at time.Time) {
	r.put(bucketStarted, id, binary.BigEndian.AppendUint64(nil, uint64(at.UnixNano())), 0)
}

// started returns when the container's process passed its gate; zero if it had none.
func (r *Records) started(id string) time.Time {
	var at time.Time
	err := r.view(func(tx *bolt.Tx) error {
		at = startedTime(tx.Bucket(bucketStarted).Get([]byte(id)))
		return nil
	})
	if err != nil {
		r.log.WithField("container", id).WithError(err).Warn("record cannot be read")
	}
	return at
}

func startedTime(b []byte) time.Time {
	if len(b) != 8 {
		return time.Time{}
	}
	return time.Unix(0, int64(binary.BigEndian.Uint64(b)))
}

// eachStarted calls f for every container that had a gate.
func (r *Records) eachStarted(f func(id string, at time.Time)) {
	err := r.view(func(tx *bolt.Tx) error {
		return tx.Bucket(bucketStarted).ForEach(func(k, v []byte) error {
			f(string(k), startedTime(v))
			return nil
		})
	})
	if err != nil {
		r.log.WithError(err).Warn("records cannot be read")
	}
}

func environmentKey(operation, container string) string { return operation + "/" + container }

// setEnvironment keeps what a container of an operation will be made with.
func (r *Records) setEnvironment(operation, container string, env *opsv1.Environment) {
	if b, err := proto.Marshal(env); err == nil {
		r.put(bucketEnvironments, environmentKey(operation, container), b, 0)
	}
}

// environment returns what setEnvironment has kept, or nil.
func (r *Records) environment(operation, container string) *opsv1.Environment {
	env := &opsv1.Environment{}
	if !r.get(bucketEnvironments, environmentKey(operation, container), env) {
		return nil
	}
	return env
}

// forgetEnvironment is for an operation that has ended.
func (r *Records) forgetEnvironment(operation, container string) {
	err := r.update(func(tx *bolt.Tx) error {
		return tx.Bucket(bucketEnvironments).Delete([]byte(environmentKey(operation, container)))
	})
	if err != nil && !errors.Is(err, errNoRecords) {
		r.log.WithField("op", operation).WithError(err).Warn("record not removed")
	}
}

func (r *Records) get(bucket []byte, id string, m proto.Message) bool {
	found := false
	err := r.view(func(tx *bolt.Tx) error {
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
	err := r.view(func(tx *bolt.Tx) error {
		for _, b := range [][]byte{bucketRequests, bucketResources, bucketStarted} {
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

func (r *Records) close() error {
	if r.db == nil {
		return nil
	}
	return r.db.Close()
}
