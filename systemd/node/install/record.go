// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package install

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
	"github.com/cri-proxy/cri-proxy/systemd/node/kubelet"
)

// recordDir has copies of kubelet's files. It is made before the first of the files is changed, and
// removed when all are restored.
const recordDir = "/var/lib/cri-proxy/install"

// record tells how kubelet was before. It is on the disk before anything of kubelet's is changed.
type record struct {
	Time time.Time `json:"time"`
	// Unit is kubelet's.
	Unit string `json:"unit"`
	// Endpoint is what kubelet dialled, and Ours what it dials since.
	Endpoint string `json:"endpoint"`
	Ours     string `json:"ours"`
	Files    []kept `json:"files,omitempty"`
	// Pending is set from before files are changed until kubelet has been seen to run with them.
	Pending bool `json:"pending,omitempty"`

	dir string
}

// kept is a file of kubelet's that has been changed.
type kept struct {
	Path string      `json:"path"`
	Mode os.FileMode `json:"mode"`
	// Backup is its name in the directory of the record, empty if there was no such file.
	Backup string `json:"backup,omitempty"`
	// After is the digest of what it was changed to.
	After string `json:"after"`
}

func digest(b []byte) string { return fmt.Sprintf("%x", sha256.Sum256(b)) }

// readRecord returns the record in dir, empty if there is none.
func readRecord(dir string) (*record, error) {
	r := &record{dir: dir}
	b, err := read(filepath.Join(dir, "record.json"))
	if err != nil || b == nil {
		return r, err
	}
	if err := json.Unmarshal(b, r); err != nil {
		return nil, fmt.Errorf("%s: %w; put kubelet's files back by hand, they are beside it, and remove the directory",
			filepath.Join(dir, "record.json"), err)
	}
	return r, nil
}

func (r *record) exists() bool { return !r.Time.IsZero() }

func (r *record) write() error {
	b, err := json.MarshalIndent(r, "", "  ")
	if err != nil {
		return err
	}
	if r.Time.IsZero() {
		r.Time = time.Now()
		return r.write()
	}
	if err := os.MkdirAll(r.dir, 0o700); err != nil {
		return err
	}
	return atomicfile.Write(filepath.Join(r.dir, "record.json"), append(b, '\n'), 0o600)
}

// keep notes files before they are changed.
func (r *record) keep(edits []kubelet.Edit) error {
	if err := os.MkdirAll(r.dir, 0o700); err != nil {
		return err
	}
	for _, e := range edits {
		k := kept{Path: e.Path, Mode: e.Mode, After: digest(e.After)}
		at := len(r.Files)
		for i, old := range r.Files {
			if old.Path == e.Path {
				at = i
			}
		}
		if e.Before != nil {
			k.Backup = fmt.Sprintf("%d-%s", at, filepath.Base(e.Path))
			if err := atomicfile.Write(filepath.Join(r.dir, k.Backup), e.Before, 0o600); err != nil {
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
	return r.write()
}

// original returns what a file was. If somebody else has changed the file since, original returns
// it as it is now, with the former endpoint instead of ours. ok is false if there is nothing to
// restore.
func (r *record) original(k kept) (before, after []byte, ok bool, err error) {
	now, err := read(k.Path)
	if err != nil || now == nil {
		return nil, nil, false, err
	}
	if digest(now) == k.After {
		if k.Backup == "" {
			return now, nil, true, nil
		}
		b, err := os.ReadFile(filepath.Join(r.dir, k.Backup))
		return now, b, true, err
	}
	was := bytes.ReplaceAll(now, []byte(r.Ours), []byte(r.Endpoint))
	return now, was, !bytes.Equal(now, was), nil
}

// astray returns a file that told kubelet what to dial, and now has neither our endpoint nor the
// former one: kubelet may have been told elsewhere since. It returns "" if there is none.
func (r *record) astray() (string, error) {
	for _, k := range r.Files {
		now, err := read(k.Path)
		if err != nil {
			return "", err
		}
		var was []byte
		if k.Backup != "" {
			if was, err = os.ReadFile(filepath.Join(r.dir, k.Backup)); err != nil {
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

// restore puts kubelet's files back. It reports whether there was anything to do.
func (r *record) restore() (did bool, err error) {
	var errs []error
	for _, k := range r.Files {
		_, was, ok, err := r.original(k)
		if err == nil && ok {
			did = true
			err = put(k.Path, was, k.Mode)
		}
		errs = append(errs, err)
	}
	return did, errors.Join(errs...)
}

// forget removes the record and the backups.
func (r *record) forget() error { return os.RemoveAll(r.dir) }
