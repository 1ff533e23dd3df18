// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package cases

import (
	"context"
	"fmt"
	"strings"
	"sync"
	"testing"
	"time"

	appsv1 "k8s.io/api/apps/v1"
	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/api/meta"
	"k8s.io/client-go/tools/clientcmd"
	"sigs.k8s.io/controller-runtime/pkg/client"

	inplace "github.com/cri-proxy/cri-proxy/api/inplace/v1alpha1"
)

// workloadOf is a workload of two containers, of which app has the image and ends at once when that
// is version 3.0; annotations are its own, spec is what it has beyond its template.
func workloadOf(kind, ns, name, image, annotations, spec string) string {
	return fmt.Sprintf(`
apiVersion: apps/v1
kind: %[1]s
metadata: {namespace: %[2]s, name: %[3]s, annotations: {%[5]s}}
spec:
  %[6]s
  selector: {matchLabels: {app: %[3]s}}
  template:
    metadata: {labels: {app: %[3]s}}
    spec:
      terminationGracePeriodSeconds: 5
      containers:
      - name: app
        image: %[4]q
        command: [sh, -c, 'if [ "$(cat /etc/version)" = 3.0 ]; then exit 1; fi; trap "exit 0" TERM; while :; do sleep 0.1; done']
      - {name: side, image: %[7]q, command: [sh, -c, 'trap "exit 0" TERM; while :; do sleep 0.1; done']}
---
`, kind, ns, name, image, annotations, spec, bed.Image("busybox:1.0"))
}

const (
	inPlaceOn = `cri-proxy.io/in-place: "true"`
	onDelete  = "updateStrategy: {type: OnDelete}"
	// endsAtOnce is for workloads that get version 3.0: kubelet shows its container as running, and
	// without a readinessProbe as ready, until kubelet has noticed the end, a second later.
	endsAtOnce = "\n  minReadySeconds: 3"
)

// readyPods waits until n pods of a workload are ready, and all of its pods, and returns them by
// name.
func readyPods(t testing.TB, ns, name string, n int) map[string]*corev1.Pod {
	t.Helper()
	var pods map[string]*corev1.Pod
	eventuallySaying(t, fmt.Sprintf("%d pods of %s are ready", n, name), func() string { return fmt.Sprint(len(pods)) },
		func() bool {
			list := &corev1.PodList{}
			must(t, api.List(t.Context(), list, client.InNamespace(ns), client.MatchingLabels{"app": name}))
			pods = map[string]*corev1.Pod{}
			for i := range list.Items {
				if p := &list.Items[i]; isReady(p) {
					pods[p.Name] = p
				}
			}
			return len(pods) == n && len(list.Items) == n
		})
	return pods
}

// samePods says that the pods are those of before, and that their containers were restarted so
// often meanwhile.
func samePods(t testing.TB, before, after map[string]*corev1.Pod, image string, app, side int32) {
	t.Helper()
	for name, was := range before {
		is := after[name]
		if is == nil || is.UID != was.UID {
			t.Errorf("pod %s is not there any more", name)
			continue
		}
		a, s := container(t, is, "app"), container(t, is, "side")
		if a.Image != image || a.RestartCount-container(t, was, "app").RestartCount != app ||
			s.RestartCount-container(t, was, "side").RestartCount != side {
			t.Errorf("pod %s runs %s, restarts %d and %d more; want %s, %d and %d more", name, a.Image,
				a.RestartCount-container(t, was, "app").RestartCount, s.RestartCount-container(t, was, "side").
					RestartCount,
				image, app, side)
		}
	}
}

// reason is that of the condition Complete.
func reason(r *inplace.InPlaceRollout) string {
	if c := meta.FindStatusCondition(r.Status.Conditions, inplace.ConditionComplete); c != nil {
		return c.Reason
	}
	return ""
}

// untilReason waits until the rollout is there and Complete for a reason.
func untilReason(t testing.TB, ns, name, want string) *inplace.InPlaceRollout {
	t.Helper()
	r := &inplace.InPlaceRollout{}
	eventuallySaying(t, "rollout "+name+" is "+want,
		func() string { return fmt.Sprintf("%+v\n%s", r.Status, events(t, ns, name)) }, func() bool {
			err := api.Get(t.Context(), client.ObjectKey{Namespace: ns, Name: name}, r)
			return err == nil && reason(r) == want
		})
	return r
}

// TestWhatUsersDoToAHeldDeployment changes Deployments that a rollout has paused halfway. What is
// more than a number ends the rollout, and the Deployment goes on from there: kubectl rollout
// status ends.
func TestWhatUsersDoToAHeldDeployment(t *testing.T) {
	t.Parallel()
	ns := namespace(t)
	one, two := bed.Image("busybox:1.0"), bed.Image("busybox:2.0")
	cases := []struct {
		name  string
		do    func(name string)
		goes  bool // on
		image string
	}{
		{name: "env", image: two,
			do: func(name string) { kubectl(t, "-n", ns, "set", "env", "deploy/"+name, "SETTING=changed") }},
		{name: "apply", image: one,
			do: func(name string) { apply(t, workloadOf("Deployment", ns, name, one, "", "replicas: 2")) }},
		{name: "replace", image: one, do: func(name string) {
			kubectl(t, "-n", ns, "patch", "deploy", name, "--type=json", "-p",
				`[{"op":"remove","path":"/metadata/annotations"},{"op":"remove","path":"/spec/paused"},
				  {"op":"replace","path":"/spec/template/spec/containers/0/image","value":"`+one+`"}]`)
		}},
		{name: "restart", image: two, do: func(name string) {
			kubectl(t, "-n", ns, "rollout", "resume", "deploy/"+name) // as kubectl asks for
			kubectl(t, "-n", ns, "rollout", "restart", "deploy/"+name)
		}},
		{name: "scale", image: two, goes: true,
			do: func(name string) { kubectl(t, "-n", ns, "scale", "deploy/"+name, "--replicas=3") }},
	}
	for _, c := range cases {
		apply(t, workloadOf("Deployment", ns, c.name, one, "", "replicas: 2"))
	}
	for _, c := range cases {
		readyPods(t, ns, c.name, 2)
		apply(t, rollout(ns, c.name, "{workloadRef: {kind: Deployment, name: "+c.name+"}}", two, "partition: 1"))
	}
	for _, c := range cases {
		untilReason(t, ns, c.name, inplace.ReasonPartitioned)
		c.do(c.name)
	}
	for _, c := range cases {
		want := inplace.ReasonSuperseded
		if c.goes {
			want = inplace.ReasonRolledOut
			kubectl(t, "-n", ns, "patch", "ipr", c.name, "--type=merge", "-p", `{"spec":{"strategy":{"partition":0}}}`)
		}
		if r := ended(t, ns, c.name); reason(r) != want {
			t.Errorf("%s: %s, want %s: %s", c.name, reason(r), want, r.Status.Message)
		}
		kubectl(t, "-n", ns, "rollout", "status", "deploy/"+c.name, "--timeout=60s")
		d := &appsv1.Deployment{}
		must(t, api.Get(t.Context(), client.ObjectKey{Namespace: ns, Name: c.name}, d))
		if d.Spec.Paused || d.Annotations[inplace.PausedByAnnotation] != "" ||
			d.Spec.Template.Spec.Containers[0].Image != c.image {
			t.Errorf("%s: paused %v, annotations %v, image %s", c.name, d.Spec.Paused, d.Annotations,
				d.Spec.Template.Spec.Containers[0].Image)
		}
	}
}

// TestUndoOfADeployment undoes a Deployment that was rolled in place: it goes one revision back.
// What is rolled in place after that keeps its pods, also if another ReplicaSet has the image.
func TestUndoOfADeployment(t *testing.T) {
	t.Parallel()
	ns := namespace(t)
	one, two := bed.Image("busybox:1.0"), bed.Image("busybox:2.0")
	apply(t, workloadOf("Deployment", ns, "web", one, "", "replicas: 2"))
	before := readyPods(t, ns, "web", 2)
	roll := func(image string) {
		t.Helper()
		apply(t, rollout(ns, "web", "{workloadRef: {kind: Deployment, name: web}}", image, "maxUnavailable: 2"))
		if f := complete(ended(t, ns, "web")); f != "" {
			t.Fatal(f)
		}
	}
	image := func() string {
		return kubectl(t, "-n", ns, "get", "deploy", "web", "-o", "jsonpath={.spec.template.spec.containers[0].image}")
	}
	roll(two)
	middle := readyPods(t, ns, "web", 2)
	samePods(t, before, middle, two, 1, 0)
	kubectl(t, "-n", ns, "rollout", "undo", "deploy/web")
	kubectl(t, "-n", ns, "rollout", "status", "deploy/web", "--timeout=60s")
	if got := image(); got != one {
		t.Errorf("undo went to %s", got)
	}
	// The first ReplicaSet has the image and is older than that with the pods.
	before = readyPods(t, ns, "web", 2)
	kubectl(t, "-n", ns, "annotate", "ipr", "web", "cri-proxy.io/retry=again")
	eventually(t, "the rollout has begun again",
		func() bool { return getRollout(t, ns, "web").Status.CompletionTime == nil || image() == two })
	if f := complete(ended(t, ns, "web")); f != "" {
		t.Fatal(f)
	}
	kubectl(t, "-n", ns, "rollout", "status", "deploy/web", "--timeout=60s")
	time.Sleep(2 * time.Second) // for the Deployment's controller to do something that it should not
	samePods(t, before, readyPods(t, ns, "web", 2), two, 1, 0)
	kubectl(t, "-n", ns, "rollout", "undo", "deploy/web")
	if got := image(); got != one {
		t.Errorf("undo went to %s", got)
	}
	t.Log(kubectl(t, "-n", ns, "rollout", "history", "deploy/web"))
}

// TestRestartInPlace has workloads restarted that follow their template in place: kubectl rollout
// restart, set image and undo leave the pods where they are, and the workload counts them as
// updated.
func TestRestartInPlace(t *testing.T) {
	t.Parallel()
	ns := namespace(t)
	one, two := bed.Image("busybox:1.0"), bed.Image("busybox:2.0")
	apply(t, workloadOf("StatefulSet", ns, "set", one, inPlaceOn,
		onDelete+"\n  serviceName: set\n  replicas: 2\n  podManagementPolicy: Parallel"))
	apply(t, workloadOf("DaemonSet", ns, "agent", one, inPlaceOn, onDelete))
	for _, w := range []struct {
		kind, name string
		n          int
		counts     func(t testing.TB) (updated, generation, observed int64)
	}{
		{"statefulset", "set", 2, func(t testing.TB) (int64, int64, int64) {
			s := &appsv1.StatefulSet{}
			must(t, api.Get(t.Context(), client.ObjectKey{Namespace: ns, Name: "set"}, s))
			return int64(s.Status.UpdatedReplicas), s.Generation, s.Status.ObservedGeneration
		}},
		{"daemonset", "agent", 1, func(t testing.TB) (int64, int64, int64) {
			d := &appsv1.DaemonSet{}
			must(t, api.Get(t.Context(), client.ObjectKey{Namespace: ns, Name: "agent"}, d))
			return int64(d.Status.UpdatedNumberScheduled), d.Generation, d.Status.ObservedGeneration
		}},
	} {
		t.Run(w.kind, func(t *testing.T) {
			t.Parallel()
			own := w.kind + "-" + w.name
			untilReason(t, ns, own, inplace.ReasonRolledOut)
			step := func(image string, app, side int32, args ...string) {
				t.Helper()
				before := readyPods(t, ns, w.name, w.n)
				begun := getRollout(t, ns, own).Status.StartTime
				time.Sleep(time.Second) // the start time is in seconds
				kubectl(t, append([]string{"-n", ns}, args...)...)
				eventually(t, own+" has ended anew", func() bool {
					r := getRollout(t, ns, own)
					return r.Status.CompletionTime != nil && !r.Status.StartTime.Equal(begun)
				})
				r := getRollout(t, ns, own)
				if f := complete(r); f != "" || int(r.Status.Updated) != w.n {
					t.Fatalf("%v: %s; updated %d", args, f, r.Status.Updated)
				}
				samePods(t, before, readyPods(t, ns, w.name, w.n), image, app, side)
				eventually(t, "the workload counts them, too", func() bool {
					updated, generation, observed := w.counts(t)
					return int(updated) == w.n && observed == generation
				})
			}
			step(one, 1, 1, "rollout", "restart", w.kind+"/"+w.name)
			step(two, 1, 0, "set", "image", w.kind+"/"+w.name, "app="+two)
			step(one, 1, 0, "rollout", "undo", w.kind+"/"+w.name)
		})
	}
}

// git applies a manifest on the server's side, as GitOps controllers do.
func git(ctx context.Context, file string, force bool) error {
	args := []string{"apply", "--server-side", "--field-manager=git", "-f", file}
	if force {
		args = append(args, "--force-conflicts")
	}
	_, err := bed.Kubectl(ctx, args...)
	return err
}

// TestFieldsAreGivenBack rolls an image back, after which those whose workload it is can apply it
// on the server's side again without force. The good image that they apply is a goal, and is
// reached. The strategy is theirs, too.
func TestFieldsAreGivenBack(t *testing.T) {
	t.Parallel()
	ns := namespace(t)
	one, two, bad := bed.Image("busybox:1.0"), bed.Image("busybox:2.0"), bed.Image("busybox:3.0")
	file := scratchDir(t) + "/set.yaml"
	manifest := func(image, strategy string) string {
		writeFile(t, file,
			workloadOf("StatefulSet", ns, "set", image, inPlaceOn+", cri-proxy.io/in-place-strategy: '"+strategy+"'",
				onDelete+"\n  serviceName: set\n  replicas: 2\n  podManagementPolicy: Parallel"+endsAtOnce))
		return file
	}
	must(t, git(t.Context(), manifest(one, `{"maxUnavailable": 0}`), false))
	before := readyPods(t, ns, "set", 2)
	eventually(t, "a strategy that the schema refuses is said", func() bool {
		return strings.Contains(events(t, ns, "set"), "maxUnavailable must be a number from 1")
	})
	must(t, git(t.Context(), manifest(one, `{"maxUnavailable": 2, "progressDeadlineSeconds": 90}`), false))
	if r := untilReason(t, ns, "statefulset-set",
		inplace.ReasonRolledOut); r.Spec.Strategy.ProgressDeadlineSeconds != 90 {
		t.Errorf("strategy %+v", r.Spec.Strategy)
	}
	kubectl(t, "-n", ns, "set", "image", "sts/set", "app="+bad)
	eventually(t, "it is rolled back", func() bool {
		r := getRollout(t, ns, "statefulset-set")
		return reason(r) == inplace.ReasonRolledBack && r.Status.CompletionTime != nil
	})
	if got := kubectl(t, "-n", ns, "get", "sts", "set", "-o",
		"jsonpath={.spec.template.spec.containers[0].image}"); got != one {
		t.Errorf("the template has %s", got)
	}
	must(t, git(t.Context(), manifest(two, `{"maxUnavailable": 2, "progressDeadlineSeconds": 90}`), false))
	kubectl(t, "-n", ns, "wait", "--for=condition=Complete", "ipr/statefulset-set", "--timeout=60s")
	after := readyPods(t, ns, "set", 2)
	for name, p := range after {
		if p.UID != before[name].UID || container(t, p, "app").Image != two {
			t.Errorf("pod %s: %s", name, states(p))
		}
	}
}

// TestFights has those who would write the same object in turns for ever, two minutes each, most of
// which nobody does anything: so they go side by side.
func TestFights(t *testing.T) {
	t.Parallel()
	var wg sync.WaitGroup
	wg.Go(func() { t.Run("GitOps", testFightWithGitOps) })
	wg.Go(func() { t.Run("rewritten anew", testWebhookRewritesAnew) })
	wg.Wait()
}

// testFightWithGitOps has an image that fails applied each 5 seconds for two minutes. It is tried
// once, rolled back once, and then left: the objects are not written any more. The good image,
// applied in the end, is a goal.
func testFightWithGitOps(t *testing.T) {
	ns := namespace(t)
	one, bad := bed.Image("busybox:1.0"), bed.Image("busybox:3.0")
	file := scratchDir(t) + "/set.yaml"
	manifest := func(image string) string {
		writeFile(t, file, workloadOf("StatefulSet", ns, "set", image, inPlaceOn,
			onDelete+"\n  serviceName: set\n  replicas: 2\n  podManagementPolicy: Parallel"+endsAtOnce))
		return file
	}
	must(t, git(t.Context(), manifest(one), true))
	before := readyPods(t, ns, "set", 2)
	untilReason(t, ns, "statefulset-set", inplace.ReasonRolledOut)
	writes := watchWrites(t, ns)
	var calm map[string]int
	restarts := map[string]int32{}
	manifest(bad)
	begun := time.Now()
	for n := range 24 {
		must(t, git(t.Context(), file, true))
		if n == 12 {
			calm = writes()
			for name, p := range readyPods(t, ns, "set", 2) {
				restarts[name] = container(t, p, "app").RestartCount
			}
		}
		time.Sleep(time.Until(begun.Add(time.Duration(n+1) * 5 * time.Second)))
	}
	for object, n := range writes() {
		if n -= calm[object]; n > 6 {
			t.Errorf("%s was written %d times in the second minute", object, n)
		} else {
			t.Logf("%s: %d writes in the first minute, %d in the second", object, calm[object], n)
		}
	}
	after := readyPods(t, ns, "set", 2)
	for name, p := range after {
		if a := container(t, p, "app"); p.UID != before[name].UID || a.Image != one ||
			a.RestartCount != restarts[name] {
			t.Errorf("pod %s: %s; it had %d restarts after a minute", name, states(p), restarts[name])
		}
	}
	if r := getRollout(t, ns, "statefulset-set"); reason(r) != inplace.ReasonNotRetried {
		t.Errorf("%s: %s", reason(r), r.Status.Message)
	}
	if said := events(t, ns, "set"); strings.Count(said, inplace.ReasonNotRetried) != 1 {
		t.Errorf("events\n%s", said)
	}
	must(t, git(t.Context(), manifest(one), false))
	kubectl(t, "-n", ns, "wait", "--for=condition=Complete", "ipr/statefulset-set", "--timeout=60s")
}

// watchWrites counts the writes of the rollouts, StatefulSets and pods of a namespace, by whomever,
// and returns a function that says how many there were.
func watchWrites(t *testing.T, ns string) func() map[string]int {
	t.Helper()
	config, err := clientcmd.BuildConfigFromFlags("", bed.Kubeconfig)
	must(t, err)
	watcher, err := client.NewWithWatch(config, client.Options{Scheme: api.Scheme()})
	must(t, err)
	var mu sync.Mutex
	counts := map[string]int{}
	for _, list := range []client.ObjectList{&corev1.PodList{}, &appsv1.StatefulSetList{},
		&inplace.InPlaceRolloutList{}} {
		w, err := watcher.Watch(t.Context(), list, client.InNamespace(ns))
		must(t, err)
		var wg sync.WaitGroup
		wg.Go(func() {
			for e := range w.ResultChan() {
				o, ok := e.Object.(client.Object)
				if !ok || e.Type != "MODIFIED" {
					continue
				}
				mu.Lock()
				counts[strings.TrimPrefix(fmt.Sprintf("%T ", o), "*")+o.GetName()]++
				mu.Unlock()
			}
		})
		t.Cleanup(func() { w.Stop(); wg.Wait() })
	}
	return func() map[string]int {
		mu.Lock()
		defer mu.Unlock()
		out := map[string]int{}
		for k, n := range counts {
			out[k] = n
		}
		return out
	}
}
