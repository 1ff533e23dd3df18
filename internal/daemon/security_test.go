// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package daemon

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/sirupsen/logrus"
	"golang.org/x/net/http2"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/encoding"
	"google.golang.org/grpc/mem"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	opsv1 "github.com/cri-proxy/cri-proxy/api/ops/v1"
	"github.com/cri-proxy/cri-proxy/internal/mtls/mtlstest"
	"github.com/cri-proxy/cri-proxy/ops/enrol"
)

// tcpDaemon is a daemon that takes commands over TCP, and what clients need to come in.
type tcpDaemon struct {
	*daemonUnderTest
	t       testing.TB
	ca      *mtlstest.CA
	address string
}

const controllerName = "cri-controller"

func newTCPDaemon(t testing.TB) *tcpDaemon {
	t.Helper()
	c := newConfig(t)
	d := &tcpDaemon{t: t, ca: mtlstest.NewCA(t, "ca")}
	c.Ops.Address = anyPort
	c.Ops.CertFile, c.Ops.KeyFile = d.ca.Issue(filepath.Dir(c.StateDir), "server",
		x509.Certificate{DNSNames: []string{"node"}, ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth}})
	c.Ops.ClientCAFile = d.ca.File
	c.Ops.AllowedClients = []string{controllerName}
	startRuntime(t, runtimePath(c))
	d.daemonUnderTest = start(t, c)
	d.address = d.daemonUnderTest.address(t, opsListens)
	return d
}

// client is the TLS of one who has a certificate of ca with the template's content.
func client(t testing.TB, ca *mtlstest.CA, template x509.Certificate) *tls.Config {
	t.Helper()
	cert, key := ca.Issue(t.TempDir(), "client", template)
	pair, err := tls.LoadX509KeyPair(cert, key)
	if err != nil {
		t.Fatal(err)
	}
	// Sent whatever the server asks for.
	return &tls.Config{InsecureSkipVerify: true, NextProtos: []string{"h2"},
		GetClientCertificate: func(*tls.CertificateRequestInfo) (*tls.Certificate, error) { return &pair, nil }}
}

func controllerCert() x509.Certificate {
	return x509.Certificate{Subject: pkix.Name{CommonName: controllerName},
		ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth}}
}

// healthy: the controller is let in, and kubelet is served.
func (d *tcpDaemon) healthy() {
	d.t.Helper()
	if info, err := callNodeInfo(d.t, d.address, credentials.NewTLS(client(d.t, d.ca, controllerCert()))); err != nil ||
		info.GetNodeName() != "node" {
		d.t.Errorf("the controller is not let in: %v %v", info, err)
	}
	ctx, cancel := context.WithTimeout(d.t.Context(), deadline)
	defer cancel()
	if _, err := runtimeapi.NewRuntimeServiceClient(dial(d.t, d.config.Listen.Path)).
		Version(ctx, &runtimeapi.VersionRequest{}, grpc.WaitForReady(true)); err != nil {
		d.t.Errorf("kubelet is not served: %v", err)
	}
	if d.logged("panic") {
		d.t.Errorf("there was a panic: %v", entries(d.log))
	}
}

// said waits for a log line with all these in it: clients know of a refusal a moment before it is
// logged.
func (d *tcpDaemon) said(what ...string) {
	d.t.Helper()
	end := time.Now().Add(deadline)
	for {
		for _, line := range entries(d.log) {
			all := true
			for _, w := range what {
				all = all && strings.Contains(line, w)
			}
			if all {
				return
			}
		}
		if time.Now().After(end) {
			d.t.Errorf("%q is not logged: %v", what, entries(d.log))
			return
		}
		time.Sleep(time.Millisecond) // polling the log
	}
}

func (d *tcpDaemon) conn() *grpc.ClientConn {
	d.t.Helper()
	conn, err := grpc.NewClient(d.address,
		grpc.WithTransportCredentials(credentials.NewTLS(client(d.t, d.ca, controllerCert()))))
	if err != nil {
		d.t.Fatal(err)
	}
	d.t.Cleanup(func() { conn.Close() })
	return conn
}

func TestOthersAreRefused(t *testing.T) {
	other := mtlstest.NewCA(t, "other")
	for _, tt := range []struct {
		name   string
		client func(*tcpDaemon) *tls.Config // nil: no TLS
		says   string
	}{
		{"no TLS", nil, "first record does not look like a TLS handshake"},
		{"no certificate",
			func(*tcpDaemon) *tls.Config { return &tls.Config{InsecureSkipVerify: true, NextProtos: []string{"h2"}} },
			"client didn't provide a certificate"},
		{"TLS 1.2", func(d *tcpDaemon) *tls.Config {
			c := client(t, d.ca, controllerCert())
			c.MaxVersion = tls.VersionTLS12
			return c
		}, "unsupported versions"},
		{"another CA", func(*tcpDaemon) *tls.Config { return client(t, other, controllerCert()) }, "unknown authority"},
		{"another name", func(d *tcpDaemon) *tls.Config {
			return client(t, d.ca, x509.Certificate{Subject: pkix.Name{CommonName: "cri-controller2"}})
		}, "none of them is among the allowed clients"},
		{"no name", func(d *tcpDaemon) *tls.Config { return client(t, d.ca, x509.Certificate{}) },
			"none of them is among the allowed clients"},
		{"the name as an organization", func(d *tcpDaemon) *tls.Config {
			return client(t, d.ca, x509.Certificate{Subject: pkix.Name{Organization: []string{controllerName}}})
		}, "none of them is among the allowed clients"},
		{"a node's certificate", func(d *tcpDaemon) *tls.Config {
			return client(t, d.ca,
				x509.Certificate{Subject: pkix.Name{CommonName: "node-2"}, DNSNames: []string{"node-2"},
					ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth}})
		}, "incompatible key usage"},
		{"a node's that is named as the controller", func(d *tcpDaemon) *tls.Config {
			return client(t, d.ca, x509.Certificate{Subject: pkix.Name{CommonName: controllerName},
				ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth}})
		}, "incompatible key usage"},
		{"expired", func(d *tcpDaemon) *tls.Config {
			c := controllerCert()
			c.NotBefore, c.NotAfter = time.Now().Add(-2*time.Hour), time.Now().Add(-time.Minute)
			return client(t, d.ca, c)
		}, "expired"},
		{"not valid yet", func(d *tcpDaemon) *tls.Config {
			c := controllerCert()
			c.NotBefore, c.NotAfter = time.Now().Add(time.Minute), time.Now().Add(time.Hour)
			return client(t, d.ca, c)
		}, "not yet valid"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			d := newTCPDaemon(t)
			if tt.client == nil {
				c, err := net.Dial("tcp", d.address)
				if err != nil {
					t.Fatal(err)
				}
				_, _ = io.WriteString(c, http2.ClientPreface)
				_ = c.SetReadDeadline(time.Now().Add(deadline))
				if _, err := io.ReadAll(c); errors.Is(err, os.ErrDeadlineExceeded) {
					t.Error("not hung up")
				}
				c.Close()
			} else if info,
				err := callNodeInfo(t, d.address, credentials.NewTLS(tt.client(d))); status.Code(
				err) != codes.Unavailable {
				t.Errorf("%v %v", info, err)
			}
			d.said("ops client denied", tt.says, "127.0.0.1:")
			d.healthy()
		})
	}
}

func TestRequestsAreBounded(t *testing.T) {
	d := newTCPDaemon(t)
	ctx, cancel := context.WithTimeout(t.Context(), deadline)
	defer cancel()
	conn := d.conn()
	if _, err := opsv1.NewOpsClient(conn).
		Restart(ctx, &opsv1.RestartRequest{Uid: strings.Repeat("x", 17<<20)}); status.Code(
		err) != codes.ResourceExhausted {
		t.Errorf("large message: %v", err)
	}
	d.said("ops call refused", "Restart", "larger than max")
	large := metadata.AppendToOutgoingContext(ctx, "x", strings.Repeat("x", 64<<10))
	if _, err := opsv1.NewOpsClient(conn).NodeInfo(large, &opsv1.NodeInfoRequest{}); err == nil {
		t.Error("large header accepted")
	}
	if err := conn.Invoke(ctx, "/criproxy.ops.v1.Ops/"+strings.Repeat("x", 300), &opsv1.NodeInfoRequest{},
		&opsv1.NodeInfoResponse{}); status.Code(err) != codes.Unimplemented {
		t.Errorf("unknown method: %v", err)
	}
	d.said("ops call refused", "unknown method")
	if err := conn.Invoke(ctx, "/criproxy.ops.v1.Ops/\xff\xfe", &opsv1.NodeInfoRequest{},
		&opsv1.NodeInfoResponse{}); err == nil {
		t.Error("a method that is no text is accepted")
	}
	d.healthy()
}

// TestSlowUnauthenticated: connections that do not speak take all places, and the controller comes
// in nevertheless.
func TestSlowUnauthenticated(t *testing.T) {
	t.Parallel()
	d := newTCPDaemon(t)
	for range 70 {
		c, err := net.Dial("tcp", d.address)
		if err != nil {
			t.Fatal(err)
		}
		defer c.Close()
	}
	ctx, cancel := context.WithTimeout(t.Context(), 2*deadline)
	defer cancel()
	if _, err := opsv1.NewOpsClient(d.conn()).
		NodeInfo(ctx, &opsv1.NodeInfoRequest{}, grpc.WaitForReady(true)); err != nil {
		t.Errorf("the controller does not come in: %v", err)
	}
	d.healthy()
}

func TestCommandsAreRepeatableAndAudited(t *testing.T) {
	d := newTCPDaemon(t)
	ctx, cancel := context.WithTimeout(t.Context(), deadline)
	defer cancel()
	images, node := opsv1.NewImagesClient(d.conn()), opsv1.NewOpsClient(d.conn())
	pull := &opsv1.PullRequest{
		Uid: "op-1", Image: "registry.example/a:1", Owner: "ImagePullJob/default/a/1234",
		Credentials: []*opsv1.RegistryCredential{{Match: "registry.example", Username: "u", Password: "the-password"}},
	}
	for range 2 {
		if op, err := images.Pull(ctx, pull); err != nil || op.GetUid() != "op-1" {
			t.Fatal(op, err)
		}
	}
	other := proto.Clone(pull).(*opsv1.PullRequest)
	other.Image = "registry.example/b:1"
	if _, err := images.Pull(ctx, other); status.Code(err) != codes.AlreadyExists {
		t.Errorf("the same UID with another image: %v", err)
	}
	if list, err := images.ListPulls(ctx, &opsv1.ListPullsRequest{}); err != nil || len(list.GetPulls()) != 1 {
		t.Errorf("%v %v", list, err)
	}
	_, err := node.Restart(ctx, &opsv1.RestartRequest{
		Uid: "op-2", Pod: &opsv1.PodRef{Namespace: "default", Name: "p"},
		Requester: "ContainerRecreateRequest/default/c/5678",
		Containers: []*opsv1.ContainerRestart{
			{Name: "one",
				PreStop: &opsv1.Hook{
					Action: &opsv1.Hook_Exec{Exec: &opsv1.ExecAction{Command: []string{"the-secret-word"}}}}},
			{Name: "two"}},
	})
	if status.Code(err) != codes.InvalidArgument {
		t.Errorf("without the pod's UID: %v", err)
	}
	if _, err := images.CancelPull(ctx, &opsv1.CancelPullRequest{Uid: "op-1"}); err != nil {
		t.Error(err)
	}

	var lines []string
	for _, e := range d.log.AllEntries() {
		if e.Data["audit"] == nil {
			continue
		}
		remote, _ := e.Data["remote"].(string)
		if !strings.HasPrefix(remote, "127.0.0.1:") || e.Data["client"] != controllerName {
			t.Errorf("who? %v", e.Data)
		}
		lines = append(lines, fmt.Sprint(e.Level, " ", e.Message, " ", e.Data["method"], " ", e.Data["op"], " ",
			e.Data["pod"], " ", e.Data["container"], " ", e.Data["image"], " ", e.Data["requester"], " ",
			e.Data["code"]))
	}
	want := []string{
		"info command accepted Pull op-1 <nil> <nil> registry.example/a:1 ImagePullJob/default/a/1234 OK",
		"info command accepted Pull op-1 <nil> <nil> registry.example/a:1 ImagePullJob/default/a/1234 OK",
		"warning command refused Pull op-1 <nil> <nil> registry.example/b:1 ImagePullJob/default/a/1234 AlreadyExists",
		"warning command refused Restart op-2 default/p one,two <nil> ContainerRecreateRequest/default/c/5678 " +
			"InvalidArgument",
		"info command accepted CancelPull op-1 <nil> <nil> registry.example/a:1 ImagePullJob/default/a/1234 OK",
	}
	if got := strings.Join(lines, "\n"); got != strings.Join(want, "\n") {
		t.Errorf("audited\n%s\nwant\n%s", got, strings.Join(want, "\n"))
	}
	for _, line := range entries(d.log) {
		if strings.Contains(line, "the-password") || strings.Contains(line, "the-secret-word") {
			t.Errorf("a secret is logged: %s", line)
		}
	}
}

// TestEnrolment: neither kubelet nor root waits for a certificate, and who comes for commands is
// told nothing but no until there is one.
func TestEnrolment(t *testing.T) {
	c := newConfig(t)
	c.Ops.Address = anyPort
	c.Ops.Enrol.Kubeconfig = filepath.Join(filepath.Dir(c.StateDir), "kubelet.conf") // not there
	startRuntime(t, runtimePath(c))
	d := &tcpDaemon{daemonUnderTest: start(t, c), t: t, ca: mtlstest.NewCA(t, "ca")}
	d.address = d.daemonUnderTest.address(t, opsListens)
	d.said("identity of this node", "kubelet.conf: no such file") // it has tried, and knows why
	if _, err := callNodeInfo(t, d.address, credentials.NewTLS(client(t, d.ca, controllerCert()))); status.Code(
		err) != codes.Unavailable {
		t.Errorf("let in: %v", err)
	}
	d.said("ops client denied", "this node has no certificate yet", "kubelet.conf: no such file")
	info, err := opsv1.NewOpsClient(dial(t, c.AdminSocket)).NodeInfo(t.Context(), &opsv1.NodeInfoRequest{})
	if err != nil {
		t.Fatal(err)
	}
	if i := info.GetIdentity(); i.GetSource() != "controller" || i.GetExpireTime() != nil ||
		!strings.Contains(i.GetProblem(), "no such file") || i.GetRetryTime() == nil {
		t.Errorf("%v", i)
	}

	// What it gets is taken up as it comes.
	dir := enrol.Directory(c.StateDir)
	if err := os.MkdirAll(dir, 0o700); err != nil {
		t.Fatal(err)
	}
	cert, key := d.ca.Issue(dir, "node",
		x509.Certificate{Subject: pkix.Name{CommonName: "node"}, DNSNames: []string{"node"}})
	both := ""
	for _, f := range []string{cert, key} {
		text, err := os.ReadFile(f)
		if err != nil {
			t.Fatal(err)
		}
		both += string(text)
	}
	roots, err := os.ReadFile(d.ca.File)
	if err != nil {
		t.Fatal(err)
	}
	for file, text := range map[string]string{enrol.CertFile(c.StateDir): both,
		enrol.CAFile(c.StateDir): string(roots)} {
		if err := os.WriteFile(file, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	d.healthy()
}

// rawCodec sends bytes as they are.
type rawCodec struct{}

func (rawCodec) Marshal(v any) (mem.BufferSlice, error) {
	return mem.BufferSlice{mem.SliceBuffer(*v.(*[]byte))}, nil
}

func (rawCodec) Unmarshal(data mem.BufferSlice, v any) error {
	*v.(*[]byte) = data.Materialize()
	return nil
}

func (rawCodec) Name() string { return "proto" }

var _ encoding.CodecV2 = rawCodec{}

// FuzzCommands sends any bytes as any command, and as HTTP/2 frames, to a daemon whose client is
// let in. It must go on serving.
func FuzzCommands(f *testing.F) {
	var methods []string
	for _, s := range []grpc.ServiceDesc{opsv1.Ops_ServiceDesc, opsv1.Images_ServiceDesc} {
		for _, m := range s.Methods {
			methods = append(methods, "/"+s.ServiceName+"/"+m.MethodName)
		}
		for _, m := range s.Streams {
			methods = append(methods, "/"+s.ServiceName+"/"+m.StreamName)
		}
	}
	restart, err := proto.Marshal(&opsv1.RestartRequest{Uid: "u",
		Pod:        &opsv1.PodRef{Namespace: "n", Name: "p", Uid: "u"},
		Containers: []*opsv1.ContainerRestart{{Name: "c", Image: "i"}, nil}})
	if err != nil {
		f.Fatal(err)
	}
	pull, err := proto.Marshal(&opsv1.PullRequest{Uid: "u", Image: "a:b",
		Credentials: []*opsv1.RegistryCredential{{Match: "*"}, nil}})
	if err != nil {
		f.Fatal(err)
	}
	for i := range methods {
		for _, seed := range [][]byte{nil, restart, pull, {0xff, 0xff, 0xff}, []byte("\n\x01u")} {
			f.Add(uint8(i), seed)
		}
	}
	const frames = 0xff
	// SETTINGS of a wrong size
	f.Add(uint8(frames), []byte{0, 0, 1, 4, 0, 0, 0, 0, 0, 0})
	// HEADERS that cannot be read
	f.Add(uint8(frames), append([]byte{0, 0, 0, 4, 0, 0, 0, 0, 0}, 0, 0, 3, 1, 5, 0, 0, 0, 1, 0xff, 0, 0))
	// DATA of 16 MiB
	f.Add(uint8(frames), []byte{0xff, 0xff, 0xff, 0, 0, 0, 0, 0, 1})
	f.Add(uint8(frames), []byte("GET / HTTP/1.1\r\n\r\n"))

	d := newTCPDaemon(f)
	conn := d.conn()
	secure := client(f, d.ca, controllerCert())
	f.Fuzz(func(t *testing.T, which uint8, payload []byte) {
		ctx, cancel := context.WithTimeout(t.Context(), 200*time.Millisecond)
		defer cancel()
		if which == frames {
			raw, err := (&tls.Dialer{Config: secure}).DialContext(t.Context(), "tcp", d.address)
			if err != nil {
				t.Fatal(err)
			}
			defer raw.Close()
			_, _ = raw.Write(append([]byte(http2.ClientPreface), payload...))
			_ = raw.SetReadDeadline(time.Now().Add(50 * time.Millisecond))
			_, _ = io.Copy(io.Discard, raw)
		} else if stream, err := conn.NewStream(ctx, &grpc.StreamDesc{ClientStreams: true, ServerStreams: true},
			methods[int(which)%len(methods)], grpc.ForceCodecV2(rawCodec{})); err == nil {
			_ = stream.SendMsg(&payload)
			_ = stream.CloseSend()
			for answer := new([]byte); err == nil; {
				err = stream.RecvMsg(answer)
			}
		}
		check, cancelCheck := context.WithTimeout(t.Context(), deadline)
		defer cancelCheck()
		if _, err := opsv1.NewOpsClient(conn).GetOperation(check, &opsv1.GetOperationRequest{Uid: "none"},
			grpc.WaitForReady(true)); status.Code(err) != codes.NotFound {
			t.Errorf("does not answer any more: %v", err)
		}
		for _, e := range d.log.AllEntries() {
			if e.Level <= logrus.ErrorLevel {
				line, _ := e.String()
				t.Fatal(line)
			}
		}
		d.log.Reset()
	})
}
