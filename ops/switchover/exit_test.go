// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package switchover_test

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/cri-proxy/cri-proxy/ops/switchover"
)

const waitLong = 2 * time.Minute

// hasExited reports whether the process has exited: each cgroup has a name with a slash.
func hasExited(pid int) bool { return switchover.OfContainer(pid, "/") != nil }

// child is a process that lives until it is killed.
func child(t *testing.T) (pid int, kill func()) {
	t.Helper()
	cmd := exec.Command("sleep", "100000")
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	reaped := false
	kill = func() {
		if !reaped {
			_ = cmd.Process.Kill() // it lives
			_ = cmd.Wait()         // it was killed
			reaped = true
		}
	}
	t.Cleanup(kill)
	return cmd.Process.Pid, kill
}

func awaitClosed(t *testing.T, c <-chan struct{}) {
	t.Helper()
	select {
	case <-c:
	case <-time.After(waitLong):
		t.Fatal("it is not told")
	}
}

func TestExitWatch(t *testing.T) {
	t.Run("ends", func(t *testing.T) {
		pid, kill := child(t)
		w, err := switchover.WatchProcess(pid)
		if err != nil {
			t.Fatal(err)
		}
		defer w.Close()
		if w.Over() {
			t.Error("over before the end")
		}
		before := time.Now()
		kill()
		awaitClosed(t, w.Ended())
		if !w.Over() || w.At().Before(before) || w.At().After(time.Now()) {
			t.Errorf("over: %t, at %s, killed after %s", w.Over(), w.At(), before)
		}
		w.Close()
		if !w.Over() {
			t.Error("not over any more")
		}
	})
	t.Run("has ended, and nobody has asked for it", func(t *testing.T) {
		cmd := exec.Command("true")
		if err := cmd.Start(); err != nil {
			t.Fatal(err)
		}
		w, err := switchover.WatchProcess(cmd.Process.Pid)
		if err != nil {
			t.Fatal(err)
		}
		defer w.Close()
		awaitClosed(t, w.Ended())
		if err := cmd.Wait(); err != nil {
			t.Error(err)
		}
	})
	t.Run("closed before the end", func(t *testing.T) {
		pid, kill := child(t)
		w, err := switchover.WatchProcess(pid)
		if err != nil {
			t.Fatal(err)
		}
		w.Close()
		w.Close() // again is fine
		awaitClosed(t, w.Done())
		select {
		case <-w.Ended():
			t.Error("the end of the watch is told as the end of the process")
		default:
		}
		if w.Over() {
			t.Error("over")
		}
		kill()
	})
	t.Run("gone before", func(t *testing.T) {
		pid, kill := child(t)
		kill()
		if w, err := switchover.Watch(pid, ""); !errors.Is(err, unix.ESRCH) || w != nil {
			t.Errorf("got %v, %v", w, err)
		}
	})
	t.Run("none", func(t *testing.T) {
		var w *switchover.Exit
		w.Close()
		if w.Over() || w.Ended() != nil {
			t.Error("over")
		}
	})
}

func TestExitWatchOfAnotherContainer(t *testing.T) {
	pid, _ := child(t)
	open := func() int {
		fds, err := os.ReadDir("/proc/self/fd")
		if err != nil {
			t.Fatal(err)
		}
		return len(fds)
	}
	before := open()
	for range 10 {
		if w, err := switchover.Watch(pid, "0123456789abcdef"); err == nil {
			w.Close()
			t.Fatal("watches a process that is none of the container")
		}
	}
	if after := open(); after > before+5 { // other tests have some too
		t.Errorf("%d descriptors, %d before", after, before)
	}
	w, err := switchover.Watch(pid, "/") // every cgroup has a name with this in it
	if err != nil {
		t.Fatal(err)
	}
	w.Close()
}

// A process that has exited belongs to no container, though the kernel lists it until its parent
// has waited for it.
func TestEndedProcess(t *testing.T) {
	cmd := exec.Command("true")
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	pid := cmd.Process.Pid
	for late := time.Now().Add(waitLong); !hasExited(pid) && time.Now().Before(late); time.Sleep(time.Millisecond) {
	}
	if _, err := os.Stat(fmt.Sprintf("/proc/%d", pid)); err != nil || !hasExited(pid) {
		t.Errorf("%v, ended: %t", err, hasExited(pid))
	}
	if err := cmd.Wait(); err != nil {
		t.Fatal(err)
	}
	if !hasExited(pid) || hasExited(os.Getpid()) {
		t.Errorf("ended: %t, this process: %t", hasExited(pid), hasExited(os.Getpid()))
	}
}

// firstThreadEnds makes the test's program one whose first thread ends and whose others go on.
const firstThreadEnds = "OPS_TEST_FIRST_THREAD_ENDS"

func init() { //nolint:gochecknoinits // the first thread runs it
	if os.Getenv(firstThreadEnds) != "" {
		go func() {
			time.Sleep(waitLong)
			os.Exit(1)
		}()
		_, _, _ = unix.Syscall(unix.SYS_EXIT, 0, 0, 0) // never returns
	}
}

// A process whose first thread has exited goes on as long as other threads do, though the kernel
// shows a zombie.
func TestEndedThread(t *testing.T) {
	cmd := exec.Command(os.Args[0])
	cmd.Env = append(os.Environ(), firstThreadEnds+"=1")
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	pid := cmd.Process.Pid
	for late := time.Now().Add(waitLong); ; time.Sleep(time.Millisecond) {
		b, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
		if err != nil || bytes.Contains(b, []byte(") Z ")) || time.Now().After(late) {
			break
		}
	}
	if hasExited(pid) {
		t.Error("it has ended with its first thread")
	}
	if err := cmd.Process.Kill(); err != nil {
		t.Error(err)
	}
	for late := time.Now().Add(waitLong); !hasExited(pid) && time.Now().Before(late); time.Sleep(time.Millisecond) {
	}
	if !hasExited(pid) {
		t.Error("it has not ended with all")
	}
	_ = cmd.Wait() // it was killed
}
