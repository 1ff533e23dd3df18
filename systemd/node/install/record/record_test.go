// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package record_test

import (
	"os"
	"path/filepath"
	"testing"

	"github.com/cri-proxy/cri-proxy/systemd/node/install/plan"
	"github.com/cri-proxy/cri-proxy/systemd/node/install/record"
	"github.com/cri-proxy/cri-proxy/systemd/node/kubelet"
)

func write600(t *testing.T, path, content string) {
	t.Helper()
	if err := os.WriteFile(path, []byte(content), 0o600); err != nil {
		t.Fatal(err)
	}
}

func contentOf(t *testing.T, path string) string {
	t.Helper()
	b, err := plan.Read(path)
	if err != nil {
		t.Fatal(err)
	}
	if b == nil {
		return "(none)"
	}
	return string(b)
}

// What is put back is what was there, also when somebody else has changed a file since.
func TestRecord(t *testing.T) {
	for _, c := range []struct {
		name          string
		before, after string
		now, want     string // now is what somebody else has made of it
	}{
		{"as we left it", "e: old # x\n", "e: ours # x\n", "e: ours # x\n", "e: old # x\n"},
		{"changed since", "e: old\n", "e: ours\n", "e: ours\nmore: 1\n", "e: old\nmore: 1\n"},
		{"put back by somebody else", "e: old\n", "e: ours\n", "e: old\nmore: 1\n", "e: old\nmore: 1\n"},
		{"not written yet", "e: old\n", "e: ours\n", "e: old\n", "e: old\n"},
		{"taken away", "e: old\n", "e: ours\n", "(none)", "(none)"},
		{"a file of ours", "(none)", "e: ours\n", "e: ours\n", "(none)"},
		{"a file of ours, changed", "(none)", "e: ours\n", "e: ours\nmore: 1\n", "e: old\nmore: 1\n"},
		{"a file of ours, not written yet", "(none)", "e: ours\n", "(none)", "(none)"},
	} {
		t.Run(c.name, func(t *testing.T) {
			dir := t.TempDir()
			path := filepath.Join(dir, "kubelet.d", "f.conf")
			if err := os.Mkdir(filepath.Dir(path), 0o755); err != nil {
				t.Fatal(err)
			}
			e := kubelet.Edit{Path: path, After: []byte(c.after), Mode: 0o600}
			if c.before != "(none)" {
				e.Before = []byte(c.before)
			}
			r := &record.Record{Dir: filepath.Join(dir, "record"), Endpoint: "old", Ours: "ours"}
			if err := r.Keep([]kubelet.Edit{e}); err != nil {
				t.Fatal(err)
			}
			if c.now != "(none)" {
				write600(t, path, c.now)
			}
			r, err := record.Read(r.Dir)
			if err != nil || !r.Exists() || !r.Pending {
				t.Fatalf("%+v, %v", r, err)
			}
			did, err := r.Restore()
			if err != nil || did != (c.now != c.want) {
				t.Errorf("%v, %v", did, err)
			}
			if got := contentOf(t, path); got != c.want {
				t.Errorf("%q, want %q", got, c.want)
			}
			if did, err := r.Restore(); did || err != nil {
				t.Errorf("once more: %v, %v", did, err)
			}
			if err := r.Forget(); err != nil {
				t.Error(err)
			}
		})
	}
}
