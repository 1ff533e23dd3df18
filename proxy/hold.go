// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package proxy

import (
	"context"
	"fmt"
	"slices"
	"strings"
	"sync"

	"google.golang.org/grpc"
)

// Hold is a moment at which the director can be taken away: calls that come wait, and none is under way that depends on it. Exactly one
// of its methods must be called.
type Hold struct {
	f    *flight
	once sync.Once
}

// Hold makes calls that begin wait and returns when no call under way looks at what the director knows (see [Looker]); others, such as image pulls,
// go on. If ctx ends first, all calls go on, and the error names those that are in the way. Only one Hold may be in force.
func (s *Server) Hold(ctx context.Context) (*Hold, error) {
	h := &Hold{f: &s.flight}
	s.flight.mu.Lock()
	s.flight.held = make(chan struct{})
	s.flight.mu.Unlock()
	if err := s.flight.wait(ctx, s.flight.looks); err != nil {
		names := s.lookingNames()
		h.Release()
		return nil, fmt.Errorf("calls under way: %s: %w", strings.Join(names, ", "), err)
	}
	return h, nil
}

// Release lets the calls go on as if nothing had been.
func (h *Hold) Release() { h.end(nil) }

// Divert lets the calls go on, and all that come, to another proxy, undecoded: they are answered as that one sees things.
func (h *Hold) Divert(to *grpc.ClientConn) { h.end(to) }

func (h *Hold) end(to *grpc.ClientConn) {
	h.once.Do(func() {
		h.f.mu.Lock()
		defer h.f.mu.Unlock()
		h.f.divert = to
		close(h.f.held)
		h.f.held = nil
	})
}

// lookingNames returns the methods of calls that look, ordered, without their services.
func (s *Server) lookingNames() []string {
	s.flight.mu.Lock()
	defer s.flight.mu.Unlock()
	var names []string
	for name, m := range s.methods {
		if m.looking > 0 {
			names = append(names, name[strings.LastIndexByte(name, '/')+1:])
		}
	}
	slices.Sort(names)
	return names
}
