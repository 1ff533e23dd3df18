// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

// Package prepull puts images on the node before they are needed: one after the other, within
// limits of speed and disk. Its pulls give way to kubelet's own while these get bytes, and its
// images are kept from kubelet's image garbage collection for a time.
//
// The runtime itself pulls, by CRI, so that all of its configuration counts. What CRI lacks comes
// from containerd's own services on the same socket: a lease keeps what has been fetched when a
// pull is cut off, and the content store tells how far it is. With a speed limit, and while kubelet
// pulls, the layers are fetched here into the content store and CRI finishes. A runtime without
// those services pulls without them.
//
// A pull is an operation with a record in a journal. The [Puller] decides when an attempt of it
// begins and what follows the attempt; an attempt asks the registry or the runtime. The packages
// below have the parts that need neither: containerd's store, registries, pins, claims, and giving
// way.
package prepull
