// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package testbed

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"errors"
	"fmt"
	"math/big"
	"net"
	"os"
	"path/filepath"
	"time"
)

// Pair is the PEM files of a certificate and its private key.
type Pair struct{ Cert, Key string }

// PKI is the certificates of a bed: the cluster's own, and those of the node command interface
// (ops).
type PKI struct {
	// Dir holds all files.
	Dir string
	// ClusterCA signs the control plane, kubelets and kubeconfigs.
	ClusterCA Pair
	// OpsCA signs both sides of the ops connection.
	OpsCA Pair
	// Controller is the client certificate that proxies allow: CN and DNS name "cri-controller".
	Controller Pair
	// OtherClient is a client certificate of OpsCA with a name that no node allows: it
	// authenticates, but is not allowed.
	OtherClient Pair
	// OtherCA is a CA that nobody trusts, and Impostor a client certificate "cri-controller" that
	// it signed.
	OtherCA, Impostor Pair
	// serviceAccount signs ServiceAccount tokens.
	serviceAccount Pair

	cluster, ops *authority
}

// validity outlasts any test run; the start lies back so that clock skew does not matter.
const validity = 30 * 24 * time.Hour

// authority signs certificates.
type authority struct {
	cert *x509.Certificate
	key  *ecdsa.PrivateKey
}

// subject of a certificate to issue. Every one is good for both servers and clients.
type subject struct {
	name   string   // common name
	groups []string // organizations, which Kubernetes reads as groups
	dns    []string
	ips    []net.IP
}

func newPKI(dir string) (*PKI, error) {
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return nil, err
	}
	p := &PKI{Dir: dir}
	var err error
	if p.cluster, p.ClusterCA, err = newAuthority(dir, "ca", "cri-proxy test cluster CA"); err != nil {
		return nil, err
	}
	if p.ops, p.OpsCA, err = newAuthority(dir, "ops-ca", "cri-proxy test ops CA"); err != nil {
		return nil, err
	}
	other, pair, err := newAuthority(dir, "other-ca", "cri-proxy test other CA")
	if err != nil {
		return nil, err
	}
	p.OtherCA = pair
	controller := subject{name: "cri-controller", dns: []string{"cri-controller"}}
	for _, c := range []struct {
		dst  *Pair
		by   *authority
		file string
		sub  subject
	}{
		{&p.Controller, p.ops, "cri-controller", controller},
		{&p.OtherClient, p.ops, "other-client", subject{name: "other-client", dns: []string{"other-client"}}},
		{&p.Impostor, other, "impostor", controller},
		{&p.serviceAccount, p.cluster, "service-account", subject{name: "service-account"}},
	} {
		if *c.dst, err = c.by.issue(dir, c.file, c.sub); err != nil {
			return nil, err
		}
	}
	return p, nil
}

func newAuthority(dir, file, name string) (*authority, Pair, error) {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return nil, Pair{}, err
	}
	tmpl, err := template(subject{name: name})
	if err != nil {
		return nil, Pair{}, err
	}
	tmpl.IsCA, tmpl.BasicConstraintsValid = true, true
	tmpl.KeyUsage = x509.KeyUsageCertSign | x509.KeyUsageCRLSign | x509.KeyUsageDigitalSignature
	tmpl.ExtKeyUsage = nil
	der, err := x509.CreateCertificate(rand.Reader, tmpl, tmpl, key.Public(), key)
	if err != nil {
		return nil, Pair{}, err
	}
	cert, err := x509.ParseCertificate(der)
	if err != nil {
		return nil, Pair{}, err
	}
	pair, err := writePair(dir, file, der, key)
	return &authority{cert: cert, key: key}, pair, err
}

func (a *authority) issue(dir, file string, s subject) (Pair, error) {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return Pair{}, err
	}
	tmpl, err := template(s)
	if err != nil {
		return Pair{}, err
	}
	der, err := x509.CreateCertificate(rand.Reader, tmpl, a.cert, key.Public(), a.key)
	if err != nil {
		return Pair{}, fmt.Errorf("issue certificate %s: %w", file, err)
	}
	return writePair(dir, file, der, key)
}

func template(s subject) (*x509.Certificate, error) {
	serial, err := rand.Int(rand.Reader, new(big.Int).Lsh(big.NewInt(1), 120))
	if err != nil {
		return nil, err
	}
	now := time.Now()
	return &x509.Certificate{
		SerialNumber: serial,
		Subject:      pkix.Name{CommonName: s.name, Organization: s.groups},
		NotBefore:    now.Add(-time.Hour), NotAfter: now.Add(validity),
		KeyUsage:    x509.KeyUsageDigitalSignature | x509.KeyUsageKeyEncipherment,
		ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth, x509.ExtKeyUsageClientAuth},
		DNSNames:    s.dns, IPAddresses: s.ips,
	}, nil
}

func writePair(dir, file string, der []byte, key *ecdsa.PrivateKey) (Pair, error) {
	p := Pair{Cert: filepath.Join(dir, file+".crt"), Key: filepath.Join(dir, file+".key")}
	k, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		return p, err
	}
	return p, errors.Join(
		os.WriteFile(p.Cert, pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der}), 0o644),
		os.WriteFile(p.Key, pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: k}), 0o600))
}
