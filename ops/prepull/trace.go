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

// traced makes the span of a pull that has finished.
func (p *Puller) traced(op *opsv1.PullOperation, image string) {
	if p.tracer == nil {
		return
	}
	_, span := p.tracer.Start(context.Background(), "Pull", trace.WithTimestamp(op.GetCreateTime().AsTime()), trace.WithAttributes(
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
