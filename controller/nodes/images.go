// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package nodes

import (
	"context"

	"google.golang.org/grpc"

	opsv1 "github.com/cri-proxy/cri-proxy/api/ops/v1"
)

// images runs one unary command of the Images service.
func images[T any](
	ctx context.Context, c *Client, n Node, method string, do func(context.Context, opsv1.ImagesClient) (T, error),
) (T, error) {
	return call(ctx, c, n, method, func(ctx context.Context, conn *grpc.ClientConn) (T, error) {
		return do(ctx, opsv1.NewImagesClient(conn))
	})
}

// Pull starts a pull, or returns the pull of that UID.
func (c *Client) Pull(ctx context.Context, n Node, r *opsv1.PullRequest) (*opsv1.PullOperation, error) {
	return images(ctx, c, n, "Pull", func(ctx context.Context, i opsv1.ImagesClient) (*opsv1.PullOperation, error) {
		return i.Pull(ctx, r)
	})
}

// ListPulls returns the node's pulls, newest first.
func (c *Client) ListPulls(ctx context.Context, n Node) ([]*opsv1.PullOperation, error) {
	return images(ctx, c, n, "ListPulls",
		func(ctx context.Context, i opsv1.ImagesClient) ([]*opsv1.PullOperation, error) {
			answer, err := i.ListPulls(ctx, &opsv1.ListPullsRequest{})
			return answer.GetPulls(), err
		})
}

// CancelPull ends a pull. code is one of opsv1.CancelCode... or empty, reason is for people.
func (c *Client) CancelPull(ctx context.Context, n Node, uid, code, reason string) (*opsv1.PullOperation, error) {
	return images(ctx, c, n, "CancelPull",
		func(ctx context.Context, i opsv1.ImagesClient) (*opsv1.PullOperation, error) {
			return i.CancelPull(ctx, &opsv1.CancelPullRequest{Uid: uid, Code: code, Reason: reason})
		})
}

// ListPins returns the images that the node keeps, by owner.
func (c *Client) ListPins(ctx context.Context, n Node) ([]*opsv1.ImagePin, error) {
	return images(ctx, c, n, "ListPins", func(ctx context.Context, i opsv1.ImagesClient) ([]*opsv1.ImagePin, error) {
		answer, err := i.ListPins(ctx, &opsv1.ListPinsRequest{})
		return answer.GetPins(), err
	})
}

// ReleasePins ends the pins of an owner, on one image or, with an empty ID, on all images, and
// returns how many there were.
func (c *Client) ReleasePins(ctx context.Context, n Node, owner, imageID string) (int, error) {
	return images(ctx, c, n, "ReleasePins", func(ctx context.Context, i opsv1.ImagesClient) (int, error) {
		answer, err := i.ReleasePins(ctx, &opsv1.ReleasePinsRequest{Owner: owner, ImageId: imageID})
		return int(answer.GetReleased()), err
	})
}

// WatchPull calls each with the pull as it is and after changes, until each returns false or the
// pull has finished, and returns nil then.
func (c *Client) WatchPull(ctx context.Context, n Node, uid string, each func(*opsv1.PullOperation) bool) error {
	return follow(ctx, c, n, "WatchPull",
		func(ctx context.Context, conn *grpc.ClientConn) (grpc.ServerStreamingClient[opsv1.PullOperation], error) {
			return opsv1.NewImagesClient(conn).WatchPull(ctx, &opsv1.WatchPullRequest{Uid: uid})
		}, each)
}
