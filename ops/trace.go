// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package ops

import (
	"context"

	"go.opentelemetry.io/otel/attribute"
	"go.opentelemetry.io/otel/codes"
	"go.opentelemetry.io/otel/trace"

	opsv1 "github.com/cri-proxy/cri-proxy/api/ops/v1"
	"github.com/cri-proxy/cri-proxy/ops/operation"
)

// trace makes the spans of an operation that has finished: its own, one for each phase, and in its
// own the moments at which containers ended and began. The spans are made at the end, because an
// operation may outlive the process that began it; then the phases that another process saw are
// missing.
func (e *Engine) trace(op *opsv1.Operation, stays []operation.Stay) {
	if e.tracer == nil {
		return
	}
	begun := trace.WithTimestamp(op.GetCreateTime().AsTime())
	ctx, span := e.tracer.Start(context.Background(), op.GetKind(), begun, trace.WithAttributes(
		attribute.String("criproxy.operation", op.GetUid()),
		attribute.String("criproxy.requester", op.GetRequester()),
		attribute.String("k8s.namespace.name", op.GetPod().GetNamespace()),
		attribute.String("k8s.pod.name", op.GetPod().GetName()),
		attribute.String("k8s.pod.uid", op.GetPod().GetUid()),
		attribute.String("criproxy.result", operation.PhaseName(op.GetPhase())),
	))
	if !span.IsRecording() {
		return
	}
	for i := range len(stays) - 1 {
		_, phase := e.tracer.Start(ctx, operation.PhaseName(stays[i].Phase), trace.WithTimestamp(stays[i].Since))
		phase.End(trace.WithTimestamp(stays[i+1].Since))
	}
	for _, c := range op.GetContainers() {
		of := trace.WithAttributes(
			attribute.String("k8s.container.name", c.GetName()), attribute.String("criproxy.method", c.GetMethod()),
			attribute.String("criproxy.incumbent", c.GetIncumbentId()),
			attribute.String("criproxy.successor", c.GetSuccessorId()),
		)
		if at := c.GetStopTime(); at != nil {
			span.AddEvent("container ended", of, trace.WithTimestamp(at.AsTime()))
		}
		if at := c.GetStartTime(); at != nil {
			span.AddEvent("container started", of, trace.WithTimestamp(at.AsTime()))
		}
	}
	if op.GetPhase() != opsv1.Phase_PHASE_SUCCEEDED {
		span.SetStatus(codes.Error, op.GetMessage())
	}
	span.End(trace.WithTimestamp(op.GetFinishTime().AsTime()))
}
