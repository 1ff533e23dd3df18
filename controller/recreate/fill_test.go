// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package recreate_test

import (
	"context"
	"slices"
	"strings"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/api/meta"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/util/intstr"
	"sigs.k8s.io/controller-runtime/pkg/client"
	"sigs.k8s.io/controller-runtime/pkg/client/interceptor"

	appsv1alpha1 "github.com/cri-proxy/cri-proxy/api/apps/v1alpha1"
	"github.com/cri-proxy/cri-proxy/controller/pods"
	"github.com/cri-proxy/cri-proxy/controller/recreate"
	"github.com/cri-proxy/cri-proxy/controller/recreate/accept"
)

func filledIn(id string, restarts int32) *appsv1alpha1.ContainerRecreateRequestContainerContext {
	return &appsv1alpha1.ContainerRecreateRequestContainerContext{ContainerID: id, RestartCount: restarts}
}

// TestFilledIn: what admission has filled in is what the request is carried out by, and the node is
// told no more than without.
func TestFilledIn(t *testing.T) {
	port := intstr.FromString("bye")
	hook := func(p *corev1.Pod) {
		// more than a node accepts as a request's own
		p.Spec.TerminationGracePeriodSeconds = pointer(int64(7 * 24 * 3600))
		p.Spec.Containers[0].Ports = []corev1.ContainerPort{
			{Name: "bye", ContainerPort: 8080, Protocol: corev1.ProtocolTCP}}
		p.Spec.Containers[0].Lifecycle = &corev1.Lifecycle{
			PreStop: &corev1.LifecycleHandler{HTTPGet: &corev1.HTTPGetAction{Path: "/", Port: port}}}
	}
	b := newBed(t, hook)
	b.r.Client = interceptor.NewClient(b.r.Client.(client.WithWatch), interceptor.Funcs{
		Get: func(ctx context.Context, c client.WithWatch, key client.ObjectKey, o client.Object,
			opts ...client.GetOption) error {
			err := c.Get(ctx, key, o, opts...)
			if pod, ok := o.(*corev1.Pod); ok && err == nil { // as the cache has it
				*pod = *recreate.Slim(t, pod)
			}
			return err
		},
	})
	crr := &request{ObjectMeta: metav1.ObjectMeta{Namespace: "ns"},
		Spec: spec{PodName: "pod", Containers: containers("app", "web")}}
	if err := accept.Fill(t.Context(), b.client, crr); err != nil {
		t.Fatal(err)
	}
	app, web := crr.Spec.Containers[0], crr.Spec.Containers[1]
	if *app.StatusContext != *filledIn("containerd://old-app", 0) || app.PreStop.HTTPGet.Port != port ||
		app.Ports[0].ContainerPort != 8080 {
		t.Errorf("app: %+v", app)
	}
	if *web.StatusContext != *filledIn("containerd://old-web", 0) || web.PreStop != nil || web.Ports != nil {
		t.Errorf("web: %+v", web)
	}
	b.create("a", crr.Spec)
	got := b.until("completed", retired, "a")
	b.wantStates(got, "app Succeeded killed; web Succeeded killed")
	for _, r := range b.node.Requests() {
		if c := r.GetContainers()[0]; c.GracePeriodSeconds != nil {
			t.Errorf("the node was told a grace of %d s for %s, and knows the pod's", c.GetGracePeriodSeconds(),
				c.GetName())
		}
	}
}

// TestReplacedSinceCreation: a container that has been replaced between the creation of a request
// and its acceptance is not the one that the request was made for.
func TestReplacedSinceCreation(t *testing.T) {
	b := newBed(t)
	list := containers("app")
	list[0].StatusContext = filledIn("containerd://old-app", 0)
	b.create("a", spec{Containers: list})
	b.node.Run(podUID, "app", "kubelets", 1)
	b.kubelet("", "app", "kubelets", 1)
	crr := b.until("completed", retired, "a")
	wantContains(t, "message", crr.Status.Message,
		"is no longer the one the request was made for (containerd://old-app)")
}

// TestReplacedAtCreation: where the webhook has read a status that did not show the last restart
// yet, it is not the user who is told to leave something out.
func TestReplacedAtCreation(t *testing.T) {
	b := newBed(t, func(p *corev1.Pod) {
		s := &p.Status.ContainerStatuses[0]
		s.ContainerID, s.RestartCount = "containerd://newer-app", 1
	})
	list := containers("app")
	list[0].StatusContext = filledIn("containerd://old-app", 0)
	b.create("a", spec{Containers: list})
	crr := b.get("a")
	crr.Labels = map[string]string{appsv1alpha1.PodUIDLabel: podUID}
	if err := b.client.Update(t.Context(), crr); err != nil {
		t.Fatal(err)
	}
	crr = b.until("completed", retired, "a")
	b.wantStates(crr, "app Failed: container app was restarted at about the time of the request: that was made for "+
		"containerd://old-app, and it is containerd://newer-app now; create another request")
	if len(b.node.Requests()) != 0 {
		t.Errorf("the node got %v", b.node.Commanded())
	}
}

// TestNotFilledIn: where no webhook refuses it, what a user writes into read-only fields is refused
// when the request is accepted.
func TestNotFilledIn(t *testing.T) {
	for name, change := range map[string]func(*appsv1alpha1.ContainerRecreateRequestContainer){
		"an invented container": func(c *appsv1alpha1.ContainerRecreateRequestContainer) {
			c.StatusContext = filledIn("containerd://x", 0)
		},
		"one of a request before": func(c *appsv1alpha1.ContainerRecreateRequestContainer) {
			c.StatusContext = filledIn("containerd://older-app", -1)
		},
		"a hook": func(c *appsv1alpha1.ContainerRecreateRequestContainer) {
			c.PreStop = &appsv1alpha1.ProbeHandler{Exec: &corev1.ExecAction{Command: []string{"true"}}}
		},
		"ports": func(c *appsv1alpha1.ContainerRecreateRequestContainer) {
			c.Ports = []corev1.ContainerPort{{ContainerPort: 1}}
		},
	} {
		t.Run(name, func(t *testing.T) {
			b := newBed(t)
			list := containers("app")
			change(&list[0])
			b.create("a", spec{Containers: list})
			crr := b.until("completed", retired, "a")
			wantContains(t, "message", crr.Status.Message,
				"preStop, ports and statusContext are read-only: they are taken from the pod, leave them out")
			if len(b.node.Requests()) != 0 {
				t.Errorf("the node got %v", b.node.Commanded())
			}
		})
	}
	t.Run("what OpenKruise fills in for a sleep", func(t *testing.T) {
		b := newBed(t, func(p *corev1.Pod) {
			p.Spec.Containers[0].Lifecycle = &corev1.Lifecycle{
				PreStop: &corev1.LifecycleHandler{Sleep: &corev1.SleepAction{Seconds: 3}}}
		})
		list := containers("app")
		list[0].StatusContext, list[0].PreStop = filledIn("containerd://old-app", 0), &appsv1alpha1.ProbeHandler{}
		b.create("a", spec{Containers: list})
		b.wantStates(b.until("completed", retired, "a"), "app Succeeded killed")
	})
	t.Run("what is true", func(t *testing.T) {
		b := newBed(t)
		list := containers("app")
		list[0].StatusContext = filledIn("containerd://old-app", 0)
		b.create("a", spec{Containers: list})
		b.wantStates(b.until("completed", retired, "a"), "app Succeeded killed")
	})
}

// TestBothForms: what clients of v1alpha1 read in annotations, clients of v1beta1 read in the
// status.
func TestBothForms(t *testing.T) {
	b := newBed(t, func(p *corev1.Pod) {
		p.Spec.ReadinessGates = []corev1.PodReadinessGate{{ConditionType: appsv1alpha1.KruisePodReadyConditionType}}
		p.Status.Conditions = append(p.Status.Conditions,
			corev1.PodCondition{Type: appsv1alpha1.KruisePodReadyConditionType,
				Status: corev1.ConditionTrue})
	})
	b.stopClock()
	b.create("a", spec{Containers: containers("app"), Strategy: &how{UnreadyGracePeriodSeconds: pointer(int64(30))}})
	crr := b.until("draining", func(crr *request) bool { return crr.Status.Phase == recreating }, "a")
	same := func(crr *request) {
		t.Helper()
		c := meta.FindStatusCondition(crr.Status.Conditions, appsv1alpha1.PreRecreateGraceCondition)
		if c == nil || c.Status != metav1.ConditionTrue || c.Reason != appsv1alpha1.PreRecreateGraceCondition ||
			// also when it is back
			!strings.HasPrefix(c.Message, "the pod was taken out of service for this request") ||
			c.LastTransitionTime.UTC().Format(time.RFC3339) != crr.Annotations[appsv1alpha1.UnreadyAcquiredAnnotation] {
			t.Errorf("condition %+v, annotation %s", c, crr.Annotations[appsv1alpha1.UnreadyAcquiredAnnotation])
		}
	}
	same(crr)

	// A manifest that is put in its place takes the finalizers away; the pod must go back into
	// service all the same.
	crr.Finalizers = nil
	if err := b.client.Update(context.Background(), crr); err != nil {
		t.Fatal(err)
	}
	b.until("held again", func(crr *request) bool {
		return slices.Contains(crr.Finalizers, accept.Finalizer) &&
			slices.Contains(crr.Finalizers, appsv1alpha1.UnreadyAcquiredFinalizer)
	}, "a")
	b.after(32 * time.Second)
	crr = b.until("completed", retired, "a")
	same(crr)
	if s := crr.Status.ContainerStatusSnapshot; len(s) != 1 ||
		s[0] != (appsv1alpha1.ContainerRecreateRequestSyncContainerStatus{
			Name: "app", Ready: true, RestartCount: 1, ContainerID: "containerd://new1",
		}) {
		t.Errorf("snapshot %+v", s)
	}
	if got, want := crr.Annotations[appsv1alpha1.SyncContainerStatusesAnnotation],
		`[{"name":"app","ready":true,"restartCount":1,"containerID":"containerd://new1"}]`; got != want {
		t.Errorf("annotation %s, want %s", got, want)
	}
	var pod corev1.Pod
	if err := b.client.Get(t.Context(), client.ObjectKey{Namespace: "ns", Name: "pod"}, &pod); err != nil {
		t.Fatal(err)
	}
	if c := pods.Condition(&pod, appsv1alpha1.KruisePodReadyConditionType); c.Status != corev1.ConditionTrue {
		t.Errorf("the pod is out of service still: %+v", c)
	}
}

// TestBegunByOpenKruise: what OpenKruise has written of a request that begins anew here is not
// taken for what happened here.
func TestBegunByOpenKruise(t *testing.T) {
	b := newBed(t)
	b.create("a", spec{Containers: containers("app")})
	crr := b.get("a")
	crr.Status.Phase = recreating
	crr.Status.Conditions = []metav1.Condition{{
		Type: appsv1alpha1.PreRecreateGraceCondition, Status: metav1.ConditionTrue,
		Reason: appsv1alpha1.PreRecreateGraceCondition, LastTransitionTime: metav1.Now(),
	}}
	crr.Status.ContainerStatusSnapshot = []appsv1alpha1.ContainerRecreateRequestSyncContainerStatus{
		{Name: "app", Ready: true, ContainerID: "containerd://older"}}
	if err := b.client.Status().Update(t.Context(), crr); err != nil {
		t.Fatal(err)
	}
	crr = b.until("completed", retired, "a")
	b.wantStates(crr, "app Succeeded killed")
	if c := meta.FindStatusCondition(crr.Status.Conditions, appsv1alpha1.PreRecreateGraceCondition); c != nil {
		t.Errorf("condition %+v", c)
	}
	if s := crr.Status.ContainerStatusSnapshot; len(s) != 1 || s[0].ContainerID != "containerd://new1" {
		t.Errorf("snapshot %+v", s)
	}
}
