// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

// Package faultproxy stands between cri-proxy and the container runtime and makes chosen calls
// fail: those that change containers of one slot, and that a restart makes rather than kubelet.
// Everything else passes unread, through the project's own data path.
package faultproxy
