// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

// Package opscli calls the daemon of this machine over its admin socket and shows the answers to
// people. `cri-proxy ctl` adds the command line.
package opscli
