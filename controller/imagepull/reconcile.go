// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package imagepull

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"sync"
	"time"

	"github.com/sirupsen/logrus"
	corev1 "k8s.io/api/core/v1"
	apiequality "k8s.io/apimachinery/pkg/api/equality"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	"k8s.io/apimachinery/pkg/api/meta"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/client-go/tools/events"
	"sigs.k8s.io/controller-runtime/pkg/client"
	"sigs.k8s.io/controller-runtime/pkg/reconcile"

	"github.com/cri-proxy/cri-proxy/api/apps/v1beta1"
	opsv1 "github.com/cri-proxy/cri-proxy/api/ops/v1"
	"github.com/cri-proxy/cri-proxy/controller/apierror"
	"github.com/cri-proxy/cri-proxy/controller/imagepull/command"
	"github.com/cri-proxy/cri-proxy/controller/imagepull/report"
	"github.com/cri-proxy/cri-proxy/controller/imagepull/spec"
	"github.com/cri-proxy/cri-proxy/controller/kruise"
	"github.com/cri-proxy/cri-proxy/controller/nodes"
	"github.com/cri-proxy/cri-proxy/controller/objects"
	"github.com/cri-proxy/cri-proxy/controller/retry"
	"github.com/cri-proxy/cri-proxy/controller/workerpool"
)

const (
	// staleInterval gives the cache time to catch up.
	staleInterval = 100 * time.Millisecond
	// noNodesTimeout is how long a job that ends waits for the first node that matches. Labels and
	// pods may come with the job, and a moment later.
	noNodesTimeout = 30 * time.Second
)

// +kubebuilder:rbac:groups=apps.kruise.io,resources=imagepulljobs,verbs=get;list;watch;create;patch;delete
// +kubebuilder:rbac:groups=apps.kruise.io,resources=imagepulljobs/status,verbs=patch
// +kubebuilder:rbac:groups="",resources=nodes;pods,verbs=get;list;watch
// +kubebuilder:rbac:groups="",resources=secrets;serviceaccounts,verbs=get
// +kubebuilder:rbac:groups=events.k8s.io,resources=events,verbs=create;patch

// Reconciler carries out ImagePullJobs.
type Reconciler struct {
	// Client reads from the cache and writes.
	Client client.Client
	// APIReader reads past the cache, which has no secrets.
	APIReader client.Reader
	// Nodes commands the nodes.
	Nodes command.Nodes
	// NodePort is the port of nodes that have no address of their own in an annotation.
	NodePort int
	// Limits bound what jobs may ask.
	Limits spec.Limits
	// Recorder writes Events; nil writes none.
	Recorder events.EventRecorder
	// Metrics may be nil.
	Metrics *Metrics
	// Log must be set.
	Log logrus.FieldLogger
	// Gate is closed while OpenKruise carries the jobs out; nil: it never is.
	Gate *kruise.Gate

	// workers carry out what outlasts a reconcile.
	workers *workerpool.Pool
	// tracker follows the pulls, and wakes the reconciler for a job.
	tracker *nodes.Tracker[*opsv1.PullOperation]

	mu       sync.Mutex
	memories map[types.NamespacedName]*memory
}

// Reconcile takes one job as far as possible and says when to look again.
func (r *Reconciler) Reconcile(ctx context.Context, req reconcile.Request) (reconcile.Result, error) {
	leave, open := r.Gate.Enter()
	if !open {
		return reconcile.Result{RequeueAfter: kruise.StandBy}, nil
	}
	defer leave()
	job := &v1beta1.ImagePullJob{}
	if err := r.Client.Get(ctx, req.NamespacedName, job); err != nil {
		if apierrors.IsNotFound(err) {
			r.forget(req.NamespacedName)
			return reconcile.Result{}, nil
		}
		return reconcile.Result{}, err
	}
	p := &pass{
		r: r, job: job, memory: r.memoryOf(job), now: time.Now(),
		log: r.Log.WithFields(logrus.Fields{"job": req.String(), "image": job.Spec.Image}),
	}
	if p.memory.written.Stale(job) {
		return reconcile.Result{RequeueAfter: staleInterval}, nil
	}
	var wait time.Duration
	var err error
	switch {
	case job.DeletionTimestamp != nil:
		wait, err = p.finalize(ctx)
	case job.Status.CompletionTime != nil && !spec.BeginsAnew(job):
		wait, err = p.ended(ctx)
	default:
		wait, err = p.advance(ctx)
	}
	switch {
	case apierrors.IsConflict(err):
		return reconcile.Result{RequeueAfter: staleInterval}, nil
	case apierrors.IsNotFound(err):
		return reconcile.Result{}, nil // deleted meanwhile
	}
	return reconcile.Result{RequeueAfter: wait}, err
}

// pass is one reconcile of one job.
type pass struct {
	r      *Reconciler
	job    *v1beta1.ImagePullJob
	memory *memory
	now    time.Time
	log    logrus.FieldLogger
}

// advance takes a job that has not ended a step further.
func (p *pass) advance(ctx context.Context) (wait time.Duration, err error) {
	s, err := p.spec(ctx)
	applied := false
	defer func() {
		if !applied { // the next reconcile must not take it for applied
			p.memory.matched.Store(false)
		}
	}()
	var why *apierror.SpecError
	if errors.As(err, &why) {
		return p.refuse(ctx, why)
	}
	if err != nil {
		return 0, err
	}
	if !slices.Contains(p.job.Finalizers, v1beta1.PullFinalizer) {
		before := p.job.DeepCopy()
		p.job.Finalizers = append(p.job.Finalizers, v1beta1.PullFinalizer)
		if err := p.patch(ctx, before); err != nil {
			return 0, err
		}
	}
	p.memory.invalid = ""
	resume := p.job.Status.StartTime != nil
	again := p.job.Status.CompletionTime != nil
	if again || !resume {
		if err := p.start(ctx, s, again); err != nil {
			return 0, err
		}
	}
	s.Begun = p.job.Status.StartTime.Time
	changed := true
	switch j := p.memory.state; {
	case j == nil:
		p.memory.state = newJobState(p.r, s, p.memory, resume, again)
		p.memory.state.table.throttle.Begin(p.now)
	case j.table.spec == s:
		changed = false
	default:
		j.apply(s, p.now)
	}
	applied = true
	p.memory.state.step(time.Now())
	return p.conclude(ctx, changed)
}

// spec is what the job asks of which nodes: the very spec of before if neither has changed. The
// error is an *apierror.SpecError if the user can correct it.
func (p *pass) spec(ctx context.Context) (*spec.Spec, error) {
	s, err := spec.Of(p.job)
	if err != nil {
		return nil, err
	}
	s.Bound(p.r.Limits)
	m := p.memory
	if m.matched.Swap(true) && m.state != nil && m.state.table.spec.Same(s) {
		return m.state.table.spec, nil
	}
	s.Nodes, err = spec.Match(ctx, p.r.Client, p.job, p.r.NodePort)
	return s, err
}

// refuse says what is wrong with a job, and leaves the job until the user has corrected it.
func (p *pass) refuse(ctx context.Context, why *apierror.SpecError) (time.Duration, error) {
	p.memory.close() // what the nodes do goes on, and the state says what that is
	if p.memory.invalid != why.Message {
		p.memory.invalid = why.Message
		p.event(corev1.EventTypeWarning, eventInvalidSpec, why.Message)
	}
	next := p.job.Status.DeepCopy()
	next.ObservedGeneration = p.job.Generation
	next.Message = why.Message
	report.SetCondition(next, v1beta1.ConditionComplete, false, report.InvalidSpec, why.Message)
	return 0, p.writeStatus(ctx, next)
}

// start records that the job begins, before any node is told.
func (p *pass) start(ctx context.Context, s *spec.Spec, again bool) error {
	begun := metav1.NewTime(p.now)
	next := &v1beta1.ImagePullJobStatus{
		StartTime: &begun, Desired: int32(len(s.Nodes)),
		Message: report.MessageNoNodes, Conditions: slices.Clone(p.job.Status.Conditions),
	}
	p.observe(next)
	reason, message := withoutNodes(s.Never)
	if len(s.Nodes) > 0 {
		next.Message, next.Progress = fmt.Sprintf(report.MessageProgress, 0.), "0%"
		reason, message = report.Pulling, ""
	}
	report.SetCondition(next, v1beta1.ConditionComplete, false, reason, message)
	meta.RemoveStatusCondition(&next.Conditions, v1beta1.ConditionSucceeded)
	if err := p.writeStatus(ctx, next); err != nil {
		return err
	}
	text := fmt.Sprintf("pulling %s on %d nodes, at most %d at once", p.job.Spec.Image, len(s.Nodes), s.Parallelism())
	if again {
		text += ", again because the job was changed"
	}
	p.log.WithFields(logrus.Fields{"nodes": len(s.Nodes), "parallelism": s.Parallelism()}).Info("job begins")
	p.event(corev1.EventTypeNormal, eventStarted, text)
	return nil
}

// observe sets in a status about which job it is.
func (p *pass) observe(next *v1beta1.ImagePullJobStatus) {
	next.ObservedGeneration = p.job.Generation
	next.ObservedWork, next.ObservedEffort = spec.ObservedWork(p.job), spec.ObservedEffort(p.job)
}

// conclude writes what there is to write and says when to look again. changed says that the job or
// its nodes have changed.
func (p *pass) conclude(ctx context.Context, changed bool) (time.Duration, error) {
	j := p.memory.state
	t, s := j.table, j.table.spec
	ends := !s.Never
	var deadline time.Duration // until then; 0 means none
	late := false
	if seconds := p.job.Spec.CompletionPolicy.ActiveDeadlineSeconds; ends && seconds != nil {
		deadline = s.Begun.Add(time.Duration(*seconds) * time.Second).Sub(p.now)
		late = deadline <= 0
	}
	now := time.Now()
	finished := t.finished()
	if early := s.Begun.Add(noNodesTimeout).Sub(now); len(t.nodes) == 0 && early > 0 {
		finished, deadline = false, retry.Sooner(deadline, early)
	}
	if ends && (finished || late) {
		return p.complete(ctx, p.status(), late && !finished)
	}
	n, idle := len(t.nodes), t.idle()
	due, wait := t.throttle.Due(now, n, idle)
	var next *v1beta1.ImagePullJobStatus
	if changed && !due {
		if next = p.status(); !apiequality.Semantic.DeepEqual(next.Conditions, p.job.Status.Conditions) {
			t.throttle.Add(0)
			due, wait = t.throttle.Due(now, n, idle)
		}
	}
	due = due || p.job.Status.ObservedGeneration != p.job.Generation
	for _, more := range []time.Duration{t.schedule.nextWakeup(now), max(deadline, 0)} {
		wait = retry.Sooner(wait, more)
	}
	if !due {
		return wait, nil
	}
	if next == nil {
		next = p.status()
	}
	before := t.throttle
	t.throttle.Wrote(now, n, idle)
	j.writeEvents(p.r.Recorder, p.job)
	if err := p.writeStatus(ctx, next); err != nil {
		t.throttle.Undo(before)
		return 0, err
	}
	if wait == 0 {
		wait = report.RefreshFirst
	}
	return wait, nil
}

// status is what the status of a job that has not ended is to say.
func (p *pass) status() *v1beta1.ImagePullJobStatus {
	t := p.memory.state.table
	next := t.status(&p.job.Status)
	p.observe(next)
	t.setRunning(next)
	return next
}

// patch writes the change of metadata since before, if there is one, unless somebody else has
// written in between.
func (p *pass) patch(ctx context.Context, before *v1beta1.ImagePullJob) error {
	return p.writer().Patch(ctx, p.job, before)
}

// writeStatus writes next if it differs.
func (p *pass) writeStatus(ctx context.Context, next *v1beta1.ImagePullJobStatus) error {
	report.SetReady(next)
	before := p.job.DeepCopy()
	p.job.Status = *next
	_, err := p.writer().PatchStatus(ctx, p.job, before)
	return err
}

func (p *pass) writer() *objects.Writer[*v1beta1.ImagePullJob] {
	return &objects.Writer[*v1beta1.ImagePullJob]{
		Client: p.r.Client, Kind: "job", Wrote: func(what string, o *v1beta1.ImagePullJob) {
			p.r.Metrics.Wrote(what)
			p.memory.written.Wrote(o)
		},
	}
}
