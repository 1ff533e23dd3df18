// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package cases

import (
	"bytes"
	"context"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/tools/clientcmd"
	"sigs.k8s.io/controller-runtime/pkg/client"

	appsv1alpha1 "github.com/cri-proxy/cri-proxy/api/apps/v1alpha1"
	"github.com/cri-proxy/cri-proxy/controller/nodes"
	"github.com/cri-proxy/cri-proxy/test/testbed"
)

// together is a cluster of its own, since what these tests do is about all of it: one node without
// cri-proxy, which does not answer the controller.
type together struct {
	*testbed.Bed
	t       *testing.T
	source  string
	account string // kubeconfig of the controller's ServiceAccount
}

// step is a subtest without which the next ones mean nothing.
func (b *together) step(name string, f func(*testing.T)) {
	b.t.Helper()
	whole := b.t
	defer func() { b.t = whole }()
	if !whole.Run(name, func(t *testing.T) { b.t = t; f(t) }) {
		whole.FailNow()
	}
}

// say runs kubectl, for what must work.
func (b *together) say(args ...string) string {
	b.t.Helper()
	out, err := b.Kubectl(b.t.Context(), args...)
	must(b.t, err)
	return strings.TrimSpace(out)
}

// field is a part of an object, empty if there is no such object.
func (b *together) field(kind, ns, name, path string) string {
	b.t.Helper()
	return b.say("-n", ns, "get", kind, name, "--ignore-not-found", "-o", "jsonpath={"+path+"}")
}

// ready is what the controller's readiness probe says.
func (b *together) ready() string {
	b.t.Helper()
	request, err := http.NewRequestWithContext(b.t.Context(), http.MethodGet,
		"http://"+b.ControllerHealthAddress+"/readyz?verbose", nil)
	must(b.t, err)
	answer, err := http.DefaultClient.Do(request)
	must(b.t, err)
	defer answer.Body.Close()
	body, err := io.ReadAll(answer.Body)
	must(b.t, err)
	if answer.StatusCode != http.StatusOK {
		b.t.Errorf("the controller is not ready: %s", body)
	}
	return string(body)
}

// until waits for what a readiness probe or an object says.
func (b *together) until(what string, now func() string, is func(string) bool) {
	b.t.Helper()
	var last string
	eventuallySaying(b.t, what, func() string { return last }, func() bool {
		last = now()
		return is(last)
	})
}

func startTogether(t *testing.T) *together {
	t.Helper()
	source, err := testbed.SourceDir("")
	must(t, err)
	own, err := testbed.Start(t.Context(), testbed.Options{
		Mode: testbed.ModeCluster, Direct: true, KeepLogs: t.Failed, Log: t.Output(),
		ControllerBinary: filepath.Join(bed.Bin, "cri-controller"),
	})
	must(t, err)
	t.Cleanup(func() {
		ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
		defer cancel()
		if err := own.Close(ctx); err != nil {
			t.Error(err)
		}
	})
	b := &together{Bed: own, t: t, source: source}
	for _, f := range []string{"controller/namespace.yaml", "controller/serviceaccount.yaml", "rbac"} {
		b.say("apply", "-f", filepath.Join(source, "deploy", f))
	}
	b.account, err = own.NewKubeconfig("cri-controller", "system:serviceaccount:cri-proxy-system:cri-controller",
		"system:serviceaccounts")
	must(t, err)
	own.ControllerKubeconfig = b.account
	return b
}

// olderDefinition is OpenKruise's of before 1.9, as far as anybody here cares.
const olderDefinition = `
apiVersion: apiextensions.k8s.io/v1
kind: CustomResourceDefinition
metadata: {name: imagepulljobs.apps.kruise.io, labels: {app: kruise}}
spec:
  group: apps.kruise.io
  scope: Namespaced
  names: {kind: ImagePullJob, listKind: ImagePullJobList, plural: imagepulljobs, singular: imagepulljob}
  versions:
  - {name: v1alpha1, served: true, storage: true, schema: {openAPIV3Schema: {type: object, x-kubernetes-preserve-unknown-fields: true}}}
`

const kruiseWebhooks = `
apiVersion: admissionregistration.k8s.io/v1
kind: MutatingWebhookConfiguration
metadata: {name: kruise-mutating-webhook-configuration}
webhooks: []
`

// TestTogether: beside OpenKruise, after it, and after us.
func TestTogether(t *testing.T) {
	t.Parallel()
	b := startTogether(t)
	crds := filepath.Join(b.source, "deploy", "crds")
	must(t, b.KubectlApply(t.Context(), olderDefinition+"---"+kruiseWebhooks))
	for _, name := range []string{"apps.kruise.io_containerrecreaterequests.yaml",
		"cri-proxy.io_inplacerollouts.yaml"} {
		b.say("apply", "--server-side", "-f", filepath.Join(crds, name))
	}
	b.say("wait", "--for=condition=Established", "crd", "--all", "--timeout=60s")
	must(t, b.CreateNamespace(t.Context(), "apps"))
	must(t, b.KubectlApply(t.Context(), fmt.Sprintf(`
apiVersion: v1
kind: Pod
metadata: {namespace: apps, name: gated, labels: {app: gated}}
spec:
  terminationGracePeriodSeconds: 0
  readinessGates: [{conditionType: cri-proxy.io/in-place-ready}]
  containers: [{name: app, image: %[1]s, command: [sleep, "3600"]}]
---
apiVersion: v1
kind: Pod
metadata: {namespace: apps, name: kruises}
spec:
  terminationGracePeriodSeconds: 0
  readinessGates: [{conditionType: KruisePodReady}]
  containers: [{name: app, image: %[1]s, command: [sleep, "3600"]}]
`, b.Image("busybox:1.0"))))
	b.say("-n", "apps", "wait", "--for=condition=ContainersReady", "pod/gated", "pod/kruises", "--timeout=60s")
	kruises := func() string {
		return b.field("pod", "apps", "kruises", `.status.conditions[?(@.type=="KruisePodReady")].status`)
	}

	b.step("beside OpenKruise", func(t *testing.T) {
		// The chart would not overwrite its definitions.
		out := helm(t, b.source, "install", "cri-proxy", filepath.Join(b.source, "deploy", "helm", "cri-proxy"),
			"--namespace", "cri-proxy-system", "--dry-run=server", "--take-ownership", "--kubeconfig", b.Kubeconfig)
		if strings.Contains(out, "name: imagepulljobs.apps.kruise.io") ||
			!strings.Contains(out, "name: inplacerollouts.cri-proxy.io") ||
			!strings.Contains(out, "name: imagelistpulljobs.apps.kruise.io") {
			t.Error("the chart must have all definitions but the one that is OpenKruise's")
		}

		must(t, b.StartController(t.Context(), "--openkruise-period=1s"))
		b.until("the probe tells of OpenKruise", b.ready, func(s string) bool {
			return strings.Contains(s, "left to OpenKruise") &&
				strings.Contains(s, "kruise-mutating-webhook-configuration")
		})
		must(t, b.KubectlApply(t.Context(), recreate("apps", "theirs", "gated", "containers: [{name: app}]")+`
apiVersion: cri-proxy.io/v1alpha1
kind: InPlaceRollout
metadata: {namespace: apps, name: ours}
spec: {target: {podName: none}, containers: [{name: app}]}
`))
		b.until("the rollout is seen",
			func() string { return b.field("inplacerollout", "apps", "ours", ".status.observedGeneration") },
			func(s string) bool { return s == "1" })
		time.Sleep(2 * time.Second)
		if got := b.field("crr", "apps", "theirs", ".metadata.finalizers} {.status.phase"); got != "" {
			t.Errorf("OpenKruise's request was taken up: %s", got)
		}
		if got := kruises(); got != "" {
			t.Errorf("OpenKruise's gate was opened: %s", got)
		}
	})

	b.step("after OpenKruise", func(t *testing.T) {
		b.say("delete", "mutatingwebhookconfiguration", "kruise-mutating-webhook-configuration")
		b.until("the probe tells of the older definition", b.ready, func(s string) bool {
			return strings.Contains(s, "does not serve") &&
				strings.Contains(s, "ImagePullJob in apps.kruise.io/v1beta1")
		})
		b.until("its gate is opened, whatever definitions there are", kruises,
			func(s string) bool { return s == "True" })
		must(t, b.InstallCRDs(t.Context()))
		b.until("the request is taken up",
			func() string { return b.field("crr", "apps", "theirs", ".metadata.finalizers") },
			func(s string) bool { return strings.Contains(s, "cri-proxy.io/operation") })
		if s := b.ready(); strings.Contains(s, "note:") {
			t.Errorf("a note though all is carried out: %s", s)
		}
	})

	b.step("OpenKruise comes", func(t *testing.T) {
		must(t, b.KubectlApply(t.Context(), `
apiVersion: apps/v1
kind: DaemonSet
metadata: {namespace: apps, name: kruise-daemon}
spec:
  selector: {matchLabels: {app: kruise-daemon}}
  template:
    metadata: {labels: {app: kruise-daemon}}
    spec: {nodeSelector: {none: here}, containers: [{name: daemon, image: none}]}
`))
		b.until("the request is left to it",
			func() string { return b.field("crr", "apps", "theirs", ".metadata.finalizers") },
			func(s string) bool { return s == "" })
		if s := b.ready(); !strings.Contains(s, "DaemonSet apps/kruise-daemon") {
			t.Errorf("the probe does not tell: %s", s)
		}
		b.say("-n", "apps", "delete", "daemonset", "kruise-daemon")
		b.until("the request is taken up again",
			func() string { return b.field("crr", "apps", "theirs", ".metadata.finalizers") },
			func(s string) bool { return strings.Contains(s, "cri-proxy.io/operation") })
	})

	b.step("nodes that hang", func(*testing.T) { b.hungNodes() })
	b.step("uninstall", func(*testing.T) { b.uninstall() })
}

// hungNodes has nodes that take connections and say nothing, with requests for their pods. A
// request for another node, at which nothing listens, does not wait for them: one after the other
// they would take the eight workers more than three minutes, which is longer than anything here is
// waited for.
func (b *together) hungNodes() {
	t := b.t
	t.Helper()
	const hung, each = 40, 8
	config, err := clientcmd.BuildConfigFromFlags("", b.Kubeconfig)
	must(t, err)
	config.QPS, config.Burst = 200, 400
	cluster, err := client.New(config, client.Options{Scheme: api.Scheme()})
	must(t, err)
	must(t, b.CreateNamespace(t.Context(), "hung"))

	silent, err := net.Listen("tcp", "127.0.0.1:0")
	must(t, err)
	t.Cleanup(func() { _ = silent.Close() })
	go func() {
		for {
			c, err := silent.Accept()
			if err != nil {
				return
			}
			t.Cleanup(func() { _ = c.Close() })
		}
	}()
	add := func(node, address string, pods int) {
		n := &corev1.Node{ObjectMeta: metav1.ObjectMeta{Name: node,
			Annotations: map[string]string{nodes.AddressAnnotation: address}}}
		must(t, cluster.Create(t.Context(), n))
		bare := n.DeepCopy()
		n.Status.Conditions = []corev1.NodeCondition{{Type: corev1.NodeReady, Status: corev1.ConditionTrue,
			LastHeartbeatTime: metav1.Now()}}
		n.Status.Addresses = []corev1.NodeAddress{{Type: corev1.NodeInternalIP, Address: "127.0.0.1"}}
		must(t, cluster.Status().Patch(t.Context(), n, client.MergeFrom(bare)))
		for i := range pods {
			p := &corev1.Pod{
				ObjectMeta: metav1.ObjectMeta{Namespace: "hung", Name: fmt.Sprintf("%s-%d", node, i)},
				Spec: corev1.PodSpec{NodeName: node,
					Containers: []corev1.Container{{Name: "app", Image: "none"}}},
			}
			must(t, cluster.Create(t.Context(), p))
			bare := p.DeepCopy()
			p.Status.Phase = corev1.PodRunning
			p.Status.ContainerStatuses = []corev1.ContainerStatus{{
				Name: "app", Image: "none", ImageID: "none", ContainerID: "containerd://" + p.Name, Ready: true,
				State: corev1.ContainerState{Running: &corev1.ContainerStateRunning{StartedAt: metav1.Now()}},
			}}
			must(t, cluster.Status().Patch(t.Context(), p, client.MergeFrom(bare)))
		}
	}
	ask := func(pod string) {
		must(t, cluster.Create(t.Context(), &appsv1alpha1.ContainerRecreateRequest{
			ObjectMeta: metav1.ObjectMeta{Namespace: "hung", Name: pod},
			Spec: appsv1alpha1.ContainerRecreateRequestSpec{
				PodName: pod, Containers: []appsv1alpha1.ContainerRecreateRequestContainer{{Name: "app"}},
			},
		}))
	}
	var nodes []string
	for i := range hung {
		nodes = append(nodes, fmt.Sprintf("hung-%d", i))
		add(nodes[i], silent.Addr().String(), each)
	}
	add("other", freeAddress(t), 1)
	for i := range hung {
		for j := range each {
			ask(fmt.Sprintf("hung-%d-%d", i, j))
		}
	}
	message := func(pod string) string { return b.field("crr", "hung", pod, ".status.message") }
	b.until("the controller says that a node hangs", func() string { return message("hung-0-0") },
		func(s string) bool { return s != "" })
	start := time.Now()
	ask("other-0")
	b.until("the other request is at work", func() string { return message("other-0") },
		func(s string) bool { return strings.Contains(s, "refused") })
	t.Logf("the other node was called within %s", time.Since(start))
	b.say(append([]string{"delete", "nodes", "other"}, nodes...)...)
}

// uninstall ends the controller, and takes off what it has left.
func (b *together) uninstall() {
	t := b.t
	t.Helper()
	for _, ns := range []string{"held", "ended"} {
		must(t, b.CreateNamespace(t.Context(), ns))
	}
	must(t, b.KubectlApply(t.Context(), `
apiVersion: apps.kruise.io/v1beta1
kind: ImagePullJob
metadata: {namespace: held, name: forever}
spec: {image: "busybox:1.0", completionPolicy: {type: Never}}
---
apiVersion: cri-proxy.io/v1alpha1
kind: InPlaceRollout
metadata: {namespace: held, name: at-work}
spec: {target: {podName: none}, containers: [{name: app}]}
---
apiVersion: apps.kruise.io/v1beta1
kind: ImagePullJob
metadata: {namespace: ended, name: over}
spec: {image: "busybox:1.0", selector: {names: [none]}, completionPolicy: {type: Always}}
`))
	finalizers := func(kind, ns, name string) string { return b.field(kind, ns, name, ".metadata.finalizers") }
	b.until("a job and a rollout at work have finalizers", func() string {
		return finalizers("imagepulljob", "held", "forever") + finalizers("inplacerollout", "held", "at-work")
	}, func(s string) bool {
		return strings.Contains(s, "/image-pull") && strings.Contains(s, "/in-place-rollout")
	})
	b.until("a job that has ended has none", func() string {
		return b.field("imagepulljob", "ended", "over", ".status.completionTime} {.metadata.finalizers")
	},
		func(s string) bool { return s != "" && !strings.Contains(s, "image-pull") })
	b.say("-n", "apps", "wait", "--for=condition=Ready", "pod/gated", "--timeout=60s")

	must(t, b.StopController(t.Context(), syscall.SIGKILL))
	b.say("-n", "apps", "patch", "pod", "gated", "--subresource=status", "-p",
		`{"status":{"conditions":[{"type":"cri-proxy.io/in-place-ready","status":"False","reason":"InPlaceRollout","message":"uid x"}]}}`)
	// Stands in for the controller's own, which is to be stopped.
	must(t, b.KubectlApply(t.Context(), fmt.Sprintf(`
apiVersion: v1
kind: Pod
metadata: {namespace: apps, name: late}
spec:
  terminationGracePeriodSeconds: 0
  readinessGates: [{conditionType: cri-proxy.io/in-place-ready}, {conditionType: KruisePodReady}]
  containers: [{name: app, image: %[1]s, command: [sleep, "3600"]}]
---
apiVersion: apps/v1
kind: Deployment
metadata: {namespace: cri-proxy-system, name: cri-controller}
spec:
  selector: {matchLabels: {app: c}}
  template:
    metadata: {labels: {app: c}}
    spec: {terminationGracePeriodSeconds: 0, containers: [{name: c, image: %[1]s, command: [sleep, "3600"]}]}
`, b.Image("busybox:1.0"))))
	b.say("-n", "apps", "wait", "--for=condition=ContainersReady", "pod/late", "--timeout=60s")
	for _, name := range []string{"gated", "late"} {
		b.until("nobody opens the gate of "+name,
			func() string { return b.field("pod", "apps", name, `.status.conditions[?(@.type=="Ready")].status`) },
			func(s string) bool { return s == "False" })
	}
	// What has ended goes without a controller; what has not is held.
	for _, ns := range []string{"held", "ended"} {
		b.say("delete", "namespace", ns, "--wait=false")
	}
	b.say("wait", "--for=delete", "namespace/ended", "--timeout=60s")
	if b.field("namespace", "default", "held", ".status.phase") != "Terminating" {
		t.Error("the namespace with finalizers is gone already: this test tests nothing")
	}

	cmd := exec.CommandContext(t.Context(), filepath.Join(bed.Bin, "cri-controller"), "uninstall", "--kubeconfig",
		b.account, "--timeout=60s")
	out, err := cmd.CombinedOutput()
	if err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	t.Logf("%s", out)
	b.say("wait", "--for=delete", "namespace/held", "--timeout=60s")
	for _, name := range []string{"gated", "late"} {
		b.say("-n", "apps", "wait", "--for=condition=Ready", "pod/"+name, "--timeout=60s")
	}
	if got := b.field("deployment", "cri-proxy-system", "cri-controller", ".spec.replicas"); got != "0" {
		t.Errorf("the controller has %s replicas", got)
	}
	if got := finalizers("crr", "apps", "theirs"); got != "" {
		t.Errorf("finalizers %s", got)
	}
	b.say("delete", "namespace", "apps", "--timeout=60s")
}

// helm runs the one that the repository pins.
func helm(t *testing.T, source string, args ...string) string {
	t.Helper()
	return goTool(t, source, "", append([]string{"tool", "helm"}, args...)...)
}

func goTool(t *testing.T, source, stdin string, args ...string) string {
	t.Helper()
	home := scratchDir(t)
	cmd := exec.CommandContext(t.Context(), "go", args...)
	cmd.Dir = filepath.Join(source, "tools", "deploy")
	cmd.Env = append(os.Environ(), "GOFLAGS=-mod=readonly", "CGO_ENABLED=0", "HELM_CACHE_HOME="+home,
		"HELM_CONFIG_HOME="+home, "HELM_DATA_HOME="+home)
	cmd.Stdin = strings.NewReader(stdin)
	var stderr bytes.Buffer
	cmd.Stderr = &stderr
	out, err := cmd.Output()
	if err != nil {
		t.Fatalf("go %s: %v\n%s", strings.Join(args, " "), err, &stderr)
	}
	return string(out)
}

// TestHealth: what kstatus, by its own code, and Argo CD, by the script in deploy/argocd, make of
// objects as the controller writes them.
func TestHealth(t *testing.T) {
	t.Parallel()
	ns := namespace(t)
	source, err := testbed.SourceDir("")
	must(t, err)
	pod := func(name string) string {
		return fmt.Sprintf(`
apiVersion: v1
kind: Pod
metadata: {namespace: %s, name: %s}
spec:
  terminationGracePeriodSeconds: 0
  containers: [{name: app, image: %s, command: [sleep, "3600"]}]
---
`, ns, name, bed.Image("busybox:1.0"))
	}
	rollout := func(name, pod, image, rest string) string {
		return fmt.Sprintf(`
apiVersion: cri-proxy.io/v1alpha1
kind: InPlaceRollout
metadata: {namespace: %s, name: %s}
spec: {target: {podName: %s}, containers: [{name: app, image: "%s"}]%s}
---
`, ns, name, pod, image, rest)
	}
	job := func(name, image, rest string) string {
		return fmt.Sprintf(`
apiVersion: apps.kruise.io/v1beta1
kind: ImagePullJob
metadata: {namespace: %s, name: %s}
spec: {image: "%s", pullPolicy: {backoffLimit: 0}%s}
---
`, ns, name, image, rest)
	}
	apply(t, pod("good")+pod("bad")+pod("still")+pod("again"))
	allReady(t, ns)
	none := bed.Image("busybox:none")
	apply(t, rollout("done", "good", bed.Image("busybox:2.0"), "")+
		rollout("rolled-back", "bad", none, "")+
		rollout("paused", "still", bed.Image("busybox:2.0"), ", paused: true")+
		recreate(ns, "done", "again", "containers: [{name: app}]")+
		job("done", bed.Image("busybox:1.0"), ", completionPolicy: {type: Always}")+
		job("failed", none, ", completionPolicy: {type: Always}")+
		job("paused", bed.Image("busybox:1.0"), ", parallelism: 0, completionPolicy: {type: Always}")+
		fmt.Sprintf(`
apiVersion: apps.kruise.io/v1beta1
kind: ImageListPullJob
metadata: {namespace: %s, name: done}
spec: {images: ["%s"], completionPolicy: {type: Always}}
`, ns, bed.Image("busybox:1.0")))
	// What is there from the first moment, whoever looks.
	if counts := kubectl(t, "-n", ns, "get", "inplacerollout", "paused", "-o",
		"jsonpath={.status.desired}{.status.updated}{.status.failed}"); len(counts) != 3 {
		t.Errorf("counts of a new rollout: %q", counts)
	}
	want := []string{
		"ContainerRecreateRequest/done Current Healthy",
		"ImageListPullJob/done Current Healthy",
		"ImagePullJob/done Current Healthy",
		"ImagePullJob/failed Failed Degraded",
		"ImagePullJob/paused InProgress Suspended",
		"InPlaceRollout/done Current Healthy",
		"InPlaceRollout/paused InProgress Suspended",
		"InPlaceRollout/rolled-back Failed Degraded",
	}
	var got string
	eventuallySaying(t, "all stand as kstatus and Argo CD are to see them: "+strings.Join(want, ", "),
		func() string { return got }, func() bool {
			got = health(t, source, ns)
			for _, line := range want {
				if !strings.Contains(got, line) {
					return false
				}
			}
			return true
		})
	for kind, paths := range map[string]string{
		"inplacerollout": "{.status.desired} {.status.updated} {.status.ready} {.status.unavailable} " +
			"{.status.failed}",
		"imagepulljob":     "{.status.desired} {.status.active} {.status.succeeded} {.status.failed} {.status.skipped}",
		"imagelistpulljob": "{.status.desired} {.status.active} {.status.completed} {.status.succeeded}",
	} {
		if counts := kubectl(t, "-n", ns, "get", kind, "done", "-o",
			"jsonpath="+paths); len(strings.Fields(counts)) != len(strings.Fields(paths)) {
			t.Errorf("%s: counts %q of %s", kind, counts, paths)
		}
	}
}

// health are the objects of a namespace as others see them.
func health(t *testing.T, source, ns string) string {
	t.Helper()
	var documents strings.Builder
	for _, kind := range []string{"containerrecreaterequests", "imagelistpulljobs", "imagepulljobs",
		"inplacerollouts"} {
		for _, name := range strings.Fields(kubectl(t, "-n", ns, "get", kind, "-o", "name")) {
			documents.WriteString("---\n" + kubectl(t, "-n", ns, "get", name, "-o", "yaml") + "\n")
		}
	}
	return goTool(t, source, documents.String(), "run", "./health",
		filepath.Join(source, "deploy", "argocd", "health.lua"))
}
