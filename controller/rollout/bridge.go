// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package rollout

import (
	"github.com/cri-proxy/cri-proxy/controller/rollout/follow"
	"github.com/cri-proxy/cri-proxy/controller/rollout/gates"
	"github.com/cri-proxy/cri-proxy/controller/rollout/nodeops"
	"github.com/cri-proxy/cri-proxy/controller/rollout/notice"
)

// The names by which the manager sets up what has moved to packages of its own.
type (
	// Nodes commands nodes.
	Nodes = nodeops.Nodes
	// FollowReconciler lets pods follow the template of their workload.
	FollowReconciler = follow.Reconciler
	// GateReconciler opens readiness gates.
	GateReconciler = gates.Reconciler
	// Metrics are the metrics of rollouts.
	Metrics = notice.Metrics
	// Gated is a workload with a readiness gate.
	Gated = gates.Gated
)

var (
	// NewMetrics registers the metrics of rollouts.
	NewMetrics = notice.NewMetrics
	// FindGated finds workloads with readiness gates.
	FindGated = gates.FindGated
)
