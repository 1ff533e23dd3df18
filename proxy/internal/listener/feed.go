// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package listener

import (
	"net"
	"sync"
)

// Feed is a [net.Listener] that hands out connections that were accepted elsewhere. Closing it
// closes no socket.
type Feed struct {
	addr  net.Addr
	conns chan net.Conn
	over  chan struct{}
	once  sync.Once
}

// NewFeed returns a feed without connections.
func NewFeed() *Feed {
	return &Feed{addr: &net.UnixAddr{Net: "unix"}, conns: make(chan net.Conn), over: make(chan struct{})}
}

// Accept implements [net.Listener].
func (f *Feed) Accept() (net.Conn, error) {
	select {
	case c := <-f.conns:
		return c, nil
	case <-f.over:
		return nil, net.ErrClosed
	}
}

// Close implements [net.Listener].
func (f *Feed) Close() error {
	f.once.Do(func() { close(f.over) })
	return nil
}

// Addr implements [net.Listener].
func (f *Feed) Addr() net.Addr { return f.addr }

// Give hands the connection to who accepts, and reports whether it has been taken. After Close it
// is not.
func (f *Feed) Give(c net.Conn) bool {
	select {
	case f.conns <- c:
		return true
	case <-f.over:
		return false
	}
}
