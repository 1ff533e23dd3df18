// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package ops

import (
	"context"
	"errors"
	"slices"
	"time"

	"github.com/sirupsen/logrus"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"

	opsv1 "github.com/cri-proxy/cri-proxy/api/ops/v1"
	"github.com/cri-proxy/cri-proxy/ops/operation"
)

// Bounds and defaults of an upgrade.
const (
	defaultPin     = 24 * time.Hour
	defaultPrepare = 30 * time.Minute
	defaultHold    = 10 * time.Minute
	maxPrepare     = 31 * 24 * time.Hour
	maxHold        = 24 * time.Hour
	maxImage       = 1024
	maxCredentials = 256
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
	if s.e.images == nil {
		return nil, status.Error(codes.FailedPrecondition, "this node pulls no images, which an upgrade needs")
	}
	if known := s.e.lookup(req.GetUid()); known != nil {
		if err := known.Repeat(c); err != nil {
			return nil, err
		}
		return known.Snapshot(), nil
	}
	pod, err := s.precheck(ctx, c.Restart)
	if err != nil {
		return nil, err
	}
	o, err := s.e.accept(c, pod)
	if err != nil {
		return nil, err
	}
	s.e.supersede(o)
	return o.Snapshot(), nil
}

// supersede cancels earlier upgrades of the same owner and container that nobody has committed: the
// owner wants something else by now, which would wait for them.
func (e *Engine) supersede(by *operation.Operation) {
	for _, o := range e.activeOperations() {
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

// validateUpgrade checks what validateRestart has not.
func validateUpgrade(req *opsv1.PrepareUpgradeRequest) error {
	invalid := func(format string, args ...any) error { return status.Errorf(codes.InvalidArgument, format, args...) }
	for _, c := range req.GetContainers() {
		switch {
		case c.GetImage() == "":
			return invalid("container %q: image is empty: give it as it will be in the pod's spec", c.GetName())
		case len(c.GetImage()) > maxImage:
			return invalid("container %q: image is longer than %d bytes", c.GetName(), maxImage)
		case opsv1.PullPolicy_name[int32(c.GetPullPolicy())] == "":
			return invalid("container %q: unknown pull policy %d", c.GetName(), c.GetPullPolicy())
		}
	}
	bound := func(name string, d interface{ AsDuration() time.Duration }, most time.Duration) error {
		if v := d.AsDuration(); v < 0 || v > most {
			return invalid("%s must be between 0 and %s", name, most)
		}
		return nil
	}
	for _, err := range []error{
		bound("pin_for", req.GetPinFor(), maxPrepare),
		bound("prepare_timeout", req.GetPrepareTimeout(), maxPrepare),
		bound("hold_timeout", req.GetHoldTimeout(), maxHold),
	} {
		if err != nil {
			return err
		}
	}
	switch {
	case len(req.GetCredentials()) > maxCredentials:
		return invalid("%d credentials are too many; the most is %d", len(req.GetCredentials()), maxCredentials)
	case len(req.GetOwner()) > 1024:
		return invalid("owner is too long")
	case proto.Size(req)-proto.Size(&opsv1.PrepareUpgradeRequest{Credentials: req.GetCredentials()}) > maxRequest:
		return invalid("the request is larger than %d bytes: the journal keeps it", maxRequest)
	}
	return nil
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
	o := s.e.lookup(uid)
	switch {
	case o == nil:
		return nil, noOperation(uid)
	case o.Upgrade() == nil:
		return nil, status.Errorf(codes.FailedPrecondition, "operation %s is a restart, no upgrade", uid)
	}
	return o, nil
}

// validateCommit checks the request beside its upgrade.
func validateCommit(req *opsv1.CommitUpgradeRequest, o *operation.Operation) error {
	given := operation.Environments{}
	for _, c := range req.GetEnvironments() {
		named := func(r *opsv1.ContainerRestart) bool { return r.GetName() == c.GetName() }
		if !slices.ContainsFunc(o.Request().GetContainers(), named) {
			return status.Errorf(codes.InvalidArgument, "upgrade %s has no container %.260q", req.GetUid(), c.GetName())
		}
		add(given, c.GetName(), c.GetEnvironment())
	}
	if len(req.GetCredentials()) > maxCredentials {
		return status.Errorf(codes.InvalidArgument, "%d credentials are too many; the most is %d",
			len(req.GetCredentials()), maxCredentials)
	}
	return validateEnvironments(given)
}
