// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package recreate_test

import (
	"testing"

	"k8s.io/apimachinery/pkg/api/meta"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	appsv1alpha1 "github.com/cri-proxy/cri-proxy/api/apps/v1alpha1"
	"github.com/cri-proxy/cri-proxy/controller/kstatus"
	"github.com/cri-proxy/cri-proxy/controller/recreate"
)

// What kstatus makes of them is in deploy's TestHealth.
func TestTellReady(t *testing.T) {
	now := metav1.Now()
	type states = []appsv1alpha1.ContainerRecreateRequestContainerRecreateState
	state := func(phase appsv1alpha1.ContainerRecreateRequestPhase) states {
		return []appsv1alpha1.ContainerRecreateRequestContainerRecreateState{
			{Name: "a", Phase: appsv1alpha1.ContainerRecreateRequestSucceeded}, {Name: "b", Phase: phase}}
	}
	for _, tt := range []struct {
		name   string
		status appsv1alpha1.ContainerRecreateRequestStatus
		want   string
	}{
		{"taken up", appsv1alpha1.ContainerRecreateRequestStatus{}, kstatus.Reconciling},
		{"at work",
			appsv1alpha1.ContainerRecreateRequestStatus{Phase: recreating, ContainerRecreateStates: state(recreating)},
			kstatus.Reconciling},
		{"at work, one has failed",
			appsv1alpha1.ContainerRecreateRequestStatus{Phase: recreating, ContainerRecreateStates: state(failed)},
			kstatus.Reconciling},
		{"done", appsv1alpha1.ContainerRecreateRequestStatus{Phase: completed, CompletionTime: &now,
			ContainerRecreateStates: state(succeeded)}, kstatus.Ready},
		{"failed", appsv1alpha1.ContainerRecreateRequestStatus{Phase: completed, CompletionTime: &now,
			ContainerRecreateStates: state(failed)}, kstatus.Stalled},
	} {
		recreate.TellReady(&tt.status)
		for _, kind := range []string{kstatus.Ready, kstatus.Reconciling, kstatus.Stalled} {
			if c := meta.FindStatusCondition(tt.status.Conditions, kind); c == nil ||
				meta.IsStatusConditionTrue(tt.status.Conditions, kind) != (kind == tt.want) {
				t.Errorf("%s: %s is %+v, want True only for %s", tt.name, kind, c, tt.want)
			}
		}
	}
}
