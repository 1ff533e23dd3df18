// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package nodeops

import (
	"context"
	"errors"

	"google.golang.org/grpc/codes"
	apierrors "k8s.io/apimachinery/pkg/api/errors"

	opsv1 "github.com/cri-proxy/cri-proxy/api/ops/v1"
	"github.com/cri-proxy/cri-proxy/controller/environment"
	"github.com/cri-proxy/cri-proxy/controller/nodes"
	"github.com/cri-proxy/cri-proxy/controller/pullsecrets"
	"github.com/cri-proxy/cri-proxy/controller/rollout/dryrun"
	"github.com/cri-proxy/cri-proxy/controller/rollout/evaluate"
)

// Nodes commands the nodes. All errors are *nodes.Error, and no unary call takes longer than a few
// seconds.
type Nodes interface {
	// PrepareUpgrade begins to prepare new images, or returns the operation with that UID.
	PrepareUpgrade(ctx context.Context, n nodes.Node, r *opsv1.PrepareUpgradeRequest) (*opsv1.Operation, error)
	// CommitUpgrade announces the patch of the pod.
	CommitUpgrade(ctx context.Context, n nodes.Node, r *opsv1.CommitUpgradeRequest) (*opsv1.Operation, error)
	// AbortUpgrade takes back an upgrade.
	AbortUpgrade(ctx context.Context, n nodes.Node, uid, reason string) (*opsv1.Operation, error)
	// Restart begins to restart containers, or returns the operation with that UID.
	Restart(ctx context.Context, n nodes.Node, r *opsv1.RestartRequest) (*opsv1.Operation, error)
	// GetOperation returns one operation; codes.NotFound if the node does not have it, or not any
	// more.
	GetOperation(ctx context.Context, n nodes.Node, uid string) (*opsv1.Operation, error)
	// WatchOperation calls each with the operation as it is and after every change, and returns nil
	// after the finished one.
	WatchOperation(ctx context.Context, n nodes.Node, uid string, each func(*opsv1.Operation)) error
	// ReleasePins ends the pins of an owner on one image; with an empty ID on all images.
	ReleasePins(ctx context.Context, n nodes.Node, owner, imageID string) (int, error)
}

var _ Nodes = (*nodes.Client)(nil)

// trouble is why a node does not do what it is told.
type trouble struct {
	evaluate.Failure
	// final: another try is of no use. stale: the pod is not what the command expects.
	final, stale bool
}

func troubleOf(err error) trouble {
	if err == nil {
		return trouble{}
	}
	if why := dryrun.Refusal(err); why != nil {
		return trouble{Failure: *why, final: true}
	}
	t := trouble{Failure: evaluate.Failure{Reason: evaluate.FailPreparation, Message: err.Error()}}
	var missing *environment.MissingError
	var unreadable *pullsecrets.UnreadableError
	var nodeError *nodes.Error
	switch {
	case errors.As(err, &missing):
		t.final = true
		return t
	case apierrors.IsNotFound(err) || apierrors.IsConflict(err):
		t.stale = true // the pod is not what it was
		return t
	case errors.As(err, &unreadable) || !errors.As(err, &nodeError):
		return t
	}
	switch c := nodeError.Code(); {
	case nodeError.Refused():
		t.Reason = evaluate.FailUnreachable
		t.Message = "nothing listens at " + nodeError.Node.Address + ": install cri-proxy on the node, or start it"
	case nodeError.Silent:
		t.Reason = evaluate.FailUnreachable
	case c == codes.Unimplemented:
		t.Reason, t.final = evaluate.FailOutdated, true
	case c == codes.PermissionDenied || c == codes.Unauthenticated:
		t.Reason = evaluate.FailRefused
	case nodeError.Bypassed():
		t.Reason = evaluate.FailBypassed
	case c == codes.NotFound || c == codes.FailedPrecondition:
		t.stale = true
	case !nodeError.Temporary():
		t.final = true
	}
	return t
}
