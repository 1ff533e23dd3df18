// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

// Package apiserver makes single requests to the API server with kubelet's kubeconfig, or a pod's
// ServiceAccount. It is small, where client-go would double the size of the node's binary.
package apiserver
