// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

// Package authority is the certificate authority of the commands to nodes: it keeps a CA of its own
// in a Secret, publishes it in a ConfigMap that nodes can read, approves and signs the nodes'
// CertificateSigningRequests for signer cri-proxy.io/node, and gives the controller its client
// certificate.
//
// A node's identity depends on nothing that a node can write. The API server vouches for the
// requester's name, that name becomes the common name of the certificate, and the controller checks
// the common name when it dials.
package authority
