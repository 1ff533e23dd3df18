// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package record

import (
	"bytes"
	"crypto/sha256"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"time"

	"github.com/cri-proxy/cri-proxy/internal/atomicfile"
	"github.com/cri-proxy/cri-proxy/systemd/node/install/plan"
	"github.com/cri-proxy/cri-proxy/systemd/node/kubelet"
)

// Dir has copies of kubelet's files. It is made before the first of the files is changed, and
// removed when all are restored.
const Dir = "/var/lib/cri-proxy/install"

// Record tells how kubelet was before. It is on the disk before anything of kubelet's is changed.
type Record struct {
	Time time.Time `json:"time"`
	// Unit is kubelet's.
	Unit string `json:"unit"`
	// Endpoint is what kubelet dialled, and Ours what it dials since.
	Endpoint string `json:"endpoint"`
	Ours     string `json:"ours"`
	Files    []File `json:"files,omitempty"`
	// Pending is set from before files are changed until kubelet has been seen to run with them.
	Pending bool `json:"pending,omitempty"`

	// Dir is where the record is. See [Dir].
	Dir string `json:"-"`
}

// File is a file of kubelet's that has been changed.
type File struct {
	Path string      `json:"path"`
	Mode os.FileMode `json:"mode"`
	// Backup is its name in the directory of the record, empty if there was no such file.
	Backup string `json:"backup,omitempty"`
	// After is the digest of what it was changed to.
	After string `json:"after"`
}

func digest(b []byte) string { return fmt.Sprintf("%x", sha256.Sum256(b)) }

// Read returns the record in dir, empty if there is none.
func Read(dir string) (*Record, error) {
	r := &Record{Dir: dir}
	b, err := plan.Read(filepath.Join(dir, "record.json"))
	if err != nil || b == nil {
		return r, err
	}
	if err := json.Unmarshal(b, r); err != nil {
		return nil, fmt.Errorf("%s: %w; put kubelet's files back by hand, they are beside it, and remove the directory",
			filepath.Join(dir, "record.json"), err)
	}
	return r, nil
}

// Exists reports whether there is a record.
func (r *Record) Exists() bool { return !r.Time.IsZero() }

// Write writes the record.
func (r *Record) Write() error {
	b, err := json.MarshalIndent(r, "", "  ")
	if err != nil {
		return err
	}
	if r.Time.IsZero() {
		r.Time = time.Now()
		return r.Write()
	}
	if err := os.MkdirAll(r.Dir, 0o700); err != nil {
		return err
	}
	return atomicfile.Write(filepath.Join(r.Dir, "record.json"), append(b, '\n'), 0o600)
}

// Keep notes files before they are changed.
func (r *Record) Keep(edits []kubelet.Edit) error {
	if err := os.MkdirAll(r.Dir, 0o700); err != nil {
		return err
	}
	for _, e := range edits {
		k := File{Path: e.Path, Mode: e.Mode, After: digest(e.After)}
		at := len(r.Files)
		for i, old := range r.Files {
			if old.Path == e.Path {
				at = i
			}
		}
		if e.Before != nil {
			k.Backup = fmt.Sprintf("%d-%s", at, filepath.Base(e.Path))
			if err := atomicfile.Write(filepath.Join(r.Dir, k.Backup), e.Before, 0o600); err != nil {
				return err
			}
		}
		if at == len(r.Files) {
			r.Files = append(r.Files, k)
		} else {
			r.Files[at] = k
		}
	}
	r.Pending = true
	return r.Write()
}

// Original returns what a file was. If somebody else has changed the file since, original returns
// it as it is now, with the former endpoint instead of ours. ok is false if there is nothing to
// restore.
func (r *Record) Original(k File) (before, after []byte, ok bool, err error) {
	now, err := plan.Read(k.Path)
	if err != nil || now == nil {
		return nil, nil, false, err
	}
	if digest(now) == k.After {
		if k.Backup == "" {
			return now, nil, true, nil
		}
		b, err := os.ReadFile(filepath.Join(r.Dir, k.Backup))
		return now, b, true, err
	}
	was := bytes.ReplaceAll(now, []byte(r.Ours), []byte(r.Endpoint))
	return now, was, !bytes.Equal(now, was), nil
}

// Astray returns a file that told kubelet what to dial, and now has neither our endpoint nor the
// former one: kubelet may have been told elsewhere since. It returns "" if there is none.
func (r *Record) Astray() (string, error) {
	for _, k := range r.Files {
		now, err := plan.Read(k.Path)
		if err != nil {
			return "", err
		}
		var was []byte
		if k.Backup != "" {
			if was, err = os.ReadFile(filepath.Join(r.Dir, k.Backup)); err != nil {
				return "", err
			}
		}
		back := (now == nil) == (k.Backup == "") && bytes.Equal(now, was)
		if !back && !bytes.Contains(now, []byte(r.Ours)) && !bytes.Contains(now, []byte(r.Endpoint)) {
			return k.Path, nil
		}
	}
	return "", nil
}

// Restore puts kubelet's files back. It reports whether there was anything to do.
func (r *Record) Restore() (did bool, err error) {
	var errs []error
	for _, k := range r.Files {
		_, was, ok, err := r.Original(k)
		if err == nil && ok {
			did = true
			err = plan.Put(k.Path, was, k.Mode)
		}
		errs = append(errs, err)
	}
	return did, errors.Join(errs...)
}

// Forget removes the record and the backups.
func (r *Record) Forget() error { return os.RemoveAll(r.Dir) }
