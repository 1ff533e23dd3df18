// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package mtls

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"net"

	"github.com/sirupsen/logrus"
	"google.golang.org/grpc/credentials"
)

// ClientOptions says who the client is and whom it trusts. ServerName may be
// empty, all else is required.
type ClientOptions struct {
	// CertFile and KeyFile are the PEM client certificate and its key.
	CertFile, KeyFile string
	// ServerCAFile holds the PEM certificates of who may sign server certificates.
	ServerCAFile string
	// ServerName is the name that the server's certificate must carry. Empty: the
	// host of the address dialed.
	ServerName string
	// Log gets unusable new files.
	Log logrus.FieldLogger
}

// NewClient returns credentials for [grpc.WithTransportCredentials]. It is an
// error if a file cannot be used; later changes of theirs are taken over on the
// next connection.
func NewClient(o ClientOptions) (credentials.TransportCredentials, error) {
	f := &files{cert: o.CertFile, key: o.KeyFile, ca: o.ServerCAFile}
	f.complain = func(err error) { o.Log.WithError(err).Error("mutual TLS") }
	if err := f.load(); err != nil {
		return nil, err
	}
	return &clientCredentials{id: f, serverName: o.ServerName}, nil
}

// Identity is who a client is and whom it trusts, at the moment of a connection.
type Identity interface {
	// Current returns the client's certificate and who may sign those of servers.
	Current(ctx context.Context) (*tls.Certificate, *x509.CertPool, error)
	// Server returns why a server is not accepted that one of those vouches for, under this name.
	// It is asked before anything is sent (certificate is nil then), and when the server has shown
	// its certificate.
	Server(ctx context.Context, name string, certificate *x509.Certificate) error
}

// NewClientOf returns credentials as [NewClient] does, of an identity that may change at any time.
func NewClientOf(id Identity) credentials.TransportCredentials { return &clientCredentials{id: id} }

// clientCredentials are TLS credentials as they are at each handshake.
type clientCredentials struct {
	id         Identity
	serverName string
}

var _ credentials.TransportCredentials = (*clientCredentials)(nil)

// Current implements [Identity].
func (f *files) Current(context.Context) (*tls.Certificate, *x509.CertPool, error) {
	return f.current()
}

// Server implements [Identity]: a certificate for the name is enough.
func (*files) Server(context.Context, string, *x509.Certificate) error { return nil }

// ClientHandshake implements [credentials.TransportCredentials].
func (c *clientCredentials) ClientHandshake(
	ctx context.Context, authority string, conn net.Conn,
) (net.Conn, credentials.AuthInfo, error) {
	name := c.serverName
	if name == "" {
		name = authority
		if host, _, err := net.SplitHostPort(authority); err == nil {
			name = host
		}
	}
	if err := c.id.Server(ctx, name, nil); err != nil {
		return nil, nil, err
	}
	pair, roots, err := c.id.Current(ctx)
	if err != nil {
		return nil, nil, err
	}
	return credentials.NewTLS(&tls.Config{
		MinVersion: tls.VersionTLS13,
		// Sent even if the server does not ask for its authority, so that the
		// server can log who was denied and why.
		GetClientCertificate: func(*tls.CertificateRequestInfo) (*tls.Certificate, error) { return pair, nil },
		RootCAs:              roots,
		ServerName:           name,
		NextProtos:           []string{"h2"},
		VerifyConnection: func(cs tls.ConnectionState) error {
			return c.id.Server(ctx, name, cs.PeerCertificates[0])
		},
	}).ClientHandshake(ctx, name, conn)
}

// ServerHandshake implements [credentials.TransportCredentials]; it always fails.
func (*clientCredentials) ServerHandshake(net.Conn) (net.Conn, credentials.AuthInfo, error) {
	return nil, nil, errors.New("client credentials used by a server")
}

// Info implements [credentials.TransportCredentials].
func (c *clientCredentials) Info() credentials.ProtocolInfo {
	//nolint:staticcheck // gRPC takes the authority from it, as from its own credentials.
	return credentials.ProtocolInfo{SecurityProtocol: "tls", SecurityVersion: "1.3", ServerName: c.serverName}
}

// Clone implements [credentials.TransportCredentials].
func (c *clientCredentials) Clone() credentials.TransportCredentials {
	clone := *c
	return &clone
}

// OverrideServerName implements [credentials.TransportCredentials].
func (c *clientCredentials) OverrideServerName(name string) error {
	c.serverName = name
	return nil
}
