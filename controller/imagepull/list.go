// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package imagepull

import (
	"context"
	"fmt"
	"maps"
	"slices"
	"strings"
	"time"

	"github.com/sirupsen/logrus"
	corev1 "k8s.io/api/core/v1"
	apiequality "k8s.io/apimachinery/pkg/api/equality"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	"k8s.io/apimachinery/pkg/api/meta"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime/schema"
	"k8s.io/client-go/tools/events"
	"sigs.k8s.io/controller-runtime/pkg/builder"
	"sigs.k8s.io/controller-runtime/pkg/client"
	"sigs.k8s.io/controller-runtime/pkg/event"
	"sigs.k8s.io/controller-runtime/pkg/manager"
	"sigs.k8s.io/controller-runtime/pkg/predicate"
	"sigs.k8s.io/controller-runtime/pkg/reconcile"

	"github.com/cri-proxy/cri-proxy/api/apps/v1beta1"
	"github.com/cri-proxy/cri-proxy/controller/apierror"
	"github.com/cri-proxy/cri-proxy/controller/kruise"
	"github.com/cri-proxy/cri-proxy/controller/kstatus"
)

// Reasons of Events.
const (
	eventCreatedJob = "ImagePullJobCreated"
	eventDeletedJob = "ImagePullJobDeleted"
	eventForeignJob = "ImagePullJobExists"
	eventDeniedJob  = "ImagePullJobDenied"
	eventListAction = "Sync"
)

var listKind = schema.GroupVersionKind{Group: v1beta1.GroupVersion.Group, Version: v1beta1.GroupVersion.Version, Kind: "ImageListPullJob"}

// +kubebuilder:rbac:groups=apps.kruise.io,resources=imagelistpulljobs,verbs=get;list;watch;patch;delete
// +kubebuilder:rbac:groups=apps.kruise.io,resources=imagelistpulljobs/status,verbs=patch
// +kubebuilder:rbac:groups=apps.kruise.io,resources=imagelistpulljobs/finalizers,verbs=update

// ListReconciler carries out ImageListPullJobs: it makes an ImagePullJob of each image. The name of a child follows
// from the image and the template, so that none is made twice.
type ListReconciler struct {
	// Client reads from the cache and writes.
	Client client.Client
	// Recorder writes Events; nil writes none.
	Recorder events.EventRecorder
	// Metrics may be nil.
	Metrics *Metrics
	// Log must be set.
	Log logrus.FieldLogger
	// Gate is closed while OpenKruise carries the lists out; nil: it never is.
	Gate *kruise.Gate
}

// SetupWithManager adds the reconciler to a manager with the given number of workers.
func (r *ListReconciler) SetupWithManager(_ context.Context, m manager.Manager, workers int) error {
	return builder.ControllerManagedBy(m).
		Named("imagelistpulljob").
		For(&v1beta1.ImageListPullJob{}, builder.WithPredicates(jobChanges())).
		Owns(&v1beta1.ImagePullJob{}, builder.WithPredicates(childChanges())).
		WithOptions(options(workers)).
		Complete(apierror.Tell(r, func() client.Object { return &v1beta1.ImageListPullJob{} }, m.GetClient(), r.Recorder))
}

// childChanges leaves out what the list does not count.
func childChanges() predicate.Predicate {
	return predicate.Funcs{
		UpdateFunc: func(e event.UpdateEvent) bool {
			before, ok1 := e.ObjectOld.(*v1beta1.ImagePullJob)
			after, ok2 := e.ObjectNew.(*v1beta1.ImagePullJob)
			return !ok1 || !ok2 || (before.DeletionTimestamp == nil) != (after.DeletionTimestamp == nil) ||
				childDone(before) != childDone(after) || (before.Status.Active > 0) != (after.Status.Active > 0) ||
				before.Status.Failed != after.Status.Failed || (childWhy(before) == "") != (childWhy(after) == "") || before.Generation != after.Generation
		},
	}
}

// childDone says that all nodes of a child are done.
func childDone(child *v1beta1.ImagePullJob) bool {
	s := &child.Status
	if child.Spec.CompletionPolicy.Type != v1beta1.Never {
		return s.CompletionTime != nil
	}
	return s.StartTime != nil && s.Desired == s.Succeeded+s.Failed
}

// childSucceeded says that all nodes of a child that is done have the image.
func childSucceeded(child *v1beta1.ImagePullJob) bool {
	return child.Status.Failed == 0 && !meta.IsStatusConditionFalse(child.Status.Conditions, v1beta1.ConditionSucceeded)
}

// childWhy is what a child says that has not come to its end, of nodes that try again; or empty.
func childWhy(child *v1beta1.ImagePullJob) string {
	if c := meta.FindStatusCondition(child.Status.Conditions, v1beta1.ConditionComplete); c != nil && c.Status == metav1.ConditionFalse && c.Reason == completePulling {
		return c.Message
	}
	return ""
}

// Reconcile takes one list as far as it goes and says when to look again.
func (r *ListReconciler) Reconcile(ctx context.Context, req reconcile.Request) (reconcile.Result, error) {
	leave, open := r.Gate.Enter()
	if !open {
		return reconcile.Result{RequeueAfter: kruise.StandBy}, nil
	}
	defer leave()
	list := &v1beta1.ImageListPullJob{}
	if err := r.Client.Get(ctx, req.NamespacedName, list); err != nil {
		return reconcile.Result{}, client.IgnoreNotFound(err)
	}
	if list.DeletionTimestamp != nil {
		return reconcile.Result{}, nil // its children are garbage collected
	}
	children, err := r.children(ctx, list)
	if err != nil {
		return reconcile.Result{}, err
	}
	var wait time.Duration
	if list.Status.CompletionTime == nil || list.Status.ObservedWork != "" && list.Status.ObservedWork != listWork(list) {
		wait, err = r.advance(ctx, list, children)
	} else {
		err = r.observe(ctx, list)
	}
	if err == nil && list.Status.CompletionTime != nil {
		wait, err = r.retire(ctx, list, children)
	}
	switch {
	case apierrors.IsConflict(err):
		return reconcile.Result{RequeueAfter: stalePause}, nil
	case apierrors.IsNotFound(err):
		return reconcile.Result{}, nil
	}
	return reconcile.Result{RequeueAfter: wait}, err
}

// children are the list's, by name.
func (r *ListReconciler) children(ctx context.Context, list *v1beta1.ImageListPullJob) (map[string]*v1beta1.ImagePullJob, error) {
	var all v1beta1.ImagePullJobList
	if err := r.Client.List(ctx, &all, client.InNamespace(list.Namespace)); err != nil {
		return nil, err
	}
	children := map[string]*v1beta1.ImagePullJob{}
	for i := range all.Items {
		if metav1.IsControlledBy(&all.Items[i], list) {
			children[all.Items[i].Name] = &all.Items[i]
		}
	}
	return children, nil
}

// listWork identifies what the status of a list is about. A list that has ended begins again when it is changed.
func listWork(list *v1beta1.ImageListPullJob) string {
	return hash(list.Spec.Images, templateHash(list))
}

// missingPause is after how long a child that could not be made is tried again.
const missingPause = 30 * time.Second

// advance makes the children what the list says, and counts them. It says after what time to look again.
func (r *ListReconciler) advance(ctx context.Context, list *v1beta1.ImageListPullJob, children map[string]*v1beta1.ImagePullJob) (wait time.Duration, err error) {
	before := list.DeepCopy()
	list.Labels = maps.Clone(list.Labels)
	if list.Labels == nil {
		list.Labels = map[string]string{}
	}
	if list.Labels[v1beta1.TemplateHashLabel] = templateHash(list); !apiequality.Semantic.DeepEqual(before.Labels, list.Labels) {
		if err := r.Client.Patch(ctx, list, client.MergeFromWithOptions(before, client.MergeFromWithOptimisticLock{})); err != nil {
			return 0, err
		}
		r.Metrics.wrote("list")
	}
	next := &v1beta1.ImageListPullJobStatus{
		StartTime: list.Status.StartTime, Desired: int32(len(list.Spec.Images)), ObservedWork: listWork(list),
		ObservedGeneration: list.Generation, Conditions: slices.Clone(list.Status.Conditions),
	}
	if next.StartTime == nil {
		now := metav1.Now()
		next.StartTime = &now
	}
	wanted, blocked, again := map[string]bool{}, "", ""
	for _, image := range list.Spec.Images {
		name := childName(list, image)
		wanted[name] = true
		child := children[name]
		if child == nil {
			missing, err := r.create(ctx, list, name, image)
			if err != nil {
				return 0, err
			}
			if missing != "" {
				wait, blocked = missingPause, missing
				next.FailedImageStatuses = append(next.FailedImageStatuses, &v1beta1.FailedImageStatus{ImagePullJob: name, Name: image, Message: shorten(missing)})
			}
			continue
		}
		count(next, child)
		if why := childWhy(child); why != "" && again == "" {
			again = image + ": " + why
		}
	}
	for _, name := range slices.Sorted(maps.Keys(children)) {
		if child := children[name]; !wanted[name] && child.DeletionTimestamp == nil {
			if err := r.Client.Delete(ctx, child, client.Preconditions{UID: &child.UID}); client.IgnoreNotFound(err) != nil {
				return 0, err
			}
			r.Metrics.wrote("job")
			r.event(list, corev1.EventTypeNormal, eventDeletedJob, fmt.Sprintf("deleted ImagePullJob %s: the list no longer says so", name))
		}
	}
	if list.Spec.CompletionPolicy.Type != v1beta1.Never && next.Completed == next.Desired {
		now := metav1.Now()
		next.CompletionTime = &now
	}
	tellListReady(next, blocked, again)
	if apiequality.Semantic.DeepEqual(&list.Status, next) {
		return wait, nil
	}
	before = list.DeepCopy()
	list.Status = *next
	if err := r.Client.Status().Patch(ctx, list, client.MergeFromWithOptions(before, client.MergeFromWithOptimisticLock{})); err != nil {
		return 0, err
	}
	r.Metrics.wrote("list status")
	if next.CompletionTime != nil {
		kind := corev1.EventTypeNormal
		if next.Succeeded < next.Desired {
			kind = corev1.EventTypeWarning
		}
		r.event(list, kind, eventCompleted, fmt.Sprintf("%d of %d images are on all nodes", next.Succeeded, next.Desired))
		r.Log.WithFields(logrus.Fields{"list": client.ObjectKeyFromObject(list).String(), "images": next.Desired, "succeeded": next.Succeeded}).Info("list completed")
	}
	return wait, nil
}

// tellListReady says for kstatus how the list stands; blocked is what keeps it from ever ending, again what keeps nodes trying.
func tellListReady(s *v1beta1.ImageListPullJobStatus, blocked, again string) {
	standing, reason, message := kstatus.AtWork, completePulling, again
	switch {
	case blocked != "":
		standing, reason, message = kstatus.Failed, eventForeignJob, blocked
	case s.Completed < s.Desired:
	case s.Succeeded < s.Desired:
		standing, reason = kstatus.Failed, completeNodesFailed
		message = fmt.Sprintf("%d of %d images are on all nodes", s.Succeeded, s.Desired)
	default:
		standing, reason = kstatus.Current, completeSucceeded
		message = fmt.Sprintf("all %d images are on all nodes", s.Desired)
	}
	kstatus.Set(&s.Conditions, s.ObservedGeneration, standing, reason, message)
}

// observe notes that a list which has ended was changed in what does not begin it again.
func (r *ListReconciler) observe(ctx context.Context, list *v1beta1.ImageListPullJob) error {
	if list.Status.ObservedWork == "" || list.Status.ObservedGeneration == list.Generation {
		return nil
	}
	before := list.DeepCopy()
	list.Status.ObservedGeneration = list.Generation
	tellListReady(&list.Status, "", "")
	err := r.Client.Status().Patch(ctx, list, client.MergeFromWithOptions(before, client.MergeFromWithOptimisticLock{}))
	if err == nil {
		r.Metrics.wrote("list status")
	}
	return err
}

// count adds a child to the status.
func count(next *v1beta1.ImageListPullJobStatus, child *v1beta1.ImagePullJob) {
	s := &child.Status
	if s.Active > 0 {
		next.Active++
	}
	if childDone(child) {
		next.Completed++
		if childSucceeded(child) {
			next.Succeeded++
		}
	}
	if s.Failed > 0 || childDone(child) && !childSucceeded(child) {
		message := fmt.Sprintf("failed on %d of %d nodes", s.Failed, s.Desired)
		if c := meta.FindStatusCondition(s.Conditions, v1beta1.ConditionSucceeded); s.Failed == 0 && c != nil {
			message = c.Message
		}
		if text := reasonsText(s); text != "" {
			message += ": " + text
		}
		next.FailedImageStatuses = append(next.FailedImageStatuses, &v1beta1.FailedImageStatus{
			ImagePullJob: child.Name, Name: child.Spec.Image, Message: shorten(message),
		})
	}
}

// childOf is the job for an image of a list.
func childOf(list *v1beta1.ImageListPullJob, name, image string) *v1beta1.ImagePullJob {
	child := &v1beta1.ImagePullJob{
		ObjectMeta: metav1.ObjectMeta{
			Namespace: list.Namespace, Name: name,
			Labels:          map[string]string{v1beta1.TemplateHashLabel: templateHash(list)},
			Annotations:     childAnnotations(list),
			OwnerReferences: []metav1.OwnerReference{*metav1.NewControllerRef(list, listKind)},
		},
		Spec: v1beta1.ImagePullJobSpec{Image: image, ImagePullJobTemplate: *list.Spec.ImagePullJobTemplate.DeepCopy()},
	}
	// A child lives as long as the list: were it deleted before its siblings are done, it would be missing.
	child.Spec.CompletionPolicy.TTLSecondsAfterFinished = nil
	return child
}

// create makes a child. missing says why there is none: another object has its name, or the API server does not have it.
func (r *ListReconciler) create(ctx context.Context, list *v1beta1.ImageListPullJob, name, image string) (missing string, err error) {
	child := childOf(list, name, image)
	err = r.Client.Create(ctx, child)
	if apierrors.IsAlreadyExists(err) {
		var there v1beta1.ImagePullJob
		if err := r.Client.Get(ctx, client.ObjectKeyFromObject(child), &there); err != nil {
			return "", client.IgnoreNotFound(err) // the cache lags
		}
		if metav1.IsControlledBy(&there, list) {
			return "", nil
		}
		missing = fmt.Sprintf("there is an ImagePullJob %s of somebody else's: delete or rename it", name)
		r.tellMissing(list, eventForeignJob, name, missing)
		return missing, nil
	}
	if words, ok := apierror.Denied(err); ok {
		missing = fmt.Sprintf("the API server does not let ImagePullJob %s be made: %s", name, words)
		r.tellMissing(list, eventDeniedJob, name, missing)
		return missing, nil
	}
	if err != nil {
		return "", err
	}
	r.Metrics.wrote("job")
	r.event(list, corev1.EventTypeNormal, eventCreatedJob, fmt.Sprintf("created ImagePullJob %s for %s", name, image))
	return "", nil
}

// tellMissing says why a child is missing, unless the status of the list has said so before.
func (r *ListReconciler) tellMissing(list *v1beta1.ImageListPullJob, reason, child, text string) {
	if !slices.ContainsFunc(list.Status.FailedImageStatuses, func(f *v1beta1.FailedImageStatus) bool {
		return f.ImagePullJob == child && f.Message == shorten(text)
	}) {
		r.event(list, corev1.EventTypeWarning, reason, text)
	}
}

// retire deletes a list whose time is over, with its children. Their pins outlive them, as those of a job that is
// deleted because its own time is over.
func (r *ListReconciler) retire(ctx context.Context, list *v1beta1.ImageListPullJob, children map[string]*v1beta1.ImagePullJob) (time.Duration, error) {
	ttl := list.Spec.CompletionPolicy.TTLSecondsAfterFinished
	if ttl == nil {
		return 0, nil
	}
	if left := time.Until(list.Status.CompletionTime.Add(time.Duration(*ttl) * time.Second)); left > 0 {
		return left, nil
	}
	for _, name := range slices.Sorted(maps.Keys(children)) {
		child := children[name]
		if child.Annotations[v1beta1.KeepPinsAnnotation] != "" || child.Status.CompletionTime == nil {
			continue
		}
		before := child.DeepCopy()
		child.Annotations = maps.Clone(child.Annotations)
		if child.Annotations == nil {
			child.Annotations = map[string]string{}
		}
		child.Annotations[v1beta1.KeepPinsAnnotation] = "true"
		if err := r.Client.Patch(ctx, child, client.MergeFromWithOptions(before, client.MergeFromWithOptimisticLock{})); client.IgnoreNotFound(err) != nil {
			return 0, err
		}
		r.Metrics.wrote("job")
	}
	r.Log.WithField("list", client.ObjectKeyFromObject(list).String()).Info("deleting the list: ttlSecondsAfterFinished has passed")
	// One that has been edited since may begin anew.
	err := r.Client.Delete(ctx, list, client.Preconditions{UID: &list.UID, ResourceVersion: &list.ResourceVersion}, client.PropagationPolicy(metav1.DeletePropagationBackground))
	if err == nil {
		r.Metrics.wrote("list")
	}
	return 0, client.IgnoreNotFound(err)
}

func (r *ListReconciler) event(list *v1beta1.ImageListPullJob, kind, reason, text string) {
	if r.Recorder != nil {
		r.Recorder.Eventf(list, nil, kind, reason, eventListAction, "%s", first([]byte(text), 1000))
	}
}

// childAnnotations are those of the list that say how to pull.
func childAnnotations(list *v1beta1.ImageListPullJob) map[string]string {
	annotations := map[string]string{}
	for _, key := range []string{v1beta1.PinForAnnotation, v1beta1.BytesPerSecondAnnotation} {
		if value, ok := list.Annotations[key]; ok {
			annotations[key] = value
		}
	}
	return annotations
}

// templateHash identifies what the children have in common. How long they live is the list's alone.
func templateHash(list *v1beta1.ImageListPullJob) string {
	template := list.Spec.ImagePullJobTemplate.DeepCopy()
	template.CompletionPolicy.TTLSecondsAfterFinished = nil
	return hash(template, childAnnotations(list))
}

func childName(list *v1beta1.ImageListPullJob, image string) string {
	return strings.TrimRight(string(first([]byte(list.Name), 200)), "-.") + "-" + hash(list.UID, image, templateHash(list))
}
