// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package interceptors

import (
	"context"
	"runtime/debug"
	"sync"
	"time"

	"github.com/sirupsen/logrus"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/cri-proxy/cri-proxy/proxy"
)

// Labels and annotations that kubelet puts on containers (pkg/kubelet/kuberuntime/labels.go, pkg/kubelet/types).
const (
	labelPodUID    = "io.kubernetes.pod.uid"
	labelContainer = "io.kubernetes.container.name"
)

// createContainer records the request as kubelet sent it, and lets an operation on
// the slot finish first: kubelet creates in a slot only after it stopped the
// incumbent, which made the operation give way. An operation that has the very container ready answers with it.
func (d *Director) createContainer(ctx context.Context, method string, raw []byte, next proxy.UnaryNext) ([]byte, error) {
	req, err := decode(raw, &runtimeapi.CreateContainerRequest{})
	if err != nil {
		return nil, err
	}
	slot := Slot{PodUID: req.GetConfig().GetLabels()[labelPodUID], Container: req.GetConfig().GetLabels()[labelContainer]}
	if slot.PodUID != "" && slot.Container != "" {
		if id := d.prepared(ctx, method, slot, req); id != "" {
			did(ctx, didAdopt)
			return encode(&runtimeapi.CreateContainerResponse{ContainerId: id})
		}
		if id := d.replaced(ctx, slot, req); id != "" {
			did(ctx, didAdopt)
			return encode(&runtimeapi.CreateContainerResponse{ContainerId: id})
		}
		if d.view.Claimed(slot) {
			did(ctx, didHold)
			d.log.WithFields(logrusFields(slot, method)).Info("waiting for the operation on this slot")
		}
		claim, err := d.view.Claim(ctx, slot)
		if err != nil {
			return nil, status.FromContextError(err).Err()
		}
		defer claim.Release()
		if d.overrides.Any() {
			if raw, err = d.overridden(ctx, slot, req, raw); err != nil {
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
	d.records.Created(resp.GetContainerId(), raw)
	d.view.created(slot, resp.GetContainerId(), req)
	return b, nil
}

// overridden returns the request with the image that the slot has in the place of the one in the pod's spec, or raw as it is. What
// is recorded of the container is that too.
func (d *Director) overridden(ctx context.Context, slot Slot, req *runtimeapi.CreateContainerRequest, raw []byte) ([]byte, error) {
	changed, err := d.overrides.Apply(ctx, slot, req)
	if err != nil || !changed {
		return raw, err
	}
	did(ctx, didOverride)
	return encode(req)
}

// prepared returns the container that an operation on the slot has ready for the request, or "".
func (d *Director) prepared(ctx context.Context, method string, slot Slot, req *runtimeapi.CreateContainerRequest) string {
	claim := d.view.claimOf(slot)
	if claim == nil {
		return ""
	}
	driver := claim.awaitDriver(ctx)
	if driver == nil {
		return ""
	}
	id, ok := driver.Create(ctx, req)
	if !ok {
		did(ctx, didYield)
		claim.takeBack(Yield{Method: method, Grace: sandboxGrace})
		return ""
	}
	if id != "" {
		d.view.adopted(id)
	}
	return id
}

// replaced returns the container that kubelet asks for if it is there already, or "": kubelet decided before a reveal to replace the
// incumbent, has stopped it after that, and now makes the next attempt, whose name in the runtime is taken. So it is where a new
// process does not listen yet when a probe, which is aimed at the pod, looks for the old one.
func (d *Director) replaced(ctx context.Context, slot Slot, req *runtimeapi.CreateContainerRequest) string {
	id := d.view.lateHeir(slot)
	if id == "" || d.made == nil || d.view.Claimed(slot) || !d.made.Fits(ctx, id, req) {
		return ""
	}
	d.view.adopted(id)
	d.log.WithFields(logrusFields(slot, "")).WithField("successor", id).Info("kubelet replaces a container that has been replaced: it gets the one that is there")
	return id
}

// startContainer does not know hidden containers. One that an operation has made and started before kubelet asked for
// it needs no start.
func (d *Director) startContainer(ctx context.Context, _ string, raw []byte, next proxy.UnaryNext) ([]byte, error) {
	req, err := decode(raw, &runtimeapi.StartContainerRequest{})
	if err != nil {
		return nil, err
	}
	if _, is := d.staged(req.GetContainerId()); is {
		did(ctx, didHide)
		return nil, notFound(req.GetContainerId())
	}
	b, err := next(ctx, raw)
	if err == nil || ctx.Err() != nil {
		return b, err
	}
	st, serr := d.runtime.ContainerStatus(ctx, &runtimeapi.ContainerStatusRequest{ContainerId: req.GetContainerId()})
	s := st.GetStatus()
	if serr != nil || s.GetAnnotations()[StagedAnnotation] == "" || s.GetStartedAt() == 0 {
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

// stopContainer makes an operation on the slot give way. The stop itself goes
// to the runtime at once, so that the shorter grace wins, and the answer comes when
// the operation has cleaned up, so that kubelet finds no process that was not asked to stop.
func (d *Director) stopContainer(ctx context.Context, method string, raw []byte, next proxy.UnaryNext) ([]byte, error) {
	req, err := decode(raw, &runtimeapi.StopContainerRequest{})
	if err != nil {
		return nil, err
	}
	defer d.view.stopping(req.GetContainerId())()
	claim, id := d.view.byContainer(req.GetContainerId())
	if claim == nil {
		d.view.lateStop(req.GetContainerId(), req.GetTimeout())
		return next(ctx, raw)
	}
	if d.view.successorOf(claim) == id {
		did(ctx, didHide)
		// Nobody can know this container: answered as the runtime answers for unknown ones.
		return encode(&runtimeapi.StopContainerResponse{})
	}
	if driver := claim.awaitDriver(ctx); driver != nil {
		if ok, err := driver.Stop(ctx, req.GetTimeout()); ok {
			did(ctx, didHandOver)
			if err != nil {
				return nil, err
			}
			// It may be that the pod goes away: then its sandbox is stopped next, and nobody has asked the successor.
			d.view.lateStop(id, req.GetTimeout())
			return encode(&runtimeapi.StopContainerResponse{})
		}
	}
	did(ctx, didYield)
	claim.takeBack(Yield{Method: method, Grace: req.GetTimeout()})
	d.log.WithFields(logrusFields(claim.Slot(), method)).Info("kubelet takes the slot back from an operation")
	b, err := next(ctx, raw)
	if err != nil {
		return nil, err
	}
	d.awaitYield(ctx, claim, time.Duration(req.GetTimeout())*time.Second)
	d.view.lateStop(id, req.GetTimeout()) // had it been revealed a moment before
	return b, nil
}

// stopPodSandbox and removePodSandbox make all operations in the sandbox give way first.
func (d *Director) stopPodSandbox(ctx context.Context, method string, raw []byte, next proxy.UnaryNext) ([]byte, error) {
	req, err := decode(raw, &runtimeapi.StopPodSandboxRequest{})
	if err != nil {
		return nil, err
	}
	if d.keeps(ctx, req.GetPodSandboxId()) {
		did(ctx, didKeep)
		return encode(&runtimeapi.StopPodSandboxResponse{})
	}
	defer d.view.stopping(req.GetPodSandboxId())()
	d.takeBackSandbox(ctx, method, req.GetPodSandboxId())
	d.stopLateHeirs(ctx, req.GetPodSandboxId())
	return next(ctx, raw)
}

// keeps reports whether a stop of the sandbox is not for the runtime: kubelet has stopped the last container of a pod that is
// never restarted, because of a failed probe, and now gives the pod up (kuberuntime_manager.go computePodActions: KillPod),
// but another container has taken the place of that one. If kubelet tells that it has no other reason, such as a deletion, the
// sandbox is kept, and kubelet's next sync finds the container running in it. Once for each stop of a container: where that is wrong,
// kubelet finds the container running, stops it and asks again (kubelet.go SyncTerminatingPod).
func (d *Director) keeps(ctx context.Context, sandbox string) bool {
	heirs := d.view.lateHeirs(sandbox)
	if d.pods == nil || len(heirs) == 0 {
		return false
	}
	st, err := d.runtime.PodSandboxStatus(ctx, &runtimeapi.PodSandboxStatusRequest{PodSandboxId: sandbox})
	if err != nil || !serves(st.GetStatus()) || !d.pods.Kept(ctx, st.GetStatus().GetMetadata().GetUid()) {
		return false
	}
	for _, h := range heirs {
		st, err := d.runtime.ContainerStatus(ctx, &runtimeapi.ContainerStatusRequest{ContainerId: h.id})
		if err != nil || st.GetStatus().GetState() != runtimeapi.ContainerState_CONTAINER_RUNNING {
			continue
		}
		for _, h := range heirs {
			d.view.adopted(h.id)
		}
		d.log.WithField("successor", h.id).Info("kubelet gives the pod up for a container that has been replaced: its sandbox is kept, and kubelet finds the successor running")
		return true
	}
	return false
}

// serves reports whether kubelet would not replace the sandbox (pkg/kubelet/kuberuntime/util PodSandboxChanged).
func serves(s *runtimeapi.PodSandboxStatus) bool {
	host := s.GetLinux().GetNamespaces().GetOptions().GetNetwork() == runtimeapi.NamespaceMode_NODE
	return s.GetState() == runtimeapi.PodSandboxState_SANDBOX_READY && (host || s.GetNetwork().GetIp() != "")
}

// lateGrace bounds the grace of a late heir, in seconds: kubelet waits two minutes for StopPodSandbox.
const lateGrace = 90

// stopLateHeirs asks containers to stop that the runtime would kill with the sandbox: kubelet began to kill the pod, with a long
// preStop perhaps, before a restart was revealed, and stopped only the container that it saw then. Not at that
// stop already: after a failed liveness probe it looks the same, and then kubelet finds the fresh container and is content.
func (d *Director) stopLateHeirs(ctx context.Context, sandbox string) {
	var wg sync.WaitGroup
	for _, h := range d.view.lateHeirs(sandbox) {
		did(ctx, didStop)
		wg.Go(func() {
			log := d.log.WithFields(logrus.Fields{"successor": h.id})
			defer func() { // nobody else guards this goroutine, and kubelet's call goes on without it
				if p := recover(); p != nil {
					log.WithFields(logrus.Fields{"panic": p, "stack": string(debug.Stack())}).Error("container not stopped before its sandbox: the daemon would have panicked; please report this")
				}
			}()
			log.Info("the pod goes away, stopping the container that took the place of the one that kubelet stopped")
			if _, err := d.runtime.StopContainer(ctx, &runtimeapi.StopContainerRequest{ContainerId: h.id, Timeout: min(h.grace, lateGrace)}); err != nil {
				log.WithError(err).Warn("container not stopped before its sandbox")
			}
		})
	}
	wg.Wait()
}

// removePodSandbox stops what still runs in the sandbox, as the runtime does (sandbox_remove.go in
// containerd).
func (d *Director) removePodSandbox(ctx context.Context, method string, raw []byte, next proxy.UnaryNext) ([]byte, error) {
	req, err := decode(raw, &runtimeapi.RemovePodSandboxRequest{})
	if err != nil {
		return nil, err
	}
	defer d.view.stopping(req.GetPodSandboxId())()
	d.takeBackSandbox(ctx, method, req.GetPodSandboxId())
	b, err := next(ctx, raw)
	if err == nil {
		d.view.forgetSandbox(req.GetPodSandboxId())
		if d.overrides.Any() {
			d.overrides.SandboxRemoved()
		}
	}
	return b, err
}

// sandboxGrace is what a successor gets to stop when its sandbox goes away, in
// seconds: kubelet's own minimum (minimumGracePeriodInSeconds in kuberuntime_manager.go).
const sandboxGrace = 2

func (d *Director) takeBackSandbox(ctx context.Context, method, sandbox string) {
	claims := d.view.bySandbox(sandbox)
	for _, c := range claims {
		did(ctx, didYield)
		c.takeBack(Yield{Method: method, Grace: sandboxGrace})
		d.log.WithFields(logrusFields(c.Slot(), method)).Info("the pod goes away, its operation gives way")
	}
	wait, cancel := context.WithTimeout(ctx, sandboxPatience)
	defer cancel()
	for _, c := range claims {
		d.awaitYield(wait, c, sandboxGrace*time.Second)
	}
}

// sandboxPatience bounds what a call for a sandbox waits before it goes on to the runtime, for all operations in it: kubelet gives it two minutes
// (runtimeRequestTimeout), and the runtime needs some of them.
const sandboxPatience = time.Minute

// awaitYield waits for the operation to be gone. It never fails the call: Stop*
// and Remove* must get through whatever our own operation does.
func (d *Director) awaitYield(ctx context.Context, c *Claim, grace time.Duration) {
	ctx, cancel := context.WithTimeout(ctx, grace+yieldPatience)
	defer cancel()
	if err := c.wait(ctx); err != nil {
		d.log.WithFields(logrusFields(c.Slot(), "")).WithError(err).Warn("operation did not give way in time")
	}
}

// removeContainer forgets the record. Kubelet removes only what it saw exit, so it
// never meets a masked container; whoever else removes one ends the operation.
func (d *Director) removeContainer(ctx context.Context, method string, raw []byte, next proxy.UnaryNext) ([]byte, error) {
	req, err := decode(raw, &runtimeapi.RemoveContainerRequest{})
	if err != nil {
		return nil, err
	}
	defer d.view.stopping(req.GetContainerId())() // the runtime kills what runs
	if d.view.Active() {
		claim, id := d.view.byContainer(req.GetContainerId())
		if claim != nil && d.view.successorOf(claim) == id {
			did(ctx, didHide)
			return encode(&runtimeapi.RemoveContainerResponse{})
		}
		if claim != nil && d.view.judge(id) == masked {
			did(ctx, didYield)
			claim.takeBack(Yield{Method: method, Grace: sandboxGrace})
			d.awaitYield(ctx, claim, sandboxGrace*time.Second)
		}
	}
	b, err := next(ctx, raw)
	if err != nil {
		return nil, err
	}
	d.records.Removed(req.GetContainerId())
	d.view.Forget(req.GetContainerId())
	return b, nil
}

// updateContainerResources records what was applied, because the runtime's own
// config keeps the old values, and applies it to a staged successor too. When the
// incumbent is on its way out, what the successor answers counts: the runtime
// fails the call for a process that ends meanwhile.
func (d *Director) updateContainerResources(ctx context.Context, method string, raw []byte, next proxy.UnaryNext) ([]byte, error) {
	req, err := decode(raw, &runtimeapi.UpdateContainerResourcesRequest{})
	if err != nil {
		return nil, err
	}
	claim, id := d.view.byContainer(req.GetContainerId())
	going, successor := false, ""
	if claim != nil {
		going, successor = d.view.judge(id) == masked, d.view.successorOf(claim)
	}
	b, err := next(ctx, raw)
	if err != nil && claim != nil {
		going = going || d.view.judge(id) == masked
	}
	if req.GetLinux() == nil || err != nil && !going {
		return b, err
	}
	linux, merr := encode(req.GetLinux())
	if merr != nil {
		return nil, merr
	}
	if claim == nil {
		d.records.Updated(req.GetContainerId(), linux)
		return b, nil
	}
	if err == nil {
		d.records.Updated(id, linux) // before the look for a successor: one that is staged after it reads this
	}
	if now := d.view.successorOf(claim); now != "" || err == nil { // else it may have been revealed during the call
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
	log := d.log.WithFields(logrusFields(claim.Slot(), method))
	switch {
	case err != nil && serr != nil:
		return nil, err
	case err != nil:
		log.WithError(err).Info("only the staged container took the new resources, the other is being stopped")
		d.records.Updated(id, linux)
		b = of
	case serr != nil:
		// Kubelet asked for the incumbent, which has it. The successor starts with what it was created with.
		log.WithError(serr).Warn("staged container did not take the new resources")
	}
	d.records.Updated(successor, linux)
	return b, nil
}

// staged returns the claim whose hidden successor id names.
func (d *Director) staged(id string) (*Claim, bool) {
	claim, full := d.view.byContainer(id)
	return claim, claim != nil && d.view.successorOf(claim) == full
}

// maskedDead is the answer for calls that need the masked container's process,
// which is gone or going: kubelet's prober discards a result with this code
// (pkg/probe/exec) instead of counting it as a failure.
func maskedDead(id string) error {
	return status.Errorf(codes.Unavailable, "container %q is being restarted in place; try again", id)
}
