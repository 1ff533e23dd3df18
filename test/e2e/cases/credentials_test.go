// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package cases

import (
	"context"
	"fmt"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	authorizationv1 "k8s.io/api/authorization/v1"
	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/client-go/rest"
	"k8s.io/client-go/tools/clientcmd"
	"sigs.k8s.io/controller-runtime/pkg/client"

	opsv1 "github.com/cri-proxy/cri-proxy/api/ops/v1"
	"github.com/cri-proxy/cri-proxy/test/testbed"
)

// otherNode makes a Node without a machine, on which nobody else puts anything.
func otherNode(t testing.TB, name string) *corev1.Node {
	t.Helper()
	n := &corev1.Node{ObjectMeta: metav1.ObjectMeta{Name: name}, Spec: corev1.NodeSpec{
		Taints: []corev1.Taint{{Key: "none-but-me", Effect: corev1.TaintEffectNoSchedule}},
	}}
	must(t, api.Create(t.Context(), n))
	t.Cleanup(func() { _, _ = bed.Kubectl(context.Background(), "delete", "node", name, "--wait=false") })
	return n
}

// as is a client for the credentials in a kubeconfig.
func as(t testing.TB, kubeconfig string, change ...func(*rest.Config)) client.Client {
	t.Helper()
	config, err := clientcmd.BuildConfigFromFlags("", kubeconfig)
	must(t, err)
	for _, c := range change {
		c(config)
	}
	c, err := client.New(config, client.Options{Scheme: api.Scheme()})
	must(t, err)
	return c
}

// pullJob waits until an ImagePullJob has completed and returns "REASON DESIRED".
func pullJob(t testing.TB, ns, name string) string {
	t.Helper()
	var out string
	eventuallySaying(t, "job "+name+" has completed", func() string { return out }, func() bool {
		out = kubectl(t, "-n", ns, "get", "imagepulljobs.apps.kruise.io", name, "-o",
			`jsonpath={.status.conditions[?(@.type=="Complete")].status} {.status.conditions[?(@.type=="Complete")].reason} {.status.desired}`)
		return strings.HasPrefix(out, "True ")
	})
	return strings.TrimSpace(strings.TrimPrefix(out, "True "))
}

// TestMirrorPodIsSentNothing: a node makes a mirror pod in a namespace whose pods it has never had,
// with kubelet's credentials and the labels that a job of that namespace selects. The job, which
// has pull secrets, leaves it alone.
func TestMirrorPodIsSentNothing(t *testing.T) {
	t.Parallel()
	ns := namespace(t)
	thief := otherNode(t, "thief-of-secrets")
	kubeconfig, err := bed.NewKubeconfig("thief", "system:node:"+thief.Name, "system:nodes")
	must(t, err)
	controls := true
	must(t, as(t, kubeconfig).Create(t.Context(), &corev1.Pod{
		ObjectMeta: metav1.ObjectMeta{
			Namespace: ns, Name: "mirror-" + thief.Name, Labels: map[string]string{"app": "web"},
			Annotations: map[string]string{corev1.MirrorPodAnnotationKey: "x", "kubernetes.io/config.hash": "x"},
			OwnerReferences: []metav1.OwnerReference{{APIVersion: "v1", Kind: "Node", Name: thief.Name, UID: thief.UID,
				Controller: &controls}},
		},
		Spec: corev1.PodSpec{NodeName: thief.Name, Containers: []corev1.Container{{Name: "app", Image: "any"}}},
	}))
	job := func(name string) string {
		return fmt.Sprintf(`
apiVersion: apps.kruise.io/v1beta1
kind: ImagePullJob
metadata: {namespace: %s, name: %s}
spec: {image: "%s", podSelector: {matchLabels: {app: web}}, pullSecrets: [keys], completionPolicy: {}}
---
`, ns, name, bed.Image("busybox:1.0"))
	}
	apply(t, job("mirror")+fmt.Sprintf(`
apiVersion: v1
kind: Secret
metadata: {name: keys, namespace: %s}
type: kubernetes.io/dockerconfigjson
stringData: {.dockerconfigjson: '{"auths":{"elsewhere.example":{"username":"u","password":"p"}}}'}
`, ns))
	if got := pullJob(t, ns, "mirror"); got != "NoMatchingNodes" && got != "NoMatchingNodes 0" {
		t.Errorf("the job with a mirror pod: %s", got)
	}
	// it was there all the time
	must(t, api.Get(t.Context(), client.ObjectKey{Namespace: ns, Name: "mirror-" + thief.Name}, &corev1.Pod{}))
	// A pod of a user's is another matter.
	apply(t, podWith(ns, "web", "Always", "0",
		"\n  containers: [{name: app, image: \""+bed.Image("busybox:1.0")+"\", command: [sleep, '1000']}]"))
	kubectl(t, "-n", ns, "label", "pod", "web", "app=web")
	ready(t, ns, "web")
	apply(t, job("both"))
	if got := pullJob(t, ns, "both"); got != "Succeeded 1" {
		t.Errorf("the job with a pod and a mirror pod: %s", got)
	}
}

// TestPrivateImageIsVerified: an image that an ImagePullJob has pulled with a secret does not run
// in a pod that could not pull it, before and after one that can has had it. kubelet's policy is
// its default.
func TestPrivateImageIsVerified(t *testing.T) {
	t.Parallel()
	ns := namespace(t)
	other := ns + "-other"
	must(t, bed.CreateNamespace(t.Context(), other))
	t.Cleanup(func() { leaving.add(other) })
	const host = "verified.cases"
	auth, err := bed.BasicAuth()
	must(t, err)
	addr, err := bed.StartRegistryAs(t.Context(), "registry-"+host, testbed.RegistryOptions{Auth: auth})
	must(t, err)
	t.Cleanup(func() { _ = bed.Process("registry-" + host).Signal(syscall.SIGKILL) })
	must(t, bed.MapRegistry(host, "http://"+addr))
	// An image that nobody has had before, by this name or another.
	crane(t, "mutate", bed.Image("busybox:1.0"), "--label", "for="+t.Name(), "--tag", bed.Image("verified:1"))
	image := host + "/verified:1"
	job := func(name, image string) string {
		return fmt.Sprintf(`
apiVersion: apps.kruise.io/v1beta1
kind: ImagePullJob
metadata: {namespace: %s, name: %s}
spec: {image: "%s", pullSecrets: [key], selector: {names: [%s]}, completionPolicy: {}}
---
`, ns, name, image, bed.NodeName)
	}
	apply(t, fmt.Sprintf(`
apiVersion: v1
kind: Secret
metadata: {name: key, namespace: %[1]s}
type: kubernetes.io/dockerconfigjson
stringData: {.dockerconfigjson: '{"auths":{"%[2]s":{"username":"%[3]s","password":"%[4]s"},"elsewhere.example":{"username":"u","password":"p"}}}'}
---
`, ns, host, testbed.RegistryUser, testbed.RegistryPassword)+job("job", image))
	if got := pullJob(t, ns, "job"); got != "Succeeded 1" {
		t.Fatal(got)
	}
	pod := func(ns, name, secrets string) string {
		return podWith(ns, name, "Always", "0",
			fmt.Sprintf("\n  imagePullSecrets: [%s]\n  containers: [{name: app, image: %q, imagePullPolicy: "+
				"IfNotPresent, command: [sleep, '1000']}]", secrets, image))
	}
	refused := func(name string) {
		t.Helper()
		var p *corev1.Pod
		eventuallySaying(t, name+" is refused its image",
			func() string { return states(p) + "\n" + events(t, other, name) }, func() bool {
				p = getPod(t, other, name)
				s := statusOf(p, "app")
				if s != nil && s.State.Running != nil {
					t.Fatalf("%s runs an image that it cannot pull\n%s", name, events(t, other, name))
				}
				return s != nil && s.State.Waiting != nil && (s.State.Waiting.Reason == "ErrImagePull" ||
					s.State.Waiting.Reason == "ImagePullBackOff")
			})
	}
	apply(t, pod(other, "before", ""))
	refused("before")
	apply(t, pod(ns, "first", "{name: key}"))
	ready(t, ns, "first")
	if told := events(t, ns, "first"); !strings.Contains(told, "Successfully pulled image") {
		t.Errorf("kubelet has not asked the registry\n%s", told)
	}
	apply(t, pod(other, "after", "")+pod(ns, "second", "{name: key}"))
	ready(t, ns, "second")
	if told := events(t, ns, "second"); !strings.Contains(told,
		"already present on machine and can be accessed by the pod") {
		t.Errorf("kubelet's record is not that of a pull of its own\n%s", told)
	}
	refused("after")
	refused("before")
	// An upgrade in place prepares the image with the pod's secrets; kubelet pulls it for itself
	// when it comes to the container, which runs by then.
	crane(t, "mutate", bed.Image("busybox:2.0"), "--label", "for="+t.Name(), "--tag", bed.Image("verified:2"))
	next := host + "/verified:2"
	apply(t, rollout(ns, "private", "{podName: first}", next, "progressDeadlineSeconds: 60"))
	if f := complete(ended(t, ns, "private")); f != "" {
		t.Error(f)
	}
	if s := container(t, ready(t, ns, "first"), "app"); s.RestartCount != 1 || s.Image != next {
		t.Errorf("after the upgrade: %+v", s)
	}
	if op := lastOperation(t, ns, "first"); op.GetPhase() != opsv1.Phase_PHASE_SUCCEEDED || op.GetGap() == nil {
		t.Errorf("the upgrade: %v", op)
	}
	assertOneLive(t, ns, "first", "app")
	if told := events(t, ns, "first"); strings.Count(told, "Successfully pulled image") != 2 {
		t.Errorf("kubelet has not asked the registry for the new image\n%s", told)
	}
	image = next
	apply(t, pod(other, "upgraded", ""))
	refused("upgraded")
	// It was pre-pulled, and the registry is away when kubelet wants to ask: what has
	// been upgraded serves on.
	crane(t, "mutate", bed.Image("busybox:1.0"), "--label", "last="+t.Name(), "--tag", bed.Image("verified:3"))
	next = host + "/verified:3"
	apply(t, job("ahead", next))
	if got := pullJob(t, ns, "ahead"); got != "Succeeded 1" {
		t.Fatal(got)
	}
	must(t, bed.Process("registry-"+host).Signal(syscall.SIGKILL))
	before := container(t, getPod(t, ns, "first"), "app")
	apply(t, rollout(ns, "away", "{podName: first}", next, "progressDeadlineSeconds: 60"))
	if f := complete(ended(t, ns, "away")); f != "" {
		t.Error(f)
	}
	if s := container(t, ready(t, ns, "first"), "app"); s.RestartCount != before.RestartCount+1 || s.Image != next {
		t.Errorf("after the upgrade without the registry: %+v", s)
	}
	assertOneLive(t, ns, "first", "app")
	t.Log(events(t, ns, "first"))
}

// TestPinsAreBounded: a job that asks for a month gets what the controller allows, on the node, and
// says so.
func TestPinsAreBounded(t *testing.T) {
	t.Parallel()
	ns := namespace(t)
	apply(t, fmt.Sprintf(`
apiVersion: apps.kruise.io/v1beta1
kind: ImagePullJob
metadata: {namespace: %s, name: month, annotations: {cri-proxy.io/pin-for: 744h}}
spec: {image: "%s", selector: {names: [%s]}, completionPolicy: {}}
`, ns, bed.Image("busybox:1.0"), bed.NodeName))
	if got := pullJob(t, ns, "month"); got != "Succeeded 1" {
		t.Fatal(got)
	}
	if got := kubectl(t, "-n", ns, "get", "imagepulljobs.apps.kruise.io", "month", "-o",
		`jsonpath={.status.conditions[?(@.type=="Pinned")].status} {.status.conditions[?(@.type=="Pinned")].message}`); !strings.HasPrefix(got, "False pinned for 168h0m0s and not for 744h0m0s") {
		t.Errorf("condition Pinned: %s", got)
	}
	conn, err := grpc.NewClient("unix://"+bed.AdminSocket, grpc.WithTransportCredentials(insecure.NewCredentials()))
	must(t, err)
	defer func() { _ = conn.Close() }()
	list, err := opsv1.NewImagesClient(conn).ListPins(t.Context(), &opsv1.ListPinsRequest{})
	must(t, err)
	pins := 0
	for _, p := range list.GetPins() {
		if strings.HasPrefix(p.GetOwner(), "ImagePullJob/"+ns+"/month/") {
			if pins++; time.Until(p.GetExpireTime().AsTime()) > 168*time.Hour {
				t.Errorf("pinned until %s", p.GetExpireTime().AsTime())
			}
		}
	}
	if pins != 1 {
		t.Errorf("%d pins of the job: %v", pins, list.GetPins())
	}
}

// TestInstallerToken: the token of the installer's pod changes one label and one annotation of its
// own node, and nothing else.
func TestInstallerToken(t *testing.T) {
	t.Parallel()
	root, err := testbed.SourceDir("")
	must(t, err)
	const ns, account = "cri-proxy-installer", "cri-proxy-installer"
	must(t, bed.CreateNamespace(t.Context(), ns))
	t.Cleanup(func() { leaving.add(ns) })
	for _, f := range []string{"namespace.yaml", "rbac.yaml", "policy.yaml"} {
		kubectl(t, "apply", "-f", filepath.Join(root, "deploy/installer", f))
	}
	t.Cleanup(func() {
		_, _ = bed.Kubectl(context.Background(), "delete", "--ignore-not-found", "-f",
			filepath.Join(root, "deploy/installer/policy.yaml"))
	})
	apply(t, podWith(ns, "installer", "Always", "0",
		fmt.Sprintf("\n  serviceAccountName: %s\n  nodeName: %s\n  containers: [{name: app, image: %q, command: "+
			"[sleep, '1000']}]",
			account, bed.NodeName, bed.Image("busybox:1.0"))))
	ready(t, ns, "installer")
	other := otherNode(t, "not-the-installers")
	token := func(bound ...string) client.Client {
		t.Helper()
		out := kubectl(t, append([]string{"-n", ns, "create", "token", account}, bound...)...)
		return as(t, bed.Kubeconfig, func(c *rest.Config) {
			c.BearerToken, c.CertFile, c.KeyFile, c.CertData, c.KeyData = out, "", "", nil, nil
		})
	}
	pods, free := token("--bound-object-kind=Pod", "--bound-object-name=installer"), token()
	patch := func(c client.Client, node, body string, o ...client.PatchOption) error {
		return c.Patch(t.Context(), &corev1.Node{ObjectMeta: metav1.ObjectMeta{Name: node}},
			client.RawPatch(types.StrategicMergePatchType, []byte(body)), o...)
	}
	const good = `{"metadata":{"labels":{"cri-proxy.io/installed":"true"},"annotations":{"cri-proxy.io/installed-version":"v1"}}}`
	eventually(t, "the policy is in force",
		func() bool { return apierrors.IsForbidden(patch(pods, other.Name, good, client.DryRunAll)) })
	for _, tt := range []struct {
		name, node, body, say string
		by                    client.Client
	}{
		{"another node", other.Name, good, "the node that its pod runs on (" + bed.NodeName + "), and no other", pods},
		{"a token of no pod", bed.NodeName, good, "the node that its pod runs on (none)", free},
		{"another label", bed.NodeName, `{"metadata":{"labels":{"pool":"gold"}}}`, "may set no label but", pods},
		{"another value", bed.NodeName, `{"metadata":{"labels":{"cri-proxy.io/installed":"gold"}}}`,
			"may set no label but", pods},
		{"a label taken away", bed.NodeName, `{"metadata":{"labels":{"kubernetes.io/hostname":null}}}`,
			"may set no label but", pods},
		{"another annotation", bed.NodeName, `{"metadata":{"annotations":{"cri-proxy.io/ops-address":"192.0.2.1:1"}}}`,
			"may set no annotation but", pods},
		{"a taint", bed.NodeName, `{"spec":{"taints":[{"key":"k","effect":"NoExecute"}]}}`,
			"nothing of a node but", pods},
		{"cordon", bed.NodeName, `{"spec":{"unschedulable":true}}`, "nothing of a node but", pods},
		{"a finalizer", bed.NodeName, `{"metadata":{"finalizers":["cri-proxy.io/x"]}}`, "nothing of a node but", pods},
	} {
		if err := patch(tt.by, tt.node, tt.body); !apierrors.IsForbidden(err) ||
			!strings.Contains(err.Error(), tt.say) {
			t.Errorf("%s: %v", tt.name, err)
		}
	}
	must(t, patch(pods, bed.NodeName, good))
	// And what uninstall does.
	must(t, patch(pods, bed.NodeName,
		`{"metadata":{"labels":{"cri-proxy.io/installed":null},"annotations":{"cri-proxy.io/installed-version":null}}}`))
}

// TestUserRoles: who has Kubernetes' own role edit or view in a namespace has it for the custom
// resources, and in that namespace only.
func TestUserRoles(t *testing.T) {
	t.Parallel()
	ns := namespace(t)
	for _, role := range []string{"edit", "view"} {
		kubectl(t, "-n", ns, "create", "rolebinding", role, "--clusterrole="+role, "--user=may-"+role)
	}
	can := func(user, namespace, verb, what string) bool {
		t.Helper()
		resource, group, _ := strings.Cut(what, ".")
		resource, subresource, _ := strings.Cut(resource, "/")
		review := &authorizationv1.SubjectAccessReview{Spec: authorizationv1.SubjectAccessReviewSpec{
			User: "may-" + user, ResourceAttributes: &authorizationv1.ResourceAttributes{
				Namespace: namespace, Verb: verb, Group: group, Resource: resource, Subresource: subresource,
			},
		}}
		must(t, api.Create(t.Context(), review))
		return review.Status.Allowed
	}
	for _, resource := range []string{"containerrecreaterequests.apps.kruise.io", "imagepulljobs.apps.kruise.io",
		"imagelistpulljobs.apps.kruise.io", "inplacerollouts.cri-proxy.io"} {
		for _, verb := range []string{"create", "delete", "patch", "list"} {
			eventually(t, "edit has "+verb+" "+resource, func() bool { return can("edit", ns, verb, resource) })
			if got := can("view", ns, verb, resource); got != (verb == "list") {
				t.Errorf("view: %s %s is %v", verb, resource, got)
			}
		}
		if can("edit", "default", "create", resource) ||
			can("edit", ns, "patch", strings.Replace(resource, ".", "/status.", 1)) {
			t.Errorf("edit may too much: %s", resource)
		}
	}
}
