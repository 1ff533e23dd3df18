// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package proxy

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

// clientConn is a connection that knows whether its client has been sent elsewhere. gRPC does not
// tell. What is to be told to the client after that must not be sent before: the client would come
// again on the same connection.
type clientConn struct {
	net.Conn
	away chan struct{} // closed when it has, or is closed
	once sync.Once

	unread atomic.Int64 // bytes of answers that have not been written to it

	// The rest belongs to the one goroutine of gRPC that writes.
	header [frameHeader]byte
	have   int // of the header
	rest   int // of the frame's payload
}

func newClientConn(c net.Conn) *clientConn {
	return &clientConn{Conn: c, away: make(chan struct{})}
}

// Write implements [net.Conn].
func (c *clientConn) Write(b []byte) (int, error) {
	goAway := c.scan(b)
	n, err := c.Conn.Write(b)
	if goAway {
		c.setAway()
	}
	return n, err
}

// Close implements [net.Conn].
func (c *clientConn) Close() error {
	c.setAway()
	return c.Conn.Close()
}

func (c *clientConn) setAway() { c.once.Do(func() { close(c.away) }) }

// scan follows the frames and reports whether a GOAWAY is among those whose header ends in b.
func (c *clientConn) scan(b []byte) bool {
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
