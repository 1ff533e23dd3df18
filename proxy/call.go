// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package proxy

import (
	"context"
	"errors"
	"io"
	"time"

	"go.opentelemetry.io/otel/trace"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/encoding"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"
)

// call is one call on its way through. It lives as long as its handler.
type call struct {
	s      *Server
	m      *method
	name   string // full method name
	client grpc.ServerStream
	conn   *grpc.ClientConn // where it goes
	md     metadata.MD      // the caller's, ready to be sent upstream

	req      []byte        // copy for the recorder
	upstream time.Duration // time spent waiting for the runtime
	header   metadata.MD   // of the latest unary answer
	trailer  metadata.MD

	probe      bool // see [Options.Probe]
	diverted   bool // conn is another proxy, which sees to the interceptors
	dependency Dependency
	depending  bool // guarded by inflight.mu
}

// handle answers every call that no local service has taken. gRPC calls it for
// unknown services as well as for unknown methods of known ones.
func (s *Server) handle(_ any, client grpc.ServerStream) error {
	began := time.Now()
	name, _ := grpc.MethodFromServerStream(client)
	m := s.methods[name]
	if m == nil {
		m = s.unknown
		s.newer.note(name)
	}
	c := &call{s: s, m: m, name: name, client: client}
	c.md, _ = metadata.FromIncomingContext(client.Context())
	c.probe = s.isProbe(c.md)
	if !c.probe {
		s.calls.Add(1)
	}
	s.inflight.begin(c)
	defer s.inflight.end(c)
	if err := s.inflight.enter(client.Context(), c); err != nil {
		return err
	}
	if c.probe {
		return c.probed() // it is nobody's call, and is not counted
	}
	c.readMetadata()
	s.lastCall.Store(began.UnixNano())
	var span trace.Span
	if s.tracer != nil {
		span = c.startSpan(s.tracer)
	}

	var err error
	switch m.shape {
	case unary:
		err = c.unary()
		m.metrics.added(time.Since(began) - c.upstream)
	case serverStream:
		err = c.serverStream()
	default:
		err = c.bidi(nil, false)
	}

	code := codes.OK
	if err != nil {
		st, ok := status.FromError(err)
		if !ok {
			st = status.FromContextError(err) // as gRPC will answer it
		}
		code = st.Code()
		s.callErrors.Add(1)
	}
	m.metrics.done(code)
	if span != nil {
		endSpan(span, code, err)
	}
	if s.recorder != nil {
		s.recorder.Record(name, c.req, code)
	}
	return err
}

// readMetadata looks at the caller's metadata. The reserved keys among it are left
// out by gRPC when it is sent.
func (c *call) readMetadata() {
	if ua := c.md["user-agent"]; len(ua) > 0 {
		if last := c.s.lastUserAgent.Load(); last == nil || *last != ua[0] {
			c.s.lastUserAgent.Store(&ua[0])
		}
	}
	// The upstream connection announces what this hop can decompress.
	delete(c.md, "grpc-accept-encoding")
}

// outgoing returns ctx with the caller's metadata for a call upstream.
func (c *call) outgoing(ctx context.Context) context.Context {
	return metadata.NewOutgoingContext(ctx, c.md)
}

// callOptions returns the options of an upstream call, with room for more.
// What the caller said in HTTP/2's own fields is repeated where it differs from
// the default.
func (c *call) callOptions() []grpc.CallOption {
	opts := make([]grpc.CallOption, 0, 6)
	opts = append(opts, c.s.options...)
	if a := c.md[":authority"]; len(a) == 1 && a[0] != authority {
		opts = append(opts, grpc.CallAuthority(a[0]))
	}
	const plain = "application/grpc"
	if t := c.md["content-type"]; len(t) == 1 && len(t[0]) > len(plain)+1 {
		opts = append(opts, grpc.CallContentSubtype(t[0][len(plain)+1:]))
	}
	st, ok := grpc.ServerTransportStreamFromContext(c.client.Context()).(interface{ RecvCompress() string })
	if ok {
		if name := st.RecvCompress(); name != "" && encoding.GetCompressor(name) != nil {
			opts = append(opts, grpc.UseCompressor(name))
		}
	}
	return opts
}

// record keeps a copy of the request if somebody wants it.
func (c *call) record(f *frame) {
	if c.s.recorder != nil {
		c.req = f.data.Materialize()
	}
}

// receiveOnly reads the request of a method that has just one. If the caller
// sends none or several, it is left to the runtime to complain: the call goes on
// as a bidirectional stream, done is true and err its outcome.
func (c *call) receiveOnly(f *frame) (done bool, err error) {
	switch err := c.client.RecvMsg(f); {
	case err == nil:
	case errors.Is(err, io.EOF):
		return true, c.bidi(nil, true)
	default:
		return true, err
	}
	c.record(f)
	second := new(frame)
	switch err := c.client.RecvMsg(second); {
	case errors.Is(err, io.EOF):
		return false, nil
	case err == nil:
		return true, c.bidi([]*frame{f, second}, false)
	default:
		f.free()
		return true, err
	}
}

// upstreamError returns the status to answer for an error of the upstream
// connection: the error itself, with code, message and details untouched, unless
// it is only the echo of our own cancel of ctx.
func (c *call) upstreamError(ctx context.Context, err error) error {
	switch cause := context.Cause(ctx); {
	case errors.Is(cause, errEnded):
		return status.Error(codes.Unavailable, "cri-proxy is stopping, connect again")
	case cause != nil && !errors.Is(cause, ctx.Err()):
		return cause // why the caller could not be read
	}
	return connectionError(err)
}

// connectionError says Unavailable where gRPC says Canceled though nobody has
// cancelled: when the connection to the runtime was closed by [Upstream.Close].
func connectionError(err error) error {
	// The code alone may as well be that of a cancel of the caller's.
	if errors.Is(err, grpc.ErrClientConnClosing) { //nolint:staticcheck // see the comment above
		return status.Error(codes.Unavailable, "cri-proxy has closed its connection to the runtime")
	}
	return err
}
