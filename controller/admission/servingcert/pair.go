// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package servingcert

import (
	"bytes"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"errors"
	"fmt"
	"slices"
	"time"

	"k8s.io/client-go/util/cert"
	"k8s.io/client-go/util/keyutil"
)

// skew is how long before its creation a certificate becomes valid, because clocks differ.
const skew = time.Hour

// pair is a certificate with its key and its CA.
type pair struct {
	cert *tls.Certificate
	ca   *x509.Certificate
	// certPEM is the certificate and after it its CA.
	certPEM, keyPEM []byte
}

// generate makes a certificate for the names, and a CA for that certificate alone. The first name
// is the common name. client-go's own generator makes RSA keys, which take a second of CPU.
func generate(names []string, validity time.Duration) (*pair, error) {
	caKey, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return nil, err
	}
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return nil, err
	}
	now := time.Now()
	template := x509.Certificate{
		Subject:   pkix.Name{CommonName: fmt.Sprintf("%s CA %d", names[0], now.Unix())},
		NotBefore: now.Add(-skew), NotAfter: now.Add(validity),
		KeyUsage: x509.KeyUsageCertSign, BasicConstraintsValid: true, IsCA: true, MaxPathLenZero: true,
	}
	caDER, err := x509.CreateCertificate(rand.Reader, &template, &template, caKey.Public(), caKey)
	if err != nil {
		return nil, fmt.Errorf("making a CA: %w", err)
	}
	ca, err := x509.ParseCertificate(caDER)
	if err != nil {
		return nil, err
	}
	template = x509.Certificate{
		Subject: pkix.Name{CommonName: names[0]}, DNSNames: names,
		NotBefore: ca.NotBefore, NotAfter: ca.NotAfter,
		KeyUsage: x509.KeyUsageDigitalSignature, ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth},
		BasicConstraintsValid: true,
	}
	der, err := x509.CreateCertificate(rand.Reader, &template, ca, key.Public(), caKey)
	if err != nil {
		return nil, fmt.Errorf("making a certificate: %w", err)
	}
	leaf, err := x509.ParseCertificate(der)
	if err != nil {
		return nil, err
	}
	certPEM, err := cert.EncodeCertificates(leaf, ca)
	if err != nil {
		return nil, err
	}
	keyPEM, err := keyutil.MarshalPrivateKeyToPEM(key)
	if err != nil {
		return nil, err
	}
	return parsePair(certPEM, keyPEM)
}

// parsePair reads what generate made.
func parsePair(certPEM, keyPEM []byte) (*pair, error) {
	c, err := tls.X509KeyPair(certPEM, keyPEM)
	if err != nil {
		return nil, err
	}
	if len(c.Certificate) != 2 {
		return nil, fmt.Errorf("%d certificates, and not one with its CA", len(c.Certificate))
	}
	ca, err := x509.ParseCertificate(c.Certificate[1])
	if err != nil {
		return nil, err
	}
	if err := c.Leaf.CheckSignatureFrom(ca); err != nil {
		return nil, err
	}
	c.Certificate = c.Certificate[:1] // who trusts the CA has it
	return &pair{&c, ca, certPEM, keyPEM}, nil
}

// usable returns an error if the pair cannot be shown for all names at that time.
func (p *pair) usable(names []string, now time.Time) error {
	for _, name := range names {
		if err := p.cert.Leaf.VerifyHostname(name); err != nil {
			return err
		}
	}
	if now.Before(p.cert.Leaf.NotBefore) || !now.Before(p.cert.Leaf.NotAfter) {
		return errors.New("the certificate has expired, or is not valid yet")
	}
	return nil
}

// made is when the pair was made.
func (p *pair) made() time.Time { return p.cert.Leaf.NotBefore.Add(skew) }

// due is when to renew the pair: a third of its life before its end.
func (p *pair) due() time.Time {
	return p.cert.Leaf.NotAfter.Add(-p.cert.Leaf.NotAfter.Sub(p.made()) / 3)
}

// same says whether both are the same certificate.
func (p *pair) same(o *pair) bool {
	return p != nil && o != nil && p.cert.Leaf.Equal(o.cert.Leaf)
}

// bundleMax is how many CAs are trusted at most. It takes several replacements in a row to have
// more than two.
const bundleMax = 8

// bundle is a set of CAs, the newest first.
type bundle []*x509.Certificate

// parseBundle reads the CAs that are still valid, and skips everything else.
func parseBundle(now time.Time, text []byte) bundle {
	all, err := cert.ParseCertsPEM(text)
	if err != nil {
		return nil // no certificates
	}
	var b bundle
	for _, c := range all {
		if c.IsCA && now.Before(c.NotAfter) {
			b = b.with(c)
		}
	}
	return b
}

// with returns the bundle with another CA.
func (b bundle) with(c *x509.Certificate) bundle {
	if b.has(c) {
		return b
	}
	all := append(slices.Clone(b), c)
	slices.SortFunc(all, func(x, y *x509.Certificate) int {
		if n := y.NotBefore.Compare(x.NotBefore); n != 0 {
			return n
		}
		return bytes.Compare(x.Raw, y.Raw)
	})
	return all[:min(len(all), bundleMax)]
}

// and returns the bundle with the CAs of another one.
func (b bundle) and(o bundle) bundle {
	for _, c := range o {
		b = b.with(c)
	}
	return b
}

func (b bundle) has(c *x509.Certificate) bool {
	return slices.ContainsFunc(b, c.Equal)
}

// pem encodes the bundle as the API server reads it.
func (b bundle) pem() ([]byte, error) {
	return cert.EncodeCertificates(b...)
}
