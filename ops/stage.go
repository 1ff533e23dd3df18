// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package ops

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
	"github.com/cri-proxy/cri-proxy/ops/store"
)

// stage resolves the slot, checks the preconditions and creates the successor, hidden.
func (r *restart) stage(ctx context.Context) error {
	r.show(func(c *opsv1.ContainerOperation) { c.Phase = opsv1.Phase_PHASE_STAGING })
	if err := r.node.AwaitRuntime(ctx); err != nil {
		return err
	}
	call, cancel := context.WithTimeout(ctx, crinode.CallTimeout)
	defer cancel()
	found, err := r.node.Resolve(call, r.o.Pod(), r.want, r.o.Request().GetForce())
	if err != nil {
		var out *outcome
		if errors.As(err, &out) {
			return out
		}
		return fmt.Errorf("finding the container: %w", err)
	}
	r.claim.Bind(found.Sandbox, found.Incumbent)
	if err := r.checkTakenBack(); err != nil {
		return err
	}
	r.node.Switchover.Probe(ctx)
	var plan *store.Override
	if r.change != nil && r.up == nil {
		if plan, err = r.planImage(call, found); err != nil {
			return err
		}
	}
	token := r.node.Tokens.New()
	err = r.write(func(rec *containerRecord, c *opsv1.ContainerOperation) {
		*rec = containerRecord{Step: stepStage, Sandbox: found.Sandbox, Incumbent: found.Incumbent, Token: token, Override: plan}
		c.IncumbentId, c.Attempt = found.Incumbent, found.Attempt
	})
	if err != nil {
		return err
	}
	hide, cancelHide := context.WithTimeout(ctx, hidePatience)
	defer cancelHide()
	if err := r.claim.Hide(hide, token); err != nil {
		if ctx.Err() != nil {
			return ctx.Err()
		}
		return failf(opsv1.ReasonRuntimeError, "%s not begun: the runtime takes more than %s to tell kubelet of its containers "+
			"(%v); try again when crictl ps answers at once", r.kind(), hidePatience, err)
	}
	if err := r.chooseMethod(call); err != nil {
		return err
	}
	if r.overlaps() { // before anything is made for it
		if err := r.roomBeside(call); err != nil {
			return err
		}
	}
	id, err := r.create(call, token)
	if err != nil {
		return err
	}
	if err := r.interrupted(); err != nil {
		return err
	}
	return r.write(func(rec *containerRecord, c *opsv1.ContainerOperation) {
		rec.Step, rec.Successor = stepStaged, id
		c.SuccessorId = id
		if r.up != nil {
			rec.Step, rec.HoldSince, c.Phase = stepHeld, time.Now(), opsv1.Phase_PHASE_PREPARED
			return
		}
		if !r.overlaps() {
			c.Phase = opsv1.Phase_PHASE_STOPPING
		}
	})
}

// chooseMethod picks the best method that the node has and that applies to the container.
func (r *restart) chooseMethod(ctx context.Context) error {
	if err := r.load(ctx); err != nil {
		return err
	}
	if r.overlaps() {
		r.setMethod(opsv1.MethodOverlap)
		return nil
	}
	_, info, err := r.inspectIncumbent(ctx)
	if err != nil {
		return err
	}
	if r.node.Switchover.Available(opsv1.MethodGate) && info.RuntimeType == crinode.RuncType && gate.Fits(r.request.GetConfig()) == nil {
		why := r.noRoomForGate(ctx)
		if why == "" {
			r.setMethod(opsv1.MethodGate)
			return nil
		}
		r.warn("%s: the old container is stopped before the new one is started", why)
	}
	switch {
	case r.node.Switchover.Available(opsv1.MethodPidfd) && info.PID > 0 && r.ownPIDs():
		r.setMethod(opsv1.MethodPidfd)
	default:
		r.setMethod(opsv1.MethodPlain)
	}
	return nil
}

// setMethod is on disk with the next step.
func (r *restart) setMethod(m string) {
	r.c.Set(func(rec *containerRecord, c *opsv1.ContainerOperation) { rec.Method, c.Method = m, m })
}

// ownPIDs reports whether the container has a PID namespace of its own: then its other processes, and what they
// hold, such as a port, have ended when the first one has.
func (r *restart) ownPIDs() bool {
	return r.request.GetConfig().GetLinux().GetSecurityContext().GetNamespaceOptions().GetPid() == runtimeapi.NamespaceMode_CONTAINER
}

// checkTakenBack refuses a container that kubelet is stopping already, or a pod on its way out.
func (r *restart) checkTakenBack() error {
	if r.claim.Stopping() {
		return failf(opsv1.ReasonPodStopping, "kubelet is stopping container %q already", r.want.GetName())
	}
	return r.interrupted()
}

// create creates the next attempt of the incumbent under the token.
func (r *restart) create(ctx context.Context, token string) (string, error) {
	req, err := r.nextRequest(ctx, token)
	if err == nil {
		err = r.needsGate(req)
	}
	if err != nil {
		return "", err
	}
	if err := criclone.MakeTerminationFile(req.GetConfig()); err != nil {
		return "", failf(opsv1.ReasonCreateFailed, "%v", err)
	}
	id, err := r.createGated(ctx, req, token)
	if err != nil {
		return "", err
	}
	if id == "" {
		if err := r.needsGate(req); err != nil {
			return "", err
		}
		if id, err = r.createOnce(ctx, req); err != nil {
			return "", failf(opsv1.ReasonCreateFailed, "creating the new container: %v", status.Convert(err).Message())
		}
	}
	if raw, err := proto.Marshal(req); err == nil {
		r.node.Records.Created(id, raw) // without the gate, which is for this one only
	}
	r.claim.Staged(id)
	r.failpoint("created")
	r.catchUp(ctx, id)
	return id, nil
}

// createGated creates the container behind a gate if that is the method. It returns "" if it is not,
// or if that did not work, and then the method is another one.
func (r *restart) createGated(ctx context.Context, req *runtimeapi.CreateContainerRequest, token string) (string, error) {
	if r.rec().Method != opsv1.MethodGate {
		return "", nil
	}
	g := r.node.Switchover.Gate(token)
	err := g.Make()
	if err == nil {
		gated := proto.Clone(req).(*runtimeapi.CreateContainerRequest)
		g.Inject(gated.GetConfig())
		var id string
		if id, err = r.createOnce(ctx, gated); err == nil {
			return id, nil
		}
		if status.Code(err) == codes.DeadlineExceeded || status.Code(err) == codes.Unavailable {
			return "", failf(opsv1.ReasonCreateFailed, "creating the new container: %v", status.Convert(err).Message())
		}
	}
	r.dropGate(err)
	return "", nil
}

// dropGate goes on without the gate.
func (r *restart) dropGate(why error) {
	r.log.WithError(why).Warn("gate cannot be used, restarting without it")
	r.node.Metrics.GateFailures.Inc()
	r.withoutGate()
}

// withoutGate makes the method the next best one.
func (r *restart) withoutGate() {
	r.leaveGate()
	r.held = false
	r.removeGate()
	if r.node.Switchover.Available(opsv1.MethodPidfd) && r.ownPIDs() {
		r.setMethod(opsv1.MethodPidfd)
		return
	}
	r.setMethod(opsv1.MethodPlain)
}

func (r *restart) createOnce(ctx context.Context, req *runtimeapi.CreateContainerRequest) (string, error) {
	// Not bound to ctx: a cancelled CreateContainer leaves a container behind with its name taken.
	call, cancel := context.WithTimeout(context.WithoutCancel(ctx), crinode.CallTimeout)
	defer cancel()
	resp, err := r.node.Runtime.CreateContainer(call, req)
	if status.Code(err) == codes.DeadlineExceeded {
		// The runtime may be just about to finish it; until it is gone the token keeps it hidden.
		r.removeLate(ctx)
	}
	return resp.GetContainerId(), err
}

// removeLate removes the container of a create that was cut off, if it comes about within lateCreate.
func (r *restart) removeLate(ctx context.Context) {
	ctx, cancel := context.WithTimeout(ctx, lateCreate)
	defer cancel()
	for crinode.Sleep(ctx, 500*time.Millisecond) == nil {
		rec := r.rec()
		if id, err := r.node.FindStaged(ctx, rec.Sandbox, rec.Token); err == nil && id != "" {
			return // undo removes it
		}
	}
}

// update adds to the resources of the successor what kubelet has asked for of the incumbent since they were
// read, and returns that; nil for nothing.
func (r *restart) update() *runtimeapi.LinuxContainerResources {
	newer := r.node.Records.Resources(r.rec().Incumbent)
	if newer == nil || proto.Equal(newer, r.recorded) {
		return nil
	}
	r.recorded, r.applied = newer, criclone.OverlayResources(r.applied, newer)
	return newer
}

// catchUp applies to the successor what kubelet has set on the incumbent while the
// successor was being created. From Staged on the director applies updates to both.
func (r *restart) catchUp(ctx context.Context, id string) {
	newer := r.update()
	if newer == nil {
		return
	}
	call, cancel := context.WithTimeout(context.WithoutCancel(ctx), crinode.CallTimeout)
	defer cancel()
	if _, err := r.node.Runtime.UpdateContainerResources(call, &runtimeapi.UpdateContainerResourcesRequest{ContainerId: id, Linux: newer}); err != nil {
		r.log.WithError(err).Warn("staged container did not take the new resources")
		return
	}
	if b, err := proto.Marshal(newer); err == nil {
		r.node.Records.Updated(id, b)
	}
}

// load reads the incumbent and the request that made it, once.
func (r *restart) load(ctx context.Context) error {
	if r.request != nil {
		return nil
	}
	rec := r.rec()
	// Before the runtime's own: what is recorded meanwhile is noticed as newer.
	recorded := r.node.Records.Resources(rec.Incumbent)
	st, _, err := r.inspectIncumbent(ctx)
	if err != nil {
		return err
	}
	r.incumbent = st
	err = r.node.Retry(ctx, func() (err error) {
		r.request, err = r.node.RequestOf(ctx, rec.Incumbent, rec.Sandbox)
		return err
	})
	if err != nil {
		return failf(opsv1.ReasonCreateFailed, "%v", err)
	}
	asked := criclone.OverlayResources(r.request.GetConfig().GetLinux().GetResources(), recorded)
	r.recorded, r.applied = recorded, criclone.OverlayResources(recorded, criclone.ReportedResources(st, asked))
	return nil
}
