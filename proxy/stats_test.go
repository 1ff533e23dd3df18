// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package proxy_test

import (
	"fmt"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/cri-proxy/cri-proxy/proxy"
	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/testutil"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/connectivity"
	"google.golang.org/grpc/status"
)

// record is a CallRecorder.
type record struct {
	mu    sync.Mutex // guards all following fields
	calls []string
}

func (r *record) Record(method string, req []byte, code codes.Code) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.calls = append(r.calls, fmt.Sprintf("%s %q %v", method, req, code))
}

func (r *record) seen() []string {
	r.mu.Lock()
	defer r.mu.Unlock()
	return slices.Clone(r.calls)
}

func TestStatsMetricsAndRecorder(t *testing.T) {
	registry, calls := prometheus.NewPedanticRegistry(), new(record)
	b := newBed(t, proxy.Options{Registerer: registry, Recorder: calls})
	if st := b.server.Stats(); !st.LastCall.IsZero() || st.Calls != 0 || st.LastUserAgent != "" {
		t.Errorf("before any call: %+v", st)
	}
	b.backend.answer(func(_ string, s grpc.ServerStream) error {
		var m []byte
		if err := s.RecvMsg(&m); err != nil {
			return err
		}
		switch string(m) {
		case "fail":
			return status.Error(codes.NotFound, "no")
		case "future":
			return status.Error(4711, "no")
		}
		return s.SendMsg(&m)
	})
	conn := dial(t, b.listen, grpc.WithUserAgent("kubelet/v1.37.2"))
	began := time.Now()
	for _, c := range []struct{ method, req string }{
		{methodVersion, "a"}, {methodVersion, "b"}, {methodVersion, "fail"}, {methodVersion, "future"},
		{methodEvents, "e"}, {methodNew, "n"}, {methodAlien, "x"},
	} {
		exchange(testContext(t), conn, c.method, []byte(c.req))
	}
	awaitInFlight(t, b.server, 0)

	st := b.server.Stats()
	if st.Calls != 7 || st.CallErrors != 2 || st.Intercepted != 0 || st.InterceptorFaults != 0 {
		t.Errorf("%+v", st)
	}
	if st.LastCall.Before(began) || time.Since(st.LastCall) > time.Minute {
		t.Errorf("last call %v", st.LastCall)
	}
	if !strings.HasPrefix(st.LastUserAgent, "kubelet/v1.37.2 grpc-go/") {
		t.Errorf("user agent %q", st.LastUserAgent)
	}
	want := []string{
		methodVersion + ` "a" OK`, methodVersion + ` "b" OK`,
		methodVersion + ` "fail" NotFound`, methodVersion + ` "future" Code(4711)`,
		methodEvents + ` "e" OK`, methodNew + ` "" OK`, methodAlien + ` "" OK`,
	}
	if got := calls.seen(); !slices.Equal(got, want) {
		t.Errorf("recorded %q", got)
	}

	awaitState(t, b.upstream, connectivity.Ready)
	metrics := `
# HELP criproxy_calls_in_flight CRI calls that are not answered yet, event streams included.
# TYPE criproxy_calls_in_flight gauge
criproxy_calls_in_flight 0
# HELP criproxy_calls_total CRI calls answered, by method (methods outside the CRI are "unknown") and gRPC code.
# TYPE criproxy_calls_total counter
criproxy_calls_total{code="NotFound",method="/runtime.v1.RuntimeService/Version"} 1
criproxy_calls_total{code="OK",method="/runtime.v1.RuntimeService/GetContainerEvents"} 1
criproxy_calls_total{code="OK",method="/runtime.v1.RuntimeService/Version"} 2
criproxy_calls_total{code="OK",method="unknown"} 2
criproxy_calls_total{code="other",method="/runtime.v1.RuntimeService/Version"} 1
# HELP criproxy_upstream_state 1 for the state the connection to the runtime is in, 0 for the others.
# TYPE criproxy_upstream_state gauge
criproxy_upstream_state{state="CONNECTING"} 0
criproxy_upstream_state{state="IDLE"} 0
criproxy_upstream_state{state="READY"} 1
criproxy_upstream_state{state="SHUTDOWN"} 0
criproxy_upstream_state{state="TRANSIENT_FAILURE"} 0
`
	if err := testutil.GatherAndCompare(registry, strings.NewReader(metrics),
		"criproxy_calls_in_flight", "criproxy_calls_total", "criproxy_upstream_state"); err != nil {
		t.Error(err)
	}
	families, err := registry.Gather()
	if err != nil {
		t.Fatal(err)
	}
	for _, f := range families {
		if f.GetName() == "criproxy_call_added_seconds" {
			if n := f.GetMetric()[0].GetHistogram().GetSampleCount(); n != 4 {
				t.Errorf("%d unary calls measured", n)
			}
			return
		}
	}
	t.Error("criproxy_call_added_seconds is missing")
}

// A second server with the same registry serves all the same.
func TestMetricsRegisteredTwice(t *testing.T) {
	registry := prometheus.NewPedanticRegistry()
	newBed(t, proxy.Options{Registerer: registry})
	b := newBed(t, proxy.Options{Registerer: registry})
	if s, _ := invoke(testContext(t), b.proxied, methodVersion, nil); s.Code != codes.OK {
		t.Errorf("%v %s", s.Code, s.Message)
	}
}

func TestInFlight(t *testing.T) {
	release := make(chan struct{})
	b := newBed(t, proxy.Options{})
	b.backend.answer(holding(release))
	one, two := begin(t, b, methodVersion), begin(t, b, methodEvents)
	close(release)
	<-one
	<-two
	awaitInFlight(t, b.server, 0)
}
