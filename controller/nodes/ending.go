// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package nodes

import (
	"context"
	"sync/atomic"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/stats"
	"google.golang.org/grpc/status"
)

// ending records whether the node itself ended a call.
type ending struct{ answered atomic.Bool }

type endingKey struct{}

// noteEnding returns a context for one call, and the ending that the call fills in.
func noteEnding(ctx context.Context) (context.Context, *ending) {
	e := &ending{}
	return context.WithValue(ctx, endingKey{}, e), e
}

// silent tells a node that gave no answer from a node that answered "unavailable" because its
// runtime is away. The state of the connection cannot tell: when a node goes away in the middle of
// a call, the state changes some time after the call has failed.
func (e *ending) silent(err error) bool {
	switch status.Code(err) {
	case codes.DeadlineExceeded:
		return true
	case codes.Unavailable:
		return !e.answered.Load()
	}
	return false
}

// endings is the stats.Handler of connections to nodes. It fills in each call's ending.
type endings struct{}

var _ stats.Handler = endings{}

// TagRPC implements stats.Handler.
func (endings) TagRPC(ctx context.Context, _ *stats.RPCTagInfo) context.Context { return ctx }

// HandleRPC implements stats.Handler. A status that the node sent comes with trailers; a status
// that the client made up does not.
func (endings) HandleRPC(ctx context.Context, s stats.RPCStats) {
	if _, ok := s.(*stats.InTrailer); !ok {
		return
	}
	if e, ok := ctx.Value(endingKey{}).(*ending); ok {
		e.answered.Store(true)
	}
}

// TagConn implements stats.Handler.
func (endings) TagConn(ctx context.Context, _ *stats.ConnTagInfo) context.Context { return ctx }

// HandleConn implements stats.Handler.
func (endings) HandleConn(context.Context, stats.ConnStats) {}
