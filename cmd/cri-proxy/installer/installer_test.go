// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package installer

import (
	"bufio"
	"context"
	"io"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/cri-proxy/cri-proxy/cmd/cri-proxy/upgrade"
)

func TestPrefix(t *testing.T) {
	host := t.TempDir()
	for _, tt := range []struct{ args, record, want string }{
		{"", "", "/usr/local"},
		{"--ops-address=:10260 --prefix=/opt", "", "/opt"},
		{"--prefix /opt/ --no-kubelet", "/srv", "/opt"},
		{"--purge", "/srv", "/srv"}, // an uninstall is not told
		{"--prefix", "", "/usr/local"},
	} {
		file := filepath.Join(host, upgrade.PrefixFile)
		_ = os.RemoveAll(filepath.Dir(file))
		if tt.record != "" {
			if err := os.MkdirAll(filepath.Dir(file), 0o755); err != nil {
				t.Fatal(err)
			}
			if err := os.WriteFile(file, []byte(tt.record+"\n"), 0o644); err != nil {
				t.Fatal(err)
			}
		}
		i := &installer{host: host, args: tt.args}
		if got, err := i.prefix(); err != nil || string(got) != tt.want {
			t.Errorf("%q, %q: %s, %v", tt.args, tt.record, got, err)
		}
	}
}

// A container that ends would be started again, so one that could not do its work stays, and is not ready.
func TestFailureStays(t *testing.T) {
	for action, stays := range map[string]bool{check: false, install: true, uninstall: true} {
		t.Run(action, func(t *testing.T) {
			ctx, cancel := context.WithCancel(t.Context())
			defer cancel()
			r, w := io.Pipe()
			done := filepath.Join(t.TempDir(), "done")
			i := &installer{action: action, host: t.TempDir(), done: done, out: w} // a node without systemd
			result := make(chan error, 1)
			go func() {
				result <- i.run(ctx)
				_ = w.Close()
			}()
			said := false
			for lines := bufio.NewScanner(r); lines.Scan(); {
				if strings.Contains(lines.Text(), "waiting to be stopped") {
					said = true
					if len(result) > 0 {
						t.Error("it did not stay")
					}
					cancel()
				}
			}
			if err := <-result; err == nil || !strings.Contains(err.Error(), "no systemd-run") || said != stays {
				t.Error(said, err)
			}
			if _, err := os.Stat(done); err == nil {
				t.Error("it is ready")
			}
		})
	}
}
