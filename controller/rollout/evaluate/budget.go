// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package evaluate

import (
	"context"
	"fmt"

	corev1 "k8s.io/api/core/v1"
	policyv1 "k8s.io/api/policy/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/labels"
	"sigs.k8s.io/controller-runtime/pkg/client"

	"github.com/cri-proxy/cri-proxy/controller/pods"
)

// Disruptions is what a PodDisruptionBudget has left.
type Disruptions struct {
	name     string
	selector labels.Selector
	left     int
}

// Budgets reads the budgets of a namespace that select any of the pods. doomed returns true for a
// ready pod that the rollout is about to disrupt: the budget does not count that yet.
func Budgets(
	ctx context.Context, from client.Reader, namespace string, chosen []Candidate, doomed func(*corev1.Pod) bool,
) ([]*Disruptions, error) {
	var list policyv1.PodDisruptionBudgetList
	if err := from.List(ctx, &list, client.InNamespace(namespace), client.UnsafeDisableDeepCopy); err != nil {
		return nil, err
	}
	var budgets []*Disruptions
	for i := range list.Items {
		b := &list.Items[i]
		selector, err := metav1.LabelSelectorAsSelector(b.Spec.Selector)
		if err != nil || !matchesAny(selector, chosen) {
			continue
		}
		var selected corev1.PodList
		if err := from.List(ctx, &selected, client.InNamespace(namespace),
			client.MatchingLabelsSelector{Selector: selector}, client.UnsafeDisableDeepCopy); err != nil {
			return nil, err
		}
		healthy, coming := 0, 0
		for j := range selected.Items {
			pod := &selected.Items[j]
			if pod.DeletionTimestamp == nil && isTrue(pods.Condition(pod, corev1.PodReady)) {
				healthy++
				if doomed(pod) {
					coming++
				}
			}
		}
		// The budget's own count lags behind the pods.
		left := min(int(b.Status.DisruptionsAllowed), healthy-int(b.Status.DesiredHealthy)) - coming
		if b.Status.ObservedGeneration < b.Generation {
			left = 0
		}
		budgets = append(budgets, &Disruptions{b.Name, selector, left})
	}
	return budgets, nil
}

func matchesAny(s labels.Selector, pods []Candidate) bool {
	for _, c := range pods {
		if s.Matches(labels.Set(c.Pod.Labels)) {
			return true
		}
	}
	return false
}

// Take lets a pod go if all budgets allow it, and counts it in them.
func Take(budgets []*Disruptions, pod *corev1.Pod) (bool, string) {
	for _, b := range budgets {
		if b.left <= 0 && b.selector.Matches(labels.Set(pod.Labels)) {
			return false, fmt.Sprintf("PodDisruptionBudget %s lets no further pod become unavailable", b.name)
		}
	}
	for _, b := range budgets {
		if b.selector.Matches(labels.Set(pod.Labels)) {
			b.left--
		}
	}
	return true, ""
}
