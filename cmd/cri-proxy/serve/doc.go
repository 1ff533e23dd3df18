// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

// Package serve is `cri-proxy serve`, the node daemon: it wires the data path,
// kubelet's view and the engine together and owns their start and end.
package serve
