// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package doctor_test

import (
	"bufio"
	"cmp"
	"context"
	"crypto/x509"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/sirupsen/logrus"
	"go.uber.org/goleak"
	"golang.org/x/sys/unix"
	"google.golang.org/grpc"
	"google.golang.org/protobuf/types/known/timestamppb"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	opsv1 "github.com/cri-proxy/cri-proxy/api/ops/v1"
	"github.com/cri-proxy/cri-proxy/interceptors/view"
	"github.com/cri-proxy/cri-proxy/internal/config"
	"github.com/cri-proxy/cri-proxy/internal/daemon"
	"github.com/cri-proxy/cri-proxy/internal/mtls/mtlstest"
	"github.com/cri-proxy/cri-proxy/systemd/node/bypass"
	"github.com/cri-proxy/cri-proxy/systemd/node/doctor"
)

// asKubelet names the socket that a process named kubelet is to dial.
const asKubelet = "CRI_PROXY_TEST_KUBELET_DIALS"

func TestMain(m *testing.M) {
	if len(os.Args) == 2 && os.Args[1] == "--version" { // what doctor asks of the program of a kubelet
		fmt.Println("Kubernetes v1.37.2")
		os.Exit(0)
	}
	if socket := os.Getenv(asKubelet); socket != "" {
		if err := kubelet(socket); err != nil {
			fmt.Println(err)
			os.Exit(1)
		}
		os.Exit(0)
	}
	goleak.VerifyTestMain(m)
}

// kubelet makes one call and keeps the connection until its standard input ends.
func kubelet(socket string) error {
	conn, err := bypass.Dial(socket)
	if err != nil {
		return err
	}
	defer conn.Close()
	if _, err := runtimeapi.NewRuntimeServiceClient(conn).Version(context.Background(), &runtimeapi.VersionRequest{},
		grpc.WaitForReady(true)); err != nil {
		return err
	}
	fmt.Println("connected")
	_, err = io.Copy(io.Discard, os.Stdin)
	return err
}

// deadline bounds what must happen soon.
const deadline = 2 * time.Minute

// runtime stands in for containerd.
type runtime struct {
	runtimeapi.UnimplementedRuntimeServiceServer
	runtimeapi.UnimplementedImageServiceServer
	noNetwork bool
	name      string // empty: stand-in
	images    string

	mu         sync.Mutex // guards containers, which the daemon asks for, too
	containers []*runtimeapi.Container
	sandboxes  []*runtimeapi.PodSandbox
}

func (r *runtime) Version(context.Context, *runtimeapi.VersionRequest) (*runtimeapi.VersionResponse, error) {
	return &runtimeapi.VersionResponse{RuntimeName: cmp.Or(r.name, "stand-in"), RuntimeVersion: "v9"}, nil
}

func (r *runtime) Status(context.Context, *runtimeapi.StatusRequest) (*runtimeapi.StatusResponse, error) {
	return &runtimeapi.StatusResponse{Status: &runtimeapi.RuntimeStatus{Conditions: []*runtimeapi.RuntimeCondition{
		{Type: "RuntimeReady", Status: true},
		{Type: "NetworkReady", Status: !r.noNetwork, Reason: "NetworkPluginNotReady", Message: "no CNI"},
	}}}, nil
}

func (r *runtime) ListContainers(
	context.Context, *runtimeapi.ListContainersRequest,
) (*runtimeapi.ListContainersResponse, error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	return &runtimeapi.ListContainersResponse{Containers: r.containers}, nil
}

func (r *runtime) ListPodSandbox(
	context.Context, *runtimeapi.ListPodSandboxRequest,
) (*runtimeapi.ListPodSandboxResponse, error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	return &runtimeapi.ListPodSandboxResponse{Items: r.sandboxes}, nil
}

func (r *runtime) ImageFsInfo(
	context.Context, *runtimeapi.ImageFsInfoRequest,
) (*runtimeapi.ImageFsInfoResponse, error) {
	return &runtimeapi.ImageFsInfoResponse{
		ImageFilesystems: []*runtimeapi.FilesystemUsage{
			{FsId: &runtimeapi.FilesystemIdentifier{Mountpoint: r.images}}}}, nil
}

// node is one in a directory, which a test makes wrong somewhere.
type node struct {
	t       *testing.T
	dir     string
	file    string // the configuration
	config  *config.Config
	runtime *runtime
	// up is what start has started, newest last.
	up []func()
}

func newNode(t *testing.T) *node {
	t.Helper()
	// Not t.TempDir: its names are longer than a socket path may be.
	dir, err := os.MkdirTemp("", "doctor")
	if err != nil {
		t.Fatal(err)
	}
	n := &node{t: t, dir: dir, file: filepath.Join(dir, "config.yaml"), runtime: &runtime{images: dir}}
	t.Cleanup(func() {
		for i := len(n.up) - 1; i >= 0; i-- {
			n.up[i]()
		}
		os.RemoveAll(dir)
	})
	n.configure("")
	n.do(os.MkdirAll(filepath.Dir(n.config.Listen.Path), 0o711))
	n.do(os.Symlink(n.config.Listen.Path, n.link()))
	return n
}

func (n *node) do(err error) {
	n.t.Helper()
	if err != nil {
		n.t.Fatal(err)
	}
}

func (n *node) path(name string) string { return filepath.Join(n.dir, name) }
func (n *node) link() string            { return n.path("run/kubelet.sock") }

// configure writes the file, with more in it.
func (n *node) configure(more string) {
	n.t.Helper()
	text := fmt.Sprintf("nodeName: node\nlisten: {path: %s}\nadminSocket: %s\nstateDir: %s\nruntimeEndpoint: "+
		"%s\ndrainTimeout: 1s\n%s",
		n.path("run/cri.sock"), n.path("run/admin.sock"), n.path("state"), n.path("rt.sock"), more)
	if !strings.Contains(more, "images:") {
		text += "images: {maxDiskPercent: 0}\n" // whatever the disk of this machine
	}
	n.do(os.WriteFile(n.file, []byte(text), 0o600))
	n.config = config.Default()
	n.do(n.config.Load(n.file, nil))
	n.do(n.config.Complete())
}

func (n *node) startRuntime() {
	n.t.Helper()
	l, err := net.Listen("unix", n.path("rt.sock"))
	n.do(err)
	s := grpc.NewServer()
	runtimeapi.RegisterRuntimeServiceServer(s, n.runtime)
	runtimeapi.RegisterImageServiceServer(s, n.runtime)
	var owned sync.WaitGroup
	owned.Go(func() { _ = s.Serve(l) })
	n.up = append(n.up, func() {
		s.Stop()
		owned.Wait()
	})
}

// startDaemon starts the real one and waits until it answers.
func (n *node) startDaemon() {
	n.t.Helper()
	log := logrus.New()
	log.SetOutput(io.Discard)
	ctx, stop := context.WithCancel(context.Background())
	ended := make(chan error, 1)
	go func() { ended <- daemon.Run(ctx, context.Background(), n.config, log) }()
	n.up = append(n.up, func() {
		stop()
		if err := <-ended; err != nil {
			n.t.Error(err)
		}
	})
	for until := time.Now().Add(deadline); ; time.Sleep(5 * time.Millisecond) {
		select {
		case err := <-ended:
			ended <- nil
			n.t.Fatal(err)
		default:
		}
		findings := doctor.Examine(n.t.Context(), doctor.Options{ConfigFile: n.file, Now: time.Now})
		ready := false
		for _, f := range findings {
			ready = ready || f.Check == "daemon" && f.Status == doctor.OK
		}
		for _, f := range findings {
			ready = ready && !strings.Contains(f.Detail, "the daemon is not connected")
		}
		if ready {
			return
		}
		if time.Now().After(until) {
			n.t.Fatalf("the daemon does not come: %v", findings)
		}
	}
}

// startKubelet starts a process of that name with these arguments, connected to a socket.
func (n *node) startKubelet(dials string, args ...string) {
	n.t.Helper()
	exe, err := os.Executable()
	n.do(err)
	name := n.path("kubelet")
	if _, err := os.Lstat(name); err != nil {
		n.do(os.Symlink(exe, name))
	}
	cmd := exec.Command(name, args...)
	cmd.Env = append(os.Environ(), asKubelet+"="+dials, "GORACE=atexit_sleep_ms=0")
	in, err := cmd.StdinPipe()
	n.do(err)
	out, err := cmd.StdoutPipe()
	n.do(err)
	n.do(cmd.Start())
	n.up = append(n.up, func() {
		in.Close()
		_ = cmd.Wait()
	})
	line, err := bufio.NewReader(out).ReadString('\n')
	if err != nil || line != "connected\n" {
		n.t.Fatalf("kubelet says %q, %v", line, err)
	}
}

// whole is a node with nothing wrong.
func (n *node) whole() {
	n.t.Helper()
	n.startRuntime()
	n.startDaemon()
	n.startKubelet(n.link(), "--container-runtime-endpoint=unix://"+n.link())
}

// elsewhere are findings about the machine that the tests run on, not the node.
var elsewhere = map[string]bool{"clock": true, "restarts": true, "units": true}

// wrong returns what is not as it should be, one "STATUS check: detail" a line.
func (n *node) wrong() []string {
	n.t.Helper()
	var all []string
	for _, f := range doctor.Examine(n.t.Context(), doctor.Options{ConfigFile: n.file, Now: time.Now}) {
		if f.Status != doctor.OK && !elsewhere[f.Check] {
			all = append(all, fmt.Sprintf("%s %s: %s", f.Status, f.Check, f.Detail))
		}
	}
	return all
}

func (n *node) files(cert, key, ca string) {
	n.configure(
		fmt.Sprintf("ops: {address: \"127.0.0.1:0\", certFile: %s, keyFile: %s, clientCAFile: %s, allowedClients: "+
			"[c]}\n", cert, key, ca))
}

func TestDoctor(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("who is connected to a socket is for root to see")
	}
	named := x509.Certificate{DNSNames: []string{"node"}, NotAfter: time.Now().Add(1000 * time.Hour)}
	for _, tt := range []struct {
		name string
		make func(n *node)
		want []string // what is wrong, each a part of a line
	}{
		{name: "nothing wrong", make: (*node).whole},
		{name: "the daemon is down", make: func(n *node) {
			n.startRuntime()
			n.startKubelet(n.path("rt.sock"), "--container-runtime-endpoint", "unix://"+n.link())
		}, want: []string{"fail daemon: cri-proxy does not answer", "fail sockets: stat", "fail sockets: stat",
			"fail kubelet: kubelet (pid", "fail state: stat"}},
		{name: "OpenKruise's daemon runs beside it", make: func(n *node) {
			n.runtime.sandboxes = []*runtimeapi.PodSandbox{
				{Metadata: &runtimeapi.PodSandboxMetadata{Namespace: "kruise-system",
					Name: "kruise-controller-manager-x"}},
				{Metadata: &runtimeapi.PodSandboxMetadata{Namespace: "kruise-system", Name: "kruise-daemon-x7"}},
			}
			n.whole()
		}, want: []string{"warn OpenKruise: its daemon runs here (kruise-system/kruise-daemon-x7)"}},
		{name: "no configuration", make: func(n *node) { n.whole(); n.file = n.path("other.yaml") },
			want: []string{"warn config: " + "/"}},
		{name: "configuration cannot be read", make: func(n *node) {
			n.whole()
			n.do(os.WriteFile(n.file, []byte("listn: {}\n"), 0o600))
		}, want: []string{`fail config: `}},
		{name: "configuration has changed", make: func(n *node) { n.whole(); n.configure("# later\n") },
			want: []string{"has changed since the daemon has read it"}},
		{name: "no symlink", make: func(n *node) {
			n.do(os.Remove(n.link()))
			n.startRuntime()
			n.startDaemon()
			n.startKubelet(n.config.Listen.Path, "--container-runtime-endpoint=unix://"+n.config.Listen.Path)
		}, want: []string{"warn bypass: ", "warn kubelet: kubelet (pid"}},
		{name: "the symlink leads nowhere", make: func(n *node) {
			n.whole()
			n.do(os.Remove(n.link()))
			n.do(os.Symlink("/nowhere", n.link()))
		}, want: []string{"fail bypass: "}},
		{name: "the symlink leads past, and nobody has asked for it", make: func(n *node) {
			n.whole()
			n.do(os.Remove(n.link()))
			n.do(os.Symlink(n.path("rt.sock"), n.link()))
		}, want: []string{"fail bypass: ", "warn kubelet: kubelet (pid"}},
		{name: "bypassed", make: func(n *node) {
			n.startRuntime()
			n.startDaemon()
			n.do(os.WriteFile(n.path("state/bypass"), []byte(`{"since":"2026-01-02T03:04:05Z","reason":"a test"}`),
				0o600))
			n.do(os.Remove(n.link()))
			n.do(os.Symlink(n.path("rt.sock"), n.link()))
			n.startKubelet(n.link(), "--container-runtime-endpoint=unix://"+n.link())
		}, want: []string{"warn bypass: on, since"}},
		{name: "a bypass that was asked for and not carried out", make: func(n *node) {
			n.whole()
			n.do(os.WriteFile(n.path("state/bypass"), []byte(`{"since":"2026-01-02T03:04:05Z","reason":"a test"}`),
				0o600))
		}, want: []string{"fail bypass: asked for since"}},
		{name: "crashes",
			make: func(n *node) { n.whole(); n.do(os.WriteFile(n.path("run/crashes"), []byte("12\n15\n"), 0o600)) },
			want: []string{"warn bypass: cri-proxy has ended 2 times"}},
		{name: "sockets are open to all", make: func(n *node) {
			n.whole()
			n.do(os.Chmod(n.config.Listen.Path, 0o666))
			n.do(os.Chmod(n.config.AdminSocket, 0o640))
		}, want: []string{"has mode 0666: every user", "has mode 0640, the configuration says 0600"}},
		{name: "kubelet talks to the runtime", make: func(n *node) {
			n.startRuntime()
			n.startDaemon()
			n.startKubelet(n.path("rt.sock"), "--container-runtime-endpoint=unix://"+n.path("rt.sock"))
		}, want: []string{"past cri-proxy", "and not to cri-proxy", "no call from kubelet yet"}},
		{name: "kubelet has kept its connection to the runtime", make: func(n *node) {
			n.startRuntime()
			n.startDaemon()
			n.startKubelet(n.path("rt.sock"), "--container-runtime-endpoint=unix://"+n.link())
		}, want: []string{"and not to cri-proxy", "no call from kubelet yet"}},
		{name: "kubelet's file and drop-ins", make: func(n *node) {
			n.startRuntime()
			n.startDaemon()
			n.do(os.MkdirAll(n.path("kubelet.conf.d"), 0o755))
			n.do(os.WriteFile(n.path("kubelet.yaml"),
				[]byte("kind: KubeletConfiguration\ncontainerRuntimeEndpoint: unix://"+n.path("rt.sock")+"\n"), 0o600))
			n.do(os.WriteFile(n.path("kubelet.conf.d/10.conf"),
				[]byte("containerRuntimeEndpoint: "+n.link()+"\nimageServiceEndpoint: unix://"+n.path("rt.sock")+"\n"),
				0o600))
			n.startKubelet(n.link(), "--config="+n.path("kubelet.yaml"), "--config-dir", n.path("kubelet.conf.d"))
		}, want: []string{"another endpoint for images",
			"warn images: imagePullCredentialsVerificationPolicy is NeverVerifyPreloadedImages, and kubelet asks for " +
				"images elsewhere"}},
		{name: "private images for every pod",
			make: func(n *node) { n.configure("images: {maxDiskPercent: 0, verifyAccess: false}\n"); n.whole() },
			want: []string{"warn images: imagePullCredentialsVerificationPolicy is NeverVerifyPreloadedImages, and " +
				"images.verifyAccess is false: images that were pre-pulled with secrets may be run by " +
				"every pod"}},
		{name: "private images that kubelet verifies in any case", make: func(n *node) {
			n.configure("images: {maxDiskPercent: 0, verifyAccess: false}\n")
			n.startRuntime()
			n.startDaemon()
			n.do(os.WriteFile(n.path("kubelet.yaml"),
				[]byte("kind: KubeletConfiguration\nimagePullCredentialsVerificationPolicy: "+
					"AlwaysVerify\ncontainerRuntimeEndpoint: "+n.link()+"\n"), 0o600))
			n.startKubelet(n.link(), "--config="+n.path("kubelet.yaml"))
		}},
		{name: "no kubelet", make: func(n *node) { n.startRuntime(); n.startDaemon() },
			want: []string{"fail kubelet: no kubelet runs here", "no call from kubelet yet"}},
		{name: "the runtime is down", make: func(n *node) { n.startDaemon() },
			want: []string{"fail kubelet: no kubelet runs here", "no call from kubelet yet", "fail runtime: "}},
		{name: "the runtime is not ready", make: func(n *node) { n.runtime.noNetwork = true; n.whole() },
			want: []string{"warn runtime: NetworkReady is not so: NetworkPluginNotReady no CNI"}},
		{name: "containerd's settings of registries are not known",
			make: func(n *node) { n.runtime.name = "containerd"; n.whole() },
			want: []string{"warn registries: how containerd reaches them is not known, so speed limits may not be " +
				"kept: "}},
		{name: "a staged container is left", make: func(n *node) {
			n.whole()
			n.runtime.mu.Lock()
			defer n.runtime.mu.Unlock()
			n.runtime.containers = []*runtimeapi.Container{{
				Id: "0123456789abcdef", Annotations: map[string]string{view.StagedAnnotation: "t"},
				Labels: map[string]string{"io.kubernetes.container.name": "app", "io.kubernetes.pod.namespace": "ns",
					"io.kubernetes.pod.name": "pod", "io.kubernetes.pod.uid": "u"},
			}}
		}, want: []string{"warn containers: made by an operation and not started, though no operation is under way: " +
			"0123456789abc (app of ns/pod)"}},
		{name: "the disk is too full for pulls",
			make: func(n *node) { n.configure("images: {maxDiskPercent: 0.0001}\n"); n.whole() },
			want: []string{"warn images: "}},
		{name: "pulls are refused where kubelet does not make room yet", make: func(n *node) {
			n.configure("images: {maxDiskPercent: 98.5}\n")
			n.startRuntime()
			n.startDaemon()
			n.do(os.WriteFile(n.path("kubelet.yaml"),
				[]byte("kind: KubeletConfiguration\nimageGCHighThresholdPercent: 99\ncontainerRuntimeEndpoint: "+
					""+n.link()+"\n"), 0o600))
			n.startKubelet(n.link(), "--config="+n.path("kubelet.yaml"))
		}, want: []string{"pre-pulls are refused from 98.5 % on, and kubelet makes room only from 99 % on"}},
		{name: "the state directory is open", make: func(n *node) { n.whole(); n.do(os.Chmod(n.path("state"), 0o755)) },
			want: []string{"has mode 0755: it holds the environment"}},
		{name: "the state directory is full", make: func(n *node) {
			n.do(os.MkdirAll(n.path("state"), 0o700))
			n.do(unix.Mount("tmpfs", n.path("state"), "tmpfs", 0, "size=64k,mode=0700"))
			n.up = append(n.up, func() { _ = unix.Unmount(n.path("state"), unix.MNT_DETACH) })
			if err := os.WriteFile(n.path("state/full"), make([]byte, 128<<10), 0o600); !errors.Is(err, unix.ENOSPC) {
				n.t.Fatal(err)
			}
			n.startRuntime()
		}, want: []string{"fail daemon: ", "fail sockets: ", "fail sockets: ", "fail kubelet: ",
			"no space left on device"}},
		{name: "a good certificate", make: func(n *node) {
			ca := mtlstest.NewCA(n.t, "ca")
			cert, key := ca.Issue(n.dir, "node", named)
			n.files(cert, key, ca.File)
			n.whole()
		}},
		{name: "a certificate that has ended", make: func(n *node) {
			ca := mtlstest.NewCA(n.t, "ca")
			ended := named
			ended.NotBefore, ended.NotAfter = time.Now().Add(-2*time.Hour), time.Now().Add(-time.Hour)
			cert, key := ca.Issue(n.dir, "node", ended)
			n.files(cert, key, ca.File)
			n.whole()
		}, want: []string{"fail certificate: it ended 1h"}},
		{name: "a certificate that ends soon and is of another node", make: func(n *node) {
			ca := mtlstest.NewCA(n.t, "ca")
			cert, key := ca.Issue(n.dir, "node", x509.Certificate{
				DNSNames: []string{"other"}, NotBefore: time.Now().Add(-3 * time.Hour), NotAfter: time.Now().
						Add(time.Hour),
			})
			n.files(cert, key, ca.File)
			n.whole()
		}, want: []string{"warn certificate: it ends in ", "fail certificate: "}},
		{name: "a certificate of the future", make: func(n *node) {
			ca := mtlstest.NewCA(n.t, "ca")
			later := named
			later.NotBefore, later.NotAfter = time.Now().Add(time.Hour), time.Now().Add(1000*time.Hour)
			cert, key := ca.Issue(n.dir, "node", later)
			n.files(cert, key, ca.File)
			n.whole()
		}, want: []string{"fail certificate: "}},
		{name: "a key of another certificate and a CA that is none", make: func(n *node) {
			ca := mtlstest.NewCA(n.t, "ca")
			cert, key := ca.Issue(n.dir, "node", named)
			n.files(cert, key, ca.File)
			n.whole()
			_, other := ca.Issue(n.dir, "other", named)
			n.do(os.Rename(other, key))
		}, want: []string{"fail certificate: "}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			n := newNode(t)
			tt.make(n)
			got := n.wrong()
			if tt.name == "no configuration" { // all else is about the defaults
				got = got[:1]
			}
			if tt.name == "configuration cannot be read" {
				got = got[:1]
			}
			if len(got) != len(tt.want) {
				t.Fatalf("wrong is\n%s\nwant %q", strings.Join(got, "\n"), tt.want)
			}
			for i, want := range tt.want {
				if !strings.Contains(got[i], want) {
					t.Errorf("%q, want %q in it", got[i], want)
				}
			}
		})
	}
}

// about returns what is found of one check, one "STATUS DETAIL (HINT)" a line.
func (n *node) about(check string, o doctor.Options) string {
	n.t.Helper()
	o.ConfigFile = n.file
	if o.Now == nil {
		o.Now = time.Now
	}
	var all []string
	for _, f := range doctor.Examine(n.t.Context(), o) {
		if f.Check == check {
			all = append(all, fmt.Sprintf("%s %s (%s)", f.Status, f.Detail, f.Hint))
		}
	}
	return strings.Join(all, "\n")
}

// The kubelet of this test says that it is 1.37.2. What a runtime is built of is looked at by
// test/deploy.
func TestNewerCRI(t *testing.T) {
	if os.Getuid() != 0 {
		t.Skip("whose program a process is is for root to see")
	}
	n := newNode(t)
	n.whole()
	got := n.about("cri", doctor.Options{CRI: "v0.37.0"})
	if !strings.HasPrefix(got, "ok kubelet (pid ") || strings.Contains(got, "\n") ||
		!strings.Contains(got, " v1.37.2, cri-proxy that of Kubernetes 1.37 ") {
		t.Errorf("%s", got)
	}
	got = n.about("cri", doctor.Options{CRI: "v0.36.4"})
	if !strings.HasPrefix(got, "warn kubelet (pid ") ||
		!strings.Contains(got, " v1.37.2: newer than the CRI of Kubernetes 1.36") {
		t.Errorf("%s", got)
	}
	conn, err := bypass.Dial(n.config.Listen.Path)
	n.do(err)
	defer conn.Close()
	const unknown = "runtime.v1.RuntimeService/ListPods"
	_ = conn.Invoke(t.Context(), "/"+unknown, &runtimeapi.VersionRequest{}, &runtimeapi.VersionResponse{})
	if got := n.about("cri", doctor.Options{}); !strings.Contains(got, "warn ") ||
		!strings.Contains(got, unknown+" (upgrade cri-proxy") {
		t.Errorf("%s", got)
	}
}

// told is a daemon that says of its certificate what it is told to.
type told struct {
	opsv1.UnimplementedOpsServer
	identity *opsv1.Identity
}

func (d *told) NodeInfo(context.Context, *opsv1.NodeInfoRequest) (*opsv1.NodeInfoResponse, error) {
	return &opsv1.NodeInfoResponse{NodeName: "node", Identity: d.identity}, nil
}

func TestEnrolledCertificate(t *testing.T) {
	now := time.Now()
	in := func(d time.Duration) *timestamppb.Timestamp { return timestamppb.New(now.Add(d)) }
	for _, tt := range []struct {
		name     string
		identity *opsv1.Identity
		want     string // beginning
		advice   bool
	}{
		{"a minute old", &opsv1.Identity{
			ExpireTime: in(72*time.Hour - time.Minute), RenewTime: in(50 * time.Hour),
		}, "ok until ", false},
		{"is being renewed", &opsv1.Identity{
			ExpireTime: in(20 * time.Hour), RenewTime: in(-time.Minute),
		}, "ok until ", false},
		{"renewal is overdue", &opsv1.Identity{
			ExpireTime: in(19 * time.Hour), RenewTime: in(-time.Hour),
		}, "warn it was to be renewed at ", true},
		{"renewal fails", &opsv1.Identity{
			ExpireTime: in(19 * time.Hour), RenewTime: in(-time.Minute), Problem: "nobody signs",
			Since: in(-time.Minute),
		}, "warn it serves until ", true},
		{"renewal has failed", &opsv1.Identity{
			ExpireTime: in(-time.Hour), RenewTime: in(-20 * time.Hour), Problem: "nobody signs",
			Since: in(-20 * time.Hour),
		}, "fail it ended 1h0m0s ago", true},
		{"none yet", &opsv1.Identity{Problem: "nobody signs", Since: in(-time.Minute)}, "fail there is none yet", true},
	} {
		t.Run(tt.name, func(t *testing.T) {
			n := newNode(t)
			n.configure(fmt.Sprintf("ops: {address: \"127.0.0.1:0\", enrol: {kubeconfig: %s}}\n", n.path("kubeconfig")))
			l, err := net.Listen("unix", n.config.AdminSocket)
			n.do(err)
			s := grpc.NewServer()
			opsv1.RegisterOpsServer(s, &told{identity: tt.identity})
			var owned sync.WaitGroup
			owned.Go(func() { _ = s.Serve(l) })
			defer owned.Wait()
			defer s.Stop()
			got := n.about("certificate", doctor.Options{Now: func() time.Time { return now }})
			if !strings.HasPrefix(got, tt.want) || strings.Contains(got, "\n") {
				t.Errorf("%s", got)
			}
			if strings.Contains(got, "is cri-controller running") != tt.advice || strings.Contains(got, "file") {
				t.Errorf("the advice does not fit: %s", got)
			}
			if p := tt.identity.GetProblem(); !strings.Contains(got, p) {
				t.Errorf("%q is not in it: %s", p, got)
			}
		})
	}
}

// Whoever renews certificates in files at two thirds of their life is not warned of all days
// before.
func TestShortLivedCertificateInFiles(t *testing.T) {
	for left, want := range map[time.Duration]string{71 * time.Hour: "ok until ", 20 * time.Hour: "warn it ends in "} {
		n := newNode(t)
		ca := mtlstest.NewCA(t, "ca")
		cert, key := ca.Issue(n.dir, "node", x509.Certificate{
			DNSNames: []string{"node"}, NotBefore: time.Now().Add(left - 72*time.Hour), NotAfter: time.Now().Add(left),
		})
		n.files(cert, key, ca.File)
		got := n.about("certificate", doctor.Options{})
		if !strings.HasPrefix(got, want) || strings.Contains(got, "controller running") {
			t.Errorf("%s before its end: %s", left, got)
		}
	}
}
