// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package main

import (
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
)

func TestLeftOver(t *testing.T) {
	for args, want := range map[string][2]string{
		"":                               {"", ""},
		"--prefix=/opt --purge":          {"--prefix=/opt --purge", ""},
		"--ops-address=:10260":           {"", "--ops-address=:10260"},
		"--ops-address :1 --prefix /opt": {"--prefix /opt", "--ops-address :1"},
		"--no-kubelet --ops-address":     {"--no-kubelet", "--ops-address"},
		"--porge x --timeout=1m":         {"--porge x --timeout=1m", ""}, // a slip is told
		"--timeout --ops-address=:1":     {"--timeout --ops-address=:1", ""},
		"--upgrade-drain-timeout 1m":     {"", "--upgrade-drain-timeout 1m"}, // by its old name
	} {
		kept, left := leftOver(strings.Fields(args))
		if got := [2]string{strings.Join(kept, " "), strings.Join(left, " ")}; got != want {
			t.Errorf("%q: %q, want %q", args, got, want)
		}
	}
}

// A process whose reader and whose session are gone goes on.
func TestOutlive(t *testing.T) {
	if file := os.Getenv("OUTLIVE_FILE"); file != "" {
		outlive()
		_, werr := os.Stdout.WriteString("to nobody\n")
		if err := errors.Join(unix.Kill(os.Getpid(), unix.SIGHUP),
			os.WriteFile(file, []byte("on"), 0o600)); err != nil || !errors.Is(werr, unix.EPIPE) {
			t.Fatal(err, werr)
		}
		os.Exit(0)
	}
	r, w, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	file := filepath.Join(t.TempDir(), "file")
	cmd := exec.CommandContext(t.Context(), os.Args[0], "-test.run=^TestOutlive$")
	cmd.Env = append(os.Environ(), "OUTLIVE_FILE="+file)
	cmd.Stdout, cmd.Stderr = w, w
	if err := errors.Join(r.Close(), cmd.Run(), w.Close()); err != nil {
		t.Error(err)
	}
	if got, err := os.ReadFile(file); err != nil || string(got) != "on" {
		t.Errorf("%q, %v", got, err)
	}
}
