// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

// Package fakenode is a node without Kubernetes for tests of operations: a container runtime that
// follows containerd's rules for names, states and errors, whose calls a test can watch, hold up
// and fail. Its containers have no processes, or, with [NewProcesses], real ones behind real gates.
package fakenode
