// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package swap

import (
	"context"
	"errors"

	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	opsv1 "github.com/cri-proxy/cri-proxy/api/ops/v1"
	"github.com/cri-proxy/cri-proxy/ops/criclone"
	"github.com/cri-proxy/cri-proxy/ops/crinode"
	"github.com/cri-proxy/cri-proxy/ops/environment"
	"github.com/cri-proxy/cri-proxy/ops/operation"
	"github.com/cri-proxy/cri-proxy/ops/store"
)

// renew puts into the config of the successor, which is that of the incumbent, what kubelet would
// compute anew.
func (s *Stager) renew(ctx context.Context, c *runtimeapi.ContainerConfig) error {
	env, lost := s.c.Op.Environment(s.c.Spec.GetName())
	podDir := environment.PodDir(c, s.c.Op.Pod().GetUid())
	var parts environment.Parts
	var err error
	switch {
	case lost:
		return operation.Failf(opsv1.ReasonEnvironmentLost,
			"cri-proxy has been restarted and the environment that the "+
				"command brought is lost, with the file of records: repeat the command with another UID")
	case env != nil:
		parts, err = environment.Apply(c, env, podDir)
	default:
		parts, err = environment.Refresh(c, podDir, nil)
	}
	if err != nil {
		return operation.Failf(opsv1.ReasonCreateContainerConfigError,
			"kubelet could not start container %q again (%s): %v",
			s.c.Spec.GetName(), opsv1.ReasonCreateContainerConfigError, err)
	}
	if err := parts.Note(c); err != nil {
		return operation.Failf(opsv1.ReasonInternalError, "%v", err)
	}
	return s.c.Image.ApplyVolumes(ctx, c, env)
}

// checkParts finds out, while the successor waits at its gate, whether what was mounted in it by a
// path that others can change is what was meant. If not, it must not run.
func (s *Stager) checkParts(ctx context.Context, rec store.Container) error {
	var st *runtimeapi.ContainerStatus
	err := s.c.Node.Retry(ctx, func() (err error) {
		st, _, err = s.c.Node.Inspect(ctx, rec.Successor)
		return err
	})
	parts := environment.PartsOf(st.GetAnnotations())
	if err == nil && len(parts) == 0 {
		return nil
	}
	if err == nil && s.c.Switcher.pid == 0 {
		err = errors.New("the process that waits at its gate cannot be looked at")
	}
	if err == nil {
		err = parts.Check(st.GetMounts(), s.c.Switcher.pid)
	}
	if err != nil {
		return operation.Failf(opsv1.ReasonCreateContainerConfigError,
			"the mounts of the new container are not certain to "+
				"be in their volumes: %v", err)
	}
	return nil
}

// needsGate refuses a successor with such mounts that would run at once.
func (s *Stager) needsGate(req *runtimeapi.CreateContainerRequest) error {
	if len(environment.PartsOf(req.GetConfig().GetAnnotations())) == 0 || s.c.Record().Method == opsv1.MethodGate {
		return nil
	}
	return operation.Failf(opsv1.ReasonCreateContainerConfigError,
		"a part of a volume (subPath) was replaced since kubelet "+
			"mounted it, and without a gate it cannot be mounted safely: delete the pod, or let its process end")
}

// nextRequest is the request that makes the successor: that of the incumbent, with what kubelet
// would compute anew, and with the image that the operation is for.
func (s *Stager) nextRequest(ctx context.Context, token string) (*runtimeapi.CreateContainerRequest, error) {
	if err := s.c.Old.Load(ctx); err != nil {
		return nil, err
	}
	s.c.Old.update()
	req, err := criclone.Clone(s.c.Old.Request, s.c.Old.applied, s.c.Status().GetAttempt(), token)
	if err != nil {
		return nil, operation.Failf(opsv1.ReasonCreateFailed, "%v", err)
	}
	if err := s.renew(ctx, req.GetConfig()); err != nil {
		return nil, err
	}
	if err := s.c.Image.Apply(ctx, req.GetConfig()); err != nil {
		return nil, err
	}
	return req, nil
}

// Renew makes the staged successor of an upgrade anew if it is not what kubelet would make
// now: an upgrade may have waited for its commit for long.
func (s *Stager) Renew(ctx context.Context) error {
	pull, end := crinode.EndWith(ctx, s.c.Claim.Yielded())
	pull, endToo := crinode.EndWith(pull, s.c.Op.Cancelled())
	err := s.c.Image.Repull(pull)
	endToo()
	end()
	if gone := s.c.Interrupted(); gone != nil {
		return gone
	}
	if err != nil {
		return err
	}
	rec := s.c.Record()
	next, err := s.nextRequest(ctx, rec.Token)
	if err != nil {
		return err
	}
	if err := s.c.Image.CheckNext(ctx, next); err != nil {
		return err
	}
	ours := s.c.Node.Records.Request(rec.Successor)
	if ours != nil && len(criclone.Diff(ours, next)) == 0 {
		return nil
	}
	if ours != nil {
		s.c.Log.WithField("differing", criclone.Diff(ours, next)).
			Info("what kubelet would make has changed since the preparation")
	}
	return s.stageAnew(ctx, "")
}

// Differs names what kubelet asks for otherwise than it was prepared.
func (s *Stager) Differs(ctx context.Context, asked *runtimeapi.CreateContainerRequest) []string {
	ours, err := s.c.Node.RequestOf(ctx, s.c.Successor(), s.c.Record().Sandbox)
	if err != nil {
		s.c.Log.WithError(err).Warn("prepared container cannot be compared")
		return []string{"unknown"}
	}
	return criclone.Diff(criclone.AlignMounts(ours, asked), asked)
}

// MatchResources gives the successor the resources that kubelet asks for, if they have changed
// since it was made.
func (s *Stager) MatchResources(ctx context.Context, asked *runtimeapi.CreateContainerRequest) {
	if err := s.c.Node.MatchResources(ctx, s.c.Successor(), asked); err != nil {
		s.c.Warn("the new container did not take the resources that kubelet asked for: %v", err)
	}
}
