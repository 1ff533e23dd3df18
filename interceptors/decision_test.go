// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package interceptors_test

import (
	"io"
	"maps"
	"slices"
	"testing"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/sirupsen/logrus"
	"go.opentelemetry.io/otel/attribute"
	sdktrace "go.opentelemetry.io/otel/sdk/trace"
	"go.opentelemetry.io/otel/sdk/trace/tracetest"
	"google.golang.org/protobuf/proto"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/cri-proxy/cri-proxy/interceptors"
)

// What interceptors did is counted once per call and decision, and what they let pass too.
func TestDecisionsAreCounted(t *testing.T) {
	b := newBed(t)
	log := logrus.New()
	log.SetOutput(io.Discard)
	reg := prometheus.NewPedanticRegistry()
	b.director = interceptors.New(interceptors.Options{View: b.view, Records: b.records, Log: log, Registerer: reg})
	b.serveList()
	b.on(runtimeapi.RuntimeService_RemoveContainer_FullMethodName, always(&runtimeapi.RemoveContainerResponse{}, nil))
	b.on(runtimeapi.RuntimeService_ExecSync_FullMethodName, always(&runtimeapi.ExecSyncResponse{ExitCode: 1}, nil))
	call := func(method string, req proto.Message) {
		t.Helper()
		in, err := proto.Marshal(req)
		if err != nil {
			t.Fatal(err)
		}
		_, _ = b.raw(t.Context(), method, in) // the answers are other tests' business
	}
	claim := b.swapping()
	call(methodList, &runtimeapi.ListContainersRequest{})
	call(runtimeapi.RuntimeService_ExecSync_FullMethodName, &runtimeapi.ExecSyncRequest{ContainerId: incumbent})
	call(
		runtimeapi.RuntimeService_StartContainer_FullMethodName,
		&runtimeapi.StartContainerRequest{ContainerId: successor},
	)
	claim.Release()
	call(runtimeapi.RuntimeService_RemoveContainer_FullMethodName, &runtimeapi.RemoveContainerRequest{ContainerId: web})
	families, err := reg.Gather()
	if err != nil {
		t.Fatal(err)
	}
	got := map[string]float64{}
	for _, f := range families {
		for _, m := range f.GetMetric() {
			got[m.GetLabel()[1].GetValue()+" "+m.GetLabel()[0].GetValue()] += m.GetCounter().GetValue()
		}
	}
	want := map[string]float64{
		"ListContainers hidden": 1, "ListContainers masked": 1, "ExecSync refused": 1, "StartContainer hidden": 1,
		"RemoveContainer passed": 1,
	}
	if !maps.Equal(got, want) {
		t.Errorf("got %v, want %v", got, want)
	}
}

// A traced call says on its span what was done to it.
func TestDecisionsAreTraced(t *testing.T) {
	b := newBed(t)
	b.serveList()
	claim := b.swapping()
	defer claim.Release()
	spans := tracetest.NewInMemoryExporter()
	provider := sdktrace.NewTracerProvider(sdktrace.WithSyncer(spans))
	ctx, span := provider.Tracer("test").Start(t.Context(), "call")
	if _, err := b.raw(ctx, methodList, nil); err != nil {
		t.Fatal(err)
	}
	_, filter, err := b.director.Stream(methodStreamList)(ctx, methodStreamList, nil)
	if err != nil {
		t.Fatal(err)
	}
	filter.Close()
	span.End()
	got := spans.GetSpans()[0].Attributes
	want := []attribute.KeyValue{attribute.StringSlice("criproxy.decisions", []string{"hidden", "masked"})}
	if !slices.Equal(got, want) {
		t.Errorf("got %v, want %v", got, want)
	}
}
