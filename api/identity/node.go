// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package identity

import (
	"crypto/x509"
	"net/url"
	"strings"
)

// uidPrefix begins the URI that binds a certificate to one Node object.
const uidPrefix = "urn:cri-proxy:node:"

// NodeURI is what the certificate of a node has as its URI: the UID of the Node that it was signed
// for. A name may be given to another machine later.
func NodeURI(uid string) *url.URL {
	return &url.URL{Scheme: "urn", Opaque: strings.TrimPrefix(uidPrefix, "urn:") + uid}
}

// NodeUID returns the UID that a certificate is bound to; empty for one that is bound to none, as
// those of before this was so, and those from files.
func NodeUID(c *x509.Certificate) string {
	for _, u := range c.URIs {
		if uid, ok := strings.CutPrefix(u.String(), uidPrefix); ok {
			return uid
		}
	}
	return ""
}
