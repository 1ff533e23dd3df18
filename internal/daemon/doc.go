// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

// Package daemon is the process that `cri-proxy serve` runs on a node. The daemon connects the data
// path, kubelet's view and the operations engine, and owns their start and their end.
package daemon
