// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package controller

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/sirupsen/logrus"
	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	"k8s.io/apimachinery/pkg/api/meta"
	"k8s.io/client-go/tools/events"
	"k8s.io/client-go/util/retry"
	"k8s.io/client-go/util/workqueue"
	"sigs.k8s.io/controller-runtime/pkg/builder"
	"sigs.k8s.io/controller-runtime/pkg/client"
	"sigs.k8s.io/controller-runtime/pkg/controller"
	"sigs.k8s.io/controller-runtime/pkg/manager"
	"sigs.k8s.io/controller-runtime/pkg/predicate"
	"sigs.k8s.io/controller-runtime/pkg/reconcile"

	appsv1alpha1 "github.com/cri-proxy/cri-proxy/api/apps/v1alpha1"
	"github.com/cri-proxy/cri-proxy/controller/kruise"
)

// orphanEvery is how often a pod that a request keeps out of service is looked at: nothing tells of a request that goes without
// letting the pod go.
const orphanEvery = time.Minute

// PodReadyReconciler opens the readiness gate KruisePodReady, as OpenKruise's pod-readiness controller does
// (pkg/controller/podreadiness): a pod that has the gate and no condition of it yet gets the condition True. One that has the condition
// belongs to the writers whose keys are in its message, and stays as it is. Only the keys of requests that are gone are taken out, which
// OpenKruise leaves to its finalizer, and which would keep the pod out of service for ever when somebody takes that off by hand.
type PodReadyReconciler struct {
	// Client reads from the cache and writes.
	Client client.Client
	// APIReader reads past the cache: a request is only taken for gone on the API server's word.
	APIReader client.Reader
	// Recorder writes Events; nil writes none.
	Recorder events.EventRecorder
	// Metrics may be nil.
	Metrics *Metrics
	// Log must be set.
	Log logrus.FieldLogger
	// Gate is closed while OpenKruise opens the gates; nil: it never is.
	Gate *kruise.Gate
}

// Reconcile looks at the gate of one pod.
func (r *PodReadyReconciler) Reconcile(ctx context.Context, req reconcile.Request) (reconcile.Result, error) {
	leave, open := r.Gate.Enter()
	if !open {
		return reconcile.Result{RequeueAfter: kruise.StandBy}, nil
	}
	defer leave()
	var pod corev1.Pod
	if err := r.Client.Get(ctx, req.NamespacedName, &pod); err != nil {
		return reconcile.Result{}, client.IgnoreNotFound(err)
	}
	if !awaitsOpening(&pod) {
		return reconcile.Result{}, nil
	}
	opened, err := r.open(ctx, &pod)
	switch {
	case apierrors.IsConflict(err):
		return reconcile.Result{RequeueAfter: conflictPause}, nil
	case err != nil:
		return reconcile.Result{}, client.IgnoreNotFound(err)
	case !opened:
		return reconcile.Result{RequeueAfter: orphanEvery}, nil
	}
	return reconcile.Result{}, nil
}

// open writes the condition if nobody keeps it False, or fewer do than it says, and says whether it has.
func (r *PodReadyReconciler) open(ctx context.Context, pod *corev1.Pod) (bool, error) {
	var gone []string
	keys := unreadyKeys(pod)
	for _, key := range slices.Clone(keys) {
		there, err := r.holds(ctx, key)
		if err != nil {
			return false, err
		}
		if !there {
			gone = append(gone, key.Key)
			keys = slices.DeleteFunc(keys, func(k unreadyKey) bool { return k == key })
		}
	}
	if podCondition(pod, appsv1alpha1.KruisePodReadyConditionType) != nil && len(gone) == 0 {
		return false, nil
	}
	if len(gone) > 0 {
		r.Log.WithFields(logrus.Fields{"pod": client.ObjectKeyFromObject(pod).String(), "requests": strings.Join(gone, ", ")}).
			Warn("the requests that took the pod out of service have gone: putting it back")
	}
	if err := writeUnready(ctx, r.Client, pod, keys, time.Now()); err != nil {
		return false, err
	}
	r.Metrics.wrote("pod status")
	return true, nil
}

// holds says whether the writer of the key is there. Of those that are no requests nobody here knows.
func (r *PodReadyReconciler) holds(ctx context.Context, key unreadyKey) (bool, error) {
	namespace, name, ok := strings.Cut(key.Key, "/")
	if key.UserAgent != unreadyAgent || !ok {
		return true, nil
	}
	var crr appsv1alpha1.ContainerRecreateRequest
	err := r.APIReader.Get(ctx, client.ObjectKey{Namespace: namespace, Name: name}, &crr)
	if apierrors.IsNotFound(err) || meta.IsNoMatchError(err) {
		return false, nil
	}
	// The finalizer comes before the key, and goes after it.
	return crr.Status.CompletionTime == nil || slices.Contains(crr.Finalizers, appsv1alpha1.UnreadyAcquiredFinalizer), err
}

// awaitsOpening says that the gate of the pod has no condition yet, or is closed by a request, which may be gone.
func awaitsOpening(pod *corev1.Pod) bool {
	if !hasReadyGate(pod) || pod.DeletionTimestamp != nil || pod.Status.Phase == corev1.PodSucceeded || pod.Status.Phase == corev1.PodFailed {
		return false
	}
	if podCondition(pod, appsv1alpha1.KruisePodReadyConditionType) == nil {
		return true
	}
	return slices.ContainsFunc(unreadyKeys(pod), func(k unreadyKey) bool { return k.UserAgent == unreadyAgent })
}

// SetupWithManager adds the reconciler to a manager: it then watches pods with the gate. Of other pods it sees only that they have none.
func (r *PodReadyReconciler) SetupWithManager(m manager.Manager, workers int) error {
	return builder.ControllerManagedBy(m).
		Named("kruise-pod-ready").
		For(&corev1.Pod{}, builder.WithPredicates(predicate.NewPredicateFuncs(func(o client.Object) bool {
			pod, ok := o.(*corev1.Pod)
			return ok && awaitsOpening(pod)
		}))).
		WithOptions(controller.Options{
			MaxConcurrentReconciles: workers,
			RateLimiter:             workqueue.NewTypedItemExponentialFailureRateLimiter[reconcile.Request](50*time.Millisecond, 30*time.Second),
		}).
		Complete(TellAPIErrors(r, func() client.Object { return &corev1.Pod{} }, m.GetClient(), r.Recorder))
}

// LeavePodReady opens the gates that are left, for when no controller is to be there any more, and returns how many: those of pods that
// were made while none was there, and those of requests that are gone. What [Leave] does comes before. c must read past the cache. It
// goes on after an error.
func LeavePodReady(ctx context.Context, c client.Client, log logrus.FieldLogger) (int, error) {
	r := &PodReadyReconciler{Client: c, APIReader: c, Log: log}
	var errs []error
	count := 0
	list := &corev1.PodList{}
	for {
		if err := c.List(ctx, list, client.Limit(leavePage), client.Continue(list.Continue)); err != nil {
			return count, errors.Join(append(errs, err)...)
		}
		for i := range list.Items {
			pod := &list.Items[i]
			opened := false
			err := retry.RetryOnConflict(retry.DefaultRetry, func() (err error) {
				if !awaitsOpening(pod) {
					return nil
				}
				if opened, err = r.open(ctx, pod); apierrors.IsConflict(err) {
					if again := c.Get(ctx, client.ObjectKeyFromObject(pod), pod); again != nil {
						return again
					}
				}
				return err
			})
			if client.IgnoreNotFound(err) != nil {
				errs = append(errs, fmt.Errorf("pod %s: %w", client.ObjectKeyFromObject(pod), err))
			}
			if opened {
				count++
			}
		}
		if list.Continue == "" {
			return count, errors.Join(errs...)
		}
	}
}
