// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

// Package unread bounds what clients leave unread. What they have not read yet is in the proxy's
// memory and must not fill it. A runtime that answers directly has the same problem, but nobody on
// the node restarts the proxy every time.
//
// Kubelet never meets these bounds. It reads at once; it has one connection for containers and one
// for images; it refuses messages of more than 16 MiB (maxMsgSize in k8s.io/cri-client/pkg), and
// the lists of 500 containers that a large node has are below 1 MiB. The unit's MemoryMax= is above
// the sum of the bounds.
package unread

import (
	"runtime"
	"sync/atomic"

	"google.golang.org/grpc/mem"
)

// MinSize is the size from which on messages are counted.
const MinSize = 64 << 10

const (
	// maxConn is what one connection may leave unread: four of the largest answers that kubelet
	// takes.
	maxConn = 64 << 20
	// maxAll is what all may leave together. Beyond it a connection still gets minConn, so that no
	// other client takes kubelet's room.
	maxAll  = 192 << 20
	minConn = 32 << 20
)

// Account counts the bytes of answers that have not been written to their clients: to all, and to
// that of one connection. Nothing is counted if Conn is nil.
type Account struct{ All, Conn *atomic.Int64 }

// take counts size more, if there is room. A connection that has nothing unread gets any answer,
// however large.
func (a Account) take(size int64) (*share, bool) {
	conn := a.Conn.Add(size)
	all := a.All.Add(size)
	s := &share{of: a, size: size}
	if conn > size && (conn > maxConn || all > maxAll && conn > minConn) {
		s.give()
		return nil, false
	}
	return s, true
}

// share is what one answer takes, until it is given back.
type share struct {
	of    Account
	size  int64
	given atomic.Bool
}

func (s *share) give() {
	if s.given.CompareAndSwap(false, true) {
		s.of.Conn.Add(-s.size)
		s.of.All.Add(-s.size)
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

// Hold counts the message from now on until it has been written, and reports whether there is room
// for it. What it returns is to be sent in place of the message.
func (a Account) Hold(message mem.BufferSlice) (counted mem.BufferSlice, ok bool) {
	size := message.Len()
	if size < MinSize || a.Conn == nil {
		return message, true
	}
	s, ok := a.take(int64(size))
	if !ok {
		return message, false
	}
	h := &heldAnswer{share: s}
	// gRPC drops what comes for a stream that has just been reset, without freeing it
	// (preprocessDataHandler in its controlbuf.go). Then it counts until the memory is free.
	runtime.AddCleanup(h, (*share).give, s)
	// Small buffers have no pool, see [mem.NewBuffer].
	held := make(mem.BufferSlice, len(message))
	for i, b := range message {
		if mem.IsBelowBufferPoolingThreshold(b.Len()) {
			held[i] = b
			continue
		}
		h.left.Add(1)
		h.origins = append(h.origins, b)
	}
	if h.left.Load() == 0 {
		s.give()
		return message, true
	}
	for i, b := range message {
		if held[i] == nil {
			data := b.ReadOnlyData()
			held[i] = mem.NewBuffer(&data, h)
		}
	}
	return held, true
}
