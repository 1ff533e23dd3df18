// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/json"
	"math/big"
	"net"
	"os"
	"path/filepath"
	"sync"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/stats"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/types/known/timestamppb"
	"k8s.io/client-go/util/cert"
	"k8s.io/client-go/util/keyutil"

	opsv1 "github.com/cri-proxy/cri-proxy/api/ops/v1"
)

// pullTakes is how long a node of the fleet needs for an image.
const pullTakes = time.Second

// Files of a fleet's identities in a directory of its own.
const (
	caCert, caKey         = "ca.crt", "ca.key"
	clientCert, clientKey = "client.crt", "client.key"
)

// newIdentities writes a CA and the controller's certificate into dir.
func newIdentities(dir string) error {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return err
	}
	ca, err := cert.NewSelfSignedCACert(cert.Config{CommonName: "fleet"}, key)
	if err != nil {
		return err
	}
	i := &issuer{ca: ca, key: key}
	client, err := i.issue("cri-controller", x509.ExtKeyUsageClientAuth)
	if err != nil {
		return err
	}
	for name, k := range map[string]any{caKey: key, clientKey: client.PrivateKey} {
		pem, err := keyutil.MarshalPrivateKeyToPEM(k)
		if err != nil {
			return err
		}
		if err := os.WriteFile(filepath.Join(dir, name), pem, 0o600); err != nil {
			return err
		}
	}
	for name, der := range map[string][]byte{caCert: ca.Raw, clientCert: client.Certificate[0]} {
		c, err := x509.ParseCertificate(der)
		if err != nil {
			return err
		}
		if err := cert.WriteCert(filepath.Join(dir, name), pemOf(c)); err != nil {
			return err
		}
	}
	return nil
}

func pemOf(c *x509.Certificate) []byte {
	out, _ := cert.EncodeCertificates(c) // writes to memory
	return out
}

// issuer makes a certificate for every node that is asked for.
type issuer struct {
	ca  *x509.Certificate
	key *ecdsa.PrivateKey

	mu    sync.Mutex
	nodes map[string]*tls.Certificate // guarded by mu
}

func (i *issuer) issue(name string, usage x509.ExtKeyUsage) (*tls.Certificate, error) {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return nil, err
	}
	serial, err := rand.Int(rand.Reader, new(big.Int).Lsh(big.NewInt(1), 120))
	if err != nil {
		return nil, err
	}
	der, err := x509.CreateCertificate(rand.Reader, &x509.Certificate{
		SerialNumber: serial, Subject: pkix.Name{CommonName: name}, DNSNames: []string{name},
		NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(24 * time.Hour),
		KeyUsage: x509.KeyUsageDigitalSignature, ExtKeyUsage: []x509.ExtKeyUsage{usage},
	}, i.ca, key.Public(), i.key)
	if err != nil {
		return nil, err
	}
	return &tls.Certificate{Certificate: [][]byte{der}, PrivateKey: key}, nil
}

// of is the certificate of the node that a client wants to talk to.
func (i *issuer) of(hello *tls.ClientHelloInfo) (*tls.Certificate, error) {
	i.mu.Lock()
	defer i.mu.Unlock()
	if c := i.nodes[hello.ServerName]; c != nil {
		return c, nil
	}
	c, err := i.issue(hello.ServerName, x509.ExtKeyUsageServerAuth)
	if err == nil {
		i.nodes[hello.ServerName] = c
	}
	return c, err
}

// fleetSeen is what a fleet has seen since it was last asked.
type fleetSeen struct {
	Connections int       `json:"connections"` // now
	Peak        int       `json:"peak"`
	Commands    int       `json:"commands"`
	First       time.Time `json:"first"` // command
	Last        time.Time `json:"last"`
	Watches     int       `json:"watches"` // now
}

// fleet is many nodes in one process: one server that answers at every loopback address, for each
// node with its own certificate. What a node is told to pull is there a second later. It does not
// know NodeInfo: the condition on Nodes is no part of what is measured.
type fleet struct {
	opsv1.UnimplementedImagesServer
	opsv1.UnimplementedOpsServer

	mu    sync.Mutex
	seen  fleetSeen
	pulls map[string]*opsv1.PullOperation // guarded by mu, by node and UID
}

// runFleet serves until stdin ends, and says what it has seen for every line.
func runFleet(ctx context.Context, port, dir string) error {
	pair, err := tls.LoadX509KeyPair(filepath.Join(dir, caCert), filepath.Join(dir, caKey))
	if err != nil {
		return err
	}
	ca, err := x509.ParseCertificate(pair.Certificate[0])
	if err != nil {
		return err
	}
	key := pair.PrivateKey.(*ecdsa.PrivateKey) //nolint:forcetypeassert // newIdentities has written it
	i := &issuer{ca: ca, key: key, nodes: map[string]*tls.Certificate{}}
	pool := x509.NewCertPool()
	pool.AddCert(ca)
	f := &fleet{pulls: map[string]*opsv1.PullOperation{}}
	s := grpc.NewServer(grpc.Creds(credentials.NewTLS(&tls.Config{
		MinVersion: tls.VersionTLS13, GetCertificate: i.of, ClientAuth: tls.RequireAndVerifyClientCert, ClientCAs: pool,
	})), grpc.StatsHandler(f))
	opsv1.RegisterImagesServer(s, f)
	opsv1.RegisterOpsServer(s, f)
	// Every address of 127.0.0.0/8, and no other interface.
	lc := net.ListenConfig{Control: func(_, _ string, c syscall.RawConn) error {
		var bound error
		if err := c.Control(func(fd uintptr) { bound = unix.BindToDevice(int(fd), "lo") }); err != nil {
			return err
		}
		return bound
	}}
	l, err := lc.Listen(ctx, "tcp4", "0.0.0.0:"+port)
	if err != nil {
		return err
	}
	go s.Serve(l) //nolint:errcheck // ends with Stop
	defer s.Stop()
	out := json.NewEncoder(os.Stdout)
	if err := out.Encode("ready"); err != nil {
		return err
	}
	for in := json.NewDecoder(os.Stdin); ; {
		var question string
		if err := in.Decode(&question); err != nil {
			return nil //nolint:nilerr // stdin has ended
		}
		f.mu.Lock()
		seen := f.seen
		f.seen.Commands, f.seen.First, f.seen.Last, f.seen.Peak = 0, time.Time{}, time.Time{}, f.seen.Connections
		f.mu.Unlock()
		if err := out.Encode(seen); err != nil {
			return err
		}
	}
}

// node is whom the caller of a method talks to.
func node(ctx context.Context) string {
	md, _ := metadata.FromIncomingContext(ctx)
	if a := md.Get(":authority"); len(a) > 0 {
		return a[0]
	}
	return ""
}

func (f *fleet) Pull(ctx context.Context, r *opsv1.PullRequest) (*opsv1.PullOperation, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	key := node(ctx) + "/" + r.GetUid()
	op := f.pulls[key]
	if op == nil {
		now := time.Now()
		if f.seen.Commands++; f.seen.First.IsZero() {
			f.seen.First = now
		}
		f.seen.Last = now
		op = &opsv1.PullOperation{Uid: r.GetUid(), Image: r.GetImage(), Owner: r.GetOwner(),
			Phase: opsv1.PullPhase_PULL_FETCHING, CreateTime: timestamppb.New(now), BytesTotal: 1 << 20}
		f.pulls[key] = op
	}
	return state(op), nil
}

// state is a pull as it is now.
func state(op *opsv1.PullOperation) *opsv1.PullOperation {
	end := op.GetCreateTime().AsTime().Add(pullTakes)
	o := &opsv1.PullOperation{Uid: op.GetUid(), Image: op.GetImage(), Owner: op.GetOwner(), Phase: op.GetPhase(),
		CreateTime: op.GetCreateTime(), BytesTotal: op.GetBytesTotal()}
	if !time.Now().Before(end) {
		o.Phase, o.Reason, o.FinishTime, o.BytesDone, o.ImageId = opsv1.PullPhase_PULL_SUCCEEDED, "Pulled",
			timestamppb.New(end), o.GetBytesTotal(), "sha256:0"
	}
	return o
}

func (f *fleet) GetPull(ctx context.Context, r *opsv1.GetPullRequest) (*opsv1.PullOperation, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	op := f.pulls[node(ctx)+"/"+r.GetUid()]
	if op == nil {
		return nil, status.Error(codes.NotFound, "no such pull")
	}
	return state(op), nil
}

func (f *fleet) WatchPull(r *opsv1.WatchPullRequest, s grpc.ServerStreamingServer[opsv1.PullOperation]) error {
	op, err := f.GetPull(s.Context(), &opsv1.GetPullRequest{Uid: r.GetUid()})
	if err != nil {
		return err
	}
	f.watching(1)
	defer f.watching(-1)
	if err := s.Send(op); err != nil || op.GetFinishTime() != nil {
		return err
	}
	select {
	case <-s.Context().Done():
		return s.Context().Err()
	case <-time.After(time.Until(op.GetCreateTime().AsTime().Add(pullTakes))):
	}
	return s.Send(state(op))
}

func (f *fleet) watching(n int) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.seen.Watches += n
}

func (f *fleet) ListPulls(context.Context, *opsv1.ListPullsRequest) (*opsv1.ListPullsResponse, error) {
	return &opsv1.ListPullsResponse{}, nil
}

func (f *fleet) ListPins(context.Context, *opsv1.ListPinsRequest) (*opsv1.ListPinsResponse, error) {
	return &opsv1.ListPinsResponse{}, nil
}

func (f *fleet) ReleasePins(context.Context, *opsv1.ReleasePinsRequest) (*opsv1.ReleasePinsResponse, error) {
	return &opsv1.ReleasePinsResponse{}, nil
}

// TagRPC, HandleRPC, TagConn and HandleConn implement [stats.Handler].
func (f *fleet) TagRPC(ctx context.Context, _ *stats.RPCTagInfo) context.Context   { return ctx }
func (f *fleet) HandleRPC(context.Context, stats.RPCStats)                         {}
func (f *fleet) TagConn(ctx context.Context, _ *stats.ConnTagInfo) context.Context { return ctx }
func (f *fleet) HandleConn(_ context.Context, s stats.ConnStats) {
	f.mu.Lock()
	defer f.mu.Unlock()
	switch s.(type) {
	case *stats.ConnBegin:
		f.seen.Connections++
		f.seen.Peak = max(f.seen.Peak, f.seen.Connections)
	case *stats.ConnEnd:
		f.seen.Connections--
	}
}
