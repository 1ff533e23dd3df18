// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package controller

import (
	"encoding/json"

	appsv1alpha1 "github.com/cri-proxy/cri-proxy/api/apps/v1alpha1"
)

// snapshot sets the sync-container-statuses annotation to what the pod shows of the
// recreated containers. Nothing here reads it; it is written for clients of
// OpenKruise, with a patch that is made anyway.
func (p *pass) snapshot() error {
	var list []appsv1alpha1.ContainerRecreateRequestSyncContainerStatus
	for _, c := range p.containers {
		if c.state.Phase == succeeded && c.status != nil {
			list = append(list, appsv1alpha1.ContainerRecreateRequestSyncContainerStatus{
				Name: c.name, Ready: c.status.Ready, RestartCount: c.status.RestartCount, ContainerID: c.status.ContainerID,
			})
		}
	}
	if len(list) == 0 {
		return nil // never put nothing in the place of something
	}
	value, err := json.Marshal(list)
	if err != nil {
		return err
	}
	p.crr.Annotations = withDefault(p.crr.Annotations)
	p.crr.Annotations[appsv1alpha1.SyncContainerStatusesAnnotation] = string(value)
	return nil
}
