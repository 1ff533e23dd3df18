// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package store

// Store is all that a process has on disk of its operations.
type Store struct {
	Journal   *Journal
	Records   *Records
	Overrides *Overrides
	// Boot is the boot of the machine; empty if the kernel does not tell.
	Boot string
}

// Save writes the record of an operation and the overrides that are not on disk yet: all of it or
// nothing.
func (s *Store) Save(uid string, r *Record) error {
	r.Boot = s.Boot
	return s.Overrides.Write(func(changes map[string][]byte) error { return s.Journal.Put(uid, r, changes) })
}
