// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package spec_test

import (
	"testing"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"sigs.k8s.io/controller-runtime/pkg/client"
	"sigs.k8s.io/controller-runtime/pkg/event"
	"sigs.k8s.io/controller-runtime/pkg/predicate"

	"github.com/cri-proxy/cri-proxy/controller/imagepull/spec"
	"github.com/cri-proxy/cri-proxy/controller/nodes"
)

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
		{"a node's heartbeat", spec.NodeChanges(), same,
			node(func(n *corev1.Node) { n.Status.Conditions[0].LastHeartbeatTime = now }), false},
		{"a node that is no longer ready", spec.NodeChanges(), same,
			node(func(n *corev1.Node) { n.Status.Conditions[0].Status = corev1.ConditionUnknown }), true},
		{"a node's label", spec.NodeChanges(), same, node(func(n *corev1.Node) { n.Labels["a"] = "c" }), true},
		{"a node's address", spec.NodeChanges(), same,
			node(func(n *corev1.Node) { n.Annotations = map[string]string{nodes.AddressAnnotation: "192.0.2.2"} }),
			true},
		{"a node that is deleted", spec.NodeChanges(), same, node(func(n *corev1.Node) { n.DeletionTimestamp = &now }),
			true},

		{"a pod's condition", spec.PodChanges(), samePod,
			pod(func(p *corev1.Pod) { p.Status.Conditions = []corev1.PodCondition{{Type: "x"}} }), false},
		{"a pod that has ended", spec.PodChanges(), samePod,
			pod(func(p *corev1.Pod) { p.Status.Phase = corev1.PodFailed }),
			true},
		{"a pod that is scheduled", spec.PodChanges(), pod(func(p *corev1.Pod) { p.Spec.NodeName = "" }),
			samePod, true},
		{"a pod's label", spec.PodChanges(), samePod,
			pod(func(p *corev1.Pod) { p.Labels = map[string]string{"a": "b"} }),
			true},

		{"a job's status", spec.JobChanges(), sameJob, image(func(j *job) { j.Status.Active = 1 }), false},
		{"a job's finalizer", spec.JobChanges(), sameJob, image(func(j *job) { j.Finalizers = []string{"x"} }), false},
		{"a job's spec", spec.JobChanges(), sameJob, image(func(j *job) { j.Generation = 2 }), true},
		{"a job's annotation", spec.JobChanges(), sameJob,
			image(func(j *job) { j.Annotations = map[string]string{"a": "b"} }), true},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			if got := tt.predicate.Update(event.UpdateEvent{ObjectOld: tt.before,
				ObjectNew: tt.after}); got != tt.want {
				t.Errorf("got %v", got)
			}
		})
	}
}
