// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package rollout

import (
	"context"
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
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/client-go/tools/events"
	"sigs.k8s.io/controller-runtime/pkg/client"
	"sigs.k8s.io/controller-runtime/pkg/reconcile"

	inplace "github.com/cri-proxy/cri-proxy/api/inplace/v1alpha1"
)

// followedAnnotation is on the rollout of an annotated workload: the generation of the workload whose images it has.
const followedAnnotation = "cri-proxy.io/followed-generation"

// FollowReconciler keeps one InPlaceRollout for each StatefulSet, or DaemonSet, that carries InPlaceAnnotation: it has the images of the
// template. Its strategy is the user's to change.
type FollowReconciler struct {
	// Client reads from the cache and writes.
	Client client.Client
	// Recorder writes Events; nil writes none.
	Recorder events.EventRecorder
	// Metrics may be nil.
	Metrics *Metrics
	// Log must be set.
	Log logrus.FieldLogger
	// Kind is StatefulSet or DaemonSet.
	Kind string

	mu sync.Mutex
	// told is what was last told of a workload.
	told map[types.UID]string
}

// follower is the name of the rollout of a workload.
func follower(kind, name string) string {
	full := strings.ToLower(kind) + "-" + name
	if len(full) > 253 {
		full = full[:240] + "-" + hash(full)
	}
	return full
}

// Reconcile brings the rollout of one workload up to date.
func (r *FollowReconciler) Reconcile(ctx context.Context, req reconcile.Request) (reconcile.Result, error) {
	err := r.follow(ctx, req.NamespacedName)
	if errors.Is(err, errHeld) {
		return reconcile.Result{RequeueAfter: blockedPause}, nil
	}
	if apierrors.IsConflict(err) || apierrors.IsAlreadyExists(err) {
		return reconcile.Result{RequeueAfter: stalePause}, nil
	}
	return reconcile.Result{}, client.IgnoreNotFound(err)
}

// read is the workload, its template, and whether its controller leaves its pods alone.
func (r *FollowReconciler) read(ctx context.Context, key types.NamespacedName) (client.Object, *corev1.PodTemplateSpec, bool, error) {
	if r.Kind == kindStatefulSet {
		s := &appsv1.StatefulSet{}
		err := r.Client.Get(ctx, key, s)
		return s, &s.Spec.Template, s.Spec.UpdateStrategy.Type == appsv1.OnDeleteStatefulSetStrategyType, err
	}
	d := &appsv1.DaemonSet{}
	err := r.Client.Get(ctx, key, d)
	return d, &d.Spec.Template, d.Spec.UpdateStrategy.Type == appsv1.OnDeleteDaemonSetStrategyType, err
}

func (r *FollowReconciler) follow(ctx context.Context, key types.NamespacedName) error {
	owner, template, onDelete, err := r.read(ctx, key)
	if err != nil || owner.GetDeletionTimestamp() != nil {
		return err // what it owns is collected
	}
	var rollout inplace.InPlaceRollout
	there := true
	if err := r.Client.Get(ctx, client.ObjectKey{Namespace: key.Namespace, Name: follower(r.Kind, key.Name)}, &rollout); apierrors.IsNotFound(err) {
		there = false
	} else if err != nil {
		return err
	}
	mine := there && metav1.IsControlledBy(&rollout, owner)
	switch wanted := owner.GetAnnotations()[inplace.InPlaceAnnotation] == "true"; {
	case !wanted && mine && rollout.DeletionTimestamp == nil:
		r.Log.WithField("rollout", rollout.Name).Info("the annotation is gone: deleting the rollout")
		if err = r.Client.Delete(ctx, &rollout, client.Preconditions{UID: &rollout.UID}); err == nil {
			r.Metrics.wrote("rollout")
		}
		return err
	case !wanted:
		return nil
	case !onDelete:
		r.tell(owner, corev1.EventTypeWarning, eventInvalid, fmt.Sprintf("annotation %s has no effect: set updateStrategy.type to OnDelete", inplace.InPlaceAnnotation))
		return nil
	case there && !mine:
		r.tell(owner, corev1.EventTypeWarning, eventInvalid, fmt.Sprintf("annotation %s has no effect: there is another InPlaceRollout %s", inplace.InPlaceAnnotation, rollout.Name))
		return nil
	case !there:
		return r.create(ctx, owner, template)
	}
	return r.update(ctx, &rollout, owner, template)
}

// wish are the containers of a template with their images.
func wish(template *corev1.PodTemplateSpec) []inplace.ContainerChange {
	images := templateImages(template)
	var list []inplace.ContainerChange
	for _, name := range sortedKeys(images) {
		list = append(list, inplace.ContainerChange{Name: name, Image: images[name]})
	}
	return list
}

func (r *FollowReconciler) create(ctx context.Context, owner client.Object, template *corev1.PodTemplateSpec) error {
	yes := true
	rollout := &inplace.InPlaceRollout{
		ObjectMeta: metav1.ObjectMeta{
			Namespace: owner.GetNamespace(), Name: follower(r.Kind, owner.GetName()),
			Annotations:     map[string]string{followedAnnotation: strconv.FormatInt(owner.GetGeneration(), 10)},
			OwnerReferences: []metav1.OwnerReference{{APIVersion: "apps/v1", Kind: r.Kind, Name: owner.GetName(), UID: owner.GetUID(), Controller: &yes}},
		},
		Spec: inplace.InPlaceRolloutSpec{
			Target:     inplace.Target{WorkloadRef: &inplace.WorkloadRef{APIVersion: "apps/v1", Kind: r.Kind, Name: owner.GetName()}},
			Containers: wish(template),
			Strategy:   inplace.Strategy{ProgressDeadlineSeconds: 600, OnFailure: inplace.Rollback, Order: inplace.StopFirst},
		},
	}
	if err := r.write(ctx, owner, rollout, func() error { return r.Client.Create(ctx, rollout) }); err != nil {
		return err
	}
	r.Metrics.wrote("rollout")
	r.tell(owner, corev1.EventTypeNormal, eventFollowing, "the pods follow the images of the template in place: see InPlaceRollout "+rollout.Name)
	return nil
}

// update brings the images of the template into the rollout, unless it is the rollout that has changed the template.
func (r *FollowReconciler) update(ctx context.Context, rollout *inplace.InPlaceRollout, owner client.Object, template *corev1.PodTemplateSpec) error {
	if rollout.DeletionTimestamp != nil {
		return nil
	}
	before := rollout.DeepCopy()
	if rollout.Annotations == nil {
		rollout.Annotations = map[string]string{}
	}
	generation := strconv.FormatInt(owner.GetGeneration(), 10)
	list := wish(template)
	revision := revisionOf(rollout)
	failed := rollout.Status.FailedRevision == revision
	same := apiequality.Semantic.DeepEqual(list, sortedChanges(rollout.Spec.Containers))
	switch {
	case failed && same && (rollout.Status.CompletionTime == nil || rollout.Annotations[followedAnnotation] == generation):
		return nil // the template is about to be put back
	case failed && same:
		// Somebody has put the images there again that had failed.
		rollout.Annotations[inplace.RetryAnnotation] = "generation " + generation
	case failed && isPrevious(rollout, list):
		return nil // it was put back
	case same:
		r.forget(owner)
		return nil
	}
	rollout.Spec.Containers, rollout.Annotations[followedAnnotation] = list, generation
	err := r.write(ctx, owner, rollout, func() error {
		return r.Client.Patch(ctx, rollout, client.MergeFromWithOptions(before, client.MergeFromWithOptimisticLock{}))
	})
	if err != nil {
		return err
	}
	r.Metrics.wrote("rollout")
	r.Log.WithField("rollout", rollout.Name).Info("the template has other images")
	return nil
}

// errHeld says that another rollout is at work on the containers. An Event names it.
var errHeld = errors.New("another rollout is at work")

// write writes a rollout, unless the webhook has refused that because another one is at work on the containers, and still would.
func (r *FollowReconciler) write(ctx context.Context, owner client.Object, rollout *inplace.InPlaceRollout, write func() error) error {
	_, err := checkRivals(ctx, r.Client, rollout)
	var why *specError
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
	case text == "" || !apierrors.IsBadRequest(err):
		return err
	}
	r.Log.WithField("rollout", rollout.Name).Info(text)
	r.tell(owner, corev1.EventTypeNormal, eventQueued, text)
	return errHeld
}

// isPrevious says that the images are those that a rollback puts back.
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

// hasTold says that this is what was last told of a workload.
func (r *FollowReconciler) hasTold(about client.Object, text string) bool {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.told[about.GetUID()] == text
}

// forget has whatever comes next told, be it what was told before.
func (r *FollowReconciler) forget(about client.Object) {
	r.mu.Lock()
	defer r.mu.Unlock()
	delete(r.told, about.GetUID())
}

// tell is an event that is told once.
func (r *FollowReconciler) tell(about client.Object, kind, reason, text string) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.told == nil {
		r.told = map[types.UID]string{}
	}
	if r.told[about.GetUID()] != text {
		r.told[about.GetUID()] = text
		announce(r.Recorder, about, kind, reason, text)
	}
}
