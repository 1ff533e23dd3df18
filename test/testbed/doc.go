// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

// Package testbed brings up the real thing on this machine: containerd, runc, CNI, an image
// registry, etcd, the Kubernetes control plane and kubelets, all built from pinned Go modules
// (test/components), with cri-proxy between kubelet and containerd.
//
// A [Bed] has directories, sockets, a bridge with its own subnet, and a cgroup parent of its own,
// so that any number of beds run side by side; [Bed.Close] leaves nothing behind, and [Start]
// sweeps what a killed earlier run left. Needs root and Linux.
package testbed
