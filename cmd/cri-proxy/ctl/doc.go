// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

// Package ctl is the command line of `cri-proxy ctl`: commands for the daemon of this machine.
// Package opscli carries them out.
package ctl
