// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

// Package podsapi asks kubelet about its pods over the Pods API, which kubelet 1.37 and later serve
// on the node (feature gate PodsAPI).
package podsapi
