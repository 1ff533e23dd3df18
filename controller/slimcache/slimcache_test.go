// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package slimcache_test

import (
	"reflect"
	"testing"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"sigs.k8s.io/controller-runtime/pkg/client"

	"github.com/cri-proxy/cri-proxy/controller/pods"
	"github.com/cri-proxy/cri-proxy/controller/slimcache"
)

// transform is what the cache keeps of an object.
func transform(t *testing.T, o client.Object) client.Object {
	t.Helper()
	for kind, by := range slimcache.Options().ByObject {
		if reflect.TypeOf(kind) != reflect.TypeOf(o) {
			continue
		}
		out, err := by.Transform(o)
		if err != nil {
			t.Fatal(err)
		}
		return out.(client.Object)
	}
	t.Fatalf("the cache keeps %T as it is", o)
	return nil
}

// What the cache keeps of a pod. That it is enough to command a node is in recreate's TestSlimPod.
func TestPod(t *testing.T) {
	whole := &corev1.Pod{
		ObjectMeta: metav1.ObjectMeta{
			Namespace: "ns", Name: "pod", UID: "u", ResourceVersion: "7",
			Annotations:   map[string]string{"a": "b", corev1.MirrorPodAnnotationKey: "m"},
			Labels:        map[string]string{"c": "d"},
			ManagedFields: []metav1.ManagedFieldsEntry{{Manager: "x"}},
		},
		Spec: corev1.PodSpec{
			NodeName: "n", RestartPolicy: corev1.RestartPolicyNever, Volumes: []corev1.Volume{{Name: "v"}},
			Containers: []corev1.Container{{
				Name: "app", Image: "i", Env: []corev1.EnvVar{{Name: "SECRET", Value: "s"}},
				Ports:     []corev1.ContainerPort{{Name: "p", ContainerPort: 1}},
				Lifecycle: &corev1.Lifecycle{PreStop: &corev1.LifecycleHandler{Sleep: &corev1.SleepAction{Seconds: 1}}},
			}},
			ReadinessGates: []corev1.PodReadinessGate{{ConditionType: "KruisePodReady"}},
		},
		Status: corev1.PodStatus{
			Phase: corev1.PodRunning, PodIP: "192.0.2.7",
			ContainerStatuses: []corev1.ContainerStatus{{Name: "app", ContainerID: "containerd://x", RestartCount: 3,
				Image: "i", ImageID: "id"}},
		},
	}
	slim := transform(t, whole).(*corev1.Pod)
	if slim.Spec.Containers[0].Env != nil || slim.Spec.Volumes != nil || slim.ManagedFields != nil ||
		len(slim.Annotations) != 1 {
		t.Errorf("kept too much: %+v", slim)
	}
	if !pods.HasReadyGate(slim) || slim.Status.PodIP != "192.0.2.7" || slim.ResourceVersion != "7" ||
		slim.Annotations[corev1.MirrorPodAnnotationKey] != "m" {
		t.Errorf("kept too little: %+v", slim)
	}
}

// What the cache keeps of nodes and pods is enough to choose nodes by.
func TestKeepsWhatChooses(t *testing.T) {
	labels := map[string]string{"a": "b"}
	node := transform(t, &corev1.Node{
		ObjectMeta: metav1.ObjectMeta{Name: "n", Labels: labels},
		Status: corev1.NodeStatus{Conditions: []corev1.NodeCondition{
			{Type: corev1.NodeDiskPressure},
			{Type: corev1.NodeReady, Status: corev1.ConditionTrue, LastHeartbeatTime: metav1.Now()},
		}},
	}).(*corev1.Node)
	if node.Labels["a"] != "b" || len(node.Status.Conditions) != 1 ||
		node.Status.Conditions[0].Status != corev1.ConditionTrue ||
		!node.Status.Conditions[0].LastHeartbeatTime.IsZero() {
		t.Errorf("node %+v", node)
	}
	chosen := &corev1.Pod{ObjectMeta: metav1.ObjectMeta{Labels: labels}, Spec: corev1.PodSpec{NodeName: "n"}}
	if pod := transform(t, chosen).(*corev1.Pod); pod.Labels["a"] != "b" || pod.Spec.NodeName != "n" {
		t.Errorf("pod %+v", pod)
	}
}

// Whether kubelet carries over that a container has started can be told from what the cache keeps.
func TestKeepsKubeletVersion(t *testing.T) {
	for _, version := range []string{"v1.34.4+k3s1", "v1.35.0", ""} {
		node := &corev1.Node{}
		node.Status.NodeInfo.KubeletVersion = version
		if want := pods.CarriesStarted(node); pods.CarriesStarted(transform(t, node).(*corev1.Node)) != want {
			t.Errorf("%q: the cache says otherwise than %v", version, want)
		}
	}
}
