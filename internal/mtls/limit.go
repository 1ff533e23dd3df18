// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package mtls

import (
	"container/list"
	"errors"
	"fmt"
	"net"
	"sync"
)

const (
	// maxClients is far above what the replicas of one controller need.
	maxClients = 64
	// maxUnauthenticated bounds the connections that have not shown a good certificate yet. A
	// handshake takes milliseconds, a silent one [handshakeTimeout].
	maxUnauthenticated = 64
)

// LimitListener bounds the connections that are open at the same time. There are two limits. If
// there are too many connections of authenticated clients, a new one is refused. If there are too
// many unauthenticated connections, the oldest one is closed. So they keep a client out only
// if they come as fast as it shows its certificate. Accept never waits for a place.
func LimitListener(l net.Listener) net.Listener { return &limitListener{Listener: l} }

type limitListener struct {
	net.Listener

	mu              sync.Mutex // guards all following fields and those of trackedConns
	unauthenticated list.List  // of *trackedConn, the oldest first
	clients         int
}

// trackedConn is a connection of a limitListener. It is unauthenticated at first, then perhaps that
// of a client, and then neither.
type trackedConn struct {
	net.Conn
	listener        *limitListener
	unauthenticated *list.Element // nil: not among them
	client          bool
}

// Accept implements [net.Listener].
func (l *limitListener) Accept() (net.Conn, error) {
	nc, err := l.Listener.Accept()
	if err != nil {
		return nil, err
	}
	c := &trackedConn{Conn: nc, listener: l}
	if oldest := l.track(c); oldest != nil {
		_ = oldest.Close()
	}
	return c, nil
}

// Close implements [net.Listener]. It closes unauthenticated connections too: gRPC's Stop waits for
// every handshake, and kubelet's calls may wait for Stop.
func (l *limitListener) Close() error {
	err := l.Listener.Close()
	l.mu.Lock()
	var all []*trackedConn
	for e := l.unauthenticated.Front(); e != nil; e = e.Next() {
		all = append(all, e.Value.(*trackedConn))
	}
	l.mu.Unlock()
	for _, c := range all {
		_ = c.Close()
	}
	return err
}

// track adds c to the unauthenticated connections. It returns the one that must be closed for that,
// nil for none.
func (l *limitListener) track(c *trackedConn) *trackedConn {
	l.mu.Lock()
	defer l.mu.Unlock()
	c.unauthenticated = l.unauthenticated.PushBack(c)
	if l.unauthenticated.Len() <= maxUnauthenticated {
		return nil
	}
	oldest := l.unauthenticated.Front().Value.(*trackedConn)
	oldest.leaveLocked() // it is not admitted any more
	return oldest
}

// admit counts a connection whose client is authenticated now. It admits every connection of
// another listener.
func admit(nc net.Conn) error {
	c, ok := nc.(*trackedConn)
	if !ok {
		return nil
	}
	l := c.listener
	l.mu.Lock()
	defer l.mu.Unlock()
	if c.unauthenticated == nil {
		return errors.New("the connection gave way to newer ones before it was let in")
	}
	if l.clients >= maxClients {
		return fmt.Errorf("%d connections of known clients are open already", maxClients)
	}
	c.leaveLocked()
	c.client = true
	l.clients++
	return nil
}

func (c *trackedConn) leaveLocked() {
	if c.unauthenticated != nil {
		c.listener.unauthenticated.Remove(c.unauthenticated)
		c.unauthenticated = nil
	}
	if c.client {
		c.client = false
		c.listener.clients--
	}
}

// Close implements [net.Conn].
func (c *trackedConn) Close() error {
	c.listener.mu.Lock()
	c.leaveLocked()
	c.listener.mu.Unlock()
	return c.Conn.Close()
}
