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
	"slices"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/keepalive"

	"github.com/cri-proxy/cri-proxy/proxy/internal/listener"
)

// generation is one gRPC server and what feeds it. A gRPC server that has told its clients to go
// elsewhere cannot take new ones: a proxy that goes on needs another one.
type generation struct {
	grpc  *grpc.Server
	feed  *listener.Feed
	conns map[*listener.Conn]struct{} // guarded by Server.mu; some may be closed
}

// maxCalls is how many calls one connection may have under way; others wait at the caller
// (SETTINGS_MAX_CONCURRENT_STREAMS). kubelet has one for each pod that it works on and one for each
// exec probe that runs: with 500 pods of two containers and three probes each, all at the same
// moment, 3,500.
const maxCalls = 4096

// newGeneration makes a gRPC server. The caller holds s.mu, or s is not shared yet.
func (s *Server) newGeneration() *generation {
	g := &generation{grpc: grpc.NewServer(
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
	), feed: listener.NewFeed(), conns: map[*listener.Conn]struct{}{}}
	if s.register != nil {
		s.register(g.grpc)
	}
	return g
}

// Serve answers calls on l until Drain or Stop, after which it returns nil. It
// may be called for several listeners.
func (s *Server) Serve(l net.Listener) error {
	a := listener.NewAcceptor(l)
	s.mu.Lock()
	if s.over {
		s.mu.Unlock()
		return l.Close()
	}
	s.listeners[a] = struct{}{}
	s.mu.Unlock()
	for {
		c, err := a.Next()
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

// take gives a connection to the current gRPC server.
func (s *Server) take(raw net.Conn) {
	c := listener.NewConn(raw)
	for {
		g := s.current(c)
		if g == nil {
			_ = c.Close()
			return
		}
		if g.feed.Give(c) {
			return
		}
	}
}

// current returns the generation that takes connections, and notes that it is given c. It returns
// nil after the end.
func (s *Server) current(c *listener.Conn) *generation {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.over {
		return nil
	}
	g := s.generation
	if !s.generations[g] {
		s.generations[g] = true
		go func() { _ = g.grpc.Serve(g.feed) }() // ends with Stop or GracefulStop, which every generation gets
	}
	for old := range g.conns {
		select {
		case <-old.Away():
			delete(g.conns, old)
		default:
		}
	}
	g.conns[c] = struct{}{}
	return g
}

func (s *Server) isOver() bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.over
}

// finish takes no more connections, and returns the gRPC servers that are not over.
func (s *Server) finish() []*generation {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.over = true
	for a := range s.listeners {
		a.Close()
	}
	s.generations[s.generation] = true
	return slices.Collect(maps.Keys(s.generations))
}

// hangUp closes the connections of a generation. gRPC's Stop does so too, but waits for those that
// have not begun to speak HTTP/2, for up to two minutes.
func (s *Server) hangUp(g *generation) {
	s.mu.Lock()
	conns := slices.Collect(maps.Keys(g.conns))
	s.mu.Unlock()
	for _, c := range conns {
		_ = c.Close()
	}
}

// Pause leaves connections that come in the sockets' queues, where another process may take them,
// until Resume. It returns when nothing more is accepted. Connections that are there are still
// served.
func (s *Server) Pause(ctx context.Context) error {
	s.mu.Lock()
	listeners := slices.Collect(maps.Keys(s.listeners))
	s.mu.Unlock()
	for _, a := range listeners {
		idle, err := a.Pause()
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
		a.Resume()
	}
}

// Redial makes every client dial anew (GOAWAY) and goes on serving. Calls in flight end by
// themselves. Event streams are ended with Unavailable as soon as the clients know that they are to
// come back elsewhere, or ctx ends. A client finds at the path that it dials whatever listens there
// by then.
func (s *Server) Redial(ctx context.Context) {
	s.mu.Lock()
	if s.over {
		s.mu.Unlock()
		return
	}
	old := s.generation
	s.generation = s.newGeneration()
	conns := slices.Collect(maps.Keys(old.conns))
	s.mu.Unlock()
	go func() { // ends with the last call of the old clients, which Drain and Stop see to
		old.grpc.GracefulStop()
		s.mu.Lock()
		defer s.mu.Unlock()
		delete(s.generations, old)
	}()
	for _, c := range conns {
		select {
		case <-c.Away():
		case <-ctx.Done():
		}
	}
	s.inflight.endStreams(false)
}
