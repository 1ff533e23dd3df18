// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package mtls

import (
	"context"
	"crypto/tls"
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
	return &clientCredentials{files: f, serverName: o.ServerName}, nil
}

// clientCredentials are TLS credentials over the files as they are at each handshake.
type clientCredentials struct {
	files      *files
	serverName string
}

var _ credentials.TransportCredentials = (*clientCredentials)(nil)

func (c *clientCredentials) tls() credentials.TransportCredentials {
	pair, roots := c.files.current()
	return credentials.NewTLS(&tls.Config{
		MinVersion: tls.VersionTLS13,
		// Sent even if the server does not ask for its authority, so that the
		// server can log who was denied and why.
		GetClientCertificate: func(*tls.CertificateRequestInfo) (*tls.Certificate, error) { return pair, nil },
		RootCAs:              roots,
		ServerName:           c.serverName,
		NextProtos:           []string{"h2"},
	})
}

// ClientHandshake implements [credentials.TransportCredentials].
func (c *clientCredentials) ClientHandshake(ctx context.Context, authority string, conn net.Conn) (net.Conn, credentials.AuthInfo, error) {
	return c.tls().ClientHandshake(ctx, authority, conn)
}

// ServerHandshake implements [credentials.TransportCredentials].
func (c *clientCredentials) ServerHandshake(conn net.Conn) (net.Conn, credentials.AuthInfo, error) {
	return c.tls().ServerHandshake(conn)
}

// Info implements [credentials.TransportCredentials].
func (c *clientCredentials) Info() credentials.ProtocolInfo { return c.tls().Info() }

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
