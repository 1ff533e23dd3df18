// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package uninstall

import (
	"bytes"
	"io"
	"strings"
	"testing"
	"time"

	"github.com/sirupsen/logrus"
	appsv1 "k8s.io/api/apps/v1"
	coordinationv1 "k8s.io/api/coordination/v1"
	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/api/meta/testrestmapper"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"sigs.k8s.io/controller-runtime/pkg/client"
	"sigs.k8s.io/controller-runtime/pkg/client/fake"

	appsv1alpha1 "github.com/cri-proxy/cri-proxy/api/apps/v1alpha1"
	"github.com/cri-proxy/cri-proxy/api/apps/v1beta1"
	inplace "github.com/cri-proxy/cri-proxy/api/inplace/v1alpha1"
	"github.com/cri-proxy/cri-proxy/api/scheme"
)

func cluster(t *testing.T, objects ...client.Object) (*departure, *bytes.Buffer) {
	t.Helper()
	types, err := scheme.New()
	if err != nil {
		t.Fatal(err)
	}
	log := logrus.New()
	log.SetOutput(io.Discard)
	var out bytes.Buffer
	c := fake.NewClientBuilder().WithScheme(types).WithObjects(objects...).WithStatusSubresource(&corev1.Pod{}).
		WithRESTMapper(testrestmapper.TestOnlyStaticRESTMapper(types)).
		WithIndex(&appsv1.DaemonSet{}, "metadata.name",
			func(o client.Object) []string { return []string{o.GetName()} }).
		Build()
	return &departure{client: c, namespace: "cri-proxy-system", lease: "cri-controller", log: log, out: &out}, &out
}

// A controller that is there is stopped, and its pods are waited for.
func TestUninstallStops(t *testing.T) {
	labels := map[string]string{"app": "x"}
	d, _ := cluster(t,
		&appsv1.Deployment{ObjectMeta: metav1.ObjectMeta{Namespace: "cri-proxy-system", Name: "cri-controller"},
			Spec: appsv1.DeploymentSpec{Replicas: new(int32(2)), Selector: &metav1.LabelSelector{MatchLabels: labels}}},
		&corev1.Pod{ObjectMeta: metav1.ObjectMeta{Namespace: "cri-proxy-system", Name: "cri-controller-1",
			Labels: labels}},
	)
	done := make(chan error, 1)
	go func() { done <- d.stop(t.Context()) }()
	select {
	case err := <-done:
		t.Fatalf("did not wait for the pod: %v", err)
	case <-time.After(2 * stopInterval):
	}
	if err := d.client.DeleteAllOf(t.Context(), &corev1.Pod{}, client.InNamespace("cri-proxy-system")); err != nil {
		t.Fatal(err)
	}
	if err := <-done; err != nil {
		t.Fatal(err)
	}
	var got appsv1.Deployment
	if err := d.client.Get(t.Context(), client.ObjectKey{Namespace: "cri-proxy-system", Name: "cri-controller"},
		&got); err != nil || *got.Spec.Replicas != 0 {
		t.Errorf("%v, %d replicas", err, *got.Spec.Replicas)
	}
}

func TestUninstallBesideAnother(t *testing.T) {
	now := metav1.NewMicroTime(time.Now())
	lease := &coordinationv1.Lease{ObjectMeta: metav1.ObjectMeta{Namespace: "cri-proxy-system", Name: "cri-controller"},
		Spec: coordinationv1.LeaseSpec{HolderIdentity: new("somebody"), RenewTime: &now,
			LeaseDurationSeconds: new(int32(15))}}
	d, _ := cluster(t, lease)
	if err := d.stop(t.Context()); err == nil || !strings.Contains(err.Error(), "somebody holds the Lease") {
		t.Errorf("%v, want a refusal while another controller works", err)
	}
	d, _ = cluster(t)
	if err := d.stop(t.Context()); err != nil {
		t.Error(err)
	}
}

// Nothing that only the controller could undo is left, and what others have on the same objects is.
func TestUninstallCleans(t *testing.T) {
	gate := func(name string, conditions ...corev1.PodCondition) *corev1.Pod {
		return &corev1.Pod{
			ObjectMeta: metav1.ObjectMeta{Namespace: "ns", Name: name},
			Status:     corev1.PodStatus{Phase: corev1.PodRunning, Conditions: conditions},
			Spec: corev1.PodSpec{ReadinessGates: []corev1.PodReadinessGate{{ConditionType: inplace.ReadyGate}},
				Containers: []corev1.Container{{Name: "app"}}},
		}
	}
	template := corev1.PodTemplateSpec{Spec: gate("").Spec}
	kruises := func(name string, conditions ...corev1.PodCondition) *corev1.Pod {
		p := gate(name, conditions...)
		p.Spec.ReadinessGates[0].ConditionType = appsv1alpha1.KruisePodReadyConditionType
		return p
	}
	kruiseShut := func(message string) corev1.PodCondition {
		return corev1.PodCondition{Type: appsv1alpha1.KruisePodReadyConditionType, Status: corev1.ConditionFalse,
			Message: message}
	}
	kruiseTemplate := corev1.PodTemplateSpec{Spec: kruises("").Spec}
	d, out := cluster(t,
		gate("shut", corev1.PodCondition{Type: inplace.ReadyGate, Status: corev1.ConditionFalse,
			Reason: "InPlaceRollout", Message: "uid x"}),
		gate("new"),
		kruises("kruises-new"), // made when no controller was there
		kruises("kruises-orphan", kruiseShut(`[{"userAgent":"ContainerRecreateRequest","key":"ns/gone"}]`)),
		kruises("kruises-other", kruiseShut(`[{"userAgent":"Lifecycle","key":"x"}]`)),
		&appsv1.StatefulSet{ObjectMeta: metav1.ObjectMeta{Namespace: "ns", Name: "kruises"},
			Spec: appsv1.StatefulSetSpec{Template: kruiseTemplate}},
		gate("by-hand", corev1.PodCondition{Type: inplace.ReadyGate, Status: corev1.ConditionFalse, Reason: "ByHand"}),
		&inplace.InPlaceRollout{ObjectMeta: metav1.ObjectMeta{Namespace: "ns", Name: "r",
			Finalizers: []string{inplace.RolloutFinalizer, "other/hold"}},
			Spec: inplace.InPlaceRolloutSpec{Target: inplace.Target{PodName: "shut"}}},
		&appsv1alpha1.ImagePullJob{ObjectMeta: metav1.ObjectMeta{Namespace: "ns", Name: "j",
			Finalizers: []string{v1beta1.PullFinalizer, v1beta1.DeletionProtectionFinalizer}}},
		&appsv1.Deployment{ObjectMeta: metav1.ObjectMeta{Namespace: "ns", Name: "paused",
			Annotations: map[string]string{inplace.PausedByAnnotation: "uid-gone"}},
			Spec: appsv1.DeploymentSpec{Paused: true, Template: template}},
		&appsv1.Deployment{ObjectMeta: metav1.ObjectMeta{Namespace: "ns", Name: "paused-by-user"},
			Spec: appsv1.DeploymentSpec{Paused: true}},
	)
	if err := d.clean(t.Context()); err != nil {
		t.Fatal(err)
	}
	get := func(name string, o client.Object) {
		t.Helper()
		if err := d.client.Get(t.Context(), client.ObjectKey{Namespace: "ns", Name: name}, o); err != nil {
			t.Fatal(err)
		}
	}
	for name, want := range map[string]corev1.ConditionStatus{"shut": corev1.ConditionTrue, "new": corev1.ConditionTrue,
		"by-hand":     corev1.ConditionFalse,
		"kruises-new": corev1.ConditionTrue, "kruises-orphan": corev1.ConditionTrue,
		"kruises-other": corev1.ConditionFalse} {
		var p corev1.Pod
		get(name, &p)
		if len(p.Status.Conditions) != 1 || p.Status.Conditions[0].Status != want {
			t.Errorf("pod %s: %+v, want its gate %s", name, p.Status.Conditions, want)
		}
	}
	var r inplace.InPlaceRollout
	var j appsv1alpha1.ImagePullJob // the version that the mapper of this test prefers
	get("r", &r)
	get("j", &j)
	if len(r.Finalizers) != 1 || r.Finalizers[0] != "other/hold" || len(j.Finalizers) != 0 {
		t.Errorf("finalizers %v and %v", r.Finalizers, j.Finalizers)
	}
	for name, want := range map[string]bool{"paused": false, "paused-by-user": true} {
		var got appsv1.Deployment
		get(name, &got)
		if got.Spec.Paused != want || got.Annotations[inplace.PausedByAnnotation] != "" {
			t.Errorf("Deployment %s: paused %v, %v", name, got.Spec.Paused, got.Annotations)
		}
	}
	for _, want := range []string{"1 Deployments go on", "2 pods are in service again",
		"1 InPlaceRollouts had a finalizer",
		"WARNING: Deployment ns/paused has the readiness gate cri-proxy.io/in-place-ready",
		"2 pods are in service again that waited at the gate KruisePodReady",
		"WARNING: StatefulSet ns/kruises has the readiness gate KruisePodReady"} {
		if !strings.Contains(out.String(), want) {
			t.Errorf("output lacks %q:\n%s", want, out)
		}
	}
}

// With OpenKruise in the cluster its gate is left to it.
func TestUninstallBesideOpenKruise(t *testing.T) {
	pod := &corev1.Pod{
		ObjectMeta: metav1.ObjectMeta{Namespace: "ns", Name: "new"}, Status: corev1.PodStatus{Phase: corev1.PodRunning},
		Spec: corev1.PodSpec{
			ReadinessGates: []corev1.PodReadinessGate{{ConditionType: appsv1alpha1.KruisePodReadyConditionType}}},
	}
	d, out := cluster(t, pod,
		&appsv1.DaemonSet{ObjectMeta: metav1.ObjectMeta{Namespace: "kruise-system", Name: "kruise-daemon"}},
		&appsv1.Deployment{ObjectMeta: metav1.ObjectMeta{Namespace: "ns", Name: "web"},
			Spec: appsv1.DeploymentSpec{Template: corev1.PodTemplateSpec{Spec: pod.Spec}}},
	)
	if err := d.clean(t.Context()); err != nil {
		t.Fatal(err)
	}
	if err := d.client.Get(t.Context(), client.ObjectKeyFromObject(pod), pod); err != nil ||
		len(pod.Status.Conditions) != 0 || strings.Contains(out.String(), "KruisePodReady") {
		t.Errorf("%v, conditions %+v, output\n%s", err, pod.Status.Conditions, out)
	}
}
