// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

// Package kruise keeps out of OpenKruise's way. Where OpenKruise is in the cluster its own
// controllers carry out ContainerRecreateRequests, ImagePullJobs and ImageListPullJobs; two that do
// would restart everything twice. [Lookout] sees whether it is there, [Group] has the controllers of
// these kinds work only while it is not.
package kruise
