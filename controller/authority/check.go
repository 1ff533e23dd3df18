// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package authority

import (
	"bytes"
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"fmt"
	"net"
	"net/url"
	"slices"
	"strings"

	certificatesv1 "k8s.io/api/certificates/v1"
	corev1 "k8s.io/api/core/v1"

	"github.com/cri-proxy/cri-proxy/api/identity"
)

// refusal is why a request is not signed: a CamelCase word for programs and a sentence for people.
type refusal struct{ reason, message string }

// refuse bounds the message: the request may have a megabyte of names, and an Event's note has at
// most 1024 bytes.
func refuse(reason, format string, args ...any) *refusal {
	message := fmt.Sprintf(format, args...)
	return &refusal{reason, strings.ToValidUTF8(message[:min(len(message), 1000)], "")}
}

// nodeUser and nodesGroup are the names that the API server gives a kubelet:
// k8s.io/apiserver/pkg/authentication/user.
const (
	nodeUser   = "system:node:"
	nodesGroup = "system:nodes"
)

// requesterOf returns the name of the node that made the request. The API server vouches for that
// name.
func requesterOf(r *certificatesv1.CertificateSigningRequest) (string, *refusal) {
	name, isNode := strings.CutPrefix(r.Spec.Username, nodeUser)
	if !isNode || name == "" || !slices.Contains(r.Spec.Groups, nodesGroup) {
		return "", refuse("NotANode",
			"the requester is %q and not a node: nodes ask with kubelet's credentials, as %sNAME "+
				"of group %s", r.Spec.Username, nodeUser, nodesGroup)
	}
	return name, nil
}

// check returns what to sign for the node that made the request, and the public key. The controller
// writes everything in the certificate itself; from the request it takes only the key and the
// choice among the node's addresses. Beside its name, a node can ask for IP addresses only: kubelet
// itself writes the addresses of its Node, and could claim another node's name as its own host
// name. Nobody takes an IP address for an identity.
func check(r *certificatesv1.CertificateSigningRequest, n *corev1.Node) (*x509.Certificate, any, *refusal) {
	wanted := []certificatesv1.KeyUsage{certificatesv1.UsageDigitalSignature, certificatesv1.UsageServerAuth}
	asked := slices.Clone(r.Spec.Usages)
	slices.Sort(asked)
	if !slices.Equal(asked, wanted) {
		return nil, nil, refuse("WrongUsages", "the usages are %q; a node gets %q and no others", r.Spec.Usages, wanted)
	}
	block, rest := pem.Decode(r.Spec.Request)
	if block == nil || block.Type != "CERTIFICATE REQUEST" || len(bytes.TrimSpace(rest)) > 0 {
		return nil, nil, refuse("BadRequest", "spec.request is not one PEM block of type CERTIFICATE REQUEST")
	}
	csr, err := x509.ParseCertificateRequest(block.Bytes)
	if err != nil {
		return nil, nil, refuse("BadRequest", "spec.request: %v", err)
	}
	if err := csr.CheckSignature(); err != nil {
		return nil, nil, refuse("BadRequest", "the request is not signed with its own key: %v", err)
	}
	switch key := csr.PublicKey.(type) {
	case *ecdsa.PublicKey:
		if bits := key.Curve.Params().BitSize; bits != 256 && bits != 384 {
			return nil, nil, refuse("WrongKey", "an ECDSA key with %d bits; P-256, P-384 and Ed25519 are accepted",
				bits)
		}
	case ed25519.PublicKey:
	default:
		return nil, nil, refuse("WrongKey", "a key of type %s; P-256, P-384 and Ed25519 are accepted",
			csr.PublicKeyAlgorithm)
	}

	if csr.Subject.CommonName != n.Name || len(csr.Subject.Names) != 1 {
		return nil, nil, refuse("WrongName", "the subject is %q and the request is node %s's, who gets CN=%s",
			csr.Subject, n.Name, n.Name)
	}
	own := net.ParseIP(n.Name)
	names := []string{n.Name}
	if own != nil {
		names = nil
	}
	if !slices.Equal(csr.DNSNames, names) {
		return nil, nil, refuse("WrongName", "the DNS names are %q; node %s gets %q and no others",
			csr.DNSNames, n.Name, names)
	}
	if len(csr.EmailAddresses) > 0 || len(csr.URIs) > 0 {
		return nil, nil, refuse("WrongName", "e-mail addresses %q, URIs %q; a node gets none",
			csr.EmailAddresses, csr.URIs)
	}
	for _, e := range csr.Extensions {
		if oid := e.Id.String(); oid != subjectAltName {
			return nil, nil, refuse("BadRequest", "it asks for extension %s; a node gets its names and addresses only",
				oid)
		}
	}
	allowed := addresses(n)
	for _, ip := range csr.IPAddresses {
		if !ip.Equal(own) && !slices.ContainsFunc(allowed, ip.Equal) {
			return nil, nil, refuse("WrongAddress", "address %s is not one of node %s, which has %v", ip, n.Name,
				allowed)
		}
	}
	if own != nil && !slices.ContainsFunc(csr.IPAddresses, own.Equal) {
		return nil, nil, refuse("WrongName", "node %s is named by its address, which is not in the request", n.Name)
	}
	return &x509.Certificate{
		Subject:     pkix.Name{CommonName: n.Name},
		DNSNames:    names,
		IPAddresses: csr.IPAddresses,
		URIs:        []*url.URL{identity.NodeURI(string(n.UID))},
		KeyUsage:    x509.KeyUsageDigitalSignature,
		ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth},
	}, csr.PublicKey, nil
}

// subjectAltName is id-ce-subjectAltName of RFC 5280.
const subjectAltName = "2.5.29.17"

// addresses are the IP addresses of a node.
func addresses(n *corev1.Node) (all []net.IP) {
	for _, a := range n.Status.Addresses {
		if ip := net.ParseIP(a.Address); ip != nil && (a.Type == corev1.NodeInternalIP ||
			a.Type == corev1.NodeExternalIP) {
			all = append(all, ip)
		}
	}
	return all
}
