// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package proxy

import (
	"context"
	"strings"

	"go.opentelemetry.io/otel/attribute"
	otelcodes "go.opentelemetry.io/otel/codes"
	"go.opentelemetry.io/otel/propagation"
	"go.opentelemetry.io/otel/trace"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"
)

// carrier is W3C trace context in gRPC metadata, in the form that OpenTelemetry's gRPC
// instrumentation gives it, which kubelet and containerd use.
type carrier metadata.MD

var _ propagation.TextMapCarrier = carrier{}

// Get implements [propagation.TextMapCarrier].
func (c carrier) Get(key string) string {
	if v := c[key]; len(v) > 0 {
		return v[0]
	}
	return ""
}

// Set implements [propagation.TextMapCarrier].
func (c carrier) Set(key, value string) { c[key] = []string{value} }

// Keys implements [propagation.TextMapCarrier].
func (c carrier) Keys() []string {
	keys := make([]string, 0, len(c))
	for k := range c {
		keys = append(keys, k)
	}
	return keys
}

// tracedStream is a caller's stream whose context has the call's span.
type tracedStream struct {
	grpc.ServerStream
	ctx context.Context //nolint:containedctx // it is how gRPC hands a context to a handler of streams
}

// Context implements [grpc.ServerStream].
func (s *tracedStream) Context() context.Context { return s.ctx }

// startSpan begins the span of a call, as a child of the caller's, and makes it the parent of what
// the runtime does. If the trace is not to be kept, it returns nil, and the caller's trace context
// goes through as it is. The span of an endless stream would be of no use to anybody.
func (c *call) startSpan(tracer trace.Tracer) trace.Span {
	if c.m.endless {
		return nil
	}
	var w3c propagation.TraceContext
	ctx := w3c.Extract(c.client.Context(), carrier(c.md))
	if parent := trace.SpanContextFromContext(ctx); parent.IsValid() && !parent.IsSampled() {
		return nil
	}
	full := strings.TrimPrefix(c.name, "/")
	service, method, _ := strings.Cut(full, "/")
	ctx, span := tracer.Start(ctx, full, trace.WithSpanKind(trace.SpanKindServer), trace.WithAttributes(
		attribute.String("rpc.system", "grpc"),
		attribute.String("rpc.service", service), attribute.String("rpc.method", method),
	))
	if !span.IsRecording() {
		return nil
	}
	w3c.Inject(ctx, carrier(c.md))
	c.client = &tracedStream{c.client, ctx}
	return span
}

// endSpan ends it with how the call was answered.
func endSpan(span trace.Span, code codes.Code, err error) {
	span.SetAttributes(attribute.Int("rpc.grpc.status_code", int(code)))
	if err != nil {
		span.SetStatus(otelcodes.Error, status.Convert(err).Message())
	}
	span.End()
}
