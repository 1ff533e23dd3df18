// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package e2e

import (
	"fmt"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	apiwatch "k8s.io/apimachinery/pkg/watch"
	"sigs.k8s.io/controller-runtime/pkg/client"

	appsv1alpha1 "github.com/cri-proxy/cri-proxy/api/apps/v1alpha1"
)

// TestBadInput gives requests that cannot work. Each ends with a text that says
// why, and leaves nothing behind.
func TestBadInput(t *testing.T) {
	ns := namespace(t)
	apply(t, threeContainers(ns, "my-pod", corev1.RestartPolicyAlways))
	apply(t, fmt.Sprintf(`
apiVersion: v1
kind: Pod
metadata: {name: never-starts, namespace: %[1]s}
spec:
  terminationGracePeriodSeconds: 1
  initContainers: [{name: setup, image: "%[2]s", command: ["true"]}]
  containers:
  - {name: app, image: "%[2]s", command: [sleep, "3600"]}
  - {name: absent, image: "%[3]s"}
`, ns, bed.Image("busybox:1.0"), bed.Image("no-such-image:1")))
	before := ready(t, ns, "my-pod")
	eventually(t, "container app of never-starts runs", func() bool {
		for _, c := range getPod(t, ns, "never-starts").Status.ContainerStatuses {
			if c.Name == "app" && c.State.Running != nil {
				return true
			}
		}
		return false
	})
	for _, tc := range []struct{ name, pod, rest, text string }{
		{"unknown-pod", "nobody", "containers: [{name: app}]", "no pod"},
		{"unknown-container", "my-pod", "containers: [{name: nope}]", "no container nope; it has app, two, three"},
		{"not-started", "never-starts", "containers: [{name: absent}]", "absent"},
		{"init-container", "never-starts", "containers: [{name: setup}]", "init container"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			apply(t, recreate(ns, tc.name, tc.pod, tc.rest))
			crr := completed(t, ns, tc.name)
			text := crr.Status.Message
			for _, s := range crr.Status.ContainerRecreateStates {
				if s.Phase != appsv1alpha1.ContainerRecreateRequestFailed {
					t.Errorf("state: %+v", s)
				}
				text += " " + s.Message
			}
			if !strings.Contains(strings.ToLower(text), strings.ToLower(tc.text)) {
				t.Errorf("message %q does not say %q", text, tc.text)
			}
			t.Log(text)
		})
	}
	for _, tc := range []struct{ name, rest, text string }{
		{"no-containers", "containers: []", "spec.containers"},
		{"twice", "containers: [{name: app}, {name: app}]", "uplicate"},
		{"short-deadline", "containers: [{name: app}]\n  activeDeadlineSeconds: 1", "activeDeadlineSeconds"},
		{"negative-grace", "containers: [{name: app}]\n  strategy: {terminationGracePeriodSeconds: -1}",
			"terminationGracePeriodSeconds"},
		{"policy", "containers: [{name: app}]\n  strategy: {failurePolicy: Maybe}", "failurePolicy"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			err := bed.KubectlApply(t.Context(), recreate(ns, tc.name, "my-pod", tc.rest))
			if err == nil || !strings.Contains(err.Error(), tc.text) {
				t.Errorf("refused with: %v", err)
			}
		})
	}
	if after := getPod(t, ns, "my-pod"); container(t, after, "app").ContainerID != container(t, before, "app").
		ContainerID {
		t.Error("a refused request restarted the container")
	}
}

// TestDeletingPod asks for a restart in a pod that is on its way out.
func TestDeletingPod(t *testing.T) {
	t.Parallel()
	ns := namespace(t)
	apply(t, fmt.Sprintf(`
apiVersion: v1
kind: Pod
metadata: {name: leaving, namespace: %s}
spec:
  terminationGracePeriodSeconds: 20
  containers: [{name: app, image: "%s", command: [sh, -c, "trap true TERM; while :; do sleep 0.1; done"]}]
`, ns, bed.Image("busybox:1.0")))
	ready(t, ns, "leaving")
	kubectl(t, "-n", ns, "delete", "pod", "leaving", "--wait=false")
	apply(t, recreate(ns, "too-late", "leaving", "containers: [{name: app}]"))
	crr := completed(t, ns, "too-late")
	if s := crr.Status.ContainerRecreateStates; len(s) > 0 &&
		s[0].Phase != appsv1alpha1.ContainerRecreateRequestFailed {
		t.Errorf("states: %+v", s)
	}
	t.Log(crr.Status.Message, crr.Status.ContainerRecreateStates)
	if !strings.Contains(crr.Status.Message, "pod") {
		t.Errorf("message: %q", crr.Status.Message)
	}
}

// TestTwoRequests sends requests for one container at the same time: all complete, and those
// without force may be satisfied by the restart that another one made, in whatever order they are
// taken. One with force always restarts.
func TestTwoRequests(t *testing.T) {
	t.Parallel()
	ns := namespace(t)
	apply(t, threeContainers(ns, "my-pod", corev1.RestartPolicyAlways))
	ready(t, ns, "my-pod")
	succeed := func(names ...string) int32 {
		for _, name := range names {
			if s := completed(t, ns, name).Status.ContainerRecreateStates; len(s) != 1 ||
				s[0].Phase != appsv1alpha1.ContainerRecreateRequestSucceeded {
				t.Errorf("request %s: %+v", name, s)
			}
		}
		return container(t, getPod(t, ns, "my-pod"), "app").RestartCount
	}
	const force = "\n  strategy: {forceRecreate: true}"
	apply(t, recreate(ns, "one", "my-pod", "containers: [{name: app}]")+"---"+recreate(ns, "two", "my-pod",
		"containers: [{name: app}]")+
		"---"+recreate(ns, "forced", "my-pod", "containers: [{name: app}]"+force))
	together := succeed("one", "two", "forced")
	if together < 1 || together > 3 {
		t.Errorf("restarts: %d", together)
	}
	apply(t, recreate(ns, "again", "my-pod", "containers: [{name: app}]"+force))
	if n := succeed("again"); n != together+1 {
		t.Errorf("restarts: %d, then %d", together, n)
	}
	assertKubeletDidNothing(t, ns, "my-pod", "app")
}

// TestOrdered restarts two containers one after the other.
func TestOrdered(t *testing.T) {
	t.Parallel()
	ns := namespace(t)
	apply(t, threeContainers(ns, "my-pod", corev1.RestartPolicyNever))
	before := ready(t, ns, "my-pod")
	apply(t, recreate(ns, "ordered", "my-pod",
		"containers: [{name: three}, {name: app}]\n  strategy: {orderedRecreate: true, minStartedSeconds: 2}"))
	crr := completed(t, ns, "ordered")
	after := getPod(t, ns, "my-pod")
	first, second := container(t, after, "three"), container(t, after, "app")
	if len(crr.Status.ContainerRecreateStates) != 2 || first.RestartCount != 1 || second.RestartCount != 1 {
		t.Fatalf("states %+v, restarts %d and %d", crr.Status.ContainerRecreateStates, first.RestartCount,
			second.RestartCount)
	}
	if gap := second.State.Running.StartedAt.Sub(first.State.Running.StartedAt.Time); gap < 2*time.Second {
		t.Errorf("the second started %s after the first, which had to run for 2 s", gap)
	}
	if container(t, before, "two").ContainerID != container(t, after, "two").ContainerID {
		t.Error("a neighbour was restarted")
	}
}

// TestDeadline lets the deadline pass once before anything was stopped, where
// nothing may happen any more, and once while the container stops.
func TestDeadline(t *testing.T) {
	t.Parallel()
	ns := namespace(t)
	apply(t, fmt.Sprintf(`
apiVersion: v1
kind: Pod
metadata: {name: slow, namespace: %s}
spec:
  terminationGracePeriodSeconds: 24
  containers: [{name: app, image: "%s", command: [sh, -c, "trap true TERM; while :; do sleep 0.1; done"]}]
`, ns, bed.Image("busybox:1.0")))
	before := ready(t, ns, "slow")
	apply(t, recreate(ns, "first", "slow", "containers: [{name: app}]\n  activeDeadlineSeconds: 10"))
	apply(t, recreate(ns, "second", "slow",
		"containers: [{name: app}]\n  strategy: {forceRecreate: true}\n  activeDeadlineSeconds: 10"))
	for _, name := range []string{"first", "second"} {
		crr := completed(t, ns, name)
		if !strings.Contains(crr.Status.Message, "activeDeadlineSeconds") {
			t.Errorf("%s: message %q", name, crr.Status.Message)
		}
		if s := crr.Status.ContainerRecreateStates; len(s) != 1 ||
			s[0].Phase != appsv1alpha1.ContainerRecreateRequestFailed {
			t.Errorf("%s: states %+v", name, s)
		}
	}
	// The first had begun to stop the container, so it runs to its end on the node; the second
	// never happens.
	eventually(t, "the first restart has ended", func() bool {
		return container(t, getPod(t, ns, "slow"), "app").ContainerID != container(t, before, "app").ContainerID
	})
	list := kubectl(t, "-n", ns, "get", "crr", "-o", "name")
	if strings.Count(list, "containerrecreaterequest") != 2 {
		t.Errorf("requests: %s", list)
	}
	if n := container(t, getPod(t, ns, "slow"), "app").RestartCount; n != 1 {
		t.Errorf("restarts: %d", n)
	}
}

// TestNodeUnreachable takes the node away from the controller: first until the
// request's deadline, then for a while.
func TestNodeUnreachable(t *testing.T) {
	ns := namespace(t)
	apply(t, threeContainers(ns, "my-pod", corev1.RestartPolicyAlways))
	before := ready(t, ns, "my-pod")
	must(t, bed.KillProxy(t.Context(), syscall.SIGKILL))
	apply(t, recreate(ns, "hopeless", "my-pod", "containers: [{name: app}]\n  activeDeadlineSeconds: 5"))
	apply(t, recreate(ns, "patient", "my-pod", "containers: [{name: two}]\n  activeDeadlineSeconds: 120"))
	crr := completed(t, ns, "hopeless")
	startProxy(t)
	if s := crr.Status.ContainerRecreateStates; len(s) != 1 ||
		s[0].Phase != appsv1alpha1.ContainerRecreateRequestFailed {
		t.Errorf("states: %+v, message %q", s, crr.Status.Message)
	}
	if s := completed(t, ns, "patient").Status.ContainerRecreateStates; len(s) != 1 ||
		s[0].Phase != appsv1alpha1.ContainerRecreateRequestSucceeded {
		t.Errorf("states: %+v", s)
	}
	after := getPod(t, ns, "my-pod")
	if container(t, after, "app").ContainerID != container(t, before, "app").ContainerID || container(t, after, "two").
		RestartCount != 1 {
		t.Error("the wrong container was restarted")
	}
	eventually(t, "an event NodeUnreachable names the address", func() bool {
		events := &corev1.EventList{}
		must(t, api.List(t.Context(), events, client.InNamespace(ns)))
		return slices.ContainsFunc(events.Items, func(e corev1.Event) bool {
			return e.Reason == "NodeUnreachable" && strings.Contains(e.Message, bed.OpsAddress)
		})
	})
}

// TestControllerRestart kills the controller in the middle of a request.
func TestControllerRestart(t *testing.T) {
	ns := namespace(t)
	hook := newHeldHook(t)
	apply(t, hook.preStop(threeContainers(ns, "my-pod", corev1.RestartPolicyNever)))
	ready(t, ns, "my-pod")
	apply(t, recreate(ns, "survives", "my-pod", "containers: [{name: app}]"))
	crr := &appsv1alpha1.ContainerRecreateRequest{}
	eventually(t, "the restart is under way", func() bool {
		must(t, api.Get(t.Context(), client.ObjectKey{Namespace: ns, Name: "survives"}, crr))
		return crr.Status.Phase == appsv1alpha1.ContainerRecreateRequestRecreating
	})
	must(t, bed.StopController(t.Context(), syscall.SIGKILL))
	gated := strings.Replace(threeContainers(ns, "gated", corev1.RestartPolicyNever), "spec:",
		"spec:\n  readinessGates: [{conditionType: KruisePodReady}]", 1)
	apply(t, gated) // while nobody opens gates
	eventually(t, "the gate alone keeps the pod from being ready", func() bool {
		return slices.ContainsFunc(getPod(t, ns, "gated").Status.Conditions, func(c corev1.PodCondition) bool {
			return c.Type == corev1.ContainersReady && c.Status == corev1.ConditionTrue
		})
	})
	must(t, bed.StartController(t.Context()))
	ready(t, ns, "gated")
	hook.release()
	if s := completed(t, ns, "survives").Status.ContainerRecreateStates; len(s) != 1 ||
		s[0].Phase != appsv1alpha1.ContainerRecreateRequestSucceeded {
		t.Errorf("states: %+v", s)
	}
	if n := container(t, getPod(t, ns, "my-pod"), "app").RestartCount; n != 1 {
		t.Errorf("restarts: %d", n)
	}
	assertKubeletDidNothing(t, ns, "my-pod", "app")
}

// TestTTL lets a finished request go.
func TestTTL(t *testing.T) {
	t.Parallel()
	ns := namespace(t)
	apply(t, threeContainers(ns, "my-pod", corev1.RestartPolicyAlways))
	ready(t, ns, "my-pod")
	// A watch misses nothing, however short it lives.
	var before appsv1alpha1.ContainerRecreateRequestList
	must(t, api.List(t.Context(), &before, client.InNamespace(ns)))
	watch, err := api.Watch(t.Context(), &before, client.InNamespace(ns),
		&client.ListOptions{Raw: &metav1.ListOptions{ResourceVersion: before.ResourceVersion}})
	must(t, err)
	defer watch.Stop()
	apply(t, recreate(ns, "short-lived", "my-pod", "containers: [{name: app}]\n  ttlSecondsAfterFinished: 2"))
	crr := &appsv1alpha1.ContainerRecreateRequest{}
	for gone := false; !gone; {
		select {
		case e, ok := <-watch.ResultChan():
			if !ok {
				t.Fatalf("the watch has ended, status %+v", crr.Status)
			}
			if now, is := e.Object.(*appsv1alpha1.ContainerRecreateRequest); is {
				crr = now
			}
			gone = e.Type == apiwatch.Deleted
		case <-time.After(2 * time.Minute):
			t.Fatalf("the request is there still, status %+v", crr.Status)
		}
	}
	if crr.Status.Phase != appsv1alpha1.ContainerRecreateRequestCompleted {
		t.Errorf("the request went with status %+v", crr.Status)
	}
}
