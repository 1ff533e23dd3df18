// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

// Package mirrorpod recognizes pods that a node has created. With kubelet's credentials alone, a
// node may create a mirror pod with any labels in any namespace
// (plugin/pkg/admission/noderestriction). So the controller must not tell a node anything because
// of such a pod.
package mirrorpod
