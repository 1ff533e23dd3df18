// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package mtls

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"net"
	"slices"
	"time"

	"github.com/sirupsen/logrus"
	"golang.org/x/time/rate"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/keepalive"
	"google.golang.org/grpc/peer"
	"google.golang.org/grpc/status"
)

const (
	// maxMessage bounds a request: a command is a few kilobytes and the environments of its
	// containers, which may be 12 MiB together (ops/given.go).
	maxMessage = 16 << 20
	// maxHeaders bounds the metadata of a request, of which no command has any.
	maxHeaders = 16 << 10
	// maxStreams bounds the calls of one connection: a watch per operation, and
	// a node has a few hundred containers at most.
	maxStreams = 1024
	// handshakeTimeout frees the place of a connection that does not speak TLS.
	handshakeTimeout = 10 * time.Second
	// minPing is how often clients may ping, to notice a node that is gone.
	minPing = 10 * time.Second
	// maxIdle closes connections that nobody uses; clients connect again by themselves.
	maxIdle = 15 * time.Minute
)

// ServerOptions says who the server is and whom it lets in. All fields but Awaited and Unknown are
// required.
type ServerOptions struct {
	// CertFile and KeyFile are the PEM server certificate and its key.
	CertFile, KeyFile string
	// ClientCAFile holds the PEM certificates of who may sign client certificates.
	ClientCAFile string
	// AllowedClients are the names, one of which a client certificate must carry,
	// letter for letter, as DNS or URI subject alternative name or as common name.
	AllowedClients []string
	// Log gets denied clients and unusable new files.
	Log logrus.FieldLogger
	// Awaited, if set, says why the files are not there yet. Without it they must be there from the
	// beginning; with it everybody is refused until they are.
	Awaited func() error
	// Unknown, if set, is told that there may be other authorities by now: a client came whose
	// certificate is of no known one, or who did not take the server's, or before there was one. It
	// must not wait.
	Unknown func()
}

// Server makes the ops API accept known clients only.
type Server struct {
	files   *files
	allowed []string
	log     logrus.FieldLogger
	awaited func() error
	unknown func()
	conns   conns
	// denials keeps a client that tries again and again from filling the log.
	denials *rate.Limiter
}

// NewServer reads the files. It is an error if one cannot be used; later changes
// of theirs are taken over on the next connection.
func NewServer(o ServerOptions) (*Server, error) {
	if len(o.AllowedClients) == 0 || slices.Contains(o.AllowedClients, "") {
		return nil, errors.New("no client is allowed, or one with an empty name; " +
			"list the names that client certificates carry")
	}
	s := &Server{
		files:   &files{cert: o.CertFile, key: o.KeyFile, ca: o.ClientCAFile},
		allowed: slices.Clone(o.AllowedClients),
		log:     o.Log,
		awaited: o.Awaited,
		unknown: o.Unknown,
		denials: rate.NewLimiter(rate.Every(10*time.Second), 5),
	}
	s.files.complain = func(err error) {
		if s.denials.Allow() {
			s.log.WithError(err).Error("mutual TLS")
		}
	}
	s.files.changed = s.conns.recheck
	if err := s.files.load(); err != nil && o.Awaited == nil {
		return nil, err
	}
	return s, nil
}

// Certificate returns the server's own certificate, nil if there is none yet.
func (s *Server) Certificate() *x509.Certificate {
	pair, _, err := s.files.current()
	if err != nil {
		return nil
	}
	return pair.Leaf
}

// GRPC returns the options of a gRPC server that only allowed clients reach:
// credentials, limits, and interceptors that put [ClientName] into the context.
func (s *Server) GRPC() []grpc.ServerOption {
	return []grpc.ServerOption{
		grpc.Creds(serverCredentials{s}),
		grpc.ConnectionTimeout(handshakeTimeout),
		grpc.MaxRecvMsgSize(maxMessage),
		grpc.MaxHeaderListSize(maxHeaders),
		grpc.MaxConcurrentStreams(maxStreams),
		grpc.StatsHandler(refusals{s}),
		grpc.UnknownServiceHandler(s.unknownMethod),
		grpc.KeepaliveEnforcementPolicy(keepalive.EnforcementPolicy{MinTime: minPing, PermitWithoutStream: true}),
		grpc.KeepaliveParams(keepalive.ServerParameters{
			MaxConnectionIdle: maxIdle, Time: time.Minute, Timeout: 20 * time.Second,
		}),
		grpc.ChainUnaryInterceptor(s.unary),
		grpc.ChainStreamInterceptor(s.stream),
	}
}

// serverCredentials are TLS credentials over the files as they are at each handshake.
type serverCredentials struct{ s *Server }

var _ credentials.TransportCredentials = serverCredentials{}

// ServerHandshake implements [credentials.TransportCredentials]. The AuthInfo is a
// [credentials.TLSInfo].
func (c serverCredentials) ServerHandshake(conn net.Conn) (net.Conn, credentials.AuthInfo, error) {
	secure, info, err := c.s.handshake(conn)
	if err == nil {
		return secure, info, nil
	}
	var remote *net.OpError
	if errors.As(err, new(x509.UnknownAuthorityError)) || errors.As(err, &remote) && remote.Op == "remote error" ||
		c.s.Certificate() == nil {
		if c.s.unknown != nil {
			c.s.unknown()
		}
	}
	if c.s.denials.Allow() {
		c.s.log.WithError(err).WithField("remote", conn.RemoteAddr().String()).Warn("ops client denied")
	}
	return nil, nil, err
}

// handshake lets a client in whose certificate is good, for as long as it is.
func (s *Server) handshake(conn net.Conn) (net.Conn, credentials.AuthInfo, error) {
	config, err := s.config()
	if err != nil {
		return nil, nil, err
	}
	secure, info, err := credentials.NewTLS(config).ServerHandshake(conn)
	if err != nil {
		return nil, nil, err
	}
	if err := admit(conn); err != nil {
		return nil, nil, err
	}
	// The list of connections is complete before the authorities are looked at again: those that
	// are withdrawn meanwhile end it, too.
	tracked := s.conns.track(secure, info.(credentials.TLSInfo).State)
	if _, roots, err := s.files.current(); err == nil && roots != config.ClientCAs {
		s.conns.recheck(roots)
	}
	return tracked, info, nil
}

// ClientHandshake implements [credentials.TransportCredentials]; it always fails.
func (serverCredentials) ClientHandshake(context.Context, string, net.Conn) (net.Conn, credentials.AuthInfo, error) {
	return nil, nil, errors.New("server credentials used by a client")
}

// Info implements [credentials.TransportCredentials].
func (serverCredentials) Info() credentials.ProtocolInfo {
	return credentials.ProtocolInfo{SecurityProtocol: "tls"}
}

// Clone implements [credentials.TransportCredentials].
func (c serverCredentials) Clone() credentials.TransportCredentials { return c }

// OverrideServerName implements [credentials.TransportCredentials]; it does nothing.
func (serverCredentials) OverrideServerName(string) error { return nil }

// config returns the settings of one handshake. Session tickets are off: each
// connection is checked against the files of its moment.
func (s *Server) config() (*tls.Config, error) {
	pair, roots, err := s.files.current()
	if err != nil {
		if s.awaited != nil {
			err = s.awaited()
		}
		return nil, err
	}
	return &tls.Config{
		MinVersion:             tls.VersionTLS13,
		Certificates:           []tls.Certificate{*pair},
		ClientAuth:             tls.RequireAndVerifyClientCert,
		ClientCAs:              roots,
		NextProtos:             []string{"h2"},
		SessionTicketsDisabled: true,
		VerifyConnection: func(cs tls.ConnectionState) error {
			_, err := s.nameOf(cs)
			return err
		},
	}, nil
}

// nameOf returns the allowed name that the client's certificate carries.
func (s *Server) nameOf(cs tls.ConnectionState) (string, error) {
	if len(cs.VerifiedChains) == 0 || len(cs.PeerCertificates) == 0 {
		return "", errors.New("no verified client certificate")
	}
	names := namesIn(cs.PeerCertificates[0])
	for _, n := range names {
		if slices.Contains(s.allowed, n) {
			return n, nil
		}
	}
	return "", fmt.Errorf("client certificate with the names %q is valid, "+
		"but none of them is among the allowed clients", names)
}

// namesIn returns the names of a certificate, subject alternative names first.
func namesIn(c *x509.Certificate) []string {
	names := slices.Clone(c.DNSNames)
	for _, u := range c.URIs {
		names = append(names, u.String())
	}
	if c.Subject.CommonName != "" {
		names = append(names, c.Subject.CommonName)
	}
	return names
}

type clientNameKey struct{}

// ClientName returns the allowed name of the client that makes the call, and
// false if the call did not come through [Server].
func ClientName(ctx context.Context) (string, bool) {
	name, ok := ctx.Value(clientNameKey{}).(string)
	return name, ok
}

func (s *Server) named(ctx context.Context) (context.Context, error) {
	if c, ok := ctx.Value(callKey{}).(*call); ok {
		c.reached.Store(true)
	}
	_, _, _ = s.files.current() // a withdrawn authority is noticed by calls, too, and ends its connections
	p, ok := peer.FromContext(ctx)
	if !ok {
		return nil, status.Error(codes.Unauthenticated, "no peer")
	}
	info, ok := p.AuthInfo.(credentials.TLSInfo)
	if !ok {
		return nil, status.Error(codes.Unauthenticated, "no TLS")
	}
	if now := time.Now(); now.After(info.State.PeerCertificates[0].NotAfter) {
		return nil, status.Error(codes.Unauthenticated, "the client certificate has expired")
	}
	name, err := s.nameOf(info.State)
	if err != nil {
		return nil, status.Error(codes.PermissionDenied, err.Error())
	}
	return context.WithValue(ctx, clientNameKey{}, name), nil
}

func (s *Server) unary(ctx context.Context, req any, _ *grpc.UnaryServerInfo, handler grpc.UnaryHandler) (any, error) {
	ctx, err := s.named(ctx)
	if err != nil {
		return nil, err
	}
	return handler(ctx, req)
}

func (s *Server) stream(srv any, ss grpc.ServerStream, _ *grpc.StreamServerInfo, handler grpc.StreamHandler) error {
	ctx, err := s.named(ss.Context())
	if err != nil {
		return err
	}
	return handler(srv, namedStream{ss, ctx})
}

// namedStream is a stream whose context knows the client. gRPC has no other way
// to hand a context to a stream's handler.
type namedStream struct {
	grpc.ServerStream
	ctx context.Context
}

// Context implements [grpc.ServerStream].
func (s namedStream) Context() context.Context { return s.ctx }
