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
	// maxStrangers bounds the connections that have not shown a good certificate yet. A handshake
	// takes milliseconds, a silent one [handshakeTimeout].
	maxStrangers = 64
)

// LimitListener bounds the connections that are open at the same time: those of clients that were
// let in, of which a new one is refused, and those of strangers, of which the oldest gives way. So
// strangers keep a client out only if they come as fast as it shows its certificate. Accepting
// never waits for a place.
func LimitListener(l net.Listener) net.Listener { return &door{Listener: l} }

type door struct {
	net.Listener

	mu        sync.Mutex // guards all following fields and those of guests
	strangers list.List  // of *guest, the oldest first
	clients   int
}

// guest is a connection that came through a door. It is a stranger, then perhaps a client, and then
// neither.
type guest struct {
	net.Conn
	door     *door
	stranger *list.Element // nil: not among them
	client   bool
}

// Accept implements [net.Listener].
func (d *door) Accept() (net.Conn, error) {
	c, err := d.Listener.Accept()
	if err != nil {
		return nil, err
	}
	g := &guest{Conn: c, door: d}
	if oldest := d.enter(g); oldest != nil {
		_ = oldest.Close()
	}
	return g, nil
}

// Close implements [net.Listener]. Strangers have to go, too: gRPC's Stop waits for every
// handshake, and kubelet's calls may wait for that.
func (d *door) Close() error {
	err := d.Listener.Close()
	d.mu.Lock()
	var all []*guest
	for e := d.strangers.Front(); e != nil; e = e.Next() {
		all = append(all, e.Value.(*guest))
	}
	d.mu.Unlock()
	for _, g := range all {
		_ = g.Close()
	}
	return err
}

// enter returns the stranger who has to give way to g.
func (d *door) enter(g *guest) *guest {
	d.mu.Lock()
	defer d.mu.Unlock()
	g.stranger = d.strangers.PushBack(g)
	if d.strangers.Len() <= maxStrangers {
		return nil
	}
	oldest := d.strangers.Front().Value.(*guest)
	oldest.leaveLocked() // it is not let in any more
	return oldest
}

// letIn is called for a connection whose client is known by now. One that came through no door
// needs no place.
func letIn(c net.Conn) error {
	g, ok := c.(*guest)
	if !ok {
		return nil
	}
	d := g.door
	d.mu.Lock()
	defer d.mu.Unlock()
	if g.stranger == nil {
		return errors.New("the connection gave way to newer ones before it was let in")
	}
	if d.clients >= maxClients {
		return fmt.Errorf("%d connections of known clients are open already", maxClients)
	}
	g.leaveLocked()
	g.client = true
	d.clients++
	return nil
}

func (g *guest) leaveLocked() {
	if g.stranger != nil {
		g.door.strangers.Remove(g.stranger)
		g.stranger = nil
	}
	if g.client {
		g.client = false
		g.door.clients--
	}
}

// Close implements [net.Conn].
func (g *guest) Close() error {
	g.door.mu.Lock()
	g.leaveLocked()
	g.door.mu.Unlock()
	return g.Conn.Close()
}
