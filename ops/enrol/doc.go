// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

// Package enrol gets the node its identity from the cluster: a server certificate by a
// CertificateSigningRequest, made with kubelet's credentials and signed by the controller, and the
// CA of who may command the node.
//
// What it gets lies in two files that internal/mtls reads again when they change; nothing else
// waits for it. It speaks to the API server by net/http: client-go made the daemon's idle memory
// 4.5 MiB larger just by being linked.
package enrol
