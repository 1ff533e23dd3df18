// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package controller

import (
	"encoding/json"
	"slices"

	"k8s.io/apimachinery/pkg/api/meta"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	appsv1alpha1 "github.com/cri-proxy/cri-proxy/api/apps/v1alpha1"
)

// tellInFields puts into the status what clients of v1beta1 look for there and clients of v1alpha1 in annotations: since when the
// pod has been out of service for the request, or was, and what its status says of the new containers. Nothing here reads it.
func (p *pass) tellInFields(next *appsv1alpha1.ContainerRecreateRequestStatus) {
	if since := unreadySince(p.crr); since.IsZero() {
		meta.RemoveStatusCondition(&next.Conditions, appsv1alpha1.PreRecreateGraceCondition)
	} else {
		meta.SetStatusCondition(&next.Conditions, metav1.Condition{
			Type: appsv1alpha1.PreRecreateGraceCondition, Status: metav1.ConditionTrue, Reason: appsv1alpha1.PreRecreateGraceCondition,
			Message: "the pod was taken out of service for this request; unreadyGracePeriodSeconds counts from lastTransitionTime", LastTransitionTime: metav1.NewTime(since),
			ObservedGeneration: next.ObservedGeneration,
		})
	}
	var list []appsv1alpha1.ContainerRecreateRequestSyncContainerStatus
	for _, c := range p.containers {
		if c.state.Phase != succeeded {
			continue
		}
		i := slices.IndexFunc(next.ContainerStatusSnapshot, func(s appsv1alpha1.ContainerRecreateRequestSyncContainerStatus) bool { return s.Name == c.name })
		switch {
		case i >= 0 && (c.status == nil || c.status.ContainerID == next.ContainerStatusSnapshot[i].ContainerID):
			list = append(list, next.ContainerStatusSnapshot[i]) // as it was when the container succeeded
		case c.status != nil:
			list = append(list, appsv1alpha1.ContainerRecreateRequestSyncContainerStatus{
				Name: c.name, Ready: c.status.Ready, RestartCount: c.status.RestartCount, ContainerID: c.status.ContainerID,
			})
		}
	}
	next.ContainerStatusSnapshot = list
}

// snapshot sets the sync-container-statuses annotation to what the status has, with a patch that is made anyway.
func (p *pass) snapshot() error {
	if len(p.crr.Status.ContainerStatusSnapshot) == 0 {
		return nil // never put nothing in the place of something
	}
	value, err := json.Marshal(p.crr.Status.ContainerStatusSnapshot)
	if err != nil {
		return err
	}
	p.crr.Annotations = withDefault(p.crr.Annotations)
	p.crr.Annotations[appsv1alpha1.SyncContainerStatusesAnnotation] = string(value)
	return nil
}
