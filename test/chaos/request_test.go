// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package chaos

import (
	"context"
	"fmt"

	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"sigs.k8s.io/controller-runtime/pkg/client"

	appsv1alpha1 "github.com/cri-proxy/cri-proxy/api/apps/v1alpha1"
	opsv1 "github.com/cri-proxy/cri-proxy/api/ops/v1"
)

// createRequest asks for the restart by a ContainerRecreateRequest.
func (r *run) createRequest(ctx context.Context) error {
	crr := &appsv1alpha1.ContainerRecreateRequest{
		ObjectMeta: metav1.ObjectMeta{Namespace: namespace, Name: r.pod},
		Spec: appsv1alpha1.ContainerRecreateRequestSpec{
			PodName: r.pod, Containers: []appsv1alpha1.ContainerRecreateRequestContainer{{Name: slotName}},
		},
	}
	if r.order == startFirst {
		crr.Annotations = map[string]string{appsv1alpha1.RestartOrderAnnotation: startFirst}
		crr.Spec.Strategy = &appsv1alpha1.ContainerRecreateRequestStrategy{
			MinStartedSeconds: r.request.GetContainers()[0].GetMinReadySeconds()}
	}
	if err := r.api.Create(ctx, crr); err != nil {
		return err
	}
	r.request.Uid = string(crr.UID) + "." + slotName // the controller's way to name it
	return nil
}

// requestAgrees is nil when the request's status says what the operation says.
func (r *run) requestAgrees(ctx context.Context, op *opsv1.Operation) error {
	if !r.byRequest {
		return nil
	}
	crr := &appsv1alpha1.ContainerRecreateRequest{}
	if err := r.api.Get(ctx, client.ObjectKey{Namespace: namespace, Name: r.pod}, crr); err != nil {
		return err
	}
	want := appsv1alpha1.ContainerRecreateRequestFailed
	if op.GetPhase() == opsv1.Phase_PHASE_SUCCEEDED {
		want = appsv1alpha1.ContainerRecreateRequestSucceeded
	}
	states := crr.Status.ContainerRecreateStates
	if crr.Status.Phase != appsv1alpha1.ContainerRecreateRequestCompleted || len(states) != 1 ||
		states[0].Phase != want {
		return fmt.Errorf("the request says %+v, the operation %s", crr.Status, op.GetPhase())
	}
	return nil
}
