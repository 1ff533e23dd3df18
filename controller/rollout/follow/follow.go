// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

// Package follow keeps a rollout for each StatefulSet or DaemonSet whose annotation asks for it:
// the pods then follow the images of the template in place.
package follow

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"slices"
	"strconv"
	"strings"
	"sync"

	"github.com/sirupsen/logrus"
	appsv1 "k8s.io/api/apps/v1"
	corev1 "k8s.io/api/core/v1"
	apiequality "k8s.io/apimachinery/pkg/api/equality"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	"k8s.io/apimachinery/pkg/api/meta"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/apimachinery/pkg/util/intstr"
	"k8s.io/client-go/tools/events"
	"sigs.k8s.io/controller-runtime/pkg/client"
	"sigs.k8s.io/controller-runtime/pkg/reconcile"

	inplace "github.com/cri-proxy/cri-proxy/api/inplace/v1alpha1"
	"github.com/cri-proxy/cri-proxy/controller/apierror"
	"github.com/cri-proxy/cri-proxy/controller/objects"
	"github.com/cri-proxy/cri-proxy/controller/rollout/check"
	"github.com/cri-proxy/cri-proxy/controller/rollout/evaluate"
	"github.com/cri-proxy/cri-proxy/controller/rollout/notice"
	"github.com/cri-proxy/cri-proxy/controller/rollout/podtemplate"
	"github.com/cri-proxy/cri-proxy/controller/rollout/requeue"
	"github.com/cri-proxy/cri-proxy/controller/rollout/workload"
)

// Annotations of the rollout of an annotated workload.
const (
	// followedAnnotation is the generation of the workload whose images the rollout has.
	followedAnnotation = "cri-proxy.io/followed-generation"
	// followedRetry is the value of the workload's RetryAnnotation that the rollout has taken up.
	followedRetry = "cri-proxy.io/followed-retry"
)

// Reconciler keeps one InPlaceRollout for each StatefulSet or DaemonSet that has InPlaceAnnotation.
// The rollout gets the images of the workload's template. The user sets its strategy: in
// StrategyAnnotation, or in a rollout that is created before the annotation.
type Reconciler struct {
	// Client reads from the cache and writes.
	Client client.Client
	// Recorder writes Events; nil writes none.
	Recorder events.EventRecorder
	// Metrics may be nil.
	Metrics *notice.Metrics
	// Log must be set.
	Log logrus.FieldLogger
	// Kind is StatefulSet or DaemonSet.
	Kind string

	mu sync.Mutex
	// told is the last Event of each workload.
	told map[types.UID]string
}

// follower returns the name of the rollout of a workload.
func follower(kind, name string) string {
	full := strings.ToLower(kind) + "-" + name
	if len(full) > 253 {
		full = full[:240] + "-" + objects.Hash(full)
	}
	return full
}

// Reconcile brings the rollout of one workload up to date.
func (r *Reconciler) Reconcile(ctx context.Context, req reconcile.Request) (reconcile.Result, error) {
	err := r.follow(ctx, req.NamespacedName)
	if errors.Is(err, errHeld) {
		return reconcile.Result{RequeueAfter: requeue.BlockedInterval}, nil
	}
	if errors.Is(err, errRefused) {
		return reconcile.Result{RequeueAfter: requeue.ResyncPeriod}, nil
	}
	if apierrors.IsConflict(err) || apierrors.IsAlreadyExists(err) {
		return reconcile.Result{RequeueAfter: requeue.StaleInterval}, nil
	}
	return reconcile.Result{}, client.IgnoreNotFound(err)
}

// read returns the workload, its template, and whether its updateStrategy is OnDelete.
func (r *Reconciler) read(
	ctx context.Context, key types.NamespacedName,
) (client.Object, *corev1.PodTemplateSpec, bool, error) {
	if r.Kind == workload.KindStatefulSet {
		s := &appsv1.StatefulSet{}
		err := r.Client.Get(ctx, key, s)
		return s, &s.Spec.Template, s.Spec.UpdateStrategy.Type == appsv1.OnDeleteStatefulSetStrategyType, err
	}
	d := &appsv1.DaemonSet{}
	err := r.Client.Get(ctx, key, d)
	return d, &d.Spec.Template, d.Spec.UpdateStrategy.Type == appsv1.OnDeleteDaemonSetStrategyType, err
}

func (r *Reconciler) follow(ctx context.Context, key types.NamespacedName) error {
	owner, template, onDelete, err := r.read(ctx, key)
	if err != nil || owner.GetDeletionTimestamp() != nil {
		return err // what it owns is collected
	}
	var rollout inplace.InPlaceRollout
	there := true
	if err := r.Client.Get(ctx, client.ObjectKey{Namespace: key.Namespace, Name: follower(r.Kind, key.Name)},
		&rollout); apierrors.IsNotFound(err) {
		there = false
	} else if err != nil {
		return err
	}
	mine := there && metav1.IsControlledBy(&rollout, owner)
	wanted := owner.GetAnnotations()[inplace.InPlaceAnnotation] == "true"
	strategy, err := wantedStrategy(owner)
	switch {
	case !wanted && mine && rollout.DeletionTimestamp == nil:
		r.Log.WithField("rollout", rollout.Name).Info("the annotation is gone: deleting the rollout")
		if err = r.Client.Delete(ctx, &rollout, client.Preconditions{UID: &rollout.UID}); err == nil {
			r.Metrics.Wrote("rollout")
		}
		return err
	case !wanted:
		return nil
	case !onDelete:
		r.tell(owner, corev1.EventTypeWarning, notice.EventInvalid,
			fmt.Sprintf("annotation %s has no effect: set updateStrategy.type to OnDelete", inplace.InPlaceAnnotation))
		return nil
	case err != nil:
		r.tell(owner, corev1.EventTypeWarning, notice.EventInvalid,
			fmt.Sprintf("the pods do not follow the images of the template: annotation %s: %s",
				inplace.StrategyAnnotation, err))
		return nil
	case !there:
		return r.create(ctx, owner, template, strategy)
	case !mine && !r.adoptable(&rollout, owner):
		r.tell(owner, corev1.EventTypeWarning, notice.EventInvalid,
			fmt.Sprintf("annotation %s has no effect: there is another InPlaceRollout %s", inplace.InPlaceAnnotation,
				rollout.Name))
		return nil
	}
	return r.update(ctx, &rollout, owner, template, strategy)
}

// wantedStrategy returns the strategy in the annotation of a workload; nil if there is none.
func wantedStrategy(owner client.Object) (*inplace.Strategy, error) {
	text := owner.GetAnnotations()[inplace.StrategyAnnotation]
	if text == "" {
		return nil, nil
	}
	s := defaultStrategy()
	most := s.MaxUnavailable
	s.MaxUnavailable = nil // a number under a text would stay in it
	decoder := json.NewDecoder(strings.NewReader(text))
	decoder.DisallowUnknownFields()
	err := decoder.Decode(&s)
	if err == nil && decoder.More() {
		err = errors.New("there is more behind it")
	}
	if err != nil {
		return nil, fmt.Errorf("%q is not the strategy of an InPlaceRollout in JSON, such as {\"maxUnavailable\": "+
			"2, \"onFailure\": \"Pause\"}: %w", text, err)
	}
	if s.MaxUnavailable == nil {
		s.MaxUnavailable = most
	}
	return &s, nil
}

// defaultStrategy returns what the schema makes of an empty strategy.
func defaultStrategy() inplace.Strategy {
	one := intstr.FromInt32(1)
	return inplace.Strategy{MaxUnavailable: &one, ProgressDeadlineSeconds: 600, OnFailure: inplace.Rollback,
		Order: inplace.StopFirst}
}

// adoptable returns true if somebody has created the rollout for the workload beforehand, to set
// its strategy.
func (r *Reconciler) adoptable(rollout *inplace.InPlaceRollout, owner client.Object) bool {
	ref := rollout.Spec.Target.WorkloadRef
	return metav1.GetControllerOf(rollout) == nil && ref != nil && ref.Kind == r.Kind && ref.Name == owner.GetName()
}

func (r *Reconciler) ownerOf(owner client.Object) metav1.OwnerReference {
	yes := true
	return metav1.OwnerReference{APIVersion: "apps/v1", Kind: r.Kind, Name: owner.GetName(), UID: owner.GetUID(),
		Controller: &yes}
}

// changesOf returns the containers of a template with their images.
func changesOf(template *corev1.PodTemplateSpec) []inplace.ContainerChange {
	images := podtemplate.Images(template)
	var list []inplace.ContainerChange
	for _, name := range objects.SortedKeys(images) {
		list = append(list, inplace.ContainerChange{Name: name, Image: images[name]})
	}
	return list
}

func (r *Reconciler) create(
	ctx context.Context, owner client.Object, template *corev1.PodTemplateSpec, strategy *inplace.Strategy,
) error {
	if strategy == nil {
		s := defaultStrategy()
		strategy = &s
	}
	rollout := &inplace.InPlaceRollout{
		ObjectMeta: metav1.ObjectMeta{
			Namespace: owner.GetNamespace(), Name: follower(r.Kind, owner.GetName()),
			Annotations:     map[string]string{followedAnnotation: strconv.FormatInt(owner.GetGeneration(), 10)},
			OwnerReferences: []metav1.OwnerReference{r.ownerOf(owner)},
		},
		Spec: inplace.InPlaceRolloutSpec{
			Target: inplace.Target{WorkloadRef: &inplace.WorkloadRef{APIVersion: "apps/v1", Kind: r.Kind,
				Name: owner.GetName()}},
			Containers: changesOf(template),
			Strategy:   *strategy,
		},
	}
	if retry := owner.GetAnnotations()[inplace.RetryAnnotation]; retry != "" {
		rollout.Annotations[inplace.RetryAnnotation], rollout.Annotations[followedRetry] = retry, retry
	}
	if at := template.Annotations[evaluate.RestartedAt]; at != "" {
		rollout.Annotations[evaluate.RestartedAt] = at
	}
	if err := r.write(ctx, owner, rollout, func() error { return r.Client.Create(ctx, rollout) }); err != nil {
		return err
	}
	r.Metrics.Wrote("rollout")
	r.tell(owner, corev1.EventTypeNormal, notice.EventFollowing,
		"the pods follow the images of the template in place: see InPlaceRollout "+rollout.Name)
	return nil
}

// update writes the images of the template into the rollout, unless the rollout itself has changed
// the template. If somebody sets images that have failed again, they are not tried again: a GitOps
// controller would do that without end.
func (r *Reconciler) update(ctx context.Context, rollout *inplace.InPlaceRollout, owner client.Object,
	template *corev1.PodTemplateSpec, strategy *inplace.Strategy) error {
	if rollout.DeletionTimestamp != nil {
		return nil
	}
	before := rollout.DeepCopy()
	if rollout.Annotations == nil {
		rollout.Annotations = map[string]string{}
	}
	notes := rollout.Annotations
	adopted := !metav1.IsControlledBy(rollout, owner)
	if adopted {
		rollout.OwnerReferences = append(rollout.OwnerReferences, r.ownerOf(owner))
		rollout.Spec.TTLSecondsAfterFinished = nil // it is there as long as the workload
	}
	if strategy != nil {
		rollout.Spec.Strategy = *strategy
	}
	retry := owner.GetAnnotations()[inplace.RetryAnnotation]
	again := retry != notes[followedRetry]
	if again {
		if notes[followedRetry] = retry; retry == "" {
			delete(notes, followedRetry)
			again = false // nobody asks for anything
		} else {
			notes[inplace.RetryAnnotation] = retry
		}
	}
	list := changesOf(template)
	failed := rollout.Status.FailedRevision == evaluate.RevisionOf(before)
	same := apiequality.Semantic.DeepEqual(list, sortedChanges(rollout.Spec.Containers))
	at := template.Annotations[evaluate.RestartedAt]
	take := false
	switch {
	case again:
		take = true
	case failed && same && rollout.Status.CompletionTime == nil: // the template is about to be put back
	case failed && same:
		if told, err := r.leave(ctx, before, owner, list); told || err != nil {
			return err // what else there is comes with the event of that write
		}
	case failed && isPrevious(rollout, list):
		take = r.wantedAgain(rollout, owner)
	default:
		take = !same || at != notes[evaluate.RestartedAt]
	}
	if take {
		if notes[evaluate.RestartedAt] = at; at == "" {
			delete(notes, evaluate.RestartedAt)
		}
		rollout.Spec.Containers, notes[followedAnnotation] = list, strconv.FormatInt(owner.GetGeneration(), 10)
		delete(notes, workload.PutBackAnnotation)
	}
	if apiequality.Semantic.DeepEqual(before, rollout) {
		if same && !failed {
			r.forget(owner)
		}
		return nil
	}
	err := r.write(ctx, owner, rollout, func() error {
		return r.Client.Patch(ctx, rollout, client.MergeFromWithOptions(before, client.MergeFromWithOptimisticLock{}))
	})
	if err != nil {
		return err
	}
	r.Metrics.Wrote("rollout")
	switch {
	case adopted:
		r.tell(owner, corev1.EventTypeNormal, notice.EventFollowing,
			"the pods follow the images of the template in place: InPlaceRollout "+rollout.Name+" was there and is "+
				"taken over")
	case take && same:
		r.tell(owner, corev1.EventTypeNormal, notice.EventFollowing,
			"all containers of the pods are restarted in place: see InPlaceRollout "+rollout.Name)
	case take:
		r.Log.WithField("rollout", rollout.Name).Info("the template has other images")
	}
	return nil
}

// leave tells people that the template has images again that have failed, and that they are not
// tried again. It returns true if it has written that into the status.
func (r *Reconciler) leave(
	ctx context.Context, rollout *inplace.InPlaceRollout, owner client.Object, list []inplace.ContainerChange,
) (bool, error) {
	record, _, _ := strings.Cut(rollout.Annotations[workload.PutBackAnnotation], " ")
	if generation, err := strconv.ParseInt(record, 10, 64); err == nil && owner.GetGeneration() <= generation {
		return false, nil // the cache does not show yet that it was put back
	}
	if c := meta.FindStatusCondition(rollout.Status.Conditions, inplace.ConditionComplete); c != nil &&
		c.Reason == inplace.ReasonNotRetried {
		return false, nil
	}
	why := ""
	if f := rollout.Status.Failures; len(f) > 0 {
		why = fmt.Sprintf(" (%s: %s: %s)", notice.Subject(f[0]), f[0].Reason, f[0].Message)
	}
	text := fmt.Sprintf("what has failed%s is in the template of %s %s again: %s. It is not tried again until "+
		"another image is set, or annotation %s of the %s is changed; "+
		"the pods keep what they have, new ones get what the template has", objects.Clip(why, 500), r.Kind,
		owner.GetName(), notice.Describe(list), inplace.RetryAnnotation, r.Kind)
	before := rollout.DeepCopy()
	next := &rollout.Status
	next.Message = text
	notice.SetCondition(next, inplace.ConditionComplete, false, inplace.ReasonNotRetried, text)
	notice.SetCondition(next, inplace.ConditionProgressing, false, inplace.ReasonNotRetried, text)
	if err := r.Client.Status().Patch(ctx, rollout, client.MergeFromWithOptions(before,
		client.MergeFromWithOptimisticLock{})); err != nil {
		return false, err
	}
	r.Metrics.Wrote("rollout status")
	r.Log.WithField("rollout", rollout.Name).Info(text)
	r.tell(owner, corev1.EventTypeWarning, inplace.ReasonNotRetried, text)
	notice.Announce(r.Recorder, rollout, corev1.EventTypeWarning, inplace.ReasonNotRetried, text)
	return true, nil
}

// wantedAgain returns true if the template has the images from before the failure because somebody
// wants them, and not because the rollback has written them. A new generation alone does not say
// that: other fields of the spec may have changed. kubectl apply of what is there already makes no
// new generation, but changes its own annotation.
func (r *Reconciler) wantedAgain(rollout *inplace.InPlaceRollout, owner client.Object) bool {
	record, hashes, _ := strings.Cut(rollout.Annotations[workload.PutBackAnnotation], " ")
	shape, applied, _ := strings.Cut(hashes, " ")
	generation, err := strconv.ParseInt(record, 10, 64)
	c := meta.FindStatusCondition(rollout.Status.Conditions, inplace.ConditionComplete)
	switch {
	case c != nil && c.Reason == inplace.ReasonNotRetried:
		return true // somebody had set the failed ones again
	case err != nil, owner.GetGeneration() < generation:
		return false
	case applied != workload.AppliedTo(owner):
		return true
	case owner.GetGeneration() == generation:
		return false
	case shape == workload.ShapeOf(owner):
		return true
	}
	rollout.Annotations[workload.PutBackAnnotation] = workload.PutBack(owner, owner.GetGeneration())
	return false
}

// errHeld: another rollout is at work on the containers. An Event names it.
var errHeld = errors.New("another rollout is at work")

// errRefused: the API server refuses the rollout. An Event says why.
var errRefused = errors.New("the rollout is refused")

// write writes a rollout. If the webhook has refused it because another rollout is at work on the
// containers, and that one still is, write returns errHeld without a try.
func (r *Reconciler) write(
	ctx context.Context, owner client.Object, rollout *inplace.InPlaceRollout, write func() error,
) error {
	_, err := check.Rivals(ctx, r.Client, rollout)
	var why *apierror.SpecError
	text := ""
	if errors.As(err, &why) {
		text = "the pods do not follow the images of the template yet: " + why.Message
	} else if err != nil {
		return err
	}
	if text != "" && r.hasTold(owner, text) {
		return errHeld
	}
	switch err := write(); {
	case err == nil:
		r.forget(owner)
		return nil
	case apierrors.IsBadRequest(err) && text != "":
	case apierrors.IsBadRequest(err), apierrors.IsInvalid(err), apierrors.IsForbidden(err):
		text = fmt.Sprintf("the pods do not follow the template: InPlaceRollout %s cannot be written: %s", rollout.Name,
			err)
		r.Log.WithField("rollout", rollout.Name).Warn(text)
		r.tell(owner, corev1.EventTypeWarning, notice.EventInvalid, text)
		return errRefused
	default:
		return err
	}
	r.Log.WithField("rollout", rollout.Name).Info(text)
	r.tell(owner, corev1.EventTypeNormal, notice.EventQueued, text)
	return errHeld
}

// isPrevious returns true if the images are those that a rollback puts back.
func isPrevious(rollout *inplace.InPlaceRollout, list []inplace.ContainerChange) bool {
	for _, c := range list {
		want := rollout.Status.PreviousImages[c.Name]
		if want == "" {
			want = rollout.Status.TargetImages[c.Name]
		}
		if c.Image != want {
			return false
		}
	}
	return len(list) == len(rollout.Spec.Containers)
}

func sortedChanges(list []inplace.ContainerChange) []inplace.ContainerChange {
	list = slices.Clone(list)
	slices.SortFunc(list, func(a, b inplace.ContainerChange) int { return strings.Compare(a.Name, b.Name) })
	return list
}

// hasTold returns true if text was the last Event of a workload.
func (r *Reconciler) hasTold(about client.Object, text string) bool {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.told[about.GetUID()] == text
}

// forget makes sure that the next Event is written, even if it repeats the last one.
func (r *Reconciler) forget(about client.Object) {
	r.mu.Lock()
	defer r.mu.Unlock()
	delete(r.told, about.GetUID())
}

// tell writes an Event, unless it repeats the last one.
func (r *Reconciler) tell(about client.Object, kind, reason, text string) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.told == nil {
		r.told = map[types.UID]string{}
	}
	if r.told[about.GetUID()] != text {
		r.told[about.GetUID()] = text
		notice.Announce(r.Recorder, about, kind, reason, text)
	}
}
