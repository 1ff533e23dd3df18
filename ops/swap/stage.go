// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package swap

import (
	"context"
	"errors"
	"fmt"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	opsv1 "github.com/cri-proxy/cri-proxy/api/ops/v1"
	"github.com/cri-proxy/cri-proxy/ops/criclone"
	"github.com/cri-proxy/cri-proxy/ops/crinode"
	"github.com/cri-proxy/cri-proxy/ops/gate"
	"github.com/cri-proxy/cri-proxy/ops/operation"
	"github.com/cri-proxy/cri-proxy/ops/store"
)

// hideTimeout bounds the wait for answers that tell of containers and are on their way to
// kubelet undecoded. Lists and statuses take milliseconds; if one takes this long the runtime
// is in no state for a restart.
const hideTimeout = 10 * time.Second

// Stager makes the successor, hidden, and removes it.
type Stager struct{ c *Container }

// Stage resolves the slot, checks the preconditions and creates the successor, hidden.
func (s *Stager) Stage(ctx context.Context) error {
	s.c.Show(func(c *opsv1.ContainerOperation) { c.Phase = opsv1.Phase_PHASE_STAGING })
	if err := s.c.Node.AwaitRuntime(ctx); err != nil {
		return err
	}
	call, cancel := context.WithTimeout(ctx, crinode.CallTimeout)
	defer cancel()
	found, err := s.c.Node.Resolve(call, s.c.Op.Pod(), s.c.Spec, s.c.Op.Request().GetForce())
	if err != nil {
		var out *operation.Outcome
		if errors.As(err, &out) {
			return out
		}
		return fmt.Errorf("finding the container: %w", err)
	}
	s.c.Claim.Bind(found.Sandbox, found.Incumbent)
	if err := s.checkTakenBack(); err != nil {
		return err
	}
	s.c.Node.Switchover.Probe(ctx)
	plan, err := s.c.Image.Plan(call, found)
	if err != nil {
		return err
	}
	token := s.c.Node.Tokens.New()
	err = s.c.Write(func(rec *store.Container, c *opsv1.ContainerOperation) {
		*rec = store.Container{Step: store.StepStage, Sandbox: found.Sandbox, Incumbent: found.Incumbent, Token: token,
			Override: plan}
		c.IncumbentId, c.Attempt = found.Incumbent, found.Attempt
	})
	if err != nil {
		return err
	}
	hide, cancelHide := context.WithTimeout(ctx, hideTimeout)
	defer cancelHide()
	if err := s.c.Claim.Hide(hide, token); err != nil {
		if ctx.Err() != nil {
			return ctx.Err()
		}
		return operation.Failf(opsv1.ReasonRuntimeError,
			"%s not begun: the runtime takes more than %s to tell kubelet of its containers "+
				"(%v); try again when crictl ps answers at once", s.c.kind.Name(), hideTimeout, err)
	}
	if err := s.chooseMethod(call); err != nil {
		return err
	}
	if s.c.Overlaps() { // before anything is made for it
		if err := s.c.Room.Beside(call, s.c.Old.resources()); err != nil {
			return err
		}
	}
	id, err := s.create(call, token)
	if err != nil {
		return err
	}
	if err := s.c.Interrupted(); err != nil {
		return err
	}
	return s.c.Write(func(rec *store.Container, c *opsv1.ContainerOperation) {
		rec.Step, rec.Successor = store.StepStaged, id
		c.SuccessorId = id
		s.c.kind.Staged(rec, c)
	})
}

// chooseMethod picks the best method that the node has and that applies to the container.
func (s *Stager) chooseMethod(ctx context.Context) error {
	if err := s.c.Old.Load(ctx); err != nil {
		return err
	}
	if s.c.Overlaps() {
		s.c.SetMethod(opsv1.MethodOverlap)
		return nil
	}
	_, info, err := s.c.Old.inspect(ctx)
	if err != nil {
		return err
	}
	if s.c.Node.Switchover.Available(opsv1.MethodGate) && info.RuntimeType == crinode.RuncType &&
		gate.Fits(s.c.Old.Request.GetConfig()) == nil {
		why := s.c.Room.RefuseGate(ctx)
		if why == "" {
			s.c.SetMethod(opsv1.MethodGate)
			return nil
		}
		s.c.Warn("%s: the old container is stopped before the new one is started", why)
	}
	switch {
	case s.c.Node.Switchover.Available(opsv1.MethodPidfd) && info.PID > 0 && s.c.Old.ownPIDs():
		s.c.SetMethod(opsv1.MethodPidfd)
	default:
		s.c.SetMethod(opsv1.MethodPlain)
	}
	return nil
}

// SetMethod is on disk with the next step.
func (c *Container) SetMethod(m string) {
	c.Handle.Set(func(rec *store.Container, c *opsv1.ContainerOperation) { rec.Method, c.Method = m, m })
}

// checkTakenBack refuses a container that kubelet is stopping already, or a pod on its way out.
func (s *Stager) checkTakenBack() error {
	if s.c.Claim.Stopping() {
		return operation.Failf(opsv1.ReasonPodStopping, "kubelet is stopping container %q already", s.c.Spec.GetName())
	}
	return s.c.Interrupted()
}

// create creates the next attempt of the incumbent under the token.
func (s *Stager) create(ctx context.Context, token string) (string, error) {
	req, err := s.nextRequest(ctx, token)
	if err == nil {
		err = s.needsGate(req)
	}
	if err != nil {
		return "", err
	}
	if err := criclone.MakeTerminationFile(req.GetConfig()); err != nil {
		return "", operation.Failf(opsv1.ReasonCreateFailed, "%v", err)
	}
	id, err := s.createGated(ctx, req, token)
	if err != nil {
		return "", err
	}
	if id == "" {
		if err := s.needsGate(req); err != nil {
			return "", err
		}
		if id, err = s.createOnce(ctx, req); err != nil {
			return "", operation.Failf(opsv1.ReasonCreateFailed, "creating the new container: %v",
				status.Convert(err).Message())
		}
	}
	if raw, err := proto.Marshal(req); err == nil {
		s.c.Node.Records.Created(id, raw) // without the gate, which is for this one only
	}
	s.c.Claim.Staged(id)
	s.c.Failpoint("created")
	s.catchUp(ctx, id)
	return id, nil
}

// EnsureStaged creates the successor if there is none.
func (s *Stager) EnsureStaged(ctx context.Context) error {
	rec := s.c.Record()
	if rec.Successor != "" {
		return nil
	}
	id, err := s.c.Node.FindStaged(ctx, rec.Sandbox, rec.Token)
	if err != nil {
		return err
	}
	if id == "" {
		if id, err = s.create(ctx, rec.Token); err != nil {
			return err
		}
	}
	// On disk with the next step; until then the token finds the successor.
	s.c.Handle.Set(func(c *store.Container, _ *opsv1.ContainerOperation) { c.Successor = id })
	s.c.Claim.Staged(id)
	return nil
}

// stageAnew removes the successor, so that the next ensureStaged makes a fresh one. why is what was
// wrong with the container itself; that is tried once.
func (s *Stager) stageAnew(ctx context.Context, why string) error {
	if why != "" {
		s.c.Log.WithField("message", why).Warn("the new container did not start; trying once more from a fresh one")
	}
	rec := s.c.Record()
	token := s.c.Node.Tokens.New()
	if err := s.Remove(ctx, rec.Successor); err != nil {
		return err
	}
	if err := s.c.Node.Switchover.Gate(rec.Token).Remove(); err != nil {
		s.c.Log.WithError(err).Warn("gate not removed")
	}
	s.c.Claim.HideNow(token)
	s.c.Claim.Staged("")
	return s.c.Write(func(c *store.Container, op *opsv1.ContainerOperation) {
		c.Token, c.Successor = token, ""
		if why != "" {
			c.Retried = true
			op.Warnings = append(op.Warnings, why)
		}
	})
}

// createGated creates the container behind a gate if that is the method. It returns "" if it is
// not, or if that did not work, and then the method is another one.
func (s *Stager) createGated(
	ctx context.Context, req *runtimeapi.CreateContainerRequest, token string,
) (string, error) {
	if s.c.Record().Method != opsv1.MethodGate {
		return "", nil
	}
	g := s.c.Node.Switchover.Gate(token)
	err := g.Make()
	if err == nil {
		gated := proto.Clone(req).(*runtimeapi.CreateContainerRequest)
		g.Inject(gated.GetConfig())
		var id string
		if id, err = s.createOnce(ctx, gated); err == nil {
			return id, nil
		}
		if status.Code(err) == codes.DeadlineExceeded || status.Code(err) == codes.Unavailable {
			return "", operation.Failf(opsv1.ReasonCreateFailed, "creating the new container: %v",
				status.Convert(err).Message())
		}
	}
	s.dropGate(err)
	return "", nil
}

// dropGate goes on without the gate.
func (s *Stager) dropGate(why error) {
	s.c.Log.WithError(why).Warn("gate cannot be used, restarting without it")
	s.c.Node.Metrics.GateFailures.Inc()
	s.withoutGate()
}

// withoutGate makes the method the next best one.
func (s *Stager) withoutGate() {
	s.c.Switcher.leaveGate()
	s.c.Switcher.held = false
	s.removeGate()
	if s.c.Node.Switchover.Available(opsv1.MethodPidfd) && s.c.Old.ownPIDs() {
		s.c.SetMethod(opsv1.MethodPidfd)
		return
	}
	s.c.SetMethod(opsv1.MethodPlain)
}

func (s *Stager) createOnce(ctx context.Context, req *runtimeapi.CreateContainerRequest) (string, error) {
	// Not bound to ctx: a cancelled CreateContainer leaves a container behind with its name taken.
	call, cancel := context.WithTimeout(context.WithoutCancel(ctx), crinode.CallTimeout)
	defer cancel()
	resp, err := s.c.Node.Runtime.CreateContainer(call, req)
	if status.Code(err) == codes.DeadlineExceeded {
		// The runtime may be just about to finish it; until it is gone the token keeps it hidden.
		s.removeLate(ctx)
	}
	return resp.GetContainerId(), err
}

// removeLate waits for the container of a create that was cut off, for as long as it may come
// about.
func (s *Stager) removeLate(ctx context.Context) {
	ctx, cancel := context.WithTimeout(ctx, s.c.Node.LateCreate)
	defer cancel()
	for crinode.Sleep(ctx, 500*time.Millisecond) == nil {
		rec := s.c.Record()
		if id, err := s.c.Node.FindStaged(ctx, rec.Sandbox, rec.Token); err == nil && id != "" {
			return // undo removes it
		}
	}
}

// catchUp applies to the successor what kubelet has set on the incumbent while the
// successor was being created. From Staged on the director applies updates to both.
func (s *Stager) catchUp(ctx context.Context, id string) {
	newer := s.c.Old.update()
	if newer == nil {
		return
	}
	call, cancel := context.WithTimeout(context.WithoutCancel(ctx), crinode.CallTimeout)
	defer cancel()
	if _, err := s.c.Node.Runtime.UpdateContainerResources(call,
		&runtimeapi.UpdateContainerResourcesRequest{ContainerId: id, Linux: newer}); err != nil {
		s.c.Log.WithError(err).Warn("staged container did not take the new resources")
		return
	}
	if b, err := proto.Marshal(newer); err == nil {
		s.c.Node.Records.Updated(id, b)
	}
}
