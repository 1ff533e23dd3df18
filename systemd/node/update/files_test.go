// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package update_test

import (
	"os"
	"path/filepath"
	"testing"

	"github.com/cri-proxy/cri-proxy/systemd/node/update"
)

// TestNewPrefix: below a prefix nothing need be there yet.
func TestNewPrefix(t *testing.T) {
	dir := t.TempDir()
	prefix := update.Prefix(filepath.Join(dir, "opt"))
	binary := filepath.Join(dir, "program")
	if err := os.WriteFile(binary, []byte("binary"), 0o755); err != nil {
		t.Fatal(err)
	}
	instance, err := update.Install(prefix, "a", binary, "v1")
	if err != nil {
		t.Fatal(err)
	}
	for _, path := range []string{prefix.BinLink(), filepath.Join(instance, "cri-proxy")} {
		if b, err := os.ReadFile(path); err != nil || string(b) != "binary" {
			t.Errorf("%s: %q %v", path, b, err)
		}
	}
}
