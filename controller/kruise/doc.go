// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

// Package kruise keeps out of OpenKruise's way. If OpenKruise is in the cluster, its own
// controllers carry out ContainerRecreateRequests, ImagePullJobs and ImageListPullJobs. Two
// controllers would restart everything twice. A [Lookout] sees whether OpenKruise is there. A
// [Group] lets the controllers of these kinds work only while it is not.
package kruise
