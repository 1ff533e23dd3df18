// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package ops

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"runtime/debug"
	"sync"
	"sync/atomic"
	"time"

	"github.com/sirupsen/logrus"
	bolt "go.etcd.io/bbolt"
	"google.golang.org/protobuf/proto"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	opsv1 "github.com/cri-proxy/cri-proxy/api/ops/v1"
	"github.com/cri-proxy/cri-proxy/interceptors"
	"github.com/cri-proxy/cri-proxy/ops/boltfile"
	"github.com/cri-proxy/cri-proxy/ops/criclone"
)

var (
	bucketRequests  = []byte("requests")
	bucketResources = []byte("resources")
	bucketStarted   = []byte("started")
	// bucketEnvironments has the environments of unfinished operations, by operation and container.
	bucketEnvironments = []byte("environments")
	bucketHeld         = []byte("held")
)

const (
	// recordPatience bounds what a call of kubelet's waits for its record. It goes into the page
	// cache, which takes microseconds; when the disk hangs the record is written later.
	recordPatience = 100 * time.Millisecond
	// maxUnwritten bounds the records that wait for a disk that hangs: more containers than a node
	// has.
	maxUnwritten = 1024
)

// Records keeps, by container ID, the CreateContainer request as kubelet sent it and the
// resources last applied, when the process of a gated one began, and until when its probes are held. It outlives the process but not the boot: containers
// don't either, which is why writes need not wait for the disk.
type Records struct {
	db  *bolt.DB
	log logrus.FieldLogger
	n   atomic.Int64

	nudge chan struct{} // one: there is something to write, or the end has come
	ended chan struct{} // closed when nothing is written any more

	mu     sync.Mutex     // guards all following fields; never held while something is written
	queue  []*recordWrite // in order; the first may be being written
	closed bool
}

// recordWrite is a change of the records.
type recordWrite struct {
	id      string
	change  func(tx *bolt.Tx) error
	grow    int64 // of the number of requests
	failed  string
	written chan struct{} // closed when it has been, or could not be
}

var _ interceptors.Records = (*Records)(nil)

// openRecords opens the records in dir. Without a file, on a full disk for example, nothing is recorded: containers
// are then cloned from the runtime's own record.
//
// Errors: the file is held by another process, or is not permitted to this one.
func openRecords(dir string, log logrus.FieldLogger) (*Records, error) {
	path := filepath.Join(dir, "records.db")
	log = log.WithField("file", path)
	r := &Records{log: log, nudge: make(chan struct{}, 1), ended: make(chan struct{})}
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
	err = r.db.View(func(tx *bolt.Tx) error {
		r.n.Store(int64(tx.Bucket(bucketRequests).Stats().KeyN))
		return nil
	})
	if err != nil {
		return nil, errors.Join(err, r.db.Close())
	}
	go r.writeQueue() // ends with close
	return r, nil
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
	return boltfile.OpenDB(path, boltfile.Options{Buckets: [][]byte{bucketRequests, bucketResources, bucketStarted, bucketEnvironments, bucketHeld}, Unsynced: true})
}

// errNoRecords is what becomes of a write without a file.
var errNoRecords = errors.New("there is no file of records")

// write has a change written and waits for it, for [recordPatience] at most.
func (r *Records) write(w *recordWrite) {
	err := r.enqueue(w)
	if err != nil {
		// Not kubelet's business: the verbose status is the fallback.
		r.log.WithField("container", w.id).WithError(err).Warn(w.failed)
		return
	}
	timer := time.NewTimer(recordPatience)
	defer timer.Stop()
	select {
	case <-w.written:
	case <-timer.C:
		r.log.WithField("container", w.id).Warn(
			"the disk does not take the record of a container; it is written when it does")
	}
}

func (r *Records) enqueue(w *recordWrite) error {
	w.written = make(chan struct{})
	r.mu.Lock()
	defer r.mu.Unlock()
	switch {
	case r.db == nil || r.closed:
		return errNoRecords
	case len(r.queue) >= maxUnwritten:
		return errors.New("the disk hangs, and too many records wait for it")
	}
	r.queue = append(r.queue, w)
	r.wake()
	return nil
}

func (r *Records) wake() {
	select {
	case r.nudge <- struct{}{}:
	default:
	}
}

// writeQueue writes until the records are closed.
func (r *Records) writeQueue() {
	defer close(r.ended)
	for {
		w, over := r.next()
		switch {
		case w != nil:
			r.writeNow(w)
		case over:
			return
		default:
			<-r.nudge
		}
	}
}

// next returns what is to be written, nil for nothing, and whether nothing will be any more.
func (r *Records) next() (w *recordWrite, over bool) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if len(r.queue) > 0 {
		return r.queue[0], false
	}
	return nil, r.closed
}

func (r *Records) writeNow(w *recordWrite) {
	if err := r.try(w.change); err != nil {
		r.log.WithField("container", w.id).WithError(err).Warn(w.failed)
	} else {
		r.n.Add(w.grow)
	}
	r.mu.Lock()
	r.queue = r.queue[1:]
	r.mu.Unlock()
	close(w.written)
}

// try makes an error of a panic: bolt panics at a page that is not what it should be.
func (r *Records) try(change func(tx *bolt.Tx) error) (err error) {
	defer debug.SetPanicOnFault(debug.SetPanicOnFault(true))
	defer func() {
		if p := recover(); p != nil {
			err = fmt.Errorf("%w: %v", boltfile.ErrDamaged, p)
		}
	}()
	return r.db.Update(change)
}

// view reads what has been recorded so far, and waits for the disk if it has to. It does nothing
// without a file.
func (r *Records) view(f func(tx *bolt.Tx) error) error {
	if r.db == nil {
		return nil
	}
	r.mu.Lock()
	var last *recordWrite
	if n := len(r.queue); n > 0 {
		last = r.queue[n-1]
	}
	r.mu.Unlock()
	if last != nil {
		<-last.written
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
	r.write(&recordWrite{id: id, failed: "resources not recorded", change: func(tx *bolt.Tx) error {
		before := &runtimeapi.LinuxContainerResources{}
		if b := tx.Bucket(bucketResources).Get([]byte(id)); b == nil {
			before = nil
		} else if err := proto.Unmarshal(b, before); err != nil {
			before = nil // as if there were none
		}
		merged, err := proto.Marshal(criclone.OverlayResources(before, next))
		if err != nil {
			return err
		}
		return tx.Bucket(bucketResources).Put([]byte(id), merged)
	}})
}

func (r *Records) put(bucket []byte, id string, value []byte, grow int64) {
	value = bytes.Clone(value) // it may be written later
	r.write(&recordWrite{id: id, failed: "container not recorded", grow: grow, change: func(tx *bolt.Tx) error {
		return tx.Bucket(bucket).Put([]byte(id), value)
	}})
}

// Removed implements [interceptors.Records]. An ID prefix removes nothing; the next start tidies up.
func (r *Records) Removed(id string) {
	r.write(&recordWrite{id: id, failed: "record not removed", change: func(tx *bolt.Tx) error {
		if tx.Bucket(bucketRequests).Get([]byte(id)) != nil {
			r.n.Add(-1)
		}
		var errs []error
		for _, b := range [][]byte{bucketRequests, bucketResources, bucketStarted, bucketHeld} {
			errs = append(errs, tx.Bucket(b).Delete([]byte(id)))
		}
		return errors.Join(errs...)
	}})
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

// setHeld records until when kubelet is kept from probing the container.
func (r *Records) setHeld(id string, until time.Time) {
	r.put(bucketHeld, id, binary.BigEndian.AppendUint64(nil, uint64(until.UnixNano())), 0)
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
func (r *Records) eachStarted(f func(id string, at time.Time)) { r.eachTime(bucketStarted, f) }

// eachHeld calls f for every container that kubelet has been kept from probing.
func (r *Records) eachHeld(f func(id string, until time.Time)) { r.eachTime(bucketHeld, f) }

func (r *Records) eachTime(bucket []byte, f func(id string, at time.Time)) {
	err := r.view(func(tx *bolt.Tx) error {
		return tx.Bucket(bucket).ForEach(func(k, v []byte) error {
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
	key := environmentKey(operation, container)
	r.write(&recordWrite{id: key, failed: "record not removed", change: func(tx *bolt.Tx) error {
		return tx.Bucket(bucketEnvironments).Delete([]byte(key))
	}})
}

// keepEnvironments forgets the environments of operations for which keep says no.
func (r *Records) keepEnvironments(keep func(operation string) bool) {
	if r.db == nil {
		return
	}
	r.write(&recordWrite{id: "all", failed: "environments of operations that have ended not removed", change: func(tx *bolt.Tx) error {
		b := tx.Bucket(bucketEnvironments)
		var gone [][]byte
		err := b.ForEach(func(k, _ []byte) error {
			if i := bytes.LastIndexByte(k, '/'); i < 0 || !keep(string(k[:i])) { // no container has a slash in its name
				gone = append(gone, bytes.Clone(k))
			}
			return nil
		})
		for _, k := range gone {
			err = errors.Join(err, b.Delete(k))
		}
		return err
	}})
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
		for _, b := range [][]byte{bucketRequests, bucketResources, bucketStarted, bucketHeld} {
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
	r.mu.Lock()
	r.closed = true
	r.wake()
	r.mu.Unlock()
	<-r.ended
	return r.db.Close()
}
