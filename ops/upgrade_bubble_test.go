// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package ops_test

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/sirupsen/logrus"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	opsv1 "github.com/cri-proxy/cri-proxy/api/ops/v1"
	"github.com/cri-proxy/cri-proxy/interceptors"
	"github.com/cri-proxy/cri-proxy/interceptors/view"
	"github.com/cri-proxy/cri-proxy/ops"
	"github.com/cri-proxy/cri-proxy/ops/criclone"
	"github.com/cri-proxy/cri-proxy/ops/imagechange"
	"github.com/cri-proxy/cri-proxy/ops/podsapi"
	"github.com/cri-proxy/cri-proxy/ops/store"
	"github.com/cri-proxy/cri-proxy/test/fakenode"
)

// fakeImages are the images of a node: what a pull brings, and what the runtime says of them.
type fakeImages struct {
	nodeImages

	mu     sync.Mutex // guards all following fields
	ensure func(ctx context.Context, req *opsv1.PullRequest) (*opsv1.PullOperation, error)
	pulled []string // images, with whether there were credentials
	pinned []string
}

var _ imagechange.Puller = (*fakeImages)(nil)

func newFakeImages() *fakeImages {
	images := map[string]*runtimeapi.Image{}
	for _, name := range []string{"app:v1", "app:v2", "app:v3", "web:v1", "web:v2"} {
		images[name] = &runtimeapi.Image{Id: "sha256:" + name}
		images["sha256:"+name] = images[name]
	}
	return &fakeImages{nodeImages: nodeImages{images: images}}
}

func (f *fakeImages) Ensure(
	ctx context.Context, req *opsv1.PullRequest, each func(*opsv1.PullOperation),
) (*opsv1.PullOperation, error) {
	f.mu.Lock()
	ensure := f.ensure
	pulled := req.GetImage()
	if len(req.GetCredentials()) > 0 {
		pulled += " with credentials"
	}
	f.pulled = append(f.pulled, pulled)
	f.mu.Unlock()
	each(&opsv1.PullOperation{Phase: opsv1.PullPhase_PULL_FETCHING})
	if ensure != nil {
		return ensure(ctx, req)
	}
	return &opsv1.PullOperation{Phase: opsv1.PullPhase_PULL_SUCCEEDED}, ctx.Err()
}

func (f *fakeImages) Pin(_ context.Context, image, _ string, _ time.Time) error {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.pinned = append(f.pinned, image)
	return nil
}

// upNode is a node with one pod, containers app and web, on which time passes only when nothing
// else can happen. Kubelet calls through the interceptors, without sockets.
type upNode struct {
	t       *testing.T
	dir     string
	rt      *fakenode.Runtime
	images  *fakeImages
	pods    podsapi.Pods
	shape   *node
	sandbox string
	patched bool // the pod's spec has the new images

	*upProcess
	processes []*upProcess
}

// upProcess is one run of cri-proxy.
type upProcess struct {
	state   string
	engine  *engine
	view    *view.View
	api     *ops.Server
	kubelet runtimeapi.RuntimeServiceClient
	leash   *leash
	log     *signals
	stop    context.CancelFunc
	ran     sync.WaitGroup
}

// inUpNode runs f on such a node. The engine runs.
func inUpNode(t *testing.T, f func(t *testing.T, n *upNode)) {
	t.Helper()
	dir := t.TempDir()
	synctest.Test(t, func(t *testing.T) {
		n := &upNode{t: t, dir: dir, rt: fakenode.New(), images: newFakeImages()}
		n.shape = &node{t: t, dir: dir, rt: n.rt}
		defer func() {
			for _, p := range n.processes {
				p.stop()
				p.leash.free()
				p.ran.Wait()
				if err := p.engine.Close(); err != nil {
					t.Error(err)
				}
			}
		}()
		state := filepath.Join(dir, "state")
		n.must(os.Mkdir(state, 0o700))
		n.boot(state)
		n.makePod()
		n.run()
		synctest.Wait()
		n.rt.TakeCalls()
		f(t, n)
	})
}

func (n *upNode) must(err error) {
	n.t.Helper()
	if err != nil {
		n.t.Fatal(err)
	}
}

// boot starts a process, without Run.
func (n *upNode) boot(state string) {
	n.t.Helper()
	log := logrus.New()
	log.SetOutput(io.Discard)
	if os.Getenv("OPS_TEST_LOG") != "" {
		log.SetOutput(os.Stderr)
	}
	log.SetLevel(logrus.DebugLevel)
	p := &upProcess{state: state, view: view.New(), log: &signals{}, stop: func() {},
		leash: &leash{ClientConnInterface: fakenode.Direct(n.rt)}}
	log.AddHook(p.log)
	var err error
	p.engine, err = open(ops.Options{StateDir: state, Conn: p.leash, View: p.view, Log: log,
		LegacyLogDir: n.dir, Images: n.images, Pods: n.pods})
	n.must(err)
	overrides, err := store.OpenOverrides(p.engine.disk.Journal, n.images, log)
	n.must(err)
	p.engine.node.Images.Service, p.engine.node.Images.Overrides = n.images, overrides
	p.engine.node.Overrides, p.engine.disk.Overrides = overrides, overrides
	unsynced(p.engine.disk.Journal)
	p.api = ops.NewServer(p.engine.Engine,
		func(context.Context) *opsv1.NodeInfoResponse { return &opsv1.NodeInfoResponse{} })
	p.kubelet = runtimeapi.NewRuntimeServiceClient(throughProxy{n.rt, interceptors.New(interceptors.Options{
		View: p.view, Records: p.engine.Records(), Runtime: p.leash, Log: log, Judge: p.engine,
		Overrides: p.engine.Overrides(), Pods: p.engine, Successors: p.engine,
	}), p.leash})
	n.upProcess = p
	n.processes = append(n.processes, p)
}

func (n *upNode) run() {
	p := n.upProcess
	ctx, cancel := context.WithCancel(context.Background())
	p.stop = cancel
	p.ran.Go(func() {
		if err := p.engine.Run(ctx); err != nil {
			n.t.Error(err)
		}
	})
}

// crash ends the process without warning, and returns the state directory as that leaves it.
func (n *upNode) crash() string {
	n.leash.cut()
	dir := fmt.Sprintf("%s%d", n.state, len(n.processes))
	if err := errors.Join(os.Mkdir(dir, 0o700), n.engine.copyState(n.state, dir)); err != nil {
		n.t.Error(err)
	}
	n.stop()
	return dir
}

// reboot is the next process after a crash; it runs.
func (n *upNode) reboot(state string) {
	n.t.Helper()
	n.rt.Set(func(f *fakenode.Runtime) { f.Before, f.After = nil, nil })
	n.boot(state)
	n.run()
}

// throughProxy makes calls as kubelet does, through the interceptors.
type throughProxy struct {
	f     *fakenode.Runtime
	d     *interceptors.Director
	leash *leash // that of the process
}

func (p throughProxy) Invoke(ctx context.Context, method string, args, reply any, _ ...grpc.CallOption) error {
	raw, err := proto.Marshal(args.(proto.Message))
	if err != nil {
		return err
	}
	for {
		if take := p.d.Unary(method); take != nil {
			raw, err = take(ctx, method, raw, p.next(method))
			break
		}
		done, ok := p.d.Pass(method)
		if !ok {
			continue
		}
		raw, err = p.next(method)(ctx, raw)
		if done != nil {
			done()
		}
		break
	}
	if err != nil {
		return status.Convert(err).Err()
	}
	return proto.Unmarshal(raw, reply.(proto.Message))
}

func (p throughProxy) next(method string) func(context.Context, []byte) ([]byte, error) {
	return func(ctx context.Context, raw []byte) ([]byte, error) {
		if p.leash.gone.Load() != nil || ctx.Err() != nil {
			return nil, status.Error(codes.Unavailable, "the process is gone, or whoever asks")
		}
		for _, m := range runtimeapi.RuntimeService_ServiceDesc.Methods {
			if !strings.HasSuffix(method, "/"+m.MethodName) {
				continue
			}
			resp, err := m.Handler(p.f, ctx, func(v any) error { return proto.Unmarshal(raw, v.(proto.Message)) },
				p.f.WatchKubelet)
			if err != nil {
				return nil, err
			}
			return proto.Marshal(resp.(proto.Message))
		}
		return nil, status.Error(codes.Unimplemented, method)
	}
}

func (throughProxy) NewStream(
	context.Context, *grpc.StreamDesc, string, ...grpc.CallOption,
) (grpc.ClientStream, error) {
	return nil, status.Error(codes.Unimplemented, "no streams here")
}

func (n *upNode) makePod() {
	n.t.Helper()
	sb, err := n.rt.RunPodSandbox(n.t.Context(), &runtimeapi.RunPodSandboxRequest{Config: n.shape.sandboxConfig()})
	n.must(err)
	n.sandbox = sb.GetPodSandboxId()
	for _, name := range []string{"app", "web"} {
		n.must(n.kubeletMakes(n.t.Context(), n.asks(name, name+":v1", 0)))
	}
}

// asks is what kubelet asks for when the pod's spec has that image.
func (n *upNode) asks(
	name, image string, attempt uint32, edit ...func(*runtimeapi.ContainerConfig),
) *runtimeapi.CreateContainerRequest {
	c := n.shape.containerConfig(name, attempt)
	c.Image = &runtimeapi.ImageSpec{Image: "sha256:" + image, UserSpecifiedImage: image}
	c.Annotations[criclone.AnnotationHash] = criclone.KubeletHash(name, image)
	c.Mounts[0].HostPath = filepath.Join(n.shape.terminationDir(name), fmt.Sprintf("%08x", attempt))
	for _, f := range edit {
		f(c)
	}
	return &runtimeapi.CreateContainerRequest{PodSandboxId: n.sandbox, Config: c,
		SandboxConfig: n.shape.sandboxConfig()}
}

// kubeletMakes creates and starts a container as kubelet does.
func (n *upNode) kubeletMakes(ctx context.Context, req *runtimeapi.CreateContainerRequest) error {
	ctx, cancel := context.WithTimeout(ctx, runtimeRequestTimeout)
	defer cancel()
	made, err := n.kubelet.CreateContainer(ctx, req)
	if err != nil {
		return err
	}
	_, err = n.kubelet.StartContainer(ctx, &runtimeapi.StartContainerRequest{ContainerId: made.GetContainerId()})
	return err
}

// runtimeRequestTimeout is kubelet's default: what it gives every call, StopContainer the grace on
// top.
const runtimeRequestTimeout = 2 * time.Minute

func (n *upNode) kubeletStops(ctx context.Context, id string, grace int64) error {
	ctx, cancel := context.WithTimeout(ctx, runtimeRequestTimeout+time.Duration(grace)*time.Second)
	defer cancel()
	_, err := n.kubelet.StopContainer(ctx, &runtimeapi.StopContainerRequest{ContainerId: id, Timeout: grace})
	return err
}

func (n *upNode) kubeletStopsPod(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, runtimeRequestTimeout)
	defer cancel()
	_, err := n.kubelet.StopPodSandbox(ctx, &runtimeapi.StopPodSandboxRequest{PodSandboxId: n.sandbox})
	return err
}

// newest is the container of the slot that kubelet goes by; nil if it sees none.
func (n *upNode) newest(ctx context.Context, name string) (*runtimeapi.Container, error) {
	list, err := n.kubelet.ListContainers(ctx, &runtimeapi.ListContainersRequest{})
	var newest *runtimeapi.Container
	for _, c := range list.GetContainers() {
		if c.GetMetadata().GetName() == name && (newest == nil || c.GetCreatedAt() > newest.GetCreatedAt()) {
			newest = c
		}
	}
	return newest, err
}

// sync is kubelet's work on one container whose spec has that image, once: it returns an error
// where kubelet would begin again later.
func (n *upNode) sync(ctx context.Context, name, image string, edit ...func(*runtimeapi.ContainerConfig)) error {
	newest, err := n.newest(ctx, name)
	if err != nil {
		return err
	}
	attempt := uint32(0)
	if newest != nil {
		attempt = newest.GetMetadata().GetAttempt() + 1
		if newest.GetState() == runtimeapi.ContainerState_CONTAINER_RUNNING {
			if newest.GetAnnotations()[criclone.AnnotationHash] == criclone.KubeletHash(name, image) {
				return nil
			}
			if err := n.kubeletStops(ctx, newest.GetId(), 30); err != nil {
				return err
			}
		}
	}
	return n.kubeletMakes(ctx, n.asks(name, image, attempt, edit...))
}

// sees is what kubelet sees.
func (n *upNode) sees() string {
	n.t.Helper()
	list, err := n.kubelet.ListContainers(n.t.Context(), &runtimeapi.ListContainersRequest{})
	n.must(err)
	var out []string
	for _, c := range list.GetContainers() {
		out = append(out, fakenode.NameOf(c)+" "+strings.TrimPrefix(c.GetState().String(), "CONTAINER_"))
	}
	return fakenode.Joined(out)
}

func upgradeRequest(uid string, edit ...func(*opsv1.PrepareUpgradeRequest)) *opsv1.PrepareUpgradeRequest {
	req := &opsv1.PrepareUpgradeRequest{Uid: uid, Pod: podRef(),
		Containers: []*opsv1.ContainerUpgrade{{Name: "app", Image: "app:v2"}}, Requester: "test"}
	for _, f := range edit {
		f(req)
	}
	return req
}

// first edits the first container of the request.
func first(f func(c *opsv1.ContainerUpgrade)) func(*opsv1.PrepareUpgradeRequest) {
	return func(r *opsv1.PrepareUpgradeRequest) { f(r.Containers[0]) }
}

func runBeside(c *opsv1.ContainerUpgrade) { c.Order = opsv1.Order_ORDER_START_FIRST }

// webToo upgrades the other container as well.
func webToo(r *opsv1.PrepareUpgradeRequest) {
	r.Containers = append(r.Containers, &opsv1.ContainerUpgrade{Name: "web", Image: "web:v2"})
}

func (n *upNode) begin(uid string, edit ...func(*opsv1.PrepareUpgradeRequest)) {
	n.t.Helper()
	_, err := n.api.PrepareUpgrade(n.t.Context(), upgradeRequest(uid, edit...))
	n.must(err)
}

func (n *upNode) prepared(uid string, edit ...func(*opsv1.PrepareUpgradeRequest)) {
	n.t.Helper()
	n.begin(uid, edit...)
	n.until(uid, opsv1.Phase_PHASE_PREPARED)
}

func (n *upNode) armed(uid string, edit ...func(*opsv1.PrepareUpgradeRequest)) {
	n.t.Helper()
	n.prepared(uid, edit...)
	n.commit(uid)
	n.until(uid, opsv1.Phase_PHASE_ARMED)
}

func (n *upNode) commit(uid string) {
	n.t.Helper()
	_, err := n.api.CommitUpgrade(n.t.Context(), n.engine.commitRequest(uid))
	n.must(err)
}

// until waits for one of the phases, or for the end.
func (n *upNode) until(uid string, phases ...opsv1.Phase) *opsv1.Operation {
	n.t.Helper()
	o := n.engine.Lookup(uid)
	if o == nil {
		n.t.Fatalf("no operation %s", uid)
	}
	for {
		op, changed := o.Watch()
		if slices.Contains(phases, op.GetPhase()) || op.GetFinishTime() != nil {
			if op.GetFinishTime() != nil && len(phases) > 0 && !slices.Contains(phases, op.GetPhase()) {
				n.t.Fatalf("operation ended %s: %s", verdict(op), op.GetMessage())
			}
			return op
		}
		select {
		case <-changed:
		case <-time.After(48 * time.Hour):
			n.t.Fatalf("operation is still %v; the runtime has %s; calls %q", op, n.rt.State(),
				fakenode.Mutating(n.rt.TakeCalls()))
		}
	}
}

// ends waits for the end and asserts it.
func (n *upNode) ends(uid, want, state string) *opsv1.Operation {
	n.t.Helper()
	op := n.until(uid)
	if got := verdict(op); got != want {
		n.t.Errorf("operation ended %s (%s), want %s", got, op.GetMessage(), want)
	}
	n.settled(state)
	return op
}

// settled asserts that nothing of an operation is left, and what there is.
func (n *upNode) settled(state string) {
	n.t.Helper()
	synctest.Wait()
	if got := n.rt.State(); got != state {
		n.t.Errorf("runtime has %s, want %s", got, state)
	}
	if got := n.sees(); got != n.rt.State() {
		n.t.Errorf("kubelet sees %s, though there is %s", got, n.rt.State())
	}
	if !plain(n.t, n.kubelet, n.view) {
		n.t.Error("something is still hidden or masked")
	}
	for _, name := range []string{"app", "web"} {
		if n.view.Claimed(view.Slot{PodUID: podUID, Container: name}) {
			n.t.Errorf("slot %s is still held", name)
		}
	}
}

// inBackground makes a call of kubelet's on its own goroutine; the result is awaited by the
// returned function, which tells how long it took.
func (n *upNode) inBackground(f func(ctx context.Context) error) (answered func() (time.Duration, error)) {
	began, took := time.Now(), time.Duration(0)
	done := make(chan error, 1)
	ctx := context.WithoutCancel(n.t.Context())
	go func() {
		err := f(ctx)
		took = time.Since(began)
		done <- err
	}()
	return func() (time.Duration, error) {
		err := <-done
		return took, err
	}
}

const (
	untouched = "app/0 RUNNING, web/0 RUNNING"
	upgraded  = "app/0 EXITED, app/1 RUNNING, web/0 RUNNING"
	succeeded = "SUCCEEDED, app SUCCEEDED"
)
