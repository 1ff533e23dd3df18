// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package prepull

import (
	"context"

	"go.opentelemetry.io/otel/attribute"
	"go.opentelemetry.io/otel/codes"
	"go.opentelemetry.io/otel/trace"

	opsv1 "github.com/cri-proxy/cri-proxy/api/ops/v1"
)

// traceEnd makes the span of a pull that has finished. tracer may be nil.
func traceEnd(tracer trace.Tracer, op *opsv1.PullOperation, image string) {
	if tracer == nil {
		return
	}
	begin := trace.WithTimestamp(op.GetCreateTime().AsTime())
	_, span := tracer.Start(context.Background(), "Pull", begin, trace.WithAttributes(
		attribute.String("criproxy.operation", op.GetUid()),
		attribute.String("criproxy.image", image),
		attribute.String("criproxy.result", op.GetReason()),
		attribute.Int64("criproxy.bytes_fetched", op.GetBytesFetched()),
	))
	if at := op.GetStartTime(); at != nil {
		span.AddEvent("first attempt", trace.WithTimestamp(at.AsTime()))
	}
	if op.GetPhase() != opsv1.PullPhase_PULL_SUCCEEDED {
		span.SetStatus(codes.Error, op.GetMessage())
	}
	span.End(trace.WithTimestamp(op.GetFinishTime().AsTime()))
}
