// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

// Package view is what kubelet is shown of a node's containers while operations run. [Slots] says
// which operation holds the place of a container, [Visibility] which containers kubelet must not
// see yet and which it must see running although they have stopped, [History] what kubelet has been
// shown and does not go by yet, and [Starts] when containers are shown to have begun. A [View] has
// all four.
package view
