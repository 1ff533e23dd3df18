// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

// Package caller knows which processes dial the CRI socket. It finds kubelet among them, and reads
// kubelet's environment and settings.
package caller
