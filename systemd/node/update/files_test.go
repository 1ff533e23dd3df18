// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package update

import (
	"os"
	"path/filepath"
	"testing"
)

// TestNewPrefix: below a prefix nothing need be there yet.
func TestNewPrefix(t *testing.T) {
	dir := t.TempDir()
	l := Prefix(filepath.Join(dir, "opt")).layout()
	binary := filepath.Join(dir, "program")
	if err := os.WriteFile(binary, []byte("binary"), 0o755); err != nil {
		t.Fatal(err)
	}
	version, err := l.install(binary, "v1")
	if err == nil {
		err = l.use("a", version)
	}
	if err == nil {
		err = link(l.binary(version), l.bin)
	}
	if err != nil {
		t.Fatal(err)
	}
	for _, path := range []string{l.bin, filepath.Join(l.instance("a"), "cri-proxy")} {
		if b, err := os.ReadFile(path); err != nil || string(b) != "binary" {
			t.Errorf("%s: %q %v", path, b, err)
		}
	}
}
