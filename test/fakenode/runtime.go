// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package fakenode

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

// Runtime is a container runtime without containers: a CRI server with containerd's
// rules for names, states and errors (internal/cri/server), whose calls a test can
// watch, hold up and fail.
type Runtime struct {
	runtimeapi.UnimplementedRuntimeServiceServer
	began time.Time // when it began to serve on the socket, on a real clock; zero in a bubble

	Mu         sync.Mutex // guards all following fields
	Sandboxes  map[string]*Sandbox
	Containers map[string]*Container
	names      map[string]string // reserved name to container ID
	made       int
	Calls      []string
	Before     func(call string) error
	After      func(call string) error
	Hang       func(ctx context.Context, call string) error // before
	OnExec     func(ctx context.Context, r *runtimeapi.ExecSyncRequest) (*runtimeapi.ExecSyncResponse, error)
	OnStart    func(c *runtimeapi.ContainerConfig) error // nil: starts
	// of the runtime, as a verbose Status tells it; empty: it does not answer that
	config    string
	Processes *Processes // nil: containers have none
}

// Sandbox is a pod's.
type Sandbox struct {
	id     string
	Ready  bool
	ip     string
	config *runtimeapi.PodSandboxConfig
	at     int64
}

func (s *Sandbox) state() runtimeapi.PodSandboxState {
	if s.Ready {
		return runtimeapi.PodSandboxState_SANDBOX_READY
	}
	return runtimeapi.PodSandboxState_SANDBOX_NOTREADY
}

// Container is a container of a pod, with what the runtime knows of it.
type Container struct {
	Status   *runtimeapi.ContainerStatus
	sandbox  string
	Config   *runtimeapi.ContainerConfig
	reserved string
	Stubborn bool          // ignores SIGTERM
	dead     chan struct{} // closed when the process is gone
	gate     *os.File      // the directory that is mounted where the hook is, if there is one
	Told     string        // what a verbose status tells beyond CRI; empty: what containerd does
	Process  *Process      // since its start
}

// New returns a runtime without sandboxes. [Runtime.Serve] or [Direct] let clients call it.
func New() *Runtime {
	return &Runtime{Sandboxes: map[string]*Sandbox{}, Containers: map[string]*Container{},
		names: map[string]string{}}
}

// Serve answers on the Unix socket until the test ends.
func (f *Runtime) Serve(t testing.TB, path string) {
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
func (f *Runtime) watch(
	ctx context.Context, req any, info *grpc.UnaryServerInfo, handler grpc.UnaryHandler,
) (any, error) {
	call := f.Describe(ctx, info.FullMethod, req)
	f.Mu.Lock()
	f.Calls = append(f.Calls, call)
	before, after, hang := f.Before, f.After, f.Hang
	f.Mu.Unlock()
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

// WatchKubelet notes a call of kubelet's. The test has no say in it.
func (f *Runtime) WatchKubelet(
	ctx context.Context, req any, info *grpc.UnaryServerInfo, handler grpc.UnaryHandler,
) (any, error) {
	call := "kubelet:" + f.Describe(ctx, info.FullMethod, req)
	f.Mu.Lock()
	f.Calls = append(f.Calls, call)
	f.Mu.Unlock()
	return handler(ctx, req)
}

// Describe is the form of a call in goldens: method, container as name/attempt, details.
// Kubelet's calls begin with "kubelet:".
func (f *Runtime) Describe(ctx context.Context, method string, req any) string {
	var b strings.Builder
	if md, _ := metadata.FromIncomingContext(ctx); len(md.Get("caller")) > 0 {
		b.WriteString("kubelet:")
	}
	b.WriteString(method[strings.LastIndexByte(method, '/')+1:])
	if r, ok := req.(interface{ GetContainerId() string }); ok {
		f.Mu.Lock()
		if c := f.Find(r.GetContainerId()); c != nil {
			fmt.Fprintf(&b, " %s", NameOf(c.Status))
		} else {
			b.WriteString(" ?")
		}
		f.Mu.Unlock()
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
func (f *Runtime) allowed(timeout int64, kubelet bool) int64 {
	const whole, least = int64(crinode.DefaultGrace / time.Second), 10 // less is what a test has asked for
	if !kubelet && !f.began.IsZero() && timeout < whole &&
		timeout >= max(least, whole-int64(time.Since(f.began)/time.Second)) {
		return whole
	}
	return timeout
}

// NameOf returns name/attempt of a container.
func NameOf(s interface {
	GetMetadata() *runtimeapi.ContainerMetadata
}) string {
	return fmt.Sprintf("%s/%d", s.GetMetadata().GetName(), s.GetMetadata().GetAttempt())
}

// Mutating leaves the calls out that only read.
func Mutating(calls []string) []string {
	return slices.DeleteFunc(slices.Clone(calls), func(c string) bool {
		m := strings.TrimPrefix(c, "kubelet:")
		return strings.HasPrefix(m, "List") || strings.HasPrefix(m, "ContainerStatus") ||
			strings.HasPrefix(m, "PodSandboxStatus") || m == "Version" || m == "Status"
	})
}

// TakeCalls returns the calls since it was called before.
func (f *Runtime) TakeCalls() []string {
	f.Mu.Lock()
	defer f.Mu.Unlock()
	c := f.Calls
	f.Calls = nil
	return c
}

// Set changes the fields of the runtime while nobody reads them.
func (f *Runtime) Set(change func(f *Runtime)) {
	f.Mu.Lock()
	defer f.Mu.Unlock()
	change(f)
}

// Find accepts unique prefixes as containerd does. The caller holds f.mu.
func (f *Runtime) Find(id string) *Container {
	if c := f.Containers[id]; c != nil || id == "" {
		return c
	}
	var found *Container
	for full, c := range f.Containers {
		if strings.HasPrefix(full, id) {
			if found != nil {
				return nil
			}
			found = c
		}
	}
	return found
}

// Get returns the container with that name/attempt, which must exist.
func (f *Runtime) Get(t testing.TB, name string) *Container {
	t.Helper()
	f.Mu.Lock()
	defer f.Mu.Unlock()
	for _, c := range f.Containers {
		if NameOf(c.Status) == name {
			return c
		}
	}
	t.Fatalf("no container %s", name)
	return nil
}

// ID returns the ID of the container with that name/attempt, which must exist.
func (f *Runtime) ID(t testing.TB, name string) string { return f.Get(t, name).Status.GetId() }

// Exit ends a container by itself.
func (f *Runtime) Exit(t testing.TB, name string, code int32) {
	t.Helper()
	c := f.Get(t, name)
	f.Mu.Lock()
	defer f.Mu.Unlock()
	f.End(c, code, "Error")
}

// End stops a running container. The caller holds f.mu.
func (f *Runtime) End(c *Container, code int32, reason string) {
	if c.Status.GetState() != runtimeapi.ContainerState_CONTAINER_RUNNING {
		return
	}
	if c.Process != nil {
		c.Process.kill()
	}
	s := c.Status
	s.State, s.FinishedAt = runtimeapi.ContainerState_CONTAINER_EXITED, f.now()
	s.ExitCode, s.Reason = code, reason
	close(c.dead)
}

// now is later with each call, as creation times must differ.
func (f *Runtime) now() int64 {
	f.made++
	return time.Now().UnixNano() + int64(f.made)
}

// State returns what really is there: name/attempt and state.
func (f *Runtime) State() string {
	f.Mu.Lock()
	defer f.Mu.Unlock()
	var out []string
	for _, c := range f.Containers {
		out = append(out, NameOf(c.Status)+" "+strings.TrimPrefix(c.Status.GetState().String(), "CONTAINER_"))
	}
	return Joined(out)
}

// Joined returns the words in order, with commas.
func Joined(out []string) string {
	slices.Sort(out)
	return strings.Join(out, ", ")
}

// UnknownContainer is the error for an ID that no container has.
func UnknownContainer(id string) error {
	return status.Errorf(codes.NotFound, "an error occurred when try to find container %q: not found", id)
}

// Version implements [runtimeapi.RuntimeServiceServer].
func (f *Runtime) Version(context.Context, *runtimeapi.VersionRequest) (*runtimeapi.VersionResponse, error) {
	return &runtimeapi.VersionResponse{Version: "0.1.0", RuntimeName: "containerd", RuntimeVersion: "v2",
		RuntimeApiVersion: "v1"}, nil
}

// Status implements [runtimeapi.RuntimeServiceServer].
func (f *Runtime) Status(context.Context, *runtimeapi.StatusRequest) (*runtimeapi.StatusResponse, error) {
	f.Mu.Lock()
	defer f.Mu.Unlock()
	if f.config == "" {
		return nil, status.Error(codes.Unimplemented, "method Status not implemented")
	}
	return &runtimeapi.StatusResponse{Status: &runtimeapi.RuntimeStatus{}, Info: map[string]string{"config": f.config}},
		nil
}

// RunPodSandbox implements [runtimeapi.RuntimeServiceServer].
func (f *Runtime) RunPodSandbox(
	_ context.Context, r *runtimeapi.RunPodSandboxRequest,
) (*runtimeapi.RunPodSandboxResponse, error) {
	f.Mu.Lock()
	defer f.Mu.Unlock()
	at := f.now()
	id := fmt.Sprintf("sandbox%d", f.made)
	f.Sandboxes[id] = &Sandbox{id: id, Ready: true, ip: "127.0.0.1", config: r.GetConfig(), at: at}
	return &runtimeapi.RunPodSandboxResponse{PodSandboxId: id}, nil
}

// StopPodSandbox implements [runtimeapi.RuntimeServiceServer].
func (f *Runtime) StopPodSandbox(
	_ context.Context, r *runtimeapi.StopPodSandboxRequest,
) (*runtimeapi.StopPodSandboxResponse, error) {
	f.Mu.Lock()
	defer f.Mu.Unlock()
	if s := f.Sandboxes[r.GetPodSandboxId()]; s != nil {
		s.Ready = false
		for _, c := range f.Containers {
			if c.sandbox == s.id {
				f.End(c, 137, "Error")
			}
		}
	}
	return &runtimeapi.StopPodSandboxResponse{}, nil
}

// RemovePodSandbox implements [runtimeapi.RuntimeServiceServer].
func (f *Runtime) RemovePodSandbox(
	_ context.Context, r *runtimeapi.RemovePodSandboxRequest,
) (*runtimeapi.RemovePodSandboxResponse, error) {
	f.Mu.Lock()
	defer f.Mu.Unlock()
	for _, c := range f.Containers {
		if c.sandbox == r.GetPodSandboxId() {
			f.Remove(c)
		}
	}
	delete(f.Sandboxes, r.GetPodSandboxId())
	return &runtimeapi.RemovePodSandboxResponse{}, nil
}

// ListPodSandbox implements [runtimeapi.RuntimeServiceServer].
func (f *Runtime) ListPodSandbox(
	_ context.Context, r *runtimeapi.ListPodSandboxRequest,
) (*runtimeapi.ListPodSandboxResponse, error) {
	f.Mu.Lock()
	defer f.Mu.Unlock()
	resp := &runtimeapi.ListPodSandboxResponse{}
	for _, s := range f.Sandboxes {
		if !hasLabels(s.config.GetLabels(), r.GetFilter().GetLabelSelector()) {
			continue
		}
		resp.Items = append(resp.Items, &runtimeapi.PodSandbox{Id: s.id, Metadata: s.config.GetMetadata(),
			State: s.state(), CreatedAt: s.at, Labels: s.config.GetLabels()})
	}
	return resp, nil
}

// PodSandboxStatus implements [runtimeapi.RuntimeServiceServer].
func (f *Runtime) PodSandboxStatus(
	_ context.Context, r *runtimeapi.PodSandboxStatusRequest,
) (*runtimeapi.PodSandboxStatusResponse, error) {
	f.Mu.Lock()
	defer f.Mu.Unlock()
	s := f.Sandboxes[r.GetPodSandboxId()]
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

// CreateContainer implements [runtimeapi.RuntimeServiceServer].
func (f *Runtime) CreateContainer(
	_ context.Context, r *runtimeapi.CreateContainerRequest,
) (*runtimeapi.CreateContainerResponse, error) {
	f.Mu.Lock()
	defer f.Mu.Unlock()
	s := f.Sandboxes[r.GetPodSandboxId()]
	if s == nil {
		return nil, status.Errorf(codes.NotFound, "failed to find sandbox id %q: not found", r.GetPodSandboxId())
	}
	if !s.Ready {
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
	gate, err := f.Processes.mount(config)
	if err != nil {
		delete(f.names, name)
		return nil, err
	}
	f.Containers[id] = &Container{
		sandbox: s.id, Config: config, reserved: name, dead: make(chan struct{}), gate: gate,
		Status: &runtimeapi.ContainerStatus{
			Id: id, Metadata: config.GetMetadata(), State: runtimeapi.ContainerState_CONTAINER_CREATED, CreatedAt: at,
			ImageRef: config.GetImage().GetImage(), Labels: maps.Clone(config.GetLabels()),
			Annotations: maps.Clone(config.GetAnnotations()), Mounts: config.GetMounts(),
			LogPath:   s.config.GetLogDirectory() + "/" + config.GetLogPath(),
			Resources: &runtimeapi.ContainerResources{Linux: config.GetLinux().GetResources()},
		},
	}
	return &runtimeapi.CreateContainerResponse{ContainerId: id}, nil
}

// StartContainer implements [runtimeapi.RuntimeServiceServer].
func (f *Runtime) StartContainer(
	ctx context.Context, r *runtimeapi.StartContainerRequest,
) (*runtimeapi.StartContainerResponse, error) {
	f.Mu.Lock()
	defer f.Mu.Unlock()
	c := f.Find(r.GetContainerId())
	if c == nil {
		return nil, UnknownContainer(r.GetContainerId())
	}
	if s := c.Status.GetState(); s != runtimeapi.ContainerState_CONTAINER_CREATED {
		return nil, status.Errorf(codes.Unknown,
			"failed to set starting state for container %q: container is in %s state", c.Status.GetId(), s)
	}
	err := ctx.Err()
	if err == nil && f.OnStart != nil {
		err = f.OnStart(c.Config)
	}
	if err == nil && f.Processes != nil {
		err = f.run(c)
	}
	if err != nil {
		c.Status.State, c.Status.FinishedAt = runtimeapi.ContainerState_CONTAINER_EXITED, f.now()
		c.Status.ExitCode, c.Status.Reason, c.Status.Message = 128, "StartError", err.Error()
		return nil, status.Errorf(codes.Unknown, "failed to create containerd task: %v", err)
	}
	c.Status.State, c.Status.StartedAt = runtimeapi.ContainerState_CONTAINER_RUNNING, f.now()
	return &runtimeapi.StartContainerResponse{}, nil
}

// StopContainer implements [runtimeapi.RuntimeServiceServer].
func (f *Runtime) StopContainer(
	ctx context.Context, r *runtimeapi.StopContainerRequest,
) (*runtimeapi.StopContainerResponse, error) {
	f.Mu.Lock()
	defer f.Mu.Unlock()
	c := f.Find(r.GetContainerId())
	if c == nil || c.Status.GetState() != runtimeapi.ContainerState_CONTAINER_RUNNING {
		return &runtimeapi.StopContainerResponse{}, nil
	}
	if !c.Stubborn {
		if c.Process != nil && f.Processes.Late != nil {
			late, name := f.Processes.Late, NameOf(c.Status)
			c.Process.stopping = true // it ends when this call says so
			f.Mu.Unlock()
			c.Process.kill()
			err := late(name)
			f.Mu.Lock()
			c.Process.stopping = false
			if err != nil {
				return nil, err
			}
		}
		f.End(c, 0, "Completed")
		return &runtimeapi.StopContainerResponse{}, nil
	}
	f.Mu.Unlock()
	kill := time.NewTimer(time.Duration(r.GetTimeout()) * time.Second)
	defer kill.Stop()
	var err error
	select {
	case <-kill.C:
	case <-c.dead:
	case <-ctx.Done(): // then nobody kills
		err = status.FromContextError(ctx.Err()).Err()
	}
	f.Mu.Lock()
	if err != nil {
		return nil, err
	}
	f.End(c, 137, "Error")
	return &runtimeapi.StopContainerResponse{}, nil
}

// RemoveContainer implements [runtimeapi.RuntimeServiceServer].
func (f *Runtime) RemoveContainer(
	_ context.Context, r *runtimeapi.RemoveContainerRequest,
) (*runtimeapi.RemoveContainerResponse, error) {
	f.Mu.Lock()
	defer f.Mu.Unlock()
	if c := f.Find(r.GetContainerId()); c != nil {
		f.Remove(c)
	}
	return &runtimeapi.RemoveContainerResponse{}, nil
}

// Remove kills what runs. The caller holds f.mu.
func (f *Runtime) Remove(c *Container) {
	f.End(c, 137, "Error")
	if c.gate != nil {
		_ = c.gate.Close() // only read
	}
	delete(f.Containers, c.Status.GetId())
	delete(f.names, c.reserved)
}

// ListContainers implements [runtimeapi.RuntimeServiceServer].
func (f *Runtime) ListContainers(
	_ context.Context, r *runtimeapi.ListContainersRequest,
) (*runtimeapi.ListContainersResponse, error) {
	f.Mu.Lock()
	defer f.Mu.Unlock()
	resp := &runtimeapi.ListContainersResponse{}
	flt := r.GetFilter()
	for id, c := range f.Containers {
		s := c.Status
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

// ContainerStatus implements [runtimeapi.RuntimeServiceServer].
func (f *Runtime) ContainerStatus(
	_ context.Context, r *runtimeapi.ContainerStatusRequest,
) (*runtimeapi.ContainerStatusResponse, error) {
	f.Mu.Lock()
	defer f.Mu.Unlock()
	c := f.Find(r.GetContainerId())
	if c == nil {
		return nil, UnknownContainer(r.GetContainerId())
	}
	resp := &runtimeapi.ContainerStatusResponse{Status: proto.Clone(c.Status).(*runtimeapi.ContainerStatus)}
	if r.GetVerbose() {
		resp.Info = verbose(c.Config)
		if c.Told != "" {
			resp.Info = map[string]string{"info": c.Told}
		}
		if c.Process != nil {
			resp.Info = c.Process.verbose(c.Config)
		}
	}
	return resp, nil
}

// ExecSync implements [runtimeapi.RuntimeServiceServer].
func (f *Runtime) ExecSync(
	ctx context.Context, r *runtimeapi.ExecSyncRequest,
) (*runtimeapi.ExecSyncResponse, error) {
	f.Mu.Lock()
	c, exec := f.Find(r.GetContainerId()), f.OnExec
	state := runtimeapi.ContainerState_CONTAINER_UNKNOWN
	if c != nil {
		state = c.Status.GetState()
	}
	f.Mu.Unlock()
	switch {
	case c == nil:
		return nil, UnknownContainer(r.GetContainerId())
	case state != runtimeapi.ContainerState_CONTAINER_RUNNING:
		return nil, status.Errorf(codes.Unknown, "container is in %s state", state)
	case exec == nil:
		return &runtimeapi.ExecSyncResponse{}, nil
	}
	return exec(ctx, r)
}

// UpdateContainerResources implements [runtimeapi.RuntimeServiceServer].
func (f *Runtime) UpdateContainerResources(
	_ context.Context, r *runtimeapi.UpdateContainerResourcesRequest,
) (*runtimeapi.UpdateContainerResourcesResponse, error) {
	f.Mu.Lock()
	defer f.Mu.Unlock()
	c := f.Find(r.GetContainerId())
	if c == nil {
		return nil, UnknownContainer(r.GetContainerId())
	}
	c.Status.Resources = &runtimeapi.ContainerResources{
		Linux: criclone.OverlayResources(c.Status.GetResources().GetLinux(), r.GetLinux())}
	return &runtimeapi.UpdateContainerResourcesResponse{}, nil
}

// Direct is a connection to the runtime without a socket, for tests in a synctest bubble.
func Direct(f *Runtime) grpc.ClientConnInterface { return direct{f} }

type direct struct{ f *Runtime }

func (d direct) Invoke(ctx context.Context, method string, args, reply any, _ ...grpc.CallOption) error {
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

func (direct) NewStream(context.Context, *grpc.StreamDesc, string, ...grpc.CallOption) (grpc.ClientStream, error) {
	return nil, status.Error(codes.Unimplemented, "no streams here")
}
