// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package testbed

import (
	"context"
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"
)

func start(t *testing.T, s *spawner, dir, name, path string, args ...string) *Process {
	t.Helper()
	p, err := s.start(command{name: name, path: path, args: args, log: filepath.Join(dir, name+".log")}, dir)
	if err != nil {
		t.Fatal(err)
	}
	return p
}

func TestProcessStop(t *testing.T) {
	s := newSpawner(true)
	defer s.close()
	dir := t.TempDir()
	for _, tc := range []struct {
		name, script string
		sig          syscall.Signal
		cancelled    bool // stop's context is done: no grace
		want         syscall.WaitStatus
	}{
		{"ends on the signal", "echo up; exec sleep 100", syscall.SIGTERM, false, syscall.WaitStatus(syscall.SIGTERM)},
		{"ends on its own way", "trap 'exit 7' TERM; echo up; while :; do sleep 0.01; done", syscall.SIGTERM,
			false, 7 << 8},
		{"ignores the signal and is killed", "trap '' TERM; echo up; while :; do sleep 0.01; done", syscall.SIGTERM,
			true, syscall.WaitStatus(syscall.SIGKILL)},
	} {
		t.Run(tc.name, func(t *testing.T) {
			p := start(t, s, dir, strings.ReplaceAll(tc.name, " ", "-"), "/bin/sh", "-c", tc.script)
			// The trap is set once it has spoken.
			err := p.ready(t.Context(), func(context.Context) error {
				if !strings.Contains(tail(p.LogFile, 100), "up") {
					return errors.New("silent")
				}
				return nil
			})
			if err != nil {
				t.Fatal(err)
			}
			ctx, cancel := context.WithCancel(t.Context())
			defer cancel()
			if tc.cancelled {
				cancel()
			}
			if err := p.stop(ctx, tc.sig); err != nil {
				t.Fatal(err)
			}
			var exit *exec.ExitError
			if !errors.As(p.Err(), &exit) || exit.Sys().(syscall.WaitStatus) != tc.want {
				t.Errorf("ended with %v, want status %#x", p.Err(), tc.want)
			}
			if p.Running() {
				t.Error("it is still there")
			}
			if err := p.Signal(syscall.SIGTERM); !errors.Is(err, os.ErrProcessDone) {
				t.Errorf("signal after the end: %v", err)
			}
		})
	}
}

func TestReadyQuotesTheLogOfADeadProcess(t *testing.T) {
	s := newSpawner(true)
	defer s.close()
	p := start(t, s, t.TempDir(), "broken", "/bin/sh", "-c", "echo no such config >&2; exit 2")
	began := time.Now()
	err := p.ready(t.Context(), func(context.Context) error { return errors.New("not yet") })
	if err == nil || !strings.Contains(err.Error(), "no such config") ||
		!strings.Contains(err.Error(), "exit status 2") {
		t.Errorf("got %v", err)
	}
	if time.Since(began) > readyTimeout/2 {
		t.Error("it waited for a dead process")
	}
}

func TestIdentity(t *testing.T) {
	s := newSpawner(true)
	defer s.close()
	p := start(t, s, t.TempDir(), "sleep", "/bin/sleep", "100")
	recorded, err := identify(p.PID)
	if err != nil {
		t.Fatal(err)
	}
	for _, tc := range []struct {
		name   string
		change func(*identity)
		want   bool
	}{
		{"same", func(*identity) {}, true},
		{"reused pid", func(id *identity) { id.Start++ }, false},
		{"other boot", func(id *identity) { id.Boot = "x" }, false},
		{"after another exec", func(id *identity) { id.Exe = "/bin/false" }, true},
		{"nobody", func(id *identity) { *id = identity{} }, false},
		{"init", func(id *identity) { id.PID = 1 }, false},
	} {
		t.Run(tc.name, func(t *testing.T) {
			id := recorded
			tc.change(&id)
			if got := id.alive(); got != tc.want {
				t.Errorf("alive is %v", got)
			}
			if !tc.want {
				if err := id.kill(t.Context()); err != nil {
					t.Errorf("kill of a process that is not there: %v", err)
				}
			}
		})
	}
	if !recorded.alive() {
		t.Fatal("a kill that was meant for another process hit this one")
	}
	if err := recorded.kill(t.Context()); err != nil {
		t.Fatal(err)
	}
	<-p.Done()
}
