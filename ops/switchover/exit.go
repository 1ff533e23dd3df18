// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package switchover

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"time"

	"golang.org/x/sys/unix"
)

// Exit waits for the exit of a process. The kernel reports it about 1 ms after the last
// instruction; the runtime reports it some 45 ms later, because it cleans up first.
//
// A nil *Exit is a process of which nothing is known.
type Exit struct {
	file  *os.File
	ended chan struct{} // closed at the exit; never if the watch is closed first
	at    time.Time     // of the exit; read it after ended
	done  chan struct{} // closed at the end of the watch
}

// Watch waits for the exit of the container's init process. In a PID namespace of its own, the
// container's other processes end before it does.
//
// It returns an error where there is no pidfd, and if pid is not, or no longer, a process of the
// container, as this process sees it.
func Watch(pid int, container string) (*Exit, error) {
	w, err := WatchProcess(pid)
	if err != nil {
		return nil, err
	}
	// Check after opening the pidfd: the kernel may have given the number to another process.
	if err := OfContainer(pid, container); err != nil {
		w.Close()
		return nil, err
	}
	return w, nil
}

// WatchProcess waits for the exit of any process.
func WatchProcess(pid int) (*Exit, error) {
	fd, err := unix.PidfdOpen(pid, unix.PIDFD_NONBLOCK)
	if err != nil {
		return nil, os.NewSyscallError("pidfd_open", err)
	}
	// os.NewFile gives a non-blocking descriptor to the poller: no thread waits.
	w := &Exit{file: os.NewFile(uintptr(fd), "pidfd"), ended: make(chan struct{}), done: make(chan struct{})}
	raw, err := w.file.SyscallConn()
	if err != nil {
		return nil, errors.Join(err, w.file.Close())
	}
	go func() { // ends with the process or with Close
		defer close(w.done)
		err := raw.Read(func(fd uintptr) bool {
			n, err := unix.Poll([]unix.PollFd{{Fd: int32(fd), Events: unix.POLLIN}}, 0)
			return n > 0 && err == nil
		})
		if err == nil { // neither closed, nor a kernel that cannot wait for a pidfd
			w.at = time.Now()
			close(w.ended)
		}
	}()
	return w, nil
}

// Close ends the watch.
func (w *Exit) Close() {
	if w != nil {
		_ = w.file.Close()
		<-w.done
	}
}

// Ended returns a channel that is closed when the process has exited. It is nil for a nil Exit.
func (w *Exit) Ended() <-chan struct{} {
	if w == nil {
		return nil
	}
	return w.ended
}

// Done returns a channel that is closed when the watch has ended, with the process or with Close.
func (w *Exit) Done() <-chan struct{} { return w.done }

// Over reports whether the process is known to have exited.
func (w *Exit) Over() bool {
	if w == nil {
		return false
	}
	select {
	case <-w.ended:
		return true
	default:
		return false
	}
}

// At returns when the process exited. Call it only when [Exit.Over] is true.
func (w *Exit) At() time.Time { return w.at }

// OfContainer returns nil if the process is in a cgroup named after the container, as runtimes name
// it (<parent>/<id>, cri-containerd-<id>.scope). It returns an error where process numbers are
// those of another PID namespace than the runtime's.
func OfContainer(pid int, container string) error {
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/cgroup", pid))
	if err != nil {
		return err
	}
	if hasExited(pid) {
		// Nobody has waited for it yet, and cgroup v2 goes on naming it.
		return fmt.Errorf("process %d has ended", pid)
	}
	if !bytes.Contains(b, []byte(container)) {
		return fmt.Errorf("process %d is none of container %s: "+
			"is this process in another PID namespace than the runtime?", pid, container)
	}
	return nil
}

// hasExited reports whether a process has exited with all its threads, though the kernel may still
// list it. The state in /proc does not tell: it is that of the first thread, which may exit before
// the others (pidfd_open(2)). Where the kernel gives no pidfd, hasExited returns false.
func hasExited(pid int) bool {
	fd, err := unix.PidfdOpen(pid, 0)
	if err != nil {
		return errors.Is(err, unix.ESRCH)
	}
	defer func() { _ = unix.Close(fd) }() // nothing was written
	n, err := unix.Poll([]unix.PollFd{{Fd: int32(fd), Events: unix.POLLIN}}, 0)
	return n > 0 && err == nil
}
