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
)

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
