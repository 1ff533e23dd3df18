// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

// Package takeover is the protocol between two cri-proxy processes on one node: the process that
// owns the state, and the process that takes the state over.
package takeover
