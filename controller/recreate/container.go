// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package recreate

import (
	"fmt"
	"time"

	corev1 "k8s.io/api/core/v1"

	appsv1alpha1 "github.com/cri-proxy/cri-proxy/api/apps/v1alpha1"
	opsv1 "github.com/cri-proxy/cri-proxy/api/ops/v1"
	"github.com/cri-proxy/cri-proxy/controller/nodes"
	"github.com/cri-proxy/cri-proxy/controller/pods"
	"github.com/cri-proxy/cri-proxy/controller/recreate/accept"
)

// Short names of the phases.
const (
	pending    = appsv1alpha1.ContainerRecreateRequestPending
	recreating = appsv1alpha1.ContainerRecreateRequestRecreating
	succeeded  = appsv1alpha1.ContainerRecreateRequestSucceeded
	failed     = appsv1alpha1.ContainerRecreateRequestFailed
	completed  = appsv1alpha1.ContainerRecreateRequestCompleted
)

// container is all that one reconcile knows of one container of a request.
type container struct {
	name     string
	strategy accept.Strategy
	// pinned is the container's identity when the request was accepted.
	pinned accept.Identity
	// spec and status are the pod's; status is nil when the pod has none.
	spec   *corev1.Container
	status *corev1.ContainerStatus
	// op is the node's account of the operation, nil until the node has accepted it. With replaced
	// it is not the request's own operation, but the one that replaced the pinned container first.
	op       *opsv1.ContainerOperation
	replaced bool
	// ended says that the node found nothing to stop: the container had ended by itself.
	ended bool
	// carried says that kubelet takes the new container for started because the old one was.
	carried bool
	// firstSeen is when this controller first saw the new container running.
	firstSeen time.Time
	// state is what the status says, and what it shall say.
	state appsv1alpha1.ContainerRecreateRequestContainerRecreateState
}

func (c *container) done() bool { return c.state.Phase == succeeded || c.state.Phase == failed }

func (c *container) fail(format string, args ...any) {
	c.state.Phase, c.state.Message = failed, fmt.Sprintf(format, args...)
}

// stopped says that the node has stopped the container, or never will. The next container need not
// wait any more. The new container may still be starting.
func (c *container) stopped() bool {
	if c.op.GetStopTime() != nil {
		return true
	}
	switch c.op.GetPhase() {
	case opsv1.Phase_PHASE_STARTING:
		return c.op.GetMethod() != opsv1.MethodOverlap // there the new container goes first
	case opsv1.Phase_PHASE_REVEALING, opsv1.Phase_PHASE_SUCCEEDED, opsv1.Phase_PHASE_FAILED,
		opsv1.Phase_PHASE_CANCELLED:
		return true
	}
	return false
}

// observe brings c.state up to date with the node's account and the pod's status. It returns how
// long until the passing of time alone changes the state; 0 means never. Succeeded and Failed stay.
func (c *container) observe(pod *corev1.Pod, now time.Time) time.Duration {
	if c.done() {
		return 0
	}
	if c.op == nil {
		if c.state.Phase == "" {
			c.state.Phase = pending
		}
		return 0
	}
	c.state.Message = ""
	if c.op.GetStopTime() != nil && !c.replaced {
		c.state.IsKilled = true
	}
	switch c.op.GetPhase() {
	case opsv1.Phase_PHASE_UNSPECIFIED, opsv1.Phase_PHASE_PENDING:
		c.state.Phase = pending
		c.state.Message = "waits for an earlier operation on this container"
	case opsv1.Phase_PHASE_FAILED:
		message := nodes.Account(c.op)
		if message == "" {
			message = "the node says only: " + c.op.GetReason()
		}
		c.fail("%s", message)
	case opsv1.Phase_PHASE_CANCELLED:
		c.fail("not recreated: %s", c.op.GetMessage())
	case opsv1.Phase_PHASE_SUCCEEDED:
		c.state.Phase = recreating
		return c.awaitReady(pod, now)
	default:
		c.state.Phase = recreating
	}
	return 0
}

// isNew says that the pod's status shows the successor, or a container that kubelet started after
// it.
func (c *container) isNew() bool {
	if c.status == nil {
		return false
	}
	id := pods.BareID(c.status.ContainerID)
	switch id {
	case "", pods.BareID(c.pinned.ContainerID), c.op.GetIncumbentId():
		return false
	case c.op.GetSuccessorId():
		return true
	}
	return c.status.RestartCount > int32(c.op.GetAttempt())
}

// awaitReady is observe after the node has done its part.
func (c *container) awaitReady(pod *corev1.Pod, now time.Time) time.Duration {
	if !c.isNew() {
		return 0
	}
	passed, wait := pods.StartupPassed(c.spec, c.status, c.firstSeen, c.carried, now)
	state := c.status.State
	switch {
	case state.Terminated != nil:
		if t := state.Terminated; !c.restartsAfter(pod, t.ExitCode) {
			c.fail("the new container ended (exit code %d, %s) and its restartPolicy does not start it again",
				t.ExitCode, t.Reason)
			return 0
		}
		c.state.Message = fmt.Sprintf("the new container exited with code %d; waiting for it to become ready",
			state.Terminated.ExitCode)
	case state.Waiting != nil:
		c.state.Message = fmt.Sprintf("the new container is waiting (%s); waiting for it to become ready",
			state.Waiting.Reason)
	case state.Running != nil && !passed:
		c.state.Message = "the new container runs; waiting for its startupProbe"
		return wait
	case state.Running != nil && c.status.Ready:
		minStarted := c.strategy.MinStarted
		if c.op.GetMethod() == opsv1.MethodOverlap && c.strategy.StartFirst && !c.replaced &&
			pods.BareID(c.status.ContainerID) == c.op.GetSuccessorId() {
			minStarted = 0 // the node saw the new container run that long before it stopped the old one
		}
		// A node whose clock is ahead must not make the wait longer.
		since := state.Running.StartedAt.Time
		if !c.firstSeen.IsZero() && c.firstSeen.Before(since) {
			since = c.firstSeen
		}
		if left := minStarted - now.Sub(since); left > 0 {
			return left
		}
		c.state.Phase, c.state.Message = succeeded, ""
	}
	return 0
}

// restartsAfter says whether kubelet starts the container again after it exited with code
// (pkg/kubelet/container: ShouldContainerBeRestarted).
func (c *container) restartsAfter(pod *corev1.Pod, code int32) bool {
	if pods.Ended(pod) {
		return false
	}
	policy := pod.Spec.RestartPolicy
	if c.spec != nil {
		if len(c.spec.RestartPolicyRules) > 0 {
			return true // kubelet decides by exit code; wait for what it does
		}
		if c.spec.RestartPolicy != nil {
			policy = corev1.RestartPolicy(*c.spec.RestartPolicy)
		}
	}
	switch policy {
	case corev1.RestartPolicyNever:
		return false
	case corev1.RestartPolicyOnFailure:
		return code != 0
	}
	return true
}
