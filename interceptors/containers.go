// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package interceptors

import (
	"context"
	"time"

	"github.com/sirupsen/logrus"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/cri-proxy/cri-proxy/interceptors/view"
	"github.com/cri-proxy/cri-proxy/proxy"
)

// Labels that kubelet puts on containers (pkg/kubelet/kuberuntime/labels.go, pkg/kubelet/types).
const (
	labelPodUID    = "io.kubernetes.pod.uid"
	labelContainer = "io.kubernetes.container.name"
)

// lifecycle takes the calls that make, change, stop and remove containers, and those that stop and
// remove sandboxes with all containers in them.
type lifecycle struct {
	view      *view.View
	records   Records
	overrides Overrides
	pods      Pods       // may be nil
	made      Successors // may be nil
	runtime   runtimeapi.RuntimeServiceClient
	log       logrus.FieldLogger
}

// createContainer records the request as kubelet sent it, and lets an operation on the slot finish
// first: kubelet creates in a slot only after it stopped the incumbent, which made the operation
// yield. An operation that has the very container ready answers with it.
func (l *lifecycle) createContainer(
	ctx context.Context, method string, raw []byte, next proxy.UnaryNext,
) ([]byte, error) {
	req, err := decode(raw, &runtimeapi.CreateContainerRequest{})
	if err != nil {
		return nil, err
	}
	labels := req.GetConfig().GetLabels()
	slot := view.Slot{PodUID: labels[labelPodUID], Container: labels[labelContainer]}
	if slot.PodUID != "" && slot.Container != "" {
		if id := l.prepared(ctx, method, slot, req); id != "" {
			did(ctx, didAdopt)
			return encode(&runtimeapi.CreateContainerResponse{ContainerId: id})
		}
		if id := l.replaced(ctx, slot, req); id != "" {
			did(ctx, didAdopt)
			return encode(&runtimeapi.CreateContainerResponse{ContainerId: id})
		}
		if l.view.Claimed(slot) {
			did(ctx, didHold)
			l.log.WithFields(logrusFields(slot, method)).Info("waiting for the operation on this slot")
		}
		claim, err := l.view.Claim(ctx, slot)
		if err != nil {
			return nil, status.FromContextError(err).Err()
		}
		defer claim.Release()
		if l.overrides.Any() {
			if raw, err = l.overridden(ctx, slot, req, raw); err != nil {
				return nil, err
			}
		}
	}
	b, err := next(ctx, raw)
	if err != nil {
		return nil, err
	}
	resp, err := decode(b, &runtimeapi.CreateContainerResponse{})
	if err != nil {
		return nil, err
	}
	l.records.Created(resp.GetContainerId(), raw)
	l.view.Created(slot, resp.GetContainerId(), req)
	return b, nil
}

// overridden returns the request with the image that the slot has in place of the one in the pod's
// spec, or raw as it is. The result is also what is recorded of the container.
func (l *lifecycle) overridden(
	ctx context.Context, slot view.Slot, req *runtimeapi.CreateContainerRequest, raw []byte,
) ([]byte, error) {
	changed, err := l.overrides.Apply(ctx, slot, req)
	if err != nil || !changed {
		return raw, err
	}
	did(ctx, didOverride)
	return encode(req)
}

// prepared returns the container that an operation on the slot has ready for the request, or "".
func (l *lifecycle) prepared(
	ctx context.Context, method string, slot view.Slot, req *runtimeapi.CreateContainerRequest,
) string {
	claim := l.view.Holder(slot)
	if claim == nil {
		return ""
	}
	driver := claim.AwaitDriver(ctx)
	if driver == nil {
		return ""
	}
	id, ok := driver.Create(ctx, req)
	if !ok {
		did(ctx, didYield)
		claim.TakeBack(view.Yield{Method: method, Grace: sandboxGrace})
		return ""
	}
	if id != "" {
		l.view.Adopted(id)
	}
	return id
}

// replaced returns the container that kubelet asks for if it is there already, or "". Kubelet
// decided before a reveal to replace the incumbent, stopped it after the reveal, and now makes the
// next attempt, whose name in the runtime is taken. This happens when a probe, which goes to the
// pod's address, is meant for the old process and the new one does not listen yet.
func (l *lifecycle) replaced(ctx context.Context, slot view.Slot, req *runtimeapi.CreateContainerRequest) string {
	id := l.view.StoppedAfterReveal(slot)
	if id == "" || l.made == nil || l.view.Claimed(slot) || !l.made.Fits(ctx, id, req) {
		return ""
	}
	l.view.Adopted(id)
	l.log.WithFields(logrusFields(slot, "")).WithField("successor", id).
		Info("kubelet replaces a container that has been replaced: it gets the one that is there")
	return id
}

// startContainer does not know hidden containers. One that an operation has made and started before
// kubelet asked for it needs no start.
func (l *lifecycle) startContainer(ctx context.Context, _ string, raw []byte, next proxy.UnaryNext) ([]byte, error) {
	req, err := decode(raw, &runtimeapi.StartContainerRequest{})
	if err != nil {
		return nil, err
	}
	if staged(l.view, req.GetContainerId()) {
		did(ctx, didHide)
		return nil, notFound(req.GetContainerId())
	}
	b, err := next(ctx, raw)
	if err == nil || ctx.Err() != nil {
		return b, err
	}
	st, serr := l.runtime.ContainerStatus(ctx, &runtimeapi.ContainerStatusRequest{ContainerId: req.GetContainerId()})
	s := st.GetStatus()
	if serr != nil || s.GetAnnotations()[view.StagedAnnotation] == "" || s.GetStartedAt() == 0 {
		return nil, err
	}
	switch s.GetState() {
	case runtimeapi.ContainerState_CONTAINER_RUNNING, runtimeapi.ContainerState_CONTAINER_EXITED:
		did(ctx, didAdopt)
		return encode(&runtimeapi.StartContainerResponse{}) // how it ended is for kubelet to find
	default:
		return nil, err
	}
}

// stopContainer makes an operation on the slot yield. The stop itself goes to the runtime at
// once, so that the shorter grace wins. The answer comes when the operation has cleaned up, so that
// kubelet finds no process that was not asked to stop.
func (l *lifecycle) stopContainer(
	ctx context.Context, method string, raw []byte, next proxy.UnaryNext,
) ([]byte, error) {
	req, err := decode(raw, &runtimeapi.StopContainerRequest{})
	if err != nil {
		return nil, err
	}
	defer l.view.StopBegins(req.GetContainerId())()
	claim, id := l.view.ByContainer(req.GetContainerId())
	if claim == nil {
		l.view.StopAfterReveal(req.GetContainerId(), req.GetTimeout())
		return next(ctx, raw)
	}
	if claim.Successor() == id {
		did(ctx, didHide)
		// Nobody can know this container: answered as the runtime answers for unknown ones.
		return encode(&runtimeapi.StopContainerResponse{})
	}
	if driver := claim.AwaitDriver(ctx); driver != nil {
		if ok, err := driver.Stop(ctx, req.GetTimeout()); ok {
			did(ctx, didSwitchOver)
			if err != nil {
				return nil, err
			}
			// The pod may be going away: then kubelet stops its sandbox next, and nobody has asked
			// the successor to stop.
			l.view.StopAfterReveal(id, req.GetTimeout())
			return encode(&runtimeapi.StopContainerResponse{})
		}
	}
	did(ctx, didYield)
	claim.TakeBack(view.Yield{Method: method, Grace: req.GetTimeout()})
	l.log.WithFields(logrusFields(claim.Slot(), method)).Info("kubelet takes the slot back from an operation")
	b, err := next(ctx, raw)
	if err != nil {
		return nil, err
	}
	l.awaitYield(ctx, claim, time.Duration(req.GetTimeout())*time.Second)
	l.view.StopAfterReveal(id, req.GetTimeout()) // had it been revealed a moment before
	return b, nil
}

// yieldTimeout bounds how long a call of kubelet's waits for an operation to get out of the way
// after the runtime has done what kubelet asked. The operation then only stops and removes its
// successor, which the runtime does within the grace.
const yieldTimeout = 2 * time.Minute

// awaitYield waits for the operation to be gone. It never fails the call: Stop* and Remove* must
// get through whatever our own operation does.
func (l *lifecycle) awaitYield(ctx context.Context, c *view.Claim, grace time.Duration) {
	ctx, cancel := context.WithTimeout(ctx, grace+yieldTimeout)
	defer cancel()
	if err := c.Wait(ctx); err != nil {
		l.log.WithFields(logrusFields(c.Slot(), "")).WithError(err).Warn("operation did not yield in time")
	}
}

// removeContainer forgets the record. Kubelet removes only what it saw exit, so it never meets a
// masked container; whoever else removes one ends the operation.
func (l *lifecycle) removeContainer(
	ctx context.Context, method string, raw []byte, next proxy.UnaryNext,
) ([]byte, error) {
	req, err := decode(raw, &runtimeapi.RemoveContainerRequest{})
	if err != nil {
		return nil, err
	}
	defer l.view.StopBegins(req.GetContainerId())() // the runtime kills what runs
	if l.view.Active() {
		claim, id := l.view.ByContainer(req.GetContainerId())
		if claim != nil && claim.Successor() == id {
			did(ctx, didHide)
			return encode(&runtimeapi.RemoveContainerResponse{})
		}
		if claim != nil && l.view.Verdict(id) == view.Masked {
			did(ctx, didYield)
			claim.TakeBack(view.Yield{Method: method, Grace: sandboxGrace})
			l.awaitYield(ctx, claim, sandboxGrace*time.Second)
		}
	}
	b, err := next(ctx, raw)
	if err != nil {
		return nil, err
	}
	l.records.Removed(req.GetContainerId())
	l.view.Forget(req.GetContainerId())
	return b, nil
}

// updateContainerResources records what was applied, because the runtime's own config keeps the old
// values, and applies it to a staged successor too. When the incumbent is on its way out, what the
// successor answers counts: the runtime fails the call for a process that ends meanwhile.
func (l *lifecycle) updateContainerResources(
	ctx context.Context, method string, raw []byte, next proxy.UnaryNext,
) ([]byte, error) {
	req, err := decode(raw, &runtimeapi.UpdateContainerResourcesRequest{})
	if err != nil {
		return nil, err
	}
	claim, id := l.view.ByContainer(req.GetContainerId())
	going, successor := false, ""
	if claim != nil {
		going, successor = l.view.Verdict(id) == view.Masked, claim.Successor()
	}
	b, err := next(ctx, raw)
	if err != nil && claim != nil {
		going = going || l.view.Verdict(id) == view.Masked
	}
	if req.GetLinux() == nil || err != nil && !going {
		return b, err
	}
	linux, merr := encode(req.GetLinux())
	if merr != nil {
		return nil, merr
	}
	if claim == nil {
		l.records.Updated(req.GetContainerId(), linux)
		return b, nil
	}
	if err == nil {
		l.records.Updated(id, linux) // before the look for a successor: one that is staged after it reads this
	}
	if now := claim.Successor(); now != "" || err == nil { // else it may have been revealed during the call
		successor = now
	}
	if successor == "" || successor == id {
		return b, err
	}
	did(ctx, didRepeat)
	again := proto.Clone(req).(*runtimeapi.UpdateContainerResourcesRequest)
	again.ContainerId = successor
	more, merr := encode(again)
	if merr != nil {
		return nil, merr
	}
	of, serr := next(ctx, more)
	log := l.log.WithFields(logrusFields(claim.Slot(), method))
	switch {
	case err != nil && serr != nil:
		return nil, err
	case err != nil:
		log.WithError(err).Info("only the staged container took the new resources, the other is being stopped")
		l.records.Updated(id, linux)
		b = of
	case serr != nil:
		// Kubelet asked for the incumbent, which has it. The successor starts with what it was
		// created with.
		log.WithError(serr).Warn("staged container did not take the new resources")
	}
	l.records.Updated(successor, linux)
	return b, nil
}

// staged reports whether the ID names a hidden successor.
func staged(v *view.View, id string) bool {
	claim, full := v.ByContainer(id)
	return claim != nil && claim.Successor() == full
}

// maskedDead is the answer for calls that need the masked container's process, which is gone or
// going: kubelet's prober discards a result with this code (pkg/probe/exec) instead of counting it
// as a failure.
func maskedDead(id string) error {
	return status.Errorf(codes.Unavailable, "container %q is being restarted in place; try again", id)
}
