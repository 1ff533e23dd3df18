// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

// Package ops runs the operations of one node: the gRPC [Server] takes commands, and the [Engine]
// writes them to the journal, carries them out container by container, and takes up those of the
// process before this one. What happens to a container is in the packages swap, restart and
// imageupdate.
package ops
