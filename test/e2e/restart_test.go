// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package e2e

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"sigs.k8s.io/controller-runtime/pkg/client"

	appsv1alpha1 "github.com/cri-proxy/cri-proxy/api/apps/v1alpha1"
	opsv1 "github.com/cri-proxy/cri-proxy/api/ops/v1"
	"github.com/cri-proxy/cri-proxy/test/testbed"
)

// threeContainers is a pod whose container app exits with code 7 and a termination
// message when it is asked to stop.
func threeContainers(ns, name string, policy corev1.RestartPolicy) string {
	loop := func(n string) string {
		return fmt.Sprintf(`
  - name: %s
    image: %s
    command: [sh, -c, 'trap "echo -n last words > /dev/termination-log; exit 7" TERM; echo started %s; while :; do sleep 0.1; done']`, n, bed.Image("busybox:1.0"), n)
	}
	return fmt.Sprintf(`
apiVersion: v1
kind: Pod
metadata: {name: %s, namespace: %s}
spec:
  restartPolicy: %s
  terminationGracePeriodSeconds: 5
  containers:%s%s%s
`, name, ns, policy, loop("app"), loop("two"), loop("three"))
}

// phases watches a pod and collects what it was.
type phases struct {
	mu   sync.Mutex
	seen []string
	stop func()
}

func watchPhases(t testing.TB, ns, name, uid string) *phases {
	t.Helper()
	ctx, cancel := context.WithCancel(context.Background())
	// From now on: a watch without a version may begin with an older state, out of the API server's
	// cache.
	var now corev1.PodList
	must(t, api.List(ctx, &now, client.InNamespace(ns)))
	w, err := api.Watch(ctx, &corev1.PodList{}, client.InNamespace(ns),
		&client.ListOptions{Raw: &metav1.ListOptions{ResourceVersion: now.ResourceVersion}})
	must(t, err)
	p := &phases{}
	done := make(chan struct{})
	go func() {
		defer close(done)
		for e := range w.ResultChan() {
			pod, ok := e.Object.(*corev1.Pod)
			if !ok || pod.Name != name {
				continue
			}
			p.mu.Lock()
			if string(pod.UID) != uid || pod.Status.Phase != corev1.PodRunning {
				p.seen = append(p.seen, fmt.Sprintf("uid %s phase %s", pod.UID, pod.Status.Phase))
			}
			for _, c := range pod.Status.ContainerStatuses {
				if c.State.Waiting != nil || c.State.Terminated != nil {
					p.seen = append(p.seen, fmt.Sprintf("container %s is %+v", c.Name, c.State))
				}
			}
			p.mu.Unlock()
		}
	}()
	p.stop = sync.OnceFunc(func() { cancel(); w.Stop(); <-done })
	t.Cleanup(p.stop)
	return p
}

// bad returns what was not right.
func (p *phases) bad() []string {
	p.stop()
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.seen
}

// example returns the project's example of a request, for another namespace.
func example(t testing.TB, ns string) string {
	t.Helper()
	root, err := testbed.SourceDir("")
	must(t, err)
	b, err := os.ReadFile(filepath.Join(root, "deploy", "examples", "restart.yaml"))
	must(t, err)
	return strings.Replace(string(b), "pod-namespace", ns, 1)
}

func recreate(ns, name, pod, rest string) string {
	return fmt.Sprintf(`
apiVersion: apps.kruise.io/v1alpha1
kind: ContainerRecreateRequest
metadata: {namespace: %s, name: %s}
spec:
  podName: %s
  %s
`, ns, name, pod, rest)
}

// TestContainerRecreateRequest restarts one container of a pod under each restart policy.
func TestContainerRecreateRequest(t *testing.T) {
	for _, policy := range []corev1.RestartPolicy{corev1.RestartPolicyAlways, corev1.RestartPolicyOnFailure,
		corev1.RestartPolicyNever} {
		t.Run(string(policy), func(t *testing.T) {
			ns := namespace(t)
			apply(t, threeContainers(ns, "my-pod", policy))
			before := ready(t, ns, "my-pod")
			seen := watchPhases(t, ns, "my-pod", string(before.UID))
			slot := watchSlot(t, string(before.UID), "app")

			// As found in the field, status and all; only the namespace is adapted.
			apply(t, example(t, ns))
			crr := completed(t, ns, "example-restart")
			if s := crr.Status.ContainerRecreateStates; len(s) != 1 || s[0].Name != "app" ||
				s[0].Phase != appsv1alpha1.ContainerRecreateRequestSucceeded {
				t.Fatalf("states: %+v, message %q", s, crr.Status.Message)
			}
			after := getPod(t, ns, "my-pod")
			if bad := slot(); len(bad) > 0 {
				t.Errorf("kubelet could see: %q", bad)
			}
			if bad := seen.bad(); len(bad) > 0 {
				t.Errorf("the pod was not running all the time:\n%s", strings.Join(bad, "\n"))
			}
			if after.UID != before.UID || after.Status.PodIP != before.Status.PodIP {
				t.Errorf("pod %s %s became %s %s", before.UID, before.Status.PodIP, after.UID, after.Status.PodIP)
			}
			was, is := container(t, before, "app"), container(t, after, "app")
			if is.ContainerID == was.ContainerID || is.RestartCount != was.RestartCount+1 || is.State.Running == nil ||
				!is.Ready {
				t.Errorf("container app was %+v and is %+v", was, is)
			}
			last := is.LastTerminationState.Terminated
			if last == nil || last.ExitCode != 7 || last.Message != "last words" ||
				last.ContainerID != was.ContainerID {
				t.Errorf("last state of app: %+v", last)
			}
			for _, other := range []string{"two", "three"} {
				if a, b := container(t, before, other), container(t, after, other); a.ContainerID != b.ContainerID ||
					b.RestartCount != 0 {
					t.Errorf("container %s was %s and is %s, restarts %d", other, a.ContainerID, b.ContainerID,
						b.RestartCount)
				}
			}
			for _, args := range [][]string{{}, {"--previous"}} {
				var out string
				eventually(t, "the container has logged", func() bool {
					out = kubectl(t, append([]string{"-n", ns, "logs", "my-pod", "-c", "app"}, args...)...)
					return out != ""
				})
				if out != "started app" {
					t.Errorf("logs %v: %q", args, out)
				}
			}
			columns := strings.Fields(kubectl(t, "-n", ns, "get", "crr", "example-restart", "--no-headers"))
			if len(columns) != 5 || columns[1] != "Completed" || columns[2] != "my-pod" || columns[3] != bed.NodeName {
				t.Errorf("kubectl get crr: %q", columns)
			}
			assertKubeletDidNothing(t, ns, "my-pod", "app")
		})
	}
}

// assertKubeletDidNothing checks kubelet's calls on the slot: it created one container, ever.
func assertKubeletDidNothing(t testing.TB, ns, pod, name string) {
	t.Helper()
	var created []call
	for _, c := range kubeletCalls(t, "CreateContainer") {
		if c.Namespace == ns && c.Pod == pod && c.Container == name {
			created = append(created, c)
		}
	}
	if len(created) != 1 || created[0].Attempt == nil || *created[0].Attempt != 0 {
		t.Errorf("kubelet created: %+v", created)
	}
	// A stop names only an ID. These are all that the slot has had since the restarts began.
	uid, ids := string(getPod(t, ns, pod).UID), map[string]bool{}
	list, err := opsClient(t).ListOperations(t.Context(), &opsv1.ListOperationsRequest{})
	must(t, err)
	for _, op := range list.GetOperations() {
		for _, c := range op.GetContainers() {
			if op.GetPod().GetUid() == uid && c.GetName() == name {
				ids[c.GetIncumbentId()], ids[c.GetSuccessorId()] = true, true
			}
		}
	}
	if len(ids) < 2 {
		t.Errorf("the node has no operation on container %s: %v", name, ids)
	}
	for _, c := range kubeletCalls(t, "StopContainer") {
		if ids[c.ContainerID] {
			t.Errorf("kubelet stopped: %+v", c)
		}
	}
}

// TestTenRestarts restarts a container ten times, 5 s apart. Kubelet would add 10, 20,
// 40 … seconds from the second on.
func TestTenRestarts(t *testing.T) {
	t.Parallel()
	ns := namespace(t)
	apply(t, threeContainers(ns, "my-pod", corev1.RestartPolicyAlways))
	before := ready(t, ns, "my-pod")
	seen := watchPhases(t, ns, "my-pod", string(before.UID))
	var took []time.Duration
	next := time.NewTicker(5 * time.Second)
	defer next.Stop()
	for i := range 10 {
		name := fmt.Sprintf("restart-%d", i)
		began := time.Now()
		apply(t, recreate(ns, name, "my-pod", "containers: [{name: app}]"))
		crr := completed(t, ns, name)
		took = append(took, time.Since(began).Round(10*time.Millisecond))
		if crr.Status.ContainerRecreateStates[0].Phase != appsv1alpha1.ContainerRecreateRequestSucceeded {
			t.Fatalf("restart %d: %+v", i, crr.Status)
		}
		<-next.C
	}
	t.Logf("from apply to Completed: %v", took)
	after := getPod(t, ns, "my-pod")
	if c := container(t, after, "app"); c.RestartCount != 10 {
		t.Errorf("restarts: %d", c.RestartCount)
	}
	if bad := seen.bad(); len(bad) > 0 {
		t.Errorf("the pod was not running all the time:\n%s", strings.Join(bad, "\n"))
	}
	assertKubeletDidNothing(t, ns, "my-pod", "app")
}

// TestKillProxyAtEachStep kills cri-proxy at every step of a restart that a request asked for.
func TestKillProxyAtEachStep(t *testing.T) {
	ns := namespace(t)
	points := []string{"stage", "created", "staged", "stop", "stopped", "running", "started", "reveal",
		"revealed", "done"}
	pods := ""
	for _, point := range points {
		pods += threeContainers(ns, "pod-"+point, corev1.RestartPolicyNever) + "---\n"
	}
	apply(t, pods)
	// All before the proxy is restarted for the first time: kubelet must not be starting a pod
	// then.
	for _, point := range points {
		ready(t, ns, "pod-"+point)
	}
	for _, point := range points {
		t.Run(point, func(t *testing.T) {
			pod := "pod-" + point
			before := ready(t, ns, pod)
			setFailpoint(t, "restart."+point)
			restartProxy(t, syscall.SIGTERM)
			setFailpoint(t, "")
			doomed := bed.Process("cri-proxy")
			apply(t, recreate(ns, point, pod, "containers: [{name: app}]"))
			died(t, doomed)
			startProxy(t)

			crr := completed(t, ns, point)
			if s := crr.Status.ContainerRecreateStates; len(s) != 1 ||
				s[0].Phase != appsv1alpha1.ContainerRecreateRequestSucceeded {
				t.Errorf("states: %+v, message %q", s, crr.Status.Message)
			}
			after := getPod(t, ns, pod)
			was, is := container(t, before, "app"), container(t, after, "app")
			if is.State.Running == nil || is.ContainerID == was.ContainerID || is.RestartCount != 1 {
				t.Errorf("container app is %+v", is)
			}
			if a, b := container(t, before, "two"), container(t, after, "two"); a.ContainerID != b.ContainerID {
				t.Error("a neighbour was restarted")
			}
			// Around the proxy: nothing is hidden that kubelet does not know.
			assertContainers(t, string(after.UID), "app", 2, 1)
			assertKubeletDidNothing(t, ns, pod, "app")
		})
	}
	assertNodeReady(t)
}

// TestThroughTheProxy runs what kubelet and kubectl do every day, and restarts of
// kubelet and of the proxy under a running workload.
func TestThroughTheProxy(t *testing.T) {
	ns := namespace(t)
	apply(t, fmt.Sprintf(`
apiVersion: v1
kind: Pod
metadata: {name: web, namespace: %[1]s}
spec:
  terminationGracePeriodSeconds: 60
  initContainers:
  - {name: init, image: "%[3]s", command: [sh, -c, "echo from-init > /work/init"], volumeMounts: [{name: work, mountPath: /work}]}
  - {name: sidecar, image: "%[3]s", restartPolicy: Always, command: [sh, -c, "trap exit TERM; while :; do sleep 0.2; done"]}
  containers:
  - name: app
    image: %[2]s
    ports: [{name: http, containerPort: 8080}]
    env: [{name: TICK, value: "1"}]
    volumeMounts: [{name: work, mountPath: /work}]
    startupProbe: {httpGet: {path: /healthz, port: http}, periodSeconds: 1, failureThreshold: 30}
    readinessProbe: {httpGet: {path: /readyz, port: http}, periodSeconds: 1}
    livenessProbe: {tcpSocket: {port: http}, periodSeconds: 1}
  - name: shell
    image: %[3]s
    command: [sh, -c, "trap exit TERM; touch /tmp/alive; while :; do sleep 0.2; done"]
    livenessProbe: {exec: {command: [cat, /tmp/alive]}, periodSeconds: 1, timeoutSeconds: 10}
    lifecycle:
      postStart: {exec: {command: [touch, /work/post-start]}}
      preStop: {exec: {command: [sh, -c, "echo stopping > /work/stopping; sleep 2"]}}
    volumeMounts: [{name: work, mountPath: /work}]
  volumes: [{name: work, emptyDir: {}}]
`, ns, bed.Image("app:1"), bed.Image("busybox:1.0")))
	pod := ready(t, ns, "web")

	if out := kubectl(t, "-n", ns, "exec", "web", "-c", "shell", "--", "cat", "/work/init",
		"/work/post-start"); out != "from-init" {
		t.Errorf("exec: %q", out)
	}
	if out := kubectl(t, "-n", ns, "logs", "web", "-c", "app"); out == "" {
		t.Error("no logs")
	}
	if body := portForward(t, ns, "web"); !strings.Contains(body, `"version"`) {
		t.Errorf("port-forward: %q", body)
	}
	check := func(what string) {
		t.Helper()
		now := getPod(t, ns, "web")
		for _, name := range []string{"app", "shell", "sidecar"} {
			if a, b := container(t, pod, name), container(t, now, name); a.ContainerID != b.ContainerID ||
				b.RestartCount != 0 {
				t.Errorf("after %s: container %s was %s and is %s, restarts %d", what, name, a.ContainerID,
					b.ContainerID, b.RestartCount)
			}
		}
	}
	watching := watchNode(t)
	restartKubelet(t, syscall.SIGTERM)
	ready(t, ns, "web")
	check("a restart of kubelet")
	for _, why := range watching() {
		// A kubelet that has just started says this of itself, with or without a proxy, until its
		// first Status call and its first relist have come back (pkg/kubelet/runtime.go,
		// pkg/kubelet/pleg/generic.go) and it has reached the API server
		// (pkg/volume/csi/csi_plugin.go); it must not say anything else.
		if !slices.ContainsFunc([]string{"container runtime status check may not have completed yet",
			"pleg has yet to be successful", "CSINode is not yet initialized"},
			func(said string) bool { return strings.Contains(why, said) }) {
			t.Errorf("the node was not ready: %s", why)
		}
	}
	watching = watchNode(t)
	for range 3 {
		restartProxy(t, syscall.SIGKILL)
	}
	// The next relist of kubelet's goes through.
	since := len(kubeletCalls(t, "ListContainers"))
	eventually(t, "kubelet lists again", func() bool { return len(kubeletCalls(t, "ListContainers")) > since+2 })
	check("kill -9 of the proxy")
	restartProxy(t, syscall.SIGTERM)
	must(t, bed.RestartContainerd(t.Context()))
	since = len(kubeletCalls(t, "ListContainers"))
	eventually(t, "kubelet lists again", func() bool { return len(kubeletCalls(t, "ListContainers")) > since+2 })
	check("a restart of containerd")
	if out := kubectl(t, "-n", ns, "exec", "web", "-c", "shell", "--", "echo", "alive"); out != "alive" {
		t.Errorf("exec: %q", out)
	}
	if bad := watching(); len(bad) > 0 {
		t.Errorf("the node was not ready all the time: %v", bad)
	}

	began := time.Now()
	kubectl(t, "-n", ns, "delete", "pod", "web", "--wait=true")
	if took := time.Since(began); took < 2*time.Second || took > time.Minute {
		t.Errorf("deleted after %s, the preStop hook takes 2 s and the grace is a minute", took)
	}
}
