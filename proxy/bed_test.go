// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package proxy_test

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"path/filepath"
	"reflect"
	"sync"
	"testing"
	"time"

	"github.com/cri-proxy/cri-proxy/proxy"
	"github.com/sirupsen/logrus"
	"go.uber.org/goleak"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/connectivity"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/encoding"
	protocodec "google.golang.org/grpc/encoding/proto"
	"google.golang.org/grpc/mem"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"
)

const (
	methodVersion = "/runtime.v1.RuntimeService/Version"
	methodEvents  = "/runtime.v1.RuntimeService/GetContainerEvents"
	methodList    = "/runtime.v1.RuntimeService/StreamContainers"
	methodNew     = "/runtime.v1.RuntimeService/NotYetInvented" // known service, unknown method
	methodAlien   = "/example.v9.AlienService/Probe"            // unknown service
)

// waitLong bounds every wait of a test; reaching it is a failure. A machine with too much to do is
// none.
const waitLong = 2 * time.Minute

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// bytesCodec sends *[]byte as it is. It copies, unlike the codec under test.
type bytesCodec struct{}

func (bytesCodec) Name() string { return "" }

func (bytesCodec) Marshal(v any) (mem.BufferSlice, error) {
	b, ok := v.(*[]byte)
	if !ok {
		return encoding.GetCodecV2(protocodec.Name).Marshal(v)
	}
	return mem.BufferSlice{mem.SliceBuffer(append([]byte{}, *b...))}, nil
}

func (bytesCodec) Unmarshal(data mem.BufferSlice, v any) error {
	b, ok := v.(*[]byte)
	if !ok {
		return encoding.GetCodecV2(protocodec.Name).Unmarshal(data, v)
	}
	*b = data.Materialize()
	return nil
}

// backend is a runtime whose every call is answered by serve.
type backend struct {
	path    string
	options []grpc.ServerOption

	mu     sync.Mutex // guards all following fields
	serve  func(method string, s grpc.ServerStream) error
	server *grpc.Server
	served chan struct{}
}

func (b *backend) start(t testing.TB) {
	t.Helper()
	l, err := net.Listen("unix", b.path)
	if err != nil {
		t.Fatal(err)
	}
	options := append([]grpc.ServerOption{
		grpc.ForceServerCodecV2(bytesCodec{}),
		grpc.UnknownServiceHandler(b.handle),
		grpc.MaxRecvMsgSize(64 << 20),
		grpc.WaitForHandlers(true),
	}, b.options...)
	server, served := grpc.NewServer(options...), make(chan struct{})
	b.mu.Lock()
	b.server, b.served = server, served
	b.mu.Unlock()
	go func() {
		defer close(served)
		_ = server.Serve(l)
	}()
}

func (b *backend) stop() {
	b.mu.Lock()
	server, served := b.server, b.served
	b.mu.Unlock()
	server.Stop()
	<-served
}

func (b *backend) answer(serve func(method string, s grpc.ServerStream) error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.serve = serve
}

func (b *backend) handle(_ any, s grpc.ServerStream) error {
	method, _ := grpc.MethodFromServerStream(s)
	b.mu.Lock()
	serve := b.serve
	b.mu.Unlock()
	return serve(method, s)
}

// bed is a backend, the proxy in front of it, and a connection to either.
type bed struct {
	backend  *backend
	upstream *proxy.Upstream
	server   *proxy.Server
	listen   string
	served   chan error

	direct, proxied *grpc.ClientConn
}

// newBed starts everything; the options may change it before.
func newBed(t testing.TB, o proxy.Options, backendOptions ...grpc.ServerOption) *bed {
	t.Helper()
	dir := t.TempDir()
	b := &bed{
		backend: &backend{path: filepath.Join(dir, "runtime.sock"), options: backendOptions},
		listen:  filepath.Join(dir, "proxy.sock"),
		served:  make(chan error, 1),
	}
	b.backend.answer(echo)
	b.backend.start(t)
	var err error
	if o.Log == nil {
		o.Log = quiet()
	}
	if b.upstream, err = proxy.NewUpstream("unix://"+b.backend.path, proxy.UpstreamOptions{Log: o.Log}); err != nil {
		t.Fatal(err)
	}
	b.server = proxy.NewServer(b.upstream, o)
	l, err := proxy.Listen(b.listen, proxy.ListenOptions{Mode: 0o600, UID: -1, GID: -1})
	if err != nil {
		t.Fatal(err)
	}
	go func() { b.served <- b.server.Serve(l) }()
	b.direct, b.proxied = dial(t, b.backend.path), dial(t, b.listen)
	t.Cleanup(func() {
		b.server.Stop()
		if err := <-b.served; err != nil {
			t.Errorf("Serve: %v", err)
		}
		if err := b.upstream.Close(); err != nil && b.upstream.State() != connectivity.Shutdown {
			t.Errorf("Close: %v", err)
		}
		b.backend.stop()
	})
	return b
}

func quiet() logrus.FieldLogger {
	l := logrus.New()
	l.SetOutput(io.Discard)
	return l
}

func dial(t testing.TB, path string, o ...grpc.DialOption) *grpc.ClientConn {
	t.Helper()
	conn, err := grpc.NewClient("unix://"+path, append([]grpc.DialOption{
		grpc.WithTransportCredentials(insecure.NewCredentials()),
		grpc.WithDefaultCallOptions(grpc.ForceCodecV2(bytesCodec{}), grpc.MaxCallRecvMsgSize(64<<20)),
	}, o...)...)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { conn.Close() })
	return conn
}

func testContext(t testing.TB) context.Context {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), waitLong)
	t.Cleanup(cancel)
	return ctx
}

// seen is all that one side of a call can observe. Messages, header and end are
// in order; the program adds marks of its own.
type seen struct {
	Events  []string
	Header  metadata.MD
	Trailer metadata.MD
	Code    codes.Code
	Message string
	Details []byte // the encoded google.rpc.Status
}

func (s *seen) mark(format string, args ...any) {
	s.Events = append(s.Events, fmt.Sprintf(format, args...))
}

func (s *seen) end(err error) {
	if errors.Is(err, io.EOF) {
		err = nil
	}
	st, ok := status.FromError(err)
	if !ok {
		s.mark("end with an error that is no status: %v", err)
	}
	s.Code, s.Message = st.Code(), st.Message()
	if s.Details, err = (proto.MarshalOptions{Deterministic: true}).Marshal(st.Proto()); err != nil {
		s.mark("status does not encode: %v", err)
	}
}

// same runs program against both connections and compares what client and
// backend observe. program gets a fresh record for the backend's side too.
func (b *bed) same(t testing.TB, program func(ctx context.Context, conn *grpc.ClientConn, backend *seen) *seen) *seen {
	t.Helper()
	var client, server [2]*seen
	for i, conn := range []*grpc.ClientConn{b.direct, b.proxied} {
		server[i] = new(seen)
		client[i] = program(testContext(t), conn, server[i])
	}
	if !reflect.DeepEqual(client[0], client[1]) {
		t.Errorf("the caller sees a difference\n direct: %+v\nproxied: %+v", client[0], client[1])
	}
	if !reflect.DeepEqual(server[0], server[1]) {
		t.Errorf("the runtime sees a difference\n direct: %+v\nproxied: %+v", server[0], server[1])
	}
	return client[1]
}

// exchangeMetadata is exchange with metadata.
func exchangeMetadata(ctx context.Context, conn *grpc.ClientConn, md metadata.MD, method string, reqs ...[]byte) *seen {
	return exchange(metadata.NewOutgoingContext(ctx, md), conn, method, reqs...)
}

// invoke makes a unary call.
func invoke(
	ctx context.Context, conn *grpc.ClientConn, method string, req []byte, o ...grpc.CallOption,
) (*seen, []byte) {
	var s seen
	var resp []byte
	err := conn.Invoke(ctx, method, &req, &resp, append(o, grpc.Header(&s.Header), grpc.Trailer(&s.Trailer))...)
	s.end(err)
	return &s, resp
}

var anyStream = grpc.StreamDesc{ServerStreams: true, ClientStreams: true}

// exchange sends all requests, half-closes and reads to the end.
func exchange(ctx context.Context, conn *grpc.ClientConn, method string, reqs ...[]byte) *seen {
	var s seen
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	stream, err := conn.NewStream(ctx, &anyStream, method)
	if err != nil {
		s.end(err)
		return &s
	}
	for _, r := range reqs {
		if stream.SendMsg(&r) != nil {
			break // the status comes from RecvMsg
		}
	}
	_ = stream.CloseSend()
	s.read(stream)
	return &s
}

// read reads header, messages, trailer and status.
func (s *seen) read(stream grpc.ClientStream) {
	s.Header, _ = stream.Header()
	for {
		var m []byte
		if err := stream.RecvMsg(&m); err != nil {
			s.Trailer = stream.Trailer()
			s.end(err)
			return
		}
		s.mark("message %s", digest(m))
	}
}

// digest tells messages apart in a failure's output.
func digest(b []byte) string {
	if len(b) <= 64 {
		return fmt.Sprintf("%q", b)
	}
	return fmt.Sprintf("%d bytes %x", len(b), sum(b))
}

// echo sends every message back.
func echo(_ string, s grpc.ServerStream) error {
	for {
		var m []byte
		switch err := s.RecvMsg(&m); {
		case err == nil:
		case errors.Is(err, io.EOF):
			return nil
		default:
			return err
		}
		if err := s.SendMsg(&m); err != nil {
			return err
		}
	}
}
