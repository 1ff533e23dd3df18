// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package faultproxy

import (
	"context"
	"fmt"
	"net"
	"path/filepath"
	"slices"
	"sync"
	"testing"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/status"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/cri-proxy/cri-proxy/interceptors/view"
)

// runtime counts what reaches it. A real one would add nothing here: the matrix has it.
type runtime struct {
	runtimeapi.UnimplementedRuntimeServiceServer
	mu   sync.Mutex
	seen []string // guarded by mu
}

func (r *runtime) note(s string) int {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.seen = append(r.seen, s)
	return len(r.seen)
}

func (r *runtime) Version(context.Context, *runtimeapi.VersionRequest) (*runtimeapi.VersionResponse, error) {
	return &runtimeapi.VersionResponse{Version: "1"}, nil
}

func (r *runtime) CreateContainer(
	context.Context, *runtimeapi.CreateContainerRequest,
) (*runtimeapi.CreateContainerResponse, error) {
	return &runtimeapi.CreateContainerResponse{ContainerId: fmt.Sprintf("c%d", r.note("create"))}, nil
}

func (r *runtime) StopContainer(
	_ context.Context, m *runtimeapi.StopContainerRequest,
) (*runtimeapi.StopContainerResponse, error) {
	r.note("stop " + m.GetContainerId())
	return &runtimeapi.StopContainerResponse{}, nil
}

func (r *runtime) StartContainer(
	_ context.Context, m *runtimeapi.StartContainerRequest,
) (*runtimeapi.StartContainerResponse, error) {
	r.note("start " + m.GetContainerId())
	return &runtimeapi.StartContainerResponse{}, nil
}

func start(t *testing.T) (*Proxy, runtimeapi.RuntimeServiceClient, *runtime) {
	t.Helper()
	dir := t.TempDir()
	l, err := net.Listen("unix", filepath.Join(dir, "rt.sock"))
	if err != nil {
		t.Fatal(err)
	}
	rt, server := &runtime{}, grpc.NewServer()
	runtimeapi.RegisterRuntimeServiceServer(server, rt)
	go func() { _ = server.Serve(l) }()
	t.Cleanup(server.Stop)
	p, err := Start(filepath.Join(dir, "p.sock"), filepath.Join(dir, "rt.sock"))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := p.Close(); err != nil {
			t.Error(err)
		}
	})
	conn, err := grpc.NewClient("unix://"+filepath.Join(dir, "p.sock"),
		grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = conn.Close() })
	client := runtimeapi.NewRuntimeServiceClient(conn)
	if _, err := client.Version(t.Context(), &runtimeapi.VersionRequest{}, grpc.WaitForReady(true)); err != nil {
		t.Fatal(err)
	}
	return p, client, rt
}

func create(pod string, staged bool) *runtimeapi.CreateContainerRequest {
	c := &runtimeapi.ContainerConfig{Labels: map[string]string{labelPodUID: pod, labelContainer: "app"},
		Annotations: map[string]string{}}
	if staged {
		c.Annotations[view.StagedAnnotation] = "token"
	}
	return &runtimeapi.CreateContainerRequest{Config: c}
}

func want(t *testing.T, err error, code codes.Code) {
	t.Helper()
	if status.Code(err) != code {
		t.Errorf("answer %v, want %s", err, code)
	}
}

func TestOnlyTheRestartIsHit(t *testing.T) {
	p, client, rt := start(t)
	ctx := t.Context()
	p.Watch("pod", "app")
	staged, err := client.CreateContainer(ctx, create("pod", true))
	want(t, err, codes.OK)
	p.Arm(Fault{PodUID: "pod", Container: "app", Incumbent: "c0", Times: 3, Code: codes.Unknown})

	_, err = client.CreateContainer(ctx, create("pod", false)) // kubelet's
	want(t, err, codes.OK)
	_, err = client.CreateContainer(ctx, create("other", true))
	want(t, err, codes.OK)
	_, err = client.StopContainer(ctx, &runtimeapi.StopContainerRequest{ContainerId: "x"})
	want(t, err, codes.OK)

	_, err = client.StopContainer(ctx, &runtimeapi.StopContainerRequest{ContainerId: "c0"})
	want(t, err, codes.Unknown)
	_, err = client.StartContainer(ctx, &runtimeapi.StartContainerRequest{ContainerId: staged.GetContainerId()})
	want(t, err, codes.Unknown)
	_, err = client.CreateContainer(ctx, create("pod", true))
	want(t, err, codes.Unknown)
	_, err = client.StopContainer(ctx, &runtimeapi.StopContainerRequest{ContainerId: "c0"})
	want(t, err, codes.OK) // used up
	if hits := p.Disarm(); !slices.Equal(hits, []string{"StopContainer", "StartContainer", "CreateContainer"}) {
		t.Errorf("hits: %q", hits)
	}
	if w := []string{"create", "create", "create", "stop x", "stop c0"}; !slices.Equal(rt.seen, w) {
		t.Errorf("the runtime saw %q, want %q", rt.seen, w)
	}
}

func TestLostAnswer(t *testing.T) {
	p, client, rt := start(t)
	p.Arm(Fault{PodUID: "pod", Container: "app", Incumbent: "c0", Methods: []string{"CreateContainer"}, Times: 1,
		Code: codes.Unavailable, Lost: true})
	_, err := client.StopContainer(t.Context(), &runtimeapi.StopContainerRequest{ContainerId: "c0"})
	want(t, err, codes.OK)
	_, err = client.CreateContainer(t.Context(), create("pod", true))
	want(t, err, codes.Unavailable)
	if w := []string{"stop c0", "create"}; !slices.Equal(rt.seen, w) {
		t.Errorf("the runtime saw %q, want %q", rt.seen, w)
	}
}

func TestDisarm(t *testing.T) {
	p, client, _ := start(t)
	p.Arm(Fault{PodUID: "pod", Container: "app", Incumbent: "c0", Times: 1, Code: codes.Unknown})
	p.Disarm()
	_, err := client.StopContainer(t.Context(), &runtimeapi.StopContainerRequest{ContainerId: "c0"})
	want(t, err, codes.OK)
}
