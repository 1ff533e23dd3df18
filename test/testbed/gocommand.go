// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package testbed

import (
	"context"
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"syscall"

	"golang.org/x/sys/unix"
)

// goCommand runs the go command in dir, with env added to this process's, and returns what it
// printed. When ctx ends, the command is killed together with the compilers that it has started.
// When this process ends, even by SIGKILL, the kernel kills the command: a compiler that runs then
// ends with its package, and nothing starts the next one.
func goCommand(ctx context.Context, dir string, env []string, args ...string) ([]byte, error) {
	// The kernel sends the signal when the thread that forked ends, and Go ends threads as it
	// likes.
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	cmd := exec.CommandContext(ctx, "go", args...)
	cmd.Dir = dir
	cmd.Env = append(os.Environ(), env...)
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true, Pdeathsig: syscall.SIGKILL}
	cmd.Cancel = func() error {
		err := unix.Kill(-cmd.Process.Pid, unix.SIGKILL)
		if errors.Is(err, unix.ESRCH) {
			return os.ErrProcessDone
		}
		return err
	}
	return cmd.CombinedOutput()
}

// unfinished begins the name of the directory that a build of the component writes to.
func (c component) unfinished() string { return ".tmp-" + c.dir + "-" }

// lock is the file that a build of the component holds locked.
func (c component) lock(store string) string { return filepath.Join(store, "."+c.dir+".lock") }

// removeUnfinished removes what builds of the component left behind that were killed. A build that
// goes on holds the lock, and keeps its directory.
func (c component) removeUnfinished(store string) error {
	left, err := filepath.Glob(filepath.Join(store, c.unfinished()+"*"))
	if err != nil || len(left) == 0 {
		return err
	}
	lock, err := os.OpenFile(c.lock(store), os.O_CREATE|os.O_RDWR, 0o644)
	if err != nil {
		return err
	}
	defer lock.Close()
	if err := unix.Flock(int(lock.Fd()), unix.LOCK_EX|unix.LOCK_NB); err != nil {
		if errors.Is(err, unix.EWOULDBLOCK) {
			return nil
		}
		return err
	}
	for _, dir := range left {
		err = errors.Join(err, os.RemoveAll(dir))
	}
	return err
}
