// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package controller

import (
	"context"
	"sync/atomic"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/stats"
	"google.golang.org/grpc/status"
)

// ending says whether a node has ended a call with a word of its own.
type ending struct{ told atomic.Bool }

type endingKey struct{}

// noteEnding returns a context for one call, and what is to be known of the call's end when it has ended.
func noteEnding(ctx context.Context) (context.Context, *ending) {
	e := &ending{}
	return context.WithValue(ctx, endingKey{}, e), e
}

// silent tells a node that gave no answer from one that answered "unavailable" because its runtime is away. The state of the connection does
// not: when a node goes away in the middle of a call, it changes some time after the call has failed.
func (e *ending) silent(err error) bool {
	switch status.Code(err) {
	case codes.DeadlineExceeded:
		return true
	case codes.Unavailable:
		return !e.told.Load()
	}
	return false
}

// endings is a stats.Handler of connections to nodes, for noteEnding.
type endings struct{}

var _ stats.Handler = endings{}

// TagRPC implements stats.Handler.
func (endings) TagRPC(ctx context.Context, _ *stats.RPCTagInfo) context.Context { return ctx }

// HandleRPC implements stats.Handler: a status that the node has sent comes with trailers, one that is made up here does not.
func (endings) HandleRPC(ctx context.Context, s stats.RPCStats) {
	if _, ok := s.(*stats.InTrailer); !ok {
		return
	}
	if e, ok := ctx.Value(endingKey{}).(*ending); ok {
		e.told.Store(true)
	}
}

// TagConn implements stats.Handler.
func (endings) TagConn(ctx context.Context, _ *stats.ConnTagInfo) context.Context { return ctx }

// HandleConn implements stats.Handler.
func (endings) HandleConn(context.Context, stats.ConnStats) {}
