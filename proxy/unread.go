// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package proxy

import (
	"google.golang.org/grpc/codes"
	grpcpeer "google.golang.org/grpc/peer"
	"google.golang.org/grpc/status"

	"github.com/cri-proxy/cri-proxy/proxy/internal/listener"
	"github.com/cri-proxy/cri-proxy/proxy/internal/unread"
)

// errUnread is the answer in place of one that there is no room for.
var errUnread = status.Error(codes.ResourceExhausted,
	"cri-proxy keeps no more answers for this client until it has read those that it has: "+
		"read them, or make fewer calls at once")

// send sends one message to the caller, if there is room for it. It frees f.
func (c *call) send(f *frame) error {
	defer f.free()
	if f.data.Len() >= unread.MinSize {
		data, ok := c.unread().Hold(f.data)
		if !ok {
			return errUnread
		}
		f.data = data
	}
	return c.client.SendMsg(f)
}

// unread is the account of the call's connection.
func (c *call) unread() unread.Account {
	p, ok := grpcpeer.FromContext(c.client.Context())
	if !ok {
		return unread.Account{}
	}
	conn := listener.ConnOf(p.Addr)
	if conn == nil {
		return unread.Account{}
	}
	return unread.Account{All: &c.s.unread, Conn: &conn.Unread}
}
