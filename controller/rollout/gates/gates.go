// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

// Package gates opens readiness gates of pods that no rollout needs closed.
package gates

import (
	"context"
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
	"github.com/cri-proxy/cri-proxy/controller/pods"
	"github.com/cri-proxy/cri-proxy/controller/rollout/evaluate"
	"github.com/cri-proxy/cri-proxy/controller/rollout/notice"
	"github.com/cri-proxy/cri-proxy/controller/rollout/requeue"
)

// Reconciler opens the readiness gates of pods: of new pods, which cannot be ready before, and of
// pods that were taken out of service by a rollout which does not exist any more.
type Reconciler struct {
	// Client reads from the cache and writes.
	Client client.Client
	// APIReader reads past the cache: a rollout counts as gone only if the API server says so.
	APIReader client.Reader
	// Recorder writes Events; nil writes none.
	Recorder events.EventRecorder
	// Metrics may be nil.
	Metrics *notice.Metrics
	// Log must be set.
	Log logrus.FieldLogger
}

// Reconcile looks at the gates of one pod.
func (r *Reconciler) Reconcile(ctx context.Context, req reconcile.Request) (reconcile.Result, error) {
	var pod corev1.Pod
	if err := r.Client.Get(ctx, req.NamespacedName, &pod); err != nil {
		return reconcile.Result{}, client.IgnoreNotFound(err)
	}
	if !pods.Active(&pod) || !Needs(&pod) {
		return reconcile.Result{}, nil
	}
	if uid, _ := evaluate.OutOfServiceBy(&pod); uid != "" {
		if there, err := r.works(ctx, pod.Namespace, uid); there || err != nil {
			return reconcile.Result{}, err
		}
		r.Log.WithField("pod", req.String()).Warn(
			"the rollout that took the pod out of service has gone: putting it back")
	}
	_, err := Set(ctx, r.Client, &pod, "", "", time.Now())
	if apierrors.IsConflict(err) {
		return reconcile.Result{RequeueAfter: requeue.StaleInterval}, nil
	}
	if err == nil {
		r.Metrics.Wrote("pod status")
	}
	return reconcile.Result{}, client.IgnoreNotFound(err)
}

// Set closes the gates of a pod for a rollout; with an empty UID it opens them. It returns the pod
// as it is then.
func Set(
	ctx context.Context, c client.Client, pod *corev1.Pod, rollout types.UID, text string, now time.Time,
) (*corev1.Pod, error) {
	patch, err := evaluate.GatePatch(pod, rollout, text, now)
	if err != nil {
		return nil, err
	}
	after := &corev1.Pod{ObjectMeta: metav1.ObjectMeta{Namespace: pod.Namespace, Name: pod.Name}}
	return after, c.Status().Patch(ctx, after, client.RawPatch(types.StrategicMergePatchType, patch))
}

// works returns true if a rollout with that UID exists and has not finished with its pods.
func (r *Reconciler) works(ctx context.Context, namespace string, uid types.UID) (bool, error) {
	for _, from := range []client.Reader{r.Client, r.APIReader} {
		var list inplace.InPlaceRolloutList
		if err := from.List(ctx, &list, client.InNamespace(namespace)); err != nil {
			return false, err
		}
		for i := range list.Items {
			if list.Items[i].UID == uid && len(list.Items[i].Finalizers) > 0 {
				return true, nil
			}
		}
	}
	return false, nil
}

// Needs returns true if a gate of the pod has no condition yet, or was closed by a rollout.
func Needs(pod *corev1.Pod) bool {
	for _, kind := range evaluate.Gates(pod) {
		if pods.Condition(pod, kind) == nil {
			return true
		}
	}
	uid, _ := evaluate.OutOfServiceBy(pod)
	return uid != ""
}
