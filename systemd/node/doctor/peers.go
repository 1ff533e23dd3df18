// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package doctor

import (
	"encoding/binary"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"
)

// Constants of linux/unix_diag.h and linux/sock_diag.h that x/sys does not have.
const (
	sockDiagByFamily = 20
	diagShowName     = 1 << 0
	diagShowVFS      = 1 << 1
	diagShowPeer     = 1 << 2
	diagVFS          = 1 // attribute: inode and device of the socket's file
	diagPeer         = 2 // attribute: inode of the peer's socket
	stateEstablished = 1
)

// process is a running process.
type process struct {
	pid  int
	name string // as the kernel has it: the first 15 characters of the program's file name
	args []string
}

func (p process) String() string { return fmt.Sprintf("%s (pid %d)", p.name, p.pid) }

// peersOf returns the processes that hold connections to the listener whose socket file is at path.
// The kernel finds the listener by the file, whatever path it was bound to.
func peersOf(proc, path string) ([]process, error) {
	var file unix.Stat_t
	if err := unix.Stat(path, &file); err != nil {
		return nil, fmt.Errorf("%s: %w", path, err)
	}
	sockets, err := unixSockets()
	if err != nil {
		return nil, fmt.Errorf("the kernel does not say who is connected (unix_diag): %w", err)
	}
	wanted := map[uint32]bool{}
	ino := uint32(file.Ino) //nolint:gosec // the kernel has 32 bits here
	for _, s := range sockets {
		if s.file == ino && s.peer != 0 {
			wanted[s.peer] = true
		}
	}
	if len(wanted) == 0 {
		return nil, nil
	}
	return processes(proc, func(dir string) bool { return holdsSocket(dir, wanted) }), nil
}

// unixSocket is a connected Unix socket.
type unixSocket struct{ file, peer uint32 }

// unixSockets asks the kernel for the connected Unix sockets of this network namespace.
func unixSockets() ([]unixSocket, error) {
	fd, err := unix.Socket(unix.AF_NETLINK, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, unix.NETLINK_SOCK_DIAG)
	if err != nil {
		return nil, err
	}
	defer unix.Close(fd)
	native := binary.NativeEndian
	req := make([]byte, unix.SizeofNlMsghdr+24)
	native.PutUint32(req[0:], uint32(len(req))) //nolint:gosec // 40
	native.PutUint16(req[4:], sockDiagByFamily)
	native.PutUint16(req[6:], unix.NLM_F_REQUEST|unix.NLM_F_DUMP)
	body := req[unix.SizeofNlMsghdr:]
	body[0] = unix.AF_UNIX
	native.PutUint32(body[4:], 1<<stateEstablished)
	native.PutUint32(body[12:], diagShowName|diagShowVFS|diagShowPeer)
	if err := unix.Sendto(fd, req, 0, &unix.SockaddrNetlink{Family: unix.AF_NETLINK}); err != nil {
		return nil, err
	}
	var all []unixSocket
	for buf := make([]byte, 64<<10); ; {
		n, _, err := unix.Recvfrom(fd, buf, 0)
		if errors.Is(err, unix.EINTR) {
			continue
		}
		if err != nil {
			return nil, err
		}
		for msg := buf[:n]; len(msg) >= unix.SizeofNlMsghdr; {
			size := int(native.Uint32(msg))
			if size < unix.SizeofNlMsghdr || size > len(msg) {
				return nil, errors.New("an answer that is cut off")
			}
			switch native.Uint16(msg[4:]) {
			case unix.NLMSG_DONE:
				return all, nil
			case unix.NLMSG_ERROR:
				negative := int32(native.Uint32(msg[unix.SizeofNlMsghdr:])) //nolint:gosec // it is an errno
				return nil, unix.Errno(-negative)
			case sockDiagByFamily:
				all = append(all, parseSocket(msg[unix.SizeofNlMsghdr:size]))
			}
			msg = msg[min(len(msg), (size+3)&^3):]
		}
	}
}

// parseSocket reads a struct unix_diag_msg and its attributes.
func parseSocket(b []byte) unixSocket {
	const head = 16
	native := binary.NativeEndian
	var s unixSocket
	if len(b) < head {
		return s
	}
	for b = b[head:]; len(b) >= 4; {
		size := int(native.Uint16(b))
		if size < 4 || size > len(b) {
			return s
		}
		switch value := b[4:size]; native.Uint16(b[2:]) {
		case diagVFS:
			if len(value) >= 4 {
				s.file = native.Uint32(value)
			}
		case diagPeer:
			if len(value) >= 4 {
				s.peer = native.Uint32(value)
			}
		}
		b = b[min(len(b), (size+3)&^3):]
	}
	return s
}

// processes returns the processes for whose directory below /proc want is true.
func processes(proc string, want func(dir string) bool) []process {
	dirs, err := filepath.Glob(filepath.Join(proc, "[0-9]*"))
	if err != nil {
		return nil
	}
	var all []process
	for _, dir := range dirs {
		pid, err := strconv.Atoi(filepath.Base(dir))
		if err != nil || !want(dir) {
			continue
		}
		p := process{pid: pid, name: comm(dir)}
		if b, err := os.ReadFile(filepath.Join(dir, "cmdline")); err == nil {
			p.args = strings.Split(strings.TrimSuffix(string(b), "\x00"), "\x00")
		}
		all = append(all, p)
	}
	return all
}

func comm(dir string) string {
	b, err := os.ReadFile(filepath.Join(dir, "comm"))
	if err != nil {
		return ""
	}
	return strings.TrimSpace(string(b))
}

// holdsSocket reports whether the process has one of the sockets, which are known by inode.
func holdsSocket(dir string, wanted map[uint32]bool) bool {
	fds, err := os.ReadDir(filepath.Join(dir, "fd"))
	if err != nil {
		return false // it has ended, or is not ours to look at
	}
	for _, fd := range fds {
		to, err := os.Readlink(filepath.Join(dir, "fd", fd.Name()))
		if err != nil {
			continue
		}
		number, ok := strings.CutPrefix(to, "socket:[")
		if !ok {
			continue
		}
		ino, err := strconv.ParseUint(strings.TrimSuffix(number, "]"), 10, 32)
		if err == nil && wanted[uint32(ino)] {
			return true
		}
	}
	return false
}
