// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package rollout

import (
	"cmp"
	"context"
	"errors"
	"fmt"
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
	"sigs.k8s.io/controller-runtime/pkg/reconcile"

	inplace "github.com/cri-proxy/cri-proxy/api/inplace/v1alpha1"
	opsv1 "github.com/cri-proxy/cri-proxy/api/ops/v1"
	"github.com/cri-proxy/cri-proxy/controller/apierror"
	"github.com/cri-proxy/cri-proxy/controller/jobbudget"
	"github.com/cri-proxy/cri-proxy/controller/nodes"
	"github.com/cri-proxy/cri-proxy/controller/objects"
	"github.com/cri-proxy/cri-proxy/controller/retry"
	"github.com/cri-proxy/cri-proxy/controller/rollout/check"
	"github.com/cri-proxy/cri-proxy/controller/rollout/dryrun"
	"github.com/cri-proxy/cri-proxy/controller/rollout/evaluate"
	"github.com/cri-proxy/cri-proxy/controller/rollout/nodeops"
	"github.com/cri-proxy/cri-proxy/controller/rollout/notice"
	"github.com/cri-proxy/cri-proxy/controller/rollout/requeue"
	"github.com/cri-proxy/cri-proxy/controller/rollout/workload"
	"github.com/cri-proxy/cri-proxy/controller/workerpool"
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

	workers *workerpool.Pool
	driver  *nodeops.Driver
	tracker *nodes.Tracker[*opsv1.Operation]

	admissions admissions

	mu    sync.Mutex
	works map[types.NamespacedName]*work
}

func (r *Reconciler) prepare() {
	r.workers, r.works = workerpool.New(r.Metrics.Workers()), map[types.NamespacedName]*work{}
	r.driver = &nodeops.Driver{Nodes: r.Nodes, Client: r.Client, Live: r.APIReader, Workers: r.workers,
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
			uid: rollout.UID, ops: nodeops.NewState(rollout.UID, key, r.tracker), reported: map[string]bool{},
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
	pods   *podWriter
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
	p.teller = &teller{recorder: r.Recorder, rollout: rollout, reported: p.work.reported}
	p.pods = &podWriter{client: r.Client, metrics: r.Metrics, rollout: rollout, now: p.now, log: p.log}
	p.writer = &objects.Writer[*inplace.InPlaceRollout]{Client: r.Client, Kind: "rollout",
		Wrote: func(what string, o *inplace.InPlaceRollout) {
			r.Metrics.Wrote(what)
			p.work.fresh.Wrote(o)
		}}
	p.env = &workload.Env{
		Client: r.Client, Live: r.APIReader, Rollout: rollout, Goal: &p.goal, Now: p.now, Log: p.log,
		Wrote: r.Metrics.Wrote,
		Event: p.teller.event, Tell: p.teller.tell, Choose: p.work.choose,
		PatchRollout: func(ctx context.Context, before *inplace.InPlaceRollout) error {
			return p.writer.Patch(ctx, rollout, before)
		},
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
		if err := p.writer.Patch(ctx, p.rollout, before); err != nil {
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
		clear(p.work.reported)
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
	p.act(ctx)
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
