// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package controller

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"maps"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/sirupsen/logrus"
	"google.golang.org/grpc/codes"
	corev1 "k8s.io/api/core/v1"
	apiequality "k8s.io/apimachinery/pkg/api/equality"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/client-go/tools/events"
	"sigs.k8s.io/controller-runtime/pkg/client"
	"sigs.k8s.io/controller-runtime/pkg/reconcile"

	appsv1alpha1 "github.com/cri-proxy/cri-proxy/api/apps/v1alpha1"
	opsv1 "github.com/cri-proxy/cri-proxy/api/ops/v1"
	"github.com/cri-proxy/cri-proxy/controller/kruise"
	"github.com/cri-proxy/cri-proxy/controller/kstatus"
)

const (
	// pollWatched is how often an operation is asked for although a stream tells
	// of its changes: a node that vanished without a word is noticed by it.
	pollWatched = 20 * time.Second
	// pollUnwatched is how often one is asked for that has no stream.
	pollUnwatched = time.Second
	// podPatience is how often the pod is looked at again without an event.
	podPatience = 20 * time.Second
	// conflictPause lets the cache catch up after a write that came too late.
	conflictPause = 200 * time.Millisecond
	// writePause is the least time between two status writes of which the second
	// says little: most of these are overtaken by the next one that matters.
	writePause = time.Second
	// silentMax ends a request that no node ever took and that has no deadline
	// (OpenKruise waits as long for its daemon).
	silentMax = 60 * time.Second
	// cancelPatience is how long deletion waits for an unreachable node.
	cancelPatience = 30 * time.Second

	messageDeadline = "recreating has exceeded the activeDeadlineSeconds"
	messagePodGone  = "pod has gone"
	messageSilent   = "daemon has not responded for a long time"

	// reasonSilent and reasonUnwilling begin the message of a request whose node
	// does not answer, or answers that it cannot now.
	reasonSilent    = "NodeUnreachable"
	reasonUnwilling = "NodeUnavailable"

	// Reasons of the conditions of a request that has ended.
	reasonRecreated        = "Recreated"
	reasonContainersFailed = "ContainersFailed"
)

// mirrorAnnotation holds the UID under which the node knows a static pod.
const mirrorAnnotation = corev1.MirrorPodAnnotationKey

// +kubebuilder:rbac:groups=apps.kruise.io,resources=containerrecreaterequests,verbs=get;list;watch;patch;delete
// +kubebuilder:rbac:groups=apps.kruise.io,resources=containerrecreaterequests/status,verbs=patch
// +kubebuilder:rbac:groups="",resources=pods,verbs=get;list;watch
// +kubebuilder:rbac:groups="",resources=pods/status,verbs=patch
// +kubebuilder:rbac:groups="",resources=nodes,verbs=get;list;watch
// +kubebuilder:rbac:groups="",resources=configmaps;secrets;serviceaccounts,verbs=get
// +kubebuilder:rbac:groups="",resources=services,verbs=get;list
// +kubebuilder:rbac:groups="",resources=persistentvolumeclaims;persistentvolumes,verbs=get
// +kubebuilder:rbac:groups=events.k8s.io,resources=events,verbs=create;patch

// ContainerRecreateReconciler carries out ContainerRecreateRequests.
type ContainerRecreateReconciler struct {
	// Client reads from the cache and writes.
	Client client.Client
	// APIReader reads past the cache: a request is only refused, and a pod only
	// taken for gone, on the API server's word.
	APIReader client.Reader
	// Nodes commands the nodes.
	Nodes NodeClient
	// Jobs counts restarts of Jobs' pods, with all who make some; it may be nil.
	Jobs *JobBudgets
	// NodePort is the port for nodes without OpsAddressAnnotation; 0 means
	// DefaultNodePort.
	NodePort int
	// Recorder writes Events.
	Recorder events.EventRecorder
	// Metrics may be nil.
	Metrics *Metrics
	// Log must be set.
	Log logrus.FieldLogger
	// Now is the clock; nil means time.Now.
	Now func() time.Time
	// Gate is closed while OpenKruise carries the requests out; nil: it never is.
	Gate *kruise.Gate

	watches *operationWatches

	mu       sync.Mutex
	memories map[types.NamespacedName]*memory
}

// memory is what is worth knowing of a request between two reconciles, and can be
// found out again after a restart. A request is reconciled by one worker at a time.
type memory struct {
	uid       types.UID
	lastWrite time.Time
	// silentSince is when the node stopped answering; attempts counts since.
	silentSince time.Time
	attempts    int
	// standIns are accounts that stand in for an operation the node refused
	// because another one had replaced the container, or that it has forgotten.
	standIns map[string]standIn
	// firstSeen is when a new container was first seen running, by its ID.
	firstSeen map[string]time.Time
	// operations are the UIDs to forget in the end.
	operations map[string]bool
	// cancelAsked are those the node was told to cancel after a failure.
	cancelAsked map[string]bool
	// ended are the containers that had ended by themselves. With recalled they are known of the time before this memory, too.
	ended    map[string]bool
	recalled bool
	nudges   Nudges
	// ungated says that the lack of a readiness gate has been told.
	ungated bool
}

type standIn struct {
	op       *opsv1.ContainerOperation
	replaced bool
}

func (r *ContainerRecreateReconciler) now() time.Time {
	if r.Now != nil {
		return r.Now()
	}
	return time.Now()
}

func (r *ContainerRecreateReconciler) remember(crr *appsv1alpha1.ContainerRecreateRequest) *memory {
	key := client.ObjectKeyFromObject(crr)
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.memories == nil {
		r.memories = map[types.NamespacedName]*memory{}
	}
	m := r.memories[key]
	if m == nil || m.uid != crr.UID {
		m = &memory{
			uid: crr.UID, standIns: map[string]standIn{}, firstSeen: map[string]time.Time{},
			operations: map[string]bool{}, cancelAsked: map[string]bool{}, ended: map[string]bool{},
		}
		r.memories[key] = m
	}
	return m
}

func (r *ContainerRecreateReconciler) forget(key types.NamespacedName) {
	r.mu.Lock()
	m := r.memories[key]
	delete(r.memories, key)
	r.mu.Unlock()
	if m != nil {
		for uid := range m.operations {
			r.watches.forget(uid)
			r.Jobs.Return(uid)
		}
	}
}

// standDown forgets all requests: they are somebody else's.
func (r *ContainerRecreateReconciler) standDown() {
	r.mu.Lock()
	keys := slices.Collect(maps.Keys(r.memories))
	r.mu.Unlock()
	for _, key := range keys {
		r.forget(key)
	}
}

// Reconcile takes one request as far as it goes and says when to look again.
func (r *ContainerRecreateReconciler) Reconcile(ctx context.Context, req reconcile.Request) (reconcile.Result, error) {
	leave, open := r.Gate.Enter()
	if !open {
		return reconcile.Result{RequeueAfter: kruise.StandBy}, nil
	}
	defer leave()
	crr := &appsv1alpha1.ContainerRecreateRequest{}
	if err := r.Client.Get(ctx, req.NamespacedName, crr); err != nil {
		if apierrors.IsNotFound(err) {
			r.forget(req.NamespacedName)
			return reconcile.Result{}, nil
		}
		return reconcile.Result{}, err
	}
	p := &pass{
		r: r, crr: crr, memory: r.remember(crr),
		log: r.Log.WithFields(logrus.Fields{"request": req.String(), "pod": req.Namespace + "/" + crr.Spec.PodName}),
	}
	var wait time.Duration
	var err error
	switch {
	case crr.DeletionTimestamp != nil:
		wait, err = p.finalize(ctx)
	case crr.Status.CompletionTime != nil:
		wait, err = p.retire(ctx)
	default:
		wait, err = p.advance(ctx)
	}
	switch {
	case apierrors.IsConflict(err):
		return reconcile.Result{RequeueAfter: conflictPause}, nil
	case apierrors.IsNotFound(err):
		return reconcile.Result{}, nil // deleted meanwhile
	}
	return reconcile.Result{RequeueAfter: wait}, err
}

// pass is one reconcile of one request.
type pass struct {
	r      *ContainerRecreateReconciler
	crr    *appsv1alpha1.ContainerRecreateRequest
	memory *memory
	log    logrus.FieldLogger

	accepted   *accepted
	pod        *corev1.Pod // nil when gone
	containers []*container
	// trouble is the first temporary error of the node in this pass.
	trouble error
}

// advance takes a request that has not completed a step further.
func (p *pass) advance(ctx context.Context) (time.Duration, error) {
	now := p.r.now()
	late := p.deadline() != nil && !now.Before(*p.deadline())
	if p.accepted = acceptedOf(p.crr); p.accepted == nil {
		if late {
			return p.complete(ctx, messageDeadline, func(c *container) {
				c.fail("%s: nothing had been done yet", messageDeadline)
			})
		}
		if err := p.accept(ctx); err != nil {
			if why := refused(err); why != nil {
				return p.refuse(ctx, why)
			}
			return 0, err
		}
	} else if err := p.hold(ctx); err != nil {
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
	p.lookUp(ctx)
	for {
		now = p.r.now()
		p.noteRunning(now)
		wait = 0
		for _, c := range p.containers {
			wait = sooner(wait, c.observe(p.pod, now))
			if c.state.Phase == failed && endedBefore(c.op.GetReason()) {
				p.noteEnded(c)
			}
		}
		if late && !p.done() {
			return p.giveUp(ctx, messageDeadline)
		}
		next := decide(p.containers, hasReadyGate(p.pod), unreadySince(p.crr), now)
		wait = sooner(wait, next.wait)
		p.tellUngated()
		if next.drain {
			if err := p.drain(ctx); err != nil {
				if words, ok := Denied(err); ok {
					return p.giveUp(ctx, "the pod cannot be taken out of service: "+words)
				}
				return 0, err
			}
			continue
		}
		acted := p.cancelLeftOver(ctx, next.cancel)
		for _, c := range next.command {
			if p.trouble != nil {
				break
			}
			p.command(ctx, c)
			acted = true
		}
		if !acted || p.trouble != nil {
			break
		}
	}
	return p.conclude(ctx, sooner(wait, p.nudge(ctx)))
}

func (p *pass) done() bool {
	return !slices.ContainsFunc(p.containers, func(c *container) bool { return !c.done() })
}

// deadline is when the request completes whatever its state, or nil.
func (p *pass) deadline() *time.Time {
	if p.crr.Spec.ActiveDeadlineSeconds == nil {
		return nil
	}
	t := p.crr.CreationTimestamp.Add(time.Duration(*p.crr.Spec.ActiveDeadlineSeconds) * time.Second)
	return &t
}

// accept checks and pins the request, with one patch. A refusal by what the cache
// shows is checked against the API server.
func (p *pass) accept(ctx context.Context) error {
	a, pod, err := readAndAccept(ctx, p.r.Client, p.r.APIReader, p.crr)
	if refused(err) != nil {
		a, pod, err = readAndAccept(ctx, p.r.APIReader, p.r.APIReader, p.crr)
	}
	if err != nil {
		p.pod = pod
		return err
	}
	drains := hasReadyGate(pod) && slices.ContainsFunc(p.crr.Spec.Containers, func(c appsv1alpha1.ContainerRecreateRequestContainer) bool {
		return strategyOf(p.crr.Spec.Strategy, c.Strategy).unready != nil
	})
	before := p.crr.DeepCopy()
	if err := pin(p.crr, a, drains); err != nil {
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

// hold puts the finalizers back on an accepted request that OpenKruise had meanwhile, or that a manifest without them was put in
// the place of.
func (p *pass) hold(ctx context.Context) error {
	before := p.crr.DeepCopy()
	if !slices.Contains(p.crr.Finalizers, OperationFinalizer) {
		p.crr.Finalizers = append(p.crr.Finalizers, OperationFinalizer)
	}
	if !unreadySince(p.crr).IsZero() && !slices.Contains(p.crr.Finalizers, appsv1alpha1.UnreadyAcquiredFinalizer) {
		p.crr.Finalizers = append(p.crr.Finalizers, appsv1alpha1.UnreadyAcquiredFinalizer)
	}
	return p.patch(ctx, before)
}

// refuse completes a request that cannot be carried out.
func (p *pass) refuse(ctx context.Context, why *refusal) (time.Duration, error) {
	p.gather()
	return p.complete(ctx, why.Error(), func(c *container) { c.state = why.state(c.name) })
}

// findPod sets p.pod to the pod the request was accepted for, or to nil if that
// has gone.
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

// gather collects what spec, status, pod and the annotation say of each container.
func (p *pass) gather() {
	p.containers = nil
	for _, want := range p.crr.Spec.Containers {
		c := &container{name: want.Name, strategy: strategyOf(p.crr.Spec.Strategy, want.Strategy)}
		c.state.Name = want.Name
		for _, s := range p.crr.Status.ContainerRecreateStates {
			if s.Name == want.Name {
				c.state = s
			}
		}
		if p.accepted != nil {
			c.pinned, c.strategy.startFirst, c.strategy.parallel = p.accepted.Containers[want.Name], p.accepted.StartFirst, p.accepted.Parallel
		}
		if p.pod != nil {
			c.spec, _ = containerSpec(p.pod, want.Name)
			c.status = containerStatus(p.pod, want.Name)
		}
		p.containers = append(p.containers, c)
	}
}

// nudge makes kubelet look at the pod again for a new container that is not ready, and returns how
// long until that may be necessary.
func (p *pass) nudge(ctx context.Context) time.Duration {
	now := p.r.now()
	var names []string
	for _, c := range p.containers {
		if c.done() || c.op.GetPhase() != opsv1.Phase_PHASE_SUCCEEDED || !c.isNew() {
			continue
		}
		if passed, _ := StartupPassed(c.spec, c.status, c.firstSeen, c.carried, now); passed {
			names = append(names, c.name)
		}
	}
	container, wait := p.memory.nudges.Due(p.pod, names, now)
	if container == "" {
		return wait
	}
	log := p.log.WithField("container", container)
	if _, err := p.memory.nudges.Nudge(ctx, p.r.Client, p.pod, container); err != nil {
		log.WithError(err).Info("kubelet could not be made to probe the new container at once") // it will in its time
		return wait
	}
	p.r.Metrics.wrote("pod")
	log.Debug("kubelet made to probe the new container at once")
	return wait
}

// learnKubelet finds out whether kubelet takes new containers for started, where that matters.
func (p *pass) learnKubelet(ctx context.Context) {
	probed := func(c *container) bool { return c.spec != nil && c.spec.StartupProbe != nil }
	if !slices.ContainsFunc(p.containers, probed) {
		return
	}
	carried := true
	var node corev1.Node
	if p.r.Client.Get(ctx, client.ObjectKey{Name: p.accepted.NodeName}, &node) == nil {
		carried = CarriesStarted(&node)
	}
	for _, c := range p.containers {
		c.carried = carried
	}
}

// noteRunning keeps when new containers were first seen running.
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

// noteEnded keeps that the container had ended by itself: the status says only that it has failed.
func (p *pass) noteEnded(c *container) { c.ended, p.memory.ended[c.name] = true, true }

// recallEnded finds out again, after another controller has been at work, which of the containers that have failed had ended by themselves.
// The node knows of those whose operation it had begun. If it knows nothing it had refused the command, and then the pod tells: a container
// that it refused for another reason still runs.
func (p *pass) recallEnded(ctx context.Context) {
	if p.memory.recalled {
		return
	}
	p.memory.recalled = true
	if p.done() {
		return // nothing depends on it any more
	}
	for _, c := range p.containers {
		if c.state.Phase != failed || c.state.IsKilled {
			continue
		}
		var op *opsv1.Operation
		if p.trouble == nil {
			var err error
			if _, op, err = p.operation(ctx, c); err != nil {
				p.temporary(err)
			}
		}
		switch s := c.status; {
		case p.trouble != nil:
			// Nothing is commanded now, and nobody is left alone before the node has been asked.
			c.ended, p.memory.recalled = true, false
		case op != nil && endedBefore(accountOf(op, c.name).GetReason()),
			op == nil && s != nil && (s.ContainerID != c.pinned.ContainerID || s.State.Running == nil):
			p.noteEnded(c)
		}
	}
}

// conclude writes what the pass has found out and says when to look again.
func (p *pass) conclude(ctx context.Context, wait time.Duration) (time.Duration, error) {
	now := p.r.now()
	if p.done() {
		return p.complete(ctx, "", nil)
	}
	message := ""
	if p.trouble == nil {
		p.memory.silentSince, p.memory.attempts = time.Time{}, 0
	} else {
		if p.memory.silentSince.IsZero() {
			p.memory.silentSince = now
			p.log.WithError(p.trouble).Warn("node cannot be commanded")
		}
		p.memory.attempts++
		if p.deadline() == nil && p.untouched() && code(p.trouble) != codes.ResourceExhausted && now.Sub(p.memory.silentSince) >= silentMax {
			return p.complete(ctx, messageSilent+": "+p.trouble.Error(), func(c *container) {
				c.fail("not recreated: %s", p.trouble)
			})
		}
		wait = sooner(wait, backOff(p.memory.attempts))
		reason := troubleReason(p.trouble)
		message = reason + ": " + p.trouble.Error()
		if strings.HasPrefix(p.crr.Status.Message, reason+": ") {
			message = p.crr.Status.Message // the wording changes from try to try
		}
	}
	for _, c := range p.containers {
		if c.done() || c.op == nil {
			continue
		}
		if _, _, watched := p.r.watches.get(p.operationUID(c)); watched {
			wait = sooner(wait, pollWatched)
		} else if c.op.GetPhase() < opsv1.Phase_PHASE_SUCCEEDED {
			wait = sooner(wait, pollUnwatched)
		} else {
			wait = sooner(wait, podPatience)
		}
	}
	if d := p.deadline(); d != nil {
		wait = sooner(wait, max(d.Sub(now), time.Millisecond))
	}

	next := p.crr.Status.DeepCopy()
	next.Phase, next.Message = p.phase(), message
	next.ContainerRecreateStates = p.states()
	if left := p.memory.lastWrite.Add(writePause).Sub(now); left > 0 && minor(&p.crr.Status, next) {
		if !apiequality.Semantic.DeepEqual(&p.crr.Status, next) {
			wait = sooner(wait, left)
		}
		return wait, nil
	}
	return wait, p.writeStatus(ctx, next)
}

func troubleReason(err error) string {
	var nodeError *NodeError
	if errors.As(err, &nodeError) && !nodeError.Silent {
		return reasonUnwilling
	}
	return reasonSilent
}

// backOff is the pause after a number of failed tries.
func backOff(attempts int) time.Duration {
	return min(500*time.Millisecond<<min(attempts, 5), 5*time.Second)
}

// untouched says that no node has ever taken an operation of the request.
func (p *pass) untouched() bool {
	return !slices.ContainsFunc(p.containers, func(c *container) bool { return c.op != nil || c.state.Phase != pending })
}

func (p *pass) phase() appsv1alpha1.ContainerRecreateRequestPhase {
	if !unreadySince(p.crr).IsZero() || !p.allPending() || p.crr.Status.Phase == recreating {
		return recreating
	}
	return pending
}

func (p *pass) allPending() bool {
	return !slices.ContainsFunc(p.containers, func(c *container) bool { return c.state.Phase != pending })
}

func (p *pass) states() []appsv1alpha1.ContainerRecreateRequestContainerRecreateState {
	var states []appsv1alpha1.ContainerRecreateRequestContainerRecreateState
	for _, c := range p.containers {
		states = append(states, c.state)
	}
	return states
}

// minor says that a status differs from the one before in nothing a client waits for.
func minor(before, after *appsv1alpha1.ContainerRecreateRequestStatus) bool {
	if after.Phase != before.Phase && after.Phase != pending {
		return false
	}
	for i, s := range after.ContainerRecreateStates {
		if i >= len(before.ContainerRecreateStates) {
			if s.Phase != pending {
				return false
			}
		} else if s.Phase != before.ContainerRecreateStates[i].Phase {
			return false
		}
	}
	return true
}

// complete ends the request. end, if not nil, says how each container ends that
// has not yet.
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
		message = fmt.Sprintf("%d of %d containers failed: %s", len(wrong), len(p.containers), strings.Join(wrong, "; "))
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
	p.r.Metrics.requestCompleted(now.Sub(p.crr.CreationTimestamp.Time), phases, len(wrong) == 0)
	p.log.WithFields(logrus.Fields{"failed": len(wrong), "message": message}).Info("request completed")
	return p.retire(ctx)
}

// giveUp completes a request in the middle: what the node has not begun is
// cancelled, and what is unfinished fails.
func (p *pass) giveUp(ctx context.Context, message string) (time.Duration, error) {
	return p.complete(ctx, message, func(c *container) {
		c.fail("%s: %s", message, p.cancel(ctx, c, message))
	})
}

// retire takes the marks of an active request off a completed one, in one patch,
// and deletes it when its time has come.
func (p *pass) retire(ctx context.Context) (time.Duration, error) {
	if err := p.r.release(ctx, p.crr); err != nil {
		return 0, err
	}
	before := p.crr.DeepCopy()
	p.crr.Finalizers = without(p.crr.Finalizers, OperationFinalizer, appsv1alpha1.UnreadyAcquiredFinalizer)
	if _, active := p.crr.Labels[appsv1alpha1.ActiveLabel]; active {
		delete(p.crr.Labels, appsv1alpha1.ActiveLabel)
		if err := p.snapshot(); err != nil {
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
		p.r.Metrics.wrote("request")
	}
	return 0, client.IgnoreNotFound(err)
}

// finalize lets a deleted request go: its operations are cancelled as far as they
// can be and the pod goes back into service. An unreachable node is waited for no
// longer than cancelPatience.
func (p *pass) finalize(ctx context.Context) (time.Duration, error) {
	if !slices.Contains(p.crr.Finalizers, OperationFinalizer) && !slices.Contains(p.crr.Finalizers, appsv1alpha1.UnreadyAcquiredFinalizer) {
		p.r.forget(client.ObjectKeyFromObject(p.crr))
		return 0, nil
	}
	if p.accepted = acceptedOf(p.crr); p.accepted != nil && p.crr.Status.CompletionTime == nil {
		p.gather()
		for _, c := range p.containers {
			if !c.done() {
				p.log.WithField("container", c.name).Info("request deleted: " + p.cancel(ctx, c, "the ContainerRecreateRequest was deleted"))
			}
		}
		if p.trouble != nil && p.r.now().Sub(p.crr.DeletionTimestamp.Time) < cancelPatience {
			p.memory.attempts++
			return backOff(p.memory.attempts), nil
		}
	}
	if err := p.r.release(ctx, p.crr); err != nil {
		return 0, err
	}
	before := p.crr.DeepCopy()
	p.crr.Finalizers = without(p.crr.Finalizers, OperationFinalizer, appsv1alpha1.UnreadyAcquiredFinalizer)
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

// patch writes the change of metadata and spec since before, if there is one,
// unless someone else wrote in between.
func (p *pass) patch(ctx context.Context, before *appsv1alpha1.ContainerRecreateRequest) error {
	if apiequality.Semantic.DeepEqual(before, p.crr) {
		return nil
	}
	err := p.r.Client.Patch(ctx, p.crr, client.MergeFromWithOptions(before, client.MergeFromWithOptimisticLock{}))
	if err == nil {
		p.r.Metrics.wrote("request")
	}
	return err
}

// writeStatus writes next if it differs, and then the Events that go with it.
func (p *pass) writeStatus(ctx context.Context, next *appsv1alpha1.ContainerRecreateRequestStatus) error {
	next.ObservedGeneration = p.crr.Generation
	tellReady(next)
	p.tellInFields(next)
	if apiequality.Semantic.DeepEqual(&p.crr.Status, next) {
		return nil
	}
	before := p.crr.DeepCopy()
	p.crr.Status = *next
	if err := p.r.Client.Status().Patch(ctx, p.crr, client.MergeFromWithOptions(before, client.MergeFromWithOptimisticLock{})); err != nil {
		return err
	}
	p.r.Metrics.wrote("request status")
	p.memory.lastWrite = p.r.now()
	p.tell(&before.Status)
	return nil
}

// tellReady says for kstatus how the request stands.
func tellReady(s *appsv1alpha1.ContainerRecreateRequestStatus) {
	standing, reason := kstatus.AtWork, string(cmp.Or(s.Phase, pending))
	if s.CompletionTime != nil {
		standing, reason = kstatus.Current, reasonRecreated
		if slices.ContainsFunc(s.ContainerRecreateStates, func(c appsv1alpha1.ContainerRecreateRequestContainerRecreateState) bool { return c.Phase == failed }) {
			standing, reason = kstatus.Failed, reasonContainersFailed
		}
	}
	kstatus.Set(&s.Conditions, s.ObservedGeneration, standing, reason, s.Message)
}

// temporary notes an error of the node that may pass and says whether it is one.
func (p *pass) temporary(err error) bool {
	var nodeError *NodeError
	if errors.As(err, &nodeError) && !nodeError.Temporary() {
		return false
	}
	if p.trouble == nil {
		p.trouble = err
	}
	return true
}

func code(err error) codes.Code {
	var nodeError *NodeError
	if errors.As(err, &nodeError) {
		return nodeError.Code()
	}
	return codes.Unknown
}
