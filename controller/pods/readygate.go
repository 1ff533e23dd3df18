// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package pods

import (
	"context"
	"encoding/json"
	"fmt"
	"slices"
	"time"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
	"sigs.k8s.io/controller-runtime/pkg/client"

	appsv1alpha1 "github.com/cri-proxy/cri-proxy/api/apps/v1alpha1"
)

// requestAgent names requests among the holders of the KruisePodReady condition.
const requestAgent = "ContainerRecreateRequest"

// Holder is a writer that keeps the pod out of service. The message of the KruisePodReady condition
// is a JSON list of holders; the pod is ready when the list is empty.
type Holder struct {
	UserAgent string `json:"userAgent"`
	Key       string `json:"key"`
}

// HolderOf is a request among the holders.
func HolderOf(crr *appsv1alpha1.ContainerRecreateRequest) Holder {
	return Holder{requestAgent, crr.Namespace + "/" + crr.Name}
}

// IsRequest says that the holder is a request.
func (h Holder) IsRequest() bool { return h.UserAgent == requestAgent }

// HasReadyGate says whether the pod can be taken out of service: it has the gate KruisePodReady.
func HasReadyGate(pod *corev1.Pod) bool {
	return slices.ContainsFunc(pod.Spec.ReadinessGates, func(g corev1.PodReadinessGate) bool {
		return g.ConditionType == appsv1alpha1.KruisePodReadyConditionType
	})
}

// ReadyGate returns the condition of the gate KruisePodReady, or nil.
func ReadyGate(pod *corev1.Pod) *corev1.PodCondition {
	return Condition(pod, appsv1alpha1.KruisePodReadyConditionType)
}

// Holders returns the holders in the pod's condition.
func Holders(pod *corev1.Pod) []Holder {
	condition := ReadyGate(pod)
	var holders []Holder
	if condition == nil || condition.Message == "" || json.Unmarshal([]byte(condition.Message), &holders) != nil {
		return nil // or a writer that does not follow the form
	}
	return holders
}

// WriteHolders writes the pod's KruisePodReady condition: False with holders, True without. The pod
// must be as it was read: a conflict with another writer is the API server's error.
func WriteHolders(ctx context.Context, c client.Client, pod *corev1.Pod, holders []Holder, at time.Time) error {
	condition := ReadyGate(pod)
	now := metav1.NewTime(at)
	changed := corev1.PodCondition{
		Type: appsv1alpha1.KruisePodReadyConditionType, Status: corev1.ConditionTrue, LastTransitionTime: now,
	}
	if len(holders) > 0 {
		message, err := json.Marshal(holders)
		if err != nil {
			return err
		}
		changed.Status, changed.Message = corev1.ConditionFalse, string(message)
	}
	if condition != nil && condition.Status == changed.Status {
		changed.LastTransitionTime = condition.LastTransitionTime
	}
	// All fields, so that an empty message replaces the old one.
	conditions := []any{map[string]any{
		"type": changed.Type, "status": changed.Status, "message": changed.Message,
		"lastTransitionTime": changed.LastTransitionTime,
	}}
	if ready := Condition(pod, corev1.PodReady); len(holders) > 0 && ready != nil &&
		ready.Status == corev1.ConditionTrue {
		// kubelet would do the same at its next sync; endpoints must not wait for it.
		conditions = append(conditions, corev1.PodCondition{
			Type: corev1.PodReady, Status: corev1.ConditionFalse, LastTransitionTime: now,
			Reason:  "ReadinessGatesNotReady",
			Message: fmt.Sprintf("the status of pod readiness gate %q is not \"True\", but False", changed.Type),
		})
	}
	patch, err := json.Marshal(map[string]any{
		"metadata": map[string]any{"uid": pod.UID, "resourceVersion": pod.ResourceVersion},
		"status":   map[string]any{"conditions": conditions},
	})
	if err != nil {
		return err
	}
	target := &corev1.Pod{ObjectMeta: metav1.ObjectMeta{Namespace: pod.Namespace, Name: pod.Name}}
	return c.Status().Patch(ctx, target, client.RawPatch(types.StrategicMergePatchType, patch))
}
