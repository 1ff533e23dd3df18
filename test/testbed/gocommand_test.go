// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package testbed

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"
)

// fakeGo puts a program named go into PATH that starts a child and never ends. It returns a
// function that waits for both.
func fakeGo(t *testing.T) (started func() (command, child identity)) {
	t.Helper()
	dir := t.TempDir()
	pids := filepath.Join(dir, "pids")
	script := "#!/bin/sh\nsleep 600 & echo $$ $! >" + pids + ".tmp\nmv " + pids + ".tmp " + pids + "\nwait\n"
	if err := os.WriteFile(filepath.Join(dir, "go"), []byte(script), 0o755); err != nil {
		t.Fatal(err)
	}
	t.Setenv("PATH", dir+":"+os.Getenv("PATH"))
	return func() (command, child identity) {
		t.Helper()
		var b []byte
		waitUntil(t, func() (err error) {
			b, err = os.ReadFile(pids)
			return err
		})
		ids := make([]identity, 2)
		for i, f := range strings.Fields(string(b)) {
			pid, err := strconv.Atoi(f)
			if err != nil {
				t.Fatal(err)
			}
			if ids[i], err = identify(pid); err != nil {
				t.Fatal(err)
			}
			t.Cleanup(func() { _ = ids[i].kill(context.Background()) })
		}
		return ids[0], ids[1]
	}
}

// waitUntil waits until cond returns nil.
func waitUntil(t *testing.T, cond func() error) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
	defer cancel()
	if err := poll(ctx, cond); err != nil {
		t.Fatal(err)
	}
}

func ended(id identity) func() error {
	return func() error {
		if id.alive() {
			return fmt.Errorf("process %d (%s) still runs", id.PID, id.Exe)
		}
		return nil
	}
}

func TestGoCommandEndsWithItsContext(t *testing.T) {
	started := fakeGo(t)
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	done := make(chan error, 1)
	go func() {
		_, err := goCommand(ctx, t.TempDir(), nil, "build")
		done <- err
	}()
	command, child := started()
	cancel()
	if err := <-done; err == nil {
		t.Error("the command was cancelled, and there is no error")
	}
	waitUntil(t, ended(command))
	waitUntil(t, ended(child))
}

func TestGoCommandEndsWithItsOwner(t *testing.T) {
	started := fakeGo(t)
	owner := exec.Command(os.Args[0])
	owner.Env = append(os.Environ(), helperEnv+"="+helperGo)
	if err := owner.Start(); err != nil {
		t.Fatal(err)
	}
	command, _ := started()
	if err := owner.Process.Kill(); err != nil {
		t.Fatal(err)
	}
	var exit *exec.ExitError
	if err := owner.Wait(); !errors.As(err, &exit) {
		t.Fatal(err)
	}
	waitUntil(t, ended(command))
}

func TestRemoveUnfinished(t *testing.T) {
	store := t.TempDir()
	c := component{dir: "containerd"}
	left := filepath.Join(store, ".tmp-containerd-1")
	others := []string{".tmp-containerd17-1", ".tmp-1", "containerd-1"}
	for _, dir := range append(others, filepath.Base(left)) {
		if err := os.MkdirAll(filepath.Join(store, dir, "work"), 0o755); err != nil {
			t.Fatal(err)
		}
	}
	unlock, err := lockFile(t.Context(), c.lock(store))
	if err != nil {
		t.Fatal(err)
	}
	if err := c.removeUnfinished(store); err != nil {
		t.Fatal(err)
	}
	if _, err := os.Stat(left); err != nil {
		t.Errorf("a build goes on, and its directory is gone: %v", err)
	}
	unlock()
	if err := c.removeUnfinished(store); err != nil {
		t.Fatal(err)
	}
	if _, err := os.Stat(left); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("nobody builds, and the directory is there: %v", err)
	}
	for _, dir := range others {
		if _, err := os.Stat(filepath.Join(store, dir)); err != nil {
			t.Error(err)
		}
	}
}
