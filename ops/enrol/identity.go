// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package enrol

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"errors"
	"fmt"
	"io/fs"
	"math/big"
	"net"
	"os"
	"path/filepath"
	"time"
)

// Of a certificate's life, this part has passed when it is renewed: between 70 and 80 %, so that
// nodes that were enrolled together are not renewed together.
const (
	renewFrom   = 0.7
	renewSpread = 0.1
)

// Directory is where below the state directory the identity lies, for its owner only.
func Directory(stateDir string) string { return filepath.Join(stateDir, "identity") }

// CertFile is the file with the node's certificate and its key, one file so that both change at
// once, and CAFile that with the CAs of who may command the node.
func CertFile(stateDir string) string { return filepath.Join(Directory(stateDir), "node.pem") }

// CAFile is described at [CertFile].
func CAFile(stateDir string) string { return filepath.Join(Directory(stateDir), "ca.pem") }

// newRequest makes a key and a request for the node's certificate, as PEM. Nothing but the node's
// own name counts for who it is; addresses are those that the Node object has.
func newRequest(name string, n node) (key *ecdsa.PrivateKey, csr []byte, err error) {
	if key, err = ecdsa.GenerateKey(elliptic.P256(), rand.Reader); err != nil {
		return nil, nil, err
	}
	template := &x509.CertificateRequest{Subject: pkix.Name{CommonName: name}}
	seen := map[string]bool{}
	if ip := net.ParseIP(name); ip != nil { // some clusters name their nodes so
		seen[ip.String()] = true
		template.IPAddresses = []net.IP{ip}
	} else {
		template.DNSNames = []string{name}
	}
	for _, a := range n.Status.Addresses {
		ip := net.ParseIP(a.Address)
		if a.Type == "InternalIP" && ip != nil && !seen[ip.String()] {
			seen[ip.String()] = true
			template.IPAddresses = append(template.IPAddresses, ip)
		}
	}
	der, err := x509.CreateCertificateRequest(rand.Reader, template, key)
	if err != nil {
		return nil, nil, err
	}
	return key, pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE REQUEST", Bytes: der}), nil
}

// leafOf returns the first certificate of a PEM text.
func leafOf(text []byte) (*x509.Certificate, error) {
	for {
		var b *pem.Block
		if b, text = pem.Decode(text); b == nil {
			return nil, errors.New("holds no PEM certificate")
		}
		if b.Type == "CERTIFICATE" {
			return x509.ParseCertificate(b.Bytes)
		}
	}
}

// readBundle returns the CAs in a PEM text.
func readBundle(text []byte) (*x509.CertPool, error) {
	pool, n := x509.NewCertPool(), 0
	for {
		var b *pem.Block
		if b, text = pem.Decode(text); b == nil {
			break
		}
		c, err := x509.ParseCertificate(b.Bytes)
		if err != nil {
			return nil, err
		}
		if !c.IsCA {
			return nil, fmt.Errorf("certificate %q in it is no CA", c.Subject.CommonName)
		}
		pool.AddCert(c)
		n++
	}
	if n == 0 {
		return nil, errors.New("it holds no PEM certificate")
	}
	return pool, nil
}

// signedBy tells whether the certificate is one of these CAs', whatever its times.
func signedBy(c *x509.Certificate, roots *x509.CertPool) error {
	_, err := c.Verify(x509.VerifyOptions{Roots: roots, CurrentTime: c.NotBefore.Add(c.NotAfter.Sub(c.NotBefore) / 2),
		KeyUsages: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth}})
	return err
}

// renewalOf is when a certificate is renewed; always the same for the same one.
func renewalOf(c *x509.Certificate) time.Time {
	life := c.NotAfter.Sub(c.NotBefore)
	share := renewFrom + renewSpread*float64(new(big.Int).Mod(c.SerialNumber, big.NewInt(1000)).Int64())/1000
	return c.NotBefore.Add(time.Duration(float64(life) * share))
}

// load returns the certificate on disk, nil if there is none.
func load(stateDir string) (*x509.Certificate, error) {
	file := CertFile(stateDir)
	text, err := os.ReadFile(file)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	if _, err := tls.X509KeyPair(text, text); err != nil {
		return nil, fmt.Errorf("%s: %w", file, err)
	}
	c, err := leafOf(text)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", file, err)
	}
	return c, nil
}

// save writes certificate and key.
func save(stateDir string, cert []byte, key *ecdsa.PrivateKey) error {
	der, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		return err
	}
	text := append(append([]byte{}, cert...), '\n')
	return write(CertFile(stateDir), append(text, pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: der})...))
}

// write replaces a file in one step. It is readable by its owner only, from its first byte on.
func write(file string, text []byte) error {
	if err := os.MkdirAll(filepath.Dir(file), 0o700); err != nil {
		return err
	}
	f, err := os.CreateTemp(filepath.Dir(file), "."+filepath.Base(file)+"-") // mode 0600
	if err != nil {
		return err
	}
	_, err = f.Write(text)
	err = errors.Join(err, f.Sync(), f.Close())
	if err == nil {
		err = os.Rename(f.Name(), file)
	}
	if err != nil {
		return errors.Join(err, os.Remove(f.Name()))
	}
	return nil
}
