// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package main

import (
	"errors"
	"io"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/cri-proxy/cri-proxy/internal/config"
)

func TestFlagsAndFile(t *testing.T) {
	dir := t.TempDir()
	file := filepath.Join(dir, "c.yaml")
	if err := os.WriteFile(file, []byte("nodeName: from-file\nstateDir: /file\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	run := func(args ...string) (string, error) {
		cmd := newServe()
		var out strings.Builder
		cmd.SetOut(&out)
		cmd.SetErr(io.Discard)
		cmd.SetArgs(args)
		cmd.SilenceErrors, cmd.SilenceUsage = true, true
		err := cmd.Execute()
		return out.String(), err
	}
	out, err := run("--config", file, "--state-dir", "/flag", "--print-config")
	if err != nil || !strings.Contains(out, "nodeName: from-file\n") || !strings.Contains(out, "stateDir: /flag\n") {
		t.Errorf("%v\n%s", err, out)
	}
	for name, args := range map[string][]string{
		"missing file":  {"--config", filepath.Join(dir, "none")},
		"invalid value": {"--listen", "relative"},
	} {
		var invalid *config.InvalidError
		if _, err := run(args...); !errors.As(err, &invalid) {
			t.Errorf("%s: %v", name, err)
		}
	}
}
