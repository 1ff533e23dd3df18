// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

// Package listener makes listening sockets, takes them from systemd, and accepts connections in a
// way that can pause.
package listener
