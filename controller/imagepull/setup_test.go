// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package imagepull

import (
	"io"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/sirupsen/logrus"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/rest"
	ctrl "sigs.k8s.io/controller-runtime"
	"sigs.k8s.io/controller-runtime/pkg/client"
	"sigs.k8s.io/controller-runtime/pkg/config"
	"sigs.k8s.io/controller-runtime/pkg/event"
	metricsserver "sigs.k8s.io/controller-runtime/pkg/metrics/server"
	"sigs.k8s.io/controller-runtime/pkg/predicate"

	opsv1 "github.com/cri-proxy/cri-proxy/api/ops/v1"
	"github.com/cri-proxy/cri-proxy/api/scheme"
	"github.com/cri-proxy/cri-proxy/controller/logadapter"
	"github.com/cri-proxy/cri-proxy/controller/nodes"
)

func TestSetup(t *testing.T) {
	scheme, err := scheme.New()
	if err != nil {
		t.Fatal(err)
	}
	log := logrus.New()
	log.SetOutput(io.Discard)
	m, err := ctrl.NewManager(&rest.Config{Host: "http://127.0.0.1:1"}, ctrl.Options{
		Scheme: scheme, Logger: logadapter.New(log), Metrics: metricsserver.Options{BindAddress: "0"}, HealthProbeBindAddress: "0",
		Controller: config.Controller{SkipNameValidation: new(true)}, // for -count
	})
	if err != nil {
		t.Fatal(err)
	}
	if err := (&Reconciler{Client: m.GetClient(), Log: log}).SetupWithManager(t.Context(), m, 1); err != nil {
		t.Error(err)
	}
	if err := (&ListReconciler{Client: m.GetClient(), Log: log}).SetupWithManager(t.Context(), m, 1); err != nil {
		t.Error(err)
	}
}

// What wakes a reconciler, and what does not.
func TestChanges(t *testing.T) {
	node := func(change func(*corev1.Node)) client.Object {
		n := &corev1.Node{
			ObjectMeta: metav1.ObjectMeta{Labels: map[string]string{"a": "b"}},
			Status: corev1.NodeStatus{
				Conditions: []corev1.NodeCondition{{Type: corev1.NodeReady, Status: corev1.ConditionTrue}},
				Addresses:  []corev1.NodeAddress{{Type: corev1.NodeInternalIP, Address: "192.0.2.1"}},
			},
		}
		change(n)
		return n
	}
	pod := func(change func(*corev1.Pod)) client.Object {
		p := &corev1.Pod{Spec: corev1.PodSpec{NodeName: "n"}, Status: corev1.PodStatus{Phase: corev1.PodRunning}}
		change(p)
		return p
	}
	image := func(change func(*job)) client.Object {
		j := &job{ObjectMeta: metav1.ObjectMeta{Generation: 1}}
		change(j)
		return j
	}
	now := metav1.Now()
	same, samePod, sameJob := node(func(*corev1.Node) {}), pod(func(*corev1.Pod) {}), image(func(*job) {})
	tests := []struct {
		name          string
		predicate     predicate.Predicate
		before, after client.Object
		want          bool
	}{
		{"a node's heartbeat", nodeChanges(), same, node(func(n *corev1.Node) { n.Status.Conditions[0].LastHeartbeatTime = now }), false},
		{"a node that is no longer ready", nodeChanges(), same, node(ready(corev1.ConditionUnknown)), true},
		{"a node's label", nodeChanges(), same, node(func(n *corev1.Node) { n.Labels["a"] = "c" }), true},
		{"a node's address", nodeChanges(), same, node(func(n *corev1.Node) { n.Annotations = map[string]string{nodes.AddressAnnotation: "192.0.2.2"} }), true},
		{"a node that is deleted", nodeChanges(), same, node(func(n *corev1.Node) { n.DeletionTimestamp = &now }), true},

		{"a pod's condition", podChanges(), samePod, pod(func(p *corev1.Pod) { p.Status.Conditions = []corev1.PodCondition{{Type: "x"}} }), false},
		{"a pod that has ended", podChanges(), samePod, pod(func(p *corev1.Pod) { p.Status.Phase = corev1.PodFailed }), true},
		{"a pod that is scheduled", podChanges(), pod(func(p *corev1.Pod) { p.Spec.NodeName = "" }), samePod, true},
		{"a pod's label", podChanges(), samePod, pod(func(p *corev1.Pod) { p.Labels = map[string]string{"a": "b"} }), true},

		{"a job's status", jobChanges(), sameJob, image(func(j *job) { j.Status.Active = 1 }), false},
		{"a job's finalizer", jobChanges(), sameJob, image(func(j *job) { j.Finalizers = []string{"x"} }), false},
		{"a job's spec", jobChanges(), sameJob, image(func(j *job) { j.Generation = 2 }), true},
		{"a job's annotation", jobChanges(), sameJob, image(func(j *job) { j.Annotations = map[string]string{"a": "b"} }), true},

		{"a child's progress", childChanges(), image(func(j *job) { j.Status.Active = 1 }), image(func(j *job) { j.Status.Active, j.Status.Percent = 2, 10 }), false},
		{"a child's beginning", childChanges(), sameJob, image(func(j *job) { j.Status.Active = 1 }), true},
		{"a child's failure", childChanges(), sameJob, image(func(j *job) { j.Status.Failed = 1 }), true},
		{"a child's end", childChanges(), sameJob, image(func(j *job) { j.Status.CompletionTime = &now }), true},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			if got := tt.predicate.Update(event.UpdateEvent{ObjectOld: tt.before, ObjectNew: tt.after}); got != tt.want {
				t.Errorf("got %v", got)
			}
		})
	}
}

func TestMetrics(t *testing.T) {
	registry := prometheus.NewRegistry()
	m, err := NewMetrics(registry)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := nodes.NewMetrics(registry); err != nil {
		t.Errorf("beside those of requests: %v", err)
	}
	m.pulled(&opsv1.PullOperation{Phase: opsv1.PullPhase_PULL_SUCCEEDED, Reason: "Pulled", BytesFetched: 7}, time.Second)
	m.pulled(&opsv1.PullOperation{Phase: opsv1.PullPhase_PULL_CANCELLED, Reason: "Cancelled"}, time.Second)
	m.failed(reasonNoProxy)
	m.pulling(1)
	m.completed(completeSucceeded)
	m.wrote("job")
	families, err := registry.Gather()
	if err != nil {
		t.Fatal(err)
	}
	var seen []string
	for _, f := range families {
		if !strings.HasPrefix(f.GetName(), "criproxy_controller_image_") {
			continue
		}
		for _, s := range f.GetMetric() {
			text := f.GetName()
			for _, l := range s.GetLabel() {
				text += " " + l.GetValue()
			}
			seen = append(seen, text)
		}
	}
	want := `criproxy_controller_image_api_writes_total job
criproxy_controller_image_conversations_active
criproxy_controller_image_jobs_completed_total Succeeded
criproxy_controller_image_pull_bytes_total
criproxy_controller_image_pull_duration_seconds
criproxy_controller_image_pulls_active
criproxy_controller_image_pulls_total Cancelled cancelled
criproxy_controller_image_pulls_total NoProxy failed
criproxy_controller_image_pulls_total Pulled succeeded`
	for i, text := range seen { // labels in the order of their values
		parts := strings.Fields(text)
		slices.Sort(parts[1:])
		seen[i] = strings.Join(parts, " ")
	}
	slices.Sort(seen)
	if got := strings.Join(seen, "\n"); got != want {
		t.Errorf("got\n%s\nwant\n%s", got, want)
	}
}
