// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package e2e

import (
	"fmt"
	"os"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	appsv1 "k8s.io/api/apps/v1"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"sigs.k8s.io/controller-runtime/pkg/client"

	inplace "github.com/cri-proxy/cri-proxy/api/inplace/v1alpha1"
	"github.com/cri-proxy/cri-proxy/test/testbed"
)

// workload is a StatefulSet, DaemonSet or Deployment of the app image; rest is what its spec has
// beyond that, pod what the pod template's spec has.
func workload(kind, ns, name, rest, pod string) string {
	return fmt.Sprintf(`
apiVersion: apps/v1
kind: %[1]s
metadata: {name: %[3]s, namespace: %[2]s}
spec:%[5]s
  selector: {matchLabels: {app: %[3]s}}
  template:
    metadata: {labels: {app: %[3]s}}
    spec:
      terminationGracePeriodSeconds: 5%[6]s
      containers:
      - name: app
        image: "%[4]s"
        readinessProbe: {httpGet: {path: /healthz, port: 8080}, periodSeconds: 1}
      - name: side
        image: "%[7]s"
        command: [sh, -c, 'trap "exit 0" TERM; while :; do sleep 0.1; done']
---
`, kind, ns, name, bed.Image("app:1"), rest, pod, bed.Image("busybox:1.0"))
}

// rollout is an InPlaceRollout of container app.
func rollout(ns, name, target, image, rest string) string {
	return fmt.Sprintf(`
apiVersion: cri-proxy.io/v1alpha1
kind: InPlaceRollout
metadata: {name: %s, namespace: %s}
spec:
  target: %s
  containers:
  - {name: app, image: "%s"}%s
---
`, name, ns, target, image, rest)
}

// podsOf returns the pods of a workload, in order of name, when there are so many and all are
// ready.
func podsOf(t testing.TB, ns, app string, n int) []*corev1.Pod {
	t.Helper()
	var out []*corev1.Pod
	eventually(t, fmt.Sprintf("%d pods of %s are ready", n, app), func() bool {
		list := &corev1.PodList{}
		must(t, api.List(t.Context(), list, client.InNamespace(ns), client.MatchingLabels{"app": app}))
		out = nil
		for i := range list.Items {
			p := &list.Items[i]
			if p.DeletionTimestamp == nil && slices.ContainsFunc(p.Status.Conditions, func(c corev1.PodCondition) bool {
				return c.Type == corev1.PodReady && c.Status == corev1.ConditionTrue
			}) {
				out = append(out, p)
			}
		}
		return len(out) == n && len(list.Items) == n
	})
	slices.SortFunc(out, func(a, b *corev1.Pod) int { return strings.Compare(a.Name, b.Name) })
	return out
}

// getRollout returns a rollout as it is.
func getRollout(t testing.TB, ns, name string) *inplace.InPlaceRollout {
	t.Helper()
	r := &inplace.InPlaceRollout{}
	must(t, api.Get(t.Context(), client.ObjectKey{Namespace: ns, Name: name}, r))
	return r
}

// waitRollout is what a person does.
func waitRollout(t testing.TB, ns, name, condition string) {
	t.Helper()
	if out, err := bed.Kubectl(t.Context(), "-n", ns, "wait", "--for=condition="+condition, "--timeout=120s",
		"ipr/"+name); err != nil {
		t.Fatalf("%v: %s\n%+v\n%s", err, out, getRollout(t, ns, name).Status, events(t, ns, name))
	}
}

// imagesOf counts the pods by the image of container app that they run.
func imagesOf(pods []*corev1.Pod) map[string]int {
	out := map[string]int{}
	for _, p := range pods {
		for _, c := range p.Spec.Containers {
			if c.Name == "app" {
				out[c.Image]++
			}
		}
	}
	return out
}

// inPlace checks that the pods are those of before, with the new image in container app, which has
// been restarted so often, and everything else as it was.
func inPlace(t testing.TB, before, after []*corev1.Pod, image string, restarts int32) {
	t.Helper()
	was := map[string]*corev1.Pod{}
	for _, p := range before {
		was[p.Name] = p
	}
	for _, p := range after {
		b := was[p.Name]
		if b == nil {
			continue // scaled up
		}
		if p.UID != b.UID || p.Status.PodIP != b.Status.PodIP {
			t.Errorf("pod %s is another one", p.Name)
			continue
		}
		c := container(t, p, "app")
		if c.Image != image || c.RestartCount != container(t, b, "app").RestartCount+restarts {
			t.Errorf("pod %s: %s, restarts %d, want %s, %d more than %d", p.Name, c.Image, c.RestartCount, image,
				restarts, container(t, b, "app").RestartCount)
		}
		if container(t, p, "side").ContainerID != container(t, b, "side").ContainerID {
			t.Errorf("pod %s: the other container was restarted", p.Name)
		}
	}
}

// onImage waits until all pods of a workload run the image, by their status: kubelet is a moment
// behind.
func onImage(t testing.TB, ns, app, image string, n int) []*corev1.Pod {
	t.Helper()
	var out []*corev1.Pod
	eventually(t, fmt.Sprintf("%d pods of %s run %s", n, app, image), func() bool {
		out = podsOf(t, ns, app, n)
		for _, p := range out {
			if c := container(t, p, "app"); c.Image != image || !c.Ready {
				return false
			}
		}
		return true
	})
	return out
}

// TestRolloutOfPod changes the images of two containers of a pod and restarts a third one, each
// once.
func TestRolloutOfPod(t *testing.T) {
	t.Parallel()
	ns := namespace(t)
	apply(t, threeContainers(ns, "my-pod", corev1.RestartPolicyNever))
	before := ready(t, ns, "my-pod")
	want := map[string]string{"app": bed.Image("busybox:2.0"), "two": bed.Image("busybox:1.0"),
		"three": bed.Image("busybox:3.0")}
	apply(t, rollout(ns, "all", "{podName: my-pod}", want["app"],
		fmt.Sprintf("\n  - {name: two}\n  - {name: three, image: %q}", want["three"])))
	waitRollout(t, ns, "all", "Complete")
	var after *corev1.Pod
	eventually(t, "all have been restarted", func() bool {
		after = getPod(t, ns, "my-pod")
		for name := range want {
			if container(t, after, name).RestartCount == 0 {
				return false
			}
		}
		return true
	})
	if after.UID != before.UID || after.Status.PodIP != before.Status.PodIP || after.Status.Phase != corev1.PodRunning {
		t.Errorf("pod: %+v", after.Status)
	}
	for name, image := range want {
		c := container(t, after, name)
		if c.Image != image || c.RestartCount != 1 {
			t.Errorf("container %s: %+v", name, c)
		}
		if last := c.LastTerminationState.Terminated; last == nil || last.ExitCode != 7 {
			t.Errorf("container %s ended with %+v", name, last)
		}
	}
}

// TestRolloutOfSidecar changes the image of an init container that runs along.
func TestRolloutOfSidecar(t *testing.T) {
	t.Parallel()
	ns := namespace(t)
	two := bed.Image("busybox:2.0")
	loop := `[sh, -c, 'trap "exit 0" TERM; while :; do sleep 0.1; done']`
	apply(t, fmt.Sprintf(`
apiVersion: v1
kind: Pod
metadata: {name: meshed, namespace: %s}
spec:
  terminationGracePeriodSeconds: 3
  initContainers:
  - {name: app, image: "%s", restartPolicy: Always, command: %s}
  containers:
  - {name: main, image: "%s", command: %s}
---
`, ns, bed.Image("busybox:1.0"), loop, bed.Image("busybox:1.0"), loop))
	before := ready(t, ns, "meshed")
	since := time.Now()
	apply(t, rollout(ns, "mesh", "{podName: meshed}", two, ""))
	waitRollout(t, ns, "mesh", "Complete")
	after := ready(t, ns, "meshed")
	if c := container(t, after, "app"); c.Image != two || c.RestartCount != 1 {
		t.Errorf("sidecar: %+v", c)
	}
	if container(t, after, "main").ContainerID != container(t, before, "main").ContainerID {
		t.Errorf("main container: %+v", after.Status)
	}
	if got := callsOf(t, ns, "meshed", "app", since); !slices.Equal(got,
		[]string{"StopContainer OK", "CreateContainer OK", "StartContainer OK"}) {
		t.Errorf("kubelet called %q", got)
	}
}

// TestRolloutOfStatefulSet takes a StatefulSet through a partition, a pause, scaling, an undo and a
// broken image.
func TestRolloutOfStatefulSet(t *testing.T) {
	t.Parallel()
	ns := namespace(t)
	one, two := bed.Image("app:1"), bed.Image("app:2")
	apply(t, workload("StatefulSet", ns, "web",
		"\n  serviceName: web\n  replicas: 5\n  podManagementPolicy: Parallel\n  updateStrategy: {type: OnDelete}", ""))
	before := podsOf(t, ns, "web", 5)

	apply(t, rollout(ns, "web", "{workloadRef: {kind: StatefulSet, name: web}}", two, "\n  strategy: {partition: 3}"))
	eventually(t, "the two highest pods are updated",
		func() bool { return getRollout(t, ns, "web").Status.Updated == 2 })
	if p := podsOf(t, ns, "web", 5); imagesOf(p)[two] != 2 || imagesOf(p[3:])[two] != 2 {
		t.Errorf("images: %v", imagesOf(p))
	}

	kubectl(t, "-n", ns, "patch", "ipr", "web", "--type=merge", "-p",
		`{"spec":{"paused":true,"strategy":{"partition":0}}}`)
	kubectl(t, "-n", ns, "scale", "sts/web", "--replicas=6")
	podsOf(t, ns, "web", 6)
	if p := podsOf(t, ns, "web", 6); imagesOf(p)[one] != 3 || imagesOf(p)[two] != 3 { // the new pod is of the template
		t.Errorf("paused: %v", imagesOf(p))
	}
	kubectl(t, "-n", ns, "patch", "ipr", "web", "--type=merge", "-p", `{"spec":{"paused":false}}`)
	kubectl(t, "-n", ns, "scale", "sts/web", "--replicas=5")
	waitRollout(t, ns, "web", "Complete")
	after := onImage(t, ns, "web", two, 5)
	inPlace(t, before, after, two, 1)
	set := &appsv1.StatefulSet{}
	eventually(t, "the StatefulSet's controller is at rest", func() bool {
		must(t, api.Get(t.Context(), client.ObjectKey{Namespace: ns, Name: "web"}, set))
		return set.Status.CurrentRevision == set.Status.UpdateRevision && set.Status.UpdatedReplicas == 5 &&
			set.Status.ReadyReplicas == 5
	})

	// Undo: the images of before are in the status.
	kubectl(t, "-n", ns, "patch", "ipr", "web", "--type=merge", "-p",
		fmt.Sprintf(`{"spec":{"containers":[{"name":"app","image":%q}]}}`,
			getRollout(t, ns, "web").Status.PreviousImages["app"]))
	again := onImage(t, ns, "web", one, 5)
	waitRollout(t, ns, "web", "Complete")
	inPlace(t, after, again, one, 1)

	// A tag that does not exist touches nothing, and is taken back.
	kubectl(t, "-n", ns, "patch", "ipr", "web", "--type=merge", "-p",
		fmt.Sprintf(`{"spec":{"containers":[{"name":"app","image":%q}]}}`, bed.Image("app:missing")))
	waitRollout(t, ns, "web", "Degraded")
	eventually(t, "the rollout has been rolled back", func() bool {
		for _, c := range getRollout(t, ns, "web").Status.Conditions {
			if c.Type == inplace.ConditionProgressing && c.Reason == inplace.ReasonRolledBack {
				return true
			}
		}
		return false
	})
	inPlace(t, again, podsOf(t, ns, "web", 5), one, 0)
	must(t, api.Get(t.Context(), client.ObjectKey{Namespace: ns, Name: "web"}, set))
	if got := set.Spec.Template.Spec.Containers[0].Image; got != one {
		t.Errorf("the template has %s", got)
	}
	status := getRollout(t, ns, "web").Status
	if len(status.Failures) == 0 || !strings.Contains(status.Failures[0].Message, "missing") {
		t.Errorf("status: %+v", status)
	}
	t.Log(status.Message)
}

// TestSetImageOnStatefulSet has a workload follow its template by itself: kubectl set image and
// kubectl rollout undo do what people expect.
func TestSetImageOnStatefulSet(t *testing.T) {
	t.Parallel()
	ns := namespace(t)
	one, two := bed.Image("app:1"), bed.Image("app:2")
	apply(t, strings.Replace(workload("StatefulSet", ns, "auto",
		"\n  serviceName: auto\n  replicas: 3\n  podManagementPolicy: Parallel\n  updateStrategy: {type: OnDelete}",
		"\n      readinessGates: [{conditionType: cri-proxy.io/in-place-ready}]"),
		"metadata: {name: auto,", `metadata: {name: auto, annotations: {cri-proxy.io/in-place: "true"},`, 1))
	before := podsOf(t, ns, "auto", 3)
	kubectl(t, "-n", ns, "set", "image", "sts/auto", "app="+two)
	middle := onImage(t, ns, "auto", two, 3)
	inPlace(t, before, middle, two, 1)
	list := &inplace.InPlaceRolloutList{}
	must(t, api.List(t.Context(), list, client.InNamespace(ns)))
	if len(list.Items) != 1 || len(list.Items[0].OwnerReferences) != 1 {
		t.Fatalf("rollouts: %+v", list.Items)
	}
	waitRollout(t, ns, list.Items[0].Name, "Complete")
	kubectl(t, "-n", ns, "rollout", "undo", "sts/auto")
	inPlace(t, middle, onImage(t, ns, "auto", one, 3), one, 1)
	waitRollout(t, ns, list.Items[0].Name, "Complete")
}

// TestRolloutOfDaemonSet has one node only; test/multinode has more.
func TestRolloutOfDaemonSet(t *testing.T) {
	t.Parallel()
	ns := namespace(t)
	two := bed.Image("app:2")
	apply(t, workload("DaemonSet", ns, "agent", "\n  updateStrategy: {type: OnDelete}", ""))
	before := podsOf(t, ns, "agent", 1)
	apply(t, rollout(ns, "agent", "{workloadRef: {kind: DaemonSet, name: agent}}", two, ""))
	waitRollout(t, ns, "agent", "Complete")
	inPlace(t, before, onImage(t, ns, "agent", two, 1), two, 1)
	set := &appsv1.DaemonSet{}
	eventually(t, "the DaemonSet's controller is at rest", func() bool {
		must(t, api.Get(t.Context(), client.ObjectKey{Namespace: ns, Name: "agent"}, set))
		return set.Status.UpdatedNumberScheduled == 1 && set.Status.NumberAvailable == 1
	})
}

// TestRolloutOfDeployment changes a Deployment in place: one ReplicaSet, the same pods, and kubectl
// rollout status ends.
func TestRolloutOfDeployment(t *testing.T) {
	ns := namespace(t)
	one, two := bed.Image("app:1"), bed.Image("app:2")
	apply(t, workload("Deployment", ns, "front", "\n  replicas: 5", ""))
	before := podsOf(t, ns, "front", 5)
	apply(t, rollout(ns, "front", "{workloadRef: {kind: Deployment, name: front}}", two,
		"\n  strategy: {maxUnavailable: 2, partition: 3}"))
	eventually(t, "two pods are updated", func() bool { return getRollout(t, ns, "front").Status.Updated == 2 })
	kubectl(t, "-n", ns, "patch", "ipr", "front", "--type=merge", "-p",
		`{"spec":{"paused":true,"strategy":{"partition":0}}}`)
	eventually(t, "it is paused", func() bool {
		return slices.ContainsFunc(getRollout(t, ns, "front").Status.Conditions,
			func(c metav1.Condition) bool { return c.Reason == inplace.ReasonPaused })
	})
	if p := podsOf(t, ns, "front", 5); imagesOf(p)[two] != 2 || imagesOf(p)[one] != 3 {
		t.Errorf("paused: %v", imagesOf(p))
	}
	kubectl(t, "-n", ns, "patch", "ipr", "front", "--type=merge", "-p", `{"spec":{"paused":false}}`)
	kubectl(t, "-n", ns, "scale", "deploy/front", "--replicas=6")
	must(t, bed.StopController(t.Context(), syscall.SIGKILL))
	must(t, bed.StartController(t.Context()))
	waitRollout(t, ns, "front", "Complete")
	after := onImage(t, ns, "front", two, 6)
	inPlace(t, before, after, two, 1)
	atRest := func() {
		t.Helper()
		// its controller may be a moment behind
		kubectl(t, "-n", ns, "rollout", "status", "deploy/front", "--timeout=60s")
		sets := &appsv1.ReplicaSetList{}
		must(t, api.List(t.Context(), sets, client.InNamespace(ns)))
		d := &appsv1.Deployment{}
		must(t, api.Get(t.Context(), client.ObjectKey{Namespace: ns, Name: "front"}, d))
		// Others are its history, without pods.
		with := slices.DeleteFunc(slices.Clone(sets.Items),
			func(s appsv1.ReplicaSet) bool { return *s.Spec.Replicas == 0 && s.Status.Replicas == 0 })
		if len(with) != 1 || d.Spec.Paused || d.Status.UpdatedReplicas != *d.Spec.Replicas {
			t.Errorf("%d ReplicaSets with pods, Deployment %+v %+v", len(with), d.Spec.Paused, d.Status)
		}
	}
	atRest()
	kubectl(t, "-n", ns, "scale", "deploy/front", "--replicas=5")
	podsOf(t, ns, "front", 5)
	kubectl(t, "-n", ns, "patch", "ipr", "front", "--type=merge", "-p",
		fmt.Sprintf(`{"spec":{"containers":[{"name":"app","image":%q}]}}`, one))
	again := onImage(t, ns, "front", one, 5)
	waitRollout(t, ns, "front", "Complete")
	inPlace(t, after, again, one, 1)
	atRest()
}

// TestRolloutFails rolls an image out that ends as soon as it runs. The pods get their old image
// back, and no second one is begun.
func TestRolloutFails(t *testing.T) {
	t.Parallel()
	ns := namespace(t)
	one := bed.Image("app:1")
	crane(t, "mutate", bed.Image("app:2"), "-t", bed.Image("app:crash"), "--env", "FAIL_START=1")
	apply(t, workload("StatefulSet", ns, "ill",
		"\n  serviceName: ill\n  replicas: 3\n  podManagementPolicy: Parallel\n  updateStrategy: {type: OnDelete}", ""))
	before := podsOf(t, ns, "ill", 3)
	apply(t, rollout(ns, "ill", "{workloadRef: {kind: StatefulSet, name: ill}}", bed.Image("app:crash"),
		"\n  strategy: {progressDeadlineSeconds: 30, minReadySeconds: 2}"))
	waitRollout(t, ns, "ill", "Degraded")
	after := onImage(t, ns, "ill", one, 3)
	touched := 0
	for i, p := range after {
		if p.UID != before[i].UID {
			t.Errorf("pod %s is another one", p.Name)
		}
		if container(t, p, "app").RestartCount > 0 {
			touched++
		}
	}
	if touched != 1 {
		t.Errorf("%d pods were touched", touched)
	}
	eventually(t, "it says so", func() bool {
		return slices.ContainsFunc(getRollout(t, ns, "ill").Status.Conditions, func(c metav1.Condition) bool {
			return c.Type == inplace.ConditionProgressing && c.Reason == inplace.ReasonRolledBack
		})
	})
	s := getRollout(t, ns, "ill").Status
	t.Log(s.Message, s.Failures)
	t.Log(events(t, ns, "ill"))
}

// TestRolloutOfPrivateImage changes a pod to an image that its imagePullSecrets open, and says what
// is wrong without them.
func TestRolloutOfPrivateImage(t *testing.T) {
	t.Parallel()
	ns := namespace(t)
	const host = "rollout.e2e"
	privateRegistry(t, host)
	removeImage(t, host+"/app:2")
	apply(t, fmt.Sprintf(`
apiVersion: v1
kind: Secret
metadata: {name: good, namespace: %[1]s}
type: kubernetes.io/dockerconfigjson
stringData: {.dockerconfigjson: '{"auths":{"%[2]s":{"username":"%[3]s","password":"%[4]s"}}}'}
---
apiVersion: v1
kind: Pod
metadata: {name: with, namespace: %[1]s}
spec:
  imagePullSecrets: [{name: good}]
  containers: [{name: app, image: "%[5]s", imagePullPolicy: Always}]
---
apiVersion: v1
kind: Pod
metadata: {name: without, namespace: %[1]s}
spec:
  containers: [{name: app, image: "%[5]s"}]
---
`, ns, host, testbed.RegistryUser, testbed.RegistryPassword, bed.Image("app:1")))
	before, bare := ready(t, ns, "with"), ready(t, ns, "without")
	apply(t, rollout(ns, "without", "{podName: without}", host+"/app:2", ""))
	waitRollout(t, ns, "without", "Degraded")
	if s := getRollout(t, ns, "without").Status; len(s.Failures) != 1 ||
		!strings.Contains(s.Failures[0].Message, "Unauthorized") {
		t.Errorf("status: %+v", s)
	}
	if got := getPod(t, ns, "without"); container(t, got, "app").ContainerID != container(t, bare, "app").ContainerID ||
		got.Spec.Containers[0].Image != bed.Image("app:1") {
		t.Errorf("the pod was touched: %+v", got.Status)
	}
	apply(t, rollout(ns, "with", "{podName: with}", host+"/app:2", ""))
	waitRollout(t, ns, "with", "Complete")
	after := ready(t, ns, "with")
	if c := container(t, after, "app"); c.RestartCount != 1 ||
		c.Image != host+"/app:2" && c.ImageID == container(t, before, "app").ImageID {
		t.Errorf("container: %+v", c)
	}
	for _, log := range []string{"cri-proxy", "cri-controller"} {
		b, err := os.ReadFile(bed.LogFile(log))
		must(t, err)
		if strings.Contains(string(b), testbed.RegistryPassword) {
			t.Errorf("the log of %s has the password", log)
		}
	}
}

// TestRolloutKeepsBudget has a PodDisruptionBudget that allows nothing: nothing is stopped until it
// does.
func TestRolloutKeepsBudget(t *testing.T) {
	t.Parallel()
	ns := namespace(t)
	one, two := bed.Image("app:1"), bed.Image("app:2")
	apply(t, workload("Deployment", ns, "kept", "\n  replicas: 2", "")+fmt.Sprintf(`
apiVersion: policy/v1
kind: PodDisruptionBudget
metadata: {name: kept, namespace: %s}
spec: {minAvailable: 2, selector: {matchLabels: {app: kept}}}
`, ns))
	before := podsOf(t, ns, "kept", 2)
	apply(t, rollout(ns, "kept", "{workloadRef: {kind: Deployment, name: kept}}", two, ""))
	eventually(t, "the rollout says what holds it", func() bool {
		return slices.ContainsFunc(getRollout(t, ns, "kept").Status.Conditions,
			func(c metav1.Condition) bool { return c.Reason == inplace.ReasonBudget })
	})
	if p := podsOf(t, ns, "kept", 2); imagesOf(p)[one] != 2 {
		t.Errorf("images: %v", imagesOf(p))
	}
	kubectl(t, "-n", ns, "patch", "pdb", "kept", "--type=merge", "-p", `{"spec":{"minAvailable":1}}`)
	waitRollout(t, ns, "kept", "Complete")
	inPlace(t, before, onImage(t, ns, "kept", two, 2), two, 1)
}
