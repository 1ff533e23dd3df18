// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

// Package address keeps TCP addresses for tests of what happens while nobody listens, and when
// somebody listens there again. A port that a test chooses, closes and listens on later may by then
// be somebody else's.
package address

import (
	"context"
	"fmt"
	"net"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"
)

// Reserve returns an address of the loopback interface, "127.0.0.1:PORT", where nothing listens:
// connections are refused. Until the end of the test no other program gets its port, nor does the
// kernel choose it for the near end of a connection. Listen listens there.
func Reserve(t testing.TB) string {
	t.Helper()
	fd, err := unix.Socket(unix.AF_INET, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = unix.Close(fd) })
	if err := share(uintptr(fd)); err != nil {
		t.Fatal(err)
	}
	if err := unix.Bind(fd, &unix.SockaddrInet4{Addr: [4]byte{127, 0, 0, 1}}); err != nil {
		t.Fatal(err)
	}
	bound, err := unix.Getsockname(fd)
	if err != nil {
		t.Fatal(err)
	}
	own, ok := bound.(*unix.SockaddrInet4)
	if !ok {
		t.Fatalf("bound to a %T", bound)
	}
	return fmt.Sprintf("127.0.0.1:%d", own.Port)
}

// Listen listens at an address that Reserve has returned. It may be called again when the listener
// is closed.
func Listen(t testing.TB, reserved string) net.Listener {
	t.Helper()
	config := net.ListenConfig{Control: func(_, _ string, c syscall.RawConn) error {
		var failed error
		if err := c.Control(func(fd uintptr) { failed = share(fd) }); err != nil {
			return err
		}
		return failed
	}}
	l, err := config.Listen(context.Background(), "tcp4", reserved)
	if err != nil {
		t.Fatal(err)
	}
	return l
}

// share lets the reservation and the listener have the same port.
func share(fd uintptr) error {
	return unix.SetsockoptInt(int(fd), unix.SOL_SOCKET, unix.SO_REUSEPORT, 1)
}
