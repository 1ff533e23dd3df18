// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package integration

import (
	"context"
	"fmt"
	"io"
	"net"
	"os"
	"path/filepath"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/sirupsen/logrus"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"

	opsv1 "github.com/cri-proxy/cri-proxy/api/ops/v1"
	"github.com/cri-proxy/cri-proxy/interceptors"
	"github.com/cri-proxy/cri-proxy/interceptors/view"
	"github.com/cri-proxy/cri-proxy/ops"
	"github.com/cri-proxy/cri-proxy/ops/prepull"
	"github.com/cri-proxy/cri-proxy/proxy"
)

// node is the node side in this process: proxy, interceptors, engine and
// command server on sockets of their own, before the bed's containerd.
type node struct {
	*kubelet
	direct *kubelet // around the proxy
	ops    opsv1.OpsClient
	socket string
	stop   func()
}

var nodeNumber atomic.Int64

// shortDir returns a directory whose paths fit into a socket address.
func shortDir(t testing.TB) string {
	t.Helper()
	dir := filepath.Join(bed.dir, fmt.Sprintf("n%d", nodeNumber.Add(1)))
	if err := os.MkdirAll(dir, 0o700); err != nil {
		t.Fatal(err)
	}
	return dir
}

func startNode(t testing.TB) *node {
	t.Helper()
	return startNodeIn(t, shortDir(t))
}

// startNodeIn starts the node side over the state that is in dir.
func startNodeIn(t testing.TB, dir string) *node {
	t.Helper()
	log := logrus.New()
	log.SetLevel(logrus.DebugLevel)
	log.SetOutput(io.Discard)
	if testing.Verbose() {
		log.SetOutput(testWriter{t})
	}
	up, err := proxy.NewUpstream("unix://"+bed.runtime, proxy.UpstreamOptions{Log: log})
	must(t, err)
	view := view.New()
	puller, err := prepull.Open(prepull.Options{StateDir: dir, Conn: up.Conn(), Log: log, Parallel: 2,
		HostsDir: bed.hosts})
	must(t, err)
	engine, err := ops.Open(t.Context(), ops.Options{
		StateDir: dir, Conn: up.Conn(), View: view, Log: log, LegacyLogDir: filepath.Join(dir, "containers"),
		Images: puller,
	})
	must(t, err)
	director := interceptors.New(interceptors.Options{View: view, Records: engine.Records(), Runtime: up.Conn(),
		Log: log, Overrides: engine.Overrides(), Judge: engine})
	server := proxy.NewServer(up, proxy.Options{Director: director, Log: log})
	n := &node{socket: filepath.Join(dir, "cri.sock")}
	lis, err := proxy.Listen(n.socket, proxy.ListenOptions{Mode: 0o600})
	must(t, err)
	admin, err := net.Listen("unix", filepath.Join(dir, "admin.sock"))
	must(t, err)
	commands := grpc.NewServer()
	opsv1.RegisterOpsServer(commands,
		ops.NewServer(engine, func(context.Context) *opsv1.NodeInfoResponse { return &opsv1.NodeInfoResponse{} }))

	ctx, cancel := context.WithCancel(context.Background())
	var wg sync.WaitGroup
	wg.Go(func() { _ = server.Serve(lis) })
	wg.Go(func() { _ = commands.Serve(admin) })
	wg.Go(func() { _ = engine.Run(ctx) })
	wg.Go(func() { _ = puller.Run(ctx) })
	n.stop = sync.OnceFunc(func() {
		server.Stop()
		commands.Stop()
		cancel()
		wg.Wait()
		if err := engine.Close(); err != nil {
			t.Error(err)
		}
		if err := puller.Close(); err != nil {
			t.Error(err)
		}
		_ = up.Close()
	})
	t.Cleanup(n.stop)

	n.kubelet = dial(t, n.socket, bed.dir)
	n.direct = dial(t, bed.runtime, bed.dir)
	conn, err := grpc.NewClient("unix://"+filepath.Join(dir, "admin.sock"),
		grpc.WithTransportCredentials(insecure.NewCredentials()))
	must(t, err)
	t.Cleanup(func() { _ = conn.Close() })
	n.ops = opsv1.NewOpsClient(conn)
	return n
}

// restart runs a restart to its end.
func (n *node) restart(t testing.TB, p *pod, req *opsv1.RestartRequest) *opsv1.Operation {
	t.Helper()
	return n.wait(t, n.begin(t, p, req))
}

var operationNumber atomic.Int64

// begin asks for a restart; UID and pod are filled in.
func (n *node) begin(t testing.TB, p *pod, req *opsv1.RestartRequest) string {
	t.Helper()
	if req.GetUid() == "" {
		req.Uid = fmt.Sprintf("op-%d", operationNumber.Add(1))
	}
	req.Pod = &opsv1.PodRef{Namespace: "default", Name: p.name, Uid: p.uid}
	op, err := n.ops.Restart(t.Context(), req)
	must(t, err)
	return op.GetUid()
}

// wait follows an operation to its end.
func (n *node) wait(t testing.TB, uid string) *opsv1.Operation {
	t.Helper()
	return n.waitFor(t, uid, func(op *opsv1.Operation) bool { return op.GetFinishTime() != nil })
}

func (n *node) waitFor(t testing.TB, uid string, cond func(*opsv1.Operation) bool) *opsv1.Operation {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	stream, err := n.ops.WatchOperation(ctx, &opsv1.WatchOperationRequest{Uid: uid}, grpc.WaitForReady(true))
	must(t, err)
	for {
		op, err := stream.Recv()
		must(t, err)
		if cond(op) {
			return op
		}
		if op.GetFinishTime() != nil {
			t.Fatalf("operation has ended: %v", op)
		}
	}
}

func must(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

type testWriter struct{ t testing.TB }

func (w testWriter) Write(b []byte) (int, error) {
	w.t.Logf("%s", b)
	return len(b), nil
}
