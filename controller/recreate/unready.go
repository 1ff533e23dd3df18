// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package recreate

import (
	"context"
	"slices"
	"time"

	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	"sigs.k8s.io/controller-runtime/pkg/client"

	appsv1alpha1 "github.com/cri-proxy/cri-proxy/api/apps/v1alpha1"
	"github.com/cri-proxy/cri-proxy/controller/pods"
	"github.com/cri-proxy/cri-proxy/controller/recreate/accept"
)

// unreadySince is when the pod went out of service for the request; zero if it has not.
func unreadySince(crr *appsv1alpha1.ContainerRecreateRequest) time.Time {
	t, err := time.Parse(time.RFC3339, crr.Annotations[appsv1alpha1.UnreadyAcquiredAnnotation])
	if err != nil {
		return time.Time{}
	}
	return t
}

// setUnready adds the request to the holders of the pod's KruisePodReady condition, or takes it
// out, and writes the condition when that changes it. Other holders stay. A conflict with another
// writer is the API server's error.
func (r *Reconciler) setUnready(
	ctx context.Context, crr *appsv1alpha1.ContainerRecreateRequest, pod *corev1.Pod, unready bool,
) error {
	own := pods.HolderOf(crr)
	holders := pods.Holders(pod)
	if slices.Contains(holders, own) == unready && pods.ReadyGate(pod) != nil {
		return nil
	}
	holders = slices.DeleteFunc(holders, func(h pods.Holder) bool { return h == own })
	if unready {
		holders = append(holders, own)
	}
	if err := pods.WriteHolders(ctx, r.Client, pod, holders, r.now()); err != nil {
		return err
	}
	r.Metrics.Wrote("pod status")
	return nil
}

// release puts the pod back into service if the request took it out.
func (r *Reconciler) release(ctx context.Context, crr *appsv1alpha1.ContainerRecreateRequest) error {
	if !slices.Contains(crr.Finalizers, appsv1alpha1.UnreadyAcquiredFinalizer) {
		return nil
	}
	pod := &corev1.Pod{}
	// Past the cache, which may not show the holder yet.
	err := r.APIReader.Get(ctx, client.ObjectKey{Namespace: crr.Namespace, Name: crr.Spec.PodName}, pod)
	if apierrors.IsNotFound(err) {
		return nil
	}
	if err != nil {
		return err
	}
	if a := accept.Of(crr); a == nil || a.PodUID != string(pod.UID) || pods.ReadyGate(pod) == nil {
		return nil
	}
	err = r.setUnready(ctx, crr, pod, false)
	return client.IgnoreNotFound(err)
}
