// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

// Package runtimeconfig finds out how containerd reaches registries: from the process behind its
// socket, that process's command line and environment, and the configuration that it was started
// with. All that leaves this package are requests to registries and a summary without secrets.
package runtimeconfig
