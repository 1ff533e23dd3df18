// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package ops

import (
	"context"
	"errors"
	"slices"
	"strings"
	"time"

	"github.com/sirupsen/logrus"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/timestamppb"

	opsv1 "github.com/cri-proxy/cri-proxy/api/ops/v1"
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
	restart := restartOf(req)
	if err := validateRestart(restart, remote); err != nil {
		return nil, err
	}
	if err := errors.Join(validateUpgrade(req), given.validate()); err != nil {
		return nil, err
	}
	if s.e.images == nil {
		return nil, status.Error(codes.FailedPrecondition, "this node pulls no images, which an upgrade needs")
	}
	o := newOperation(restart, nil, nil)
	o.upgrade, o.credentials, o.environments = withoutCredentials(req), req.GetCredentials(), given
	if known := s.e.lookup(req.GetUid()); known != nil {
		same, err := s.e.again(known, o)
		if err != nil {
			return nil, err
		}
		return same.snapshot(), nil
	}
	pod, err := s.precheck(ctx, restart)
	if err != nil {
		return nil, err
	}
	o.op = &opsv1.Operation{
		Uid: req.GetUid(), Kind: kindUpgrade, Pod: pod, Phase: opsv1.Phase_PHASE_PENDING, Requester: req.GetRequester(), CreateTime: timestamppb.Now(),
	}
	o.containers = make([]containerRecord, len(req.GetContainers()))
	for _, c := range req.GetContainers() {
		o.op.Containers = append(o.op.Containers, &opsv1.ContainerOperation{Name: c.GetName(), Image: c.GetImage(), Phase: opsv1.Phase_PHASE_PENDING})
	}
	if o, err = s.e.accept(o); err != nil {
		return nil, err
	}
	s.e.supersede(o)
	return o.snapshot(), nil
}

// supersede takes back what the owner of an upgrade has had prepared before for the same container and not committed: something else is wanted
// by now, and would wait for it.
func (e *Engine) supersede(by *operation) {
	for _, o := range e.activeOperations() {
		if o == by || !sameSubject(o, by) || o.isCommitted() {
			continue
		}
		log := e.log.WithFields(logrus.Fields{"op": o.req.GetUid(), "by": by.req.GetUid()})
		if err := e.cancel(o, "its owner wants something else: "+by.req.GetUid()); err != nil {
			log.WithError(err).Warn("an upgrade that is wanted no more was not cancelled")
		} else {
			log.Info("an upgrade that is wanted no more was cancelled")
		}
	}
}

// precede takes back what is prepared for a container that is to be restarted, and not committed: it may wait for its turn for
// an hour, and is prepared anew after the restart by whoever wants it.
func (e *Engine) precede(by *operation) {
	for _, o := range e.activeOperations() {
		if o.upgrade == nil || o.op.GetPod().GetUid() != by.op.GetPod().GetUid() || o.isCommitted() || !shareContainer(o, by) { // pods never change
			continue
		}
		log := e.log.WithFields(logrus.Fields{"op": o.req.GetUid(), "by": by.req.GetUid()})
		if err := e.cancel(o, "a restart of the container goes first: "+by.req.GetUid()); err != nil {
			log.WithError(err).Warn("a prepared upgrade was not cancelled")
		} else {
			log.Info("a prepared upgrade gives way to a restart")
		}
	}
}

// shareContainer says that two operations have a container's name in common.
func shareContainer(a, b *operation) bool {
	return slices.ContainsFunc(a.req.GetContainers(), func(x *opsv1.ContainerRestart) bool {
		return slices.ContainsFunc(b.req.GetContainers(), func(y *opsv1.ContainerRestart) bool { return x.GetName() == y.GetName() })
	})
}

// sameSubject says that two upgrades have one owner and a container in common.
func sameSubject(a, b *operation) bool {
	if a.upgrade.GetOwner() == "" || a.upgrade.GetOwner() != b.upgrade.GetOwner() || a.op.GetPod().GetUid() != b.op.GetPod().GetUid() { // pods never change
		return false
	}
	return shareContainer(a, b)
}

// isCommitted says that the pod's spec may have been patched for an upgrade.
func (o *operation) isCommitted() bool {
	o.mu.Lock()
	defer o.mu.Unlock()
	return o.isReleased
}

// restartOf is what an upgrade has in common with a restart.
func restartOf(req *opsv1.PrepareUpgradeRequest) *opsv1.RestartRequest {
	r := &opsv1.RestartRequest{Uid: req.GetUid(), Pod: req.GetPod(), Requester: req.GetRequester()}
	for _, c := range req.GetContainers() {
		r.Containers = append(r.Containers, &opsv1.ContainerRestart{
			Name: c.GetName(), ExpectedContainerId: c.GetExpectedContainerId(), Order: c.GetOrder(), MinReadySeconds: c.GetMinReadySeconds(),
			HoldProbes: c.GetHoldProbes(),
		})
	}
	return proto.Clone(r).(*opsv1.RestartRequest)
}

func withoutCredentials(req *opsv1.PrepareUpgradeRequest) *opsv1.PrepareUpgradeRequest {
	out := proto.Clone(req).(*opsv1.PrepareUpgradeRequest)
	out.Credentials = nil
	return out
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
	case proto.Size(withoutCredentials(req)) > maxRequest:
		return invalid("the request is larger than %d bytes: the journal keeps it", maxRequest)
	}
	return nil
}

// sameUpgrade compares upgrades as commands.
func sameUpgrade(a, b *opsv1.PrepareUpgradeRequest) bool {
	if a == nil || b == nil {
		return a == b
	}
	a, b = withoutCredentials(a), withoutCredentials(b)
	a.Requester, b.Requester = "", ""
	a.Pod, b.Pod = nil, nil // compared with what it has in common with a restart
	return proto.Equal(a, b)
}

// supply hands over credentials for what is still to be pulled.
func (o *operation) supply(c []*opsv1.RegistryCredential) {
	o.mu.Lock()
	defer o.mu.Unlock()
	o.credentials, o.forgotten = c, false
	close(o.supplied)
	o.supplied = make(chan struct{})
}

// given returns the credentials, whether others have been forgotten, and a channel that is closed when there are new ones.
func (o *operation) given() (c []*opsv1.RegistryCredential, forgotten bool, others <-chan struct{}) {
	o.mu.Lock()
	defer o.mu.Unlock()
	return o.credentials, o.forgotten, o.supplied
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
	if err := s.e.release(o, req); err != nil {
		return nil, err
	}
	return o.snapshot(), nil
}

// AbortUpgrade implements [opsv1.OpsServer].
func (s *Server) AbortUpgrade(ctx context.Context, req *opsv1.AbortUpgradeRequest) (*opsv1.Operation, error) {
	if _, err := s.upgrade(req.GetUid()); err != nil {
		return nil, err
	}
	return s.CancelOperation(ctx, &opsv1.CancelOperationRequest{Uid: req.GetUid(), Reason: req.GetReason()})
}

func (s *Server) upgrade(uid string) (*operation, error) {
	o := s.e.lookup(uid)
	switch {
	case o == nil:
		return nil, noOperation(uid)
	case o.upgrade == nil:
		return nil, status.Errorf(codes.FailedPrecondition, "operation %s is a restart, no upgrade", uid)
	}
	return o, nil
}

// validateCommit checks the request beside its upgrade.
func validateCommit(req *opsv1.CommitUpgradeRequest, o *operation) error {
	given := environments{}
	for _, c := range req.GetEnvironments() {
		if !slices.ContainsFunc(o.req.GetContainers(), func(r *opsv1.ContainerRestart) bool { return r.GetName() == c.GetName() }) {
			return status.Errorf(codes.InvalidArgument, "upgrade %s has no container %.260q", req.GetUid(), c.GetName())
		}
		given.add(c.GetName(), c.GetEnvironment())
	}
	if len(req.GetCredentials()) > maxCredentials {
		return status.Errorf(codes.InvalidArgument, "%d credentials are too many; the most is %d", len(req.GetCredentials()), maxCredentials)
	}
	return given.validate()
}

// release lets a prepared upgrade go on, with what its caller says of its containers now.
func (e *Engine) release(o *operation, now *opsv1.CommitUpgradeRequest) error {
	o.mu.Lock()
	defer o.mu.Unlock()
	if o.isReleased {
		return nil
	}
	refused := func(format string, args ...any) error {
		return status.Errorf(codes.FailedPrecondition, format, args...)
	}
	switch {
	case o.op.GetFinishTime() != nil:
		return refused("upgrade %s has ended: %s", o.op.GetUid(), o.op.GetMessage())
	case o.cancelSaid || o.failedLocked():
		return refused("upgrade %s is being taken back: %s", o.op.GetUid(), o.op.GetMessage())
	case leastAdvanced(o.op.GetContainers()) != opsv1.Phase_PHASE_PREPARED:
		return refused("upgrade %s is not prepared yet: %s", o.op.GetUid(), phaseName(leastAdvanced(o.op.GetContainers())))
	}
	for _, c := range now.GetEnvironments() {
		o.certain[c.GetName()] = true
		if env := c.GetEnvironment(); env != nil {
			e.giveLocked(o, environments{c.GetName(): env})
		}
	}
	if c := now.GetCredentials(); len(c) > 0 {
		o.credentials = c
	}
	o.isReleased = true
	if err := e.saveLocked(o); err != nil {
		o.isReleased = false
		return status.Errorf(codes.Internal, "not committed: %v", err)
	}
	close(o.released)
	return nil
}

func phaseName(p opsv1.Phase) string {
	return strings.ToLower(strings.TrimPrefix(p.String(), "PHASE_"))
}
