// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package recreate

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/sirupsen/logrus"
	"google.golang.org/grpc/codes"
	corev1 "k8s.io/api/core/v1"
	apiequality "k8s.io/apimachinery/pkg/api/equality"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"sigs.k8s.io/controller-runtime/pkg/client"

	appsv1alpha1 "github.com/cri-proxy/cri-proxy/api/apps/v1alpha1"
	opsv1 "github.com/cri-proxy/cri-proxy/api/ops/v1"
	"github.com/cri-proxy/cri-proxy/controller/apierror"
	"github.com/cri-proxy/cri-proxy/controller/nodes"
	"github.com/cri-proxy/cri-proxy/controller/objects"
	"github.com/cri-proxy/cri-proxy/controller/pods"
	"github.com/cri-proxy/cri-proxy/controller/recreate/accept"
	"github.com/cri-proxy/cri-proxy/controller/retry"
)

const (
	// pollWatched is how often to ask for an operation although a stream tells of its changes. This
	// notices a node that vanished without a word.
	pollWatched = 20 * time.Second
	// pollUnwatched is how often to ask for an operation that has no stream.
	pollUnwatched = time.Second
	// podResync is how often to look at the pod again without an event.
	podResync = 20 * time.Second
	// writeInterval is the shortest time between two status writes of which the second says little.
	// The next write that matters overtakes most of those.
	writeInterval = time.Second
	// silentMax ends a request that no node ever took and that has no deadline. OpenKruise waits as
	// long for its daemon.
	silentMax = 60 * time.Second
	// cancelTimeout is how long deletion waits for an unreachable node.
	cancelTimeout = 30 * time.Second

	messageDeadline = "recreating has exceeded the activeDeadlineSeconds"
	messagePodGone  = "pod has gone"
	messageSilent   = "daemon has not responded for a long time"

	// reasonSilent and reasonUnwilling begin the message of a request whose node does not answer,
	// or answers that it cannot now.
	reasonSilent    = "NodeUnreachable"
	reasonUnwilling = "NodeUnavailable"

	// Reasons of the conditions of a request that has ended.
	reasonRecreated        = "Recreated"
	reasonContainersFailed = "ContainersFailed"
)

// pass is one reconcile of one request.
type pass struct {
	*request
	node   commander
	events teller
	writer objects.Writer[*appsv1alpha1.ContainerRecreateRequest]
}

func newPass(q *request) *pass {
	wrote := func(what string, _ *appsv1alpha1.ContainerRecreateRequest) { q.r.Metrics.Wrote(what) }
	return &pass{request: q, node: commander{request: q}, events: teller{q},
		writer: objects.Writer[*appsv1alpha1.ContainerRecreateRequest]{Client: q.r.Client, Wrote: wrote,
			Kind: "request"}}
}

// advance takes a request that has not completed a step further.
func (p *pass) advance(ctx context.Context) (time.Duration, error) {
	now := p.r.now()
	late := p.deadline() != nil && !now.Before(*p.deadline())
	if p.accepted = accept.Of(p.crr); p.accepted == nil {
		if late {
			return p.complete(ctx, messageDeadline, func(c *container) {
				c.fail("%s: nothing had been done yet", messageDeadline)
			})
		}
		if err := p.accept(ctx); err != nil {
			if why := accept.Refused(err); why != nil {
				return p.refuse(ctx, why)
			}
			return 0, err
		}
	} else if err := p.keepFinalizers(ctx); err != nil {
		return 0, err
	} else if err := p.findPod(ctx); err != nil {
		return 0, err
	}
	p.gather()
	p.learnKubelet(ctx)
	if p.pod == nil || p.pod.DeletionTimestamp != nil {
		return p.giveUp(ctx, messagePodGone)
	}

	var wait time.Duration
	p.node.lookUp(ctx)
	for {
		now = p.r.now()
		p.noteRunning(now)
		wait = 0
		for _, c := range p.containers {
			wait = retry.Sooner(wait, c.observe(p.pod, now))
			if c.state.Phase == failed && opsv1.EndedBefore(c.op.GetReason()) {
				p.node.noteEnded(c)
			}
		}
		if late && !p.done() {
			return p.giveUp(ctx, messageDeadline)
		}
		next := decide(p.containers, pods.HasReadyGate(p.pod), unreadySince(p.crr), now)
		wait = retry.Sooner(wait, next.wait)
		p.events.tellUngated()
		if next.drain {
			if err := p.drain(ctx); err != nil {
				if words, ok := apierror.Denied(err); ok {
					return p.giveUp(ctx, "the pod cannot be taken out of service: "+words)
				}
				return 0, err
			}
			continue
		}
		acted := p.node.cancelLeftOver(ctx, next.cancel)
		for _, c := range next.command {
			if p.node.trouble != nil {
				break
			}
			p.node.command(ctx, c)
			acted = true
		}
		if !acted || p.node.trouble != nil {
			break
		}
	}
	return p.conclude(ctx, retry.Sooner(wait, p.nudge(ctx)))
}

// accept checks and pins the request, with one patch. When the cache gives a reason to refuse it
// asks the API server too.
func (p *pass) accept(ctx context.Context) error {
	a, pod, err := accept.Read(ctx, p.r.Client, p.r.APIReader, p.crr)
	if accept.Refused(err) != nil {
		a, pod, err = accept.Read(ctx, p.r.APIReader, p.r.APIReader, p.crr)
	}
	if err != nil {
		p.pod = pod
		return err
	}
	drains := false
	for _, c := range p.crr.Spec.Containers {
		drains = drains || pods.HasReadyGate(pod) && accept.StrategyOf(p.crr.Spec.Strategy, c.Strategy).Unready != nil
	}
	before := p.crr.DeepCopy()
	if err := accept.Pin(p.crr, a, drains); err != nil {
		return err
	}
	if err := p.patch(ctx, before); err != nil {
		return err
	}
	p.accepted, p.pod = a, pod
	p.memory.lastWrite = p.r.now()
	p.log.WithField("node", a.NodeName).Info("request accepted")
	return nil
}

// keepFinalizers puts the finalizers back on an accepted request that OpenKruise had meanwhile, or
// that a user replaced by a manifest without them.
func (p *pass) keepFinalizers(ctx context.Context) error {
	before := p.crr.DeepCopy()
	if !slices.Contains(p.crr.Finalizers, accept.Finalizer) {
		p.crr.Finalizers = append(p.crr.Finalizers, accept.Finalizer)
	}
	if !unreadySince(p.crr).IsZero() && !slices.Contains(p.crr.Finalizers, appsv1alpha1.UnreadyAcquiredFinalizer) {
		p.crr.Finalizers = append(p.crr.Finalizers, appsv1alpha1.UnreadyAcquiredFinalizer)
	}
	return p.patch(ctx, before)
}

// refuse completes a request that cannot be carried out.
func (p *pass) refuse(ctx context.Context, why *accept.Refusal) (time.Duration, error) {
	p.gather()
	return p.complete(ctx, why.Error(), func(c *container) { c.state = why.State(c.name) })
}

// findPod sets p.pod to the pod that the request was accepted for, or to nil if it has gone.
func (p *pass) findPod(ctx context.Context) error {
	for _, from := range []client.Reader{p.r.Client, p.r.APIReader} {
		pod := &corev1.Pod{}
		err := from.Get(ctx, client.ObjectKey{Namespace: p.crr.Namespace, Name: p.crr.Spec.PodName}, pod)
		switch {
		case err == nil && string(pod.UID) == p.accepted.PodUID:
			p.pod = pod
			return nil
		case err != nil && !apierrors.IsNotFound(err):
			return err
		}
	}
	return nil
}

// nudge makes kubelet look at the pod again for a new container that is not ready. It returns how
// long until that may be necessary.
func (p *pass) nudge(ctx context.Context) time.Duration {
	now := p.r.now()
	var names []string
	for _, c := range p.containers {
		if c.done() || c.op.GetPhase() != opsv1.Phase_PHASE_SUCCEEDED || !c.isNew() {
			continue
		}
		if passed, _ := pods.StartupPassed(c.spec, c.status, c.firstSeen, c.carried, now); passed {
			names = append(names, c.name)
		}
	}
	container, wait := p.memory.nudges.Due(p.pod, names, now)
	if container == "" {
		return wait
	}
	log := p.log.WithField("container", container)
	if _, err := p.memory.nudges.Nudge(ctx, p.r.Client, p.pod, container); err != nil {
		// kubelet will probe the container in its time.
		log.WithError(err).Info("kubelet could not be made to probe the new container at once")
		return wait
	}
	p.r.Metrics.Wrote("pod")
	log.Debug("kubelet made to probe the new container at once")
	return wait
}

// learnKubelet finds out, where it matters, whether kubelet takes new containers for started.
func (p *pass) learnKubelet(ctx context.Context) {
	probed := func(c *container) bool { return c.spec != nil && c.spec.StartupProbe != nil }
	if !slices.ContainsFunc(p.containers, probed) {
		return
	}
	carried := true
	var node corev1.Node
	if p.r.Client.Get(ctx, client.ObjectKey{Name: p.accepted.NodeName}, &node) == nil {
		carried = pods.CarriesStarted(&node)
	}
	for _, c := range p.containers {
		c.carried = carried
	}
}

// noteRunning keeps when this controller first saw the new containers running.
func (p *pass) noteRunning(now time.Time) {
	for _, c := range p.containers {
		if c.done() || c.op == nil || !c.isNew() || c.status.State.Running == nil {
			continue
		}
		id := c.status.ContainerID
		if _, ok := p.memory.firstSeen[id]; !ok {
			p.memory.firstSeen[id] = now
		}
		c.firstSeen = p.memory.firstSeen[id]
	}
}

// conclude writes what the pass has found out, and says when to look again.
func (p *pass) conclude(ctx context.Context, wait time.Duration) (time.Duration, error) {
	now := p.r.now()
	if p.done() {
		return p.complete(ctx, "", nil)
	}
	message := ""
	if p.node.trouble == nil {
		p.memory.silentSince, p.memory.attempts = time.Time{}, 0
	} else {
		if p.memory.silentSince.IsZero() {
			p.memory.silentSince = now
			p.log.WithError(p.node.trouble).Warn("node cannot be commanded")
		}
		p.memory.attempts++
		if p.deadline() == nil && p.untouched() && nodes.Code(p.node.trouble) != codes.ResourceExhausted &&
			now.Sub(p.memory.silentSince) >= silentMax {
			return p.complete(ctx, messageSilent+": "+p.node.trouble.Error(), func(c *container) {
				c.fail("not recreated: %s", p.node.trouble)
			})
		}
		wait = retry.Sooner(wait, backOff(p.memory.attempts))
		reason := troubleReason(p.node.trouble)
		message = reason + ": " + p.node.trouble.Error()
		if strings.HasPrefix(p.crr.Status.Message, reason+": ") {
			message = p.crr.Status.Message // the wording changes from try to try
		}
	}
	for _, c := range p.containers {
		if c.done() || c.op == nil {
			continue
		}
		if s, _ := p.r.tracker.Get(p.operation(c)); s.Watched {
			wait = retry.Sooner(wait, pollWatched)
		} else if c.op.GetPhase() < opsv1.Phase_PHASE_SUCCEEDED {
			wait = retry.Sooner(wait, pollUnwatched)
		} else {
			wait = retry.Sooner(wait, podResync)
		}
	}
	if d := p.deadline(); d != nil {
		wait = retry.Sooner(wait, max(d.Sub(now), time.Millisecond))
	}

	next := p.crr.Status.DeepCopy()
	next.Phase, next.Message = p.phase(), message
	next.ContainerRecreateStates = p.states()
	if left := p.memory.lastWrite.Add(writeInterval).Sub(now); left > 0 && minor(&p.crr.Status, next) {
		if !apiequality.Semantic.DeepEqual(&p.crr.Status, next) {
			wait = retry.Sooner(wait, left)
		}
		return wait, nil
	}
	return wait, p.writeStatus(ctx, next)
}

// troubleReason tells a node that does not answer from a node that cannot do it now.
func troubleReason(err error) string {
	var nodeError *nodes.Error
	if errors.As(err, &nodeError) && !nodeError.Silent {
		return reasonUnwilling
	}
	return reasonSilent
}

// backOff is the pause after a number of failed tries.
func backOff(attempts int) time.Duration {
	return retry.Backoff(attempts, 500*time.Millisecond, 5*time.Second)
}

// complete ends the request. end, if not nil, ends each container that is not done yet.
func (p *pass) complete(ctx context.Context, message string, end func(*container)) (time.Duration, error) {
	if p.containers == nil {
		p.gather()
	}
	if end != nil {
		for _, c := range p.containers {
			if !c.done() {
				end(c)
			}
		}
	}
	var wrong []string
	for _, c := range p.containers {
		if c.state.Phase == failed {
			wrong = append(wrong, fmt.Sprintf("%s: %s", c.name, c.state.Message))
		}
	}
	if message == "" && len(wrong) > 0 {
		message = fmt.Sprintf("%d of %d containers failed: %s", len(wrong), len(p.containers),
			strings.Join(wrong, "; "))
	}
	now := metav1.NewTime(p.r.now())
	next := p.crr.Status.DeepCopy()
	next.Phase, next.CompletionTime, next.Message = completed, &now, message
	next.ContainerRecreateStates = p.states()
	if err := p.writeStatus(ctx, next); err != nil {
		return 0, err
	}
	var phases []string
	for _, c := range p.containers {
		phases = append(phases, string(c.state.Phase))
	}
	p.r.Metrics.completed(now.Sub(p.crr.CreationTimestamp.Time), phases, len(wrong) == 0)
	p.log.WithFields(logrus.Fields{"failed": len(wrong), "message": message}).Info("request completed")
	return p.cleanUp(ctx)
}

// giveUp completes a request in the middle. It cancels what the node has not begun; what is
// unfinished fails.
func (p *pass) giveUp(ctx context.Context, message string) (time.Duration, error) {
	return p.complete(ctx, message, func(c *container) {
		c.fail("%s: %s", message, p.node.cancel(ctx, c, message))
	})
}

// cleanUp takes the marks of an active request off a completed one, in one patch, and deletes the
// request when its time has come.
func (p *pass) cleanUp(ctx context.Context) (time.Duration, error) {
	if err := p.r.release(ctx, p.crr); err != nil {
		return 0, err
	}
	before := p.crr.DeepCopy()
	p.crr.Finalizers = objects.Without(p.crr.Finalizers, accept.Finalizer, appsv1alpha1.UnreadyAcquiredFinalizer)
	if _, active := p.crr.Labels[appsv1alpha1.ActiveLabel]; active {
		delete(p.crr.Labels, appsv1alpha1.ActiveLabel)
		if err := snapshot(p.crr); err != nil {
			return 0, err
		}
	}
	if err := p.patch(ctx, before); err != nil {
		return 0, err
	}
	p.r.forget(client.ObjectKeyFromObject(p.crr))
	if p.crr.Spec.TTLSecondsAfterFinished == nil {
		return 0, nil
	}
	ttl := time.Duration(*p.crr.Spec.TTLSecondsAfterFinished) * time.Second
	if left := p.crr.Status.CompletionTime.Add(ttl).Sub(p.r.now()); left > 0 {
		return left, nil
	}
	p.log.Info("deleting the request: ttlSecondsAfterFinished has passed")
	err := p.r.Client.Delete(ctx, p.crr, client.Preconditions{UID: &p.crr.UID})
	if err == nil {
		p.r.Metrics.Wrote("request")
	}
	return 0, client.IgnoreNotFound(err)
}

// finalize lets a deleted request go. It cancels the request's operations as far as it can, and
// puts the pod back into service. It waits no longer than cancelTimeout for an unreachable node.
func (p *pass) finalize(ctx context.Context) (time.Duration, error) {
	if !slices.Contains(p.crr.Finalizers, accept.Finalizer) &&
		!slices.Contains(p.crr.Finalizers, appsv1alpha1.UnreadyAcquiredFinalizer) {
		p.r.forget(client.ObjectKeyFromObject(p.crr))
		return 0, nil
	}
	if p.accepted = accept.Of(p.crr); p.accepted != nil && p.crr.Status.CompletionTime == nil {
		p.gather()
		for _, c := range p.containers {
			if !c.done() {
				outcome := p.node.cancel(ctx, c, "the ContainerRecreateRequest was deleted")
				p.log.WithField("container", c.name).Info("request deleted: " + outcome)
			}
		}
		if p.node.trouble != nil && p.r.now().Sub(p.crr.DeletionTimestamp.Time) < cancelTimeout {
			p.memory.attempts++
			return backOff(p.memory.attempts), nil
		}
	}
	if err := p.r.release(ctx, p.crr); err != nil {
		return 0, err
	}
	before := p.crr.DeepCopy()
	p.crr.Finalizers = objects.Without(p.crr.Finalizers, accept.Finalizer, appsv1alpha1.UnreadyAcquiredFinalizer)
	if err := p.patch(ctx, before); err != nil {
		return 0, err
	}
	p.r.forget(client.ObjectKeyFromObject(p.crr))
	return 0, nil
}

// drain takes the pod out of service and notes when.
func (p *pass) drain(ctx context.Context) error {
	if err := p.r.setUnready(ctx, p.crr, p.pod, true); err != nil {
		return err
	}
	before := p.crr.DeepCopy()
	// Rounded up to the annotation's resolution, so that the drain is never short.
	since := p.r.now().Add(time.Second - 1).Truncate(time.Second)
	p.crr.Annotations[appsv1alpha1.UnreadyAcquiredAnnotation] = since.UTC().Format(time.RFC3339)
	if err := p.patch(ctx, before); err != nil {
		return err
	}
	p.log.Info("pod taken out of service")
	return nil
}
