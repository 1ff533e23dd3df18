// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package controller

import (
	"context"
	"errors"
	"io"
	"strings"

	"google.golang.org/grpc"
	"google.golang.org/grpc/status"
	corev1 "k8s.io/api/core/v1"

	opsv1 "github.com/cri-proxy/cri-proxy/api/ops/v1"
)

// NodeOf is where cri-proxy on n is reached: its OpsAddressAnnotation, else its internal address, else its host name,
// with port where none is given. The error says what the node lacks.
func NodeOf(n *corev1.Node, port int) (Node, error) { return nodeOf(n, port) }

// Refused says that nothing listens at the node's address, though the node is there to say so.
func (e *NodeError) Refused() bool {
	return e.Silent && strings.Contains(status.Convert(e.Err).Message(), "connection refused")
}

// images runs one unary command of the Images service within callTimeout.
func images[T any](ctx context.Context, g *GRPCNodes, n Node, method string, do func(context.Context, opsv1.ImagesClient) (T, error)) (T, error) {
	return callOn(ctx, g, n, method, func(ctx context.Context, conn *grpc.ClientConn) (T, error) {
		return do(ctx, opsv1.NewImagesClient(conn))
	})
}

// Pull starts a pull, or returns the one of that UID. Errors are *NodeError.
func (g *GRPCNodes) Pull(ctx context.Context, n Node, r *opsv1.PullRequest) (*opsv1.PullOperation, error) {
	return images(ctx, g, n, "Pull", func(ctx context.Context, c opsv1.ImagesClient) (*opsv1.PullOperation, error) {
		return c.Pull(ctx, r)
	})
}

// ListPulls returns the node's pulls, newest first. Errors are *NodeError.
func (g *GRPCNodes) ListPulls(ctx context.Context, n Node) ([]*opsv1.PullOperation, error) {
	return images(ctx, g, n, "ListPulls", func(ctx context.Context, c opsv1.ImagesClient) ([]*opsv1.PullOperation, error) {
		answer, err := c.ListPulls(ctx, &opsv1.ListPullsRequest{})
		return answer.GetPulls(), err
	})
}

// CancelPull ends a pull. Errors are *NodeError.
func (g *GRPCNodes) CancelPull(ctx context.Context, n Node, uid, reason string) (*opsv1.PullOperation, error) {
	return images(ctx, g, n, "CancelPull", func(ctx context.Context, c opsv1.ImagesClient) (*opsv1.PullOperation, error) {
		return c.CancelPull(ctx, &opsv1.CancelPullRequest{Uid: uid, Reason: reason})
	})
}

// ListPins returns the images that the node keeps, by owner. Errors are *NodeError.
func (g *GRPCNodes) ListPins(ctx context.Context, n Node) ([]*opsv1.ImagePin, error) {
	return images(ctx, g, n, "ListPins", func(ctx context.Context, c opsv1.ImagesClient) ([]*opsv1.ImagePin, error) {
		answer, err := c.ListPins(ctx, &opsv1.ListPinsRequest{})
		return answer.GetPins(), err
	})
}

// ReleasePins ends the pins of an owner, on one image or, with an empty ID, all, and returns how many there were. Errors
// are *NodeError.
func (g *GRPCNodes) ReleasePins(ctx context.Context, n Node, owner, imageID string) (int, error) {
	return images(ctx, g, n, "ReleasePins", func(ctx context.Context, c opsv1.ImagesClient) (int, error) {
		answer, err := c.ReleasePins(ctx, &opsv1.ReleasePinsRequest{Owner: owner, ImageId: imageID})
		return int(answer.GetReleased()), err
	})
}

// WatchPull calls each with the pull as it is and after changes, until it returns false or the pull has finished, and
// returns nil then. Errors are *NodeError.
func (g *GRPCNodes) WatchPull(ctx context.Context, n Node, uid string, each func(*opsv1.PullOperation) bool) error {
	const method = "WatchPull"
	_, conn, err := g.client(n)
	if err != nil {
		return &NodeError{Node: n, Method: method, Err: err, Silent: true}
	}
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	ctx, end := noteEnding(ctx)
	stream, err := opsv1.NewImagesClient(conn).WatchPull(ctx, &opsv1.WatchPullRequest{Uid: uid})
	for err == nil {
		var op *opsv1.PullOperation
		if op, err = stream.Recv(); err == nil && !each(op) {
			break
		}
	}
	if errors.Is(err, io.EOF) {
		err = nil
	}
	g.metrics.nodeCall(method, status.Code(err), 0)
	if err != nil {
		return &NodeError{Node: n, Method: method, Err: err, Silent: end.silent(err)}
	}
	return nil
}
