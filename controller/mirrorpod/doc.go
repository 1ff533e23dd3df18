// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

// Package mirrorpod knows the pods that a node has made. With kubelet's credentials alone, a node may make a mirror pod of any labels
// in any namespace (plugin/pkg/admission/noderestriction), and so must not be told anything because of it.
package mirrorpod
