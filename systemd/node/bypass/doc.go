// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

// Package bypass takes the proxy out of kubelet's path and puts it back: kubelet dials a symlink,
// which leads to the proxy's socket or to the runtime's.
package bypass
