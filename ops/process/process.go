// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package process

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"
)

// Process is one that runs on this machine. The start time keeps it apart from another one that
// gets its number later.
type Process struct {
	PID   int
	Start string // in the kernel's own unit, since boot
}

// ErrForeign is the error for a process of another PID namespace, which has no number here.
var ErrForeign = errors.New("the process is of another PID namespace")

// Peer is the process at the other end of a Unix socket: who listens, for one that has been
// dialled, and who has dialled, for one that has been accepted.
//
// Errors: conn is no Unix socket, or the process has ended.
func Peer(proc string, conn net.Conn) (Process, error) {
	u, ok := conn.(*net.UnixConn)
	if !ok {
		return Process{}, errors.New("not a Unix socket")
	}
	raw, err := u.SyscallConn()
	if err != nil {
		return Process{}, err
	}
	var cred *unix.Ucred
	var cerr error
	if err := raw.Control(func(fd uintptr) {
		cred,
			cerr = unix.GetsockoptUcred(int(fd), unix.SOL_SOCKET, unix.SO_PEERCRED)
	}); err != nil {
		return Process{}, err
	}
	if cerr != nil {
		return Process{}, cerr
	}
	if cred.Pid <= 0 {
		return Process{}, ErrForeign
	}
	start, err := started(proc, int(cred.Pid))
	return Process{PID: int(cred.Pid), Start: start}, err
}

// Listener is the process that listens on a Unix socket.
func Listener(ctx context.Context, proc, socket string) (Process, error) {
	var d net.Dialer
	conn, err := d.DialContext(ctx, "unix", socket)
	if err != nil {
		return Process{}, err
	}
	defer conn.Close()
	return Peer(proc, conn)
}

// started is the start time of a process, proc_pid_stat(5) field 22.
func started(proc string, pid int) (string, error) {
	b, err := os.ReadFile(filepath.Join(proc, strconv.Itoa(pid), "stat"))
	if err != nil {
		return "", fmt.Errorf("process %d: %w", pid, err)
	}
	// The name, in parentheses, may hold spaces and parentheses.
	_, rest, ok := bytes.Cut(b[bytes.LastIndexByte(b, ')')+1:], []byte(" "))
	fields := strings.Fields(string(rest))
	const at = 22 - 3 // the first two are in front of the cut
	if !ok || len(fields) <= at {
		return "", fmt.Errorf("process %d: stat is %.60q", pid, b)
	}
	return fields[at], nil
}

// Name is that of its program as the kernel has it, the first 15 characters, empty if it has ended.
func (p Process) Name(proc string) string {
	if now, err := started(proc, p.PID); err != nil || now != p.Start {
		return ""
	}
	b, err := os.ReadFile(filepath.Join(proc, strconv.Itoa(p.PID), "comm"))
	if err != nil {
		return ""
	}
	return strings.TrimSpace(string(b))
}

// Args are its command line, the program included.
func (p Process) Args(proc string) ([]string, error) { return p.strings(proc, "cmdline") }

// Environ is the environment that it was started with, as [os.Environ] has it. It may hold secrets.
//
// Errors: the process has ended, or is not to be looked into: that takes CAP_SYS_PTRACE, or its
// user and no more capabilities than ours.
func (p Process) Environ(proc string) ([]string, error) { return p.strings(proc, "environ") }

func (p Process) strings(proc, file string) ([]string, error) {
	b, err := os.ReadFile(filepath.Join(proc, strconv.Itoa(p.PID), file))
	if err != nil {
		return nil, fmt.Errorf("process %d: %w", p.PID, err)
	}
	// What was read is that of this process only if it is still there.
	if now, err := started(proc, p.PID); err != nil || now != p.Start {
		return nil, fmt.Errorf("process %d has ended", p.PID)
	}
	text := strings.TrimSuffix(string(b), "\x00")
	if text == "" {
		return nil, nil
	}
	return strings.Split(text, "\x00"), nil
}
