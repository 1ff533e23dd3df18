// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

// Package e2e tests the whole path on a real one-node cluster: kubelet talks to
// containerd only through cri-proxy, and cri-controller turns custom resources into restarts.
//
// Tests that restart parts of the cluster, or hold the proxy, run alone. The others may be
// parallel: they begin when those have ended.
package e2e
