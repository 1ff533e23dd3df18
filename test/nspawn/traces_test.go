// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package nspawn

import (
	"context"
	"encoding/hex"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	collectorpb "go.opentelemetry.io/proto/otlp/collector/trace/v1"
	tracepb "go.opentelemetry.io/proto/otlp/trace/v1"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/metadata"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"
)

// collector takes spans as an OpenTelemetry collector does.
type collector struct {
	collectorpb.UnimplementedTraceServiceServer
	hangs bool // does not answer

	mu    sync.Mutex // guards spans
	spans map[string]span
}

// span is one, with who has sent it.
type span struct {
	*tracepb.Span
	service string
}

func (s span) String() string {
	return s.service + " " + strings.ToLower(strings.TrimPrefix(s.GetKind().String(), "SPAN_KIND_"))
}

// key names a span among all.
func key(trace, id []byte) string { return hex.EncodeToString(trace) + "/" + hex.EncodeToString(id) }

// Export implements [collectorpb.TraceServiceServer].
func (c *collector) Export(
	ctx context.Context, req *collectorpb.ExportTraceServiceRequest,
) (*collectorpb.ExportTraceServiceResponse, error) {
	if c.hangs {
		<-ctx.Done()
		return nil, ctx.Err()
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	for _, r := range req.GetResourceSpans() {
		service := ""
		for _, a := range r.GetResource().GetAttributes() {
			if a.GetKey() == "service.name" {
				service = a.GetValue().GetStringValue()
			}
		}
		for _, scope := range r.GetScopeSpans() {
			for _, s := range scope.GetSpans() {
				c.spans[key(s.GetTraceId(), s.GetSpanId())] = span{s, service}
			}
		}
	}
	return &collectorpb.ExportTraceServiceResponse{}, nil
}

// collect starts a collector, which ends with the test or when stop is called.
func collect(t *testing.T, address string, hangs bool) (c *collector, at string, stop func()) {
	t.Helper()
	l, err := net.Listen("tcp", address)
	if err != nil {
		t.Fatal(err)
	}
	c = &collector{hangs: hangs, spans: map[string]span{}}
	s := grpc.NewServer()
	collectorpb.RegisterTraceServiceServer(s, c)
	var owned sync.WaitGroup
	owned.Go(func() { _ = s.Serve(l) })
	stop = func() {
		s.Stop()
		owned.Wait()
	}
	t.Cleanup(stop)
	return c, l.Addr().String(), stop
}

// path is who stands above containerd's span of a call, with the kinds of their spans, up to the
// trace's first.
func (c *collector) path(of span) (names []string, whole bool) {
	for s, ok := of, true; ; s, ok = c.spans[key(s.GetTraceId(), s.GetParentSpanId())] {
		if !ok {
			return names, false
		}
		if s.GetName() == of.GetName() {
			names = append([]string{s.String()}, names...)
		}
		if len(s.GetParentSpanId()) == 0 {
			return names, true
		}
	}
}

// traced are the calls that are looked for: all that a new pod costs.
var traced = []string{
	"runtime.v1.RuntimeService/RunPodSandbox", "runtime.v1.ImageService/PullImage",
	"runtime.v1.RuntimeService/CreateContainer",
	"runtime.v1.RuntimeService/StartContainer",
}

// chained reports whether containerd has said of each of these calls that it came by way, from the
// first span of a trace on.
func (c *collector) chained(since time.Time, way ...string) (seen string, ok bool) {
	c.mu.Lock()
	defer c.mu.Unlock()
	ok = true
	for _, method := range traced {
		n := 0
		for _, s := range c.spans {
			if s.service != "containerd" || s.GetName() != method ||
				s.GetStartTimeUnixNano() < uint64(since.UnixNano()) { //nolint:gosec // of this moment
				continue
			}
			n++
			names, whole := c.path(s)
			seen += fmt.Sprintf("%s: %q, up to the first: %v\n", method, names, whole)
			ok = ok && whole && slices.Equal(names, way)
		}
		if n == 0 {
			seen, ok = seen+method+" has no span of containerd's\n", false
		}
	}
	return seen, ok
}

// from is how many spans a program has sent.
func (c *collector) from(service string) (n int) {
	c.mu.Lock()
	defer c.mu.Unlock()
	for _, s := range c.spans {
		if s.service == service {
			n++
		}
	}
	return n
}

// documented are the lines of docs/OPERATIONS.md by which kubelet and containerd send traces, with
// another collector.
func documented(t *testing.T, address string) (kubelet, containerd string) {
	t.Helper()
	b, err := os.ReadFile("../../docs/OPERATIONS.md")
	if err != nil {
		t.Fatal(err)
	}
	for line := range strings.Lines(string(b)) {
		text := strings.ReplaceAll(strings.TrimPrefix(line, "    "), "localhost:4317", address)
		switch {
		case strings.HasPrefix(line, "    tracing: {") && kubelet == "":
			kubelet = text
		case strings.HasPrefix(line, "    Environment=OTEL_"):
			containerd += text
		}
	}
	if !strings.Contains(kubelet, "samplingRatePerMillion: 1000}") || containerd == "" {
		t.Fatalf("docs/OPERATIONS.md does not say how traces are sent: %q, %q", kubelet, containerd)
	}
	return strings.Replace(kubelet, ": 1000}", ": 1000000}", 1), containerd
}

// newPod makes a pod that pulls its image, and waits until it is ready.
func (n *node) newPod(t *testing.T, name string) {
	t.Helper()
	err := n.bed.KubectlApply(t.Context(), fmt.Sprintf(`
apiVersion: v1
kind: Pod
metadata: {name: %s}
spec:
  nodeName: %s
  terminationGracePeriodSeconds: 1
  containers:
  - {name: app, image: "%s", imagePullPolicy: Always}
`, name, n.NodeName, n.bed.Image("app:1")))
	if err != nil {
		t.Fatal(err)
	}
	n.kubectl(t, "wait", "--for=condition=Ready", "pod/"+name, "--timeout=150s")
	n.kubectl(t, "delete", "pod", name, "--wait=false")
}

// tracesOnNode has kubelet, cri-proxy and containerd send what they do to a collector, as
// docs/OPERATIONS.md says.
func tracesOnNode(t *testing.T, n *node) {
	before := n.files(t)
	c, address, stop := collect(t, net.JoinHostPort(n.bed.BridgeIP, "0"), false)
	forKubelet, forContainerd := documented(t, address)
	config := filepath.Join(n.NodeDir, "etc", "kubelet.yaml")
	const often = "Environment=OTEL_BSP_SCHEDULE_DELAY=200\n" // milliseconds, for the test's sake
	files := map[string]string{
		config: before[config] + forKubelet,
		n.root + "/etc/systemd/system/containerd.service.d/tracing.conf": "[Service]\n" + forContainerd + often,
		n.root + "/etc/systemd/system/kubelet.service.d/tracing.conf":    "[Service]\n" + often,
		n.root + "/etc/systemd/system/cri-proxy@.service.d/tracing.conf": "[Service]\n" + often,
	}
	for path, text := range files {
		if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(path, []byte(text), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	n.must(t, "systemctl", "stop", "kubelet.service")
	n.must(t, "systemctl", "daemon-reload")
	n.must(t, "systemctl", "restart", "containerd.service")
	n.must(t, "systemctl", "start", "kubelet.service")

	check := func(pod string, way ...string) {
		t.Helper()
		since := time.Now()
		n.newPod(t, pod)
		var seen string
		end := time.Now().Add(timeout)
		for ok := false; !ok; {
			if seen, ok = c.chained(since, way...); !ok && time.Now().After(end) {
				t.Fatalf("wanted %q, have\n%s", way, seen)
			}
			<-time.After(50 * time.Millisecond)
		}
		t.Logf("%s:\n%s", pod, seen)
	}
	check("traced-past", "kubelet client", "containerd server")
	if n := c.from("cri-proxy"); n > 0 {
		t.Errorf("%d spans of cri-proxy, which is not to have any", n)
	}
	n.does(t, "cri-proxy", "install", "--tracing-endpoint", address)
	await(t, "the end of the process before", n.oneRuns(t))
	check("traced-through", "kubelet client", "cri-proxy server", "containerd server")

	// What takes no spans costs no call, also when more of them wait than there is room for.
	stop()
	n.tracedCalls(t, "the collector is away")
	_, _, stop = collect(t, address, true)
	n.tracedCalls(t, "the collector hangs")
	n.newPod(t, "traced-hanging")
	n.does(t, "cri-proxy", "install", "--tracing-endpoint", "")
	await(t, "the end of the process before", n.oneRuns(t))
	stop()

	// Kubelet and containerd go on to send in vain until they are restarted next.
	for path := range files {
		if path == config {
			if err := os.WriteFile(path, []byte(before[config]), 0o644); err != nil {
				t.Fatal(err)
			}
			continue
		}
		if err := os.Remove(path); err != nil {
			t.Fatal(err)
		}
		_ = os.Remove(filepath.Dir(path)) // unless an install has something there
	}
	n.must(t, "systemctl", "daemon-reload")
	same(t, before, n.files(t), "/etc/cri-proxy/", "/var/lib/cri-proxy/", "/usr/local/lib/cri-proxy/")
}

// tracedCalls makes calls as a kubelet does that keeps all traces, more than spans can wait, and
// none may fail.
func (n *node) tracedCalls(t *testing.T, when string) {
	t.Helper()
	const callers, each, timeout = 8, 250, 5 * time.Second
	conn, err := grpc.NewClient(fmt.Sprintf("unix:///proc/%d/root/run/cri-proxy/cri.sock", n.leader()),
		grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	client := runtimeapi.NewRuntimeServiceClient(conn)
	began := time.Now()
	var owned sync.WaitGroup
	for i := range callers {
		owned.Go(func() {
			for j := range each {
				ctx, cancel := context.WithTimeout(t.Context(), timeout)
				ctx = metadata.AppendToOutgoingContext(ctx, "traceparent",
					fmt.Sprintf("00-%032x-%016x-01", i*each+j+1, i+1))
				_, err := client.Version(ctx, &runtimeapi.VersionRequest{})
				cancel()
				if err != nil {
					t.Errorf("%s, call %d of %d: %v", when, j, i, err)
					return
				}
			}
		})
	}
	owned.Wait()
	t.Logf("%s: %d calls in %s", when, callers*each, time.Since(began).Round(time.Millisecond))
}
