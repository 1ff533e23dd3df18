// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

// Package interceptors shows kubelet the node as [view] says while operations run: which containers
// kubelet must not see yet (staged), which it must see running although they have stopped (masked),
// and what happens when it touches a slot that an operation holds. [Director] takes the calls that
// this is about, one file for each family of CRI calls. Its table of methods says which those are.
package interceptors
