// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package gates

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"time"

	appsv1 "k8s.io/api/apps/v1"
	corev1 "k8s.io/api/core/v1"
	"k8s.io/client-go/util/retry"
	"sigs.k8s.io/controller-runtime/pkg/client"

	"github.com/cri-proxy/cri-proxy/controller/pods"
	"github.com/cri-proxy/cri-proxy/controller/rollout/pages"
)

// Gated is a workload whose template has a readiness gate. If no controller opens it, new pods of
// the workload never become Ready.
type Gated struct {
	// Workload is kind, namespace and name.
	Workload string
	Gate     corev1.PodConditionType
}

// FindGated returns the workloads whose template has one of the gates. It goes on after an error.
func FindGated(ctx context.Context, c client.Client, gates ...corev1.PodConditionType) ([]Gated, error) {
	var found []Gated
	look := func(kind string, o client.Object, t *corev1.PodTemplateSpec) error {
		for _, g := range t.Spec.ReadinessGates {
			if slices.Contains(gates, g.ConditionType) {
				found = append(found, Gated{fmt.Sprintf("%s %s/%s", kind, o.GetNamespace(), o.GetName()),
					g.ConditionType})
			}
		}
		return nil
	}
	err := errors.Join(
		pages.Each(ctx, c, &appsv1.DeploymentList{},
			func(l *appsv1.DeploymentList) []appsv1.Deployment { return l.Items },
			func(o *appsv1.Deployment) error { return look("Deployment", o, &o.Spec.Template) }),
		pages.Each(ctx, c, &appsv1.StatefulSetList{},
			func(l *appsv1.StatefulSetList) []appsv1.StatefulSet { return l.Items },
			func(o *appsv1.StatefulSet) error { return look("StatefulSet", o, &o.Spec.Template) }),
		pages.Each(ctx, c, &appsv1.DaemonSetList{}, func(l *appsv1.DaemonSetList) []appsv1.DaemonSet { return l.Items },
			func(o *appsv1.DaemonSet) error { return look("DaemonSet", o, &o.Spec.Template) }),
	)
	return found, err
}

// OpenAll opens the gates of all pods, and returns how many it has opened. It goes on after an
// error.
func OpenAll(ctx context.Context, c client.Client) (opened int, err error) {
	err = pages.Each(ctx, c, &corev1.PodList{}, func(l *corev1.PodList) []corev1.Pod { return l.Items },
		func(pod *corev1.Pod) error {
			done := false
			err := retry.RetryOnConflict(retry.DefaultRetry, func() error {
				if !pods.Active(pod) || !Needs(pod) {
					return nil
				}
				if _, err := Set(ctx, c, pod, "", "", time.Now()); err != nil {
					if again := c.Get(ctx, client.ObjectKeyFromObject(pod), pod); again != nil {
						return again
					}
					return err
				}
				done = true
				return nil
			})
			if done {
				opened++
			}
			return err
		})
	return opened, err
}
