// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package controller

import (
	"context"
	"time"

	"google.golang.org/genproto/googleapis/rpc/errdetails"
	"google.golang.org/grpc"
	"google.golang.org/grpc/status"
	corev1 "k8s.io/api/core/v1"

	opsv1 "github.com/cri-proxy/cri-proxy/api/ops/v1"
)

// BypassedCondition is the type of the condition that says on a Node whether kubelet is led past its cri-proxy.
const BypassedCondition corev1.NodeConditionType = "CRIProxyBypassed"

// reasonBypassed is the reason in the ErrorInfo of a node that refuses commands because kubelet is led past its cri-proxy.
const reasonBypassed = "Bypassed"

// Bypassed says that the node refuses because kubelet is led past its cri-proxy: the message says since when and why.
func (e *NodeError) Bypassed() bool {
	for _, detail := range status.Convert(e.Err).Details() {
		if info, ok := detail.(*errdetails.ErrorInfo); ok && info.GetReason() == reasonBypassed {
			return true
		}
	}
	return false
}

// NodeInfo asks a node how it is. A node that nothing else is asked of gets a connection for this call only: thousands of them that
// are asked every few minutes cost a handshake each, and no memory in between. Errors are *NodeError.
func (g *GRPCNodes) NodeInfo(ctx context.Context, n Node) (*opsv1.NodeInfoResponse, error) {
	const method = "NodeInfo"
	conn, done, err := g.passing(n)
	if err != nil {
		return nil, &NodeError{Node: n, Method: method, Err: err, Silent: true}
	}
	defer done()
	ctx, cancel := context.WithTimeout(ctx, callTimeout)
	defer cancel()
	ctx, end := noteEnding(ctx)
	start := time.Now()
	info, err := opsv1.NewOpsClient(conn).NodeInfo(ctx, &opsv1.NodeInfoRequest{})
	g.metrics.nodeCall(method, status.Code(err), time.Since(start))
	if err != nil {
		return nil, &NodeError{Node: n, Method: method, Err: err, Silent: end.silent(err)}
	}
	return info, nil
}

// passing returns the connection to the node, if there is one, or one of its own for a single call.
func (g *GRPCNodes) passing(n Node) (conn *grpc.ClientConn, done func(), err error) {
	g.mu.Lock()
	known := g.conns[n]
	g.mu.Unlock()
	if known != nil {
		return known.conn, func() {}, nil
	}
	if conn, err = g.dial(n); err != nil {
		return nil, nil, err
	}
	return conn, func() { _ = conn.Close() }, nil
}
