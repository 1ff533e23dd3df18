// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package cases

import (
	"context"
	"fmt"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	inplace "github.com/cri-proxy/cri-proxy/api/inplace/v1alpha1"
)

// rolled is a Deployment of pods with a container app, and rest what that has beyond its image.
func rolled(ns, name string, replicas int, image, rest string) string {
	return fmt.Sprintf(`
apiVersion: apps/v1
kind: Deployment
metadata: {name: %[2]s, namespace: %[1]s}
spec:
  replicas: %[3]d
  selector: {matchLabels: {app: %[2]s}}
  template:
    metadata: {labels: {app: %[2]s}}
    spec:
      terminationGracePeriodSeconds: 2
      containers:
      - name: app
        image: %[4]s
        %[5]s
---
`, ns, name, replicas, image, rest)
}

// again lets a rollout begin anew, and waits for its end.
func again(t testing.TB, ns, name, value string) *inplace.InPlaceRollout {
	t.Helper()
	before := getRollout(t, ns, name).Status.ObservedRevision
	kubectl(t, "-n", ns, "annotate", "--overwrite", "inplacerollout", name, inplace.RetryAnnotation+"="+value)
	eventually(t, "rollout "+name+" has begun anew", func() bool {
		return getRollout(t, ns, name).Status.ObservedRevision != before
	})
	return ended(t, ns, name)
}

// TestWorkloadMinReady changes the template of an annotated StatefulSet that asks for some seconds
// between its pods: they follow no faster, and one at a time. TestStartupInRollout has pods with a
// startupProbe.
func TestWorkloadMinReady(t *testing.T) {
	t.Parallel()
	ns := namespace(t)
	const pods, minReady = 3, 8 * time.Second
	create(t, fmt.Sprintf(`
apiVersion: apps/v1
kind: StatefulSet
metadata: {name: web, namespace: %[1]s, annotations: {%[5]s: "true"}}
spec:
  replicas: %[2]d
  minReadySeconds: %[3]d
  podManagementPolicy: Parallel
  serviceName: web
  updateStrategy: {type: OnDelete}
  selector: {matchLabels: {app: web}}
  template:
    metadata: {labels: {app: web}}
    spec:
      terminationGracePeriodSeconds: 2
      containers:
      - name: app
        image: %[4]s
        readinessProbe: {httpGet: {port: 8080, path: /healthz}, periodSeconds: 1, timeoutSeconds: 5}
---
`, ns, pods, minReady/time.Second, bed.Image("app:1"), inplace.InPlaceAnnotation))
	before := podsOf(t, ns, "web", pods)
	ctx, cancel := context.WithCancel(t.Context())
	fewest := pods
	done := make(chan struct{})
	go func() {
		defer close(done)
		for ctx.Err() == nil {
			n := 0
			for _, p := range before {
				if serves(ctx, p.Status.PodIP, "8080") {
					n++
				}
			}
			if ctx.Err() == nil {
				fewest = min(fewest, n)
			}
		}
	}()
	end := sync.OnceFunc(func() { cancel(); <-done })
	t.Cleanup(end)
	kubectl(t, "-n", ns, "set", "image", "statefulset/web", "app="+bed.Image("app:2"))
	var r *inplace.InPlaceRollout
	eventuallySaying(t, "the pods have followed", func() string { return fmt.Sprintf("%+v", r.Status) }, func() bool {
		r = getRollout(t, ns, "statefulset-web")
		return r.Status.TargetImages["app"] == bed.Image("app:2") && r.Status.CompletionTime != nil
	})
	end()
	if f := complete(r); f != "" {
		t.Error(f)
	}
	if fewest < pods-1 {
		t.Errorf("at some moment only %d of %d pods served", fewest, pods)
	}
	var at []time.Time
	for i, p := range podsOf(t, ns, "web", pods) {
		s := container(t, p, "app")
		if p.UID != before[i].UID || s.RestartCount != 1 || s.Image != bed.Image("app:2") {
			t.Fatalf("pod %s: %s, image %s", p.Name, states(p), s.Image)
		}
		at = append(at, s.LastTerminationState.Terminated.FinishedAt.Time)
	}
	slices.SortFunc(at, time.Time.Compare)
	for i := range at[1:] {
		// The API tells whole seconds.
		if d := at[i+1].Sub(at[i]); d < minReady-time.Second {
			t.Errorf("%s from one pod to the next, the StatefulSet asks for %s", d, minReady)
		}
	}
}

// TestMirrorPods has what looks like a static pod among the pods of a rollout.
func TestMirrorPods(t *testing.T) {
	t.Parallel()
	ns := namespace(t)
	image := bed.Image("busybox:1.0")
	// Of a node that is not there: kubelet would delete what it does not run.
	mirror := strings.Replace(podWith(ns, "static", "Always", "1",
		"\n  nodeName: nowhere\n  containers:\n  - {name: app, image: "+image+"}"),
		"metadata: {", "metadata: {labels: {app: mixed}, annotations: {kubernetes.io/config.mirror: hash}, ", 1)
	create(t, rolled(ns, "mixed", 2, image, "command: [sh, -c, "+loop+"]"))
	podsOf(t, ns, "mixed", 2)
	// The pods of nodes that are not there are deleted after a while, so all is said of this one at
	// once.
	create(t, mirror)
	apply(t, rollout(ns, "all", "{selector: {matchLabels: {app: mixed}}}", "", "progressDeadlineSeconds: 30")+
		rollout(ns, "one", "{podName: static}", bed.Image("busybox:2.0"), "onFailure: Pause"))
	for name, says := range map[string][]string{
		"all": {"; 1 static pod is left out"},
		"one": {"change its manifest on node nowhere", "make a ContainerRecreateRequest"},
	} {
		var r *inplace.InPlaceRollout
		eventuallySaying(t, "rollout "+name+" tells of the static pod",
			func() string { return fmt.Sprintf("%+v", r.Status) },
			func() bool {
				r = getRollout(t, ns, name)
				return !slices.ContainsFunc(says, func(s string) bool { return !strings.Contains(r.Status.Message, s) })
			})
	}
	if r := ended(t, ns, "all"); complete(r) != "" || r.Status.Updated != 2 {
		t.Errorf("%s; %d pods are updated", complete(r), r.Status.Updated)
	}
}

// TestRestartsInARow restarts all pods of a Deployment in less time than a rollout may wait between
// two looks.
func TestRestartsInARow(t *testing.T) {
	t.Parallel()
	ns := namespace(t)
	create(t, rolled(ns, "web", 3, bed.Image("app:1"),
		"readinessProbe: {httpGet: {port: 8080, path: /healthz}, periodSeconds: 1, timeoutSeconds: 5}"))
	before := podsOf(t, ns, "web", 3)
	apply(t, rollout(ns, "web", "{workloadRef: {kind: Deployment, name: web}}", "", "progressDeadlineSeconds: 20"))
	r := ended(t, ns, "web")
	if f := complete(r); f != "" {
		t.Error(f)
	}
	t.Logf("3 restarts took %s", r.Status.CompletionTime.Sub(r.Status.StartTime.Time))
	for i, p := range podsOf(t, ns, "web", 3) {
		if s := container(t, p, "app"); p.UID != before[i].UID || s.RestartCount != 1 {
			t.Errorf("pod %s: %s", p.Name, states(p))
		}
	}
}

// TestRestartFails has a restart that cannot be carried out: that is told, and it is in the way of
// no later rollout.
func TestRestartFails(t *testing.T) {
	t.Parallel()
	ns := namespace(t)
	conf := "apiVersion: v1\nkind: ConfigMap\nmetadata: {name: conf, namespace: " + ns + "}\ndata: {a: b}\n---\n"
	create(t, conf+rolled(ns, "web", 2, bed.Image("busybox:1.0"), "command: [sh, -c, "+loop+
		"]\n        env: [{name: A, valueFrom: {configMapKeyRef: {name: conf, key: a}}}]"))
	before := podsOf(t, ns, "web", 2)
	kubectl(t, "-n", ns, "delete", "configmap", "conf")
	const target = "{workloadRef: {kind: Deployment, name: web}}"
	apply(t, rollout(ns, "first", target, "", "progressDeadlineSeconds: 60"))
	var r *inplace.InPlaceRollout
	eventuallySaying(t, "the restart has failed", func() string { return fmt.Sprintf("%+v", r.Status) }, func() bool {
		r = getRollout(t, ns, "first")
		return r.Status.Failed == 1
	})
	if !strings.Contains(r.Status.Message, `configmap "conf" not found`) || r.Status.Unavailable != 0 {
		t.Errorf("%q, %d unavailable", r.Status.Message, r.Status.Unavailable)
	}
	for i, p := range podsOf(t, ns, "web", 2) {
		if p.UID != before[i].UID || container(t, p, "app").RestartCount != 0 {
			t.Errorf("pod %s: %s", p.Name, states(p))
		}
	}
	kubectl(t, "-n", ns, "delete", "inplacerollout", "first")
	create(t, conf)
	apply(t, rollout(ns, "second", target, "", "progressDeadlineSeconds: 60"))
	if f := complete(ended(t, ns, "second")); f != "" {
		t.Error(f)
	}
	for i, p := range podsOf(t, ns, "web", 2) {
		if p.UID != before[i].UID || container(t, p, "app").RestartCount != 1 {
			t.Errorf("pod %s: %s", p.Name, states(p))
		}
	}
}

// TestMovedTag rolls out the image that the pods have already, whose tag kubelet resolves at each
// start: what the tag names decides whether anything is done.
func TestMovedTag(t *testing.T) {
	t.Parallel()
	ns := namespace(t)
	image := moveTag(t, "rollouts-moving:1", "busybox:1.0")
	create(t, rolled(ns, "web", 2, image, "imagePullPolicy: Always\n        command: [sh, -c, "+loop+"]"))
	before := podsOf(t, ns, "web", 2)
	version := func(want string, restarts int32) {
		t.Helper()
		for i, p := range podsOf(t, ns, "web", 2) {
			s := container(t, p, "app")
			if p.UID != before[i].UID || s.RestartCount != restarts || p.Spec.Containers[0].Image != image {
				t.Errorf("pod %s: %s, image %s; want %d restarts", p.Name, states(p), p.Spec.Containers[0].Image,
					restarts)
			}
			got := strings.TrimSpace(readFile(t, fmt.Sprintf("/proc/%d/root/etc/version", pidOf(t, s))))
			if got != want {
				t.Errorf("pod %s runs version %s, want %s", p.Name, got, want)
			}
			assertOneLive(t, ns, p.Name, "app")
		}
	}
	apply(t, rollout(ns, "web", "{workloadRef: {kind: Deployment, name: web}}", image, "progressDeadlineSeconds: 60"))
	if f := complete(ended(t, ns, "web")); f != "" {
		t.Error(f)
	}
	version("1.0", 0)
	moveTag(t, "rollouts-moving:1", "busybox:2.0")
	if f := complete(again(t, ns, "web", "1")); f != "" {
		t.Error(f)
	}
	version("2.0", 1)
	if f := complete(again(t, ns, "web", "2")); f != "" {
		t.Error(f)
	}
	version("2.0", 1)
	// A restart asks too, and starts what it is told.
	moveTag(t, "rollouts-moving:1", "busybox:3.0")
	apply(t, rollout(ns, "restart", "{workloadRef: {kind: Deployment, name: web}}", "", "progressDeadlineSeconds: 60"))
	if f := complete(ended(t, ns, "restart")); f != "" {
		t.Error(f)
	}
	version("3.0", 2)
	if sets := kubectl(t, "-n", ns, "get", "replicasets", "-o", "name"); len(strings.Fields(sets)) != 1 {
		t.Errorf("the Deployment has %s", sets)
	}
}
