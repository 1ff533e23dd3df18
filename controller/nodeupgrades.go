// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package controller

import (
	"context"

	corev1 "k8s.io/api/core/v1"

	opsv1 "github.com/cri-proxy/cri-proxy/api/ops/v1"
)

// PrepareUpgrade makes new images ready on a node, or returns the operation of that UID. Errors are *NodeError.
func (g *GRPCNodes) PrepareUpgrade(ctx context.Context, n Node, r *opsv1.PrepareUpgradeRequest) (*opsv1.Operation, error) {
	return call(ctx, g, n, "PrepareUpgrade", func(ctx context.Context, c opsv1.OpsClient) (*opsv1.Operation, error) {
		return c.PrepareUpgrade(ctx, r)
	})
}

// CommitUpgrade announces the patch of the pod. Errors are *NodeError; codes.FailedPrecondition when the operation is not
// prepared, or has ended.
func (g *GRPCNodes) CommitUpgrade(ctx context.Context, n Node, r *opsv1.CommitUpgradeRequest) (*opsv1.Operation, error) {
	return call(ctx, g, n, "CommitUpgrade", func(ctx context.Context, c opsv1.OpsClient) (*opsv1.Operation, error) {
		return c.CommitUpgrade(ctx, r)
	})
}

// AbortUpgrade takes an upgrade back. Errors are *NodeError; codes.FailedPrecondition when kubelet has begun to stop a
// container.
func (g *GRPCNodes) AbortUpgrade(ctx context.Context, n Node, uid, reason string) (*opsv1.Operation, error) {
	return call(ctx, g, n, "AbortUpgrade", func(ctx context.Context, c opsv1.OpsClient) (*opsv1.Operation, error) {
		return c.AbortUpgrade(ctx, &opsv1.AbortUpgradeRequest{Uid: uid, Reason: reason})
	})
}

// HookOf is the node's form of a lifecycle handler of container c, with a named port resolved and podIP for a host that is
// left out; nil for no handler. An error says why kubelet could not run the handler either.
func HookOf(c *corev1.Container, h *corev1.LifecycleHandler, podIP string) (*opsv1.Hook, error) {
	return hookOf(c, h, podIP)
}
