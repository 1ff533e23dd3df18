// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

// Package imageupdate is the [swap.Kind] of an image update: the new container is prepared and
// waits. After the commit, kubelet reads the new image in the pod's spec and stops the old
// container. That stop is answered when the new container runs, and kubelet's CreateContainer is
// answered with the new container.
package imageupdate
