// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package mtls

import (
	"context"
	"sync/atomic"

	"github.com/sirupsen/logrus"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/peer"
	"google.golang.org/grpc/stats"
	"google.golang.org/grpc/status"
)

// refusals logs the calls that gRPC refuses before an interceptor sees them: messages that are too
// large, or no messages at all.
type refusals struct{ s *Server }

var _ stats.Handler = refusals{}

// call is a running call.
type call struct {
	method  string
	reached atomic.Bool // set by the first interceptor: from there on others log
}

type callKey struct{}

// TagRPC implements [stats.Handler].
func (refusals) TagRPC(ctx context.Context, info *stats.RPCTagInfo) context.Context {
	return context.WithValue(ctx, callKey{}, &call{method: info.FullMethodName})
}

// HandleRPC implements [stats.Handler].
func (r refusals) HandleRPC(ctx context.Context, s stats.RPCStats) {
	end, ok := s.(*stats.End)
	if !ok || end.Error == nil {
		return
	}
	c, ok := ctx.Value(callKey{}).(*call)
	if !ok || c.reached.Load() || status.Code(end.Error) == codes.Canceled {
		return
	}
	r.s.refused(ctx, c.method, end.Error)
}

// TagConn implements [stats.Handler].
func (refusals) TagConn(ctx context.Context, _ *stats.ConnTagInfo) context.Context { return ctx }

// HandleConn implements [stats.Handler].
func (refusals) HandleConn(context.Context, stats.ConnStats) {}

// unknownMethod answers calls of methods that do not exist.
func (s *Server) unknownMethod(_ any, stream grpc.ServerStream) error {
	method, _ := grpc.MethodFromServerStream(stream)
	err := status.Errorf(codes.Unimplemented, "unknown method %.200q", method)
	s.refused(stream.Context(), method, err)
	return err
}

func (s *Server) refused(ctx context.Context, method string, err error) {
	if !s.denials.Allow() {
		return
	}
	fields := logrus.Fields{"method": method}
	if len(method) > 200 {
		fields["method"] = method[:200]
	}
	if p, ok := peer.FromContext(ctx); ok {
		fields["remote"] = p.Addr.String()
	}
	s.log.WithFields(fields).WithError(err).Warn("ops call refused")
}
