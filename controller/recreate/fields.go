// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package recreate

import (
	"encoding/json"
	"slices"

	"k8s.io/apimachinery/pkg/api/meta"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	appsv1alpha1 "github.com/cri-proxy/cri-proxy/api/apps/v1alpha1"
	"github.com/cri-proxy/cri-proxy/controller/objects"
)

type syncStatus = appsv1alpha1.ContainerRecreateRequestSyncContainerStatus

// tellInFields puts into the status what clients of v1beta1 look for there, and clients of v1alpha1
// in annotations: since when the pod has been, or was, out of service for the request, and what the
// pod's status says of the new containers. No code here reads it.
func tellInFields(
	crr *appsv1alpha1.ContainerRecreateRequest, containers []*container,
	next *appsv1alpha1.ContainerRecreateRequestStatus,
) {
	const grace = appsv1alpha1.PreRecreateGraceCondition
	if since := unreadySince(crr); since.IsZero() {
		meta.RemoveStatusCondition(&next.Conditions, grace)
	} else {
		meta.SetStatusCondition(&next.Conditions, metav1.Condition{
			Type: grace, Status: metav1.ConditionTrue, Reason: grace, LastTransitionTime: metav1.NewTime(since),
			Message: "the pod was taken out of service for this request; " +
				"unreadyGracePeriodSeconds counts from lastTransitionTime",
			ObservedGeneration: next.ObservedGeneration,
		})
	}
	var list []syncStatus
	for _, c := range containers {
		if c.state.Phase != succeeded {
			continue
		}
		i := slices.IndexFunc(next.ContainerStatusSnapshot, func(s syncStatus) bool { return s.Name == c.name })
		switch {
		case i >= 0 && (c.status == nil || c.status.ContainerID == next.ContainerStatusSnapshot[i].ContainerID):
			list = append(list, next.ContainerStatusSnapshot[i]) // as it was when the container succeeded
		case c.status != nil:
			list = append(list, syncStatus{
				Name: c.name, Ready: c.status.Ready, RestartCount: c.status.RestartCount,
				ContainerID: c.status.ContainerID,
			})
		}
	}
	next.ContainerStatusSnapshot = list
}

// snapshot sets the sync-container-statuses annotation to what the status has. A patch that is due
// anyway writes it.
func snapshot(crr *appsv1alpha1.ContainerRecreateRequest) error {
	if len(crr.Status.ContainerStatusSnapshot) == 0 {
		return nil // never replace something by nothing
	}
	value, err := json.Marshal(crr.Status.ContainerStatusSnapshot)
	if err != nil {
		return err
	}
	crr.Annotations = objects.Writable(crr.Annotations)
	crr.Annotations[appsv1alpha1.SyncContainerStatusesAnnotation] = string(value)
	return nil
}
