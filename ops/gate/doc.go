// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

// Package gate holds a container's process just before its entrypoint: the runtime has done all
// its work, and a byte in a FIFO lets the application begin.
//
// What waits is an OCI startContainer hook, which runc runs inside the container as the last thing
// before it executes the entrypoint. The container gets it through a CDI device, a directory with
// the hook's program and the FIFO through a mount.
package gate
