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

// Hold is a moment at which the director can be taken away: calls that come wait, and none is under
// way that depends on it. Exactly one of its methods must be called.
type Hold struct {
	f    *inflight
	once sync.Once
}

// Hold makes calls that begin wait, and returns when no call under way depends on what the director
// knows (see [Depender]). Others, such as image pulls, go on. If ctx ends first, all calls go on,
// and the error names those that are in the way. Only one Hold may be in force.
func (s *Server) Hold(ctx context.Context) (*Hold, error) {
	h := &Hold{f: &s.inflight}
	s.inflight.mu.Lock()
	s.inflight.held = make(chan struct{})
	s.inflight.mu.Unlock()
	if err := s.inflight.wait(ctx, s.inflight.dependents); err != nil {
		names := s.dependentNames()
		h.Release()
		return nil, fmt.Errorf("calls under way: %s: %w", strings.Join(names, ", "), err)
	}
	return h, nil
}

// Release lets the calls go on as if nothing had been.
func (h *Hold) Release() { h.end(nil) }

// Divert lets the calls go on, and all that come, to another proxy, undecoded: that one answers
// them as it sees things.
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

// dependentNames returns the methods of calls that depend on the director, ordered, without their
// services.
func (s *Server) dependentNames() []string {
	s.inflight.mu.Lock()
	defer s.inflight.mu.Unlock()
	var names []string
	for name, m := range s.methods {
		if m.depending > 0 {
			names = append(names, name[strings.LastIndexByte(name, '/')+1:])
		}
	}
	slices.Sort(names)
	return names
}
