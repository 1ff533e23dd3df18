// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

// Package podready opens the readiness gate KruisePodReady, as OpenKruise's pod-readiness
// controller does.
package podready

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
	"sigs.k8s.io/controller-runtime/pkg/builder"
	"sigs.k8s.io/controller-runtime/pkg/client"
	"sigs.k8s.io/controller-runtime/pkg/controller"
	"sigs.k8s.io/controller-runtime/pkg/manager"
	"sigs.k8s.io/controller-runtime/pkg/predicate"
	"sigs.k8s.io/controller-runtime/pkg/reconcile"

	appsv1alpha1 "github.com/cri-proxy/cri-proxy/api/apps/v1alpha1"
	"github.com/cri-proxy/cri-proxy/controller/apierror"
	"github.com/cri-proxy/cri-proxy/controller/kruise"
	"github.com/cri-proxy/cri-proxy/controller/pods"
	again "github.com/cri-proxy/cri-proxy/controller/retry"
)

const (
	// orphanEvery is how often to look at a pod that a request keeps out of service: no event tells
	// of a request that goes without letting the pod go.
	orphanEvery = time.Minute
	// conflictPause lets the cache catch up after a write that came too late.
	conflictPause = 200 * time.Millisecond
	// leavePage is how many objects one answer of the API server has.
	leavePage = 500
)

// Reconciler opens the gate, as OpenKruise does (pkg/controller/podreadiness). A pod that has the
// gate and no condition of it yet gets the condition True. A pod that has the condition belongs to
// the holders in the condition's message, and stays as it is. The reconciler takes out only the
// keys of requests that are gone. OpenKruise leaves those to its finalizer; when somebody takes the
// finalizer off by hand, the key would keep the pod out of service for ever.
type Reconciler struct {
	// Client reads from the cache and writes.
	Client client.Client
	// APIReader reads past the cache. Only what the API server itself says is enough to take a
	// request for gone.
	APIReader client.Reader
	// Recorder writes Events; nil writes none.
	Recorder events.EventRecorder
	// Wrote counts a write to the API server, by what was written; it may be nil.
	Wrote func(object string)
	// Log must be set.
	Log logrus.FieldLogger
	// Gate is closed while OpenKruise opens the gates. A nil gate is always open.
	Gate *kruise.Gate
}

// Reconcile looks at the gate of one pod.
func (r *Reconciler) Reconcile(ctx context.Context, req reconcile.Request) (reconcile.Result, error) {
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

// open writes the condition if it has no holder, or lists holders that are gone. It says whether it
// has written.
func (r *Reconciler) open(ctx context.Context, pod *corev1.Pod) (bool, error) {
	var gone []string
	holders := pods.Holders(pod)
	for _, holder := range slices.Clone(holders) {
		there, err := r.exists(ctx, holder)
		if err != nil {
			return false, err
		}
		if !there {
			gone = append(gone, holder.Key)
			holders = slices.DeleteFunc(holders, func(h pods.Holder) bool { return h == holder })
		}
	}
	if pods.ReadyGate(pod) != nil && len(gone) == 0 {
		return false, nil
	}
	if len(gone) > 0 {
		fields := logrus.Fields{"pod": client.ObjectKeyFromObject(pod).String(), "requests": strings.Join(gone, ", ")}
		r.Log.WithFields(fields).
			Warn("the requests that took the pod out of service have gone: putting it back")
	}
	if err := pods.WriteHolders(ctx, r.Client, pod, holders, time.Now()); err != nil {
		return false, err
	}
	if r.Wrote != nil {
		r.Wrote("pod status")
	}
	return true, nil
}

// exists says whether the holder still exists. It takes a holder that is no request for one that
// does.
func (r *Reconciler) exists(ctx context.Context, holder pods.Holder) (bool, error) {
	namespace, name, ok := strings.Cut(holder.Key, "/")
	if !holder.IsRequest() || !ok {
		return true, nil
	}
	var crr appsv1alpha1.ContainerRecreateRequest
	err := r.APIReader.Get(ctx, client.ObjectKey{Namespace: namespace, Name: name}, &crr)
	if apierrors.IsNotFound(err) || meta.IsNoMatchError(err) {
		return false, nil
	}
	// The finalizer comes before the key, and goes after the key.
	return crr.Status.CompletionTime == nil || slices.Contains(crr.Finalizers, appsv1alpha1.UnreadyAcquiredFinalizer),
		err
}

// awaitsOpening says that the gate of the pod has no condition yet, or is closed by a request,
// which may be gone.
func awaitsOpening(pod *corev1.Pod) bool {
	if !pods.HasReadyGate(pod) || !pods.Active(pod) {
		return false
	}
	if pods.ReadyGate(pod) == nil {
		return true
	}
	return slices.ContainsFunc(pods.Holders(pod), pods.Holder.IsRequest)
}

// SetupWithManager adds the reconciler to a manager: it then watches pods with the gate.
func (r *Reconciler) SetupWithManager(m manager.Manager, workers int) error {
	return builder.ControllerManagedBy(m).
		Named("kruise-pod-ready").
		For(&corev1.Pod{}, builder.WithPredicates(predicate.NewPredicateFuncs(func(o client.Object) bool {
			pod, ok := o.(*corev1.Pod)
			return ok && awaitsOpening(pod)
		}))).
		WithOptions(controller.Options{MaxConcurrentReconciles: workers, RateLimiter: again.RateLimiter()}).
		Complete(apierror.Tell(r, func() client.Object { return &corev1.Pod{} }, m.GetClient(), r.Recorder))
}

// Leave opens the gates that are left before the controller goes for good: the gates of pods that
// were created while no controller was there, and those that requests closed which are gone. It
// returns how many. recreate.Leave comes before. c must read past the cache. Leave goes on after an
// error.
func Leave(ctx context.Context, c client.Client, log logrus.FieldLogger) (int, error) {
	r := &Reconciler{Client: c, APIReader: c, Log: log}
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
