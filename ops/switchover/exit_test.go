// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package ops

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

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
		w, err := watchProcess(pid)
		if err != nil {
			t.Fatal(err)
		}
		defer w.close()
		if w.over() {
			t.Error("over before the end")
		}
		before := time.Now()
		kill()
		awaitClosed(t, w.ended())
		if !w.over() || w.at.Before(before) || w.at.After(time.Now()) {
			t.Errorf("over: %t, at %s, killed after %s", w.over(), w.at, before)
		}
		w.close()
		if !w.over() {
			t.Error("not over any more")
		}
	})
	t.Run("has ended, and nobody has asked for it", func(t *testing.T) {
		cmd := exec.Command("true")
		if err := cmd.Start(); err != nil {
			t.Fatal(err)
		}
		w, err := watchProcess(cmd.Process.Pid)
		if err != nil {
			t.Fatal(err)
		}
		defer w.close()
		awaitClosed(t, w.ended())
		if err := cmd.Wait(); err != nil {
			t.Error(err)
		}
	})
	t.Run("closed before the end", func(t *testing.T) {
		pid, kill := child(t)
		w, err := watchProcess(pid)
		if err != nil {
			t.Fatal(err)
		}
		w.close()
		w.close() // again is fine
		awaitClosed(t, w.done)
		select {
		case <-w.ended():
			t.Error("the end of the watch is told as the end of the process")
		default:
		}
		if w.over() {
			t.Error("over")
		}
		kill()
	})
	t.Run("gone before", func(t *testing.T) {
		pid, kill := child(t)
		kill()
		if w, err := watchExit(pid, ""); !errors.Is(err, unix.ESRCH) || w != nil {
			t.Errorf("got %v, %v", w, err)
		}
	})
	t.Run("none", func(t *testing.T) {
		var w *exitWatch
		w.close()
		if w.over() || w.ended() != nil {
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
		if w, err := watchExit(pid, "0123456789abcdef"); err == nil {
			w.close()
			t.Fatal("watches a process that is none of the container")
		}
	}
	if after := open(); after > before+5 { // other tests have some too
		t.Errorf("%d descriptors, %d before", after, before)
	}
	w, err := watchExit(pid, "/") // every cgroup has a name with this in it
	if err != nil {
		t.Fatal(err)
	}
	w.close()
}

// A process that has ended is nobody's any more, though the kernel knows it until its exit code has been asked for.
func TestEndedProcess(t *testing.T) {
	cmd := exec.Command("true")
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	pid := cmd.Process.Pid
	for late := time.Now().Add(waitLong); !ended(pid) && time.Now().Before(late); time.Sleep(time.Millisecond) {
	}
	if _, err := os.Stat(fmt.Sprintf("/proc/%d", pid)); err != nil || !ended(pid) {
		t.Errorf("%v, ended: %t", err, ended(pid))
	}
	if err := ofContainer(pid, "/"); err == nil {
		t.Error("it is a container's")
	}
	if err := cmd.Wait(); err != nil {
		t.Fatal(err)
	}
	if !ended(pid) || ended(os.Getpid()) {
		t.Errorf("ended: %t, this process: %t", ended(pid), ended(os.Getpid()))
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

// A process whose first thread has ended goes on as long as others do, though the kernel shows a zombie.
func TestEndedThread(t *testing.T) {
	cmd := exec.Command(os.Args[0])
	cmd.Env = append(os.Environ(), firstThreadEnds+"=1")
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	pid := cmd.Process.Pid
	for late := time.Now().Add(waitLong); ; time.Sleep(time.Millisecond) {
		if b, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid)); err != nil || bytes.Contains(b, []byte(") Z ")) || time.Now().After(late) {
			break
		}
	}
	if ended(pid) {
		t.Error("it has ended with its first thread")
	}
	if err := cmd.Process.Kill(); err != nil {
		t.Error(err)
	}
	for late := time.Now().Add(waitLong); !ended(pid) && time.Now().Before(late); time.Sleep(time.Millisecond) {
	}
	if !ended(pid) {
		t.Error("it has not ended with all")
	}
	_ = cmd.Wait() // it was killed
}
