// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package list

import (
	"context"
	"fmt"
	"maps"
	"slices"
	"time"

	"github.com/sirupsen/logrus"
	corev1 "k8s.io/api/core/v1"
	apiequality "k8s.io/apimachinery/pkg/api/equality"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/tools/events"
	"sigs.k8s.io/controller-runtime/pkg/client"
	"sigs.k8s.io/controller-runtime/pkg/reconcile"

	"github.com/cri-proxy/cri-proxy/api/apps/v1beta1"
	"github.com/cri-proxy/cri-proxy/controller/apierror"
	"github.com/cri-proxy/cri-proxy/controller/imagepull/report"
	"github.com/cri-proxy/cri-proxy/controller/imagepull/spec"
	"github.com/cri-proxy/cri-proxy/controller/kruise"
	"github.com/cri-proxy/cri-proxy/controller/objects"
)

const (
	// staleInterval gives the cache time to catch up.
	staleInterval = 100 * time.Millisecond
	// missingInterval is how long after a failed creation of a child the next one follows.
	missingInterval = 30 * time.Second
)

// Reasons of Events.
const (
	eventCreatedJob = "ImagePullJobCreated"
	eventDeletedJob = "ImagePullJobDeleted"
	eventForeignJob = "ImagePullJobExists"
	eventDeniedJob  = "ImagePullJobDenied"
	eventAction     = "Sync"
)

// +kubebuilder:rbac:groups=apps.kruise.io,resources=imagelistpulljobs,verbs=get;list;watch;patch;delete
// +kubebuilder:rbac:groups=apps.kruise.io,resources=imagelistpulljobs/status,verbs=patch
// +kubebuilder:rbac:groups=apps.kruise.io,resources=imagelistpulljobs/finalizers,verbs=update

// Reconciler carries out ImageListPullJobs.
type Reconciler struct {
	// Client reads from the cache and writes.
	Client client.Client
	// Recorder writes Events; nil writes none.
	Recorder events.EventRecorder
	// Metrics counts writes; nil counts none.
	Metrics interface{ Wrote(object string) }
	// Log must be set.
	Log logrus.FieldLogger
	// Gate is closed while OpenKruise carries the lists out; nil: it never is.
	Gate *kruise.Gate
}

// Reconcile takes one list as far as possible and says when to look again.
func (r *Reconciler) Reconcile(ctx context.Context, req reconcile.Request) (reconcile.Result, error) {
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
	if list.Status.CompletionTime == nil ||
		list.Status.ObservedWork != "" && list.Status.ObservedWork != spec.ListWork(list) {
		wait, err = r.advance(ctx, list, children)
	} else {
		err = r.observe(ctx, list)
	}
	if err == nil && list.Status.CompletionTime != nil {
		wait, err = r.deleteExpired(ctx, list, children)
	}
	switch {
	case apierrors.IsConflict(err):
		return reconcile.Result{RequeueAfter: staleInterval}, nil
	case apierrors.IsNotFound(err):
		return reconcile.Result{}, nil
	}
	return reconcile.Result{RequeueAfter: wait}, err
}

// children are the list's, by name.
func (r *Reconciler) children(
	ctx context.Context, list *v1beta1.ImageListPullJob,
) (map[string]*v1beta1.ImagePullJob, error) {
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

// advance creates and deletes children until they are what the list asks for, and counts them. It
// returns after what time to look again.
func (r *Reconciler) advance(
	ctx context.Context, list *v1beta1.ImageListPullJob, children map[string]*v1beta1.ImagePullJob,
) (wait time.Duration, err error) {
	if err := r.label(ctx, list); err != nil {
		return 0, err
	}
	next := &v1beta1.ImageListPullJobStatus{
		StartTime: list.Status.StartTime, Desired: int32(len(list.Spec.Images)), ObservedWork: spec.ListWork(list),
		ObservedGeneration: list.Generation, Conditions: slices.Clone(list.Status.Conditions),
	}
	if next.StartTime == nil {
		now := metav1.Now()
		next.StartTime = &now
	}
	wanted, blocked, retries := map[string]bool{}, "", ""
	for _, image := range list.Spec.Images {
		name := spec.ChildName(list, image)
		wanted[name] = true
		child := children[name]
		if child == nil {
			missing, err := r.create(ctx, list, name, image)
			if err != nil {
				return 0, err
			}
			if missing != "" {
				wait, blocked = missingInterval, missing
				next.FailedImageStatuses = append(next.FailedImageStatuses,
					&v1beta1.FailedImageStatus{ImagePullJob: name, Name: image, Message: report.Shorten(missing)})
			}
			continue
		}
		count(next, child)
		if why := retriesOf(child); why != "" && retries == "" {
			retries = image + ": " + why
		}
	}
	if err := r.deleteUnwanted(ctx, list, children, wanted); err != nil {
		return 0, err
	}
	if list.Spec.CompletionPolicy.Type != v1beta1.Never && next.Completed == next.Desired {
		now := metav1.Now()
		next.CompletionTime = &now
	}
	setReady(next, blocked, retries)
	if err := r.writeStatus(ctx, list, next); err != nil {
		return 0, err
	}
	return wait, nil
}

// label labels the list with the hash of its template, as OpenKruise does.
func (r *Reconciler) label(ctx context.Context, list *v1beta1.ImageListPullJob) error {
	before := list.DeepCopy()
	list.Labels = maps.Clone(list.Labels)
	if list.Labels == nil {
		list.Labels = map[string]string{}
	}
	list.Labels[v1beta1.TemplateHashLabel] = spec.TemplateHash(list)
	if apiequality.Semantic.DeepEqual(before.Labels, list.Labels) {
		return nil
	}
	if err := r.Client.Patch(ctx, list, ifUnchanged(before)); err != nil {
		return err
	}
	r.wrote("list")
	return nil
}

// deleteUnwanted deletes the children of images that the list no longer names, and those of a
// template that it no longer has.
func (r *Reconciler) deleteUnwanted(
	ctx context.Context, list *v1beta1.ImageListPullJob,
	children map[string]*v1beta1.ImagePullJob, wanted map[string]bool,
) error {
	for _, name := range slices.Sorted(maps.Keys(children)) {
		child := children[name]
		if wanted[name] || child.DeletionTimestamp != nil {
			continue
		}
		err := r.Client.Delete(ctx, child, client.Preconditions{UID: &child.UID})
		if client.IgnoreNotFound(err) != nil {
			return err
		}
		r.wrote("job")
		r.event(list, corev1.EventTypeNormal, eventDeletedJob,
			fmt.Sprintf("deleted ImagePullJob %s: the list no longer says so", name))
	}
	return nil
}

// writeStatus writes next if it differs, and reports the end of a list.
func (r *Reconciler) writeStatus(
	ctx context.Context, list *v1beta1.ImageListPullJob, next *v1beta1.ImageListPullJobStatus,
) error {
	if apiequality.Semantic.DeepEqual(&list.Status, next) {
		return nil
	}
	before := list.DeepCopy()
	list.Status = *next
	if err := r.Client.Status().Patch(ctx, list, ifUnchanged(before)); err != nil {
		return err
	}
	r.wrote("list status")
	if next.CompletionTime == nil {
		return nil
	}
	kind := corev1.EventTypeNormal
	if next.Succeeded < next.Desired {
		kind = corev1.EventTypeWarning
	}
	r.event(list, kind, report.EventCompleted,
		fmt.Sprintf("%d of %d images are on all nodes", next.Succeeded, next.Desired))
	r.Log.WithFields(logrus.Fields{
		"list": client.ObjectKeyFromObject(list).String(), "images": next.Desired, "succeeded": next.Succeeded,
	}).Info("list completed")
	return nil
}

// observe records that a list which has ended was changed in a way that does not begin it again.
func (r *Reconciler) observe(ctx context.Context, list *v1beta1.ImageListPullJob) error {
	if list.Status.ObservedWork == "" || list.Status.ObservedGeneration == list.Generation {
		return nil
	}
	before := list.DeepCopy()
	list.Status.ObservedGeneration = list.Generation
	setReady(&list.Status, "", "")
	err := r.Client.Status().Patch(ctx, list, ifUnchanged(before))
	if err == nil {
		r.wrote("list status")
	}
	return err
}

// create creates a child. missing says why there is none: another object has its name, or the API
// server refuses it.
func (r *Reconciler) create(
	ctx context.Context, list *v1beta1.ImageListPullJob, name, image string,
) (missing string, err error) {
	child := spec.Child(list, name, image)
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
		r.reportMissing(list, eventForeignJob, name, missing)
		return missing, nil
	}
	if words, ok := apierror.Denied(err); ok {
		missing = fmt.Sprintf("the API server does not let ImagePullJob %s be made: %s", name, words)
		r.reportMissing(list, eventDeniedJob, name, missing)
		return missing, nil
	}
	if err != nil {
		return "", err
	}
	r.wrote("job")
	r.event(list, corev1.EventTypeNormal, eventCreatedJob, fmt.Sprintf("created ImagePullJob %s for %s", name, image))
	return "", nil
}

// reportMissing writes an Event about a missing child, unless the status of the list has the text
// already.
func (r *Reconciler) reportMissing(list *v1beta1.ImageListPullJob, reason, child, text string) {
	if !slices.ContainsFunc(list.Status.FailedImageStatuses, func(f *v1beta1.FailedImageStatus) bool {
		return f.ImagePullJob == child && f.Message == report.Shorten(text)
	}) {
		r.event(list, corev1.EventTypeWarning, reason, text)
	}
}

// deleteExpired deletes a list, with its children, when ttlSecondsAfterFinished has passed. The
// pins outlive the children, as those of a job do whose own time has passed.
func (r *Reconciler) deleteExpired(
	ctx context.Context, list *v1beta1.ImageListPullJob, children map[string]*v1beta1.ImagePullJob,
) (time.Duration, error) {
	ttl := list.Spec.CompletionPolicy.TTLSecondsAfterFinished
	if ttl == nil {
		return 0, nil
	}
	if left := time.Until(list.Status.CompletionTime.Add(time.Duration(*ttl) * time.Second)); left > 0 {
		return left, nil
	}
	for _, name := range slices.Sorted(maps.Keys(children)) {
		if err := r.keepPins(ctx, children[name]); err != nil {
			return 0, err
		}
	}
	r.Log.WithField("list", client.ObjectKeyFromObject(list).String()).
		Info("deleting the list: ttlSecondsAfterFinished has passed")
	// A list that somebody has edited meanwhile may begin again.
	err := r.Client.Delete(ctx, list, client.Preconditions{UID: &list.UID, ResourceVersion: &list.ResourceVersion},
		client.PropagationPolicy(metav1.DeletePropagationBackground))
	if err == nil {
		r.wrote("list")
	}
	return 0, client.IgnoreNotFound(err)
}

// keepPins has the deletion of a child leave the pins on the nodes.
func (r *Reconciler) keepPins(ctx context.Context, child *v1beta1.ImagePullJob) error {
	if child.Annotations[v1beta1.KeepPinsAnnotation] != "" || child.Status.CompletionTime == nil {
		return nil
	}
	before := child.DeepCopy()
	child.Annotations = maps.Clone(child.Annotations)
	if child.Annotations == nil {
		child.Annotations = map[string]string{}
	}
	child.Annotations[v1beta1.KeepPinsAnnotation] = "true"
	if err := r.Client.Patch(ctx, child, ifUnchanged(before)); client.IgnoreNotFound(err) != nil {
		return err
	}
	r.wrote("job")
	return nil
}

// ifUnchanged patches an object unless somebody else has written it since before.
func ifUnchanged(before client.Object) client.Patch {
	return client.MergeFromWithOptions(before, client.MergeFromWithOptimisticLock{})
}

func (r *Reconciler) wrote(object string) {
	if r.Metrics != nil {
		r.Metrics.Wrote(object)
	}
}

func (r *Reconciler) event(list *v1beta1.ImageListPullJob, kind, reason, text string) {
	if r.Recorder != nil {
		r.Recorder.Eventf(list, nil, kind, reason, eventAction, "%s", objects.Clip(text, objects.NoteMax))
	}
}
