// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

// Package multinode tests what needs several real nodes: a cluster whose nodes have a containerd, a
// cri-proxy, a kubelet and (all but the first) a network namespace of their own, and a controller
// that commands them over mTLS.
package multinode
