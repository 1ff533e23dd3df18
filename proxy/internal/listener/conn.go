// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package listener

import (
	"net"
	"sync"
	"sync/atomic"
)

// goAwayFrame is the type of the HTTP/2 frame that sends a client elsewhere (RFC 9113, section
// 6.8).
const goAwayFrame = 0x7

// frameHeader is the length of the header of every HTTP/2 frame.
const frameHeader = 9

// Conn is a connection that knows whether its client has been sent elsewhere. gRPC does not tell.
// What is to be told to the client after that must not be sent before: the client would come again
// on the same connection.
type Conn struct {
	net.Conn
	// Unread counts the bytes of answers that have not been written to the client.
	Unread atomic.Int64

	away chan struct{} // closed when the client has been sent elsewhere, or the connection is closed
	once sync.Once

	// The rest belongs to the one goroutine of gRPC that writes.
	header [frameHeader]byte
	have   int // of the header
	rest   int // of the frame's payload
}

// NewConn returns a connection that wraps c.
func NewConn(c net.Conn) *Conn {
	return &Conn{Conn: c, away: make(chan struct{})}
}

// Away is closed when the client has been sent elsewhere, or the connection is closed.
func (c *Conn) Away() <-chan struct{} { return c.away }

// Write implements [net.Conn].
func (c *Conn) Write(b []byte) (int, error) {
	goAway := c.scan(b)
	n, err := c.Conn.Write(b)
	if goAway {
		c.setAway()
	}
	return n, err
}

// Close implements [net.Conn].
func (c *Conn) Close() error {
	c.setAway()
	return c.Conn.Close()
}

func (c *Conn) setAway() { c.once.Do(func() { close(c.away) }) }

// scan follows the frames and reports whether a GOAWAY is among those whose header ends in b.
func (c *Conn) scan(b []byte) bool {
	found := false
	for len(b) > 0 {
		if c.rest > 0 {
			n := min(c.rest, len(b))
			c.rest -= n
			b = b[n:]
			continue
		}
		n := copy(c.header[c.have:], b)
		c.have += n
		b = b[n:]
		if c.have == frameHeader {
			c.have = 0
			c.rest = int(c.header[0])<<16 | int(c.header[1])<<8 | int(c.header[2])
			found = found || c.header[3] == goAwayFrame
		}
	}
	return found
}

// connAddr is the remote address of a client's connection, by which a call finds it.
type connAddr struct {
	net.Addr
	conn *Conn
}

// RemoteAddr implements [net.Conn].
func (c *Conn) RemoteAddr() net.Addr { return connAddr{c.Conn.RemoteAddr(), c} }

// ConnOf returns the connection whose remote address this is, or nil.
func ConnOf(a net.Addr) *Conn {
	c, _ := a.(connAddr)
	return c.conn
}
