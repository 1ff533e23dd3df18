// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package podready_test

import (
	"context"
	"fmt"
	"io"
	"testing"
	"time"

	"github.com/sirupsen/logrus"
	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime/schema"
	"sigs.k8s.io/controller-runtime/pkg/client"
	"sigs.k8s.io/controller-runtime/pkg/client/fake"
	"sigs.k8s.io/controller-runtime/pkg/client/interceptor"
	"sigs.k8s.io/controller-runtime/pkg/reconcile"

	appsv1alpha1 "github.com/cri-proxy/cri-proxy/api/apps/v1alpha1"
	"github.com/cri-proxy/cri-proxy/api/scheme"
	"github.com/cri-proxy/cri-proxy/controller/kruise"
	"github.com/cri-proxy/cri-proxy/controller/podready"
	"github.com/cri-proxy/cri-proxy/controller/pods"
)

type request = appsv1alpha1.ContainerRecreateRequest

const (
	keyOther   = `{"userAgent":"Lifecycle","key":"ns/pod"}`
	keyAtWork  = `{"userAgent":"ContainerRecreateRequest","key":"ns/at-work"}`
	keyEnding  = `{"userAgent":"ContainerRecreateRequest","key":"ns/ending"}`
	keyEnded   = `{"userAgent":"ContainerRecreateRequest","key":"ns/ended"}`
	keyDeleted = `{"userAgent":"ContainerRecreateRequest","key":"ns/deleted"}`
)

// gatedPod is a pod with the gate, and its condition if a message is given: False, or with "True"
// True.
func gatedPod(message string) *corev1.Pod {
	pod := &corev1.Pod{
		ObjectMeta: metav1.ObjectMeta{Namespace: "ns", Name: "pod", UID: "pod-uid"},
		Spec: corev1.PodSpec{ReadinessGates: []corev1.PodReadinessGate{{ConditionType: "other"},
			{ConditionType: "KruisePodReady"}}},
		Status: corev1.PodStatus{Phase: corev1.PodRunning,
			Conditions: []corev1.PodCondition{{Type: corev1.PodReady, Status: corev1.ConditionFalse}}},
	}
	if message != "" {
		c := corev1.PodCondition{Type: "KruisePodReady", Status: corev1.ConditionFalse, Message: message}
		if message == "True" {
			c.Status, c.Message = corev1.ConditionTrue, ""
		}
		pod.Status.Conditions = append(pod.Status.Conditions, c)
	}
	return pod
}

// keyHolders are requests whose keys pods may have.
func keyHolders() []client.Object {
	now := metav1.Now()
	return []client.Object{
		&request{ObjectMeta: metav1.ObjectMeta{Namespace: "ns", Name: "at-work"}},
		&request{
			ObjectMeta: metav1.ObjectMeta{Namespace: "ns", Name: "ending",
				Finalizers: []string{appsv1alpha1.UnreadyAcquiredFinalizer}},
			Status: appsv1alpha1.ContainerRecreateRequestStatus{CompletionTime: &now},
		},
		&request{ObjectMeta: metav1.ObjectMeta{Namespace: "ns", Name: "ended"},
			Status: appsv1alpha1.ContainerRecreateRequestStatus{CompletionTime: &now}},
	}
}

// podReady is a reconciler in a cluster with one pod and the requests of keyHolders.
func podReady(t *testing.T, pod *corev1.Pod, funcs interceptor.Funcs) *podready.Reconciler {
	t.Helper()
	types, err := scheme.New()
	if err != nil {
		t.Fatal(err)
	}
	log := logrus.New()
	log.SetOutput(io.Discard)
	c := fake.NewClientBuilder().WithScheme(types).WithObjects(append(keyHolders(), pod)...).
		WithStatusSubresource(&corev1.Pod{}).WithInterceptorFuncs(funcs).Build()
	return &podready.Reconciler{Client: c, APIReader: c, Log: log}
}

// theCondition is what the pod says of the gate.
func theCondition(t *testing.T, r *podready.Reconciler) string {
	t.Helper()
	var pod corev1.Pod
	if err := r.APIReader.Get(t.Context(), client.ObjectKey{Namespace: "ns", Name: "pod"}, &pod); err != nil {
		t.Fatal(err)
	}
	c := pods.Condition(&pod, "KruisePodReady")
	if c == nil {
		return "none"
	}
	return fmt.Sprint(c.Status, c.Message)
}

var onThePod = reconcile.Request{NamespacedName: client.ObjectKey{Namespace: "ns", Name: "pod"}}

// What becomes of the condition of a pod with the gate. OpenKruise makes one where there is none,
// and leaves those that are there.
func TestPodReady(t *testing.T) {
	change := func(pod *corev1.Pod, f func(*corev1.Pod)) *corev1.Pod { f(pod); return pod }
	now := metav1.Now()
	for _, tt := range []struct {
		name string
		pod  *corev1.Pod
		want string
		look time.Duration
	}{
		{"new", gatedPod(""), "True", 0},
		{"open", gatedPod("True"), "True", 0},
		{"without the gate",
			change(gatedPod(""), func(p *corev1.Pod) { p.Spec.ReadinessGates = p.Spec.ReadinessGates[:1] }),
			"none", 0},
		{"going away",
			change(gatedPod(""), func(p *corev1.Pod) { p.DeletionTimestamp, p.Finalizers = &now, []string{"x/y"} }),
			"none", 0},
		{"ended", change(gatedPod(""), func(p *corev1.Pod) { p.Status.Phase = corev1.PodFailed }), "none", 0},
		{"kept by another", gatedPod("[" + keyOther + "]"), "False[" + keyOther + "]", 0},
		{"shut in words", gatedPod("by hand"), "Falseby hand", 0},
		{"drained", gatedPod("[" + keyAtWork + "]"), "False[" + keyAtWork + "]", time.Minute},
		{"about to be let go", gatedPod("[" + keyEnding + "]"), "False[" + keyEnding + "]", time.Minute},
		{"of a request that has ended", gatedPod("[" + keyEnded + "]"), "True", 0},
		{"of a request that is gone", gatedPod("[" + keyDeleted + "]"), "True", 0},
		{"of one that is gone, and others", gatedPod("[" + keyDeleted + "," + keyOther + "," + keyAtWork + "]"),
			"False[" + keyOther + "," + keyAtWork + "]", 0},
	} {
		t.Run(tt.name, func(t *testing.T) {
			r := podReady(t, tt.pod, interceptor.Funcs{})
			result, err := r.Reconcile(t.Context(), onThePod)
			if got := theCondition(t, r); err != nil || got != tt.want || result.RequeueAfter != tt.look {
				t.Errorf("condition %s, again after %s, %v; want %s, %s", got, result.RequeueAfter, err, tt.want,
					tt.look)
			}
		})
	}
}

// A pod whose status somebody else has just written is looked at again, and not written.
func TestPodReadyConflict(t *testing.T) {
	r := podReady(t, gatedPod(""), interceptor.Funcs{
		SubResourcePatch: func(context.Context, client.Client, string, client.Object, client.Patch,
			...client.SubResourcePatchOption) error {
			return apierrors.NewConflict(schema.GroupResource{Resource: "pods"}, "pod", nil)
		},
	})
	if result, err := r.Reconcile(t.Context(), onThePod); err != nil || result.RequeueAfter != 200*time.Millisecond {
		t.Errorf("%+v, %v", result, err)
	}
}

// Whether a request is there only the API server says: one that cannot be asked lets nothing go.
func TestPodReadyAsks(t *testing.T) {
	r := podReady(t, gatedPod("["+keyDeleted+"]"), interceptor.Funcs{
		Get: func(ctx context.Context, c client.WithWatch, key client.ObjectKey, o client.Object,
			opts ...client.GetOption) error {
			if _, ok := o.(*request); ok {
				return apierrors.NewServiceUnavailable("away")
			}
			return c.Get(ctx, key, o, opts...)
		},
	})
	if _, err := r.Reconcile(t.Context(), onThePod); err == nil {
		t.Error("no error")
	}
	if got := theCondition(t, r); got != "False["+keyDeleted+"]" {
		t.Errorf("condition %s", got)
	}
}

// A pod that is OpenKruise's to open is not touched, and looked at again.
func TestPodReadyGateClosed(t *testing.T) {
	r := podReady(t, gatedPod(""), interceptor.Funcs{})
	r.Gate = &kruise.Gate{}
	result, err := r.Reconcile(t.Context(), onThePod)
	if got := theCondition(t, r); err != nil || result.RequeueAfter != kruise.StandBy || got != "none" {
		t.Errorf("condition %s, %+v, %v", got, result, err)
	}
}
