// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package daemon

import (
	"bufio"
	"context"
	"crypto/x509"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/sirupsen/logrus"
	logtest "github.com/sirupsen/logrus/hooks/test"
	"github.com/spf13/pflag"
	"go.uber.org/goleak"
	"golang.org/x/sys/unix"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/connectivity"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/credentials/insecure"
	healthpb "google.golang.org/grpc/health/grpc_health_v1"
	"google.golang.org/grpc/status"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	opsv1 "github.com/cri-proxy/cri-proxy/api/ops/v1"
	"github.com/cri-proxy/cri-proxy/internal/config"
	"github.com/cri-proxy/cri-proxy/internal/daemon/callrecord"
	"github.com/cri-proxy/cri-proxy/internal/mtls"
	"github.com/cri-proxy/cri-proxy/internal/mtls/mtlstest"
	"github.com/cri-proxy/cri-proxy/proxy"
	"github.com/cri-proxy/cri-proxy/systemd/node/bypass"
)

// asDaemon is set in the processes that are to be the daemon itself.
const asDaemon = "CRI_PROXY_TEST_DAEMON"

func TestMain(m *testing.M) {
	if os.Getenv(asDaemon) != "" {
		err := serveAsProcess(os.Args[1:])
		if over := (*TakenOverError)(nil); errors.As(err, &over) {
			os.Exit(over.ExitCode())
		}
		if err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(1)
		}
		os.Exit(0)
	}
	if dir := os.Getenv(asSuccessor); dir != "" {
		fmt.Fprintln(os.Stderr, successor(dir, os.Args[1]))
		os.Exit(1)
	}
	goleak.VerifyTestMain(m)
}

// serveAsProcess is `cri-proxy serve` with the settings of flags.
func serveAsProcess(args []string) error {
	c := config.Default()
	fs := pflag.NewFlagSet("serve", pflag.ContinueOnError)
	c.Flags(fs)
	if err := fs.Parse(args); err != nil {
		return err
	}
	if err := errors.Join(c.Complete(), c.Validate()); err != nil {
		return err
	}
	log, err := NewLogger(c.Log, os.Stderr)
	if err != nil {
		return err
	}
	proxy.LimitProcs()
	graceful, hard, end := Signals(log)
	defer end()
	return Run(graceful, hard, c, log)
}

// deadline bounds what must happen soon, on a machine with too much to do.
const deadline = 2 * time.Minute

// runtime stands in for containerd: it knows its version, blocks in RemoveContainer
// until told otherwise and answers all else with Unimplemented.
type runtime struct {
	runtimeapi.UnimplementedRuntimeServiceServer
	entered chan struct{}
	release chan struct{}
}

func (*runtime) Version(context.Context, *runtimeapi.VersionRequest) (*runtimeapi.VersionResponse, error) {
	return &runtimeapi.VersionResponse{RuntimeName: "stand-in", RuntimeVersion: "v9"}, nil
}

func (r *runtime) ListContainers(
	context.Context, *runtimeapi.ListContainersRequest,
) (*runtimeapi.ListContainersResponse, error) {
	return &runtimeapi.ListContainersResponse{}, nil
}

func (r *runtime) RemoveContainer(
	ctx context.Context, _ *runtimeapi.RemoveContainerRequest,
) (*runtimeapi.RemoveContainerResponse, error) {
	close(r.entered)
	select {
	case <-r.release:
		return &runtimeapi.RemoveContainerResponse{}, nil
	case <-ctx.Done():
		return nil, ctx.Err()
	}
}

func startRuntime(t testing.TB, path string) *runtime {
	t.Helper()
	l, err := net.Listen("unix", path)
	if err != nil {
		t.Fatal(err)
	}
	r := &runtime{entered: make(chan struct{}), release: make(chan struct{})}
	s := grpc.NewServer()
	runtimeapi.RegisterRuntimeServiceServer(s, r)
	var owned sync.WaitGroup
	owned.Go(func() { _ = s.Serve(l) })
	t.Cleanup(func() {
		s.Stop()
		owned.Wait()
	})
	return r
}

// daemonUnderTest runs Run.
type daemonUnderTest struct {
	config *config.Config
	log    *logtest.Hook
	term   context.CancelFunc
	kill   context.CancelFunc
	err    chan error // what Run returned
}

func newConfig(t testing.TB) *config.Config {
	t.Helper()
	// Not t.TempDir: its names are longer than a socket path may be.
	dir, err := os.MkdirTemp("", "serve")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	c := config.Default()
	c.Listen.Path = filepath.Join(dir, "run", "cri.sock")
	c.RuntimeEndpoint = "unix://" + filepath.Join(dir, "runtime.sock")
	c.StateDir = filepath.Join(dir, "state")
	c.AdminSocket = filepath.Join(dir, "run", "admin.sock")
	c.NodeName = "node"
	c.DrainTimeout = deadline
	return c
}

func runtimePath(c *config.Config) string { return strings.TrimPrefix(c.RuntimeEndpoint, "unix://") }

// start runs the daemon and returns once it serves.
func start(t testing.TB, c *config.Config) *daemonUnderTest {
	t.Helper()
	if err := c.Validate(); err != nil {
		t.Fatal(err)
	}
	log, hook := logtest.NewNullLogger()
	log.SetLevel(logrus.DebugLevel)
	ctx, term := context.WithCancel(t.Context())
	hard, kill := context.WithCancel(context.Background())
	d := &daemonUnderTest{config: c, log: hook, term: term, kill: kill, err: make(chan error, 1)}
	over := make(chan struct{})
	go func() {
		defer close(over)
		d.err <- Run(ctx, hard, c, log)
	}()
	t.Cleanup(func() {
		term()
		kill()
		<-over
	})
	admin := dial(t, c.AdminSocket)
	if _, err := opsv1.NewOpsClient(admin).
		NodeInfo(t.Context(), &opsv1.NodeInfoRequest{}, grpc.WaitForReady(true)); err != nil {
		t.Fatalf("not started: %v; log: %v", err, entries(hook))
	}
	d.await(t, "serving") // the admin socket answers before the others listen
	return d
}

// await returns the log line with that message.
func (d *daemonUnderTest) await(t testing.TB, message string) *logrus.Entry {
	t.Helper()
	for end := time.Now().Add(deadline); time.Now().Before(end); time.Sleep(time.Millisecond) { // polling the log
		for _, e := range d.log.AllEntries() {
			if e.Message == message {
				return e
			}
		}
	}
	t.Fatalf("%q is not logged: %v", message, entries(d.log))
	return nil
}

// anyPort is for a listener whose address is in the log: a port that was free a moment ago may be
// somebody else's.
const anyPort = "127.0.0.1:0"

// address is where the daemon listens, of the listener that the log line with that message is
// about.
func (d *daemonUnderTest) address(t testing.TB, message string) string {
	t.Helper()
	address, _ := d.await(t, message).Data["address"].(string)
	return address
}

const (
	opsListens     = "ops API with mutual TLS"
	metricsListens = "metrics"
)

func entries(h *logtest.Hook) []string {
	var all []string
	for _, e := range h.AllEntries() {
		line, _ := e.String()
		all = append(all, line)
	}
	return all
}

func (d *daemonUnderTest) logged(message string) bool {
	for _, e := range d.log.AllEntries() {
		if strings.Contains(e.Message, message) {
			return true
		}
	}
	return false
}

// ended returns what Run returned.
func (d *daemonUnderTest) ended(t testing.TB) error {
	t.Helper()
	select {
	case err := <-d.err:
		return err
	case <-time.After(deadline):
		t.Fatalf("still running; log: %v", entries(d.log))
		return nil
	}
}

func dial(t testing.TB, path string) *grpc.ClientConn {
	t.Helper()
	// Without a back-off, for what is waited for at once; and for a while, for a connection that
	// a machine with too much to do takes up late must not fail the call.
	conn, err := grpc.NewClient("unix://"+path, grpc.WithTransportCredentials(insecure.NewCredentials()),
		grpc.WithConnectParams(grpc.ConnectParams{MinConnectTimeout: deadline}))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { conn.Close() })
	return conn
}

func mode(t *testing.T, path string) os.FileMode {
	t.Helper()
	fi, err := os.Stat(path)
	if err != nil {
		t.Fatal(err)
	}
	return fi.Mode().Perm()
}

func TestServesWithoutRuntimeAndWithIt(t *testing.T) {
	c := newConfig(t)
	c.Listen.Mode = 0o660
	d := start(t, c)
	for path, want := range map[string]os.FileMode{c.Listen.Path: 0o660, c.AdminSocket: 0o600, c.StateDir: 0o700} {
		if got := mode(t, path); got != want {
			t.Errorf("%s has mode %o, want %o", path, got, want)
		}
	}
	if !d.logged("runtime socket does not exist yet") {
		t.Errorf("a missing runtime is not logged: %v", entries(d.log))
	}
	ops := opsv1.NewOpsClient(dial(t, c.AdminSocket))
	info, err := ops.NodeInfo(t.Context(), &opsv1.NodeInfoRequest{})
	if err != nil {
		t.Fatal(err)
	}
	if info.GetKubeletLastCall() != nil || info.GetCounters().GetCalls() != 0 || info.GetRuntime().GetName() != "" {
		t.Errorf("before kubelet and runtime: %v", info)
	}
	kubelet := runtimeapi.NewRuntimeServiceClient(dial(t, c.Listen.Path))
	if _, err := kubelet.Version(t.Context(), &runtimeapi.VersionRequest{}); status.Code(err) != codes.Unavailable {
		t.Errorf("without runtime: %v", err)
	}

	startRuntime(t, runtimePath(c))
	awaitRuntime(t, kubelet)
	info, err = ops.NodeInfo(t.Context(), &opsv1.NodeInfoRequest{})
	if err != nil {
		t.Fatal(err)
	}
	if info.GetNodeName() != "node" || info.GetListen() != c.Listen.Path || info.GetVersion() == "" ||
		info.GetStartTime() == nil ||
		info.GetKubeletLastCall() == nil || !strings.HasPrefix(info.GetKubeletUserAgent(), "grpc-go/") ||
		info.GetCounters().GetCalls() < 2 || info.GetCounters().GetCallErrors() == 0 ||
		info.GetRuntime().GetName() != "stand-in" || info.GetRuntime().GetVersion() != "v9" || info.GetRuntime().
		GetState() != "READY" || info.GetRuntime().GetEndpoint() != c.RuntimeEndpoint {
		t.Errorf("node info: %v", info)
	}
	// The runtime's own health service must be asked, not one of the proxy's.
	if _, err := healthpb.NewHealthClient(dial(t, c.Listen.Path)).
		Check(t.Context(), &healthpb.HealthCheckRequest{}); status.Code(err) != codes.Unimplemented {
		t.Errorf("health through the CRI socket: %v, want the stand-in's Unimplemented", err)
	}
	if r, err := healthpb.NewHealthClient(dial(t, c.AdminSocket)).
		Check(t.Context(), &healthpb.HealthCheckRequest{Service: "criproxy.ops.v1.Ops"}); err != nil ||
		r.GetStatus() != healthpb.HealthCheckResponse_SERVING {
		t.Errorf("health on the admin socket: %v, %v", r, err)
	}

	d.term()
	if err := d.ended(t); err != nil {
		t.Fatal(err)
	}
	for _, path := range []string{c.Listen.Path, c.AdminSocket} {
		if _, err := os.Lstat(path); !errors.Is(err, os.ErrNotExist) {
			t.Errorf("%s is left behind", path)
		}
	}
}

// awaitRuntime asks until the proxy has found the runtime.
func awaitRuntime(t *testing.T, kubelet runtimeapi.RuntimeServiceClient) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), deadline)
	defer cancel()
	tick := time.NewTicker(10 * time.Millisecond)
	defer tick.Stop()
	for {
		v, err := kubelet.Version(ctx, &runtimeapi.VersionRequest{})
		if err == nil {
			if v.GetRuntimeName() != "stand-in" {
				t.Fatalf("version %v", v)
			}
			return
		}
		select {
		case <-tick.C:
		case <-ctx.Done():
			t.Fatalf("the runtime is not found: %v", err)
		}
	}
}

func TestDrainLetsCallsEnd(t *testing.T) {
	c := newConfig(t)
	r := startRuntime(t, runtimePath(c))
	d := start(t, c)
	kubelet := runtimeapi.NewRuntimeServiceClient(dial(t, c.Listen.Path))
	awaitRuntime(t, kubelet)
	answered := make(chan error, 1)
	go func() {
		_, err := kubelet.RemoveContainer(context.Background(), &runtimeapi.RemoveContainerRequest{ContainerId: "c"})
		answered <- err
	}()
	<-r.entered
	d.term()
	// The admin socket outlives the data path's calls.
	for !d.logged("stopped") {
		info, err := opsv1.NewOpsClient(dial(t, c.AdminSocket)).NodeInfo(t.Context(), &opsv1.NodeInfoRequest{})
		if err != nil {
			t.Fatalf("admin socket while draining: %v", err)
		}
		if _, err := os.Lstat(c.Listen.Path); err == nil {
			continue // the listener is about to close
		}
		if info.GetCounters().GetInFlight() == 1 {
			break
		}
	}
	close(r.release)
	if err := <-answered; err != nil {
		t.Errorf("the call in flight failed: %v", err)
	}
	if err := d.ended(t); err != nil {
		t.Error(err)
	}
}

func TestSecondSignalStopsAtOnce(t *testing.T) {
	c := newConfig(t)
	c.DrainTimeout = 10 * deadline
	r := startRuntime(t, runtimePath(c))
	d := start(t, c)
	kubelet := runtimeapi.NewRuntimeServiceClient(dial(t, c.Listen.Path))
	awaitRuntime(t, kubelet)
	answered := make(chan error, 1)
	go func() {
		_, err := kubelet.RemoveContainer(context.Background(), &runtimeapi.RemoveContainerRequest{ContainerId: "c"})
		answered <- err
	}()
	<-r.entered
	d.term()
	d.kill()
	if err := d.ended(t); err == nil || !strings.Contains(err.Error(), "1 calls cut") {
		t.Errorf("got %v, want the cut call named", err)
	}
	if err := <-answered; status.Code(err) != codes.Unavailable {
		t.Errorf("the cut call got %v", err)
	}
}

// Who connects to the admin socket and says nothing is hung up on: the end of the daemon would wait
// for it.
func TestSilentAdmin(t *testing.T) {
	t.Parallel()
	d := start(t, newConfig(t))
	c, err := net.Dial("unix", d.config.AdminSocket)
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	_ = c.SetReadDeadline(time.Now().Add(time.Minute)) // a deadline of the server's own is two minutes
	for err == nil {
		_, err = c.Read(make([]byte, 256))
	}
	if errors.Is(err, os.ErrDeadlineExceeded) {
		t.Error("not hung up on")
	}
}

func TestStartErrors(t *testing.T) {
	busy := func(t *testing.T, path string) {
		if err := os.MkdirAll(filepath.Dir(path), 0o700); err != nil {
			t.Fatal(err)
		}
		l, err := net.Listen("unix", path)
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { l.Close() })
	}
	taken, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer taken.Close()
	for _, tt := range []struct {
		name  string
		setup func(*testing.T, *config.Config)
		want  string
	}{
		{"listen path in use", func(t *testing.T, c *config.Config) { busy(t, c.Listen.Path) },
			fmt.Sprintf("is in use by a live process (pid %d)", os.Getpid())},
		{"admin socket in use", func(t *testing.T, c *config.Config) { busy(t, c.AdminSocket) },
			"adminSocket: listen path"},
		{"listen path is a file", func(t *testing.T, c *config.Config) {
			c.Listen.Path = filepath.Join(filepath.Dir(c.StateDir), "file")
			if err := os.WriteFile(c.Listen.Path, nil, 0o600); err != nil {
				t.Fatal(err)
			}
		}, "is not a socket"},
		{"state directory is a file", func(t *testing.T, c *config.Config) {
			if err := os.WriteFile(c.StateDir, nil, 0o600); err != nil {
				t.Fatal(err)
			}
		}, "stateDir: "},
		{"metrics address in use", func(_ *testing.T, c *config.Config) { c.MetricsAddress = taken.Addr().String() },
			"metricsAddress: listen tcp"},
		{"missing certificates", func(_ *testing.T, c *config.Config) {
			c.Ops = config.Ops{Address: "127.0.0.1:0", CertFile: "/no/a", KeyFile: "/no/b", ClientCAFile: "/no/c",
				AllowedClients: []string{"x"}}
		}, "ops: TLS file: stat /no/a: no such file"},
		{"record file out of reach", func(_ *testing.T, c *config.Config) { c.RecordCalls = "/no/such/file" },
			"record-calls: open /no/such/file"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			c := newConfig(t)
			tt.setup(t, c)
			log, _ := logtest.NewNullLogger()
			ctx, cancel := context.WithTimeout(t.Context(), deadline)
			defer cancel()
			err := Run(ctx, ctx, c, log)
			if err == nil || !strings.Contains(err.Error(), tt.want) {
				t.Fatalf("got  %v\nwant %s", err, tt.want)
			}
			if tt.name != "listen path in use" {
				if fi, err := os.Lstat(c.Listen.Path); err == nil && fi.Mode().Type() == os.ModeSocket {
					t.Error("the CRI socket is left behind")
				}
			}
		})
	}
}

func TestSecondInstanceOnTheStateDirectory(t *testing.T) {
	c := newConfig(t)
	start(t, c)
	other := newConfig(t)
	other.StateDir = c.StateDir
	log, _ := logtest.NewNullLogger()
	ctx, cancel := context.WithTimeout(t.Context(), deadline)
	defer cancel()
	if err := Run(ctx, ctx, other, log); err == nil || !strings.Contains(err.Error(), c.StateDir) || ctx.Err() != nil {
		t.Fatalf("got %v, %v", err, ctx.Err())
	}
}

func TestStateDirectoryIsClosedToOthers(t *testing.T) {
	c := newConfig(t)
	if err := os.Mkdir(c.StateDir, 0o755); err != nil {
		t.Fatal(err)
	}
	d := start(t, c)
	if got := mode(t, c.StateDir); got != 0o700 {
		t.Errorf("mode %o", got)
	}
	if !d.logged("closing it to others") {
		t.Error("not logged")
	}
}

func TestHTTP(t *testing.T) {
	c := newConfig(t)
	c.MetricsAddress = anyPort
	r := startRuntime(t, runtimePath(c))
	d := start(t, c)
	address := d.address(t, metricsListens)
	get := func(path string) (int, string) {
		t.Helper()
		req, err := http.NewRequestWithContext(t.Context(), http.MethodGet, "http://"+address+path, nil)
		if err != nil {
			t.Fatal(err)
		}
		client := &http.Client{Transport: &http.Transport{DisableKeepAlives: true}}
		resp, err := client.Do(req)
		if err != nil {
			t.Fatal(err)
		}
		defer resp.Body.Close()
		b, err := io.ReadAll(resp.Body)
		if err != nil {
			t.Fatal(err)
		}
		return resp.StatusCode, string(b)
	}
	kubelet := runtimeapi.NewRuntimeServiceClient(dial(t, c.Listen.Path))
	awaitRuntime(t, kubelet)
	for _, path := range []string{"/healthz", "/readyz"} {
		if code, body := get(path); code != http.StatusOK || body != "ok\n" {
			t.Errorf("%s: %d %q", path, code, body)
		}
	}
	for path, want := range map[string]string{
		"/healthz?verbose": "[+]cri ok\nhealthz check passed\n",
		"/readyz?verbose": "[+]draining ok\n[+]cri ok\n[+]runtime ok\n[+]journal ok\n[+]bypass " +
			"ok\nreadyz check passed\n",
		"/readyz?verbose&exclude=cri": "[+]draining ok\n[+]cri excluded: ok\n[+]runtime ok\n[+]journal " +
			"ok\n[+]bypass ok\nreadyz check passed\n",
		"/healthz?verbose&exclude=cri": "[+]cri excluded: ok\nhealthz check passed\n",
	} {
		if code, body := get(path); code != http.StatusOK || body != want {
			t.Errorf("%s: %d %q, want %q", path, code, body, want)
		}
	}
	if code, _ := get("/debug/pprof/"); code != http.StatusNotFound {
		t.Errorf("profiles over TCP: %d", code)
	}
	if err := os.WriteFile(filepath.Join(c.StateDir, "bypass"),
		[]byte(`{"since":"2026-01-02T03:04:05Z","reason":"a test"}`), 0o600); err != nil {
		t.Fatal(err)
	}
	if code, body := get("/readyz?verbose"); code != http.StatusOK || !strings.Contains(body, "[!]bypass: since ") ||
		!strings.Contains(body, ": a test (does not count)\n") {
		t.Errorf("bypassed: %d %q", code, body)
	}
	_, body := get("/metrics")
	for _, want := range []string{"criproxy_calls_total{", "criproxy_upstream_state{", "go_goroutines",
		"process_resident_memory_bytes", "go_build_info"} {
		if !strings.Contains(body, want) {
			t.Errorf("no %s in the metrics", want)
		}
	}
	go func() {
		_, _ = kubelet.RemoveContainer(context.Background(), &runtimeapi.RemoveContainerRequest{ContainerId: "c"})
	}()
	<-r.entered
	d.term()
	for {
		code, body := get("/readyz")
		if code == http.StatusServiceUnavailable &&
			strings.Contains(body, "[-]draining failed: draining, 1 calls are left\n") &&
			strings.HasSuffix(body, "readyz check failed\n") {
			break
		}
	}
	if _, body := get("/metrics"); !strings.Contains(body, "\ncriproxy_draining{process=\"this\"} 1\n") ||
		!strings.Contains(body, "\ncriproxy_drain_calls_left{process=\"this\"} 1\n") {
		t.Errorf("the drain is not in the metrics:\n%s", body)
	}
	if code, body := get("/healthz"); code != http.StatusOK {
		t.Errorf("healthz while draining: %d %q", code, body)
	}
	close(r.release)
	if err := d.ended(t); err != nil {
		t.Error(err)
	}
}

func TestOpsOverTLS(t *testing.T) {
	ca := mtlstest.NewCA(t, "ca")
	dir := t.TempDir()
	c := newConfig(t)
	c.Ops.Address = anyPort
	c.Ops.CertFile, c.Ops.KeyFile = ca.Issue(dir, "server",
		x509.Certificate{IPAddresses: []net.IP{net.IPv4(127, 0, 0, 1)}})
	c.Ops.ClientCAFile = ca.File
	c.Ops.AllowedClients = []string{"controller"}
	address := start(t, c).address(t, opsListens)
	call := func(name string) (*opsv1.NodeInfoResponse, error) {
		t.Helper()
		cert, key := ca.Issue(dir, name, x509.Certificate{DNSNames: []string{name}})
		creds, err := mtls.NewClient(mtls.ClientOptions{CertFile: cert, KeyFile: key, ServerCAFile: ca.File,
			Log: logrus.New()})
		if err != nil {
			t.Fatal(err)
		}
		return callNodeInfo(t, address, creds)
	}
	if info, err := call("controller"); err != nil || info.GetNodeName() != "node" {
		t.Errorf("allowed client: %v, %v", info, err)
	}
	if info, err := call("stranger"); status.Code(err) != codes.Unavailable {
		t.Errorf("stranger: %v, %v", info, err)
	}
	if info, err := callNodeInfo(t, address, insecure.NewCredentials()); status.Code(err) != codes.Unavailable {
		t.Errorf("without TLS: %v, %v", info, err)
	}
}

func callNodeInfo(
	t testing.TB, address string, creds credentials.TransportCredentials,
) (*opsv1.NodeInfoResponse, error) {
	t.Helper()
	conn, err := grpc.NewClient(address, grpc.WithTransportCredentials(creds))
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	ctx, cancel := context.WithTimeout(t.Context(), deadline)
	defer cancel()
	return opsv1.NewOpsClient(conn).NodeInfo(ctx, &opsv1.NodeInfoRequest{})
}

func TestRecordedCalls(t *testing.T) {
	c := newConfig(t)
	c.RecordCalls = filepath.Join(filepath.Dir(c.StateDir), "calls")
	r := startRuntime(t, runtimePath(c))
	close(r.release)
	d := start(t, c)
	kubelet := runtimeapi.NewRuntimeServiceClient(dial(t, c.Listen.Path))
	awaitRuntime(t, kubelet)
	_, _ = kubelet.CreateContainer(t.Context(), &runtimeapi.CreateContainerRequest{
		PodSandboxId: "sandbox",
		Config: &runtimeapi.ContainerConfig{
			Metadata: &runtimeapi.ContainerMetadata{Name: "app", Attempt: 3},
			Image:    &runtimeapi.ImageSpec{Image: "busybox"},
			Envs:     []*runtimeapi.KeyValue{{Key: "PASSWORD", Value: []byte("secret")}},
		},
		SandboxConfig: &runtimeapi.PodSandboxConfig{Metadata: &runtimeapi.PodSandboxMetadata{Name: "web",
			Namespace: "default", Uid: "u"}},
	})
	_, _ = kubelet.StopContainer(t.Context(), &runtimeapi.StopContainerRequest{ContainerId: "c1", Timeout: 30})
	if _, err := kubelet.RemoveContainer(t.Context(),
		&runtimeapi.RemoveContainerRequest{ContainerId: "c1"}); err != nil {
		t.Fatal(err)
	}
	d.term()
	if err := d.ended(t); err != nil {
		t.Fatal(err)
	}
	if got := mode(t, c.RecordCalls); got != 0o600 {
		t.Errorf("mode %o", got)
	}
	f, err := os.Open(c.RecordCalls)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	found := map[string]callrecord.Line{}
	for lines := bufio.NewScanner(f); lines.Scan(); {
		if strings.Contains(lines.Text(), "secret") {
			t.Errorf("the environment is recorded: %s", lines.Text())
		}
		var l callrecord.Line
		if err := json.Unmarshal(lines.Bytes(), &l); err != nil {
			t.Fatalf("%v: %s", err, lines.Text())
		}
		if l.Time.IsZero() {
			t.Errorf("no time: %s", lines.Text())
		}
		found[strings.TrimPrefix(l.Method, "/runtime.v1.RuntimeService/")] = l
	}
	create := found["CreateContainer"]
	if create.Code != "Unimplemented" || create.SandboxID != "sandbox" || create.Container != "app" ||
		create.Pod != "web" || create.Namespace != "default" || create.PodUID != "u" ||
		create.Attempt == nil || *create.Attempt != 3 || create.Image != "busybox" {
		t.Errorf("create: %+v", create)
	}
	if stop := found["StopContainer"]; stop.ContainerID != "c1" || stop.Timeout == nil || *stop.Timeout != 30 {
		t.Errorf("stop: %+v", stop)
	}
	if remove := found["RemoveContainer"]; remove.ContainerID != "c1" || remove.Code != "OK" {
		t.Errorf("remove: %+v", remove)
	}
	if found["Version"].Method == "" {
		t.Error("Version not recorded")
	}
}

// notifySocket is where systemd would listen.
func notifySocket(t *testing.T) (path string, conn *net.UnixConn) {
	t.Helper()
	dir, err := os.MkdirTemp("", "notify")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	path = filepath.Join(dir, "n.sock")
	conn, err = net.ListenUnixgram("unixgram", &net.UnixAddr{Name: path, Net: "unixgram"})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { conn.Close() })
	return path, conn
}

// notified returns the next message.
func notified(t *testing.T, conn *net.UnixConn) map[string]string {
	t.Helper()
	buf := make([]byte, 4096)
	if err := conn.SetReadDeadline(time.Now().Add(deadline)); err != nil {
		t.Fatal(err)
	}
	n, err := conn.Read(buf)
	if err != nil {
		t.Fatal(err)
	}
	state := map[string]string{}
	for line := range strings.SplitSeq(string(buf[:n]), "\n") {
		k, v, _ := strings.Cut(line, "=")
		state[k] = v
	}
	return state
}

func TestSystemdIsNotified(t *testing.T) {
	path, conn := notifySocket(t)
	t.Setenv("NOTIFY_SOCKET", path)
	t.Setenv("WATCHDOG_USEC", "100000")
	t.Setenv("WATCHDOG_PID", fmt.Sprint(os.Getpid()))
	c := newConfig(t)
	d := start(t, c)
	seen := map[string]bool{}
	for !seen["READY"] || !seen["WATCHDOG"] || !seen["away"] {
		for k, v := range notified(t, conn) {
			seen[k] = true
			seen["away"] = seen["away"] || strings.Contains(v, "is away")
		}
	}
	startRuntime(t, runtimePath(c))
	for want := "Relaying " + c.Listen.Path + " to " + c.RuntimeEndpoint; notified(t, conn)["STATUS"] != want; {
		continue
	}
	d.term()
	for {
		if state := notified(t, conn); state["STOPPING"] == "1" {
			if state["EXTEND_TIMEOUT_USEC"] != fmt.Sprint((deadline + 10*time.Second).Microseconds()) {
				t.Errorf("got %v", state)
			}
			break
		}
	}
	// Its pings go on until the end, and would wait for somebody to read them.
	var reader sync.WaitGroup
	reader.Go(func() { _, _ = io.Copy(io.Discard, conn) }) // ends with the deadline that notified has set, or now
	if err := d.ended(t); err != nil {
		t.Error(err)
	}
	conn.Close()
	reader.Wait()
}

func TestWatchdogIsNotPingedWithoutAnAnswer(t *testing.T) {
	path, conn := notifySocket(t)
	t.Setenv("NOTIFY_SOCKET", path)
	t.Setenv("WATCHDOG_USEC", "40000")
	t.Setenv("WATCHDOG_PID", "")
	log, hook := logtest.NewNullLogger()
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	answers := 0
	over := make(chan struct{})
	go func() {
		defer close(over)
		notifier{log}.watchdog(ctx, func(context.Context) error {
			if answers++; answers <= 3 {
				return errors.New("no answer")
			}
			return nil
		})
	}()
	if notified(t, conn)["WATCHDOG"] != "1" {
		t.Error("not pinged")
	}
	cancel()
	<-over
	if n := len(hook.AllEntries()); n != 3 || answers < 4 {
		t.Errorf("%d complaints and %d probes, want a ping after 3 failures", n, answers)
	}
}

func TestSelfProbe(t *testing.T) {
	c := newConfig(t)
	startRuntime(t, runtimePath(c))
	start(t, c)
	ctx, cancel := context.WithTimeout(t.Context(), deadline)
	defer cancel()
	// What others ask whether this is a cri-proxy, older ones and doctor among them.
	if err := bypass.Probe(ctx, c.Listen.Path); err != nil {
		t.Error(err)
	}
	// Something that listens and never accepts.
	dead := filepath.Join(filepath.Dir(c.StateDir), "dead.sock")
	l, err := net.Listen("unix", dead)
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	short, cancelShort := context.WithTimeout(t.Context(), 100*time.Millisecond)
	defer cancelShort()
	if err := probe(short, dead, "token"); err == nil || !strings.Contains(err.Error(), dead) {
		t.Errorf("got %v", err)
	}
	// What kubelet counts as its calls, the probe at the start does not.
	info, err := opsv1.NewOpsClient(dial(t, c.AdminSocket)).NodeInfo(t.Context(), &opsv1.NodeInfoRequest{})
	if err != nil || info.GetCounters().GetCalls() != 0 || info.GetKubeletLastCall() != nil {
		t.Errorf("%v, %v", info, err)
	}
	// Whoever does not know the secret makes an ordinary call, which the runtime answers.
	if err := probe(ctx, c.Listen.Path, "guessed"); err == nil || !strings.Contains(err.Error(), "somebody else") {
		t.Errorf("got %v", err)
	}
	info, err = opsv1.NewOpsClient(dial(t, c.AdminSocket)).NodeInfo(t.Context(), &opsv1.NodeInfoRequest{})
	if err != nil || info.GetCounters().GetCalls() != 1 {
		t.Errorf("%v, %v", info, err)
	}
}

func TestStatusLine(t *testing.T) {
	if got := statusLine("/l", "unix:///r", connectivity.TransientFailure); got != "Listening on /l, runtime "+
		"unix:///r is away (TRANSIENT_FAILURE)" {
		t.Error(got)
	}
}

// startProcess starts the daemon as a process of its own.
func startProcess(t *testing.T, c *config.Config, sockets []string, args ...string) (*exec.Cmd, *strings.Builder) {
	t.Helper()
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	args = append([]string{"--listen=" + c.Listen.Path, "--runtime-endpoint=" + c.RuntimeEndpoint,
		"--state-dir=" + c.StateDir, "--admin-socket=" + c.AdminSocket, "--drain-timeout=5s"}, args...)
	// The shell gives LISTEN_PID the pid that the daemon will have.
	cmd := exec.Command("sh", append([]string{"-c", `LISTEN_PID=$$ exec "$0" "$@"`, self}, args...)...)
	cmd.Env = append(os.Environ(), asDaemon+"=1", fmt.Sprintf("LISTEN_FDS=%d", len(sockets)),
		"LISTEN_FDNAMES="+strings.Join(sockets, ":"))
	var stderr strings.Builder
	cmd.Stderr = &stderr
	return cmd, &stderr
}

func TestSocketActivation(t *testing.T) {
	for _, name := range []string{"cri", "cri-proxy.socket"} {
		t.Run(name, func(t *testing.T) {
			c := newConfig(t)
			startRuntime(t, runtimePath(c))
			if err := os.MkdirAll(filepath.Dir(c.Listen.Path), 0o700); err != nil {
				t.Fatal(err)
			}
			l, err := net.ListenUnix("unix", &net.UnixAddr{Name: c.Listen.Path, Net: "unix"})
			if err != nil {
				t.Fatal(err)
			}
			defer l.Close()
			f, err := l.File()
			if err != nil {
				t.Fatal(err)
			}
			defer f.Close()
			// kubelet calls before anybody serves, and is not refused.
			kubelet := runtimeapi.NewRuntimeServiceClient(dial(t, c.Listen.Path))
			for range 2 { // and again after a restart
				cmd, stderr := startProcess(t, c, []string{name})
				cmd.ExtraFiles = []*os.File{f}
				if err := cmd.Start(); err != nil {
					t.Fatal(err)
				}
				awaitRuntime(t, kubelet)
				if err := cmd.Process.Signal(unix.SIGTERM); err != nil {
					t.Fatal(err)
				}
				if err := cmd.Wait(); err != nil {
					t.Fatalf("%v\n%s", err, stderr)
				}
				if _, err := os.Lstat(c.Listen.Path); err != nil {
					t.Fatalf("systemd's socket is gone: %v", err)
				}
			}
		})
	}
	t.Run("unknown name", func(t *testing.T) {
		c := newConfig(t)
		l, err := net.ListenUnix("unix", &net.UnixAddr{Name: filepath.Join(filepath.Dir(c.StateDir), "x.sock"),
			Net: "unix"})
		if err != nil {
			t.Fatal(err)
		}
		defer l.Close()
		f, err := l.File()
		if err != nil {
			t.Fatal(err)
		}
		defer f.Close()
		cmd, stderr := startProcess(t, c, []string{"kri"})
		cmd.ExtraFiles = []*os.File{f}
		if err := cmd.Run(); err == nil ||
			!strings.Contains(stderr.String(), "unknown names: kri; FileDescriptorName= must be cri") {
			t.Fatalf("%v\n%s", err, stderr)
		}
	})
}

func TestLogFormats(t *testing.T) {
	for format, want := range map[string]string{"json": `"msg":"hello"`, "text": "msg=hello"} {
		var b strings.Builder
		log, err := NewLogger(config.Log{Level: "warning", Format: format}, &b)
		if err != nil {
			t.Fatal(err)
		}
		log.Info("quiet")
		log.Warn("hello")
		if !strings.Contains(b.String(), want) || strings.Contains(b.String(), "quiet") {
			t.Errorf("%s: %s", format, &b)
		}
	}
	if _, err := NewLogger(config.Log{Level: "x"}, io.Discard); err == nil {
		t.Error("unknown level accepted")
	}
}
