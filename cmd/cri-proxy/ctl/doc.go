// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

// Package ctl is `cri-proxy ctl`: commands for the node daemon of this machine,
// over its admin socket.
package ctl
