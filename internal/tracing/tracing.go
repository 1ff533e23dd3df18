// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package tracing

import (
	"context"
	"fmt"
	"time"

	"github.com/sirupsen/logrus"
	"go.opentelemetry.io/otel"
	"go.opentelemetry.io/otel/attribute"
	"go.opentelemetry.io/otel/exporters/otlp/otlptrace/otlptracegrpc"
	"go.opentelemetry.io/otel/sdk/resource"
	sdktrace "go.opentelemetry.io/otel/sdk/trace"
	"go.opentelemetry.io/otel/trace"
	"golang.org/x/time/rate"
)

// scope is the name of the tracer.
const scope = "github.com/cri-proxy/cri-proxy"

const (
	// queue bounds the spans that wait for the collector, about 1 KiB each. More spans are dropped:
	// a collector that is away costs at most 1 MiB.
	queue = 1024
	// exportTimeout bounds one attempt to send spans.
	exportTimeout = 10 * time.Second
	// shutdownTimeout is how long the end of the process waits for the last spans.
	shutdownTimeout = 300 * time.Millisecond
)

// Options of [Start]. All are required but SamplingRatePerMillion.
type Options struct {
	// Endpoint is host:port of a collector that takes OTLP over gRPC without TLS, as kubelet's
	// tracing.endpoint.
	Endpoint string
	// SamplingRatePerMillion is how many of a million traces are sampled that start here, as
	// kubelet's setting of this name. Traces that a caller has started follow the caller's
	// decision.
	SamplingRatePerMillion int
	NodeName, Version      string
	Log                    logrus.FieldLogger
}

// Tracing makes spans and sends them. A nil one makes none.
type Tracing struct {
	provider *sdktrace.TracerProvider
	log      logrus.FieldLogger
}

// Start begins to send spans. It does not wait for the collector, which may come and go. Start sets
// the one error handler that OpenTelemetry has in a process.
func Start(ctx context.Context, o Options) (*Tracing, error) {
	exporter, err := otlptracegrpc.New(ctx, otlptracegrpc.WithInsecure(),
		otlptracegrpc.WithEndpoint(o.Endpoint), otlptracegrpc.WithTimeout(exportTimeout))
	if err != nil {
		return nil, fmt.Errorf("tracing.endpoint %s: %w", o.Endpoint, err)
	}
	complaints := rate.NewLimiter(rate.Every(time.Minute), 1)
	otel.SetErrorHandler(otel.ErrorHandlerFunc(func(err error) {
		if complaints.Allow() {
			o.Log.WithError(err).WithField("endpoint", o.Endpoint).Warn("traces are lost")
		}
	}))
	return &Tracing{log: o.Log, provider: sdktrace.NewTracerProvider(
		sdktrace.WithBatcher(exporter, sdktrace.WithMaxQueueSize(queue), sdktrace.WithExportTimeout(exportTimeout)),
		sdktrace.WithSampler(sdktrace.ParentBased(sdktrace.TraceIDRatioBased(float64(o.SamplingRatePerMillion)/1e6))),
		sdktrace.WithResource(resource.NewSchemaless(
			attribute.String("service.name", "cri-proxy"),
			attribute.String("service.version", o.Version),
			attribute.String("k8s.node.name", o.NodeName),
		)),
	)}, nil
}

// Tracer makes the spans; nil for nil.
func (t *Tracing) Tracer() trace.Tracer {
	if t == nil {
		return nil
	}
	return t.provider.Tracer(scope)
}

// Close sends what is left, for a moment, and ends.
func (t *Tracing) Close() {
	if t == nil {
		return
	}
	ctx, cancel := context.WithTimeout(context.Background(), shutdownTimeout)
	defer cancel()
	if err := t.provider.Shutdown(ctx); err != nil {
		t.log.WithError(err).Warn("the last traces were not sent")
	}
}
