// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

// Package opsv1 is the node's command interface, criproxy.ops.v1. cri-proxy serves it on its admin
// socket and over mTLS. Most of the package is generated; reasons.go has the words that programs
// compare.
package opsv1
