// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package rollout

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"slices"
	"sync"
	"time"

	"github.com/sirupsen/logrus"
	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/client-go/tools/events"
	"sigs.k8s.io/controller-runtime/pkg/client"
	"sigs.k8s.io/controller-runtime/pkg/event"
	"sigs.k8s.io/controller-runtime/pkg/reconcile"

	inplace "github.com/cri-proxy/cri-proxy/api/inplace/v1alpha1"
	"github.com/cri-proxy/cri-proxy/controller"
	"github.com/cri-proxy/cri-proxy/controller/crew"
)

// +kubebuilder:rbac:groups=cri-proxy.io,resources=inplacerollouts,verbs=get;list;watch;create;patch;delete
// +kubebuilder:rbac:groups=cri-proxy.io,resources=inplacerollouts/status,verbs=patch
// +kubebuilder:rbac:groups="",resources=pods,verbs=get;list;watch;patch
// +kubebuilder:rbac:groups="",resources=pods/status,verbs=patch
// +kubebuilder:rbac:groups="",resources=nodes,verbs=get;list;watch
// +kubebuilder:rbac:groups="",resources=configmaps;secrets;serviceaccounts,verbs=get
// +kubebuilder:rbac:groups="",resources=services,verbs=get;list
// +kubebuilder:rbac:groups="",resources=persistentvolumeclaims;persistentvolumes,verbs=get
// +kubebuilder:rbac:groups=apps,resources=deployments;replicasets;statefulsets;daemonsets,verbs=get;list;watch;patch
// +kubebuilder:rbac:groups=apps,resources=replicasets,verbs=create
// +kubebuilder:rbac:groups=apps,resources=controllerrevisions,verbs=list
// +kubebuilder:rbac:groups=policy,resources=poddisruptionbudgets,verbs=get;list;watch
// +kubebuilder:rbac:groups=events.k8s.io,resources=events,verbs=create;patch

// Reconciler carries out InPlaceRollouts.
type Reconciler struct {
	// Client reads from the cache and writes.
	Client client.Client
	// APIReader reads past the cache: secrets and revisions are not kept.
	APIReader client.Reader
	// Nodes are the nodes of the cluster, which get commands.
	Nodes Nodes
	// Jobs counts restarts in the pods of Jobs. All who restart containers share it. It may be nil.
	Jobs *controller.JobBudgets
	// NodePort is the port for nodes without an address of their own in an annotation.
	NodePort int
	// Recorder writes Events; nil writes none.
	Recorder events.EventRecorder
	// Metrics may be nil.
	Metrics *Metrics
	// Log must be set.
	Log logrus.FieldLogger

	crew   *crew.Crew
	driver *driver
	wakes  chan wakeUp

	admissions admissions

	mu    sync.Mutex
	works map[types.NamespacedName]*work
}

// wakeUp makes the reconciler look at a rollout.
type wakeUp = event.TypedGenericEvent[*inplace.InPlaceRollout]

func (r *Reconciler) prepare() {
	r.crew, r.wakes, r.works = crew.New(r.Metrics.crew()), make(chan wakeUp), map[types.NamespacedName]*work{}
	port := r.NodePort
	if port == 0 {
		port = controller.DefaultNodePort
	}
	r.driver = &driver{nodes: r.Nodes, client: r.Client, live: r.APIReader, crew: r.crew, port: port}
}

func (r *Reconciler) workOf(rollout *inplace.InPlaceRollout) *work {
	key := client.ObjectKeyFromObject(rollout)
	r.mu.Lock()
	defer r.mu.Unlock()
	w := r.works[key]
	if w == nil || w.uid != rollout.UID {
		if w != nil {
			w.ops.close()
			r.admissions.end(w.uid)
		}
		w = &work{
			uid: rollout.UID, ops: newState(rollout.UID, r.waker(key)), told: map[string]bool{}, failures: map[types.UID]inplace.PodFailure{},
		}
		r.works[key] = w
	}
	return w
}

// knownWork returns what is known of a rollout; nil if there is nothing.
func (r *Reconciler) knownWork(key types.NamespacedName) *work {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.works[key]
}

func (r *Reconciler) forget(key types.NamespacedName) {
	r.mu.Lock()
	w := r.works[key]
	delete(r.works, key)
	r.mu.Unlock()
	if w != nil {
		w.ops.close()
		r.admissions.end(w.uid)
	}
}

// waker returns a function that wakes the reconciler for a rollout.
func (r *Reconciler) waker(key types.NamespacedName) func() {
	return func() {
		r.crew.Do(func(ctx context.Context) {
			rollout := &inplace.InPlaceRollout{}
			rollout.Namespace, rollout.Name = key.Namespace, key.Name
			select {
			case r.wakes <- wakeUp{Object: rollout}:
			case <-ctx.Done():
			}
		})
	}
}

// Reconcile takes one rollout as far as it goes, and says when to look at it again.
func (r *Reconciler) Reconcile(ctx context.Context, req reconcile.Request) (reconcile.Result, error) {
	rollout := &inplace.InPlaceRollout{}
	if err := r.Client.Get(ctx, req.NamespacedName, rollout); err != nil {
		if apierrors.IsNotFound(err) {
			r.forget(req.NamespacedName)
			return reconcile.Result{}, nil
		}
		return reconcile.Result{}, err
	}
	p := r.newPass(rollout)
	if versionOf(rollout.ResourceVersion) < p.work.written {
		return reconcile.Result{RequeueAfter: stalePause}, nil // the cache has not caught up with the last write
	}
	var err error
	switch {
	case rollout.DeletionTimestamp != nil:
		err = p.finalize(ctx)
	case over(rollout):
		r.admissions.end(rollout.UID)
		err = p.retire(ctx)
	default:
		err = p.advance(ctx)
	}
	switch {
	case apierrors.IsConflict(err):
		return reconcile.Result{RequeueAfter: stalePause}, nil
	case apierrors.IsNotFound(err):
		return reconcile.Result{RequeueAfter: stalePause}, nil // something was deleted meanwhile
	}
	return reconcile.Result{RequeueAfter: p.wait}, err
}

// pass is one look at one rollout.
type pass struct {
	r        *Reconciler
	rollout  *inplace.InPlaceRollout
	work     *work
	strategy strategy
	now      time.Time
	log      logrus.FieldLogger
	// wait is when to look again; 0 means when something happens.
	wait time.Duration

	// env is what the target's workload needs from this pass.
	env *env
	// ops has nodes do what the pods need.
	ops    *session
	teller *teller
	writer *writer
	target *target
	goal   goal
	items  []*item
	ended  []*corev1.Pod // pods that broke so that they ended
	plan   plan
	// notInPlaceReason is why a pod is left to its workload.
	obstacle string
	// blocked says what holds back the rollout as a whole, blockedReason is the reason of its condition.
	blockedReason, blocked string
}

func (r *Reconciler) newPass(rollout *inplace.InPlaceRollout) *pass {
	p := &pass{
		r: r, rollout: rollout, work: r.workOf(rollout), now: time.Now(), strategy: strategyOf(&rollout.Spec.Strategy),
		log: r.Log.WithField("rollout", client.ObjectKeyFromObject(rollout).String()),
	}
	p.teller = &teller{recorder: r.Recorder, rollout: rollout, told: p.work.told}
	p.writer = &writer{client: r.Client, metrics: r.Metrics, rollout: rollout, work: p.work, now: p.now}
	p.env = &env{
		client: r.Client, live: r.APIReader, rollout: rollout, goal: &p.goal, now: p.now, log: p.log, wrote: r.Metrics.wrote,
		event: p.teller.event, tell: p.teller.tell, patchRollout: p.writer.patch, choose: p.work.choose, memory: &p.work.memory,
	}
	p.ops = &session{
		driver: r.driver, state: p.work.ops, rollout: rollout, strategy: &p.strategy, now: p.now, log: p.log, wait: &p.wait,
		newLabel: func(i *item) string {
			if p.target.workload == nil {
				return ""
			}
			return p.target.workload.revisionLabel(&i.podRef, i.verdict.images)
		},
	}
	return p
}

// advance takes a rollout that has not ended one step further.
func (p *pass) advance(ctx context.Context) error {
	var why *specError
	var err error
	if p.target, err = p.env.find(ctx); errors.As(err, &why) {
		return p.refuse(ctx, why)
	} else if err != nil {
		return err
	}
	p.strategy.honour(p.target.minReady)
	if !slices.Contains(p.rollout.Finalizers, inplace.RolloutFinalizer) {
		before := p.rollout.DeepCopy()
		p.rollout.Finalizers = append(p.rollout.Finalizers, inplace.RolloutFinalizer)
		if err := p.writer.patch(ctx, before); err != nil {
			return err
		}
	}
	p.goal = goalOf(p.rollout)
	if first, shared, err := p.r.admissions.admit(ctx, p.r.Client, p.rollout, p.target.pods); err != nil {
		return err
	} else if first != nil {
		return p.queue(ctx, first, shared)
	}
	if p.rollout.Status.ObservedRevision != p.goal.revision {
		if err := p.begin(ctx); err != nil {
			return err
		}
	}
	if next := p.rollout.Status.DeepCopy(); !undoing(p.rollout, &p.strategy) && len(next.PreviousImages) < len(p.goal.images) {
		// Pods have come since the rollout began.
		if next.PreviousImages == nil {
			next.PreviousImages = map[string]string{}
		}
		if p.target.findPrevious(p.goal.images, next.PreviousImages) {
			if err := p.writer.status(ctx, next); err != nil {
				return err
			}
		}
	}
	if p.work.revision != p.goal.revision {
		p.work.revision, p.work.failures = p.goal.revision, map[types.UID]inplace.PodFailure{}
		clear(p.work.told)
		p.work.progressed, p.work.released = p.now, nil
		p.work.refused, p.work.api = nil, apiTrouble{}
		p.work.memory.forget()
	}
	if undoing(p.rollout, &p.strategy) {
		p.goal = p.goal.undoing(&p.rollout.Status, p.target.workload != nil)
	}
	if text := newer(p.rollout); text != "" {
		return p.supersede(ctx, text)
	}
	ready := true
	var over *supersededError
	if w := p.target.workload; w != nil {
		if ready, err = p.align(ctx, w); errors.As(err, &why) {
			return p.refuse(ctx, why)
		} else if errors.As(err, &over) {
			return p.supersede(ctx, over.text)
		} else if err != nil {
			return err
		}
		p.goal.images = p.work.memory.template.all(p.goal.images) // as the workload's controller would make pods
	}
	p.gather(ctx)
	if err := p.decide(ctx, !ready); err != nil {
		return err
	}
	if fails := p.noteFailures(); fails > 0 && p.strategy.onFailure == inplace.Rollback && !p.goal.undo && len(p.rollout.Status.PreviousImages) > 0 {
		return p.turnBack(ctx)
	}
	if err := p.act(ctx); err != nil {
		return err
	}
	return p.conclude(ctx)
}

// align writes the images into the template of the workload, unless the API server refuses that for good.
func (p *pass) align(ctx context.Context, w workload) (ready bool, err error) {
	api := &p.work.api
	p.blockedReason = inplace.ReasonWaiting
	switch {
	case p.work.refused[p.goal.revision] != nil:
	case p.waits(api):
		p.blocked = api.text
	default:
		ready, p.blocked, err = w.align(ctx, p.goal.images)
		why := refusal(err)
		switch {
		case err == nil:
			*api = apiTrouble{}
		case why != nil:
			p.work.refuse(p.goal.revision, why)
		case apiStatus(err) && !apierrors.IsConflict(err) && !apierrors.IsNotFound(err):
			api.note(err, p.now)
			p.waits(api)
			p.blocked = api.text
			if p.now.Sub(api.since) >= p.strategy.deadline {
				p.work.refuse(p.goal.revision, &failure{failDeadline, fmt.Sprintf("the template could not be changed for %s: %s", p.strategy.deadline, err)})
			}
		default:
			return false, err
		}
	}
	switch why := p.work.refused[p.goal.revision]; {
	case why != nil && !p.goal.undo:
		p.blocked = why.message
	case why != nil:
		p.blocked = "" // what cannot be put back stays
	case !ready && api.count >= controller.APITries:
		p.blockedReason = inplace.ReasonAPIError
		p.blocked = fmt.Sprintf("%s cannot be changed, %d tries have failed since %s: %s", p.target.what, api.count, api.since.UTC().Format(time.RFC3339), api.text)
		p.teller.tell(corev1.EventTypeWarning, inplace.ReasonAPIError, p.blocked, "template")
	}
	if !ready {
		p.wait = sooner(p.wait, blockedPause)
	}
	return ready || p.work.refused[p.goal.revision] != nil && p.goal.undo, nil
}

// undoing returns true if the present revision has failed and is rolled back.
func undoing(r *inplace.InPlaceRollout, s *strategy) bool {
	return r.Status.FailedRevision == revisionOf(r) && s.onFailure == inplace.Rollback
}

// gather finds out how far each pod is.
func (p *pass) gather(ctx context.Context) {
	there := map[types.UID]bool{}
	begun := p.now
	if t := p.rollout.Status.StartTime; t != nil {
		begun = t.Time
	}
	for _, pod := range p.target.pods {
		m := p.ops.memberOf(pod, p.goal.revision)
		there[pod.UID] = true
		if !active(pod) {
			if pod.DeletionTimestamp == nil && m.mark.by(p.goal) {
				p.ended = append(p.ended, pod)
			}
			continue
		}
		i := &item{podRef: podRef{pod: pod, mark: m.mark, goal: p.goal.of(m.mark)}, m: m, ordinal: -1, stale: m.stale(pod)}
		if w := p.target.workload; w != nil && !p.goal.undo && w.restart(pod) {
			i.goal.restarts = containersOf(pod)
		}
		if p.target.ordered {
			i.ordinal = ordinalOf(pod.Name)
		}
		if !i.stale {
			m.noteReady(pod, p.now)
			m.noteStarted(pod, p.now)
		}
		p.ops.settlePreparation(i)
		p.ops.settleLooks(i)
		k := p.work.ops.knowledge(m, pod, begun)
		k.carried = len(m.started) > 0 && p.r.driver.carries(ctx, pod)
		i.known, i.verdict = k, judge(pod, m.mark, i.goal, k, &p.strategy, p.now)
		p.wait = sooner(p.wait, i.verdict.wait)
		if s := i.verdict.stage; p.target.workload != nil && (s == outdated && !m.turn || s == updated && !p.goal.undo || s == broken && i.verdict.failure.reason == failNoContainer) {
			if why := p.target.workload.obstacle(pod); why != "" {
				i.verdict.stage, p.obstacle = left, why
			} else if p.blocked != "" && s == broken {
				i.verdict.stage = left // that is not known yet
			}
		}
		if p.target.workload != nil && i.verdict.stage == updated {
			label := p.target.workload.revisionLabel(&i.podRef, nil)
			i.unlabelled = label != "" && label != pod.Labels[revisionLabel]
		}
		if v := &i.verdict; !i.stale && (v.recovered || v.stage == broken && !v.disrupted || v.stage == updated && v.available) {
			if m.turn {
				p.r.Jobs.Return(takenAs(p.rollout, pod))
			}
			m.turn, m.settled = false, v.recovered || m.settled
			v.disrupted = v.open
		}
		p.items = append(p.items, i)
	}
	p.ops.keep(there)
}

// decide plans which pods are next.
func (p *pass) decide(ctx context.Context, halted bool) error {
	s := &p.strategy
	candidates := make([]candidate, len(p.items))
	failed := false
	for n, i := range p.items {
		shut, _ := shutBy(i.pod)
		turn := i.m.turn || shut == p.rollout.UID && i.verdict.stage == outdated
		candidates[n] = candidate{i.pod, i.ordinal, i.verdict, turn, p.ops.preparation(i)}
		failed = failed || i.verdict.stage == broken
	}
	l := limits{
		desired: p.target.desired, maxUnavailable: s.unavailableLimit(p.target.desired),
		keep: resolve(s.partition, p.target.desired, true), firstOrdinal: p.target.firstOrdinal, ordered: p.target.ordered,
		halted: halted || p.rollout.Spec.Paused,
	}
	if p.goal.undo {
		l.keep = 0
	} else if (failed || len(p.ended) > 0) && s.onFailure != inplace.Continue {
		l.halted = true
	}
	var budgets []*disruptions
	read := false
	var err error
	l.allowed = func(pod *corev1.Pod) (bool, string) {
		if !read {
			read = true
			budgets, err = budgetsOf(ctx, p.r.Client, p.rollout.Namespace, candidates, doomed(p.items))
		}
		if err != nil {
			return false, err.Error()
		}
		return take(budgets, pod)
	}
	p.plan = decide(candidates, l)
	if err != nil {
		return err
	}
	if p.plan.blocked != "" {
		p.wait = sooner(p.wait, blockedPause)
	}
	return nil
}

// doomed returns a function that says whether this rollout is about to disrupt a pod.
func doomed(items []*item) func(*corev1.Pod) bool {
	pods := map[types.UID]bool{}
	for _, i := range items {
		pods[i.pod.UID] = i.verdict.disrupted
	}
	return func(pod *corev1.Pod) bool { return pods[pod.UID] }
}

// act takes the pods further. An error with one pod does not hold up the others.
func (p *pass) act(ctx context.Context) error {
	for _, n := range p.plan.prepare {
		p.ops.prepare(ctx, p.items[n])
	}
	for _, n := range p.plan.begin {
		p.settleError(p.items[n], p.step(ctx, p.items[n]))
	}
	for _, i := range p.items {
		if i.stale {
			continue
		}
		p.teller.warnings(i.pod, p.ops.finished(i.m))
		if relabels := i.verdict.stage == updated && p.target.workload != nil; (relabels || i.verdict.open) && !p.waits(&i.m.api) {
			var err error
			if relabels {
				err = p.relabel(ctx, i)
			}
			if i.verdict.open {
				err = errors.Join(p.setGates(ctx, i, ""), err)
			}
			p.settleError(i, err)
		}
		if i.verdict.ask {
			p.ops.follow(ctx, i)
		}
		if i.verdict.restart {
			p.ops.restart(ctx, i)
		}
		if i.verdict.inquire {
			p.ops.inquire(ctx, i)
		}
		if i.verdict.stage == changing {
			p.nudge(ctx, i)
		}
	}
	return nil
}

// settleError decides what to do about a pod whose change the API server has answered with an error.
func (p *pass) settleError(i *item, err error) {
	why := refusal(err)
	switch {
	case err == nil:
		if !i.stale && !p.now.Before(i.m.api.until) {
			i.m.api = apiTrouble{}
		}
	case apierrors.IsConflict(err), apierrors.IsNotFound(err):
		p.wait = sooner(p.wait, max(stalePause, p.r.gather(client.ObjectKeyFromObject(p.rollout))))
	case why == nil:
		i.m.api.note(err, p.now)
		p.waits(&i.m.api)
		if p.now.Sub(i.m.api.since) < p.strategy.deadline {
			return
		}
		late := tooLong(i.pod.Name, p.strategy.deadline, err)
		why = &late
		fallthrough
	default:
		i.m.api.note(err, p.now) // a gate that cannot be opened is tried again
		p.ops.abortVisit(i.m, why.message)
		i.m.refused = why
		p.wait = sooner(p.wait, stalePause)
	}
}

// nudge makes kubelet probe a new container that is not ready at once, if that is due.
func (p *pass) nudge(ctx context.Context, i *item) {
	var names []string
	carried := len(i.m.started) > 0 && p.r.driver.carries(ctx, i.pod)
	for _, name := range slices.Sorted(maps.Keys(i.m.mark.Containers)) {
		c, _ := containerOf(i.pod, name)
		cs := statusOf(i.pod, name)
		if c == nil || cs == nil || cs.ContainerID == i.m.mark.Containers[name].ID {
			continue
		}
		if passed, _ := controller.StartupPassed(c, cs, i.m.started[cs.ContainerID], carried, p.now); passed {
			names = append(names, name)
		}
	}
	container, wait := i.m.nudges.Due(i.pod, names, p.now)
	p.wait = sooner(p.wait, wait)
	if container == "" {
		return
	}
	log := p.log.WithField("pod", i.pod.Name).WithField("container", container)
	pod, err := i.m.nudges.Nudge(ctx, p.r.Client, i.pod, container)
	if err != nil {
		log.WithError(err).Info("kubelet could not be made to probe the new container at once") // it will in its time
		return
	}
	i.m.written = versionOf(pod.ResourceVersion)
	p.r.Metrics.wrote("pod")
	log.Debug("kubelet made to probe the new container at once")
}

// begin takes up the containers of the spec. First of all it writes into the status which images they replace.
func (p *pass) begin(ctx context.Context) error {
	old := &p.rollout.Status
	now := metav1.NewTime(p.now)
	next := inplace.InPlaceRolloutStatus{
		ObservedGeneration: p.rollout.Generation, ObservedRevision: p.goal.revision, StartTime: &now, LastSuccessTime: old.LastSuccessTime,
		TargetImages: p.goal.images, PreviousImages: map[string]string{}, Conditions: slices.Clone(old.Conditions), Desired: int32(p.target.desired),
	}
	if old.CompletionTime == nil {
		for name := range p.goal.images {
			if kept := old.PreviousImages[name]; kept != "" {
				next.PreviousImages[name] = kept // the last that was good
			}
		}
	}
	p.target.findPrevious(p.goal.images, next.PreviousImages)
	setCondition(&next, inplace.ConditionComplete, false, inplace.ReasonRollingOut, "")
	setCondition(&next, inplace.ConditionProgressing, true, inplace.ReasonRollingOut, "")
	setCondition(&next, inplace.ConditionDegraded, false, inplace.ReasonAsExpected, "")
	if err := p.writer.status(ctx, &next); err != nil {
		return err
	}
	p.work.progressed = p.now
	p.teller.event(corev1.EventTypeNormal, eventStarted, "rolling out to "+p.target.what+": "+describe(p.rollout.Spec.Containers))
	p.log.WithField("revision", p.goal.revision).Info("rollout begins")
	return nil
}

// waits returns true if it is too early to ask the API server again, and has the rollout looked at when the time has come.
func (p *pass) waits(t *apiTrouble) bool {
	left := t.until.Sub(p.now)
	if left > 0 {
		p.wait = sooner(p.wait, left)
	}
	return left > 0
}
