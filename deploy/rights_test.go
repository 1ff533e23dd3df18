// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package deploy

import (
	"context"
	"os"
	"strings"
	"testing"
	"time"

	admissionv1 "k8s.io/api/admissionregistration/v1"
	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/api/meta"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apiserver/pkg/admission"
	"k8s.io/apiserver/pkg/admission/plugin/policy/validating"
	"k8s.io/apiserver/pkg/authentication/user"
	"k8s.io/apiserver/pkg/authorization/authorizer"
	dynamicfake "k8s.io/client-go/dynamic/fake"
	"k8s.io/client-go/informers"
	"k8s.io/client-go/kubernetes/fake"
	"sigs.k8s.io/yaml"
)

// rights are what a user may do in namespace ns: "verb resource[/subresource][.group][ name]".
// Without a name it is all of them.
type rights []string

// Authorize implements authorizer.UnconditionalAuthorizer, as RBAC does.
func (r *rights) Authorize(_ context.Context, a authorizer.Attributes) (authorizer.Decision, string, error) {
	what := a.GetVerb() + " " + a.GetResource()
	if s := a.GetSubresource(); s != "" {
		what += "/" + s
	}
	if g := a.GetAPIGroup(); g != "" {
		what += "." + g
	}
	for _, may := range *r {
		if a.GetNamespace() == "ns" && (may == what || a.GetName() != "" && may == what+" "+a.GetName()) {
			return authorizer.DecisionAllow, "", nil
		}
	}
	return authorizer.DecisionNoOpinion, "", nil
}

// policies are the admission plugin of the API server with deploy/rights in it, for a user with the
// rights that may leads to.
func policies(t *testing.T, may *rights) *validating.Plugin {
	t.Helper()
	text, err := os.ReadFile("rights/policies.yaml")
	if err != nil {
		t.Fatal(err)
	}
	objects := []runtime.Object{&corev1.Namespace{ObjectMeta: metav1.ObjectMeta{Name: "ns"}}}
	for _, document := range strings.Split(string(text), "\n---\n") {
		var o runtime.Object = &admissionv1.ValidatingAdmissionPolicy{}
		if strings.Contains(document, "kind: ValidatingAdmissionPolicyBinding\n") {
			o = &admissionv1.ValidatingAdmissionPolicyBinding{}
		}
		if err := yaml.UnmarshalStrict([]byte(document), o); err != nil {
			t.Fatalf("%v in\n%s", err, document)
		}
		if p, ok := o.(*admissionv1.ValidatingAdmissionPolicy); ok {
			// The API server sets them.
			p.Spec.MatchConstraints.NamespaceSelector, p.Spec.MatchConstraints.ObjectSelector = &metav1.LabelSelector{},
				&metav1.LabelSelector{}
		}
		objects = append(objects, o)
	}
	set := fake.NewClientset(objects...)
	from := informers.NewSharedInformerFactory(set, 0)
	plugin, err := validating.NewPlugin(nil)
	if err != nil {
		t.Fatal(err)
	}
	stop := make(chan struct{})
	t.Cleanup(func() { close(stop) })
	plugin.SetExternalKubeInformerFactory(from)
	plugin.SetExternalKubeClientSet(set)
	plugin.SetRESTMapper(meta.NewDefaultRESTMapper(nil))
	plugin.SetDynamicClient(dynamicfake.NewSimpleDynamicClient(runtime.NewScheme()))
	plugin.SetDrainedNotification(stop)
	plugin.SetUnconditionalAuthorizer(may)
	if err := plugin.ValidateInitialization(); err != nil {
		t.Fatal(err)
	}
	from.Start(stop)
	from.WaitForCacheSync(stop)
	for deadline := time.Now().Add(time.Minute); !plugin.WaitForReady(); {
		if time.Now().After(deadline) {
			t.Fatal("the plugin is not ready")
		}
	}
	return plugin
}

// write asks the policies about an object, or its status; before is nil for a new one.
func write(
	t *testing.T, plugin *validating.Plugin, before, after *unstructured.Unstructured, subresource string,
) error {
	t.Helper()
	kind := after.GroupVersionKind()
	resource, _ := meta.UnsafeGuessKindToResource(kind)
	operation, old, options := admission.Create, runtime.Object(nil), runtime.Object(&metav1.CreateOptions{})
	if before != nil {
		operation, old, options = admission.Update, before, &metav1.UpdateOptions{}
	}
	return plugin.Validate(t.Context(), admission.NewAttributesRecord(after, old, kind, "ns", after.GetName(), resource,
		subresource, operation, options, false,
		&user.DefaultInfo{Name: "jane"}), admission.NewObjectInterfacesFromScheme(runtime.NewScheme()))
}

func manifest(t *testing.T, text string) *unstructured.Unstructured {
	t.Helper()
	o := &unstructured.Unstructured{}
	if err := yaml.Unmarshal([]byte(text), &o.Object); err != nil {
		t.Fatalf("%v in\n%s", err, text)
	}
	return o
}

// TestRightsOfUsers: who asks the controller for something must be allowed to do it himself.
func TestRightsOfUsers(t *testing.T) {
	rollout := func(target string) string {
		return "{apiVersion: cri-proxy.io/v1alpha1, kind: InPlaceRollout, metadata: {name: x, namespace: ns}, spec: " +
			"{target: {" + target +
			"}, containers: [{name: app, image: 'app:2'}], strategy: {}}}"
	}
	workload := func(kind string) string {
		return rollout("workloadRef: {apiVersion: apps/v1, kind: " + kind + ", name: web}")
	}
	const restart = "{apiVersion: apps.kruise.io/v1alpha1, kind: ContainerRecreateRequest, metadata: {name: x, " +
		"namespace: ns}, spec: {podName: web-0, containers: [{name: app}]}}"
	job := func(rest string) string {
		return "{apiVersion: apps.kruise.io/v1beta1, kind: ImagePullJob, metadata: {name: x, namespace: ns}, spec: " +
			"{image: a" + rest + "}}"
	}
	list := func(rest string) string {
		return "{apiVersion: apps.kruise.io/v1beta1, kind: ImageListPullJob, metadata: {name: x, namespace: ns}, " +
			"spec: {images: [a]" + rest + "}}"
	}
	with := func(text, metadata string) string { return strings.Replace(text, "name: x", "name: x, "+metadata, 1) }
	const nine = ", pullSecrets: [a, b, c, d, e, f, g, h, i]"
	const eight = ", pullSecrets: [a, b, c, d, e, f, g, h]"

	var may rights
	plugin := policies(t, &may)
	for _, tt := range []struct {
		name          string
		before, after string
		subresource   string
		may           rights
		// enough are further rights, of which each would do.
		enough []string
		wrong  string // in the refusal; empty means that it is let through
	}{
		{name: "a pod", after: rollout("podName: web-0"),
			may:    rights{"patch pods web-1", "update pods", "patch statefulsets.apps", "patch pods/status"},
			enough: []string{"patch pods", "patch pods web-0"},
			wrong:  `user "jane" may write InPlaceRollouts, but must be allowed to change what this one changes: grant the verb patch on pods "web-0" in namespace "ns"`},
		{name: "pods by their labels", after: rollout("selector: {matchLabels: {app: web}}"),
			may: rights{"patch pods web-0"}, enough: []string{"patch pods"},
			wrong: `grant the verb patch on pods in namespace "ns"`},
		{name: "a Deployment", after: workload("Deployment"),
			may: rights{"patch pods", "patch deployments.apps other", "patch deployments",
				"patch deployments/scale.apps"},
			enough: []string{"patch deployments.apps", "patch deployments.apps web"},
			wrong:  `grant the verb patch on deployments.apps "web" in namespace "ns"`},
		{name: "a StatefulSet", after: workload("StatefulSet"), may: rights{"patch pods"},
			enough: []string{"patch statefulsets.apps web"}, wrong: `grant the verb patch on statefulsets.apps "web"`},
		{name: "a DaemonSet", after: workload("DaemonSet"), may: rights{"patch pods"},
			enough: []string{"patch daemonsets.apps web"}, wrong: `grant the verb patch on daemonsets.apps "web"`},
		{name: "another image", before: workload("Deployment"),
			after:  strings.Replace(workload("Deployment"), "app:2", "app:3", 1),
			enough: []string{"patch deployments.apps"}, wrong: `on deployments.apps "web"`},
		{name: "going on", before: strings.Replace(workload("Deployment"), "spec: {", "spec: {paused: true, ", 1),
			after: workload("Deployment"), enough: []string{"patch deployments.apps"},
			wrong: `on deployments.apps "web"`},
		{name: "again", before: workload("Deployment"),
			after:  with(workload("Deployment"), "annotations: {cri-proxy.io/retry: '1'}"),
			enough: []string{"patch deployments.apps"}, wrong: `on deployments.apps "web"`},
		{name: "again, another time", before: with(workload("Deployment"), "annotations: {cri-proxy.io/retry: '1'}"),
			after:  with(workload("Deployment"), "annotations: {cri-proxy.io/retry: '2'}"),
			enough: []string{"patch deployments.apps"}, wrong: `on deployments.apps "web"`},
		{name: "labels and finalizers",
			before: with(workload("Deployment"), "finalizers: [cri-proxy.io/in-place-rollout]"),
			after:  with(workload("Deployment"), "labels: {a: b}")},
		{name: "the end of what is being deleted",
			before: with(workload("Deployment"),
				"deletionTimestamp: '2026-01-01T00:00:00Z', finalizers: [cri-proxy.io/in-place-rollout]"),
			after: with(workload("Deployment"), "deletionTimestamp: '2026-01-01T00:00:00Z'")},
		{name: "another image of what is being deleted",
			before: with(workload("Deployment"), "deletionTimestamp: '2026-01-01T00:00:00Z'"),
			after: strings.Replace(with(workload("Deployment"), "deletionTimestamp: '2026-01-01T00:00:00Z'"), "app:2",
				"app:3", 1), enough: []string{"patch deployments.apps"}, wrong: `on deployments.apps "web"`},
		// A rollback puts back what the status says.
		{name: "status", before: workload("Deployment"),
			after: strings.Replace(workload("Deployment"), "spec: {",
				"status: {previousImages: {app: 'app:3'}}, spec: {", 1), subresource: "status",
			enough: []string{"patch deployments.apps web"}, wrong: `on deployments.apps "web"`},
		{name: "status of an image job", before: job(", pullSecrets: [a]"), after: job(", pullSecrets: [a]"),
			subresource: "status"},

		{name: "a restart", after: restart,
			may: rights{"get pods", "list pods", "patch pods/status", "delete pods web-1", "restart pods web-1",
				"create pods/log", "create pods", "get pods/exec"},
			enough: []string{"patch pods", "delete pods web-0", "create pods/exec", "create pods/exec web-0",
				"restart pods", "restart pods web-0"},
			wrong: `user "jane" may write ContainerRecreateRequests, but must be allowed to restart containers of pod "web-0": grant one of the verbs patch, delete and restart on pods, or create on pods/exec, in namespace "ns"`},
		{name: "another order", before: restart,
			after:  with(restart, "annotations: {cri-proxy.io/restart-order: StartFirst}"),
			enough: []string{"restart pods"}, wrong: "must be allowed to restart"},
		{name: "a label of a request", before: restart, after: with(restart, "labels: {a: b}")},

		{name: "an image", after: job("")},
		{name: "an image for some nodes",
			after: job(", selector: {matchLabels: {a: b}}, podSelector: {matchLabels: {}}")},
		{name: "an image by pods", after: job(", podSelector: {matchLabels: {a: b}}"),
			may: rights{"get pods", "list pods web-0"}, enough: []string{"list pods"},
			wrong: `grant the verb list on pods in namespace "ns"`},
		{name: "an image by an expression",
			after:  job(", podSelector: {matchExpressions: [{key: a, operator: Exists}]}"),
			enough: []string{"list pods"}, wrong: `grant the verb list on pods in namespace "ns"`},
		{name: "a private image", after: job(", pullSecrets: [a, b, c]"),
			may:    rights{"get secrets a", "get secrets b", "list secrets", "create pods"},
			enough: []string{"get secrets", "get secrets c"},
			wrong:  `user "jane" may write imagepulljobs, but must be allowed to read the secrets with which this one pulls: grant the verb get on secrets "a", "b", "c" in namespace "ns"`},
		{name: "many secrets", after: job(eight + ", podSelector: {matchLabels: {a: b}}"),
			may: rights{"get secrets a", "get secrets b", "get secrets c", "get secrets d", "get secrets e",
				"get secrets f", "get secrets g", "list pods"},
			enough: []string{"get secrets h", "get secrets"},
			wrong:  `on secrets "a", "b", "c", "d", "e", "f", "g", "h" in`},
		{name: "too many secrets", after: job(nine),
			may: rights{"get secrets a", "get secrets b", "get secrets c", "get secrets d", "get secrets e",
				"get secrets f", "get secrets g", "get secrets h", "get secrets i"},
			enough: []string{"get secrets"},
			wrong:  "with more than 8 pullSecrets a job needs the verb get on all secrets of its namespace"},
		{name: "private images", after: list(", pullSecrets: [a]"), enough: []string{"get secrets a"},
			wrong: `user "jane" may write imagelistpulljobs, but must be allowed to read the secrets`},
		{name: "images by pods", after: list(", podSelector: {matchLabels: {a: b}}"), enough: []string{"list pods"},
			wrong: "grant the verb list on pods"},
		{name: "another image with the same secret", before: job(", pullSecrets: [a]"),
			after:  strings.Replace(job(", pullSecrets: [a]"), "image: a", "image: b", 1),
			enough: []string{"get secrets a"}, wrong: "grant the verb get"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			var before *unstructured.Unstructured
			if tt.before != "" {
				before = manifest(t, tt.before)
			}
			may = tt.may
			err := write(t, plugin, before, manifest(t, tt.after), tt.subresource)
			switch {
			case tt.wrong == "" && err != nil:
				t.Errorf("refused: %v", err)
			case tt.wrong != "" && (err == nil || !strings.Contains(err.Error(), tt.wrong)):
				t.Errorf("with %v: %v, want %s", tt.may, err, tt.wrong)
			}
			for _, more := range tt.enough {
				may = append(rights{more}, tt.may...)
				if err := write(t, plugin, before, manifest(t, tt.after), tt.subresource); err != nil {
					t.Errorf("refused with %s: %v", more, err)
				}
			}
		})
	}
}
