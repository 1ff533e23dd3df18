// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package cases

import (
	"context"
	"encoding/base64"
	"encoding/json"
	"encoding/pem"
	"fmt"
	"net"
	"net/http"
	"net/http/httptest"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	admissionv1 "k8s.io/api/admission/v1"
	appsv1 "k8s.io/api/apps/v1"
	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/watch"
	"k8s.io/client-go/tools/clientcmd"
	"sigs.k8s.io/controller-runtime/pkg/client"

	inplace "github.com/cri-proxy/cri-proxy/api/inplace/v1alpha1"
)

const gate = "\n  readinessGates: [{conditionType: cri-proxy.io/in-place-ready}]"

// deny makes a policy of the namespace that denies an image of a resource, under the path of its
// pod spec, and waits until it is in force.
func deny(t testing.TB, ns, group, resource, spec, image, probe string) {
	t.Helper()
	name := ns + "-" + resource
	apply(t, fmt.Sprintf(`
apiVersion: admissionregistration.k8s.io/v1
kind: ValidatingAdmissionPolicy
metadata: {name: %[1]s}
spec:
  failurePolicy: Fail
  matchConstraints:
    namespaceSelector: {matchLabels: {kubernetes.io/metadata.name: %[2]s}}
    resourceRules: [{apiGroups: ["%[3]s"], apiVersions: [v1], operations: [CREATE, UPDATE], resources: [%[4]s]}]
  validations:
  - expression: "%[5]s.containers.all(c, c.image != '%[6]s')"
    message: the image is not signed
---
apiVersion: admissionregistration.k8s.io/v1
kind: ValidatingAdmissionPolicyBinding
metadata: {name: %[1]s}
spec: {policyName: %[1]s, validationActions: [Deny]}
`, name, ns, group, resource, spec, image))
	dropAfter(t, "validatingadmissionpolicybinding", name)
	dropAfter(t, "validatingadmissionpolicy", name)
	eventually(t, "the policy is in force", func() bool {
		_, err := bed.Kubectl(t.Context(), "-n", ns, "set", "image", probe, "app="+image, "--dry-run=server")
		return err != nil && strings.Contains(err.Error(), "not signed")
	})
}

func dropAfter(t testing.TB, kind, name string) {
	t.Cleanup(func() {
		if _, err := bed.Kubectl(context.Background(), "delete", kind, name, "--ignore-not-found"); err != nil {
			t.Error(err)
		}
	})
}

// workloads are a Deployment and a StatefulSet of two pods each, named deploy and sts.
func workloads(ns, image string) string {
	out := ""
	for _, w := range []struct{ kind, name, strategy string }{
		{"Deployment", "deploy", ""}, {"StatefulSet", "sts", "updateStrategy: {type: OnDelete}"},
	} {
		out += fmt.Sprintf(`
apiVersion: apps/v1
kind: %[1]s
metadata: {namespace: %[2]s, name: %[3]s}
spec:
  replicas: 2
  %[6]s
  selector: {matchLabels: {w: %[3]s}}
  template:
    metadata: {labels: {w: %[3]s}}
    spec:
      terminationGracePeriodSeconds: 2
      containers: [{name: app, image: %[4]q, command: [sh, -c, %[5]s]}]
---
`, w.kind, ns, w.name, image, loop, w.strategy)
	}
	return out
}

func target(kind, name string) string {
	if kind == "Pod" {
		return "{podName: " + name + "}"
	}
	return fmt.Sprintf("{workloadRef: {kind: %s, name: %s}}", kind, name)
}

// assertDenied fails unless the rollout has failed for what the policy says.
func assertDenied(t testing.TB, ns, name, reason, text string) {
	t.Helper()
	r := ended(t, ns, name)
	if len(r.Status.Failures) == 0 || r.Status.Failures[0].Reason != reason ||
		!strings.Contains(r.Status.Failures[0].Message, text) {
		t.Errorf("rollout %s: %+v", name, r.Status)
	}
	eventuallySaying(t, "an event says why", func() string { return events(t, ns, name) }, func() bool {
		return strings.Contains(events(t, ns, name), text)
	})
}

// TestPolicyDenies has a ValidatingAdmissionPolicy on pods. An image that it denies has never run,
// not with either order and not behind a gate, and nothing of the pods has changed.
func TestPolicyDenies(t *testing.T) {
	t.Parallel()
	ns := namespace(t)
	dir := scratchDir(t)
	one, two := bed.Image("busybox:1.0"), bed.Image("busybox:2.0")
	create(t, traced(ns, "stop", dir, one, "0", "", "")+traced(ns, "start", dir, one, "0", "", "")+
		traced(ns, "gated", dir, one, "0", "", gate)+workloads(ns, one))
	before := allMade(t, ns, 7)
	deny(t, ns, "", "pods", "object.spec", two, "pod/stop")
	apply(t, rollout(ns, "stop", target("Pod", "stop"), two, "")+
		rollout(ns, "start", target("Pod", "start"), two, "order: StartFirst, minReadySeconds: 1")+
		rollout(ns, "gated", target("Pod", "gated"), two, "onFailure: Pause")+
		rollout(ns, "deploy", target("Deployment", "deploy"), two, "")+
		rollout(ns, "sts", target("StatefulSet", "sts"), two, ""))
	for _, name := range []string{"stop", "start", "deploy", "sts"} {
		assertDenied(t, ns, name, inplace.ReasonDenied, "the image is not signed")
	}
	eventually(t, "the gated pod's rollout has stopped",
		func() bool { return len(getRollout(t, ns, "gated").Status.Failures) > 0 })
	assertUntouched(t, ns, before)
	for _, name := range []string{"stop", "start", "gated"} {
		if ops := operations(t, ns, name); len(ops) > 0 {
			t.Errorf("the node was asked about pod %s: %v", name, ops)
		}
		if got := whats(traceOf(t, dir, name)); !slices.Equal(got, []string{"began 1.0"}) {
			t.Errorf("pod %s says %q", name, got)
		}
	}
	assertResumed(t, ns, "deploy", one)
}

// TestPolicyDeniesLate has a policy that comes when the new image is ready on the node and the pod
// is out of service: the pod is back with what it had.
func TestPolicyDeniesLate(t *testing.T) {
	t.Parallel()
	ns := namespace(t)
	dir := scratchDir(t)
	one, two := bed.Image("busybox:1.0"), bed.Image("busybox:2.0")
	create(t, traced(ns, "late", dir, one, "0", "", gate))
	before := allReady(t, ns)
	apply(t, rollout(ns, "late", target("Pod", "late"), two, "drainSeconds: 20"))
	eventually(t, "the pod is out of service", func() bool { return !isReady(getPod(t, ns, "late")) })
	deny(t, ns, "", "pods", "object.spec", two, "pod/late")
	assertDenied(t, ns, "late", inplace.ReasonDenied, "the image is not signed")
	assertUntouched(t, ns, before)
	if got := whats(traceOf(t, dir, "late")); !slices.Equal(got, []string{"began 1.0"}) {
		t.Errorf("the pod says %q", got)
	}
	if p := getPod(t, ns, "late"); p.Spec.Containers[0].Image != one {
		t.Errorf("the pod is to run %s", p.Spec.Containers[0].Image)
	}
}

// assertUntouched fails unless the pods are ready and have the containers that they had.
func assertUntouched(t testing.TB, ns string, before map[string]*corev1.Pod) {
	t.Helper()
	for name, p := range allReady(t, ns) {
		was := before[name]
		if was == nil {
			t.Errorf("pod %s is new", name)
			continue
		}
		if container(t, p, "app").ContainerID != container(t, was, "app").ContainerID {
			t.Errorf("pod %s has another container: %s", name, states(p))
		}
	}
}

// allMade waits until there are n pods in the namespace and all are ready: a StatefulSet makes one
// after the other.
func allMade(t testing.TB, ns string, n int) map[string]*corev1.Pod {
	t.Helper()
	eventually(t, fmt.Sprintf("%d pods are there", n), func() bool {
		list := &corev1.PodList{}
		must(t, api.List(t.Context(), list, client.InNamespace(ns)))
		return len(list.Items) == n
	})
	return allReady(t, ns)
}

// assertResumed fails unless the Deployment goes on with the image, and kubectl says so.
func assertResumed(t testing.TB, ns, name, image string) {
	t.Helper()
	kubectl(t, "-n", ns, "rollout", "status", "deployment/"+name, "--timeout=60s")
	d := &appsv1.Deployment{}
	must(t, api.Get(t.Context(), client.ObjectKey{Namespace: ns, Name: name}, d))
	if d.Spec.Paused || d.Annotations[inplace.PausedByAnnotation] != "" ||
		d.Spec.Template.Spec.Containers[0].Image != image {
		t.Errorf("Deployment %s: paused %v, annotations %v, image %s", name, d.Spec.Paused, d.Annotations,
			d.Spec.Template.Spec.Containers[0].Image)
	}
}

// TestPolicyDeniesTemplates has such policies on Deployments, on ReplicaSets and on StatefulSets.
func TestPolicyDeniesTemplates(t *testing.T) {
	t.Parallel()
	one, two := bed.Image("busybox:1.0"), bed.Image("busybox:2.0")
	for _, tt := range []struct{ resource, kind, name string }{
		{"deployments", "Deployment", "deploy"},
		{"replicasets", "Deployment", "deploy"},
		{"statefulsets", "StatefulSet", "sts"},
	} {
		t.Run(tt.resource, func(t *testing.T) {
			ns := namespace(t)
			create(t, workloads(ns, one))
			before := allMade(t, ns, 4)
			probe := strings.ToLower(tt.kind) + "/" + tt.name
			if tt.resource == "replicasets" {
				probe = kubectl(t, "-n", ns, "get", "replicasets", "-l", "w=deploy", "-o", "name")
			}
			deny(t, ns, "apps", tt.resource, "object.spec.template.spec", two, probe)
			apply(t, rollout(ns, tt.name, target(tt.kind, tt.name), two, ""))
			assertDenied(t, ns, tt.name, inplace.ReasonDenied, "the image is not signed")
			assertUntouched(t, ns, before)
			assertResumed(t, ns, "deploy", one)
		})
	}
}

// writes counts the changes of objects of a namespace, whoever makes them, until stop is called.
func writes(t testing.TB, ns string) (stop func() map[string]int) {
	t.Helper()
	config, err := clientcmd.BuildConfigFromFlags("", bed.Kubeconfig)
	must(t, err)
	watcher, err := client.NewWithWatch(config, client.Options{Scheme: api.Scheme()})
	must(t, err)
	counts := map[string]int{}
	var mu sync.Mutex
	var watches []watch.Interface
	var wg sync.WaitGroup
	for _, list := range []client.ObjectList{
		&corev1.PodList{}, &appsv1.DeploymentList{}, &appsv1.ReplicaSetList{}, &appsv1.StatefulSetList{},
		&inplace.InPlaceRolloutList{},
	} {
		w, err := watcher.Watch(context.WithoutCancel(t.Context()), list, client.InNamespace(ns))
		must(t, err)
		watches = append(watches, w)
		wg.Go(func() {
			for e := range w.ResultChan() {
				if o, ok := e.Object.(client.Object); ok && e.Type == watch.Modified {
					mu.Lock()
					counts[fmt.Sprintf("%T %s", o, o.GetName())]++
					mu.Unlock()
				}
			}
		})
	}
	return func() map[string]int {
		for _, w := range watches {
			w.Stop()
		}
		wg.Wait()
		return counts
	}
}

// TestPolicyRewrites has a MutatingAdmissionPolicy that pins a tag's digest, on pods and on
// templates or on pods alone. The rollout prepares and knows what the policy makes of the image.
func TestPolicyRewrites(t *testing.T) {
	t.Parallel()
	one, two := bed.Image("busybox:1.0"), bed.Image("busybox:2.0")
	pinned := two + "@" + crane(t, "digest", two)
	for _, everywhere := range []bool{false, true} {
		t.Run(fmt.Sprintf("templates-%v", everywhere), func(t *testing.T) {
			ns := namespace(t)
			create(t, pod(ns, "p", one)+workloads(ns, one))
			before := allMade(t, ns, 5)
			pin(t, ns, "", "pods", "spec", two, pinned, "pod/p")
			if everywhere {
				pin(t, ns, "apps", "deployments", "spec/template/spec", two, pinned, "deployment/deploy")
				pin(t, ns, "apps", "statefulsets", "spec/template/spec", two, pinned, "statefulset/sts")
			}
			apply(t, rollout(ns, "p", target("Pod", "p"), two, "")+
				rollout(ns, "deploy", target("Deployment", "deploy"), two, "")+
				rollout(ns, "sts", target("StatefulSet", "sts"), two, ""))
			for _, name := range []string{"p", "deploy", "sts"} {
				if f := complete(ended(t, ns, name)); f != "" {
					t.Error(f)
				}
			}
			template := two
			if everywhere {
				template = pinned
			}
			assertResumed(t, ns, "deploy", template)
			eventually(t, "the StatefulSet is of one revision", func() bool {
				s := &appsv1.StatefulSet{}
				must(t, api.Get(t.Context(), client.ObjectKey{Namespace: ns, Name: "sts"}, s))
				return s.Status.ObservedGeneration == s.Generation && s.Status.UpdatedReplicas == 2
			})
			for name, p := range allReady(t, ns) {
				switch was := before[name]; {
				case was == nil || was.UID != p.UID:
					t.Errorf("pod %s is another one", name)
				case p.Spec.Containers[0].Image != pinned || container(t, p, "app").RestartCount != 1 ||
					p.Generation != was.Generation+1:
					t.Errorf("pod %s: image %s, generation %d, then %d; %s", name, p.Spec.Containers[0].Image,
						was.Generation,
						p.Generation, states(p))
				}
			}
			stop := writes(t, ns)
			time.Sleep(15 * time.Second)
			if counts := stop(); len(counts) > 0 {
				t.Errorf("it is not at rest: %v", counts)
			}
		})
	}
}

func pod(ns, name, image string) string {
	return fmt.Sprintf(`
apiVersion: v1
kind: Pod
metadata: {name: %s, namespace: %s}
spec:
  terminationGracePeriodSeconds: 2
  containers: [{name: app, image: %q, command: [sh, -c, %s]}]
---
`, name, ns, image, loop)
}

// pin makes a policy that turns an image of a resource into another one.
func pin(t testing.TB, ns, group, resource, spec, image, become, probe string) {
	t.Helper()
	name := ns + "-" + resource
	apply(t, fmt.Sprintf(`
apiVersion: admissionregistration.k8s.io/v1
kind: MutatingAdmissionPolicy
metadata: {name: %[1]s}
spec:
  failurePolicy: Fail
  reinvocationPolicy: Never
  matchConstraints:
    namespaceSelector: {matchLabels: {kubernetes.io/metadata.name: %[2]s}}
    resourceRules: [{apiGroups: ["%[3]s"], apiVersions: [v1], operations: [CREATE, UPDATE], resources: [%[4]s]}]
  matchConditions: [{name: tag, expression: "object.%[5]s.containers[0].image == '%[6]s'"}]
  mutations:
  - patchType: JSONPatch
    jsonPatch: {expression: "[JSONPatch{op: 'replace', path: '/%[7]s/containers/0/image', value: '%[8]s'}]"}
---
apiVersion: admissionregistration.k8s.io/v1
kind: MutatingAdmissionPolicyBinding
metadata: {name: %[1]s}
spec: {policyName: %[1]s}
`, name, ns, group, resource, strings.ReplaceAll(spec, "/", "."), image, spec, become))
	dropAfter(t, "mutatingadmissionpolicybinding", name)
	dropAfter(t, "mutatingadmissionpolicy", name)
	eventually(t, "the policy is in force", func() bool {
		return strings.Contains(kubectl(t, "-n", ns, "set", "image", probe, "app="+image, "--dry-run=server", "-o",
			"yaml"), become)
	})
}

// hook is a mutating webhook of one namespace that says what becomes of image, for the how many-th
// time it is asked.
type hook struct {
	server *httptest.Server
	asked  atomic.Int64
}

func newHook(t testing.TB, become func(asked int64, image string) string) *hook {
	t.Helper()
	h := &hook{}
	h.server = httptest.NewUnstartedServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		review := admissionv1.AdmissionReview{}
		if err := json.NewDecoder(r.Body).Decode(&review); err != nil {
			http.Error(w, err.Error(), http.StatusBadRequest)
			return
		}
		request := review.Request
		review.Request, review.Response = nil, &admissionv1.AdmissionResponse{UID: request.UID, Allowed: true}
		var o struct {
			Spec struct {
				corev1.PodSpec
				Template corev1.PodTemplateSpec `json:"template"`
			} `json:"spec"`
		}
		if err := json.Unmarshal(request.Object.Raw, &o); err != nil {
			http.Error(w, err.Error(), http.StatusBadRequest)
			return
		}
		containers, path := o.Spec.Containers, "/spec/containers"
		if request.Kind.Kind != "Pod" {
			containers, path = o.Spec.Template.Spec.Containers, "/spec/template/spec/containers"
		}
		if len(containers) > 0 {
			image := containers[0].Image
			if got := become(h.asked.Add(1), image); got != image {
				kind := admissionv1.PatchTypeJSONPatch
				review.Response.PatchType = &kind
				review.Response.Patch = fmt.Appendf(nil, `[{"op": "replace", "path": "%s/0/image", "value": %q}]`, path,
					got)
			}
		}
		_ = json.NewEncoder(w).Encode(review)
	}))
	return h
}

// serve starts the webhook at an address of this machine.
func (h *hook) serve(t testing.TB, address string) {
	t.Helper()
	l, err := net.Listen("tcp", address)
	must(t, err)
	must(t, h.server.Listener.Close())
	h.server.Listener = l
	h.server.StartTLS()
	t.Cleanup(h.server.Close)
}

// register tells the API server of a webhook at an address, for one kind of resource.
func register(t testing.TB, ns, group, resource, address string, ca []byte) {
	t.Helper()
	name := ns + "-" + resource
	apply(t, fmt.Sprintf(`
apiVersion: admissionregistration.k8s.io/v1
kind: MutatingWebhookConfiguration
metadata: {name: %[1]s}
webhooks:
- name: images.example.com
  admissionReviewVersions: [v1]
  sideEffects: None
  failurePolicy: Fail
  timeoutSeconds: 5
  clientConfig: {url: "https://%[2]s/", caBundle: %[3]s}
  namespaceSelector: {matchLabels: {kubernetes.io/metadata.name: %[4]s}}
  rules: [{apiGroups: ["%[5]s"], apiVersions: [v1], operations: [UPDATE], resources: [%[6]s]}]
`, name, address, base64.StdEncoding.EncodeToString(ca), ns, group, resource))
	dropAfter(t, "mutatingwebhookconfiguration", name)
}

// authority is the certificate that servers of httptest have.
func authority() []byte {
	s := httptest.NewTLSServer(http.NotFoundHandler())
	defer s.Close()
	return pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: s.Certificate().Raw})
}

// freeAddress is one of this machine at which nothing listens.
func freeAddress(t testing.TB) string {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	must(t, err)
	defer func() { must(t, l.Close()) }()
	return l.Addr().String()
}

// testWebhookRewritesAnew has a webhook that makes another image of the one that is asked for each
// time, in one namespace of pods' and in one of Deployments'. The rollouts fail with a text, no pod
// is touched, and nobody writes again and again.
func testWebhookRewritesAnew(t *testing.T) {
	one, two := bed.Image("busybox:1.0"), bed.Image("busybox:2.0")
	cases := []struct {
		group, resource, probe string
		names                  []string
		ns                     string
		before                 map[string]*corev1.Pod
	}{
		{group: "", resource: "pods", probe: "pod/p", names: []string{"p", "deploy"}},
		{group: "apps", resource: "deployments", probe: "deployment/deploy", names: []string{"deploy"}},
	}
	for i := range cases {
		tt := &cases[i]
		tt.ns = namespaceNamed(t, "anew-"+tt.resource)
		create(t, pod(tt.ns, "p", one)+workloads(tt.ns, one))
	}
	for i := range cases {
		tt := &cases[i]
		tt.before = allMade(t, tt.ns, 5)
		h := newHook(t, func(asked int64, image string) string {
			if image != two {
				return image
			}
			return fmt.Sprintf("%s-%d", two, asked)
		})
		address := freeAddress(t)
		h.serve(t, address)
		register(t, tt.ns, tt.group, tt.resource, address, authority())
		eventually(t, "the webhook is asked", func() bool {
			return strings.Contains(kubectl(t, "-n", tt.ns, "set", "image", tt.probe, "app="+two, "--dry-run=server",
				"-o", "yaml"), two+"-")
		})
		for _, name := range tt.names {
			apply(t, rollout(tt.ns, name, target(map[string]string{"p": "Pod", "deploy": "Deployment"}[name], name),
				two, ""))
		}
	}
	var counts []func() map[string]int
	for _, tt := range cases {
		for _, name := range tt.names {
			assertDenied(t, tt.ns, name, inplace.ReasonRewritten, two+"-")
		}
	}
	time.Sleep(time.Minute)
	for _, tt := range cases {
		counts = append(counts, writes(t, tt.ns))
	}
	time.Sleep(time.Minute)
	for i, tt := range cases {
		for o, n := range counts[i]() {
			if n > 6 {
				t.Errorf("%s was written %d times in a minute", o, n)
			}
		}
		assertUntouched(t, tt.ns, tt.before)
		assertResumed(t, tt.ns, "deploy", one)
	}
}

// TestWebhookAway has a webhook with failurePolicy Fail that does not answer: people are told, and
// when the webhook is back the rollouts go on. Until then the pods serve.
func TestWebhookAway(t *testing.T) {
	t.Parallel()
	ns := namespace(t)
	one, two := bed.Image("busybox:1.0"), bed.Image("busybox:2.0")
	create(t, strings.Replace(pod(ns, "p", one), "spec:", "spec:"+gate, 1)+workloads(ns, one))
	before := allMade(t, ns, 5)
	h := newHook(t, func(_ int64, image string) string { return image })
	address := freeAddress(t)
	for _, r := range []string{" pods", "apps deployments", "apps statefulsets"} {
		group, resource, _ := strings.Cut(r, " ")
		register(t, ns, group, resource, address, authority())
	}
	for _, probe := range []string{"pod/p", "deployment/deploy", "statefulset/sts"} {
		eventually(t, "the webhook is missed", func() bool {
			_, err := bed.Kubectl(t.Context(), "-n", ns, "set", "image", probe, "app="+two, "--dry-run=server")
			return err != nil
		})
	}
	apply(t, rollout(ns, "p", target("Pod", "p"), two, "")+
		rollout(ns, "deploy", target("Deployment", "deploy"), two, "")+
		rollout(ns, "sts", target("StatefulSet", "sts"), two, ""))
	for _, name := range []string{"p", "deploy", "sts"} {
		var r *inplace.InPlaceRollout
		eventuallySaying(t, "rollout "+name+" says what stops it", func() string {
			return fmt.Sprintf("%+v\n%s", r.Status, events(t, ns, name))
		}, func() bool {
			r = getRollout(t, ns, name)
			return strings.Contains(r.Status.Message, "images.example.com") &&
				strings.Contains(events(t, ns, name), "images.example.com")
		})
	}
	assertUntouched(t, ns, before)
	h.serve(t, address)
	for _, name := range []string{"p", "deploy", "sts"} {
		if f := complete(ended(t, ns, name)); f != "" {
			t.Error(f)
		}
	}
	assertResumed(t, ns, "deploy", two)
}
