// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package authority

import (
	"crypto"
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/rsa"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/asn1"
	"encoding/pem"
	"net"
	"net/url"
	"strings"
	"testing"
	"time"

	certificatesv1 "k8s.io/api/certificates/v1"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/cri-proxy/cri-proxy/api/identity"
)

// nodeOf returns a node whose kubelet claims another node's name as its own host name, which
// kubelet can do.
func nodeOf(name string) *corev1.Node {
	return &corev1.Node{ObjectMeta: metav1.ObjectMeta{Name: name},
		Status: corev1.NodeStatus{Addresses: []corev1.NodeAddress{
			{Type: corev1.NodeInternalIP, Address: "192.0.2.7"}, {Type: corev1.NodeExternalIP, Address: "203.0.113.7"},
			{Type: corev1.NodeHostName, Address: "node-2"}, {Type: corev1.NodeInternalDNS, Address: "node-2"},
		}}}
}

func ecKey(t testing.TB, curve elliptic.Curve) crypto.Signer {
	t.Helper()
	key, err := ecdsa.GenerateKey(curve, rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	return key
}

// requestOf returns the request that a node makes, with a change.
func requestOf(
	t testing.TB, name string, key crypto.Signer, change func(*x509.CertificateRequest),
) *certificatesv1.CertificateSigningRequest {
	t.Helper()
	template := &x509.CertificateRequest{Subject: pkix.Name{CommonName: name}, DNSNames: []string{name},
		IPAddresses: []net.IP{net.ParseIP("192.0.2.7")}}
	if change != nil {
		change(template)
	}
	der, err := x509.CreateCertificateRequest(rand.Reader, template, key)
	if err != nil {
		t.Fatal(err)
	}
	return &certificatesv1.CertificateSigningRequest{
		ObjectMeta: metav1.ObjectMeta{Name: "r"},
		Spec: certificatesv1.CertificateSigningRequestSpec{
			SignerName: identity.SignerName, Username: "system:node:" + name,
			Groups:  []string{"system:nodes", "system:authenticated"},
			Usages:  []certificatesv1.KeyUsage{certificatesv1.UsageServerAuth, certificatesv1.UsageDigitalSignature},
			Request: pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE REQUEST", Bytes: der}),
		},
	}
}

func TestRequester(t *testing.T) {
	for _, tt := range []struct {
		user   string
		groups []string
		want   string
	}{
		{"system:node:node-1", []string{"system:nodes"}, "node-1"},
		{"system:node:node-1", []string{"system:authenticated"}, ""},
		{"system:node:", []string{"system:nodes"}, ""},
		{"node-1", []string{"system:nodes"}, ""},
		{"system:serviceaccount:kube-system:node-1", []string{"system:nodes"}, ""},
		{"admin", []string{"system:masters"}, ""},
	} {
		r := &certificatesv1.CertificateSigningRequest{
			Spec: certificatesv1.CertificateSigningRequestSpec{Username: tt.user,
				Groups: tt.groups}}
		if name, no := requesterOf(r); name != tt.want || (no == nil) != (tt.want != "") {
			t.Errorf("%s %v: %q %v", tt.user, tt.groups, name, no)
		}
	}
}

func TestCheck(t *testing.T) {
	p256 := ecKey(t, elliptic.P256())
	_, ed, err := ed25519.GenerateKey(rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	rsaKey, err := rsa.GenerateKey(rand.Reader, 2048)
	if err != nil {
		t.Fatal(err)
	}
	type csr = x509.CertificateRequest
	for _, tt := range []struct {
		name   string
		node   string // node-1 when empty
		key    crypto.Signer
		csr    func(*csr)
		change func(*certificatesv1.CertificateSigningRequest)
		reason string
		says   string
	}{
		{name: "as a node asks"},
		{name: "P-384", key: ecKey(t, elliptic.P384())},
		{name: "Ed25519", key: ed},
		{name: "without addresses", csr: func(c *csr) { c.IPAddresses = nil }},
		{name: "external address",
			csr: func(c *csr) { c.IPAddresses = append(c.IPAddresses, net.ParseIP("203.0.113.7")) }},
		{name: "node named by its address", node: "192.0.2.9",
			csr: func(c *csr) { c.DNSNames, c.IPAddresses = nil, []net.IP{net.ParseIP("192.0.2.9")} }},

		{name: "another node's name", csr: func(c *csr) { c.Subject.CommonName = "node-2" },
			reason: "WrongName", says: "node-1"},
		{name: "the controller's name", csr: func(c *csr) { c.Subject.CommonName = identity.ControllerName },
			reason: "WrongName"},
		{name: "no name", csr: func(c *csr) { c.Subject = pkix.Name{} }, reason: "WrongName"},
		{name: "kubelet's name", csr: func(c *csr) {
			c.Subject = pkix.Name{CommonName: "system:node:node-1", Organization: []string{"system:nodes"}}
		}, reason: "WrongName"},
		{name: "an organization", csr: func(c *csr) { c.Subject.Organization = []string{"system:masters"} },
			reason: "WrongName", says: "system:masters"},
		{name: "two common names", csr: func(c *csr) {
			c.Subject.ExtraNames = []pkix.AttributeTypeAndValue{{Type: asn1.ObjectIdentifier{2, 5, 4, 3},
				Value: "node-2"},
				{Type: asn1.ObjectIdentifier{2, 5, 4, 3}, Value: "node-1"}}
		}, reason: "WrongName"},
		{name: "another node's name among the DNS names",
			csr:    func(c *csr) { c.DNSNames = append(c.DNSNames, "node-2") },
			reason: "WrongName"},
		{name: "another node's name, which its own Node has as host name",
			csr: func(c *csr) { c.DNSNames = []string{"node-2"} }, reason: "WrongName"},
		{name: "a wildcard", csr: func(c *csr) { c.DNSNames = []string{"*"} }, reason: "WrongName"},
		{name: "no DNS name", csr: func(c *csr) { c.DNSNames = nil }, reason: "WrongName"},
		{name: "a URI", csr: func(c *csr) { c.URIs = []*url.URL{{Scheme: "spiffe", Host: "x"}} }, reason: "WrongName"},
		{name: "an e-mail address", csr: func(c *csr) { c.EmailAddresses = []string{"a@b.example"} },
			reason: "WrongName"},
		{name: "an address of somebody else", csr: func(c *csr) { c.IPAddresses = []net.IP{net.ParseIP("192.0.2.8")} },
			reason: "WrongAddress", says: "192.0.2.8 is not one of node node-1, which has [192.0.2.7 203.0.113.7]"},
		{name: "node named by its address, without it", node: "192.0.2.9",
			csr: func(c *csr) { c.DNSNames, c.IPAddresses = nil, nil }, reason: "WrongName"},
		{name: "to be a CA", csr: func(c *csr) {
			c.ExtraExtensions = []pkix.Extension{{Id: asn1.ObjectIdentifier{2, 5, 29, 19},
				Value: []byte{0x30, 0x03, 0x01, 0x01, 0xff}}}
		}, reason: "BadRequest", says: "2.5.29.19"},

		{name: "client auth", change: func(r *certificatesv1.CertificateSigningRequest) {
			r.Spec.Usages = []certificatesv1.KeyUsage{"digital signature", "client auth"}
		}, reason: "WrongUsages"},
		{name: "client auth too", change: func(r *certificatesv1.CertificateSigningRequest) {
			r.Spec.Usages = append(r.Spec.Usages, "client auth")
		}, reason: "WrongUsages"},
		{name: "no usages", change: func(r *certificatesv1.CertificateSigningRequest) { r.Spec.Usages = nil },
			reason: "WrongUsages"},
		{name: "cert sign", change: func(r *certificatesv1.CertificateSigningRequest) {
			r.Spec.Usages = []certificatesv1.KeyUsage{"digital signature", "server auth", "cert sign"}
		}, reason: "WrongUsages"},
		{name: "RSA", key: rsaKey, reason: "WrongKey"},
		{name: "P-224", key: ecKey(t, elliptic.P224()), reason: "WrongKey", says: "224"},
		{name: "nothing", change: func(r *certificatesv1.CertificateSigningRequest) { r.Spec.Request = nil },
			reason: "BadRequest"},
		{name: "two", change: func(r *certificatesv1.CertificateSigningRequest) {
			r.Spec.Request = append(r.Spec.Request, r.Spec.Request...)
		}, reason: "BadRequest"},
		{name: "nonsense", change: func(r *certificatesv1.CertificateSigningRequest) {
			r.Spec.Request = pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE REQUEST", Bytes: []byte("nonsense")})
		}, reason: "BadRequest"},
		{name: "signed by nobody", change: func(r *certificatesv1.CertificateSigningRequest) {
			b, _ := pem.Decode(r.Spec.Request)
			b.Bytes[len(b.Bytes)-1] ^= 1
			r.Spec.Request = pem.EncodeToMemory(b)
		}, reason: "BadRequest"},
		{name: "a megabyte of names", reason: "WrongName"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			if tt.node == "" {
				tt.node = "node-1"
			}
			if tt.key == nil {
				tt.key = p256
			}
			if tt.name == "a megabyte of names" {
				tt.csr = func(c *csr) { c.DNSNames = []string{strings.Repeat("a", 1<<20)} }
			}
			r := requestOf(t, tt.node, tt.key, tt.csr)
			if tt.change != nil {
				tt.change(r)
			}
			template, public, no := check(r, nodeOf(tt.node))
			if tt.reason != "" {
				if no == nil || no.reason != tt.reason || !strings.Contains(no.message, tt.says) ||
					len(no.message) > 1000 {
					t.Fatalf("%+v, want %s %q", no, tt.reason, tt.says)
				}
				return
			}
			if no != nil {
				t.Fatal(no)
			}
			if !tt.key.Public().(interface{ Equal(crypto.PublicKey) bool }).Equal(public) {
				t.Error("another key")
			}
			if template.Subject.CommonName != tt.node || len(template.ExtKeyUsage) != 1 ||
				template.ExtKeyUsage[0] != x509.ExtKeyUsageServerAuth || template.IsCA {
				t.Errorf("%+v", template)
			}
		})
	}
}

// FuzzCheck: whatever a node asks for, the controller signs the requester's own name only, for a
// server.
func FuzzCheck(f *testing.F) {
	r := requestOf(f, "node-1", ecKey(f, elliptic.P256()), nil)
	b, _ := pem.Decode(r.Spec.Request)
	f.Add(b.Bytes)
	f.Add([]byte{0x30})
	ca, err := newPair(time.Now(), time.Hour)
	if err != nil {
		f.Fatal(err)
	}
	f.Fuzz(func(t *testing.T, der []byte) {
		r := *r
		r.Spec.Request = pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE REQUEST", Bytes: der})
		template, public, no := check(&r, nodeOf("node-1"))
		if no != nil {
			return
		}
		c, err := ca.sign(template, public, time.Now(), time.Minute)
		if err != nil {
			t.Fatal(err)
		}
		if c.Subject.String() != "CN=node-1" || len(c.DNSNames) != 1 || c.DNSNames[0] != "node-1" || c.IsCA ||
			len(c.ExtKeyUsage) != 1 || c.ExtKeyUsage[0] != x509.ExtKeyUsageServerAuth {
			t.Errorf("signed %v %v", c.Subject, c.DNSNames)
		}
	})
}
