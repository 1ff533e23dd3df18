// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package controller

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"net"
	"os"
	"sync"
	"time"

	"google.golang.org/grpc/credentials"
)

// TLSFiles are the PEM files of the controller's identity towards nodes. They are
// read again when they change, so certificates can be renewed in place.
type TLSFiles struct {
	// Cert and Key are the controller's client certificate and its key.
	Cert, Key string
	// CA holds the certificates that node certificates must chain to.
	CA string
}

// certificates reads TLSFiles, and again when one of them changes.
type certificates struct {
	files TLSFiles

	mu     sync.Mutex
	stamps [3]stamp
	cert   tls.Certificate
	roots  *x509.CertPool
}

// stamp tells whether a file has changed.
type stamp struct {
	modTime time.Time
	size    int64
}

// newCertificates reads the files once, so that a bad one is an error at start.
func newCertificates(files TLSFiles) (*certificates, error) {
	if files.Cert == "" || files.Key == "" || files.CA == "" {
		return nil, errors.New("the certificate, the key and the CA for talking to nodes must all be given: nodes accept mutual TLS only")
	}
	c := &certificates{files: files}
	if _, err := c.config(""); err != nil {
		return nil, err
	}
	return c, nil
}

// config is the TLS configuration for a node whose certificate must be valid for
// serverName. While the files are unreadable, as in the middle of a renewal, the
// ones read before stay in use.
func (c *certificates) config(serverName string) (*tls.Config, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if err := c.refresh(); err != nil && c.roots == nil {
		return nil, err
	}
	return &tls.Config{
		MinVersion:   tls.VersionTLS13,
		ServerName:   serverName,
		RootCAs:      c.roots,
		Certificates: []tls.Certificate{c.cert},
	}, nil
}

func (c *certificates) refresh() error {
	var stamps [3]stamp
	for i, path := range []string{c.files.Cert, c.files.Key, c.files.CA} {
		info, err := os.Stat(path)
		if err != nil {
			return fmt.Errorf("TLS file for talking to nodes: %w", err)
		}
		stamps[i] = stamp{info.ModTime(), info.Size()}
	}
	if stamps == c.stamps {
		return nil
	}
	cert, err := tls.LoadX509KeyPair(c.files.Cert, c.files.Key)
	if err != nil {
		return fmt.Errorf("certificate %s with key %s: %w", c.files.Cert, c.files.Key, err)
	}
	pem, err := os.ReadFile(c.files.CA)
	if err != nil {
		return fmt.Errorf("CA for talking to nodes: %w", err)
	}
	roots := x509.NewCertPool()
	if !roots.AppendCertsFromPEM(pem) {
		return fmt.Errorf("no PEM certificate in CA file %s", c.files.CA)
	}
	c.cert, c.roots, c.stamps = cert, roots, stamps
	return nil
}

// nodeCredentials are gRPC credentials for one node, made anew for every
// handshake so that renewed files take effect.
type nodeCredentials struct {
	certificates *certificates
	nodeName     string
}

var _ credentials.TransportCredentials = nodeCredentials{}

func (n nodeCredentials) ClientHandshake(ctx context.Context, _ string, conn net.Conn) (net.Conn, credentials.AuthInfo, error) {
	config, err := n.certificates.config(n.nodeName)
	if err != nil {
		return nil, nil, err
	}
	return credentials.NewTLS(config).ClientHandshake(ctx, n.nodeName, conn)
}

func (nodeCredentials) ServerHandshake(net.Conn) (net.Conn, credentials.AuthInfo, error) {
	return nil, nil, errors.New("client credentials only")
}

func (nodeCredentials) Info() credentials.ProtocolInfo {
	return credentials.ProtocolInfo{SecurityProtocol: "tls"}
}

func (n nodeCredentials) Clone() credentials.TransportCredentials { return n }

func (nodeCredentials) OverrideServerName(string) error { return nil }
