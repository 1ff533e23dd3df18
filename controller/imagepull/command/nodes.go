// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package command

import (
	"context"
	"errors"

	"google.golang.org/grpc/codes"

	opsv1 "github.com/cri-proxy/cri-proxy/api/ops/v1"
	"github.com/cri-proxy/cri-proxy/controller/nodes"
	"github.com/cri-proxy/cri-proxy/controller/pullsecrets"
)

// Nodes commands the nodes. All errors are *nodes.Error, and no unary call takes longer
// than a few seconds.
type Nodes interface {
	// Pull starts a pull, or returns the one of that UID.
	Pull(ctx context.Context, n nodes.Node, r *opsv1.PullRequest) (*opsv1.PullOperation, error)
	// ListPulls returns the node's pulls, newest first.
	ListPulls(ctx context.Context, n nodes.Node) ([]*opsv1.PullOperation, error)
	// WatchPull calls each with the pull as it is and after changes, until each returns false or
	// the pull has finished, and returns nil then.
	WatchPull(ctx context.Context, n nodes.Node, uid string, each func(*opsv1.PullOperation) bool) error
	// CancelPull ends a pull. code is one of opsv1.CancelCode..., reason is for people. The error
	// has codes.NotFound when the node has no pull of that UID.
	CancelPull(ctx context.Context, n nodes.Node, uid, code, reason string) (*opsv1.PullOperation, error)
	// ListPins returns the images that the node keeps, by owner.
	ListPins(ctx context.Context, n nodes.Node) ([]*opsv1.ImagePin, error)
	// ReleasePins ends the pins of an owner, on one image or, with an empty ID, all.
	ReleasePins(ctx context.Context, n nodes.Node, owner, imageID string) (int, error)
}

var _ Nodes = (*nodes.Client)(nil)

// Reasons of nodes that are left out, or fail, though no pull has failed. spec has two more.
const (
	reasonUnreachable    = "NodeUnreachable"
	ReasonNoProxy        = "NoProxy"
	reasonOutdated       = "ProxyOutdated"
	reasonRefuses        = "NodeRefuses"
	reasonBusy           = "NodeBusy"
	reasonUnavailable    = "NodeUnavailable"
	ReasonInvalidRequest = "InvalidRequest"
	reasonSecrets        = "PullSecretsUnreadable"
)

// Trouble is why a node cannot be commanded.
type Trouble struct {
	Reason, Message string
	// Final says that trying again is of no use for now.
	Final bool
	// Lost says that the node did not answer, and may have taken the command.
	Lost bool
}

// TroubleOf reads an error of [Client].
func TroubleOf(err error) Trouble {
	var unreadable *pullsecrets.UnreadableError
	if errors.As(err, &unreadable) {
		return Trouble{Reason: reasonSecrets, Message: err.Error()}
	}
	t := Trouble{Reason: reasonUnavailable, Message: err.Error()}
	var nodeError *nodes.Error
	if !errors.As(err, &nodeError) {
		return t
	}
	switch c := nodeError.Code(); {
	case nodeError.Refused():
		t.Reason = ReasonNoProxy
		t.Message = "nothing listens at " + nodeError.Node.Address + ": install cri-proxy on the node, or start it"
	case nodeError.Silent:
		t.Reason, t.Lost = reasonUnreachable, true
	case c == codes.Unimplemented:
		t.Reason, t.Final = reasonOutdated, true
	case c == codes.PermissionDenied || c == codes.Unauthenticated:
		t.Reason = reasonRefuses
	case c == codes.ResourceExhausted:
		t.Reason = reasonBusy
	case !nodeError.Temporary():
		t.Reason, t.Final = ReasonInvalidRequest, true
	}
	return t
}
