// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package controller

import (
	"context"
	"encoding/json"
	"fmt"
	"slices"
	"time"

	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
	"sigs.k8s.io/controller-runtime/pkg/client"

	appsv1alpha1 "github.com/cri-proxy/cri-proxy/api/apps/v1alpha1"
)

// unreadyAgent names requests among the writers of the KruisePodReady condition.
const unreadyAgent = "ContainerRecreateRequest"

// unreadyKey is one writer that keeps the pod out of service. The condition's
// message is a JSON list of them; the pod is ready when it is empty.
type unreadyKey struct {
	UserAgent string `json:"userAgent"`
	Key       string `json:"key"`
}

func unreadyKeyOf(crr *appsv1alpha1.ContainerRecreateRequest) unreadyKey {
	return unreadyKey{unreadyAgent, crr.Namespace + "/" + crr.Name}
}

// hasReadyGate says whether the pod can be taken out of service.
func hasReadyGate(pod *corev1.Pod) bool {
	return slices.ContainsFunc(pod.Spec.ReadinessGates, func(g corev1.PodReadinessGate) bool {
		return g.ConditionType == appsv1alpha1.KruisePodReadyConditionType
	})
}

// unreadySince is when the pod went out of service for the request; zero if it has not.
func unreadySince(crr *appsv1alpha1.ContainerRecreateRequest) time.Time {
	t, err := time.Parse(time.RFC3339, crr.Annotations[appsv1alpha1.UnreadyAcquiredAnnotation])
	if err != nil {
		return time.Time{}
	}
	return t
}

// setUnready adds the request's key to the pod's KruisePodReady condition, or takes
// it out, and writes the condition when that changes it. Other writers' keys stay;
// a conflict with one of them is returned as the API server's error.
func (r *ContainerRecreateReconciler) setUnready(ctx context.Context, crr *appsv1alpha1.ContainerRecreateRequest, pod *corev1.Pod, unready bool) error {
	key := unreadyKeyOf(crr)
	keys := unreadyKeys(pod)
	if slices.Contains(keys, key) == unready && podCondition(pod, appsv1alpha1.KruisePodReadyConditionType) != nil {
		return nil
	}
	keys = slices.DeleteFunc(keys, func(k unreadyKey) bool { return k == key })
	if unready {
		keys = append(keys, key)
	}
	if err := writeUnready(ctx, r.Client, pod, keys, r.now()); err != nil {
		return err
	}
	r.Metrics.wrote("pod status")
	return nil
}

// unreadyKeys are the writers that keep the pod out of service, as its condition has them.
func unreadyKeys(pod *corev1.Pod) []unreadyKey {
	condition := podCondition(pod, appsv1alpha1.KruisePodReadyConditionType)
	var keys []unreadyKey
	if condition == nil || condition.Message == "" || json.Unmarshal([]byte(condition.Message), &keys) != nil {
		return nil // or not written by anyone who follows the form
	}
	return keys
}

// writeUnready writes the pod's KruisePodReady condition: False with keys, True without. The pod must be as it was read.
func writeUnready(ctx context.Context, c client.Client, pod *corev1.Pod, keys []unreadyKey, at time.Time) error {
	condition := podCondition(pod, appsv1alpha1.KruisePodReadyConditionType)
	now := metav1.NewTime(at)
	changed := corev1.PodCondition{Type: appsv1alpha1.KruisePodReadyConditionType, Status: corev1.ConditionTrue, LastTransitionTime: now}
	if len(keys) > 0 {
		message, err := json.Marshal(keys)
		if err != nil {
			return err
		}
		changed.Status, changed.Message = corev1.ConditionFalse, string(message)
	}
	if condition != nil && condition.Status == changed.Status {
		changed.LastTransitionTime = condition.LastTransitionTime
	}
	// Written out, so that an empty message takes the old one away.
	conditions := []any{map[string]any{
		"type": changed.Type, "status": changed.Status, "message": changed.Message, "lastTransitionTime": changed.LastTransitionTime,
	}}
	if ready := podCondition(pod, corev1.PodReady); len(keys) > 0 && ready != nil && ready.Status == corev1.ConditionTrue {
		// kubelet would do the same at its next sync; endpoints must not wait for it.
		conditions = append(conditions, corev1.PodCondition{
			Type: corev1.PodReady, Status: corev1.ConditionFalse, LastTransitionTime: now,
			Reason: "ReadinessGatesNotReady", Message: fmt.Sprintf("the status of pod readiness gate %q is not \"True\", but False", changed.Type),
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

// release puts the pod back into service if the request took it out.
func (r *ContainerRecreateReconciler) release(ctx context.Context, crr *appsv1alpha1.ContainerRecreateRequest) error {
	if !slices.Contains(crr.Finalizers, appsv1alpha1.UnreadyAcquiredFinalizer) {
		return nil
	}
	pod := &corev1.Pod{}
	// The key may be there though a cache does not show it yet.
	err := r.APIReader.Get(ctx, client.ObjectKey{Namespace: crr.Namespace, Name: crr.Spec.PodName}, pod)
	if apierrors.IsNotFound(err) {
		return nil
	}
	if err != nil {
		return err
	}
	if a := acceptedOf(crr); a == nil || a.PodUID != string(pod.UID) || podCondition(pod, appsv1alpha1.KruisePodReadyConditionType) == nil {
		return nil
	}
	err = r.setUnready(ctx, crr, pod, false)
	return client.IgnoreNotFound(err)
}

func podCondition(pod *corev1.Pod, kind corev1.PodConditionType) *corev1.PodCondition {
	for i := range pod.Status.Conditions {
		if pod.Status.Conditions[i].Type == kind {
			return &pod.Status.Conditions[i]
		}
	}
	return nil
}
