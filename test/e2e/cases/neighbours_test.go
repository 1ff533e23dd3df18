// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package cases

import (
	"fmt"
	"slices"
	"strings"
	"syscall"
	"testing"

	appsv1 "k8s.io/api/apps/v1"
	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"sigs.k8s.io/controller-runtime/pkg/client"

	inplace "github.com/cri-proxy/cri-proxy/api/inplace/v1alpha1"
	opsv1 "github.com/cri-proxy/cri-proxy/api/ops/v1"
)

// TestHookOfNeighbour restarts a container, and upgrades another, while another pod of the node is
// on its way out and its preStop hook runs.
func TestHookOfNeighbour(t *testing.T) {
	t.Parallel()
	ns := namespace(t)
	dir := scratchDir(t)
	create(t, podWith(ns, "leaving", "Always", "120", fmt.Sprintf(`
  containers:
  - name: app
    image: %s
    command: [sh, -c, %s]
    volumeMounts: [{name: trace, mountPath: /trace}]
    lifecycle: {preStop: {exec: {command: [sh, -c, "touch /trace/hook; until [ -e /trace/go ]; do sleep 0.1; done"]}}}
  volumes: [{name: trace, hostPath: {path: %s}}]`, bed.Image("busybox:1.0"), loop, dir))+
		traced(ns, "restarted", dir, bed.Image("busybox:1.0"), "0", "", "")+
		traced(ns, "upgraded", dir, bed.Image("busybox:1.0"), "0", "", ""))
	before := allReady(t, ns)
	kubectl(t, "-n", ns, "delete", "pod", "leaving", "--wait=false")
	release := func() { writeFile(t, dir+"/go", "") }
	defer release()
	eventually(t, "the hook runs", func() bool { return exists(t, dir+"/hook") })
	if f := outcome(restart(t, ns, "restarted", "app")); f != "" {
		t.Error(f)
	}
	apply(t, rollout(ns, "upgraded", "{podName: upgraded}", bed.Image("busybox:2.0"), "progressDeadlineSeconds: 60"))
	if f := complete(ended(t, ns, "upgraded")); f != "" {
		t.Error(f)
	}
	p := getPod(t, ns, "leaving") // it is still there, so the hook is still running
	if p.UID != before["leaving"].UID || p.DeletionTimestamp == nil {
		t.Errorf("pod leaving: %+v", p)
	}
	release()
	eventually(t, "the other pod is gone", func() bool {
		return apierrors.IsNotFound(api.Get(t.Context(), client.ObjectKey{Namespace: ns, Name: "leaving"},
			&corev1.Pod{}))
	})
}

// TestRequestOnPreparedPod restarts containers of pods that a rollout has prepared and that a
// budget, or a pause, holds back. The requests are carried out at once, and the rollout goes on
// afterwards.
func TestRequestOnPreparedPod(t *testing.T) {
	t.Parallel()
	ns := namespace(t)
	one, two := bed.Image("app:1"), bed.Image("app:2")
	create(t, fmt.Sprintf(`
apiVersion: apps/v1
kind: Deployment
metadata: {name: held, namespace: %[1]s}
spec:
  replicas: 2
  selector: {matchLabels: {app: held}}
  template:
    metadata: {labels: {app: held}}
    spec:
      terminationGracePeriodSeconds: 2
      containers:
      - {name: app, image: %[2]s}
      - {name: side, image: %[3]s, command: [sh, -c, %[4]s]}
---
apiVersion: policy/v1
kind: PodDisruptionBudget
metadata: {name: held, namespace: %[1]s}
spec: {minAvailable: 2, selector: {matchLabels: {app: held}}}
---
`, ns, one, bed.Image("busybox:1.0"), loop))
	before := podsOf(t, ns, "held", 2)
	apply(t, rollout(ns, "held", "{workloadRef: {kind: Deployment, name: held}}", two, "progressDeadlineSeconds: 90"))
	prepared := func() *corev1.Pod {
		var found *corev1.Pod
		eventually(t, "a pod is prepared, and waits", func() bool {
			for _, p := range before {
				if ops := operations(t, ns, p.Name); slices.ContainsFunc(ops,
					func(op *opsv1.Operation) bool { return op.GetPhase() == opsv1.Phase_PHASE_PREPARED }) {
					found = p
				}
			}
			return found != nil
		})
		return found
	}
	p := prepared()
	apply(t, recreate(ns, "app", p.Name, "containers: [{name: app}]")+
		recreate(ns, "side", p.Name, "containers: [{name: side}]"))
	for _, name := range []string{"app", "side"} {
		if f := outcome(completed(t, ns, name)); f != "" {
			t.Errorf("request %s: %s", name, f)
		}
	}
	after := getPod(t, ns, p.Name)
	for _, name := range []string{"app", "side"} {
		if container(t, after, name).RestartCount != 1 {
			t.Errorf("container %s was not restarted: %s", name, states(after))
		}
	}
	if got := after.Spec.Containers[0].Image; got != one {
		t.Errorf("the rollout did not wait for the budget: %s", got)
	}

	// A pause.
	prepared()
	kubectl(t, "-n", ns, "patch", "ipr", "held", "--type=merge", "-p", `{"spec":{"paused":true}}`)
	eventually(t, "the rollout is paused", func() bool {
		return slices.ContainsFunc(getRollout(t, ns, "held").Status.Conditions,
			func(c metav1.Condition) bool { return c.Reason == inplace.ReasonPaused })
	})
	apply(t, recreate(ns, "paused", p.Name, "containers: [{name: app}]"))
	if f := outcome(completed(t, ns, "paused")); f != "" {
		t.Errorf("request while the rollout is paused: %s", f)
	}
	kubectl(t, "-n", ns, "patch", "ipr", "held", "--type=merge", "-p", `{"spec":{"paused":false}}`)
	kubectl(t, "-n", ns, "patch", "pdb", "held", "--type=merge", "-p", `{"spec":{"minAvailable":1}}`)
	if f := complete(ended(t, ns, "held")); f != "" {
		t.Error(f)
	}
	for i, now := range podsOf(t, ns, "held", 2) {
		want := int32(1)
		if now.UID == p.UID {
			want = 3
		}
		if s := container(t, now, "app"); now.UID != before[i].UID || s.RestartCount != want || s.Image != two {
			t.Errorf("pod %s: %s, image %s; want %d restarts", now.Name, states(now), s.Image, want)
		}
		assertOneLive(t, ns, now.Name, "app")
	}
}

// TestTemplateChangesInRollout has somebody else change the template of a Deployment in the middle
// of its rollout. The rollout has a defined end, the Deployment goes on, and all pods become what
// the template says.
func TestTemplateChangesInRollout(t *testing.T) {
	t.Parallel()
	ns := namespace(t)
	create(t, fmt.Sprintf(`
apiVersion: apps/v1
kind: Deployment
metadata: {name: moved, namespace: %s}
spec:
  replicas: 3
  selector: {matchLabels: {app: moved}}
  template:
    metadata: {labels: {app: moved}}
    spec:
      terminationGracePeriodSeconds: 2
      containers: [{name: app, image: %s}]
---
`, ns, bed.Image("app:1")))
	podsOf(t, ns, "moved", 3)
	apply(t, rollout(ns, "moved", "{workloadRef: {kind: Deployment, name: moved}}", bed.Image("app:2"),
		"minReadySeconds: 4, progressDeadlineSeconds: 20"))
	eventually(t, "a pod is updated", func() bool { return getRollout(t, ns, "moved").Status.Updated >= 1 })
	kubectl(t, "-n", ns, "set", "env", "deploy/moved", "ADDED=late")
	r := ended(t, ns, "moved")
	t.Log(r.Status.Message, r.Status.Conditions)
	d := &appsv1.Deployment{}
	eventuallySaying(t, "the Deployment goes on by itself", func() string {
		return fmt.Sprintf("paused %v, %v, %+v", d.Spec.Paused, d.Annotations, d.Status)
	}, func() bool {
		must(t, api.Get(t.Context(), client.ObjectKey{Namespace: ns, Name: "moved"}, d))
		return !d.Spec.Paused && d.Annotations[inplace.PausedByAnnotation] == ""
	})
	kubectl(t, "-n", ns, "rollout", "status", "deploy/moved", "--timeout=90s")
	image := d.Spec.Template.Spec.Containers[0].Image
	for _, p := range podsOf(t, ns, "moved", 3) {
		c := p.Spec.Containers[0]
		if c.Image != image || !slices.ContainsFunc(c.Env, func(e corev1.EnvVar) bool {
			return e.Name == "ADDED" && e.Value == "late"
		}) {
			t.Errorf("pod %s has image %s, environment %v; the template has %s", p.Name, c.Image, c.Env, image)
		}
	}
}

// TestJournalLost destroys the node's journal while upgrades are prepared and a restart waits for a
// preStop hook, its successor at its gate. In the end each container runs once, as kubelet sees it,
// and all that was asked for has an end.
func TestJournalLost(t *testing.T) {
	ns := namespace(t)
	dir := scratchDir(t)
	upgraded := []string{"one", "two", "three"}
	pods := fmt.Sprintf(`
apiVersion: policy/v1
kind: PodDisruptionBudget
metadata: {name: all, namespace: %s}
spec: {minAvailable: 100%%, selector: {matchLabels: {job: upgrade}}}
---
`, ns)
	for _, name := range upgraded {
		pods += strings.Replace(traced(ns, name, dir, bed.Image("busybox:1.0"), "0", "", ""), "labels: {",
			"labels: {job: upgrade, ", 1)
	}
	pods += traced(ns, "restart", dir, bed.Image("busybox:1.0"), "0",
		`lifecycle: {preStop: {exec: {command: [sh, -c, "touch /trace/hook; until [ -e /trace/go ]; do sleep 0.1; done"]}}}`, "")
	create(t, strings.ReplaceAll(pods, "terminationGracePeriodSeconds: 20", "terminationGracePeriodSeconds: 60"))
	before := allReady(t, ns)
	rollouts := ""
	for _, name := range upgraded {
		rollouts += rollout(ns, name, "{podName: "+name+"}", bed.Image("busybox:2.0"), "progressDeadlineSeconds: 90")
	}
	apply(t, rollouts+recreate(ns, "restart", "restart", "containers: [{name: app}]"))
	for _, name := range upgraded {
		eventually(t, name+" is prepared", func() bool {
			return slices.ContainsFunc(operations(t, ns, name),
				func(op *opsv1.Operation) bool { return op.GetPhase() == opsv1.Phase_PHASE_PREPARED })
		})
	}
	eventually(t, "the hook runs, and the new container waits", func() bool {
		return exists(t, dir+"/hook") && len(containersOf(t, before["restart"], "app")) == 2
	})
	must(t, bed.KillProxy(t.Context(), syscall.SIGKILL))
	writeFile(t, bed.StateDir+"/journal.db", strings.Repeat("this was a journal\n", 1000))
	writeFile(t, dir+"/go", "")
	must(t, bed.StartProxy(t.Context()))

	for _, name := range append(upgraded, "restart") {
		assertOneLive(t, ns, name, "app")
		assertOneLive(t, ns, name, "neighbour")
	}
	completed(t, ns, "restart")
	kubectl(t, "-n", ns, "delete", "pdb", "all")
	for _, name := range upgraded {
		if f := complete(ended(t, ns, name)); f != "" {
			t.Error(f)
		}
		want := []string{"began 1.0", "asked 1.0", "ended 1.0", "began 2.0"}
		eventually(t, "the new container of "+name+" has begun", func() bool {
			return len(traceOf(t, dir, name)) >= len(want)
		})
		if got := whats(traceOf(t, dir, name)); !slices.Equal(got, want) {
			t.Errorf("pod %s wrote %q, want %q", name, got, want)
		}
	}
	for _, name := range append(upgraded, "restart") {
		assertOneLive(t, ns, name, "app")
		// each that began was asked and has ended, but the last
		if got := whats(traceOf(t, dir, name)); len(got)%3 != 1 {
			t.Errorf("pod %s wrote %q", name, got)
		}
		if p := getPod(t, ns, name); p.Status.Phase != corev1.PodRunning || container(t, p, "neighbour").
			RestartCount != 0 {
			t.Errorf("pod %s: %s", name, states(p))
		}
	}
	eventually(t, "nothing is at work on the node", func() bool {
		info, err := node(t).NodeInfo(t.Context(), &opsv1.NodeInfoRequest{})
		must(t, err)
		return len(info.GetActiveSlots()) == 0
	})
}
