// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

// Package authority is the certificate authority of the commands to nodes: it keeps a CA of its own in a Secret, publishes it in a
// ConfigMap that nodes can read, approves and signs the nodes' CertificateSigningRequests for signer cri-proxy.io/node, and gives the
// controller its client certificate.
//
// Who a node is depends on nothing that a node can write: the requester's name, which the API server vouches for, becomes the common name, and that
// is what the controller looks at when it dials.
package authority
