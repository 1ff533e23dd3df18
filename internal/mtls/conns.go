// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package mtls

import (
	"crypto/tls"
	"crypto/x509"
	"net"
	"sync"
	"time"
)

// conns are the open connections of clients. A connection ends when its certificate expires, and
// when the CA of the certificate is withdrawn. Clients then connect again, with their current
// certificate.
type conns struct {
	mu   sync.Mutex
	open map[*conn]struct{} // guarded by mu
}

// conn is a client's connection.
type conn struct {
	net.Conn
	of      *conns
	client  *x509.Certificate
	between *x509.CertPool // the intermediate certificates that the client has sent
	expires *time.Timer
	once    sync.Once
}

// track returns a connection that ends in time.
func (cs *conns) track(c net.Conn, state tls.ConnectionState) net.Conn {
	t := &conn{Conn: c, of: cs, client: state.PeerCertificates[0], between: x509.NewCertPool()}
	for _, b := range state.PeerCertificates[1:] {
		t.between.AddCert(b)
	}
	cs.mu.Lock()
	defer cs.mu.Unlock()
	if cs.open == nil {
		cs.open = map[*conn]struct{}{}
	}
	cs.open[t] = struct{}{}
	t.expires = time.AfterFunc(time.Until(t.client.NotAfter), func() { _ = t.Close() })
	return t
}

// Close implements [net.Conn].
func (c *conn) Close() (err error) {
	c.once.Do(func() {
		c.of.mu.Lock()
		delete(c.of.open, c)
		c.expires.Stop()
		c.of.mu.Unlock()
		err = c.Conn.Close()
	})
	return err
}

// recheck ends the connections of clients whose certificates none of these CAs has signed.
func (cs *conns) recheck(roots *x509.CertPool) {
	cs.mu.Lock()
	var over []*conn
	for c := range cs.open {
		_, err := c.client.Verify(x509.VerifyOptions{
			Roots: roots, Intermediates: c.between, KeyUsages: []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth},
		})
		if err != nil {
			over = append(over, c)
		}
	}
	cs.mu.Unlock()
	for _, c := range over {
		_ = c.Close()
	}
}
