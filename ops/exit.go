// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package ops

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"time"

	"golang.org/x/sys/unix"
)

// exitWatch tells when a process has ended. The kernel tells it about 1 ms after the last instruction; the runtime's
// own word takes some 45 ms, because it cleans up first.
type exitWatch struct {
	file *os.File
	gone chan struct{} // closed when the process has ended; never if the watch ends first
	at   time.Time     // when it ended; read after gone
	done chan struct{} // closed when the watch has ended
}

// watchExit watches the container's init process. With a PID namespace of its own, all its
// processes have ended when that has.
//
// Errors: no pidfd here, or pid is not, or no longer, a process of the container, as this process sees it.
func watchExit(pid int, container string) (*exitWatch, error) {
	w, err := watchProcess(pid)
	if err != nil {
		return nil, err
	}
	// Asked after the opening: a number that was given to another process in between would be noticed.
	if err := ofContainer(pid, container); err != nil {
		w.close()
		return nil, err
	}
	return w, nil
}

// watchProcess watches any process.
func watchProcess(pid int) (*exitWatch, error) {
	fd, err := unix.PidfdOpen(pid, unix.PIDFD_NONBLOCK)
	if err != nil {
		return nil, os.NewSyscallError("pidfd_open", err)
	}
	// os.NewFile gives a non-blocking descriptor to the poller: no thread waits.
	w := &exitWatch{file: os.NewFile(uintptr(fd), "pidfd"), gone: make(chan struct{}), done: make(chan struct{})}
	raw, err := w.file.SyscallConn()
	if err != nil {
		return nil, errors.Join(err, w.file.Close())
	}
	go func() { // ends with the process or with close
		defer close(w.done)
		err := raw.Read(func(fd uintptr) bool {
			n, err := unix.Poll([]unix.PollFd{{Fd: int32(fd), Events: unix.POLLIN}}, 0)
			return n > 0 && err == nil
		})
		if err == nil { // not closed, and not a kernel that cannot be waited for
			w.at = time.Now()
			close(w.gone)
		}
	}()
	return w, nil
}

// close ends the watch. It may be nil.
func (w *exitWatch) close() {
	if w != nil {
		_ = w.file.Close()
		<-w.done
	}
}

// ended returns a channel that is closed when the process has ended; nil for no watch.
func (w *exitWatch) ended() <-chan struct{} {
	if w == nil {
		return nil
	}
	return w.gone
}

// over reports whether the process has ended.
func (w *exitWatch) over() bool {
	if w == nil {
		return false
	}
	select {
	case <-w.gone:
		return true
	default:
		return false
	}
}

// ofContainer is nil if the process is in a cgroup that is named after the container, which runtimes do
// (<parent>/<id>, cri-containerd-<id>.scope). It is not where process numbers are those of
// another PID namespace than the runtime's.
func ofContainer(pid int, container string) error {
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/cgroup", pid))
	if err != nil {
		return err
	}
	if ended(pid) {
		return fmt.Errorf("process %d has ended", pid) // nobody has asked for its exit code yet, and cgroup v2 goes on naming it
	}
	if !bytes.Contains(b, []byte(container)) {
		return fmt.Errorf("process %d is none of container %s: is this process in another PID namespace than the runtime?", pid, container)
	}
	return nil
}

// ended reports whether a process has ended, with all its threads, though the kernel may still know it. Its state in /proc is that of its first
// thread, which may have ended before the others (pidfd_open(2)). Where the kernel has no pidfd, or gives none, it has not.
func ended(pid int) bool {
	fd, err := unix.PidfdOpen(pid, 0)
	if err != nil {
		return errors.Is(err, unix.ESRCH)
	}
	defer func() { _ = unix.Close(fd) }() // nothing was written
	n, err := unix.Poll([]unix.PollFd{{Fd: int32(fd), Events: unix.POLLIN}}, 0)
	return n > 0 && err == nil
}
