// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

// Package controller turns custom resources into idempotent commands for the
// nodes and writes what comes of them into the resources' status.
//
// A ContainerRecreateRequest is accepted once (its pod, node and containers are
// pinned), becomes one node operation per container whose UID derives from the
// request's, and completes when the pod's status shows every new container ready.
// All state that matters is in the request, in the node's journal and in the pod
// status: a controller can die at any point and another one goes on.
package controller
