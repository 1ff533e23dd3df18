// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package listener

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"os"
	"path/filepath"
	"time"

	"golang.org/x/sys/unix"
)

const (
	// maxSocketPath is what fits into sockaddr_un besides the final zero.
	maxSocketPath = 107
	// defaultSocketMode lets root and the socket's group connect, as containerd's.
	defaultSocketMode = 0o660
	// socketDirMode lets others reach the socket but not list the directory.
	socketDirMode = 0o711
	// probeTimeout is for asking whether somebody listens. A Unix socket answers at once, or has a
	// full backlog: then somebody does.
	probeTimeout = 200 * time.Millisecond
)

// Options say who may connect to a socket.
type Options struct {
	Mode os.FileMode // permission bits; 0 means 0660
	UID  int         // owner; 0 is root, -1 leaves the process's own
	GID  int         // group; 0 is root, -1 leaves the process's own
}

// Listen makes a Unix socket at path. Mode and owner hold from the first moment on: the socket is
// made under another name and moved into place. Missing directories are made with mode 0711, a
// socket that a dead process left behind is replaced. It is an error if a live process listens
// there or if path is anything but a socket. Closing the listener removes the socket unless another
// process has taken the path over.
func Listen(path string, o Options) (net.Listener, error) {
	if !filepath.IsAbs(path) {
		return nil, fmt.Errorf("listen path %q is not absolute, write /path/to.sock", path)
	}
	path = filepath.Clean(path)
	dir := filepath.Dir(path)
	temporary := filepath.Join(dir, fmt.Sprintf(".%x", os.Getpid()))
	if n := max(len(path), len(temporary)); n > maxSocketPath {
		return nil, fmt.Errorf("listen path %s: a Unix socket path holds %d bytes, choose a shorter one than %d",
			path, maxSocketPath, n)
	}
	if err := os.MkdirAll(dir, socketDirMode); err != nil {
		return nil, fmt.Errorf("listen path %s: directory cannot be made: %w", path, explain(err))
	}
	unlock, err := lockDir(dir)
	if err != nil {
		return nil, fmt.Errorf("listen path %s: %w", path, explain(err))
	}
	defer unlock()
	if err := clearStale(path); err != nil {
		return nil, err
	}
	return listenAs(path, temporary, o)
}

// lockDir keeps two processes from replacing each other's fresh sockets in dir.
func lockDir(dir string) (unlock func(), err error) {
	f, err := os.Open(dir)
	if err != nil {
		return nil, err
	}
	if err := unix.Flock(int(f.Fd()), unix.LOCK_EX); err != nil {
		f.Close()
		return nil, fmt.Errorf("lock %s: %w", dir, err)
	}
	return func() { f.Close() }, nil
}

// clearStale makes sure that nothing of value is at path.
func clearStale(path string) error {
	fi, err := os.Lstat(path)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return fmt.Errorf("listen path %s: %w", path, explain(err))
	}
	if fi.Mode().Type() != fs.ModeSocket {
		return fmt.Errorf("listen path %s is not a socket (%s), it is left alone: remove it or choose another path",
			path, fi.Mode())
	}
	ctx, cancel := context.WithTimeout(context.Background(), probeTimeout)
	defer cancel()
	conn, err := new(net.Dialer).DialContext(ctx, "unix", path)
	if err == nil {
		defer conn.Close()
		return fmt.Errorf("listen path %s is in use by a live process%s: stop it first or choose another path",
			path, peer(conn))
	}
	if !errors.Is(err, unix.ECONNREFUSED) && !errors.Is(err, fs.ErrNotExist) {
		if errors.Is(err, fs.ErrPermission) {
			return fmt.Errorf("listen path %s: %w", path, explain(err))
		}
		return fmt.Errorf("listen path %s seems to be in use: stop the process that holds it or choose "+
			"another path: %w",
			path, err)
	}
	if err := os.Remove(path); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("listen path %s: stale socket cannot be removed: %w", path, explain(err))
	}
	return nil
}

// peer names the process that listens at the other end, if the kernel tells.
func peer(conn net.Conn) string {
	raw, err := conn.(*net.UnixConn).SyscallConn()
	if err != nil {
		return ""
	}
	var cred *unix.Ucred
	err = raw.Control(func(fd uintptr) {
		cred, _ = unix.GetsockoptUcred(int(fd), unix.SOL_SOCKET, unix.SO_PEERCRED)
	})
	if err != nil || cred == nil || cred.Pid == 0 {
		return ""
	}
	return fmt.Sprintf(" (pid %d)", cred.Pid)
}

func listenAs(path, temporary string, o Options) (_ net.Listener, err error) {
	mode := o.Mode.Perm()
	if mode == 0 {
		mode = defaultSocketMode
	}
	_ = os.Remove(temporary) // of an earlier process with this pid
	l, err := net.ListenUnix("unix", &net.UnixAddr{Name: temporary, Net: "unix"})
	if err != nil {
		return nil, fmt.Errorf("listen path %s: %w", path, explain(err))
	}
	l.SetUnlinkOnClose(false) // it would remove the temporary name
	defer func() {
		if err != nil {
			l.Close()
			_ = os.Remove(temporary)
		}
	}()
	if err := os.Chmod(temporary, mode); err != nil {
		return nil, fmt.Errorf("listen path %s: mode %04o: %w", path, mode, explain(err))
	}
	uid, gid := change(o.UID, os.Geteuid()), change(o.GID, os.Getegid())
	if uid != -1 || gid != -1 {
		if err := os.Lchown(temporary, uid, gid); err != nil {
			return nil, fmt.Errorf("listen path %s: owner %d:%d: %w", path, o.UID, o.GID, explain(err))
		}
	}
	own, err := os.Lstat(temporary)
	if err != nil {
		return nil, fmt.Errorf("listen path %s: %w", path, err)
	}
	if err := os.Rename(temporary, path); err != nil {
		return nil, fmt.Errorf("listen path %s: %w", path, explain(err))
	}
	return &movedListener{UnixListener: l, path: path, own: own}, nil
}

// change returns the ID to set, -1 if it is the process's own anyway.
func change(id, own int) int {
	if id == own {
		return -1
	}
	return id
}

// explain says what to do about an error of the file system.
func explain(err error) error {
	switch {
	case errors.Is(err, fs.ErrPermission):
		return fmt.Errorf("run as root or give this user write permission to the directory: %w", err)
	case errors.Is(err, unix.EROFS):
		return fmt.Errorf("choose a directory on a writable file system, such as /run: %w", err)
	case errors.Is(err, unix.ENOTDIR):
		return fmt.Errorf("a part of the path is a file: %w", err)
	}
	return err
}

// movedListener is a Unix listener that was moved to its path.
type movedListener struct {
	*net.UnixListener
	path string
	own  fs.FileInfo // of the socket file
}

// Addr returns the path that clients dial.
func (l *movedListener) Addr() net.Addr { return &net.UnixAddr{Name: l.path, Net: "unix"} }

// Close stops listening and removes the socket if it is still this one: the next instance may have
// put its own there already.
func (l *movedListener) Close() error {
	if fi, err := os.Lstat(l.path); err == nil && os.SameFile(fi, l.own) {
		_ = os.Remove(l.path)
	}
	return l.UnixListener.Close()
}
