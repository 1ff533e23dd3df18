// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

// Package ops runs the operations of one node. It holds the swap engine, which restarts a container
// in place without kubelet's taking part, the journal that makes an operation survive the death of
// the proxy or the runtime, and the gRPC server that takes commands.
package ops
