// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

// Command cri-proxy is the node binary: `cri-proxy serve` relays CRI calls
// between kubelet and the container runtime and restarts containers in place,
// `cri-proxy ctl` commands it over its admin socket.
package main
