// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package daemon

import (
	"context"
	"encoding/hex"
	"fmt"
	"net"
	"sync"
	"testing"
	"time"

	collectorpb "go.opentelemetry.io/proto/otlp/collector/trace/v1"
	tracepb "go.opentelemetry.io/proto/otlp/trace/v1"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"
)

// collector takes spans as an OpenTelemetry collector does.
type collector struct {
	collectorpb.UnimplementedTraceServiceServer
	address string

	mu    sync.Mutex // guards all following fields
	spans []*tracepb.Span
	from  string // service.name
}

func startCollector(t *testing.T) *collector {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	c := &collector{address: l.Addr().String()}
	s := grpc.NewServer()
	collectorpb.RegisterTraceServiceServer(s, c)
	var owned sync.WaitGroup
	owned.Go(func() { _ = s.Serve(l) })
	t.Cleanup(func() {
		s.Stop()
		owned.Wait()
	})
	return c
}

// Export implements [collectorpb.TraceServiceServer].
func (c *collector) Export(
	_ context.Context, req *collectorpb.ExportTraceServiceRequest,
) (*collectorpb.ExportTraceServiceResponse, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	for _, r := range req.GetResourceSpans() {
		for _, a := range r.GetResource().GetAttributes() {
			if a.GetKey() == "service.name" {
				c.from = a.GetValue().GetStringValue()
			}
		}
		for _, s := range r.GetScopeSpans() {
			c.spans = append(c.spans, s.GetSpans()...)
		}
	}
	return &collectorpb.ExportTraceServiceResponse{}, nil
}

// heard are the trace contexts that the runtime got, by method.
type heard struct {
	runtimeapi.UnimplementedRuntimeServiceServer
	mu     sync.Mutex // guards parent
	parent []string
}

func (h *heard) note(ctx context.Context) {
	md, _ := metadata.FromIncomingContext(ctx)
	if md["kubelet"] == nil {
		return // the daemon itself asks, too
	}
	h.mu.Lock()
	defer h.mu.Unlock()
	h.parent = append(h.parent, fmt.Sprint(md["traceparent"], md["tracestate"], md["baggage"]))
}

func (h *heard) Version(ctx context.Context, _ *runtimeapi.VersionRequest) (*runtimeapi.VersionResponse, error) {
	h.note(ctx)
	return &runtimeapi.VersionResponse{}, nil
}

func (h *heard) StopPodSandbox(
	ctx context.Context, _ *runtimeapi.StopPodSandboxRequest,
) (*runtimeapi.StopPodSandboxResponse, error) {
	h.note(ctx)
	return nil, status.Error(codes.NotFound, "no such sandbox")
}

const (
	kubeletTrace = "0af7651916cd43dd8448eb211c80319c"
	kubeletSpan  = "b7ad6b7169203331"
)

// Calls that kubelet traces get a span between kubelet's and the runtime's; all others go through
// as they are.
func TestTraces(t *testing.T) {
	sampled, unsampled := "00-"+kubeletTrace+"-"+kubeletSpan+"-01", "00-"+kubeletTrace+"-"+kubeletSpan+"-00"
	for _, tt := range []tracingCase{
		{name: "off", parent: sampled},
		{name: "traced by kubelet", on: true, parent: sampled, spans: 2},
		{name: "traced by kubelet and not kept", on: true, rate: 1e6, parent: unsampled},
		{name: "not traced by kubelet", on: true},
		{name: "sampled here", on: true, rate: 1e6, spans: 2},
		{name: "no trace context", on: true, parent: "00-nonsense"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			for range 20 {
				if tt.run(t) {
					return
				}
			}
			t.Error("the end of the process does not wait for its traces")
		})
	}
}

type tracingCase struct {
	name   string
	on     bool
	rate   int
	parent string
	spans  int // of the two calls
}

// run reports false when the daemon says at its end that traces were not sent: it waits for a
// moment only, which may be too short on a machine with too much to do.
func (tt tracingCase) run(t *testing.T) bool {
	t.Helper()
	c := newConfig(t)
	otel := startCollector(t)
	if tt.on {
		c.Tracing.Endpoint, c.Tracing.SamplingRatePerMillion = otel.address, tt.rate
	}
	l, err := net.Listen("unix", runtimePath(c))
	if err != nil {
		t.Fatal(err)
	}
	rt, s := &heard{}, grpc.NewServer()
	runtimeapi.RegisterRuntimeServiceServer(s, rt)
	var owned sync.WaitGroup
	owned.Go(func() { _ = s.Serve(l) })
	defer owned.Wait()
	defer s.Stop()
	d := start(t, c)
	ctx, cancel := context.WithTimeout(t.Context(), deadline)
	defer cancel()
	ctx = metadata.AppendToOutgoingContext(ctx, "kubelet", "me")
	if tt.parent != "" {
		ctx = metadata.AppendToOutgoingContext(ctx, "traceparent", tt.parent, "tracestate", "a=b", "baggage", "c=d")
	}
	kubelet := runtimeapi.NewRuntimeServiceClient(dial(t, c.Listen.Path))
	for _, err := kubelet.Version(ctx, &runtimeapi.VersionRequest{}); err != nil; _, err = kubelet.Version(ctx,
		&runtimeapi.VersionRequest{}) {
		if status.Code(err) != codes.Unavailable { // of the runtime, for a moment
			t.Fatal(err)
		}
	}
	rt.mu.Lock()
	rt.parent = rt.parent[len(rt.parent)-1:]
	rt.mu.Unlock()
	if _, err := kubelet.StopPodSandbox(ctx, &runtimeapi.StopPodSandboxRequest{PodSandboxId: "x"}); status.Code(
		err) != codes.NotFound {
		t.Fatal(err)
	}
	d.term()
	if err := d.ended(t); err != nil {
		t.Fatal(err)
	}
	otel.mu.Lock()
	defer otel.mu.Unlock()
	spans := map[string]*tracepb.Span{}
	for _, s := range otel.spans {
		if prev := spans[s.GetName()]; prev == nil || s.GetStartTimeUnixNano() > prev.GetStartTimeUnixNano() {
			spans[s.GetName()] = s
		}
	}
	if len(spans) < tt.spans && d.logged("the last traces were not sent") {
		return false
	}
	if len(spans) != tt.spans {
		t.Fatalf("spans %v, want %d", spans, tt.spans)
	}
	for i, name := range []string{"runtime.v1.RuntimeService/Version", "runtime.v1.RuntimeService/StopPodSandbox"} {
		want := fmt.Sprint([]string{tt.parent}, []string{"a=b"}, []string{"c=d"})
		if tt.parent == "" {
			want = "[] [] []"
		}
		if tt.spans > 0 {
			s := spans[name]
			trace := hex.EncodeToString(s.GetTraceId())
			want = fmt.Sprintf("[00-%s-%s-01] [a=b] [c=d]", trace, hex.EncodeToString(s.GetSpanId()))
			if tt.parent == "" {
				want = fmt.Sprintf("[00-%s-%s-01] [] []", trace, hex.EncodeToString(s.GetSpanId()))
			} else if trace != kubeletTrace || hex.EncodeToString(s.GetParentSpanId()) != kubeletSpan {
				t.Errorf("%s is no child of kubelet's span: %v", name, s)
			}
			checkSpan(t, s, []int64{0, int64(codes.NotFound)}[i])
		}
		if got := rt.parent[i]; got != want {
			t.Errorf("%s: the runtime got %s, want %s", name, got, want)
		}
	}
	if tt.spans > 0 && otel.from != "cri-proxy" {
		t.Errorf("service %q", otel.from)
	}
	return true
}

func checkSpan(t *testing.T, s *tracepb.Span, code int64) {
	t.Helper()
	got := map[string]string{}
	for _, a := range s.GetAttributes() {
		got[a.GetKey()] = a.GetValue().GetStringValue()
		if a.GetKey() == "rpc.grpc.status_code" && a.GetValue().GetIntValue() != code {
			t.Errorf("%s: code %d, want %d", s.GetName(), a.GetValue().GetIntValue(), code)
		}
	}
	if full := got["rpc.service"] + "/" + got["rpc.method"]; got["rpc.system"] != "grpc" || full != s.GetName() {
		t.Errorf("%s: attributes %v", s.GetName(), got)
	}
	if failed := s.GetStatus().GetCode() == tracepb.Status_STATUS_CODE_ERROR; failed != (code != 0) {
		t.Errorf("%s: status %v", s.GetName(), s.GetStatus())
	}
	if took := time.Duration(s.GetEndTimeUnixNano() - s.GetStartTimeUnixNano()); took <= 0 { //nolint:gosec // of now
		t.Errorf("%s took %s", s.GetName(), took)
	}
}
