// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package ops

import (
	"context"
	"encoding/json"
	"fmt"
	"maps"
	"net"
	"os"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/cri-proxy/cri-proxy/ops/criclone"
	"github.com/cri-proxy/cri-proxy/ops/crinode"
)

// fakeRuntime is a container runtime without containers: a CRI server with containerd's
// rules for names, states and errors (internal/cri/server), whose calls a test can
// watch, hold up and fail.
type fakeRuntime struct {
	runtimeapi.UnimplementedRuntimeServiceServer
	began time.Time // when it began to serve on the socket, on a real clock; zero in a bubble

	mu         sync.Mutex // guards all following fields
	sandboxes  map[string]*fakeSandbox
	containers map[string]*fakeContainer
	names      map[string]string // reserved name to container ID
	made       int
	calls      []string
	before     func(call string) error
	after      func(call string) error
	hang       func(ctx context.Context, call string) error // before
	exec       func(ctx context.Context, r *runtimeapi.ExecSyncRequest) (*runtimeapi.ExecSyncResponse, error)
	start      func(c *runtimeapi.ContainerConfig) error // nil: starts
	// of the runtime, as a verbose Status tells it; empty: it does not answer that
	config    string
	processes *fakeProcesses // nil: containers have none
}

type fakeSandbox struct {
	id     string
	ready  bool
	ip     string
	config *runtimeapi.PodSandboxConfig
	at     int64
}

func (s *fakeSandbox) state() runtimeapi.PodSandboxState {
	if s.ready {
		return runtimeapi.PodSandboxState_SANDBOX_READY
	}
	return runtimeapi.PodSandboxState_SANDBOX_NOTREADY
}

type fakeContainer struct {
	status   *runtimeapi.ContainerStatus
	sandbox  string
	config   *runtimeapi.ContainerConfig
	reserved string
	stubborn bool          // ignores SIGTERM
	dead     chan struct{} // closed when the process is gone
	gate     *os.File      // the directory that is mounted where the hook is, if there is one
	told     string        // what a verbose status tells beyond CRI; empty: what containerd does
	process  *fakeProcess  // since its start
}

func newFakeRuntime() *fakeRuntime {
	return &fakeRuntime{sandboxes: map[string]*fakeSandbox{}, containers: map[string]*fakeContainer{},
		names: map[string]string{}}
}

// serve answers on the Unix socket until the test ends.
func (f *fakeRuntime) serve(t testing.TB, path string) {
	t.Helper()
	f.began = time.Now()
	l, err := net.Listen("unix", path)
	if err != nil {
		t.Fatal(err)
	}
	s := grpc.NewServer(grpc.UnaryInterceptor(f.watch))
	runtimeapi.RegisterRuntimeServiceServer(s, f)
	var served sync.WaitGroup
	served.Go(func() {
		if err := s.Serve(l); err != nil {
			t.Error(err)
		}
	})
	t.Cleanup(func() {
		s.Stop()
		served.Wait()
	})
}

// watch notes the call and gives the test a say before and after it has its effect.
func (f *fakeRuntime) watch(
	ctx context.Context, req any, info *grpc.UnaryServerInfo, handler grpc.UnaryHandler,
) (any, error) {
	call := f.describe(ctx, info.FullMethod, req)
	f.mu.Lock()
	f.calls = append(f.calls, call)
	before, after, hang := f.before, f.after, f.hang
	f.mu.Unlock()
	if hang != nil {
		if err := hang(ctx, call); err != nil {
			return nil, err
		}
	}
	if before != nil {
		if err := before(call); err != nil {
			return nil, err
		}
	}
	resp, err := handler(ctx, req)
	if err != nil {
		return nil, err
	}
	if after != nil {
		if err := after(call); err != nil {
			return nil, err
		}
	}
	return resp, nil
}

// describe is the form of a call in goldens: method, container as name/attempt, details.
// Kubelet's calls begin with "kubelet:".
func (f *fakeRuntime) describe(ctx context.Context, method string, req any) string {
	var b strings.Builder
	if md, _ := metadata.FromIncomingContext(ctx); len(md.Get("caller")) > 0 {
		b.WriteString("kubelet:")
	}
	b.WriteString(method[strings.LastIndexByte(method, '/')+1:])
	if r, ok := req.(interface{ GetContainerId() string }); ok {
		f.mu.Lock()
		if c := f.find(r.GetContainerId()); c != nil {
			fmt.Fprintf(&b, " %s", nameOf(c.status))
		} else {
			b.WriteString(" ?")
		}
		f.mu.Unlock()
	}
	switch r := req.(type) {
	case *runtimeapi.CreateContainerRequest:
		fmt.Fprintf(&b, " %s/%d", r.GetConfig().GetMetadata().GetName(), r.GetConfig().GetMetadata().GetAttempt())
	case *runtimeapi.StopContainerRequest:
		fmt.Fprintf(&b, " %ds", f.allowed(r.GetTimeout(), strings.HasPrefix(b.String(), "kubelet:")))
	case *runtimeapi.ExecSyncRequest:
		fmt.Fprintf(&b, " %s %ds", strings.Join(r.GetCmd(), " "), r.GetTimeout())
	case *runtimeapi.UpdateContainerResourcesRequest:
		fmt.Fprintf(&b, " cpus=%s", r.GetLinux().GetCpusetCpus())
	}
	return b.String()
}

// allowed is the timeout of a stop as goldens have it. The default grace is told of as such, though
// the stop gets what is left of it: on a real clock that is less by the seconds that a busy machine
// or disk takes, of which there are no more than since the test began.
func (f *fakeRuntime) allowed(timeout int64, kubelet bool) int64 {
	const whole, least = int64(crinode.DefaultGrace / time.Second), 10 // less is what a test has asked for
	if !kubelet && !f.began.IsZero() && timeout < whole &&
		timeout >= max(least, whole-int64(time.Since(f.began)/time.Second)) {
		return whole
	}
	return timeout
}

func nameOf(s interface {
	GetMetadata() *runtimeapi.ContainerMetadata
}) string {
	return fmt.Sprintf("%s/%d", s.GetMetadata().GetName(), s.GetMetadata().GetAttempt())
}

// mutating leaves the calls out that only read.
func mutating(calls []string) []string {
	return slices.DeleteFunc(slices.Clone(calls), func(c string) bool {
		m := strings.TrimPrefix(c, "kubelet:")
		return strings.HasPrefix(m, "List") || strings.HasPrefix(m, "ContainerStatus") ||
			strings.HasPrefix(m, "PodSandboxStatus") || m == "Version" || m == "Status"
	})
}

func (f *fakeRuntime) takeCalls() []string {
	f.mu.Lock()
	defer f.mu.Unlock()
	c := f.calls
	f.calls = nil
	return c
}

func (f *fakeRuntime) set(change func(f *fakeRuntime)) {
	f.mu.Lock()
	defer f.mu.Unlock()
	change(f)
}

// find accepts unique prefixes as containerd does. The caller holds f.mu.
func (f *fakeRuntime) find(id string) *fakeContainer {
	if c := f.containers[id]; c != nil || id == "" {
		return c
	}
	var found *fakeContainer
	for full, c := range f.containers {
		if strings.HasPrefix(full, id) {
			if found != nil {
				return nil
			}
			found = c
		}
	}
	return found
}

// get returns the container with that name/attempt, which must exist.
func (f *fakeRuntime) get(t testing.TB, name string) *fakeContainer {
	t.Helper()
	f.mu.Lock()
	defer f.mu.Unlock()
	for _, c := range f.containers {
		if nameOf(c.status) == name {
			return c
		}
	}
	t.Fatalf("no container %s", name)
	return nil
}

func (f *fakeRuntime) idOf(t testing.TB, name string) string { return f.get(t, name).status.GetId() }

// exit ends a container by itself.
func (f *fakeRuntime) exit(t testing.TB, name string, code int32) {
	t.Helper()
	c := f.get(t, name)
	f.mu.Lock()
	defer f.mu.Unlock()
	f.end(c, code, "Error")
}

// end stops a running container. The caller holds f.mu.
func (f *fakeRuntime) end(c *fakeContainer, code int32, reason string) {
	if c.status.GetState() != runtimeapi.ContainerState_CONTAINER_RUNNING {
		return
	}
	if c.process != nil {
		c.process.kill()
	}
	s := c.status
	s.State, s.FinishedAt = runtimeapi.ContainerState_CONTAINER_EXITED, f.now()
	s.ExitCode, s.Reason = code, reason
	close(c.dead)
}

// now is later with each call, as creation times must differ.
func (f *fakeRuntime) now() int64 {
	f.made++
	return time.Now().UnixNano() + int64(f.made)
}

// state returns what really is there: name/attempt and state.
func (f *fakeRuntime) state() string {
	f.mu.Lock()
	defer f.mu.Unlock()
	var out []string
	for _, c := range f.containers {
		out = append(out, nameOf(c.status)+" "+strings.TrimPrefix(c.status.GetState().String(), "CONTAINER_"))
	}
	return joined(out)
}

func joined(out []string) string {
	slices.Sort(out)
	return strings.Join(out, ", ")
}

func unknownContainer(id string) error {
	return status.Errorf(codes.NotFound, "an error occurred when try to find container %q: not found", id)
}

func (f *fakeRuntime) Version(context.Context, *runtimeapi.VersionRequest) (*runtimeapi.VersionResponse, error) {
	return &runtimeapi.VersionResponse{Version: "0.1.0", RuntimeName: "containerd", RuntimeVersion: "v2",
		RuntimeApiVersion: "v1"}, nil
}

func (f *fakeRuntime) Status(context.Context, *runtimeapi.StatusRequest) (*runtimeapi.StatusResponse, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.config == "" {
		return nil, status.Error(codes.Unimplemented, "method Status not implemented")
	}
	return &runtimeapi.StatusResponse{Status: &runtimeapi.RuntimeStatus{}, Info: map[string]string{"config": f.config}},
		nil
}

func (f *fakeRuntime) RunPodSandbox(
	_ context.Context, r *runtimeapi.RunPodSandboxRequest,
) (*runtimeapi.RunPodSandboxResponse, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	at := f.now()
	id := fmt.Sprintf("sandbox%d", f.made)
	f.sandboxes[id] = &fakeSandbox{id: id, ready: true, ip: "127.0.0.1", config: r.GetConfig(), at: at}
	return &runtimeapi.RunPodSandboxResponse{PodSandboxId: id}, nil
}

func (f *fakeRuntime) StopPodSandbox(
	_ context.Context, r *runtimeapi.StopPodSandboxRequest,
) (*runtimeapi.StopPodSandboxResponse, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if s := f.sandboxes[r.GetPodSandboxId()]; s != nil {
		s.ready = false
		for _, c := range f.containers {
			if c.sandbox == s.id {
				f.end(c, 137, "Error")
			}
		}
	}
	return &runtimeapi.StopPodSandboxResponse{}, nil
}

func (f *fakeRuntime) RemovePodSandbox(
	_ context.Context, r *runtimeapi.RemovePodSandboxRequest,
) (*runtimeapi.RemovePodSandboxResponse, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	for _, c := range f.containers {
		if c.sandbox == r.GetPodSandboxId() {
			f.remove(c)
		}
	}
	delete(f.sandboxes, r.GetPodSandboxId())
	return &runtimeapi.RemovePodSandboxResponse{}, nil
}

func (f *fakeRuntime) ListPodSandbox(
	_ context.Context, r *runtimeapi.ListPodSandboxRequest,
) (*runtimeapi.ListPodSandboxResponse, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	resp := &runtimeapi.ListPodSandboxResponse{}
	for _, s := range f.sandboxes {
		if !hasLabels(s.config.GetLabels(), r.GetFilter().GetLabelSelector()) {
			continue
		}
		resp.Items = append(resp.Items, &runtimeapi.PodSandbox{Id: s.id, Metadata: s.config.GetMetadata(),
			State: s.state(), CreatedAt: s.at, Labels: s.config.GetLabels()})
	}
	return resp, nil
}

func (f *fakeRuntime) PodSandboxStatus(
	_ context.Context, r *runtimeapi.PodSandboxStatusRequest,
) (*runtimeapi.PodSandboxStatusResponse, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	s := f.sandboxes[r.GetPodSandboxId()]
	if s == nil {
		return nil, status.Errorf(codes.NotFound, "an error occurred when try to find sandbox: not found")
	}
	resp := &runtimeapi.PodSandboxStatusResponse{Status: &runtimeapi.PodSandboxStatus{Id: s.id,
		Metadata: s.config.GetMetadata(), State: s.state(), Network: &runtimeapi.PodSandboxNetworkStatus{Ip: s.ip}}}
	if r.GetVerbose() {
		resp.Info = verbose(s.config)
	}
	return resp, nil
}

func verbose(config any) map[string]string {
	b, err := json.Marshal(map[string]any{"config": config, "pid": 1})
	if err != nil {
		panic(err)
	}
	return map[string]string{"info": string(b)}
}

func hasLabels(have, want map[string]string) bool {
	for k, v := range want {
		if have[k] != v {
			return false
		}
	}
	return true
}

func (f *fakeRuntime) CreateContainer(
	_ context.Context, r *runtimeapi.CreateContainerRequest,
) (*runtimeapi.CreateContainerResponse, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	s := f.sandboxes[r.GetPodSandboxId()]
	if s == nil {
		return nil, status.Errorf(codes.NotFound, "failed to find sandbox id %q: not found", r.GetPodSandboxId())
	}
	if !s.ready {
		return nil, status.Errorf(codes.Unknown, "sandbox container %q is not running", s.id)
	}
	m, pod := r.GetConfig().GetMetadata(), r.GetSandboxConfig().GetMetadata()
	name := fmt.Sprintf("%s_%s_%s_%s_%d", m.GetName(), pod.GetName(), pod.GetNamespace(), pod.GetUid(), m.GetAttempt())
	if holder := f.names[name]; holder != "" {
		return nil, status.Errorf(codes.FailedPrecondition,
			"failed to reserve container name %q: name %q is reserved for %q", name, name, holder)
	}
	at := f.now()
	id := fmt.Sprintf("%03d%s%d", f.made, m.GetName(), m.GetAttempt())
	f.names[name] = id
	config := proto.Clone(r.GetConfig()).(*runtimeapi.ContainerConfig)
	gate, err := f.processes.mount(config)
	if err != nil {
		delete(f.names, name)
		return nil, err
	}
	f.containers[id] = &fakeContainer{
		sandbox: s.id, config: config, reserved: name, dead: make(chan struct{}), gate: gate,
		status: &runtimeapi.ContainerStatus{
			Id: id, Metadata: config.GetMetadata(), State: runtimeapi.ContainerState_CONTAINER_CREATED, CreatedAt: at,
			ImageRef: config.GetImage().GetImage(), Labels: maps.Clone(config.GetLabels()),
			Annotations: maps.Clone(config.GetAnnotations()), Mounts: config.GetMounts(),
			LogPath:   s.config.GetLogDirectory() + "/" + config.GetLogPath(),
			Resources: &runtimeapi.ContainerResources{Linux: config.GetLinux().GetResources()},
		},
	}
	return &runtimeapi.CreateContainerResponse{ContainerId: id}, nil
}

func (f *fakeRuntime) StartContainer(
	ctx context.Context, r *runtimeapi.StartContainerRequest,
) (*runtimeapi.StartContainerResponse, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	c := f.find(r.GetContainerId())
	if c == nil {
		return nil, unknownContainer(r.GetContainerId())
	}
	if s := c.status.GetState(); s != runtimeapi.ContainerState_CONTAINER_CREATED {
		return nil, status.Errorf(codes.Unknown,
			"failed to set starting state for container %q: container is in %s state", c.status.GetId(), s)
	}
	err := ctx.Err()
	if err == nil && f.start != nil {
		err = f.start(c.config)
	}
	if err == nil && f.processes != nil {
		err = f.run(c)
	}
	if err != nil {
		c.status.State, c.status.FinishedAt = runtimeapi.ContainerState_CONTAINER_EXITED, f.now()
		c.status.ExitCode, c.status.Reason, c.status.Message = 128, "StartError", err.Error()
		return nil, status.Errorf(codes.Unknown, "failed to create containerd task: %v", err)
	}
	c.status.State, c.status.StartedAt = runtimeapi.ContainerState_CONTAINER_RUNNING, f.now()
	return &runtimeapi.StartContainerResponse{}, nil
}

func (f *fakeRuntime) StopContainer(
	ctx context.Context, r *runtimeapi.StopContainerRequest,
) (*runtimeapi.StopContainerResponse, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	c := f.find(r.GetContainerId())
	if c == nil || c.status.GetState() != runtimeapi.ContainerState_CONTAINER_RUNNING {
		return &runtimeapi.StopContainerResponse{}, nil
	}
	if !c.stubborn {
		if c.process != nil && f.processes.late != nil {
			late, name := f.processes.late, nameOf(c.status)
			c.process.stopping = true // it ends when this call says so
			f.mu.Unlock()
			c.process.kill()
			err := late(name)
			f.mu.Lock()
			c.process.stopping = false
			if err != nil {
				return nil, err
			}
		}
		f.end(c, 0, "Completed")
		return &runtimeapi.StopContainerResponse{}, nil
	}
	f.mu.Unlock()
	kill := time.NewTimer(time.Duration(r.GetTimeout()) * time.Second)
	defer kill.Stop()
	var err error
	select {
	case <-kill.C:
	case <-c.dead:
	case <-ctx.Done(): // then nobody kills
		err = status.FromContextError(ctx.Err()).Err()
	}
	f.mu.Lock()
	if err != nil {
		return nil, err
	}
	f.end(c, 137, "Error")
	return &runtimeapi.StopContainerResponse{}, nil
}

func (f *fakeRuntime) RemoveContainer(
	_ context.Context, r *runtimeapi.RemoveContainerRequest,
) (*runtimeapi.RemoveContainerResponse, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if c := f.find(r.GetContainerId()); c != nil {
		f.remove(c)
	}
	return &runtimeapi.RemoveContainerResponse{}, nil
}

// remove kills what runs. The caller holds f.mu.
func (f *fakeRuntime) remove(c *fakeContainer) {
	f.end(c, 137, "Error")
	if c.gate != nil {
		_ = c.gate.Close() // only read
	}
	delete(f.containers, c.status.GetId())
	delete(f.names, c.reserved)
}

func (f *fakeRuntime) ListContainers(
	_ context.Context, r *runtimeapi.ListContainersRequest,
) (*runtimeapi.ListContainersResponse, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	resp := &runtimeapi.ListContainersResponse{}
	flt := r.GetFilter()
	for id, c := range f.containers {
		s := c.status
		if !strings.HasPrefix(id, flt.GetId()) || !strings.HasPrefix(c.sandbox, flt.GetPodSandboxId()) ||
			!hasLabels(s.GetLabels(), flt.GetLabelSelector()) ||
			(flt.GetState() != nil && flt.GetState().GetState() != s.GetState()) {
			continue
		}
		resp.Containers = append(resp.Containers, &runtimeapi.Container{
			Id: id, PodSandboxId: c.sandbox, Metadata: s.GetMetadata(), State: s.GetState(),
			CreatedAt: s.GetCreatedAt(), Labels: s.GetLabels(), Annotations: s.GetAnnotations(),
		})
	}
	return resp, nil
}

func (f *fakeRuntime) ContainerStatus(
	_ context.Context, r *runtimeapi.ContainerStatusRequest,
) (*runtimeapi.ContainerStatusResponse, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	c := f.find(r.GetContainerId())
	if c == nil {
		return nil, unknownContainer(r.GetContainerId())
	}
	resp := &runtimeapi.ContainerStatusResponse{Status: proto.Clone(c.status).(*runtimeapi.ContainerStatus)}
	if r.GetVerbose() {
		resp.Info = verbose(c.config)
		if c.told != "" {
			resp.Info = map[string]string{"info": c.told}
		}
		if c.process != nil {
			resp.Info = c.process.verbose(c.config)
		}
	}
	return resp, nil
}

func (f *fakeRuntime) ExecSync(
	ctx context.Context, r *runtimeapi.ExecSyncRequest,
) (*runtimeapi.ExecSyncResponse, error) {
	f.mu.Lock()
	c, exec := f.find(r.GetContainerId()), f.exec
	state := runtimeapi.ContainerState_CONTAINER_UNKNOWN
	if c != nil {
		state = c.status.GetState()
	}
	f.mu.Unlock()
	switch {
	case c == nil:
		return nil, unknownContainer(r.GetContainerId())
	case state != runtimeapi.ContainerState_CONTAINER_RUNNING:
		return nil, status.Errorf(codes.Unknown, "container is in %s state", state)
	case exec == nil:
		return &runtimeapi.ExecSyncResponse{}, nil
	}
	return exec(ctx, r)
}

func (f *fakeRuntime) UpdateContainerResources(
	_ context.Context, r *runtimeapi.UpdateContainerResourcesRequest,
) (*runtimeapi.UpdateContainerResourcesResponse, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	c := f.find(r.GetContainerId())
	if c == nil {
		return nil, unknownContainer(r.GetContainerId())
	}
	c.status.Resources = &runtimeapi.ContainerResources{
		Linux: criclone.OverlayResources(c.status.GetResources().GetLinux(), r.GetLinux())}
	return &runtimeapi.UpdateContainerResourcesResponse{}, nil
}

// directConn calls the runtime without a socket, for tests in a synctest bubble.
type directConn struct{ f *fakeRuntime }

func (d directConn) Invoke(ctx context.Context, method string, args, reply any, _ ...grpc.CallOption) error {
	for _, m := range runtimeapi.RuntimeService_ServiceDesc.Methods {
		if !strings.HasSuffix(method, "/"+m.MethodName) {
			continue
		}
		resp, err := m.Handler(d.f, ctx, func(v any) error {
			proto.Merge(v.(proto.Message), args.(proto.Message))
			return nil
		}, d.f.watch)
		if err != nil {
			return status.Convert(err).Err()
		}
		proto.Merge(reply.(proto.Message), resp.(proto.Message))
		return nil
	}
	return status.Error(codes.Unimplemented, method)
}

func (directConn) NewStream(context.Context, *grpc.StreamDesc, string, ...grpc.CallOption) (grpc.ClientStream, error) {
	return nil, status.Error(codes.Unimplemented, "no streams here")
}
