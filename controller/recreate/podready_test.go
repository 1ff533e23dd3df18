// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package recreate_test

import (
	"fmt"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	"sigs.k8s.io/controller-runtime/pkg/client"
	"sigs.k8s.io/controller-runtime/pkg/reconcile"

	"github.com/cri-proxy/cri-proxy/controller/podready"
	"github.com/cri-proxy/cri-proxy/controller/pods"
)

// A drain goes on where the gate has been opened before, and is not undone by who opens gates.
func TestPodReadyBesideADrain(t *testing.T) {
	const atWork = `{"userAgent":"ContainerRecreateRequest","key":"ns/at-work"}`
	b := newBed(t, func(p *corev1.Pod) {
		p.Spec.ReadinessGates = []corev1.PodReadinessGate{{ConditionType: "other"}, {ConditionType: "KruisePodReady"}}
	})
	r := &podready.Reconciler{Client: b.client, APIReader: b.client, Log: b.r.Log}
	look := func(want string) {
		t.Helper()
		if _, err := r.Reconcile(t.Context(),
			reconcile.Request{NamespacedName: client.ObjectKey{Namespace: "ns", Name: "pod"}}); err != nil {
			t.Error(err)
		}
		var pod corev1.Pod
		if err := b.client.Get(t.Context(), client.ObjectKey{Namespace: "ns", Name: "pod"}, &pod); err != nil {
			t.Fatal(err)
		}
		c := pods.Condition(&pod, "KruisePodReady")
		if got := fmt.Sprint(c.Status, c.Message); got != want {
			t.Errorf("condition %s, want %s", got, want)
		}
	}
	look("True")
	b.create("at-work",
		spec{Containers: containers("app"), Strategy: &how{UnreadyGracePeriodSeconds: pointer(int64(30))}})
	b.until("draining", func(crr *request) bool { return crr.Status.Phase == recreating }, "at-work")
	look("False[" + atWork + "]")
	b.after(31 * time.Second)
	b.wantStates(b.until("completed", retired, "at-work"), "app Succeeded killed")
	look("True")
}
