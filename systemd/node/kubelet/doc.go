// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

// Package kubelet finds out which runtime endpoint the kubelet of this machine uses and where that
// is set, and says which files to change for another one.
package kubelet
