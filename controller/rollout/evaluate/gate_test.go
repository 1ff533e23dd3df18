// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package evaluate_test

import (
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"

	inplace "github.com/cri-proxy/cri-proxy/api/inplace/v1alpha1"
	"github.com/cri-proxy/cri-proxy/controller/rollout/evaluate"
)

// A controller of another version reads from the message of a gate which rollout has closed it.
func TestGatePatch(t *testing.T) {
	pod := &corev1.Pod{
		ObjectMeta: metav1.ObjectMeta{Name: "web-1", UID: "c0ffee00-0002", ResourceVersion: "42"},
		Spec:       corev1.PodSpec{ReadinessGates: []corev1.PodReadinessGate{{ConditionType: inplace.ReadyGate}}},
		Status: corev1.PodStatus{Conditions: []corev1.PodCondition{{Type: corev1.PodReady,
			Status: corev1.ConditionTrue}}},
	}
	for _, tt := range []struct {
		name    string
		rollout types.UID
		text    string
		want    string
	}{
		{
			"close", "7a3e7f52-0001", "changes containers of InPlaceRollout web",
			`{"metadata":{"resourceVersion":"42","uid":"c0ffee00-0002"},"status":{"conditions":[` +
				`{"lastTransitionTime":"2023-11-14T22:13:22Z","message":"7a3e7f52-0001 changes containers of InPlaceRollout web",` +
				`"reason":"InPlaceRollout","status":"False","type":"cri-proxy.io/in-place-ready"},` +
				`{"type":"Ready","status":"False","lastProbeTime":null,"lastTransitionTime":"2023-11-14T22:13:22Z",` +
				`"reason":"ReadinessGatesNotReady",` +
				`"message":"the status of pod readiness gate \"cri-proxy.io/in-place-ready\" is not \"True\", but False"}]}}`,
		},
		{
			"open", "", "",
			`{"metadata":{"resourceVersion":"42","uid":"c0ffee00-0002"},"status":{"conditions":[` +
				`{"lastTransitionTime":"2023-11-14T22:13:22Z","message":"","reason":"Ready","status":"True",` +
				`"type":"cri-proxy.io/in-place-ready"}]}}`,
		},
	} {
		t.Run(tt.name, func(t *testing.T) {
			got, err := evaluate.GatePatch(pod, tt.rollout, tt.text, time.Unix(1700000002, 0).UTC())
			if err != nil {
				t.Fatal(err)
			}
			if string(got) != tt.want {
				t.Errorf("patch\n  %s, want\n  %s", got, tt.want)
			}
		})
	}
}
