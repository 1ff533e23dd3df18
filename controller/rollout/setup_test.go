// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package rollout

import (
	"io"
	"strings"
	"testing"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/sirupsen/logrus"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/rest"
	ctrl "sigs.k8s.io/controller-runtime"
	"sigs.k8s.io/controller-runtime/pkg/config"
	"sigs.k8s.io/controller-runtime/pkg/event"
	metricsserver "sigs.k8s.io/controller-runtime/pkg/metrics/server"

	inplace "github.com/cri-proxy/cri-proxy/api/inplace/v1alpha1"
	"github.com/cri-proxy/cri-proxy/api/scheme"
	"github.com/cri-proxy/cri-proxy/controller/logadapter"
	"github.com/cri-proxy/cri-proxy/controller/nodes"
	"github.com/cri-proxy/cri-proxy/controller/rollout/follow"
	"github.com/cri-proxy/cri-proxy/controller/rollout/gates"
	"github.com/cri-proxy/cri-proxy/controller/rollout/notice"
	"github.com/cri-proxy/cri-proxy/controller/rollout/workload"
)

func TestSetup(t *testing.T) {
	scheme, err := scheme.New()
	if err != nil {
		t.Fatal(err)
	}
	log := logrus.New()
	log.SetOutput(io.Discard)
	m, err := ctrl.NewManager(&rest.Config{Host: "http://127.0.0.1:1"}, ctrl.Options{
		Scheme: scheme, Logger: logadapter.New(log), Metrics: metricsserver.Options{BindAddress: "0"},
		HealthProbeBindAddress: "0",
		Controller:             config.Controller{SkipNameValidation: new(true)}, // for -count
	})
	if err != nil {
		t.Fatal(err)
	}
	if err := (&Reconciler{Client: m.GetClient(), Log: log}).SetupWithManager(t.Context(), m, 1); err != nil {
		t.Error(err)
	}
	for _, kind := range []string{workload.KindStatefulSet, workload.KindDaemonSet} {
		if err := (&follow.Reconciler{Client: m.GetClient(), Log: log, Kind: kind}).SetupWithManager(t.Context(), m,
			1); err != nil {
			t.Error(err)
		}
	}
	if err := (&gates.Reconciler{Client: m.GetClient(), Log: log}).SetupWithManager(t.Context(), m, 1); err != nil {
		t.Error(err)
	}
}

// What wakes a rollout, and what does not.
func TestPodChanges(t *testing.T) {
	pod := func(change func(*corev1.Pod)) *corev1.Pod {
		p := &corev1.Pod{
			Spec: corev1.PodSpec{NodeName: "n", Containers: []corev1.Container{{Name: "app", Image: "a"}}},
			Status: corev1.PodStatus{Conditions: []corev1.PodCondition{{Type: corev1.PodReady,
				Status: corev1.ConditionTrue}}, ContainerStatuses: []corev1.ContainerStatus{{Name: "app"}}},
		}
		change(p)
		return p
	}
	now := metav1.Now()
	for _, tt := range []struct {
		name   string
		change func(*corev1.Pod)
		want   bool
	}{
		{"nothing", func(*corev1.Pod) {}, false},
		{"the time of a probe", func(p *corev1.Pod) { p.Status.Conditions[0].LastProbeTime = now }, false},
		{"readiness", func(p *corev1.Pod) { p.Status.Conditions[0].Status = corev1.ConditionFalse }, true},
		{"a container", func(p *corev1.Pod) { p.Status.ContainerStatuses[0].ContainerID = "x" }, true},
		{"an image", func(p *corev1.Pod) { p.Spec.Containers[0].Image = "b" }, true},
		{"deletion", func(p *corev1.Pod) { p.DeletionTimestamp = &now }, true},
		{"a label", func(p *corev1.Pod) { p.Labels = map[string]string{"a": "b"} }, true},
	} {
		t.Run(tt.name, func(t *testing.T) {
			if got := podChanges().Update(event.UpdateEvent{ObjectOld: pod(func(*corev1.Pod) {}),
				ObjectNew: pod(tt.change)}); got != tt.want {
				t.Errorf("got %v", got)
			}
		})
	}
}

func TestMetrics(t *testing.T) {
	registry := prometheus.NewRegistry()
	m, err := notice.NewMetrics(registry)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := nodes.NewMetrics(registry); err != nil {
		t.Errorf("beside those of requests: %v", err)
	}
	m.Completed(inplace.ReasonRolledOut)
	m.Pod("ContainerExited")
	m.Wrote("pod")
	families, err := registry.Gather()
	if err != nil {
		t.Fatal(err)
	}
	var names []string
	for _, f := range families {
		if strings.HasPrefix(f.GetName(), "criproxy_controller_rollout") {
			names = append(names, f.GetName())
		}
	}
	if got := strings.Join(names, " "); got != "criproxy_controller_rollout_api_writes_total "+
		"criproxy_controller_rollout_conversations_active criproxy_controller_rollout_pods_failed_total "+
		"criproxy_controller_rollouts_completed_total" {
		t.Errorf("metrics %s", got)
	}
}
