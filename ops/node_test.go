// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package ops_test

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/sirupsen/logrus"
	bolt "go.etcd.io/bbolt"
	"go.opentelemetry.io/otel/trace"
	"go.uber.org/goleak"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/metadata"
	"google.golang.org/protobuf/proto"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	opsv1 "github.com/cri-proxy/cri-proxy/api/ops/v1"
	"github.com/cri-proxy/cri-proxy/interceptors"
	"github.com/cri-proxy/cri-proxy/interceptors/view"
	"github.com/cri-proxy/cri-proxy/ops"
	"github.com/cri-proxy/cri-proxy/ops/criclone"
	"github.com/cri-proxy/cri-proxy/ops/store"
	"github.com/cri-proxy/cri-proxy/ops/swap"
	"github.com/cri-proxy/cri-proxy/ops/switchover"
	"github.com/cri-proxy/cri-proxy/proxy"
	"github.com/cri-proxy/cri-proxy/test/fakenode"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// waitLong bounds every wait of a test; reaching it is a failure.
const waitLong = 2 * time.Minute

const podUID = "11111111-2222-3333-4444-555555555555"

func podRef() *opsv1.PodRef { return &opsv1.PodRef{Namespace: "default", Name: "shop", Uid: podUID} }

// engine is an engine with what it works on.
type engine struct {
	*ops.Engine
	node *swap.Node
	disk *store.Store
}

// open is [ops.Open].
func open(o ops.Options) (*engine, error) {
	node, disk, err := ops.OpenNode(o)
	if err != nil {
		return nil, err
	}
	e, err := ops.New(node, disk, o)
	if err != nil {
		return nil, err
	}
	return &engine{Engine: e, node: node, disk: disk}, nil
}

// daemon is one run of cri-proxy on the node: the engine behind a real proxy that kubelet calls.
type daemon struct {
	view    *view.View
	engine  *engine
	api     *ops.Server
	kubelet runtimeapi.RuntimeServiceClient
	leash   *leash
	server  *proxy.Server
	log     *signals

	stop func() // ends Run
	ran  sync.WaitGroup

	mu      sync.Mutex         // guards watches
	watches []*switchover.Exit // all that the engine has made
}

// node is a node with one pod: containers app and web, made by kubelet through the proxy.
type node struct {
	t     testing.TB
	dir   string
	state string // the state directory of the current daemon
	rt    *fakenode.Runtime

	*daemon
	daemons []*daemon
	sandbox string
	pod     podOptions
	room    *fakeRoom // nil: the processes' own cgroups, which are none of a pod
}

// podOptions are what a test wants different about the pod.
type podOptions struct {
	annotations map[string]string // of app
	mounts      []*runtimeapi.Mount
	hidden      bool   // app is made behind the proxy's back, as before its installation
	processes   bool   // the containers have real ones
	method      string // the best that is allowed
	metrics     prometheus.Registerer
	tracer      trace.Tracer
	room        *fakeRoom // of the pod
}

func newNode(t testing.TB, o podOptions) *node {
	t.Helper()
	n := &node{t: t, dir: t.TempDir(), rt: fakenode.New(), pod: o, room: o.room}
	if o.processes {
		fakenode.NewProcesses(t, n.rt, n.dir)
	}
	n.rt.Serve(t, n.socket())
	n.state = filepath.Join(n.dir, "state")
	if err := os.Mkdir(n.state, 0o700); err != nil {
		t.Fatal(err)
	}
	n.boot(n.state)
	n.makePod(o)
	if o.processes {
		n.awaitLiving("app/0, web/0") // a start does not wait until the application is there
	}
	n.rt.TakeCalls()
	return n
}

func (n *node) socket() string { return filepath.Join(n.dir, "r.sock") }

// boot starts a daemon on a state directory, without Run.
func (n *node) boot(state string) {
	n.t.Helper()
	t := n.t
	log := logrus.New()
	log.SetOutput(io.Discard)
	if os.Getenv("OPS_TEST_LOG") != "" {
		log.SetOutput(os.Stderr)
	}
	log.SetLevel(logrus.DebugLevel)
	d := &daemon{view: view.New(), log: &signals{}}
	log.AddHook(d.log)

	up, err := proxy.NewUpstream(n.socket(), proxy.UpstreamOptions{})
	if err != nil {
		t.Fatal(err)
	}
	d.leash = &leash{ClientConnInterface: up.Conn()}
	d.engine, err = open(ops.Options{StateDir: state, Conn: d.leash, View: d.view, Log: log,
		LegacyLogDir: filepath.Join(n.dir, "links"), Method: n.pod.method, Registerer: n.pod.metrics,
		Tracer: n.pod.tracer})
	if err != nil {
		t.Fatal(err)
	}
	if n.rt.Processes != nil {
		d.engine.node.Switchover.OfContainer, d.engine.node.Switchover.Watch = n.rt.Owned, d.watch(n.rt)
	}
	if n.room != nil {
		d.engine.node.Switchover.FindPod = n.room.find
	}
	d.engine.node.LateCreate = time.Hour // tests count calls
	d.engine.node.Switchover.GateTimeout = waitLong
	unsynced(d.engine.disk.Journal) // no power is cut here; copies of the file are made by this process
	d.api = ops.NewServer(d.engine.Engine,
		func(context.Context) *opsv1.NodeInfoResponse { return &opsv1.NodeInfoResponse{} })
	d.server = proxy.NewServer(up,
		proxy.Options{
			Director: interceptors.New(interceptors.Options{View: d.view, Records: d.engine.Records(),
				Runtime: up.Conn(), Log: log, Judge: d.engine, Overrides: d.engine.Overrides(), Pods: d.engine,
				Successors: d.engine})})
	path := filepath.Join(n.dir, fmt.Sprintf("p%d.sock", len(n.daemons)))
	l, err := proxy.Listen(path, proxy.ListenOptions{Mode: 0o600})
	if err != nil {
		t.Fatal(err)
	}
	var served sync.WaitGroup
	served.Go(func() {
		if err := d.server.Serve(l); err != nil {
			t.Error(err)
		}
	})
	conn, err := grpc.NewClient("unix://"+path, grpc.WithTransportCredentials(insecure.NewCredentials()),
		grpc.WithUnaryInterceptor(
			func(ctx context.Context, method string, req, reply any, cc *grpc.ClientConn, invoke grpc.UnaryInvoker,
				opts ...grpc.CallOption) error {
				ctx = metadata.AppendToOutgoingContext(ctx, "caller", "kubelet")
				return invoke(ctx, method, req, reply, cc, opts...)
			}))
	if err != nil {
		t.Fatal(err)
	}
	d.kubelet = runtimeapi.NewRuntimeServiceClient(conn)
	d.stop = func() {}
	n.daemon = d
	n.daemons = append(n.daemons, d)
	t.Cleanup(func() {
		d.stop()
		d.leash.free()
		d.ran.Wait()
		if err := conn.Close(); err != nil {
			t.Error(err)
		}
		d.server.Stop()
		served.Wait()
		if err := d.engine.Close(); err != nil {
			t.Error(err)
		}
		if err := up.Close(); err != nil {
			t.Error(err)
		}
	})
}

// watch watches processes of the runtime's containers.
func (d *daemon) watch(f *fakenode.Runtime) func(int, string) (*switchover.Exit, error) {
	return func(pid int, container string) (*switchover.Exit, error) {
		if err := f.Owned(pid, container); err != nil {
			return nil, err
		}
		w, err := switchover.WatchProcess(pid)
		if err != nil {
			return nil, err // it has ended meanwhile
		}
		d.mu.Lock()
		defer d.mu.Unlock()
		d.watches = append(d.watches, w)
		return w, nil
	}
}

// crash makes the current daemon one that is gone: nothing that it asks for happens any more, and
// nothing is told to it. It returns the state directory as that leaves it.
func (n *node) crash() string {
	n.leash.cut()
	n.mu.Lock()
	for _, w := range n.watches {
		w.Close() // nobody is told of its end then
	}
	n.mu.Unlock()
	state := n.copyState()
	if err := os.Rename(filepath.Join(n.state, "gates"), filepath.Join(state, "gates")); err != nil &&
		!errors.Is(err, fs.ErrNotExist) {
		n.t.Error(err)
	}
	n.stop()
	return state
}

// run starts the current daemon's Run; it ends with the test at the latest.
func (n *node) run() {
	d := n.daemon
	ctx, cancel := context.WithCancel(context.Background())
	d.stop = cancel
	d.ran.Go(func() {
		if err := d.engine.Run(ctx); err != nil {
			n.t.Error(err)
		}
	})
}

// runTidied is run, and waits until the calls of the start are over.
func (n *node) runTidied() {
	n.t.Helper()
	tidied := make(chan struct{})
	is := sync.OnceFunc(func() { close(tidied) })
	n.rt.Set(func(f *fakenode.Runtime) {
		f.After = func(call string) error {
			if call == "ListContainers" {
				is()
			}
			return nil
		}
	})
	n.run()
	select {
	case <-tidied:
	case <-time.After(waitLong):
		n.t.Fatal("records are not tidied")
	}
	n.rt.Set(func(f *fakenode.Runtime) { f.After = nil })
}

func (n *node) sandboxConfig() *runtimeapi.PodSandboxConfig {
	return &runtimeapi.PodSandboxConfig{
		Metadata:     &runtimeapi.PodSandboxMetadata{Name: "shop", Namespace: "default", Uid: podUID},
		LogDirectory: "/var/log/pods/shop",
		Labels: map[string]string{criclone.LabelPodName: "shop", criclone.LabelPodNamespace: "default",
			criclone.LabelPodUID: podUID},
	}
}

// terminationDir is where kubelet makes the termination message files of a container. It is made.
func (n *node) terminationDir(name string) string {
	n.t.Helper()
	dir := filepath.Join(n.dir, "pods", podUID, "containers", name)
	n.must(os.MkdirAll(dir, 0o750))
	return dir
}

func (n *node) containerConfig(name string, attempt uint32) *runtimeapi.ContainerConfig {
	return &runtimeapi.ContainerConfig{
		Metadata: &runtimeapi.ContainerMetadata{Name: name, Attempt: attempt},
		Labels: map[string]string{criclone.LabelPodName: "shop", criclone.LabelPodNamespace: "default",
			criclone.LabelPodUID: podUID, criclone.LabelContainer: name},
		Annotations: map[string]string{
			"io.kubernetes.container.hash": "abc", criclone.AnnotationRestartCount: fmt.Sprint(attempt),
			criclone.AnnotationTerminationGrace: "30",
			criclone.AnnotationTerminationPath:  "/dev/termination-log",
		},
		Envs: []*runtimeapi.KeyValue{{Key: "BLOB", Value: []byte{0xff, 0xfe, 'a'}}},
		Mounts: []*runtimeapi.Mount{
			{ContainerPath: "/dev/termination-log", HostPath: filepath.Join(n.terminationDir(name), "0a0b0c0d")}},
		LogPath: fmt.Sprintf("%s/%d.log", name, attempt),
		Linux: &runtimeapi.LinuxContainerConfig{
			Resources: &runtimeapi.LinuxContainerResources{CpuShares: 102, CpusetCpus: "0-3"},
			SecurityContext: &runtimeapi.LinuxContainerSecurityContext{
				NamespaceOptions: &runtimeapi.NamespaceOption{Pid: runtimeapi.NamespaceMode_CONTAINER}},
		},
	}
}

func (n *node) makePod(o podOptions) {
	n.t.Helper()
	ctx := n.t.Context()
	sb, err := n.kubelet.RunPodSandbox(ctx, &runtimeapi.RunPodSandboxRequest{Config: n.sandboxConfig()})
	n.must(err)
	n.sandbox = sb.GetPodSandboxId()
	for _, name := range []string{"app", "web"} {
		cfg := n.containerConfig(name, 0)
		if name == "app" {
			for k, v := range o.annotations {
				cfg.Annotations[k] = v
			}
			cfg.Mounts = append(cfg.Mounts, o.mounts...)
		}
		req := &runtimeapi.CreateContainerRequest{PodSandboxId: n.sandbox, Config: cfg,
			SandboxConfig: n.sandboxConfig()}
		var made *runtimeapi.CreateContainerResponse
		if o.hidden && name == "app" {
			cfg.Envs = nil
			made, err = n.rt.CreateContainer(ctx, req)
		} else {
			made, err = n.kubelet.CreateContainer(ctx, req)
		}
		n.must(err)
		_, err = n.kubelet.StartContainer(ctx, &runtimeapi.StartContainerRequest{ContainerId: made.GetContainerId()})
		n.must(err)
	}
}

func (n *node) must(err error) {
	n.t.Helper()
	if err != nil {
		n.t.Fatal(err)
	}
}

// restart accepts a restart of app; edit changes the request.
func (n *node) restart(uid string, edit ...func(*opsv1.RestartRequest)) *opsv1.Operation {
	n.t.Helper()
	op, err := n.api.Restart(n.t.Context(), restartRequest(uid, edit...))
	n.must(err)
	return op
}

func restartRequest(uid string, edit ...func(*opsv1.RestartRequest)) *opsv1.RestartRequest {
	req := &opsv1.RestartRequest{Uid: uid, Pod: podRef(), Containers: []*opsv1.ContainerRestart{{Name: "app"}},
		Requester: "test"}
	for _, f := range edit {
		f(req)
	}
	return req
}

// finish waits for the end of an operation.
func (n *node) finish(uid string) *opsv1.Operation {
	n.t.Helper()
	return n.until(uid, func(op *opsv1.Operation) bool { return op.GetFinishTime() != nil })
}

// until waits for a state of an operation.
func (n *node) until(uid string, is func(*opsv1.Operation) bool) *opsv1.Operation {
	n.t.Helper()
	o := n.engine.Lookup(uid)
	if o == nil {
		n.t.Fatalf("no operation %s", uid)
	}
	late := time.NewTimer(waitLong)
	defer late.Stop()
	for {
		op, changed := o.Watch()
		if is(op) {
			return op
		}
		select {
		case <-changed:
		case <-late.C:
			n.t.Fatalf("operation is still %v; the runtime has %s; calls %q", op, n.rt.State(), n.rt.TakeCalls())
		}
	}
}

// verdict is the end of an operation for goldens.
func verdict(op *opsv1.Operation) string {
	out := []string{strings.TrimPrefix(op.GetPhase().String(), "PHASE_")}
	for _, c := range op.GetContainers() {
		s := c.GetName() + " " + strings.TrimPrefix(c.GetPhase().String(), "PHASE_")
		if c.GetReason() != "" {
			s += " " + c.GetReason()
		}
		out = append(out, s)
	}
	return strings.Join(out, ", ")
}

// list is what kubelet sees of the slot's containers, newest first.
func (n *node) list(ctx context.Context) ([]*runtimeapi.Container, error) {
	resp, err := n.kubelet.ListContainers(ctx, &runtimeapi.ListContainersRequest{})
	slices.SortFunc(resp.GetContainers(),
		func(a, b *runtimeapi.Container) int { return int(b.GetCreatedAt() - a.GetCreatedAt()) })
	return resp.GetContainers(), err
}

// sees is what kubelet sees, in the form of fakeRuntime.state.
func (n *node) sees() string {
	n.t.Helper()
	all, err := n.list(n.t.Context())
	n.must(err)
	var out []string
	for _, c := range all {
		out = append(out, fakenode.NameOf(c)+" "+strings.TrimPrefix(c.GetState().String(), "CONTAINER_"))
	}
	slices.Sort(out)
	return strings.Join(out, ", ")
}

// checkView asserts that kubelet has no reason to act now: of each slot it sees the newest
// container running, none that has not been started, and status and list agree.
func (n *node) checkView() error {
	all, err := n.list(context.Background())
	if err != nil {
		return err
	}
	done := map[string]bool{}
	for _, c := range all {
		name := c.GetMetadata().GetName()
		if c.GetState() == runtimeapi.ContainerState_CONTAINER_CREATED {
			return fmt.Errorf("kubelet sees %s created", fakenode.NameOf(c))
		}
		if !done[name] && c.GetState() != runtimeapi.ContainerState_CONTAINER_RUNNING {
			return fmt.Errorf("kubelet sees %s %s as the newest", fakenode.NameOf(c), c.GetState())
		}
		done[name] = true
		st, err := n.kubelet.ContainerStatus(context.Background(),
			&runtimeapi.ContainerStatusRequest{ContainerId: c.GetId()})
		if err != nil {
			return fmt.Errorf("kubelet asks for %s, which was listed: %w", fakenode.NameOf(c), err)
		}
		if st.GetStatus().GetState() == runtimeapi.ContainerState_CONTAINER_CREATED {
			return fmt.Errorf("kubelet reads %s created", fakenode.NameOf(c))
		}
	}
	if len(done) != 2 {
		return fmt.Errorf("kubelet sees %d slots", len(done))
	}
	return nil
}

// relist does what kubelet's PLEG does, all the time, until the returned function is called,
// and asserts that nothing kubelet sees makes it act.
func (n *node) relist() (end func()) {
	ctx, cancel := context.WithCancel(context.Background())
	var wg sync.WaitGroup
	wg.Go(func() {
		for ctx.Err() == nil {
			if err := n.checkView(); err != nil {
				n.t.Error(err)
				return
			}
		}
	})
	return func() {
		cancel()
		wg.Wait()
	}
}

// copyState returns a copy of the current state directory as it is now.
func (n *node) copyState() string {
	dir := filepath.Join(n.dir, fmt.Sprintf("state%d", len(n.daemons)))
	if err := os.Mkdir(dir, 0o700); err != nil {
		n.t.Error(err)
	}
	if err := n.engine.copyState(n.state, dir); err != nil {
		n.t.Error(err)
	}
	return dir
}

// copyState copies the files of the engine's state as they are at one moment, even if something is
// being written.
func (e *engine) copyState(from, to string) error {
	boot, err := os.ReadFile(filepath.Join(from, "records.boot"))
	if err == nil {
		err = os.WriteFile(filepath.Join(to, "records.boot"), boot, 0o600)
	}
	save := func(name string) func(*bolt.Tx) error {
		return func(tx *bolt.Tx) error { return tx.CopyFile(filepath.Join(to, name), 0o600) }
	}
	return errors.Join(err, e.disk.Journal.View(save("journal.db")), e.node.Records.View(save("records.db")))
}

// leash is the engine's connection, which a test can cut: from then on no call of that
// engine gets through or returns until the test ends, as if its process were gone.
type leash struct {
	grpc.ClientConnInterface
	gone atomic.Pointer[chan struct{}]
	// bug, if set, is called with the method of each call: where it panics, the engine does.
	bug atomic.Pointer[func(method string)]
}

func (l *leash) cut() {
	c := make(chan struct{})
	l.gone.CompareAndSwap(nil, &c)
}

func (l *leash) free() {
	l.cut()
	close(*l.gone.Load())
}

func (l *leash) Invoke(ctx context.Context, method string, args, reply any, opts ...grpc.CallOption) error {
	if bug := l.bug.Load(); bug != nil {
		(*bug)(method[strings.LastIndexByte(method, '/')+1:])
	}
	if c := l.gone.Load(); c != nil {
		<-*c
		return context.Canceled
	}
	err := l.ClientConnInterface.Invoke(ctx, method, args, reply, opts...)
	if c := l.gone.Load(); c != nil {
		<-*c
		return context.Canceled
	}
	return err
}

// signals lets a test wait for a line of the log.
type signals struct {
	mu    sync.Mutex // guards all following fields
	lines []string
	waits []wait
}

type wait struct {
	is   func(string) bool
	seen chan struct{}
}

func (s *signals) Levels() []logrus.Level { return logrus.AllLevels }

func (s *signals) Fire(e *logrus.Entry) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.lines = append(s.lines, e.Message)
	s.waits = slices.DeleteFunc(s.waits, func(w wait) bool {
		if w.is(e.Message) {
			close(w.seen)
			return true
		}
		return false
	})
	return nil
}

// line returns a channel that is closed once a line has been logged that is the one.
func (s *signals) line(is func(string) bool) <-chan struct{} {
	s.mu.Lock()
	defer s.mu.Unlock()
	seen := make(chan struct{})
	if slices.ContainsFunc(s.lines, is) {
		close(seen)
	} else {
		s.waits = append(s.waits, wait{is, seen})
	}
	return seen
}

// has reports whether a line with that part has been logged.
func (s *signals) has(part string) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	return slices.ContainsFunc(s.lines, func(l string) bool { return strings.Contains(l, part) })
}

func (s *signals) await(t testing.TB, part string) {
	t.Helper()
	select {
	case <-s.line(func(l string) bool { return strings.Contains(l, part) }):
	case <-time.After(waitLong):
		t.Errorf("no log line with %q", part)
	}
}

// Buckets of journal.db; see package store.
var (
	bucketOperations = []byte("operations")
	bucketUnreadable = []byte("unreadable")
)

// clone of a message, typed.
func clone[M proto.Message](m M) M { return proto.Clone(m).(M) }

func awaitClosed(t *testing.T, c <-chan struct{}) {
	t.Helper()
	select {
	case <-c:
	case <-time.After(waitLong):
		t.Fatal("it is not told")
	}
}
