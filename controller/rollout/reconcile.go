// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package rollout

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/sirupsen/logrus"
	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/client-go/tools/events"
	"sigs.k8s.io/controller-runtime/pkg/client"
	"sigs.k8s.io/controller-runtime/pkg/reconcile"

	inplace "github.com/cri-proxy/cri-proxy/api/inplace/v1alpha1"
	"github.com/cri-proxy/cri-proxy/controller/apierror"
	"github.com/cri-proxy/cri-proxy/controller/crew"
	"github.com/cri-proxy/cri-proxy/controller/jobbudget"
	"github.com/cri-proxy/cri-proxy/controller/nodes"
	"github.com/cri-proxy/cri-proxy/controller/objects"
	"github.com/cri-proxy/cri-proxy/controller/pods"
	"github.com/cri-proxy/cri-proxy/controller/retry"
	"github.com/cri-proxy/cri-proxy/controller/rollout/check"
	"github.com/cri-proxy/cri-proxy/controller/rollout/dryrun"
	"github.com/cri-proxy/cri-proxy/controller/rollout/evaluate"
	"github.com/cri-proxy/cri-proxy/controller/rollout/nodeops"
	"github.com/cri-proxy/cri-proxy/controller/rollout/notice"
	"github.com/cri-proxy/cri-proxy/controller/rollout/podtemplate"
	"github.com/cri-proxy/cri-proxy/controller/rollout/requeue"
	"github.com/cri-proxy/cri-proxy/controller/rollout/workload"
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
	Nodes nodeops.Nodes
	// Jobs counts restarts in the pods of Jobs. All who restart containers share it. It may be nil.
	Jobs *jobbudget.Budgets
	// NodePort is the port for nodes without an address of their own in an annotation.
	NodePort int
	// Recorder writes Events; nil writes none.
	Recorder events.EventRecorder
	// Metrics may be nil.
	Metrics *notice.Metrics
	// Log must be set.
	Log logrus.FieldLogger

	crew    *crew.Crew
	driver  *nodeops.Driver
	tracker *nodeops.Tracker

	admissions admissions

	mu    sync.Mutex
	works map[types.NamespacedName]*work
}

func (r *Reconciler) prepare() {
	r.crew, r.works = crew.New(r.Metrics.Crew()), map[types.NamespacedName]*work{}
	r.driver = &nodeops.Driver{Nodes: r.Nodes, Client: r.Client, Live: r.APIReader, Crew: r.crew,
		Port: cmp.Or(r.NodePort, nodes.DefaultPort)}
	r.tracker = nodes.NewTracker(r.Nodes, nodes.TrackerOptions{Gather: r.gather, Following: r.Metrics.Following})
}

func (r *Reconciler) workOf(rollout *inplace.InPlaceRollout) *work {
	key := client.ObjectKeyFromObject(rollout)
	r.mu.Lock()
	defer r.mu.Unlock()
	w := r.works[key]
	if w == nil || w.uid != rollout.UID {
		if w != nil {
			w.ops.Close()
			r.admissions.end(w.uid)
		}
		w = &work{
			uid: rollout.UID, ops: nodeops.NewState(rollout.UID, key, r.tracker), told: map[string]bool{},
			failures: map[types.UID]inplace.PodFailure{},
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
		w.ops.Close()
		r.admissions.end(w.uid)
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
	if p.work.fresh.Stale(rollout) {
		// the cache has not caught up with the last write
		return reconcile.Result{RequeueAfter: requeue.StaleInterval}, nil
	}
	var err error
	switch {
	case rollout.DeletionTimestamp != nil:
		err = p.finalize(ctx)
	case check.Over(rollout):
		r.admissions.end(rollout.UID)
		err = p.cleanup(ctx)
	default:
		err = p.advance(ctx)
	}
	switch {
	case apierrors.IsConflict(err):
		return reconcile.Result{RequeueAfter: requeue.StaleInterval}, nil
	case apierrors.IsNotFound(err):
		return reconcile.Result{RequeueAfter: requeue.StaleInterval}, nil // something was deleted meanwhile
	}
	return reconcile.Result{RequeueAfter: p.wait}, err
}

// pass is one look at one rollout.
type pass struct {
	r        *Reconciler
	rollout  *inplace.InPlaceRollout
	work     *work
	strategy evaluate.Strategy
	now      time.Time
	log      logrus.FieldLogger
	// wait is when to look again; 0 means when something happens.
	wait time.Duration

	// env is what the target's workload needs from this pass.
	env *workload.Env
	// ops has nodes do what the pods need.
	ops    *nodeops.Session
	teller *teller
	writer *objects.Writer[*inplace.InPlaceRollout]
	target *workload.Target
	goal   evaluate.Goal
	items  []*nodeops.Item
	ended  []*corev1.Pod // pods that broke so that they ended
	plan   evaluate.Plan
	// notInPlaceReason is why a pod is left to its workload.
	notInPlaceReason string
	// blocked says what holds back the rollout as a whole, blockedReason is the reason of its
	// condition.
	blockedReason, blocked string
}

func (r *Reconciler) newPass(rollout *inplace.InPlaceRollout) *pass {
	p := &pass{
		r: r, rollout: rollout, work: r.workOf(rollout), now: time.Now(),
		strategy: evaluate.StrategyOf(&rollout.Spec.Strategy),
		log:      r.Log.WithField("rollout", client.ObjectKeyFromObject(rollout).String()),
	}
	p.teller = &teller{recorder: r.Recorder, rollout: rollout, told: p.work.told}
	p.writer = &objects.Writer[*inplace.InPlaceRollout]{Client: r.Client, Kind: "rollout",
		Wrote: func(what string, o *inplace.InPlaceRollout) {
			r.Metrics.Wrote(what)
			p.work.fresh.Wrote(o)
		}}
	p.env = &workload.Env{
		Client: r.Client, Live: r.APIReader, Rollout: rollout, Goal: &p.goal, Now: p.now, Log: p.log,
		Wrote: r.Metrics.Wrote,
		Event: p.teller.event, Tell: p.teller.tell, PatchRollout: p.patch, Choose: p.work.choose,
		Memory: &p.work.memory,
	}
	p.ops = &nodeops.Session{
		Driver: r.driver, State: p.work.ops, Rollout: rollout, Strategy: &p.strategy, Now: p.now, Log: p.log,
		Wait: &p.wait,
		NewLabel: func(i *nodeops.Item) string {
			if p.target.Workload == nil {
				return ""
			}
			return p.target.Workload.RevisionLabel(&i.PodRef, i.Status.Images)
		},
	}
	return p
}

// advance takes a rollout that has not ended one step further.
func (p *pass) advance(ctx context.Context) error {
	var why *apierror.SpecError
	var err error
	if p.target, err = p.env.Find(ctx); errors.As(err, &why) {
		return p.refuse(ctx, why)
	} else if err != nil {
		return err
	}
	p.strategy.Honour(p.target.MinReady)
	if !slices.Contains(p.rollout.Finalizers, inplace.RolloutFinalizer) {
		before := p.rollout.DeepCopy()
		p.rollout.Finalizers = append(p.rollout.Finalizers, inplace.RolloutFinalizer)
		if err := p.patch(ctx, before); err != nil {
			return err
		}
	}
	p.goal = evaluate.GoalOf(p.rollout)
	if first, shared, err := p.r.admissions.admit(ctx, p.r.Client, p.rollout, p.target.Pods); err != nil {
		return err
	} else if first != nil {
		return p.queue(ctx, first, shared)
	}
	if p.rollout.Status.ObservedRevision != p.goal.Revision {
		if err := p.begin(ctx); err != nil {
			return err
		}
	}
	if next := p.rollout.Status.DeepCopy(); !undoing(p.rollout, &p.strategy) &&
		len(next.PreviousImages) < len(p.goal.Images) {
		// Pods have come since the rollout began.
		if next.PreviousImages == nil {
			next.PreviousImages = map[string]string{}
		}
		if p.target.FindPrevious(p.goal.Images, next.PreviousImages) {
			if err := p.writeStatus(ctx, next); err != nil {
				return err
			}
		}
	}
	if p.work.revision != p.goal.Revision {
		p.work.revision, p.work.failures = p.goal.Revision, map[types.UID]inplace.PodFailure{}
		clear(p.work.told)
		p.work.progressed, p.work.released = p.now, nil
		p.work.refused, p.work.api = nil, dryrun.Trouble{}
		p.work.memory.Forget()
	}
	if undoing(p.rollout, &p.strategy) {
		p.goal = p.goal.Rollback(&p.rollout.Status, p.target.Workload != nil)
	}
	if text := workload.Newer(p.rollout); text != "" {
		return p.supersede(ctx, text)
	}
	ready := true
	var over *workload.SupersededError
	if w := p.target.Workload; w != nil {
		if ready, err = p.align(ctx, w); errors.As(err, &why) {
			return p.refuse(ctx, why)
		} else if errors.As(err, &over) {
			return p.supersede(ctx, over.Text)
		} else if err != nil {
			return err
		}
		p.goal.Images = p.work.memory.Template.All(p.goal.Images) // as the workload's controller would make pods
	}
	p.gather(ctx)
	if err := p.decide(ctx, !ready); err != nil {
		return err
	}
	if fails := p.noteFailures(); fails > 0 && p.strategy.OnFailure == inplace.Rollback && !p.goal.Undo &&
		len(p.rollout.Status.PreviousImages) > 0 {
		return p.startRollback(ctx)
	}
	if err := p.act(ctx); err != nil {
		return err
	}
	return p.conclude(ctx)
}

// align writes the images into the template of the workload, unless the API server refuses that for
// good.
func (p *pass) align(ctx context.Context, w workload.Workload) (ready bool, err error) {
	api := &p.work.api
	p.blockedReason = inplace.ReasonWaiting
	switch {
	case p.work.refused[p.goal.Revision] != nil:
	case p.waits(api):
		p.blocked = api.Text
	default:
		ready, p.blocked, err = w.SyncTemplate(ctx, p.goal.Images)
		why := dryrun.Refusal(err)
		switch {
		case err == nil:
			*api = dryrun.Trouble{}
		case why != nil:
			p.work.refuse(p.goal.Revision, why)
		case dryrun.IsAPIStatus(err) && !apierrors.IsConflict(err) && !apierrors.IsNotFound(err):
			api.Note(err, p.now)
			p.waits(api)
			p.blocked = api.Text
			if p.now.Sub(api.Since) >= p.strategy.Deadline {
				p.work.refuse(p.goal.Revision, &evaluate.Failure{Reason: evaluate.FailDeadline,
					Message: fmt.Sprintf("the template could not be changed for %s: %s", p.strategy.Deadline, err)})
			}
		default:
			return false, err
		}
	}
	switch why := p.work.refused[p.goal.Revision]; {
	case why != nil && !p.goal.Undo:
		p.blocked = why.Message
	case why != nil:
		p.blocked = "" // what cannot be put back stays
	case !ready && api.Count >= apierror.Tries:
		p.blockedReason = inplace.ReasonAPIError
		p.blocked = fmt.Sprintf("%s cannot be changed, %d tries have failed since %s: %s", p.target.What, api.Count,
			api.Since.UTC().Format(time.RFC3339), api.Text)
		p.teller.tell(corev1.EventTypeWarning, inplace.ReasonAPIError, p.blocked, "template")
	}
	if !ready {
		p.wait = retry.Sooner(p.wait, requeue.BlockedInterval)
	}
	return ready || p.work.refused[p.goal.Revision] != nil && p.goal.Undo, nil
}

// undoing returns true if the present revision has failed and is rolled back.
func undoing(r *inplace.InPlaceRollout, s *evaluate.Strategy) bool {
	return r.Status.FailedRevision == evaluate.RevisionOf(r) && s.OnFailure == inplace.Rollback
}

// gather finds out how far each pod is.
func (p *pass) gather(ctx context.Context) {
	there := map[types.UID]bool{}
	begun := p.now
	if t := p.rollout.Status.StartTime; t != nil {
		begun = t.Time
	}
	for _, pod := range p.target.Pods {
		m := p.ops.Pod(pod, p.goal.Revision)
		there[pod.UID] = true
		if !pods.Active(pod) {
			if pod.DeletionTimestamp == nil && m.State.IsOf(p.goal) {
				p.ended = append(p.ended, pod)
			}
			continue
		}
		i := &nodeops.Item{PodRef: evaluate.PodRef{Pod: pod, State: m.State, Goal: p.goal.ForPod(m.State)}, Ops: m,
			Ordinal: -1, Stale: m.Fresh.Stale(pod)}
		if w := p.target.Workload; w != nil && !p.goal.Undo && w.NeedsRestart(pod) {
			i.Goal.Restarts = pods.Names(pod)
		}
		if p.target.Ordered {
			i.Ordinal = ordinalOf(pod.Name)
		}
		if !i.Stale {
			m.NoteReady(pod, p.now)
			m.NoteStarted(pod, p.now)
		}
		p.ops.SettlePreparation(i)
		p.ops.SettleTags(i)
		k := p.work.ops.Knowledge(m, pod, begun)
		k.Carried = len(m.Started) > 0 && p.r.driver.Carries(ctx, pod)
		i.Facts, i.Status = k, evaluate.Pod(pod, m.State, i.Goal, k, &p.strategy, p.now)
		p.wait = retry.Sooner(p.wait, i.Status.Wait)
		if s := i.Status.Stage; p.target.Workload != nil && (s == evaluate.Outdated && !m.Updating ||
			s == evaluate.Updated && !p.goal.Undo || s == evaluate.Broken &&
			i.Status.Failure.Reason == evaluate.FailNoContainer) {
			if why := p.target.Workload.NotInPlaceReason(pod); why != "" {
				i.Status.Stage, p.notInPlaceReason = evaluate.Skipped, why
			} else if p.blocked != "" && s == evaluate.Broken {
				i.Status.Stage = evaluate.Skipped // that is not known yet
			}
		}
		if p.target.Workload != nil && i.Status.Stage == evaluate.Updated {
			label := p.target.Workload.RevisionLabel(&i.PodRef, nil)
			i.Unlabelled = label != "" && label != pod.Labels[podtemplate.RevisionLabel]
		}
		if v := &i.Status; !i.Stale && (v.Recovered || v.Stage == evaluate.Broken && !v.Disrupted ||
			v.Stage == evaluate.Updated && v.Available) {
			if m.Updating {
				p.r.Jobs.Return(takenAs(p.rollout, pod))
			}
			m.Updating, m.Settled = false, v.Recovered || m.Settled
			v.Disrupted = v.Open
		}
		p.items = append(p.items, i)
	}
	p.ops.Keep(there)
}

// decide plans which pods are next.
func (p *pass) decide(ctx context.Context, halted bool) error {
	s := &p.strategy
	candidates := make([]evaluate.Candidate, len(p.items))
	failed := false
	for n, i := range p.items {
		shut, _ := evaluate.OutOfServiceBy(i.Pod)
		updating := i.Ops.Updating || shut == p.rollout.UID && i.Status.Stage == evaluate.Outdated
		candidates[n] = evaluate.Candidate{
			Pod: i.Pod, Ordinal: i.Ordinal, Status: i.Status, Updating: updating, Preparation: p.ops.Preparation(i),
		}
		failed = failed || i.Status.Stage == evaluate.Broken
	}
	l := evaluate.Limits{
		Desired: p.target.Desired, MaxUnavailable: s.UnavailableLimit(p.target.Desired),
		Keep: evaluate.Resolve(s.Partition, p.target.Desired, true), FirstOrdinal: p.target.FirstOrdinal,
		Ordered: p.target.Ordered,
		Halted:  halted || p.rollout.Spec.Paused,
	}
	if p.goal.Undo {
		l.Keep = 0
	} else if (failed || len(p.ended) > 0) && s.OnFailure != inplace.Continue {
		l.Halted = true
	}
	var budgets []*evaluate.Disruptions
	read := false
	var err error
	l.Allowed = func(pod *corev1.Pod) (bool, string) {
		if !read {
			read = true
			budgets, err = evaluate.Budgets(ctx, p.r.Client, p.rollout.Namespace, candidates, doomed(p.items))
		}
		if err != nil {
			return false, err.Error()
		}
		return evaluate.Take(budgets, pod)
	}
	p.plan = evaluate.Next(candidates, l)
	if err != nil {
		return err
	}
	if p.plan.Blocked != "" {
		p.wait = retry.Sooner(p.wait, requeue.BlockedInterval)
	}
	return nil
}

// doomed returns a function that says whether this rollout is about to disrupt a pod.
func doomed(items []*nodeops.Item) func(*corev1.Pod) bool {
	pods := map[types.UID]bool{}
	for _, i := range items {
		pods[i.Pod.UID] = i.Status.Disrupted
	}
	return func(pod *corev1.Pod) bool { return pods[pod.UID] }
}

// act takes the pods further. An error with one pod does not hold up the others.
func (p *pass) act(ctx context.Context) error {
	for _, n := range p.plan.Prepare {
		p.ops.Prepare(ctx, p.items[n])
	}
	for _, n := range p.plan.Begin {
		p.settleError(p.items[n], p.step(ctx, p.items[n]))
	}
	for _, i := range p.items {
		if i.Stale {
			continue
		}
		p.teller.warnings(i.Pod, p.ops.Finished(i.Ops))
		if relabels := i.Status.Stage == evaluate.Updated && p.target.Workload != nil; (relabels || i.Status.Open) &&
			!p.waits(&i.Ops.Api) {
			var err error
			if relabels {
				err = p.relabel(ctx, i)
			}
			if i.Status.Open {
				err = errors.Join(p.setGates(ctx, i, ""), err)
			}
			p.settleError(i, err)
		}
		if i.Status.Ask {
			p.ops.Follow(ctx, i)
		}
		if i.Status.Restart {
			p.ops.Restart(ctx, i)
		}
		if i.Status.Inquire {
			p.ops.Inquire(ctx, i)
		}
		if i.Status.Stage == evaluate.Updating {
			p.nudge(ctx, i)
		}
	}
	return nil
}

// settleError decides what to do about a pod whose change the API server has answered with an
// error.
func (p *pass) settleError(i *nodeops.Item, err error) {
	why := dryrun.Refusal(err)
	switch {
	case err == nil:
		if !i.Stale && !p.now.Before(i.Ops.Api.Until) {
			i.Ops.Api = dryrun.Trouble{}
		}
	case apierrors.IsConflict(err), apierrors.IsNotFound(err):
		p.wait = retry.Sooner(p.wait, max(requeue.StaleInterval, p.work.gather()))
	case why == nil:
		i.Ops.Api.Note(err, p.now)
		p.waits(&i.Ops.Api)
		if p.now.Sub(i.Ops.Api.Since) < p.strategy.Deadline {
			return
		}
		late := dryrun.TooLong(i.Pod.Name, p.strategy.Deadline, err)
		why = &late
		fallthrough
	default:
		i.Ops.Api.Note(err, p.now) // a gate that cannot be opened is tried again
		p.ops.AbortUpgrade(i.Ops, why.Message)
		i.Ops.Refused = why
		p.wait = retry.Sooner(p.wait, requeue.StaleInterval)
	}
}

// nudge makes kubelet probe a new container that is not ready at once, if that is due.
func (p *pass) nudge(ctx context.Context, i *nodeops.Item) {
	var names []string
	carried := len(i.Ops.Started) > 0 && p.r.driver.Carries(ctx, i.Pod)
	for _, name := range objects.SortedKeys(i.Ops.State.Containers) {
		c := pods.Changeable(i.Pod, name)
		cs := pods.Status(i.Pod, name)
		if c == nil || cs == nil || cs.ContainerID == i.Ops.State.Containers[name].ID {
			continue
		}
		if passed, _ := pods.StartupPassed(c, cs, i.Ops.Started[cs.ContainerID], carried, p.now); passed {
			names = append(names, name)
		}
	}
	container, wait := i.Ops.Nudges.Due(i.Pod, names, p.now)
	p.wait = retry.Sooner(p.wait, wait)
	if container == "" {
		return
	}
	log := p.log.WithField("pod", i.Pod.Name).WithField("container", container)
	pod, err := i.Ops.Nudges.Nudge(ctx, p.r.Client, i.Pod, container)
	if err != nil {
		log.WithError(err).Info("kubelet could not be made to probe the new container at once") // it will in its time
		return
	}
	i.Ops.Fresh.Wrote(pod)
	p.r.Metrics.Wrote("pod")
	log.Debug("kubelet made to probe the new container at once")
}

// begin takes up the containers of the spec. First of all it writes into the status which images
// they replace.
func (p *pass) begin(ctx context.Context) error {
	old := &p.rollout.Status
	now := metav1.NewTime(p.now)
	next := inplace.InPlaceRolloutStatus{
		ObservedGeneration: p.rollout.Generation, ObservedRevision: p.goal.Revision, StartTime: &now,
		LastSuccessTime: old.LastSuccessTime,
		TargetImages:    p.goal.Images, PreviousImages: map[string]string{}, Conditions: slices.Clone(old.Conditions),
		Desired: int32(p.target.Desired),
	}
	if old.CompletionTime == nil {
		for name := range p.goal.Images {
			if kept := old.PreviousImages[name]; kept != "" {
				next.PreviousImages[name] = kept // the last that was good
			}
		}
	}
	p.target.FindPrevious(p.goal.Images, next.PreviousImages)
	notice.SetCondition(&next, inplace.ConditionComplete, false, inplace.ReasonRollingOut, "")
	notice.SetCondition(&next, inplace.ConditionProgressing, true, inplace.ReasonRollingOut, "")
	notice.SetCondition(&next, inplace.ConditionDegraded, false, inplace.ReasonAsExpected, "")
	if err := p.writeStatus(ctx, &next); err != nil {
		return err
	}
	p.work.progressed = p.now
	p.teller.event(corev1.EventTypeNormal, notice.EventStarted,
		"rolling out to "+p.target.What+": "+notice.Describe(p.rollout.Spec.Containers))
	p.log.WithField("revision", p.goal.Revision).Info("rollout begins")
	return nil
}

// waits returns true if it is too early to ask the API server again, and has the rollout looked at
// when the time has come.
func (p *pass) waits(t *dryrun.Trouble) bool {
	left := t.Until.Sub(p.now)
	if left > 0 {
		p.wait = retry.Sooner(p.wait, left)
	}
	return left > 0
}

// ordinalOf returns the number at the end of a name; -1 if there is none.
func ordinalOf(name string) int {
	n, err := strconv.Atoi(name[strings.LastIndexByte(name, '-')+1:])
	if err != nil {
		return -1
	}
	return n
}
