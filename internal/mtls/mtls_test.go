// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package mtls_test

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"errors"
	"fmt"
	"net"
	"net/url"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/sirupsen/logrus"
	logtest "github.com/sirupsen/logrus/hooks/test"
	"go.uber.org/goleak"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/connectivity"
	"google.golang.org/grpc/credentials"
	healthpb "google.golang.org/grpc/health/grpc_health_v1"
	"google.golang.org/grpc/status"

	"github.com/cri-proxy/cri-proxy/internal/mtls"
	"github.com/cri-proxy/cri-proxy/internal/mtls/mtlstest"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// waitLong bounds every wait of a test; reaching it is a failure.
const waitLong = 2 * time.Minute

// allowed is the one name that the test servers let in, in each of its forms.
const (
	allowed    = "cri-controller.system"
	allowedURI = "spiffe://cluster/ns/system/sa/cri-controller"
)

// echoName answers with the client's name, by the error message for want of a
// field in the health protocol.
type echoName struct {
	healthpb.UnimplementedHealthServer
}

func (echoName) Check(ctx context.Context, _ *healthpb.HealthCheckRequest) (*healthpb.HealthCheckResponse, error) {
	name, ok := mtls.ClientName(ctx)
	return nil, status.Errorf(codes.AlreadyExists, "%s %t", name, ok)
}

func (echoName) Watch(_ *healthpb.HealthCheckRequest, s healthpb.Health_WatchServer) error {
	name, ok := mtls.ClientName(s.Context())
	return status.Errorf(codes.AlreadyExists, "%s %t", name, ok)
}

// bed is a server with credentials of ca at addr.
type bed struct {
	ca       *mtlstest.CA
	dir      string // of the server's files
	addr     string
	clientCA string // file that the server reads
	log      *logtest.Hook
	unknown  *atomic.Int64 // how often it was told to look for other authorities
}

func newBed(t *testing.T) *bed {
	t.Helper()
	b := &bed{ca: mtlstest.NewCA(t, "ca"), dir: t.TempDir(), unknown: &atomic.Int64{}}
	cert, key := b.ca.Issue(b.dir, "server",
		x509.Certificate{DNSNames: []string{"node"}, IPAddresses: []net.IP{net.IPv4(127, 0, 0, 1)}})
	b.clientCA = filepath.Join(b.dir, "clients.pem")
	b.trust(t, b.ca)
	log, hook := logtest.NewNullLogger()
	b.log = hook
	s, err := mtls.NewServer(mtls.ServerOptions{CertFile: cert, KeyFile: key, ClientCAFile: b.clientCA,
		AllowedClients: []string{allowed, allowedURI}, Log: log, Unknown: func() { b.unknown.Add(1) }})
	if err != nil {
		t.Fatal(err)
	}
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	b.addr = l.Addr().String()
	srv := grpc.NewServer(s.GRPC()...)
	healthpb.RegisterHealthServer(srv, echoName{})
	var owned sync.WaitGroup
	owned.Go(func() { _ = srv.Serve(mtls.LimitListener(l)) })
	t.Cleanup(func() {
		srv.Stop()
		owned.Wait()
	})
	return b
}

// trust makes the server trust clients of these authorities.
func (b *bed) trust(t *testing.T, cas ...*mtlstest.CA) {
	t.Helper()
	var pem []byte
	for _, ca := range cas {
		one, err := os.ReadFile(ca.File)
		if err != nil {
			t.Fatal(err)
		}
		pem = append(pem, one...)
	}
	if err := os.WriteFile(b.clientCA+".next", pem, 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.Rename(b.clientCA+".next", b.clientCA); err != nil {
		t.Fatal(err)
	}
}

func (b *bed) client(t *testing.T, cert, key string) credentials.TransportCredentials {
	t.Helper()
	creds, err := mtls.NewClient(mtls.ClientOptions{CertFile: cert, KeyFile: key, ServerCAFile: b.ca.File,
		Log: logrus.New()})
	if err != nil {
		t.Fatal(err)
	}
	return creds
}

// call makes a unary call and a stream and returns the names that the server saw
// (they must agree), or the error.
func (b *bed) call(t *testing.T, creds credentials.TransportCredentials) (string, error) {
	t.Helper()
	conn, err := grpc.NewClient(b.addr, grpc.WithTransportCredentials(creds))
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	ctx, cancel := context.WithTimeout(t.Context(), waitLong)
	defer cancel()
	client := healthpb.NewHealthClient(conn)
	_, err = client.Check(ctx, &healthpb.HealthCheckRequest{})
	if status.Code(err) != codes.AlreadyExists {
		return "", err
	}
	unary := status.Convert(err).Message()
	stream, err := client.Watch(ctx, &healthpb.HealthCheckRequest{})
	if err != nil {
		return "", err
	}
	_, err = stream.Recv()
	if streamed := status.Convert(err).Message(); streamed != unary {
		t.Errorf("stream: %q, unary call: %q", streamed, unary)
	}
	return strings.TrimSuffix(unary, " true"), nil
}

func TestServerLetsIn(t *testing.T) {
	uri, err := url.Parse(allowedURI)
	if err != nil {
		t.Fatal(err)
	}
	other := mtlstest.NewCA(t, "other")
	for _, tt := range []struct {
		name     string
		ca       *mtlstest.CA // nil: the right one
		template x509.Certificate
		want     string // the client's name; empty: denied
		logged   string
	}{
		{name: "dns name", template: x509.Certificate{DNSNames: []string{"x", allowed}}, want: allowed},
		{name: "uri", template: x509.Certificate{URIs: []*url.URL{uri}}, want: allowedURI},
		{name: "common name", template: x509.Certificate{Subject: pkix.Name{CommonName: allowed}}, want: allowed},
		{name: "wrong name", template: x509.Certificate{Subject: pkix.Name{CommonName: "somebody"},
			DNSNames: []string{"else"}}, logged: `["else" "somebody"]`},
		{name: "name in other letters", template: x509.Certificate{DNSNames: []string{strings.ToUpper(allowed)}},
			logged: "none of them is among the allowed clients"},
		{name: "allowed name as a part", template: x509.Certificate{DNSNames: []string{"a." + allowed}},
			logged: "none of them is among the allowed clients"},
		{name: "no name", template: x509.Certificate{}, logged: "none of them is among the allowed clients"},
		{name: "wrong ca", ca: other, template: x509.Certificate{DNSNames: []string{allowed}},
			logged: "unknown authority"},
		{name: "expired",
			template: x509.Certificate{DNSNames: []string{allowed}, NotBefore: time.Now().Add(-2 * time.Hour),
				NotAfter: time.Now().Add(-time.Hour)}, logged: "expired"},
		{name: "server certificate",
			template: x509.Certificate{DNSNames: []string{allowed},
				ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth}}, logged: "incompatible key usage"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			b := newBed(t)
			ca := tt.ca
			if ca == nil {
				ca = b.ca
			}
			cert, key := ca.Issue(t.TempDir(), "client", tt.template)
			got, err := b.call(t, b.client(t, cert, key))
			if tt.want != "" {
				if err != nil || got != tt.want {
					t.Fatalf("got %q, %v, want %q", got, err, tt.want)
				}
				return
			}
			if status.Code(err) != codes.Unavailable {
				t.Fatalf("got %q, %v, want the connection refused", got, err)
			}
			// The client knows of the refusal a moment before the server has logged it.
			e := b.log.LastEntry()
			for deadline := time.Now().Add(waitLong); e == nil && time.Now().Before(deadline); e = b.log.LastEntry() {
				runtime.Gosched()
			}
			if e == nil || e.Message != "ops client denied" ||
				!strings.Contains(e.Data[logrus.ErrorKey].(error).Error(), tt.logged) {
				t.Fatalf("logged %+v, want a denial with %s", e, tt.logged)
			}
			if remote, _ := e.Data["remote"].(string); !strings.HasPrefix(remote, "127.0.0.1:") {
				t.Errorf("remote %q", remote)
			}
		})
	}
}

func TestServerRefusesOtherTLS(t *testing.T) {
	for name, change := range map[string]func(*tls.Config){
		"no certificate": func(c *tls.Config) { c.Certificates = nil },
		"TLS 1.2":        func(c *tls.Config) { c.MaxVersion = tls.VersionTLS12 },
	} {
		t.Run(name, func(t *testing.T) {
			b := newBed(t)
			cert, key := b.ca.Issue(t.TempDir(), "client", x509.Certificate{DNSNames: []string{allowed}})
			pair, err := tls.LoadX509KeyPair(cert, key)
			if err != nil {
				t.Fatal(err)
			}
			c := &tls.Config{Certificates: []tls.Certificate{pair}, InsecureSkipVerify: true}
			change(c)
			if got, err := b.call(t, credentials.NewTLS(c)); status.Code(err) != codes.Unavailable {
				t.Fatalf("got %q, %v, want the connection refused", got, err)
			}
		})
	}
}

func TestDenialsAreLoggedAtALimitedRate(t *testing.T) {
	b := newBed(t)
	began := time.Now()
	for range 20 {
		conn, err := tls.Dial("tcp", b.addr, &tls.Config{InsecureSkipVerify: true, NextProtos: []string{"h2"}})
		if err != nil {
			t.Fatal(err)
		}
		if _, err := conn.Read(make([]byte, 1)); err == nil {
			t.Fatal("let in without a certificate")
		}
		conn.Close()
	}
	for b.log.LastEntry() == nil && time.Since(began) < waitLong {
		runtime.Gosched() // the client knows of the refusal a moment earlier
	}
	// Five at first, and then one every ten seconds.
	if n, most := len(b.log.AllEntries()), 6+int(time.Since(began)/(10*time.Second)); n == 0 || n > most {
		t.Fatalf("%d lines for 20 denials, want at most %d", n, most)
	}
}

func TestRotation(t *testing.T) {
	b := newBed(t)
	dir := t.TempDir()
	cert, key := b.ca.Issue(dir, "client", x509.Certificate{DNSNames: []string{allowed}})
	creds := b.client(t, cert, key)
	if _, err := b.call(t, creds); err != nil {
		t.Fatal(err)
	}

	t.Run("clients of a new authority", func(t *testing.T) {
		next := mtlstest.NewCA(t, "next")
		next.Issue(dir, "client", x509.Certificate{DNSNames: []string{allowed}})
		if _, err := b.call(t, creds); status.Code(err) != codes.Unavailable {
			t.Fatalf("the server does not trust it yet: %v", err)
		}
		b.trust(t, b.ca, next)
		if _, err := b.call(t, creds); err != nil {
			t.Fatal(err)
		}
		b.trust(t, next)
		cert, key := b.ca.Issue(t.TempDir(), "client", x509.Certificate{DNSNames: []string{allowed}})
		if _, err := b.call(t, b.client(t, cert, key)); status.Code(err) != codes.Unavailable {
			t.Fatalf("the old authority is still trusted: %v", err)
		}
		b.trust(t, b.ca, next)
	})

	t.Run("server certificate", func(t *testing.T) {
		b.ca.Issue(b.dir, "server", x509.Certificate{DNSNames: []string{"renamed"}})
		if _, err := b.call(t, creds); !strings.Contains(errString(err), "127.0.0.1") {
			t.Fatalf("want the new certificate, which is not for 127.0.0.1: %v", err)
		}
		b.ca.Issue(b.dir, "server", x509.Certificate{IPAddresses: []net.IP{net.IPv4(127, 0, 0, 1)}})
		if _, err := b.call(t, creds); err != nil {
			t.Fatal(err)
		}
	})

	t.Run("unusable files leave the old ones in force", func(t *testing.T) {
		b.log.Reset()
		file := filepath.Join(b.dir, "server.key")
		old, err := os.ReadFile(file)
		if err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(file, []byte("nonsense"), 0o600); err != nil {
			t.Fatal(err)
		}
		if _, err := b.call(t, creds); err != nil {
			t.Fatal(err)
		}
		// Not the last one: the denial of before may be logged as late as this.
		if !slices.ContainsFunc(b.log.AllEntries(), func(e *logrus.Entry) bool {
			return strings.Contains(e.Data[logrus.ErrorKey].(error).Error(), "stay in force")
		}) {
			t.Errorf("logged %v", b.log.AllEntries())
		}
		if err := os.Remove(b.clientCA); err != nil {
			t.Fatal(err)
		}
		if _, err := b.call(t, creds); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(file, old, 0o600); err != nil {
			t.Fatal(err)
		}
	})
}

func TestClientRefusesServer(t *testing.T) {
	b := newBed(t)
	other := mtlstest.NewCA(t, "other")
	cert, key := b.ca.Issue(t.TempDir(), "client", x509.Certificate{DNSNames: []string{allowed}})
	for name, o := range map[string]mtls.ClientOptions{
		"of another authority": {CertFile: cert, KeyFile: key, ServerCAFile: other.File},
		"with another name":    {CertFile: cert, KeyFile: key, ServerCAFile: b.ca.File, ServerName: "other-node"},
	} {
		t.Run(name, func(t *testing.T) {
			o.Log = logrus.New()
			creds, err := mtls.NewClient(o)
			if err != nil {
				t.Fatal(err)
			}
			if got, err := b.call(t, creds); status.Code(err) != codes.Unavailable {
				t.Fatalf("got %q, %v", got, err)
			}
		})
	}
	t.Run("accepts the expected name", func(t *testing.T) {
		creds, err := mtls.NewClient(mtls.ClientOptions{CertFile: cert, KeyFile: key, ServerCAFile: b.ca.File,
			ServerName: "node", Log: logrus.New()})
		if err != nil {
			t.Fatal(err)
		}
		if _, err := b.call(t, creds); err != nil {
			t.Fatal(err)
		}
	})
}

func TestMessageSizeIsBounded(t *testing.T) {
	b := newBed(t)
	cert, key := b.ca.Issue(t.TempDir(), "client", x509.Certificate{DNSNames: []string{allowed}})
	conn, err := grpc.NewClient(b.addr, grpc.WithTransportCredentials(b.client(t, cert, key)))
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	for size, refused := range map[int]bool{15 << 20: false, 16 << 20: true} {
		_, err = healthpb.NewHealthClient(conn).
			Check(t.Context(), &healthpb.HealthCheckRequest{Service: strings.Repeat("x", size)})
		if (status.Code(err) == codes.ResourceExhausted) != refused {
			t.Fatalf("%d bytes: got code %v", size, status.Code(err))
		}
	}
}

func TestNewServerErrors(t *testing.T) {
	ca := mtlstest.NewCA(t, "ca")
	dir := t.TempDir()
	cert, key := ca.Issue(dir, "a", x509.Certificate{})
	_, otherKey := ca.Issue(dir, "b", x509.Certificate{})
	good := mtls.ServerOptions{CertFile: cert, KeyFile: key, ClientCAFile: ca.File, AllowedClients: []string{"x"},
		Log: logrus.New()}
	for _, tt := range []struct {
		name   string
		change func(*mtls.ServerOptions)
		want   string
	}{
		{"good", func(*mtls.ServerOptions) {}, ""},
		{"nobody allowed", func(o *mtls.ServerOptions) { o.AllowedClients = nil }, "no client is allowed"},
		{"empty name allowed", func(o *mtls.ServerOptions) { o.AllowedClients = []string{""} }, "empty name"},
		{"missing file", func(o *mtls.ServerOptions) { o.CertFile = dir + "/none" }, "none: no such file"},
		{"other key", func(o *mtls.ServerOptions) { o.KeyFile = otherKey }, "does not match"},
		{"no ca", func(o *mtls.ServerOptions) { o.ClientCAFile = key }, "holds no PEM certificate"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			o := good
			tt.change(&o)
			_, err := mtls.NewServer(o)
			if (tt.want == "") != (err == nil) || !strings.Contains(errString(err), tt.want) {
				t.Fatalf("got %v, want %q", err, tt.want)
			}
		})
	}
}

func TestClientNameOutsideServer(t *testing.T) {
	if name, ok := mtls.ClientName(t.Context()); ok || name != "" {
		t.Fatalf("got %q, %t", name, ok)
	}
}

func errString(err error) string {
	if err == nil {
		return ""
	}
	return err.Error()
}

// TestConnectionsEndInTime: what let a client in must be good for as long as it is in.
func TestConnectionsEndInTime(t *testing.T) {
	// connect returns nil if the certificate has ended before it could be used.
	connect := func(t *testing.T, b *bed, template x509.Certificate) *grpc.ClientConn {
		t.Helper()
		template.DNSNames = []string{allowed}
		cert, key := b.ca.Issue(t.TempDir(), "client", template)
		conn, err := grpc.NewClient(b.addr, grpc.WithTransportCredentials(b.client(t, cert, key)))
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { conn.Close() })
		err = ask(t, conn)
		if over := template.NotAfter; !over.IsZero() && time.Now().After(over.Truncate(time.Second)) {
			return nil
		}
		if status.Code(err) != codes.AlreadyExists {
			t.Fatalf("not let in: %v", err)
		}
		return conn
	}
	lost := func(t *testing.T, conn *grpc.ClientConn) {
		t.Helper()
		ctx, cancel := context.WithTimeout(t.Context(), waitLong)
		defer cancel()
		// A first call may be answered before the connection says that it is ready.
		for s := conn.GetState(); s == connectivity.Ready || s == connectivity.Connecting; s = conn.GetState() {
			if !conn.WaitForStateChange(ctx, s) {
				t.Fatalf("the connection stays, it is %s", s)
			}
		}
		if err := ask(t, conn); status.Code(err) != codes.Unavailable {
			t.Errorf("let in again: %v", err)
		}
	}
	t.Run("with the client's certificate", func(t *testing.T) {
		b := newBed(t)
		for life := 2 * time.Second; ; life *= 2 {
			if conn := connect(t, b, x509.Certificate{NotAfter: time.Now().Add(life)}); conn != nil {
				lost(t, conn)
				return
			}
		}
	})
	t.Run("when its authority is withdrawn", func(t *testing.T) {
		b := newBed(t)
		old := connect(t, b, x509.Certificate{})
		next := *b
		next.ca = mtlstest.NewCA(t, "next")
		b.trust(t, b.ca, next.ca)
		if err := ask(t, old); status.Code(err) != codes.AlreadyExists {
			t.Fatalf("with another authority beside its own: %v", err)
		}
		b.trust(t, next.ca)
		_ = ask(t, old) // somebody's call is when the server looks
		lost(t, old)
	})
}

// TestPlaces: unauthenticated connections make way, known clients do not.
func TestPlaces(t *testing.T) {
	const places = 64
	b := newBed(t)
	cert, key := b.ca.Issue(t.TempDir(), "client", x509.Certificate{DNSNames: []string{allowed}})
	connect := func() *grpc.ClientConn {
		conn, err := grpc.NewClient(b.addr, grpc.WithTransportCredentials(b.client(t, cert, key)))
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { conn.Close() })
		return conn
	}
	var unauthenticated [places]net.Conn
	for i := range unauthenticated {
		var err error
		if unauthenticated[i], err = net.Dial("tcp", b.addr); err != nil {
			t.Fatal(err)
		}
		defer unauthenticated[i].Close()
	}
	over := func(c net.Conn, within time.Duration) bool {
		_ = c.SetReadDeadline(time.Now().Add(within))
		_, err := c.Read(make([]byte, 1))
		return !errors.Is(err, os.ErrDeadlineExceeded)
	}
	first := connect()
	if err := ask(t, first); status.Code(err) != codes.AlreadyExists {
		t.Fatalf("with all places of unauthenticated taken: %v", err)
	}
	if over(unauthenticated[places-1], time.Millisecond) {
		t.Error("the newest unauthenticated connection was closed")
	}
	if !over(unauthenticated[0], waitLong) {
		t.Error("the oldest unauthenticated connection stays")
	}
	for i := 2; i <= places; i++ {
		if err := ask(t, connect()); status.Code(err) != codes.AlreadyExists {
			t.Fatalf("client %d: %v", i, err)
		}
	}
	late := connect()
	if err := ask(t, late); status.Code(err) != codes.Unavailable {
		t.Errorf("one client too many: %v", err)
	}
	late.Close() // else it tries again, and may get the place
	first.Close()
	ctx, cancel := context.WithTimeout(t.Context(), waitLong)
	defer cancel()
	_, err := healthpb.NewHealthClient(connect()).Check(ctx, &healthpb.HealthCheckRequest{}, grpc.WaitForReady(true))
	if status.Code(err) != codes.AlreadyExists {
		t.Errorf("after one has left: %v", err)
	}
}

// TestEndWithUnauthenticated: a server that stops does not wait for who says nothing.
func TestEndWithUnauthenticated(t *testing.T) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	d := mtls.LimitListener(l)
	silent, err := net.Dial("tcp", l.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	defer silent.Close()
	if _, err := d.Accept(); err != nil {
		t.Fatal(err)
	}
	if err := d.Close(); err != nil {
		t.Error(err)
	}
	_ = silent.SetReadDeadline(time.Now().Add(waitLong))
	if _, err := silent.Read(make([]byte, 1)); err == nil || errors.Is(err, os.ErrDeadlineExceeded) {
		t.Errorf("the unauthenticated connection stays: %v", err)
	}
}

func ask(t *testing.T, conn *grpc.ClientConn) error {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), waitLong)
	defer cancel()
	_, err := healthpb.NewHealthClient(conn).Check(ctx, &healthpb.HealthCheckRequest{})
	return err
}

// identity is a client's that changes.
type identity struct {
	cert    *tls.Certificate
	roots   *x509.CertPool
	refuse  map[string]bool
	servers []string
}

func (i *identity) Current(context.Context) (*tls.Certificate, *x509.CertPool, error) {
	return i.cert, i.roots, nil
}

func (i *identity) Server(_ context.Context, name string, c *x509.Certificate) error {
	if c != nil {
		i.servers = append(i.servers, c.DNSNames...)
	}
	if i.refuse[name] {
		return errors.New("not " + name)
	}
	return nil
}

func TestIdentityOfAClient(t *testing.T) {
	b := newBed(t)
	cert, key := b.ca.Issue(t.TempDir(), "client", x509.Certificate{DNSNames: []string{allowed}})
	pair, err := tls.LoadX509KeyPair(cert, key)
	if err != nil {
		t.Fatal(err)
	}
	text, err := os.ReadFile(b.ca.File)
	if err != nil {
		t.Fatal(err)
	}
	id := &identity{cert: &pair, roots: x509.NewCertPool(), refuse: map[string]bool{}}
	call := func(name string) error {
		t.Helper()
		conn, err := grpc.NewClient("passthrough:///"+b.addr, grpc.WithTransportCredentials(mtls.NewClientOf(id)),
			grpc.WithAuthority(name))
		if err != nil {
			t.Fatal(err)
		}
		defer conn.Close()
		return ask(t, conn)
	}
	if err := call("node"); status.Code(err) != codes.Unavailable ||
		!strings.Contains(err.Error(), "unknown authority") {
		t.Errorf("trusts nobody: %v", err)
	}
	id.roots.AppendCertsFromPEM(text)
	if err := call("node"); status.Code(err) != codes.AlreadyExists {
		t.Error(err)
	}
	if err := call("other"); status.Code(err) != codes.Unavailable {
		t.Errorf("another name: %v", err)
	}
	if len(id.servers) != 1 || id.servers[0] != "node" {
		t.Errorf("was shown %v", id.servers)
	}
	id.refuse["node"] = true
	if err := call("node"); status.Code(err) != codes.Unavailable || !strings.Contains(err.Error(), "not node") ||
		len(id.servers) != 1 {
		t.Errorf("refused before anything is sent: %v", err)
	}
}

func TestAwaitedFiles(t *testing.T) {
	ca, dir := mtlstest.NewCA(t, "ca"), t.TempDir()
	log, hook := logtest.NewNullLogger()
	s, err := mtls.NewServer(mtls.ServerOptions{
		CertFile: dir + "/n.crt", KeyFile: dir + "/n.key", ClientCAFile: ca.File, AllowedClients: []string{allowed},
		Log:     log,
		Awaited: func() error { return errors.New("it is on its way") },
	})
	if err != nil {
		t.Fatal(err)
	}
	client, server := net.Pipe()
	defer client.Close()
	if s.Certificate() != nil {
		t.Error("there is a certificate")
	}
	srv := grpc.NewServer(s.GRPC()...)
	var owned sync.WaitGroup
	l := &oneConn{c: server, end: make(chan struct{})}
	owned.Go(func() { _ = srv.Serve(l) })
	if _, err := client.Read(make([]byte, 1)); err == nil {
		t.Error("not hung up")
	}
	for e := hook.LastEntry(); e == nil ||
		!strings.Contains(fmt.Sprint(e.Data[logrus.ErrorKey]), "on its way"); e = hook.LastEntry() {
		runtime.Gosched()
		if t.Context().Err() != nil {
			t.Fatal("not logged")
		}
	}
	ca.Issue(dir, "n", x509.Certificate{DNSNames: []string{"node"}})
	if c := s.Certificate(); c == nil || c.DNSNames[0] != "node" {
		t.Errorf("%v", c)
	}
	srv.Stop()
	owned.Wait()
}

// oneConn is a listener with one connection.
type oneConn struct {
	c    net.Conn
	end  chan struct{}
	once sync.Once
}

func (l *oneConn) Accept() (net.Conn, error) {
	if c := l.c; c != nil {
		l.c = nil
		return c, nil
	}
	<-l.end
	return nil, net.ErrClosed
}

func (l *oneConn) Close() error {
	l.once.Do(func() { close(l.end) })
	return nil
}

func (l *oneConn) Addr() net.Addr { return &net.TCPAddr{} }

// TestUnknown: whoever may know of another authority makes the server look for it; others do not.
func TestUnknown(t *testing.T) {
	other := mtlstest.NewCA(t, "other")
	for _, tt := range []struct {
		name string
		dial func(*bed) credentials.TransportCredentials
		want bool
	}{
		{"a client of another authority", func(b *bed) credentials.TransportCredentials {
			cert, key := other.Issue(t.TempDir(), "c", x509.Certificate{DNSNames: []string{allowed}})
			return b.client(t, cert, key)
		}, true},
		{"a client who knows another authority", func(b *bed) credentials.TransportCredentials {
			cert, key := b.ca.Issue(t.TempDir(), "c", x509.Certificate{DNSNames: []string{allowed}})
			creds, err := mtls.NewClient(mtls.ClientOptions{CertFile: cert, KeyFile: key, ServerCAFile: other.File,
				Log: logrus.New()})
			if err != nil {
				t.Fatal(err)
			}
			return creds
		}, true},
		{"a client of another name", func(b *bed) credentials.TransportCredentials {
			cert, key := b.ca.Issue(t.TempDir(), "c", x509.Certificate{DNSNames: []string{"another"}})
			return b.client(t, cert, key)
		}, false},
		{"no certificate", func(*bed) credentials.TransportCredentials {
			return credentials.NewTLS(&tls.Config{InsecureSkipVerify: true})
		}, false},
	} {
		t.Run(tt.name, func(t *testing.T) {
			b := newBed(t)
			if _, err := b.call(t, tt.dial(b)); status.Code(err) != codes.Unavailable {
				t.Fatal(err)
			}
			for e := b.log.LastEntry(); e == nil; e = b.log.LastEntry() {
				runtime.Gosched() // the client knows of the refusal a moment earlier
			}
			if asked := b.unknown.Load() > 0; asked != tt.want {
				t.Errorf("looks for other authorities: %t", asked)
			}
		})
	}
}
