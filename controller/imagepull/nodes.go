// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package imagepull

import (
	"context"
	"errors"

	"google.golang.org/grpc/codes"

	opsv1 "github.com/cri-proxy/cri-proxy/api/ops/v1"
	"github.com/cri-proxy/cri-proxy/controller/nodes"
	"github.com/cri-proxy/cri-proxy/controller/pullsecrets"
)

// Nodes commands the nodes. All errors are *nodes.Error, and no unary call takes longer than a few seconds.
type Nodes interface {
	// Pull starts a pull, or returns the one of that UID.
	Pull(ctx context.Context, n nodes.Node, r *opsv1.PullRequest) (*opsv1.PullOperation, error)
	// ListPulls returns the node's pulls, newest first.
	ListPulls(ctx context.Context, n nodes.Node) ([]*opsv1.PullOperation, error)
	// WatchPull calls each with the pull as it is and after changes, until it returns false or the pull has finished,
	// and returns nil then.
	WatchPull(ctx context.Context, n nodes.Node, uid string, each func(*opsv1.PullOperation) bool) error
	// CancelPull ends a pull; codes.NotFound when the node has none of that UID, or no longer.
	CancelPull(ctx context.Context, n nodes.Node, uid, reason string) (*opsv1.PullOperation, error)
	// ListPins returns the images that the node keeps, by owner.
	ListPins(ctx context.Context, n nodes.Node) ([]*opsv1.ImagePin, error)
	// ReleasePins ends the pins of an owner, on one image or, with an empty ID, all.
	ReleasePins(ctx context.Context, n nodes.Node, owner, imageID string) (int, error)
}

var _ Nodes = (*nodes.Client)(nil)

// Reasons of nodes that are left out or fail without a pull having failed.
const (
	reasonNotReady       = "NodeNotReady"
	reasonNoAddress      = "NoAddress"
	reasonUnreachable    = "NodeUnreachable"
	reasonNoProxy        = "NoProxy"
	reasonOutdated       = "ProxyOutdated"
	reasonRefuses        = "NodeRefuses"
	reasonBusy           = "NodeBusy"
	reasonUnavailable    = "NodeUnavailable"
	reasonInvalidRequest = "InvalidRequest"
	reasonSecrets        = "PullSecretsUnreadable"
)

// trouble is why a node cannot be commanded.
type trouble struct {
	reason, message string
	// final says that trying again is of no use for now.
	final bool
}

func troubleOf(err error) trouble {
	var unreadable *pullsecrets.UnreadableError
	if errors.As(err, &unreadable) {
		return trouble{reason: reasonSecrets, message: err.Error()}
	}
	t := trouble{reason: reasonUnavailable, message: err.Error()}
	var nodeError *nodes.Error
	if !errors.As(err, &nodeError) {
		return t
	}
	switch c := nodeError.Code(); {
	case nodeError.Refused():
		t.reason = reasonNoProxy
		t.message = "nothing listens at " + nodeError.Node.Address + ": install cri-proxy on the node, or start it"
	case nodeError.Silent:
		t.reason = reasonUnreachable
	case c == codes.Unimplemented:
		t.reason, t.final = reasonOutdated, true
	case c == codes.PermissionDenied || c == codes.Unauthenticated:
		t.reason = reasonRefuses
	case c == codes.ResourceExhausted:
		t.reason = reasonBusy
	case !nodeError.Temporary():
		t.reason, t.final = reasonInvalidRequest, true
	}
	return t
}

func notFound(err error) bool {
	var nodeError *nodes.Error
	return errors.As(err, &nodeError) && nodeError.Code() == codes.NotFound
}
