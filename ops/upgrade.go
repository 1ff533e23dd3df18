// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package ops

import (
	"context"
	"errors"

	"github.com/sirupsen/logrus"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"

	opsv1 "github.com/cri-proxy/cri-proxy/api/ops/v1"
	"github.com/cri-proxy/cri-proxy/ops/operation"
)

// PrepareUpgrade implements [opsv1.OpsServer].
func (s *Server) PrepareUpgrade(ctx context.Context, req *opsv1.PrepareUpgradeRequest) (*opsv1.Operation, error) {
	_, remote := callerOf(ctx)
	req = proto.Clone(req).(*opsv1.PrepareUpgradeRequest)
	given := takeUpgradeEnvironments(req)
	c := operation.UpgradeCommand(req, given)
	if err := validateRestart(c.Restart, remote); err != nil {
		return nil, err
	}
	if err := errors.Join(validateUpgrade(req), validateEnvironments(given)); err != nil {
		return nil, err
	}
	if s.e.node.Images.Puller == nil {
		return nil, status.Error(codes.FailedPrecondition, "this node pulls no images, which an upgrade needs")
	}
	if known := s.e.operations.lookup(req.GetUid()); known != nil {
		if err := known.Repeat(c); err != nil {
			return nil, err
		}
		return known.Snapshot(), nil
	}
	pod, err := s.precheck(ctx, c.Restart)
	if err != nil {
		return nil, err
	}
	o, err := s.e.operations.accept(c, pod)
	if err != nil {
		return nil, err
	}
	s.e.supersede(o)
	return o.Snapshot(), nil
}

// supersede cancels earlier upgrades of the same owner and container that nobody has committed: the
// owner wants something else by now, which would wait for them.
func (e *Engine) supersede(by *operation.Operation) {
	for _, o := range e.node.Active() {
		if o == by || !operation.SameSubject(o, by) || o.CommitRequested() {
			continue
		}
		log := e.log.WithFields(logrus.Fields{"op": o.UID(), "by": by.UID()})
		if err := o.Cancel("its owner wants something else: " + by.UID()); err != nil {
			log.WithError(err).Warn("an upgrade that is wanted no more was not cancelled")
		} else {
			log.Info("an upgrade that is wanted no more was cancelled")
		}
	}
}

// CommitUpgrade implements [opsv1.OpsServer].
func (s *Server) CommitUpgrade(_ context.Context, req *opsv1.CommitUpgradeRequest) (*opsv1.Operation, error) {
	o, err := s.upgrade(req.GetUid())
	if err != nil {
		return nil, err
	}
	if err := validateCommit(req, o); err != nil {
		return nil, err
	}
	if err := o.Commit(req); err != nil {
		return nil, err
	}
	return o.Snapshot(), nil
}

// AbortUpgrade implements [opsv1.OpsServer].
func (s *Server) AbortUpgrade(ctx context.Context, req *opsv1.AbortUpgradeRequest) (*opsv1.Operation, error) {
	if _, err := s.upgrade(req.GetUid()); err != nil {
		return nil, err
	}
	return s.CancelOperation(ctx, &opsv1.CancelOperationRequest{Uid: req.GetUid(), Reason: req.GetReason()})
}

func (s *Server) upgrade(uid string) (*operation.Operation, error) {
	o := s.e.operations.lookup(uid)
	switch {
	case o == nil:
		return nil, noOperation(uid)
	case o.Upgrade() == nil:
		return nil, status.Errorf(codes.FailedPrecondition, "operation %s is a restart, no upgrade", uid)
	}
	return o, nil
}
