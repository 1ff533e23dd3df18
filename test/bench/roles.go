// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package main

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"time"

	"github.com/cri-proxy/cri-proxy/proxy"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"
)

// maxMessage is what kubelet and containerd allow each other.
const maxMessage = 16 << 20

// runRole runs one process of a benchmark until stdin ends.
func runRole(ctx context.Context, args []string) error {
	if len(args) < 2 {
		return errors.New("role: want ROLE SOCKET [TARGET]")
	}
	role, socket := args[0], args[1]
	target := ""
	if len(args) > 2 {
		target = args[2]
	}
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	switch role {
	case "fleet":
		return runFleet(ctx, socket, target)
	case "client":
		return client(ctx, socket)
	case "runtime":
		l, err := net.Listen("unix", socket)
		if err != nil {
			return err
		}
		s := grpc.NewServer(grpc.MaxRecvMsgSize(maxMessage), grpc.MaxSendMsgSize(maxMessage))
		runtimeapi.RegisterRuntimeServiceServer(s, newRuntime())
		go s.Serve(l) //nolint:errcheck // ends with Stop
		defer s.Stop()
		return answerUsed()
	case "proxy":
		proxy.LimitProcs()
		up, err := proxy.NewUpstream(target, proxy.UpstreamOptions{})
		if err != nil {
			return err
		}
		defer func() { _ = up.Close() }()
		s := proxy.NewServer(up, proxy.Options{})
		l, err := proxy.Listen(socket, proxy.ListenOptions{UID: -1, GID: -1})
		if err != nil {
			return err
		}
		go s.Serve(l) //nolint:errcheck // ends with Stop
		defer s.Stop()
		return answerUsed()
	case "relay":
		l, err := net.Listen("unix", socket)
		if err != nil {
			return err
		}
		var relays sync.WaitGroup
		relays.Go(func() { relay(ctx, l, target) })
		defer relays.Wait()
		defer l.Close()
		defer cancel()
		return answerUsed()
	}
	return fmt.Errorf("role %q is none of client, runtime, proxy, relay, fleet", role)
}

// answerUsed says ready and answers every line with the resources used.
func answerUsed() error {
	out := json.NewEncoder(os.Stdout)
	if err := out.Encode("ready"); err != nil {
		return err
	}
	for in := bufio.NewScanner(os.Stdin); in.Scan(); {
		var ru syscall.Rusage
		if err := syscall.Getrusage(syscall.RUSAGE_SELF, &ru); err != nil {
			return err
		}
		if err := out.Encode(used{CPU: time.Duration(ru.Utime.Nano() + ru.Stime.Nano())}); err != nil {
			return err
		}
	}
	return nil
}

// relay copies bytes between each connection and one of its own to target: the
// least that a proxy in user space can do.
func relay(ctx context.Context, l net.Listener, target string) {
	var copies sync.WaitGroup
	defer copies.Wait()
	for {
		from, err := l.Accept()
		if err != nil {
			return
		}
		to, err := net.Dial("unix", target)
		if err != nil {
			from.Close()
			continue
		}
		closeBoth := func() { from.Close(); to.Close() }
		stop := context.AfterFunc(ctx, closeBoth)
		half := func(dst, src net.Conn) {
			defer stop()
			defer closeBoth()
			// Plain read and write: without the wrapper io.Copy takes splice(2),
			// which costs small messages two system calls more.
			_, _ = io.CopyBuffer(struct{ io.Writer }{dst}, struct{ io.Reader }{src}, make([]byte, 64<<10))
		}
		copies.Go(func() { half(to, from) })
		copies.Go(func() { half(from, to) })
	}
}

// benchRuntime answers with containers of about 1.4 KB.
type benchRuntime struct {
	runtimeapi.UnimplementedRuntimeServiceServer
	status *runtimeapi.ContainerStatusResponse
	all    []*runtimeapi.Container
}

// annotations are as kubelet sets them, as long as needed.
func annotations(i, length int) map[string]string {
	return map[string]string{
		"io.kubernetes.container.hash":                   fmt.Sprintf("%08x", i*2654435761),
		"io.kubernetes.container.restartCount":           "0",
		"io.kubernetes.container.terminationMessagePath": "/dev/termination-log",
		"io.kubernetes.container.ports":                  strings.Repeat("x", length),
	}
}

func newRuntime() *benchRuntime {
	r := new(benchRuntime)
	labels := map[string]string{
		"io.kubernetes.container.name": "app",
		"io.kubernetes.pod.name":       "deployment-5d4f8c7b9-abcde",
		"io.kubernetes.pod.namespace":  "production",
		"io.kubernetes.pod.uid":        "8f2b1c9e-1111-2222-3333-444455556666",
	}
	for i := range 1000 {
		r.all = append(r.all, &runtimeapi.Container{
			Id:           fmt.Sprintf("%064x", i),
			PodSandboxId: fmt.Sprintf("%064x", i+1<<20),
			Metadata:     &runtimeapi.ContainerMetadata{Name: "app"},
			Image:        &runtimeapi.ImageSpec{Image: "registry.example/app@sha256:" + strings.Repeat("a", 64)},
			ImageRef:     "sha256:" + strings.Repeat("b", 64),
			State:        runtimeapi.ContainerState_CONTAINER_RUNNING,
			CreatedAt:    1_700_000_000_000_000_000 + int64(i),
			Labels:       labels,
			Annotations:  annotations(i, 570),
		})
	}
	r.status = &runtimeapi.ContainerStatusResponse{Status: &runtimeapi.ContainerStatus{
		Id:          fmt.Sprintf("%064x", 1),
		Metadata:    &runtimeapi.ContainerMetadata{Name: "app"},
		State:       runtimeapi.ContainerState_CONTAINER_RUNNING,
		CreatedAt:   1_700_000_000_000_000_000,
		StartedAt:   1_700_000_000_000_000_000,
		Image:       &runtimeapi.ImageSpec{Image: "registry.example/app:1"},
		ImageRef:    "sha256:" + strings.Repeat("b", 64),
		Labels:      labels,
		Annotations: annotations(1, 620),
		LogPath:     "/var/log/pods/production_deployment-5d4f8c7b9-abcde_8f2b1c9e/app/0.log",
	}}
	return r
}

func (r *benchRuntime) Version(context.Context, *runtimeapi.VersionRequest) (*runtimeapi.VersionResponse, error) {
	return &runtimeapi.VersionResponse{Version: "0.1.0", RuntimeName: "bench", RuntimeVersion: "1",
		RuntimeApiVersion: "v1"}, nil
}

func (r *benchRuntime) ContainerStatus(
	context.Context, *runtimeapi.ContainerStatusRequest,
) (*runtimeapi.ContainerStatusResponse, error) {
	return r.status, nil
}

// ListContainers answers as many as the filter's ID says; without one it has none.
func (r *benchRuntime) ListContainers(
	_ context.Context, req *runtimeapi.ListContainersRequest,
) (*runtimeapi.ListContainersResponse, error) {
	n, _ := strconv.Atoi(req.GetFilter().GetId())
	return &runtimeapi.ListContainersResponse{Containers: r.all[:n]}, nil
}

func (r *benchRuntime) ListPodSandbox(
	context.Context, *runtimeapi.ListPodSandboxRequest,
) (*runtimeapi.ListPodSandboxResponse, error) {
	return &runtimeapi.ListPodSandboxResponse{}, nil
}

// GetContainerEvents is silent.
func (r *benchRuntime) GetContainerEvents(
	_ *runtimeapi.GetEventsRequest, s runtimeapi.RuntimeService_GetContainerEventsServer,
) error {
	<-s.Context().Done()
	return s.Context().Err()
}

// batch is a question to a client.
type batch struct {
	List    int           `json:"list"`    // containers to list; 0: ContainerStatus
	Callers int           `json:"callers"` // at the same time
	Calls   int           `json:"calls"`   // of all callers together
	Pause   time.Duration `json:"pause"`   // of a caller between two calls
}

// times is a client's answer.
type times struct {
	Wall  time.Duration   `json:"wall"`
	Calls []time.Duration `json:"calls"`
}

// client makes the batches of calls that stdin asks for.
func client(ctx context.Context, socket string) error {
	conn, err := grpc.NewClient("unix://"+socket, // as kubelet's
		grpc.WithTransportCredentials(insecure.NewCredentials()),
		grpc.WithDefaultCallOptions(grpc.MaxCallRecvMsgSize(maxMessage)))
	if err != nil {
		return err
	}
	defer conn.Close()
	cri := runtimeapi.NewRuntimeServiceClient(conn)
	out := json.NewEncoder(os.Stdout)
	if err := out.Encode("ready"); err != nil {
		return err
	}
	for in := json.NewDecoder(os.Stdin); ; {
		var b batch
		switch err := in.Decode(&b); {
		case err == io.EOF:
			return nil
		case err != nil:
			return err
		}
		t, err := b.run(ctx, cri)
		if err != nil {
			return err
		}
		if err := out.Encode(t); err != nil {
			return err
		}
	}
}

func (b batch) run(ctx context.Context, cri runtimeapi.RuntimeServiceClient) (times, error) {
	var (
		callers sync.WaitGroup
		mu      sync.Mutex // guards all following
		t       times
		failed  error
	)
	began := time.Now()
	for range b.Callers {
		callers.Go(func() {
			took := make([]time.Duration, 0, b.Calls/b.Callers)
			var err error
			for range b.Calls / b.Callers {
				if b.Pause > 0 {
					time.Sleep(b.Pause) //nolint:forbidigo // kubelet's rhythm, not a wait for something
				}
				before := time.Now()
				if err = b.call(ctx, cri); err != nil {
					break
				}
				took = append(took, time.Since(before))
			}
			mu.Lock()
			defer mu.Unlock()
			t.Calls = append(t.Calls, took...)
			if err != nil {
				failed = err
			}
		})
	}
	callers.Wait()
	t.Wall = time.Since(began)
	return t, failed
}

// call makes one call with a deadline, as kubelet does.
func (b batch) call(ctx context.Context, cri runtimeapi.RuntimeServiceClient) error {
	ctx, cancel := context.WithTimeout(ctx, 2*time.Minute)
	defer cancel()
	if b.List == 0 {
		_, err := cri.ContainerStatus(ctx, &runtimeapi.ContainerStatusRequest{ContainerId: strings.Repeat("c", 64)})
		return err
	}
	r, err := cri.ListContainers(ctx,
		&runtimeapi.ListContainersRequest{Filter: &runtimeapi.ContainerFilter{Id: strconv.Itoa(b.List)}})
	if n := len(r.GetContainers()); err == nil && n != b.List {
		return fmt.Errorf("%d containers, want %d", n, b.List)
	}
	return err
}
