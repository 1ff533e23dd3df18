// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package ops

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"time"

	"github.com/sirupsen/logrus"
	bolt "go.etcd.io/bbolt"

	"github.com/cri-proxy/cri-proxy/ops/boltfile"
)

var (
	bucketOperations = []byte("operations")
	bucketOverrides  = []byte("overrides")
	bucketUnreadable = []byte("unreadable") // set aside by load, for a person to look at
)

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

// record is what the journal keeps of an operation.
type record struct {
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
}

// journal is the durable list of operations and image overrides, in one bbolt file of mode 0600.
// Every write is on disk when it returns.
type journal struct{ *boltfile.File }

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
	return &journal{file}, nil
}

// update writes in one transaction.
func (j *journal) update(change func(*bolt.Tx) error) error {
	if err := j.Update(change); err != nil {
		return fmt.Errorf("journal: %w", err)
	}
	return nil
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

// load calls f for every operation. One that cannot be read, or that f refuses, is set aside, so that it
// cannot keep the proxy, and kubelet with it, from starting; bad gets its error.
func (j *journal) load(f func(uid string, r *record) error, bad func(error)) error {
	aside := map[string][]byte{}
	err := j.view(func(tx *bolt.Tx) error {
		return tx.Bucket(bucketOperations).ForEach(func(k, v []byte) error {
			r, err := decodeRecord(v)
			if err == nil {
				err = f(string(k), r)
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
