// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

// Package opsv1 is the generated Go form of the node's command interface,
// criproxy.ops.v1, served by cri-proxy on its admin socket and over mTLS.
package opsv1
