// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package proxy_test

import (
	"context"
	"fmt"
	"net"
	"os"
	"path/filepath"

	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/cri-proxy/cri-proxy/proxy"
)

type exampleRuntime struct {
	runtimeapi.UnimplementedRuntimeServiceServer
}

func (exampleRuntime) Version(context.Context, *runtimeapi.VersionRequest) (*runtimeapi.VersionResponse, error) {
	return &runtimeapi.VersionResponse{RuntimeName: "containerd"}, nil
}

// A proxy without a director relays every call undecoded.
func ExampleServer() {
	if err := relayVersion(); err != nil {
		fmt.Println(err)
	}
	// Output: containerd
}

func relayVersion() error {
	dir, err := os.MkdirTemp("", "proxy")
	if err != nil {
		return err
	}
	defer os.RemoveAll(dir)

	// A runtime of one method.
	l, err := net.Listen("unix", filepath.Join(dir, "runtime.sock"))
	if err != nil {
		return err
	}
	runtime := grpc.NewServer()
	runtimeapi.RegisterRuntimeServiceServer(runtime, exampleRuntime{})
	go func() { _ = runtime.Serve(l) }()
	defer runtime.Stop()

	up, err := proxy.NewUpstream(filepath.Join(dir, "runtime.sock"), proxy.UpstreamOptions{})
	if err != nil {
		return err
	}
	defer up.Close()
	socket := filepath.Join(dir, "cri.sock")
	front, err := proxy.Listen(socket, proxy.ListenOptions{Mode: 0o600})
	if err != nil {
		return err
	}
	server := proxy.NewServer(up, proxy.Options{})
	go func() { _ = server.Serve(front) }()
	defer server.Stop()

	// kubelet.
	conn, err := grpc.NewClient("unix://"+socket, grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		return err
	}
	defer conn.Close()
	answer, err := runtimeapi.NewRuntimeServiceClient(conn).
		Version(context.Background(), &runtimeapi.VersionRequest{}, grpc.WaitForReady(true))
	if err != nil {
		return err
	}
	fmt.Println(answer.GetRuntimeName())
	return nil
}
