// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package imagepull

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"slices"
	"strconv"
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
	"sigs.k8s.io/controller-runtime/pkg/event"
	"sigs.k8s.io/controller-runtime/pkg/reconcile"

	"github.com/cri-proxy/cri-proxy/api/apps/v1beta1"
	opsv1 "github.com/cri-proxy/cri-proxy/api/ops/v1"
	"github.com/cri-proxy/cri-proxy/controller/crew"
	"github.com/cri-proxy/cri-proxy/controller/kruise"
)

// stalePause lets the cache catch up.
const stalePause = 100 * time.Millisecond

// +kubebuilder:rbac:groups=apps.kruise.io,resources=imagepulljobs,verbs=get;list;watch;create;patch;delete
// +kubebuilder:rbac:groups=apps.kruise.io,resources=imagepulljobs/status,verbs=patch
// +kubebuilder:rbac:groups="",resources=nodes;pods,verbs=get;list;watch
// +kubebuilder:rbac:groups="",resources=secrets;serviceaccounts,verbs=get
// +kubebuilder:rbac:groups=events.k8s.io,resources=events,verbs=create;patch

// Reconciler carries out ImagePullJobs.
type Reconciler struct {
	// Client reads from the cache and writes.
	Client client.Client
	// APIReader reads past the cache: secrets are not kept.
	APIReader client.Reader
	// Nodes commands the nodes.
	Nodes Nodes
	// NodePort is the port for nodes without an address of their own in an annotation.
	NodePort int
	// Limits bound what jobs may ask.
	Limits Limits
	// Recorder writes Events; nil writes none.
	Recorder events.EventRecorder
	// Metrics may be nil.
	Metrics *Metrics
	// Log must be set.
	Log logrus.FieldLogger
	// Gate is closed while OpenKruise carries the jobs out; nil: it never is.
	Gate *kruise.Gate

	crew  *crew.Crew
	wakes chan wakeUp

	mu    sync.Mutex
	works map[types.NamespacedName]*work
}

// wakeUp makes the reconciler look at a job.
type wakeUp = event.TypedGenericEvent[*v1beta1.ImagePullJob]

// work is what is known of a job between two reconciles, and can be found out again after a restart. A job is
// reconciled by one worker at a time.
type work struct {
	uid types.UID
	run *run // nil when the job is not at work
	// written is the resourceVersion of the last write: what is older is not worth looking at.
	written uint64
	// dismissed is closed when the nodes have been told that the job is deleted; nil before they are.
	dismissed chan struct{}
	// invalid is what the user was told is wrong.
	invalid string
}

func (r *Reconciler) prepare() {
	r.crew, r.wakes, r.works = crew.New(r.Metrics.crew()), make(chan wakeUp), map[types.NamespacedName]*work{}
}

func (r *Reconciler) workOf(job *v1beta1.ImagePullJob) *work {
	key := client.ObjectKeyFromObject(job)
	r.mu.Lock()
	defer r.mu.Unlock()
	w := r.works[key]
	if w == nil || w.uid != job.UID {
		if w != nil && w.run != nil {
			w.run.close()
		}
		w = &work{uid: job.UID}
		r.works[key] = w
	}
	return w
}

func (r *Reconciler) forget(key types.NamespacedName) {
	r.mu.Lock()
	w := r.works[key]
	delete(r.works, key)
	r.mu.Unlock()
	if w != nil && w.run != nil {
		w.run.close()
	}
}

// standDown forgets all jobs, and says nothing more to nodes of them: they are somebody else's.
func (r *Reconciler) standDown() {
	r.mu.Lock()
	keys := slices.Collect(maps.Keys(r.works))
	r.mu.Unlock()
	for _, key := range keys {
		r.forget(key)
	}
}

// waker wakes the reconciler for a job.
func (r *Reconciler) waker(key types.NamespacedName) func() {
	return func() {
		r.crew.Do(func(ctx context.Context) {
			job := &v1beta1.ImagePullJob{}
			job.Namespace, job.Name = key.Namespace, key.Name
			select {
			case r.wakes <- wakeUp{Object: job}:
			case <-ctx.Done():
			}
		})
	}
}

// Reconcile takes one job as far as it goes and says when to look again.
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
		r: r, job: job, work: r.workOf(job), now: time.Now(),
		log: r.Log.WithFields(logrus.Fields{"job": req.String(), "image": job.Spec.Image}),
	}
	if p.stale() {
		return reconcile.Result{RequeueAfter: stalePause}, nil
	}
	var wait time.Duration
	var err error
	switch {
	case job.DeletionTimestamp != nil:
		wait, err = p.finalize(ctx)
	case job.Status.CompletionTime != nil && !beginsAnew(job):
		wait, err = p.retire(ctx)
	default:
		wait, err = p.advance(ctx)
	}
	switch {
	case apierrors.IsConflict(err):
		return reconcile.Result{RequeueAfter: stalePause}, nil
	case apierrors.IsNotFound(err):
		return reconcile.Result{}, nil // deleted meanwhile
	}
	return reconcile.Result{RequeueAfter: wait}, err
}

// pass is one reconcile of one job.
type pass struct {
	r    *Reconciler
	job  *v1beta1.ImagePullJob
	work *work
	now  time.Time
	log  logrus.FieldLogger
}

// stale says that the cache has not caught up with the last write.
func (p *pass) stale() bool {
	version, err := strconv.ParseUint(p.job.ResourceVersion, 10, 64)
	return err == nil && version < p.work.written
}

func (p *pass) wrote(object string) {
	p.r.Metrics.wrote(object)
	if version, err := strconv.ParseUint(p.job.ResourceVersion, 10, 64); err == nil {
		p.work.written = version
	}
}

// advance takes a job that has not ended a step further.
func (p *pass) advance(ctx context.Context) (time.Duration, error) {
	w, err := p.wish(ctx)
	var why *specError
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
	p.work.invalid = ""
	resume := p.job.Status.StartTime != nil
	again := p.job.Status.CompletionTime != nil
	if again || !resume {
		if err := p.start(ctx, w, again); err != nil {
			return 0, err
		}
	}
	w.begun = p.job.Status.StartTime.Time
	if p.work.run == nil {
		p.work.run = newRun(p.r, w, resume, again, p.r.waker(w.job))
		p.work.run.pace.last = p.now
	}
	p.work.run.apply(w)
	return p.conclude(ctx)
}

// wish is what the job wants. The error is a *specError if the user can correct it.
func (p *pass) wish(ctx context.Context) (*wish, error) {
	w, err := wishOf(p.job)
	if err != nil {
		return nil, err
	}
	w.bound(p.r.Limits)
	w.nodes, err = match(ctx, p.r.Client, p.job, p.r.NodePort)
	return w, err
}

// refuse says what is wrong with a job and leaves it until that is corrected.
func (p *pass) refuse(ctx context.Context, why *specError) (time.Duration, error) {
	if p.work.run != nil {
		p.work.run.close()
		p.work.run = nil
	}
	if p.work.invalid != why.Message {
		p.work.invalid = why.Message
		p.event(corev1.EventTypeWarning, eventInvalidSpec, why.Message)
	}
	next := p.job.Status.DeepCopy()
	next.ObservedGeneration = p.job.Generation
	next.Message = why.Message
	setCondition(next, v1beta1.ConditionComplete, false, completeInvalidSpec, why.Message)
	return 0, p.writeStatus(ctx, next)
}

// start notes that the job has been taken up, before any node is told.
func (p *pass) start(ctx context.Context, w *wish, again bool) error {
	begun := metav1.NewTime(p.now)
	next := &v1beta1.ImagePullJobStatus{
		StartTime: &begun, Desired: int32(len(w.nodes)), ObservedGeneration: p.job.Generation, ObservedWork: observedWork(p.job),
		ObservedEffort: observedEffort(p.job),
		Message:        messageNoNodes, Conditions: slices.Clone(p.job.Status.Conditions),
	}
	reason, message := withoutNodes(w.never)
	if len(w.nodes) > 0 {
		next.Message, next.Progress = fmt.Sprintf(messageProgress, 0.), "0%"
		reason, message = completePulling, ""
	}
	setCondition(next, v1beta1.ConditionComplete, false, reason, message)
	meta.RemoveStatusCondition(&next.Conditions, v1beta1.ConditionSucceeded)
	if err := p.writeStatus(ctx, next); err != nil {
		return err
	}
	text := fmt.Sprintf("pulling %s on %d nodes, at most %d at once", p.job.Spec.Image, len(w.nodes), w.limit())
	if again {
		text += ", again because the job was changed"
	}
	p.log.WithFields(logrus.Fields{"nodes": len(w.nodes), "parallelism": w.limit()}).Info("job begins")
	p.event(corev1.EventTypeNormal, eventStarted, text)
	return nil
}

// conclude writes what there is to write and says when to look again.
func (p *pass) conclude(ctx context.Context) (time.Duration, error) {
	u := p.work.run
	always := !u.wish.never
	var deadline time.Duration // until then; 0 means none
	late := false
	if s := p.job.Spec.CompletionPolicy.ActiveDeadlineSeconds; always && s != nil {
		deadline = u.wish.begun.Add(time.Duration(*s) * time.Second).Sub(p.now)
		late = deadline <= 0
	}

	u.mu.Lock()
	now := time.Now()
	next := u.report(&p.job.Status)
	next.ObservedGeneration, next.ObservedWork, next.ObservedEffort = p.job.Generation, observedWork(p.job), observedEffort(p.job)
	finished := u.finished()
	if early := u.wish.begun.Add(noNodesPatience).Sub(now); len(u.members) == 0 && early > 0 {
		finished, deadline = false, sooner(deadline, early)
	}
	n, idle := len(u.members), u.idle()
	if u.tellRunning(next); !apiequality.Semantic.DeepEqual(next.Conditions, p.job.Status.Conditions) {
		u.pace.moved(0)
	}
	due, wait := u.pace.due(now, n, idle)
	if next.ObservedGeneration != p.job.Status.ObservedGeneration {
		due = true
	}
	if look := u.nextLook(now); look > 0 {
		wait = sooner(wait, look)
	}
	pace := u.pace
	if due {
		u.pace.wrote(now, n, idle)
	}
	u.woken, u.planned = !due && wait > 0 && wait <= writeGap, time.Time{}
	if wait > 0 {
		u.planned = now.Add(wait)
	}
	u.mu.Unlock()

	if always && (finished || late) {
		return p.complete(ctx, next, late && !finished)
	}
	if deadline > 0 {
		wait = sooner(wait, deadline)
	}
	if !due {
		return wait, nil
	}
	u.announce(p.r.Recorder, p.job)
	if err := p.writeStatus(ctx, next); err != nil {
		u.mu.Lock()
		u.pace.undo(pace)
		u.mu.Unlock()
		return 0, err
	}
	if wait == 0 {
		wait = refreshFirst
	}
	return wait, nil
}

// complete ends a job.
func (p *pass) complete(ctx context.Context, next *v1beta1.ImagePullJobStatus, late bool) (time.Duration, error) {
	u := p.work.run
	reason := conclude(next, late, p.now)
	if late {
		u.mu.Lock()
		u.tellUnfinished(next)
		u.mu.Unlock()
	}
	if err := p.writeStatus(ctx, next); err != nil {
		return 0, err
	}
	u.announce(p.r.Recorder, p.job)
	u.close()
	if late {
		u.mu.Lock()
		u.dismiss(u.members, false, "activeDeadlineSeconds is over", func(int) {})
		u.mu.Unlock()
	}
	p.work.run = nil
	message := meta.FindStatusCondition(next.Conditions, v1beta1.ConditionComplete).Message
	kind, what := corev1.EventTypeNormal, eventCompleted
	if meta.IsStatusConditionFalse(next.Conditions, v1beta1.ConditionSucceeded) {
		kind, what = corev1.EventTypeWarning, eventIncomplete
	}
	p.event(kind, what, message)
	p.r.Metrics.completed(reason)
	p.log.WithFields(logrus.Fields{"nodes": next.Desired, "failed": next.Failed, "reason": reason}).Info("job completed")
	return p.retire(ctx)
}

// retire lets go of a job that has ended, and deletes it when its time has come.
func (p *pass) retire(ctx context.Context) (time.Duration, error) {
	// With the controller gone, a finalizer would keep the job's namespace for ever, for the sake of pins that end by themselves.
	if err := p.release(ctx); err != nil {
		return 0, err
	}
	if p.job.Status.ObservedWork != "" { // else it was another controller's
		next := p.job.Status.DeepCopy()
		next.ObservedGeneration = p.job.Generation // what was changed since does not begin it again
		if err := p.writeStatus(ctx, next); err != nil {
			return 0, err
		}
	}
	over := expiry(p.job)
	if over.IsZero() {
		return 0, nil
	}
	if wait := over.Sub(p.now); wait > 0 {
		return wait, nil
	}
	p.log.Info("deleting the job: ttlSecondsAfterFinished has passed")
	// One that has been edited since may begin anew.
	err := p.r.Client.Delete(ctx, p.job, client.Preconditions{UID: &p.job.UID, ResourceVersion: &p.job.ResourceVersion})
	if err == nil {
		p.r.Metrics.wrote("job")
	}
	return 0, client.IgnoreNotFound(err)
}

// expiry is when the time of a job that has ended is over; zero: never.
func expiry(job *v1beta1.ImagePullJob) time.Time {
	ttl := job.Spec.CompletionPolicy.TTLSecondsAfterFinished
	if ttl == nil {
		return time.Time{}
	}
	return job.Status.CompletionTime.Add(time.Duration(*ttl) * time.Second)
}

// pinnedUntil is when the last pin of a job that has ended ends by itself.
func pinnedUntil(job *v1beta1.ImagePullJob, limits Limits) time.Time {
	pin := maxSpan
	if w, err := wishOf(job); err == nil {
		w.bound(limits)
		pin = w.request.GetPinFor().AsDuration()
	}
	return job.Status.CompletionTime.Add(pin)
}

// deleted releases the pins of a job that somebody has deleted after its end, as far as nodes answer. The pins of one that
// is deleted because its time is over outlive it: what was pulled is to be used.
func (r *Reconciler) deleted(job *v1beta1.ImagePullJob) {
	now := time.Now()
	if job.Status.CompletionTime == nil || job.Annotations[v1beta1.KeepPinsAnnotation] != "" || !now.Before(pinnedUntil(job, r.Limits)) {
		return
	}
	if over := expiry(job); !over.IsZero() && !now.Before(over) {
		return
	}
	leave, open := r.Gate.Enter()
	if !open {
		return
	}
	defer leave()
	r.crew.Do(func(ctx context.Context) {
		u, err := r.leave(ctx, job)
		if err != nil {
			r.Log.WithError(err).WithField("job", client.ObjectKeyFromObject(job).String()).Warn("the pins of a deleted job were not released: they end by themselves")
			return
		}
		u.close()
		u.mu.Lock()
		defer u.mu.Unlock()
		u.dismiss(u.members, true, "the job was deleted", func(int) {})
	})
}

// leave is a run with all the nodes that a job may have chosen, to be told to leave it alone.
func (r *Reconciler) leave(ctx context.Context, job *v1beta1.ImagePullJob) (*run, error) {
	// The nodes that the job chose may not be the ones that it chooses now, with pods that have gone.
	job = job.DeepCopy()
	if podSelectorOf(job) != nil {
		job.Spec.PodSelector, job.Spec.Selector = nil, nil
	}
	w := &wish{job: client.ObjectKeyFromObject(job), uid: job.UID, request: &opsv1.PullRequest{Image: job.Spec.Image, Owner: owner(job)}}
	var err error
	var why *specError
	if w.nodes, err = match(ctx, r.Client, job, r.NodePort); err != nil && !errors.As(err, &why) {
		return nil, err
	}
	return newRun(r, w, false, false, func() {}), nil
}

// release takes the finalizers off.
func (p *pass) release(ctx context.Context) error {
	before := p.job.DeepCopy()
	p.job.Finalizers = slices.DeleteFunc(p.job.Finalizers, func(f string) bool {
		return f == v1beta1.PullFinalizer || f == v1beta1.DeletionProtectionFinalizer
	})
	return p.patch(ctx, before)
}

// finalize lets a deleted job go: its pulls are cancelled and its pins released on all nodes that answer within
// dismissPatience.
func (p *pass) finalize(ctx context.Context) (time.Duration, error) {
	key := client.ObjectKeyFromObject(p.job)
	if !slices.Contains(p.job.Finalizers, v1beta1.PullFinalizer) {
		p.r.forget(key)
		return 0, p.release(ctx)
	}
	if p.work.dismissed == nil && p.job.Status.StartTime != nil {
		if err := p.dismiss(ctx); err != nil {
			return 0, err
		}
	}
	left := p.job.DeletionTimestamp.Add(dismissPatience).Sub(p.now)
	if p.work.dismissed != nil && left > 0 {
		select {
		case <-p.work.dismissed:
		default:
			return left, nil
		}
	}
	p.r.forget(key)
	return 0, p.release(ctx)
}

// dismiss begins to tell the nodes of a deleted job.
func (p *pass) dismiss(ctx context.Context) error {
	if p.work.run == nil {
		var err error
		if p.work.run, err = p.r.leave(ctx, p.job); err != nil {
			return err
		}
	}
	done := make(chan struct{})
	p.work.dismissed = done
	u, wake := p.work.run, p.r.waker(client.ObjectKeyFromObject(p.job))
	u.close()
	u.mu.Lock()
	defer u.mu.Unlock()
	if len(u.members) == 0 {
		close(done)
		return nil
	}
	u.dismiss(u.members, true, "the job was deleted", func(int) {
		close(done)
		wake()
	})
	p.log.WithField("nodes", len(u.members)).Info("job deleted: cancelling its pulls and releasing its pins")
	return nil
}

// patch writes the change of metadata since before, if there is one, unless someone else wrote in between.
func (p *pass) patch(ctx context.Context, before *v1beta1.ImagePullJob) error {
	if apiequality.Semantic.DeepEqual(before, p.job) {
		return nil
	}
	err := p.r.Client.Patch(ctx, p.job, client.MergeFromWithOptions(before, client.MergeFromWithOptimisticLock{}))
	if err == nil {
		p.wrote("job")
	}
	return err
}

// writeStatus writes next if it differs.
func (p *pass) writeStatus(ctx context.Context, next *v1beta1.ImagePullJobStatus) error {
	tellReady(next)
	if apiequality.Semantic.DeepEqual(&p.job.Status, next) {
		return nil
	}
	before := p.job.DeepCopy()
	p.job.Status = *next
	if err := p.r.Client.Status().Patch(ctx, p.job, client.MergeFromWithOptions(before, client.MergeFromWithOptimisticLock{})); err != nil {
		return err
	}
	p.wrote("job status")
	return nil
}

// sooner is the smaller of two waits of which 0 means never.
func sooner(a, b time.Duration) time.Duration {
	if a == 0 || (b != 0 && b < a) {
		return b
	}
	return a
}
