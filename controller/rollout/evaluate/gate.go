// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package evaluate

import (
	"encoding/json"
	"fmt"
	"slices"
	"strings"
	"time"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"

	inplace "github.com/cri-proxy/cri-proxy/api/inplace/v1alpha1"
	"github.com/cri-proxy/cri-proxy/controller/pods"
)

// Reasons of the gates' conditions.
const (
	gateUpdating = "InPlaceRollout"
	gateReady    = "Ready"
)

// Gates returns the readiness gates of the pod that rollouts open and close.
func Gates(pod *corev1.Pod) []corev1.PodConditionType {
	var gates []corev1.PodConditionType
	for _, g := range pod.Spec.ReadinessGates {
		switch g.ConditionType {
		case inplace.ReadyGate:
			gates = append(gates, g.ConditionType)
		case inplace.KruiseReadyGate:
			// OpenKruise switches it on pods of its own workloads.
			if !slices.ContainsFunc(pod.OwnerReferences,
				func(o metav1.OwnerReference) bool { return strings.HasPrefix(o.APIVersion, "apps.kruise.io/") }) {
				gates = append(gates, g.ConditionType)
			}
		}
	}
	return gates
}

// OutOfServiceBy returns the UID of the rollout that took the pod out of service, and since when;
// empty if none did.
func OutOfServiceBy(pod *corev1.Pod) (types.UID, time.Time) {
	for _, kind := range Gates(pod) {
		if c := pods.Condition(pod, kind); c != nil && c.Status == corev1.ConditionFalse && c.Reason == gateUpdating {
			uid, _, _ := strings.Cut(c.Message, " ")
			return types.UID(uid), c.LastTransitionTime.Time
		}
	}
	return "", time.Time{}
}

// GatePatch returns the patch of the pod's status that closes the gates for a rollout. With an
// empty UID it opens them.
func GatePatch(pod *corev1.Pod, rollout types.UID, text string, now time.Time) ([]byte, error) {
	status, reason, message := corev1.ConditionTrue, gateReady, ""
	if rollout != "" {
		status, reason, message = corev1.ConditionFalse, gateUpdating, string(rollout)+" "+text
	}
	var conditions []any
	gates := Gates(pod)
	for _, kind := range gates {
		// All fields are written, so that an empty message replaces the old one.
		conditions = append(conditions, map[string]any{
			"type": kind, "status": status, "reason": reason, "message": message,
			"lastTransitionTime": metav1.NewTime(now),
		})
	}
	if rollout != "" && isTrue(pods.Condition(pod, corev1.PodReady)) {
		// Kubelet would do the same at its next sync, but endpoints must not wait for that.
		conditions = append(conditions, corev1.PodCondition{
			Type: corev1.PodReady, Status: corev1.ConditionFalse, LastTransitionTime: metav1.NewTime(now),
			Reason:  "ReadinessGatesNotReady",
			Message: fmt.Sprintf("the status of pod readiness gate %q is not \"True\", but False", gates[0]),
		})
	}
	return json.Marshal(map[string]any{
		"metadata": map[string]any{"uid": pod.UID, "resourceVersion": pod.ResourceVersion},
		"status":   map[string]any{"conditions": conditions},
	})
}
