// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

// Package prepull puts images on the node before they are needed: one after the other, within limits of speed and
// disk, giving way to kubelet's own pulls while these get bytes, and kept from kubelet's image garbage collection for a time.
//
// The runtime itself pulls, by CRI, so that all of its configuration counts. What CRI lacks comes from containerd's own
// services on the same socket: a lease keeps what has been fetched when a pull is cut off, and the content store tells how far it
// is. With a speed limit, and while kubelet pulls, the layers are fetched here into the content store and CRI finishes. A runtime
// without those services pulls without them.
package prepull
