// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package workload_test

import (
	"testing"
	"time"

	appsv1 "k8s.io/api/apps/v1"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	inplace "github.com/cri-proxy/cri-proxy/api/inplace/v1alpha1"
	"github.com/cri-proxy/cri-proxy/controller/rollout/evaluate"
	"github.com/cri-proxy/cri-proxy/controller/rollout/workload"
)

// A controller of another version finds these in workloads and rollouts. They must not change.
func TestGolden(t *testing.T) {
	begun := metav1.NewTime(time.Unix(1700000000, 0).UTC())
	r := &inplace.InPlaceRollout{
		ObjectMeta: metav1.ObjectMeta{Namespace: "ns", Name: "web", UID: "7a3e7f52-0001"},
		Spec: inplace.InPlaceRolloutSpec{
			Containers: []inplace.ContainerChange{{Name: "side"}, {Name: "app", Image: "app:2"}},
		},
		Status: inplace.InPlaceRolloutStatus{StartTime: &begun},
	}
	goal := evaluate.GoalOf(r)
	env := &workload.Env{Rollout: r, Goal: &goal}
	template := corev1.PodTemplateSpec{Spec: corev1.PodSpec{
		NodeName:       "n",
		Containers:     []corev1.Container{{Name: "app", Image: "app:1"}, {Name: "side", Image: "side:1"}},
		ReadinessGates: []corev1.PodReadinessGate{{ConditionType: inplace.ReadyGate}},
	}}
	set := &appsv1.StatefulSet{
		ObjectMeta: metav1.ObjectMeta{Annotations: map[string]string{corev1.LastAppliedConfigAnnotation: `{"a":1}`}},
		Spec:       appsv1.StatefulSetSpec{ServiceName: "web", Template: template},
	}
	d := &appsv1.Deployment{
		ObjectMeta: metav1.ObjectMeta{Name: "web", Namespace: "ns"},
		Spec: appsv1.DeploymentSpec{
			Selector: &metav1.LabelSelector{MatchLabels: map[string]string{"app": "web"}},
		},
	}
	mark := workload.TemplateMark(env, map[string]string{"app": "app:2", "side": "side:1"})
	for _, tt := range []struct {
		name      string
		got, want any
	}{
		{"template", mark[inplace.TemplateAnnotation], "7a3e7f52-0001/6f746289e8/1700000000/150e065cfb"},
		{"put back", workload.PutBack(set, 7), "7 ad6bd40106 fa0bdb1c6e"},
		{"history", workload.HistoryName(d, template.DeepCopy(), "4"), "web-8c517e27ee"},
	} {
		if tt.got != tt.want {
			t.Errorf("%s is\n  %s, want\n  %s", tt.name, tt.got, tt.want)
		}
	}
}
