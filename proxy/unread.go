// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package proxy

import (
	"net"
	"runtime"
	"sync/atomic"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/mem"
	grpcpeer "google.golang.org/grpc/peer"
	"google.golang.org/grpc/status"
)

// What clients have not read yet is in the proxy's memory, and must not fill it: a runtime that
// answers directly would have the same, but the node has nobody who restarts it every time. kubelet
// never meets these bounds. It reads at once; it has one connection for containers and one for
// images; it refuses messages of more than 16 MiB (maxMsgSize in k8s.io/cri-client/pkg), and the
// lists of 500 containers that a large node has are below 1 MiB. The unit's MemoryMax= is above
// their sum.
const (
	// bigAnswer is the size from which on messages are counted.
	bigAnswer = 64 << 10
	// maxUnread is what one connection may leave unread: four of the largest answers that kubelet
	// takes.
	maxUnread = 64 << 20
	// maxUnreadAll is what all may together. Beyond it a connection still gets unreadShare, so that
	// no other client takes kubelet's room.
	maxUnreadAll = 192 << 20
	unreadShare  = 32 << 20
	// maxCalls is how many calls one connection may have under way; others wait at the caller
	// (SETTINGS_MAX_CONCURRENT_STREAMS). kubelet has one for each pod that it works on and one for
	// each exec probe that runs: with 500 pods of two containers and three probes each, all at the
	// same moment, 3,500.
	maxCalls = 4096
)

// errUnread is the answer in place of one that there is no room for.
var errUnread = status.Error(codes.ResourceExhausted,
	"cri-proxy keeps no more answers for this client until it has read those that it has: "+
		"read them, or make fewer calls at once")

// unread counts bytes of answers that have not been written to their clients.
type unread struct{ all, conn *atomic.Int64 }

// take counts size more, if there is room. A connection that has nothing unread gets any answer,
// however large.
func (u unread) take(size int64) (*share, bool) {
	conn := u.conn.Add(size)
	all := u.all.Add(size)
	s := &share{of: u, size: size}
	if conn > size && (conn > maxUnread || all > maxUnreadAll && conn > unreadShare) {
		s.give()
		return nil, false
	}
	return s, true
}

// share is what one answer takes, until it is given back.
type share struct {
	of    unread
	size  int64
	given atomic.Bool
}

func (s *share) give() {
	if s.given.CompareAndSwap(false, true) {
		s.of.conn.Add(-s.size)
		s.of.all.Add(-s.size)
	}
}

// heldAnswer is a counted message. It is the pool of buffers that stand for the message's own ones:
// gRPC puts each back once it has been written, or will not be.
type heldAnswer struct {
	share   *share
	left    atomic.Int32
	origins mem.BufferSlice
}

var _ mem.BufferPool = (*heldAnswer)(nil)

// Get implements [mem.BufferPool]; nobody takes anything from this one.
func (*heldAnswer) Get(size int) *[]byte {
	b := make([]byte, size)
	return &b
}

// Put implements [mem.BufferPool].
func (h *heldAnswer) Put(*[]byte) {
	if h.left.Add(-1) == 0 {
		h.origins.Free()
		h.origins = nil
		h.share.give()
	}
}

// hold counts the message from now on until it has been written, and reports whether there is room
// for it.
func (u unread) hold(f *frame) bool {
	size := f.data.Len()
	if size < bigAnswer || u.conn == nil {
		return true
	}
	s, ok := u.take(int64(size))
	if !ok {
		return false
	}
	h := &heldAnswer{share: s}
	// gRPC drops what comes for a stream that has just been reset, without freeing it
	// (preprocessDataHandler in its controlbuf.go). Then it counts until the memory is free.
	runtime.AddCleanup(h, (*share).give, s)
	// Small buffers have no pool, see [mem.NewBuffer].
	held := make(mem.BufferSlice, len(f.data))
	for i, b := range f.data {
		if mem.IsBelowBufferPoolingThreshold(b.Len()) {
			held[i] = b
			continue
		}
		h.left.Add(1)
		h.origins = append(h.origins, b)
	}
	if h.left.Load() == 0 {
		s.give()
		return true
	}
	for i, b := range f.data {
		if held[i] == nil {
			data := b.ReadOnlyData()
			held[i] = mem.NewBuffer(&data, h)
		}
	}
	f.data = held
	return true
}

// send sends one message to the caller, if there is room for it. It frees f.
func (c *call) send(f *frame) error {
	defer f.free()
	if f.data.Len() >= bigAnswer && !c.unread().hold(f) {
		return errUnread
	}
	return c.client.SendMsg(f)
}

// unread is that of the call's connection.
func (c *call) unread() unread {
	p, ok := grpcpeer.FromContext(c.client.Context())
	if !ok {
		return unread{}
	}
	a, ok := p.Addr.(connAddr)
	if !ok {
		return unread{}
	}
	return unread{all: &c.s.unread, conn: &a.conn.unread}
}

// connAddr is the remote address of a client's connection, by which a call finds it.
type connAddr struct {
	net.Addr
	conn *clientConn
}

// RemoteAddr implements [net.Conn].
func (c *clientConn) RemoteAddr() net.Addr { return connAddr{c.Conn.RemoteAddr(), c} }
