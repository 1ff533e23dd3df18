// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

// Package install puts the proxy between kubelet and the runtime of a running node, and takes it
// out again. Whatever goes wrong on the way, kubelet has a runtime.
package install
