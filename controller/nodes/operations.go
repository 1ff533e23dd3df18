// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package nodes

import (
	"context"

	"google.golang.org/grpc"

	opsv1 "github.com/cri-proxy/cri-proxy/api/ops/v1"
)

// Operations are the commands that restart containers. All errors are [*Error].
type Operations interface {
	// Restart starts an operation, or returns the operation of that UID.
	Restart(ctx context.Context, n Node, r *opsv1.RestartRequest) (*opsv1.Operation, error)
	// GetOperation returns one operation; codes.NotFound when the node has none of that UID, or no
	// longer.
	GetOperation(ctx context.Context, n Node, uid string) (*opsv1.Operation, error)
	// ListOperations returns the node's newest operations.
	ListOperations(ctx context.Context, n Node) ([]*opsv1.Operation, error)
	// CancelOperation cancels an operation that has not stopped anything; codes.FailedPrecondition
	// when it has.
	CancelOperation(ctx context.Context, n Node, uid, reason string) (*opsv1.Operation, error)
	// WatchOperation calls each with the operation as it is and after every change, and returns nil
	// after the finished one.
	WatchOperation(ctx context.Context, n Node, uid string, each func(*opsv1.Operation)) error
}

// ops runs one unary command of the Ops service.
func ops[T any](
	ctx context.Context, c *Client, n Node, method string, do func(context.Context, opsv1.OpsClient) (T, error),
) (T, error) {
	return call(ctx, c, n, method, func(ctx context.Context, conn *grpc.ClientConn) (T, error) {
		return do(ctx, opsv1.NewOpsClient(conn))
	})
}

// Restart implements Operations.
func (c *Client) Restart(ctx context.Context, n Node, r *opsv1.RestartRequest) (*opsv1.Operation, error) {
	return ops(ctx, c, n, "Restart", func(ctx context.Context, o opsv1.OpsClient) (*opsv1.Operation, error) {
		return o.Restart(ctx, r)
	})
}

// GetOperation implements Operations.
func (c *Client) GetOperation(ctx context.Context, n Node, uid string) (*opsv1.Operation, error) {
	return ops(ctx, c, n, "GetOperation", func(ctx context.Context, o opsv1.OpsClient) (*opsv1.Operation, error) {
		return o.GetOperation(ctx, &opsv1.GetOperationRequest{Uid: uid})
	})
}

// ListOperations implements Operations.
func (c *Client) ListOperations(ctx context.Context, n Node) ([]*opsv1.Operation, error) {
	return ops(ctx, c, n, "ListOperations", func(ctx context.Context, o opsv1.OpsClient) ([]*opsv1.Operation, error) {
		answer, err := o.ListOperations(ctx, &opsv1.ListOperationsRequest{})
		return answer.GetOperations(), err
	})
}

// CancelOperation implements Operations.
func (c *Client) CancelOperation(ctx context.Context, n Node, uid, reason string) (*opsv1.Operation, error) {
	return ops(ctx, c, n, "CancelOperation", func(ctx context.Context, o opsv1.OpsClient) (*opsv1.Operation, error) {
		return o.CancelOperation(ctx, &opsv1.CancelOperationRequest{Uid: uid, Reason: reason})
	})
}

// WatchOperation implements Operations.
func (c *Client) WatchOperation(ctx context.Context, n Node, uid string, each func(*opsv1.Operation)) error {
	return follow(ctx, c, n, "WatchOperation",
		func(ctx context.Context, conn *grpc.ClientConn) (grpc.ServerStreamingClient[opsv1.Operation], error) {
			return opsv1.NewOpsClient(conn).WatchOperation(ctx, &opsv1.WatchOperationRequest{Uid: uid})
		},
		func(op *opsv1.Operation) bool {
			each(op)
			return true
		})
}

// NodeInfo asks a node how it is. A node that nobody asks anything else gets a connection for this
// call only: for thousands of nodes, each asked every few minutes, a handshake per call costs less
// than memory in between.
func (c *Client) NodeInfo(ctx context.Context, n Node) (*opsv1.NodeInfoResponse, error) {
	const method = "NodeInfo"
	conn, done, err := c.single(n)
	if err != nil {
		return nil, &Error{Node: n, Method: method, Err: err, Silent: true}
	}
	defer done()
	ask := func(ctx context.Context, conn *grpc.ClientConn) (*opsv1.NodeInfoResponse, error) {
		return opsv1.NewOpsClient(conn).NodeInfo(ctx, &opsv1.NodeInfoRequest{})
	}
	return unary(ctx, c, n, method, conn, ask)
}

// PrepareUpgrade makes new images ready on a node, or returns the operation of that UID.
func (c *Client) PrepareUpgrade(ctx context.Context, n Node, r *opsv1.PrepareUpgradeRequest) (*opsv1.Operation, error) {
	return ops(ctx, c, n, "PrepareUpgrade", func(ctx context.Context, o opsv1.OpsClient) (*opsv1.Operation, error) {
		return o.PrepareUpgrade(ctx, r)
	})
}

// CommitUpgrade announces the patch of the pod. The code is codes.FailedPrecondition when the
// operation is not prepared, or has ended.
func (c *Client) CommitUpgrade(ctx context.Context, n Node, r *opsv1.CommitUpgradeRequest) (*opsv1.Operation, error) {
	return ops(ctx, c, n, "CommitUpgrade", func(ctx context.Context, o opsv1.OpsClient) (*opsv1.Operation, error) {
		return o.CommitUpgrade(ctx, r)
	})
}

// AbortUpgrade takes an upgrade back. The code is codes.FailedPrecondition when kubelet has begun
// to stop a container.
func (c *Client) AbortUpgrade(ctx context.Context, n Node, uid, reason string) (*opsv1.Operation, error) {
	return ops(ctx, c, n, "AbortUpgrade", func(ctx context.Context, o opsv1.OpsClient) (*opsv1.Operation, error) {
		return o.AbortUpgrade(ctx, &opsv1.AbortUpgradeRequest{Uid: uid, Reason: reason})
	})
}
