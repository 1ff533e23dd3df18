// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

// Package proxy is the data path: it relays CRI gRPC calls between kubelet and
// the container runtime byte for byte. It knows methods by name, not their
// meaning; whoever wants to see or change messages implements [Director].
package proxy
