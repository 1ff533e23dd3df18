// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

// Package recreate carries out ContainerRecreateRequests.
//
// The reconciler accepts a request once: it pins the request's pod, node and containers. It
// commands one node operation per container, whose UID derives from the request's. The request
// completes when the pod's status shows every new container ready. All state that matters is in the
// request, in the node's journal and in the pod's status: a controller can die at any point, and
// another one goes on.
package recreate
