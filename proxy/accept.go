// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package proxy

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"math"
	"net"
	"os"
	"slices"
	"sync"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
	"google.golang.org/grpc"
	"google.golang.org/grpc/keepalive"
)

// turn is one gRPC server and what feeds it. A gRPC server that has told its clients to go elsewhere cannot take new ones, so that
// the proxy that goes on needs another one.
type turn struct {
	grpc  *grpc.Server
	feed  *feed
	conns map[*clientConn]struct{} // guarded by Server.mu; some may be closed
}

// feed is the listener of one turn: it hands out connections that were accepted elsewhere, and closing it closes no socket.
type feed struct {
	addr  net.Addr
	conns chan net.Conn
	over  chan struct{}
	once  sync.Once
}

func newFeed() *feed {
	return &feed{addr: &net.UnixAddr{Net: "unix"}, conns: make(chan net.Conn), over: make(chan struct{})}
}

// Accept implements [net.Listener].
func (f *feed) Accept() (net.Conn, error) {
	select {
	case c := <-f.conns:
		return c, nil
	case <-f.over:
		return nil, net.ErrClosed
	}
}

// Close implements [net.Listener].
func (f *feed) Close() error {
	f.once.Do(func() { close(f.over) })
	return nil
}

// Addr implements [net.Listener].
func (f *feed) Addr() net.Addr { return f.addr }

// give reports whether the connection has been taken.
func (f *feed) give(c net.Conn) bool {
	select {
	case f.conns <- c:
		return true
	case <-f.over:
		return false
	}
}

// deadliner is a listener whose Accept can be woken.
type deadliner interface{ SetDeadline(t time.Time) error }

// accepting is one listener that is being served.
type accepting struct {
	net.Listener

	mu     sync.Mutex // guards all following fields
	closed bool
	// paused is closed when accepting goes on; nil while it does. idle is closed once nothing more is accepted.
	paused, idle chan struct{}
}

// longAgo wakes an Accept.
func longAgo() time.Time { return time.Unix(1, 0) }

// pause returns a channel that is closed once no connection is taken any more; those that come wait in the socket's queue.
func (a *accepting) pause() (<-chan struct{}, error) {
	a.mu.Lock()
	defer a.mu.Unlock()
	d, ok := a.Listener.(deadliner)
	if !ok {
		return nil, fmt.Errorf("listener %s cannot be paused", a.Addr())
	}
	if a.paused == nil {
		a.paused, a.idle = make(chan struct{}), make(chan struct{})
		if a.closed {
			close(a.idle)
			return a.idle, nil
		}
		if err := d.SetDeadline(longAgo()); err != nil {
			close(a.idle)
			return nil, err
		}
	}
	return a.idle, nil
}

func (a *accepting) resume() {
	a.mu.Lock()
	defer a.mu.Unlock()
	if a.paused == nil {
		return
	}
	_ = a.Listener.(deadliner).SetDeadline(time.Time{}) // pause has seen that it is one
	close(a.paused)
	a.paused = nil
}

// close ends accepting for good. Not even for a moment does it go on after a pause: what is in the queue may be another process's.
func (a *accepting) close() {
	a.mu.Lock()
	defer a.mu.Unlock()
	if a.closed {
		return
	}
	a.closed = true
	_ = a.Listener.Close()
	if a.paused != nil {
		close(a.paused)
		a.paused = nil
	}
}

// state returns whether the listener is closed, and a channel to wait for if it is paused.
func (a *accepting) state() (closed bool, paused <-chan struct{}) {
	a.mu.Lock()
	defer a.mu.Unlock()
	if a.paused != nil {
		select {
		case <-a.idle:
		default:
			close(a.idle)
		}
	}
	return a.closed, a.paused
}

// Bounds of the wait after an error that passes by itself, such as too many open files; gRPC's own.
const (
	acceptPause    = 5 * time.Millisecond
	acceptPauseMax = time.Second
)

// next returns the next connection. It returns [net.ErrClosed] after close.
func (a *accepting) next() (net.Conn, error) {
	wait := acceptPause
	for {
		closed, paused := a.state()
		if closed {
			return nil, net.ErrClosed
		}
		if paused != nil {
			<-paused
			continue
		}
		Unblock(a.Listener)
		c, err := a.Accept()
		switch {
		case err == nil:
			return c, nil
		case errors.Is(err, os.ErrDeadlineExceeded):
			// Woken by pause or close.
		case errors.Is(err, unix.EMFILE), errors.Is(err, unix.ENFILE), errors.Is(err, unix.ECONNABORTED), errors.Is(err, unix.ENOBUFS), errors.Is(err, unix.ENOMEM):
			time.Sleep(wait) //nolint:forbidigo // nothing tells when there are descriptors again
			wait = min(2*wait, acceptPauseMax)
		default:
			if closed, _ := a.state(); closed {
				return nil, net.ErrClosed
			}
			return nil, err
		}
	}
}

// Unblock is for a listening socket that other processes have, too, right before each Accept: it has Accept wait where a deadline or Close can
// wake it. Whether a socket blocks is a property that all these processes share, and systemd makes it block when it starts another one with it:
// an Accept that begins then ends with the next connection and with nothing else.
func Unblock(l net.Listener) {
	c, ok := l.(syscall.Conn)
	if !ok {
		return
	}
	if raw, err := c.SyscallConn(); err == nil {
		_ = raw.Control(func(fd uintptr) { _ = unix.SetNonblock(int(fd), true) }) // else it is as it was
	}
}

// newTurn makes a gRPC server. The caller holds s.mu, or s is not shared yet.
func (s *Server) newTurn() *turn {
	t := &turn{grpc: grpc.NewServer(
		grpc.ForceServerCodecV2(s.codec),
		grpc.UnknownServiceHandler(s.handle),
		// No limits of our own: both peers enforce theirs.
		grpc.MaxRecvMsgSize(math.MaxInt32),
		grpc.MaxSendMsgSize(math.MaxInt32),
		grpc.MaxHeaderListSize(maxHeaderList),
		grpc.MaxConcurrentStreams(maxCalls),
		grpc.KeepaliveEnforcementPolicy(keepalive.EnforcementPolicy{MinTime: time.Second, PermitWithoutStream: true}),
		grpc.StaticStreamWindowSize(streamWindow),
		grpc.StaticConnWindowSize(connWindow),
	), feed: newFeed(), conns: map[*clientConn]struct{}{}}
	if s.register != nil {
		s.register(t.grpc)
	}
	return t
}

// Serve answers calls on l until Drain or Stop, after which it returns nil. It
// may be called for several listeners.
func (s *Server) Serve(l net.Listener) error {
	a := &accepting{Listener: l}
	s.mu.Lock()
	if s.over {
		s.mu.Unlock()
		return l.Close()
	}
	s.listeners[a] = struct{}{}
	s.mu.Unlock()
	for {
		c, err := a.next()
		switch {
		case err == nil:
			s.take(c)
		case errors.Is(err, net.ErrClosed) && s.isOver():
			return nil
		default:
			return fmt.Errorf("serve %s: %w", l.Addr(), err)
		}
	}
}

// take gives a connection to the gRPC server whose turn it is.
func (s *Server) take(raw net.Conn) {
	c := newClientConn(raw)
	for {
		t := s.current(c)
		if t == nil {
			_ = c.Close()
			return
		}
		if t.feed.give(c) {
			return
		}
	}
}

// current returns the turn that takes connections, and notes that it is given c; nil after the end.
func (s *Server) current(c *clientConn) *turn {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.over {
		return nil
	}
	if t := s.turn; !s.turns[t] {
		s.turns[t] = true
		go func() { _ = t.grpc.Serve(t.feed) }() // ends with Stop or GracefulStop, which every turn gets
	}
	for old := range s.turn.conns {
		select {
		case <-old.away:
			delete(s.turn.conns, old)
		default:
		}
	}
	s.turn.conns[c] = struct{}{}
	return s.turn
}

func (s *Server) isOver() bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.over
}

// finish takes no more connections, and returns the gRPC servers that are not over.
func (s *Server) finish() []*turn {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.over = true
	for a := range s.listeners {
		a.close()
	}
	s.turns[s.turn] = true
	return slices.Collect(maps.Keys(s.turns))
}

// hangUp closes the connections of a turn. gRPC's Stop does so, too, but waits for those that have not begun to speak HTTP/2, for up to two minutes.
func (s *Server) hangUp(t *turn) {
	s.mu.Lock()
	conns := slices.Collect(maps.Keys(t.conns))
	s.mu.Unlock()
	for _, c := range conns {
		_ = c.Close()
	}
}

// Pause leaves connections that come in the sockets' queues, where another process may take them, until Resume. It returns when nothing more
// is accepted. Connections that are there are served on.
func (s *Server) Pause(ctx context.Context) error {
	s.mu.Lock()
	listeners := slices.Collect(maps.Keys(s.listeners))
	s.mu.Unlock()
	for _, a := range listeners {
		idle, err := a.pause()
		if err != nil {
			return err
		}
		select {
		case <-idle:
		case <-ctx.Done():
			return ctx.Err()
		}
	}
	return nil
}

// Resume ends Pause.
func (s *Server) Resume() {
	s.mu.Lock()
	defer s.mu.Unlock()
	for a := range s.listeners {
		a.resume()
	}
}

// Redial makes every client dial anew (GOAWAY) and goes on serving. Calls in flight end by themselves; event streams are ended with
// Unavailable as soon as the clients know that they are to come back elsewhere, or ctx ends. A client finds at the path that it dials
// whatever listens there by then.
func (s *Server) Redial(ctx context.Context) {
	s.mu.Lock()
	if s.over {
		s.mu.Unlock()
		return
	}
	old := s.turn
	s.turn = s.newTurn()
	conns := slices.Collect(maps.Keys(old.conns))
	s.mu.Unlock()
	go func() { // ends with the last call of the old clients, which Drain and Stop see to
		old.grpc.GracefulStop()
		s.mu.Lock()
		defer s.mu.Unlock()
		delete(s.turns, old)
	}()
	for _, c := range conns {
		select {
		case <-c.away:
		case <-ctx.Done():
		}
	}
	s.flight.endStreams(false)
}
