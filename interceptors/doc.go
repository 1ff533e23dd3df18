// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

// Package interceptors is kubelet's view of the node while a swap runs: which
// containers it must not see yet (staged), which it must see running although
// they have stopped (masked), and what happens when it touches a slot that an
// operation holds. [View] keeps that state; [Director] applies it, one file per
// CRI call or family of calls.
package interceptors
