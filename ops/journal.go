// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

// The journal's file:
//
//	journal.db
//	├── meta
//	│   └── version      <varint>            the highest version of what is below that has been written
//	├── operations
//	│   └── <uid>        <record, JSON>      with its own version; without one it is of version 1
//	├── overrides
//	│   └── <podUID>/<container>  <override, JSON>
//	└── unreadable
//	    └── <uid>        <bytes>             records that cannot be read, set aside for a person to look at
//
// What a binary does not understand it leaves as it is, for one that does: see [journal.load]. A change that an older binary would read wrongly
// (another meaning of a field or of a step, another order of the steps) needs a higher schemaVersion. A new step needs none: it is not known to an
// older one, which is enough. Buckets other than overrides and unreadable are made with the file's first write.

package ops

import (
	"bytes"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"time"

	"github.com/sirupsen/logrus"
	bolt "go.etcd.io/bbolt"

	"github.com/cri-proxy/cri-proxy/ops/boltfile"
	"github.com/cri-proxy/cri-proxy/ops/cgroup"
	"github.com/cri-proxy/cri-proxy/ops/guard"
)

var (
	bucketOperations = []byte("operations")
	bucketOverrides  = []byte("overrides")
	bucketUnreadable = []byte("unreadable") // set aside by load, for a person to look at
	bucketMeta       = []byte("meta")
	keyVersion       = []byte("version")
)

// schemaVersion is that of what this binary writes.
const schemaVersion = 1

// step is how far the restart of one container has come, as the journal knows it. A
// step is written before what it names is done.
type step string

const (
	stepNone    step = ""
	stepStage   step = "stage"   // the successor is about to be created
	stepStaged  step = "staged"  // it exists; the incumbent is about to be masked and its preStop run
	stepHeld    step = "held"    // an upgrade: it exists, and waits for the commit
	stepStart   step = "start"   // StartFirst: the successor is about to be started beside the incumbent
	stepArm     step = "arm"     // an upgrade: the successor is about to be started up to its gate, if it has one
	stepArmed   step = "armed"   // an upgrade: the successor is ready to take over, and waits for kubelet to stop the incumbent
	stepStop    step = "stop"    // the incumbent is about to be stopped and the successor started
	stepAsk     step = "ask"     // an upgrade: the incumbent is gone, and the successor begins if it is what kubelet asks for
	stepStarted step = "started" // the successor runs; postStart and reveal follow
	stepReveal  step = "reveal"  // both are about to be shown to kubelet, and stay so
	stepUndo    step = "undo"    // the successor is about to be removed, or shown as failed
	stepDone    step = "done"
)

// steps are those that this binary knows.
var steps = []step{stepNone, stepStage, stepStaged, stepHeld, stepStart, stepArm, stepArmed, stepStop, stepAsk, stepStarted, stepReveal, stepUndo, stepDone}

// record is what the journal keeps of an operation.
type record struct {
	// Version is the schema's; 0 is 1.
	Version int `json:"version,omitempty"`
	// Boot is the boot of the machine at the last write; empty if the kernel does not tell.
	Boot       string            `json:"boot,omitempty"`
	Operation  []byte            `json:"operation"` // opsv1.Operation
	Request    []byte            `json:"request"`   // opsv1.RestartRequest
	Containers []containerRecord `json:"containers"`
	// Credentials is whether there were any for the pulls: they themselves are never kept.
	Credentials bool `json:"credentials,omitempty"`
	// Environments are the containers whose environment the command has brought. The environments themselves are
	// in the records of this boot.
	Environments []string `json:"environments,omitempty"`
	// Cancelled is set once the operation has been cancelled, which it then stays.
	Cancelled bool `json:"cancelled,omitempty"`
	// Upgrade is an opsv1.PrepareUpgradeRequest, without credentials, if that is what the operation is; Request is then made from it.
	Upgrade []byte `json:"upgrade,omitempty"`
	// Committed is set once an upgrade has been committed.
	Committed bool `json:"committed,omitempty"`
}

// containerRecord is the journal's part of one container's restart.
type containerRecord struct {
	Step      step   `json:"step"`
	Sandbox   string `json:"sandbox,omitempty"`
	Incumbent string `json:"incumbent,omitempty"`
	Successor string `json:"successor,omitempty"`
	// Token is the value of the successor's staged annotation.
	Token string `json:"token,omitempty"`
	// Retried is set once the successor has been staged a second time.
	Retried bool `json:"retried,omitempty"`
	// StopBy is when the grace of preStop and stop together ends.
	StopBy time.Time `json:"stopBy,omitzero"`
	// PostStarted is set once postStart has been tried, PostDone when it has ended well.
	PostStarted bool `json:"postStarted,omitempty"`
	PostDone    bool `json:"postDone,omitempty"`
	// Method is how the container hands over.
	Method Method `json:"method,omitempty"`
	// Override is what the slot has once the successor is shown; nil for none.
	Override *override `json:"override,omitempty"`
	// Grace is what kubelet gave the incumbent of an upgrade to stop, in seconds.
	Grace int64 `json:"grace,omitempty"`
	// HoldSince is since when an upgrade waits for its commit or, once it is armed, for kubelet.
	HoldSince time.Time `json:"holdSince,omitzero"`
	// Asked is set once kubelet has asked for the successor of an upgrade.
	Asked bool `json:"asked,omitempty"`
	// StopFirst is set once an operation that was to be StartFirst goes on otherwise.
	StopFirst bool `json:"stopFirst,omitempty"`
	// Raised is what is added to the pod's limit of memory while both containers run, from before that until it has been taken back.
	Raised *cgroup.Raise `json:"raised,omitempty"`
	// Joined is set once a stop of kubelet's has joined the restart.
	Joined bool `json:"joined,omitempty"`
}

// journal is the durable list of operations and image overrides, in one bbolt file of mode 0600.
// Every write is on disk when it returns.
type journal struct {
	*boltfile.File
	log logrus.FieldLogger
}

// openJournal opens the journal in dir. What an unfinished operation of a damaged one has left is found by the annotation that it carries.
//
// Errors: those of [boltfile.Open].
func openJournal(dir string, log logrus.FieldLogger) (*journal, error) {
	file, err := boltfile.Open(filepath.Join(dir, "journal.db"), boltfile.Options{
		Buckets: [][]byte{bucketOperations},
		Read: func(tx *bolt.Tx) error {
			none := func(_, _ []byte) error { return nil }
			if err := tx.Bucket(bucketOperations).ForEach(none); err != nil || tx.Bucket(bucketOverrides) == nil {
				return err
			}
			return tx.Bucket(bucketOverrides).ForEach(none)
		},
		Lost: "operations that were under way are not finished", Missing: "kubelet is served, operations are refused", Log: log,
	})
	if err != nil {
		return nil, err
	}
	return &journal{File: file, log: log}, nil
}

// update writes in one transaction.
func (j *journal) update(change func(*bolt.Tx) error) error {
	err := j.Update(func(tx *bolt.Tx) error { return errors.Join(markVersion(tx), change(tx)) })
	if err != nil {
		return fmt.Errorf("journal: %w", err)
	}
	return nil
}

// markVersion notes that there is something of this binary's version in the file. It writes only if that is new.
func markVersion(tx *bolt.Tx) error {
	if fileVersion(tx) >= schemaVersion {
		return nil
	}
	b, err := tx.CreateBucketIfNotExists(bucketMeta)
	if err != nil {
		return err
	}
	return b.Put(keyVersion, binary.AppendUvarint(nil, schemaVersion))
}

// fileVersion is the highest version of what is in the file, 0 if it does not say.
func fileVersion(tx *bolt.Tx) uint64 {
	b := tx.Bucket(bucketMeta)
	if b == nil {
		return 0
	}
	v, _ := binary.Uvarint(b.Get(keyVersion))
	return v
}

// view reads; it does nothing while there is no file.
func (j *journal) view(read func(*bolt.Tx) error) error {
	if !j.IsOpen() {
		return nil
	}
	db, err := j.DB()
	if err != nil {
		return err
	}
	return db.View(read)
}

func (j *journal) put(uid string, r *record) error { return j.putWith(uid, r, nil) }

// putWith is put of the operation and of changes to overrides, by slot and nil for one that has ended: all of it or nothing.
func (j *journal) putWith(uid string, r *record, overrides map[string][]byte) error {
	r.Version = schemaVersion
	b, err := json.Marshal(r)
	if err != nil {
		return fmt.Errorf("journal: encoding operation %s: %w", uid, err)
	}
	return j.update(func(tx *bolt.Tx) error {
		return errors.Join(tx.Bucket(bucketOperations).Put([]byte(uid), b), changeOverrides(tx, overrides))
	})
}

// putOverrides writes changes to overrides alone.
func (j *journal) putOverrides(changes map[string][]byte) error {
	if len(changes) == 0 {
		return nil
	}
	return j.update(func(tx *bolt.Tx) error { return changeOverrides(tx, changes) })
}

// changeOverrides makes the bucket when there is something to put into it, not before: the disk may be full.
func changeOverrides(tx *bolt.Tx, changes map[string][]byte) error {
	if len(changes) == 0 {
		return nil
	}
	b, err := tx.CreateBucketIfNotExists(bucketOverrides)
	for slot, raw := range changes {
		switch {
		case err != nil:
			return err
		case raw == nil:
			err = b.Delete([]byte(slot))
		default:
			err = b.Put([]byte(slot), raw)
		}
	}
	return err
}

// loadOverrides calls f for every override.
func (j *journal) loadOverrides(f func(slot string, raw []byte)) error {
	return j.view(func(tx *bolt.Tx) error {
		b := tx.Bucket(bucketOverrides)
		if b == nil {
			return nil
		}
		return b.ForEach(func(k, v []byte) error {
			f(string(k), v)
			return nil
		})
	})
}

func (j *journal) remove(uids []string) error {
	if len(uids) == 0 {
		return nil
	}
	return j.update(func(tx *bolt.Tx) error {
		for _, uid := range uids {
			if err := tx.Bucket(bucketOperations).Delete([]byte(uid)); err != nil {
				return err
			}
		}
		return nil
	})
}

// load calls f for every operation, but for those that this binary does not understand: they get left, stay in the file as they are, and come with why
// in words, and with what could be read of them. One that cannot be read at all, or that f refuses, is set aside, so that it cannot keep the proxy, and
// kubelet with it, from starting; bad gets its error.
func (j *journal) load(f func(uid string, r *record) error, left func(uid string, raw []byte, r *record, why string), bad func(error)) error {
	aside := map[string][]byte{}
	err := j.view(func(tx *bolt.Tx) error {
		return tx.Bucket(bucketOperations).ForEach(func(k, v []byte) error {
			r, err := decodeRecord(v)
			if why := foreign(v, r); why != "" {
				left(string(k), bytes.Clone(v), r, why)
				return nil
			}
			if err == nil {
				err = guard.Try(j.log, func() error { return f(string(k), r) })
			}
			if err != nil {
				bad(fmt.Errorf("operation %s: %w", k, err))
				aside[string(k)] = bytes.Clone(v)
			}
			return nil
		})
	})
	if err != nil || len(aside) == 0 {
		return err
	}
	err = j.update(func(tx *bolt.Tx) error {
		unreadable, err := tx.CreateBucketIfNotExists(bucketUnreadable)
		if err != nil {
			return err
		}
		for uid, v := range aside {
			if err := errors.Join(unreadable.Put([]byte(uid), v), tx.Bucket(bucketOperations).Delete([]byte(uid))); err != nil {
				return err
			}
		}
		return nil
	})
	if err != nil {
		bad(fmt.Errorf("setting aside: %w", err)) // they are left out this time, and found again the next
	}
	return nil
}

// foreign says why a record is not this binary's to work with; r is nil if it could not be decoded.
func foreign(raw []byte, r *record) string {
	var of struct{ Version int }
	if json.Unmarshal(raw, &of) == nil && of.Version > schemaVersion {
		return fmt.Sprintf("it was written by a newer cri-proxy (version %d of the journal, this one knows %d)", of.Version, schemaVersion)
	}
	if r == nil {
		return ""
	}
	for _, c := range r.Containers {
		if !slices.Contains(steps, c.Step) {
			return fmt.Sprintf("it is at step %q, which this cri-proxy does not know", c.Step)
		}
	}
	return ""
}

func decodeRecord(b []byte) (*record, error) {
	r := &record{}
	if err := json.Unmarshal(b, r); err != nil {
		return nil, err
	}
	return r, nil
}

// bootID tells one run of the kernel from the next; empty where the kernel has none.
func bootID() string {
	b, err := os.ReadFile("/proc/sys/kernel/random/boot_id")
	if err != nil {
		return ""
	}
	return string(b)
}
