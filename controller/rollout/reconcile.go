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
	"google.golang.org/protobuf/types/known/timestamppb"
	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/client-go/tools/events"
	"sigs.k8s.io/controller-runtime/pkg/client"
	"sigs.k8s.io/controller-runtime/pkg/event"
	"sigs.k8s.io/controller-runtime/pkg/reconcile"

	inplace "github.com/cri-proxy/cri-proxy/api/inplace/v1alpha1"
	"github.com/cri-proxy/cri-proxy/controller/apierror"
	"github.com/cri-proxy/cri-proxy/controller/crew"
	"github.com/cri-proxy/cri-proxy/controller/jobbudget"
	"github.com/cri-proxy/cri-proxy/controller/nodes"
	"github.com/cri-proxy/cri-proxy/controller/pods"
)

const (
	// stalePause lets the cache catch up.
	stalePause = 100 * time.Millisecond
	// blockedPause is how often budgets and workloads that hold a rollout back are looked at without an event.
	blockedPause = 2 * time.Second
	// lookAgain is how often a rollout that goes on is looked at without an event.
	lookAgain = 30 * time.Second
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
	// Nodes commands the nodes.
	Nodes Nodes
	// Jobs counts restarts of Jobs' pods, with all who make some; it may be nil.
	Jobs *jobbudget.Budgets
	// NodePort is the port for nodes without an address of their own in an annotation.
	NodePort int
	// Recorder writes Events; nil writes none.
	Recorder events.EventRecorder
	// Metrics may be nil.
	Metrics *Metrics
	// Log must be set.
	Log logrus.FieldLogger

	crew  *crew.Crew
	wakes chan wakeUp
	// turns is held while a rollout is let in.
	turns sync.Mutex

	mu    sync.Mutex
	works map[types.NamespacedName]*work
	// lastTurn counts the rollouts that were let in.
	lastTurn uint64
}

// wakeUp makes the reconciler look at a rollout.
type wakeUp = event.TypedGenericEvent[*inplace.InPlaceRollout]

func (r *Reconciler) prepare() {
	r.crew, r.wakes, r.works = crew.New(r.Metrics.crew()), make(chan wakeUp), map[types.NamespacedName]*work{}
}

func (r *Reconciler) workOf(rollout *inplace.InPlaceRollout) *work {
	key := client.ObjectKeyFromObject(rollout)
	r.mu.Lock()
	defer r.mu.Unlock()
	w := r.works[key]
	if w == nil || w.uid != rollout.UID {
		if w != nil {
			w.close()
		}
		w = &work{
			uid: rollout.UID, wake: r.waker(key), told: map[string]bool{}, failures: map[types.UID]inplace.PodFailure{},
			nodes: map[string]nodes.Node{}, members: map[types.UID]*member{}, keys: map[string]*keys{},
		}
		r.works[key] = w
	}
	return w
}

// knownWork is the work of a rollout, or nil.
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
		w.close()
	}
}

// waker wakes the reconciler for a rollout.
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

// Reconcile takes one rollout as far as it goes and says when to look again.
func (r *Reconciler) Reconcile(ctx context.Context, req reconcile.Request) (reconcile.Result, error) {
	rollout := &inplace.InPlaceRollout{}
	if err := r.Client.Get(ctx, req.NamespacedName, rollout); err != nil {
		if apierrors.IsNotFound(err) {
			r.forget(req.NamespacedName)
			return reconcile.Result{}, nil
		}
		return reconcile.Result{}, err
	}
	p := &pass{
		r: r, rollout: rollout, work: r.workOf(rollout), now: time.Now(), strategy: strategyOf(&rollout.Spec.Strategy),
		log: r.Log.WithField("rollout", req.String()),
	}
	if versionOf(rollout.ResourceVersion) < p.work.written {
		return reconcile.Result{RequeueAfter: stalePause}, nil // the cache has not caught up with the last write
	}
	var err error
	switch {
	case rollout.DeletionTimestamp != nil:
		err = p.finalize(ctx)
	case over(rollout):
		r.endTurn(p.work)
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

// pass is one reconcile of one rollout.
type pass struct {
	r        *Reconciler
	rollout  *inplace.InPlaceRollout
	work     *work
	strategy strategy
	now      time.Time
	log      logrus.FieldLogger
	// wait is when to look again; 0 means when something happens.
	wait time.Duration

	target *target
	goal   goal
	items  []*item
	ended  []*corev1.Pod // pods that broke so that they ended
	plan   plan
	// obstacle is why a pod is left to its workload.
	obstacle string
	// blocked says what holds the rollout back as a whole, with a condition's reason.
	blockedReason, blocked string
}

// advance takes a rollout that has not ended a step further.
func (p *pass) advance(ctx context.Context) error {
	var why *specError
	var err error
	if p.target, err = p.find(ctx); errors.As(err, &why) {
		return p.refuse(ctx, why)
	} else if err != nil {
		return err
	}
	p.strategy.honour(p.target.minReady)
	if !slices.Contains(p.rollout.Finalizers, inplace.RolloutFinalizer) {
		before := p.rollout.DeepCopy()
		p.rollout.Finalizers = append(p.rollout.Finalizers, inplace.RolloutFinalizer)
		if err := p.patch(ctx, before); err != nil {
			return err
		}
	}
	p.goal = goalOf(p.rollout)
	if first, shared, err := p.r.takeTurn(ctx, p); err != nil {
		return err
	} else if first != nil {
		return p.queue(ctx, first, shared)
	}
	if p.rollout.Status.ObservedRevision != p.goal.revision {
		if err := p.begin(ctx); err != nil {
			return err
		}
	}
	if next := p.rollout.Status.DeepCopy(); !p.undoing() && len(next.PreviousImages) < len(p.goal.images) {
		// Pods that have come since.
		if next.PreviousImages == nil {
			next.PreviousImages = map[string]string{}
		}
		if p.findPrevious(next.PreviousImages) {
			if err := p.writeStatus(ctx, next); err != nil {
				return err
			}
		}
	}
	if p.work.revision != p.goal.revision {
		p.work.revision, p.work.failures, p.work.told = p.goal.revision, map[types.UID]inplace.PodFailure{}, map[string]bool{}
		p.work.progressed, p.work.released = p.now, nil
		p.work.template, p.work.refused, p.work.api, p.work.templated = nil, nil, apiTrouble{}, nil
	}
	if p.undoing() {
		p.goal = p.goal.undoing(&p.rollout.Status, p.target.workload != nil)
	}
	if text := p.newer(); text != "" {
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
		p.goal.images = p.work.template.all(p.goal.images) // as the workload's controller would make pods
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

// align brings the template of the workload to the images, unless the API server has said no.
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
	case !ready && api.count >= apierror.Tries:
		p.blockedReason = inplace.ReasonAPIError
		p.blocked = fmt.Sprintf("%s cannot be changed, %d tries have failed since %s: %s", p.target.what, api.count, api.since.UTC().Format(time.RFC3339), api.text)
		p.tell(corev1.EventTypeWarning, inplace.ReasonAPIError, p.blocked, "template")
	}
	if !ready {
		p.wait = sooner(p.wait, blockedPause)
	}
	return ready || p.work.refused[p.goal.revision] != nil && p.goal.undo, nil
}

// undoing says that the revision is being rolled back.
func (p *pass) undoing() bool {
	return p.rollout.Status.FailedRevision == revisionOf(p.rollout) && p.strategy.onFailure == inplace.Rollback
}

// gather judges the pods.
func (p *pass) gather(ctx context.Context) {
	there := map[types.UID]bool{}
	begun := p.now
	if t := p.rollout.Status.StartTime; t != nil {
		begun = t.Time
	}
	for _, pod := range p.target.pods {
		m := p.memberOf(pod)
		there[pod.UID] = true
		if !active(pod) {
			if pod.DeletionTimestamp == nil && m.mark.by(p.goal) {
				p.ended = append(p.ended, pod)
			}
			continue
		}
		i := &item{pod: pod, m: m, goal: p.goal.of(m.mark), ordinal: -1, stale: m.stale(pod)}
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
		p.settlePreparation(i)
		p.settleLooks(i)
		k := p.work.knowledge(m, pod, begun)
		k.carried = len(m.started) > 0 && p.carries(ctx, pod)
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
			label := p.target.workload.revisionLabel(i, nil)
			i.unlabelled = label != "" && label != pod.Labels[revisionLabel]
		}
		if v := &i.verdict; !i.stale && (v.recovered || v.stage == broken && !v.disrupted || v.stage == updated && v.available) {
			if m.turn {
				p.r.Jobs.Return(p.takenAs(pod))
			}
			m.turn, m.settled = false, v.recovered || m.settled
			v.disrupted = v.open
		}
		p.items = append(p.items, i)
	}
	p.keep(there)
}

// decide plans what to do with the pods.
func (p *pass) decide(ctx context.Context, halted bool) error {
	s := &p.strategy
	candidates := make([]candidate, len(p.items))
	failed := false
	for n, i := range p.items {
		shut, _ := shutBy(i.pod)
		turn := i.m.turn || shut == p.rollout.UID && i.verdict.stage == outdated
		candidates[n] = candidate{i.pod, i.ordinal, i.verdict, turn, p.preparation(i)}
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
			budgets, err = budgetsOf(ctx, p.r.Client, p.rollout.Namespace, candidates, p.doomed())
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

// doomed says of pods that they are about to be disrupted by this rollout.
func (p *pass) doomed() func(*corev1.Pod) bool {
	pods := map[types.UID]bool{}
	for _, i := range p.items {
		pods[i.pod.UID] = i.verdict.disrupted
	}
	return func(pod *corev1.Pod) bool { return pods[pod.UID] }
}

// act takes the pods further. What went wrong with one does not keep the others.
func (p *pass) act(ctx context.Context) error {
	for _, n := range p.plan.prepare {
		p.prepare(ctx, p.items[n])
	}
	for _, n := range p.plan.begin {
		p.settleError(p.items[n], p.step(ctx, p.items[n]))
	}
	for _, i := range p.items {
		if i.stale {
			continue
		}
		p.tellWarnings(i)
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
			p.follow(ctx, i)
		}
		if i.verdict.restart {
			p.restart(ctx, i)
		}
		if i.verdict.inquire {
			p.inquire(ctx, i)
		}
		if i.verdict.stage == changing {
			p.nudge(ctx, i)
		}
	}
	return nil
}

// settleError decides what becomes of a pod about which the API server has said no. What it says of one does not keep the others.
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
		p.work.mu.Lock()
		p.abort(i.m.node, i.m.visit, why.message)
		p.work.mu.Unlock()
		i.m.refused = why
		p.wait = sooner(p.wait, stalePause)
	}
}

// nudge makes kubelet look at a pod again for a new container that is not ready, where that is due.
func (p *pass) nudge(ctx context.Context, i *item) {
	var names []string
	carried := len(i.m.started) > 0 && p.carries(ctx, i.pod)
	for _, name := range sortedKeys(i.m.mark.Containers) {
		c, _ := containerOf(i.pod, name)
		cs := statusOf(i.pod, name)
		if c == nil || cs == nil || cs.ContainerID == i.m.mark.Containers[name].ID {
			continue
		}
		if passed, _ := pods.StartupPassed(c, cs, i.m.started[cs.ContainerID], carried, p.now); passed {
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

// begin takes up the containers of the spec: what they replace is written down before anything is done.
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
	p.findPrevious(next.PreviousImages)
	setCondition(&next, inplace.ConditionComplete, false, inplace.ReasonRollingOut, "")
	setCondition(&next, inplace.ConditionProgressing, true, inplace.ReasonRollingOut, "")
	setCondition(&next, inplace.ConditionDegraded, false, inplace.ReasonAsExpected, "")
	if err := p.writeStatus(ctx, &next); err != nil {
		return err
	}
	p.work.progressed = p.now
	p.event(corev1.EventTypeNormal, eventStarted, "rolling out to "+p.target.what+": "+describe(p.rollout.Spec.Containers))
	p.log.WithField("revision", p.goal.revision).Info("rollout begins")
	return nil
}

// findPrevious adds the images that are to be replaced, as far as they can be told, and says whether that is more than before.
func (p *pass) findPrevious(previous map[string]string) bool {
	more := false
	for name, image := range p.goal.images {
		if previous[name] != "" {
			continue
		}
		was := ""
		if w := p.target.workload; w != nil && w.image(name) != image {
			was = w.image(name)
		}
		if was == "" {
			was = usual(p.target.pods, name, image)
		}
		if was != "" {
			previous[name], more = was, true
		}
	}
	return more
}

// usual is the image that most pods have in a container, besides the given one.
func usual(pods []*corev1.Pod, name, besides string) string {
	counts := map[string]int{}
	for _, pod := range pods {
		if c, _ := containerOf(pod, name); c != nil && active(pod) && c.Image != besides {
			counts[c.Image]++
		}
	}
	best := ""
	for _, image := range slices.Sorted(maps.Keys(counts)) {
		if best == "" || counts[image] > counts[best] {
			best = image
		}
	}
	return best
}

// node is where to reach the node of a pod.
func (p *pass) node(ctx context.Context, pod *corev1.Pod) (nodes.Node, error) {
	var n corev1.Node
	if err := p.r.Client.Get(ctx, client.ObjectKey{Name: pod.Spec.NodeName}, &n); err != nil {
		return nodes.Node{}, err
	}
	port := p.r.NodePort
	if port == 0 {
		port = nodes.DefaultPort
	}
	return nodes.Of(&n, port)
}

// carries says that the kubelet of a pod takes new containers for started because the old ones were.
func (p *pass) carries(ctx context.Context, pod *corev1.Pod) bool {
	var n corev1.Node
	if p.r.Client.Get(ctx, client.ObjectKey{Name: pod.Spec.NodeName}, &n) != nil {
		return true
	}
	return pods.CarriesStarted(&n)
}

func stampProto(t time.Time) *timestamppb.Timestamp { return timestamppb.New(t) }

func sortedKeys[V any](m map[string]V) []string { return slices.Sorted(maps.Keys(m)) }
