// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package recreate

import (
	"testing"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"sigs.k8s.io/controller-runtime/pkg/client/fake"

	appsv1alpha1 "github.com/cri-proxy/cri-proxy/api/apps/v1alpha1"
	"github.com/cri-proxy/cri-proxy/controller/recreate/accept"
	"github.com/cri-proxy/cri-proxy/controller/slimcache"
)

// Slim is what the cache keeps of a pod.
func Slim(t *testing.T, pod *corev1.Pod) *corev1.Pod {
	t.Helper()
	for kind, by := range slimcache.Options().ByObject {
		if _, ok := kind.(*corev1.Pod); ok {
			out, err := by.Transform(pod)
			if err != nil {
				t.Fatal(err)
			}
			return out.(*corev1.Pod)
		}
	}
	t.Fatal("the cache keeps pods as they are")
	return nil
}

// What the cache keeps of a pod is enough to accept a request and to command the
// node just as with the whole pod.
func TestSlimPod(t *testing.T) {
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
	crr := &appsv1alpha1.ContainerRecreateRequest{ObjectMeta: metav1.ObjectMeta{Namespace: "ns"},
		Spec: appsv1alpha1.ContainerRecreateRequestSpec{
			PodName: "pod", Containers: []appsv1alpha1.ContainerRecreateRequestContainer{{Name: "app"}},
		}}
	unmanaged := whole.DeepCopy()
	unmanaged.ManagedFields = nil // those above are none that the fake API server takes
	r := &Reconciler{APIReader: fake.NewClientBuilder().WithObjects(unmanaged).Build()}
	for _, pod := range []*corev1.Pod{whole, Slim(t, whole)} {
		unmanaged := pod.DeepCopy()
		unmanaged.ManagedFields = nil
		from := fake.NewClientBuilder().WithObjects(unmanaged, &corev1.Node{ObjectMeta: metav1.ObjectMeta{Name: "n"}}).
			Build()
		a, _, err := accept.Read(t.Context(), from, from, crr)
		if err != nil || a.PodUID != "u" || a.NodeName != "n" || a.Containers["app"].ContainerID != "containerd://x" ||
			a.Containers["app"].RestartCount != 3 {
			t.Fatalf("accepted %+v, error %v", a, err)
		}
		n := &commander{request: &request{r: r, crr: crr, accepted: a, pod: pod}}
		n.gather()
		if r, err := n.restartRequest(t.Context(), n.containers[0]); err != nil || r.GetPod().GetUid() != "m" ||
			r.GetContainers()[0].GetPreStop().GetSleep().GetSeconds() != 1 {
			t.Errorf("request %v, error %v", r, err)
		}
	}
}
