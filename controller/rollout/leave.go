// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package rollout

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"time"

	"github.com/sirupsen/logrus"
	appsv1 "k8s.io/api/apps/v1"
	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/api/meta"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/client-go/util/retry"
	"sigs.k8s.io/controller-runtime/pkg/client"

	inplace "github.com/cri-proxy/cri-proxy/api/inplace/v1alpha1"
)

const (
	// leavePage is how many objects one answer of the API server has.
	leavePage = 500
	// leavePatience is how long one Deployment may take to see that it goes on.
	leavePatience = 30 * time.Second
	leavePause    = 250 * time.Millisecond
)

// Left is what Leave has done.
type Left struct {
	// Resumed are Deployments that go on, InService pods whose gates were opened.
	Resumed, InService int
}

// Leave takes back what rollouts have done to workloads and pods, for when no controller is to be there any more: Deployments that are
// paused go on, gates are opened. The pods keep the images that they have. c must read past the cache, and no controller may be at work.
// It goes on after an error.
func Leave(ctx context.Context, c client.Client, log logrus.FieldLogger) (Left, error) {
	r := &Reconciler{Client: c, APIReader: c, Log: log}
	r.prepare()
	left := Left{}
	var errs []error
	note := func(what string, err error) {
		if err != nil {
			errs = append(errs, fmt.Errorf("%s: %w", what, err))
		}
	}
	note("rollouts", r.leaveWorkloads(ctx, &left))
	note("Deployments", r.leaveDeployments(ctx, &left))
	note("pods", r.leavePods(ctx, &left))
	return left, errors.Join(errs...)
}

// leaveWorkloads lets the workloads go on whose rollouts are there, as when these are deleted: both templates agree before.
func (r *Reconciler) leaveWorkloads(ctx context.Context, left *Left) error {
	var errs []error
	list := &inplace.InPlaceRolloutList{}
	for {
		if err := r.Client.List(ctx, list, client.Limit(leavePage), client.Continue(list.Continue)); err != nil {
			if meta.IsNoMatchError(err) {
				return nil
			}
			return err
		}
		for i := range list.Items {
			if o := &list.Items[i]; slices.Contains(o.Finalizers, inplace.RolloutFinalizer) {
				if err := r.leaveWorkload(ctx, o, left); err != nil {
					errs = append(errs, fmt.Errorf("%s: %w", client.ObjectKeyFromObject(o), err))
				}
			}
		}
		if list.Continue == "" {
			return errors.Join(errs...)
		}
	}
}

func (r *Reconciler) leaveWorkload(ctx context.Context, rollout *inplace.InPlaceRollout, left *Left) error {
	ctx, cancel := context.WithTimeout(ctx, leavePatience)
	defer cancel()
	for first := true; ; first = false {
		p := &pass{
			r: r, rollout: rollout, work: r.workOf(rollout), now: time.Now(), strategy: strategyOf(&rollout.Spec.Strategy),
			log: r.Log.WithField("rollout", client.ObjectKeyFromObject(rollout).String()),
		}
		t, err := p.find(ctx)
		var why *specError
		if errors.As(err, &why) || err == nil && t.workload == nil {
			return nil
		}
		settled := false
		if err == nil {
			settled, err = t.workload.settle(ctx)
		}
		if settled && err == nil {
			if d, ok := t.workload.(*deployment); ok && !first {
				left.Resumed++
				p.log.WithField("deployment", d.d.Name).Info("the Deployment goes on")
			}
			return nil
		}
		if !pause(ctx, leavePause) {
			return errors.Join(errors.New("the workload does not go on yet"), err)
		}
	}
}

// leaveDeployments lets those go on that were paused by a rollout which is not there any more.
func (r *Reconciler) leaveDeployments(ctx context.Context, left *Left) error {
	return each(ctx, r.Client, &appsv1.DeploymentList{}, func(l *appsv1.DeploymentList) []appsv1.Deployment { return l.Items }, func(d *appsv1.Deployment) error {
		if d.Annotations[inplace.PausedByAnnotation] == "" {
			return nil
		}
		before := d.DeepCopy()
		delete(d.Annotations, inplace.PausedByAnnotation)
		d.Spec.Paused = false
		left.Resumed++
		return r.Client.Patch(ctx, d, client.MergeFrom(before))
	})
}

// leavePods opens the gates of pods.
func (r *Reconciler) leavePods(ctx context.Context, left *Left) error {
	return each(ctx, r.Client, &corev1.PodList{}, func(l *corev1.PodList) []corev1.Pod { return l.Items }, func(pod *corev1.Pod) error {
		opened := false
		err := retry.RetryOnConflict(retry.DefaultRetry, func() error {
			if !active(pod) || !needsGate(pod) {
				return nil
			}
			patch, err := gatePatch(pod, "", "", time.Now())
			if err != nil {
				return err
			}
			target := &corev1.Pod{ObjectMeta: metav1.ObjectMeta{Namespace: pod.Namespace, Name: pod.Name}}
			if err = r.Client.Status().Patch(ctx, target, client.RawPatch(types.StrategicMergePatchType, patch)); err != nil {
				if again := r.Client.Get(ctx, client.ObjectKeyFromObject(pod), pod); again != nil {
					return again
				}
				return err
			}
			opened = true
			return nil
		})
		if opened {
			left.InService++
		}
		return err
	})
}

// Gated is a workload whose template has a readiness gate that nobody opens when no controller is there: pods that it makes from then on
// are never Ready.
type Gated struct {
	// Workload is kind, namespace and name.
	Workload string
	Gate     corev1.PodConditionType
}

// FindGated finds the workloads whose template has one of the gates. It goes on after an error.
func FindGated(ctx context.Context, c client.Client, gates ...corev1.PodConditionType) ([]Gated, error) {
	var found []Gated
	look := func(kind string, o client.Object, t *corev1.PodTemplateSpec) error {
		for _, g := range t.Spec.ReadinessGates {
			if slices.Contains(gates, g.ConditionType) {
				found = append(found, Gated{fmt.Sprintf("%s %s/%s", kind, o.GetNamespace(), o.GetName()), g.ConditionType})
			}
		}
		return nil
	}
	err := errors.Join(
		each(ctx, c, &appsv1.DeploymentList{}, func(l *appsv1.DeploymentList) []appsv1.Deployment { return l.Items },
			func(o *appsv1.Deployment) error { return look("Deployment", o, &o.Spec.Template) }),
		each(ctx, c, &appsv1.StatefulSetList{}, func(l *appsv1.StatefulSetList) []appsv1.StatefulSet { return l.Items },
			func(o *appsv1.StatefulSet) error { return look("StatefulSet", o, &o.Spec.Template) }),
		each(ctx, c, &appsv1.DaemonSetList{}, func(l *appsv1.DaemonSetList) []appsv1.DaemonSet { return l.Items },
			func(o *appsv1.DaemonSet) error { return look("DaemonSet", o, &o.Spec.Template) }),
	)
	return found, err
}

// each calls f with all objects of a kind, page by page. What is not there any more is left out; other errors do not end it.
func each[L client.ObjectList, T any](ctx context.Context, c client.Client, list L, items func(L) []T, f func(*T) error) error {
	var errs []error
	for {
		if err := c.List(ctx, list, client.Limit(leavePage), client.Continue(list.GetContinue())); err != nil {
			return errors.Join(append(errs, err)...)
		}
		page := items(list)
		for i := range page {
			if err := client.IgnoreNotFound(f(&page[i])); err != nil {
				if o, ok := any(&page[i]).(client.Object); ok {
					err = fmt.Errorf("%s: %w", client.ObjectKeyFromObject(o), err)
				}
				errs = append(errs, err)
			}
		}
		if list.GetContinue() == "" {
			return errors.Join(errs...)
		}
	}
}
