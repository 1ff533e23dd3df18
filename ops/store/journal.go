// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package store

import (
	"bytes"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"

	"github.com/sirupsen/logrus"
	bolt "go.etcd.io/bbolt"

	"github.com/cri-proxy/cri-proxy/ops/boltfile"
	"github.com/cri-proxy/cri-proxy/ops/guard"
)

var (
	bucketOperations = []byte("operations")
	bucketOverrides  = []byte("overrides")
	bucketUnreadable = []byte("unreadable") // Journal.Load puts records here
	bucketMeta       = []byte("meta")
	keyVersion       = []byte("version")
)

// Journal is the durable list of operations and image overrides, in one bbolt file of mode 0600.
// Every write is on disk when it returns.
type Journal struct {
	*boltfile.File
	log logrus.FieldLogger
}

// OpenJournal opens the journal in dir. If the file is damaged, a new one is begun; what unfinished
// operations have left is then found by the annotation of their containers.
//
// Errors: those of [boltfile.Open].
func OpenJournal(dir string, log logrus.FieldLogger) (*Journal, error) {
	file, err := boltfile.Open(filepath.Join(dir, "journal.db"), boltfile.Options{
		Buckets: [][]byte{bucketOperations},
		Read: func(tx *bolt.Tx) error {
			none := func(_, _ []byte) error { return nil }
			if err := tx.Bucket(bucketOperations).ForEach(none); err != nil || tx.Bucket(bucketOverrides) == nil {
				return err
			}
			return tx.Bucket(bucketOverrides).ForEach(none)
		},
		Lost:    "operations that were under way are not finished",
		Missing: "kubelet is served, operations are refused", Log: log,
	})
	if err != nil {
		return nil, err
	}
	return &Journal{File: file, log: log}, nil
}

// update writes in one transaction.
func (j *Journal) update(change func(*bolt.Tx) error) error {
	err := j.Update(func(tx *bolt.Tx) error { return errors.Join(markVersion(tx), change(tx)) })
	if err != nil {
		return fmt.Errorf("journal: %w", err)
	}
	return nil
}

// markVersion notes in the file that this binary's version has written to it. It writes only if the
// file does not say so yet.
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

// fileVersion is the highest version that has written to the file, 0 if the file does not say.
func fileVersion(tx *bolt.Tx) uint64 {
	b := tx.Bucket(bucketMeta)
	if b == nil {
		return 0
	}
	v, _ := binary.Uvarint(b.Get(keyVersion))
	return v
}

// View reads. It does nothing while there is no file.
func (j *Journal) View(read func(*bolt.Tx) error) error {
	if !j.IsOpen() {
		return nil
	}
	db, err := j.DB()
	if err != nil {
		return err
	}
	return db.View(read)
}

// Put writes the record of an operation and changes to overrides in one transaction. The
// changes are by slot; nil deletes an override.
func (j *Journal) Put(uid string, r *Record, overrides map[string][]byte) error {
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
func (j *Journal) putOverrides(changes map[string][]byte) error {
	if len(changes) == 0 {
		return nil
	}
	return j.update(func(tx *bolt.Tx) error { return changeOverrides(tx, changes) })
}

// changeOverrides makes the bucket only if there is something to put into it: the disk may be full.
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
func (j *Journal) loadOverrides(f func(slot string, raw []byte)) error {
	return j.View(func(tx *bolt.Tx) error {
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

// Remove deletes the records of operations.
func (j *Journal) Remove(uids []string) error {
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

// Load calls f for the record of every operation. It calls left instead for a record that this
// binary does not understand, with the reason and with what could be read of the record; such a
// record stays in the file as it is. A record that cannot be read at all, or that f refuses, is set
// aside, so that it cannot keep the proxy, and kubelet with it, from starting; bad gets the error.
func (j *Journal) Load(
	f func(uid string, r *Record) error, left func(uid string, raw []byte, r *Record, why string), bad func(error),
) error {
	aside := map[string][]byte{}
	err := j.View(func(tx *bolt.Tx) error {
		return tx.Bucket(bucketOperations).ForEach(func(k, v []byte) error {
			r, err := DecodeRecord(v)
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
	if err := j.setAside(aside); err != nil {
		bad(fmt.Errorf("setting aside: %w", err)) // left out this time, and found again the next time
	}
	return nil
}

// setAside moves records out of the way of [Journal.Load].
func (j *Journal) setAside(records map[string][]byte) error {
	return j.update(func(tx *bolt.Tx) error {
		unreadable, err := tx.CreateBucketIfNotExists(bucketUnreadable)
		if err != nil {
			return err
		}
		for uid, v := range records {
			err := errors.Join(unreadable.Put([]byte(uid), v), tx.Bucket(bucketOperations).Delete([]byte(uid)))
			if err != nil {
				return err
			}
		}
		return nil
	})
}

// BootID tells one run of the kernel from the next; empty where the kernel has none.
func BootID() string {
	b, err := os.ReadFile("/proc/sys/kernel/random/boot_id")
	if err != nil {
		return ""
	}
	return string(b)
}
