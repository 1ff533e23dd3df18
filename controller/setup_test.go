// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package controller

import (
	"bytes"
	"errors"
	"strings"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/sirupsen/logrus"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"sigs.k8s.io/controller-runtime/pkg/client/fake"
	"sigs.k8s.io/controller-runtime/pkg/event"
)

// What the cache keeps of a pod is enough to accept a request and to command the
// node just as with the whole pod.
func TestSlimPod(t *testing.T) {
	whole := &corev1.Pod{
		ObjectMeta: metav1.ObjectMeta{
			Namespace: "ns", Name: "pod", UID: "u", ResourceVersion: "7",
			Annotations: map[string]string{"a": "b", mirrorAnnotation: "m"}, Labels: map[string]string{"c": "d"},
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
			ContainerStatuses: []corev1.ContainerStatus{{Name: "app", ContainerID: "containerd://x", RestartCount: 3, Image: "i", ImageID: "id"}},
		},
	}
	out, err := slimPod(whole)
	if err != nil {
		t.Fatal(err)
	}
	slim := out.(*corev1.Pod)
	if slim.Spec.Containers[0].Env != nil || slim.Spec.Volumes != nil || slim.ManagedFields != nil || len(slim.Annotations) != 1 {
		t.Errorf("kept too much: %+v", slim)
	}
	if !hasReadyGate(slim) || slim.Status.PodIP != "192.0.2.7" || slim.ResourceVersion != "7" || slim.Annotations[mirrorAnnotation] != "m" {
		t.Errorf("kept too little: %+v", slim)
	}
	crr := &request{Spec: spec{PodName: "pod", Containers: containers("app")}}
	unmanaged := whole.DeepCopy()
	unmanaged.ManagedFields = nil // those above are none that the fake API server takes
	r := &ContainerRecreateReconciler{APIReader: fake.NewClientBuilder().WithObjects(unmanaged).Build()}
	for _, pod := range []*corev1.Pod{whole, slim} {
		a, err := accept(crr, pod, &corev1.Node{})
		if err != nil || a.PodUID != "u" || a.NodeName != "n" || a.Containers["app"].ContainerID != "containerd://x" || a.Containers["app"].RestartCount != 3 {
			t.Fatalf("accepted %+v, error %v", a, err)
		}
		p := &pass{r: r, crr: crr, accepted: a, pod: pod}
		p.gather()
		if r, err := p.restartRequest(t.Context(), p.containers[0]); err != nil || r.GetPod().GetUid() != "m" || r.GetContainers()[0].GetPreStop().GetSleep().GetSeconds() != 1 {
			t.Errorf("request %v, error %v", r, err)
		}
	}
}

func TestPodChanges(t *testing.T) {
	pod := func(change func(*corev1.Pod)) *corev1.Pod {
		p := &corev1.Pod{Status: corev1.PodStatus{Phase: corev1.PodRunning, ContainerStatuses: []corev1.ContainerStatus{{Name: "app", ContainerID: "a"}}}}
		change(p)
		return p
	}
	tests := []struct {
		name   string
		change func(*corev1.Pod)
		want   bool
	}{
		{"nothing", func(*corev1.Pod) {}, false},
		{"condition", func(p *corev1.Pod) { p.Status.Conditions = []corev1.PodCondition{{Type: "x"}} }, false},
		{"container", func(p *corev1.Pod) { p.Status.ContainerStatuses[0].ContainerID = "b" }, true},
		{"readiness", func(p *corev1.Pod) { p.Status.ContainerStatuses[0].Ready = true }, true},
		{"sidecar", func(p *corev1.Pod) { p.Status.InitContainerStatuses = []corev1.ContainerStatus{{}} }, true},
		{"phase", func(p *corev1.Pod) { p.Status.Phase = corev1.PodFailed }, true},
		{"deletion", func(p *corev1.Pod) { p.DeletionTimestamp = pointer(metav1.Now()) }, true},
		{"another pod", func(p *corev1.Pod) { p.UID = "b" }, true},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			e := event.UpdateEvent{ObjectOld: pod(func(*corev1.Pod) {}), ObjectNew: pod(tt.change)}
			if got := podChanges().Update(e); got != tt.want {
				t.Errorf("got %v, want %v", got, tt.want)
			}
		})
	}
}

func TestRequestsOfPod(t *testing.T) {
	b := newBed(t)
	b.create("a", spec{Containers: containers("app")})
	b.until("completed", retired, "a")
	b.create("b", spec{Containers: containers("app")})
	b.createFor("c", spec{PodName: "other", Containers: containers("app")})
	got := b.r.requestsOfPod(t.Context(), &corev1.Pod{ObjectMeta: metav1.ObjectMeta{Namespace: "ns", Name: "pod"}})
	if len(got) != 1 || got[0].Name != "b" {
		t.Errorf("got %v, want only b: a is completed, c is for another pod", got)
	}
}

func TestLogr(t *testing.T) {
	var out bytes.Buffer
	log := logrus.New()
	log.SetOutput(&out)
	log.SetFormatter(&logrus.JSONFormatter{DisableTimestamp: true})
	l := NewLogr(log).WithName("a").WithName("b").WithValues("k", 1)
	l.Info("hello", "odd")
	l.V(1).Info("not seen")
	l.Error(errors.New("broken"), "bye", "x", "y")
	want := `{"k":1,"level":"info","logger":"a.b","msg":"hello","odd":"(no value)"}` + "\n" +
		`{"error":"broken","k":1,"level":"error","logger":"a.b","msg":"bye","x":"y"}` + "\n"
	if out.String() != want {
		t.Errorf("got\n%swant\n%s", out.String(), want)
	}
	log.SetLevel(logrus.TraceLevel)
	if !l.V(7).Enabled() || l.V(8).Enabled() {
		t.Error("V(7) must be seen at trace, and the request bodies of V(8) never")
	}
}

func TestMetrics(t *testing.T) {
	registry := prometheus.NewRegistry()
	m, err := NewMetrics(registry)
	if err != nil {
		t.Fatal(err)
	}
	m.requestCompleted(time.Second, []string{"Succeeded"}, true)
	m.nodeCall("Restart", 0, time.Millisecond)
	m.wrote("request")
	m.watching(1)
	families, err := registry.Gather()
	if err != nil {
		t.Fatal(err)
	}
	if len(families) != 7 {
		t.Errorf("%d metrics", len(families))
	}
	for _, f := range families {
		if !strings.HasPrefix(f.GetName(), "criproxy_controller_") {
			t.Errorf("metric %s", f.GetName())
		}
	}
	if _, err := NewMetrics(registry); err == nil {
		t.Error("registered twice without an error")
	}
}
