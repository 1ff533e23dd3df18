// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

// Package boltfile opens the files of state. None of them is needed to serve kubelet, so none may
// keep the proxy from starting: one that is damaged is set aside, and one that cannot be had, on a
// full disk for example, is tried again later.
package boltfile
