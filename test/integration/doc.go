// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

// Package integration tests the node side, proxy, interceptors and swap engine,
// against a real containerd. A scripted kubelet stands in for the real one, whose turn is
// in package e2e.
package integration
