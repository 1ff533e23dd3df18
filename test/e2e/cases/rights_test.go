// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package cases

import (
	"fmt"
	"path/filepath"
	"strings"
	"testing"

	apierrors "k8s.io/apimachinery/pkg/api/errors"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	"k8s.io/client-go/rest"
	"k8s.io/client-go/tools/clientcmd"
	"sigs.k8s.io/controller-runtime/pkg/client"
	"sigs.k8s.io/yaml"

	"github.com/cri-proxy/cri-proxy/test/testbed"
)

// asUser is a client of the API server for a user of the cluster, who may be in groups.
func asUser(t testing.TB, name string, groups ...string) client.Client {
	t.Helper()
	config, err := clientcmd.BuildConfigFromFlags("", bed.Kubeconfig)
	must(t, err)
	config.Impersonate = rest.ImpersonationConfig{UserName: name, Groups: append(groups, "system:authenticated")}
	c, err := client.New(config, client.Options{Scheme: api.Scheme()})
	must(t, err)
	return c
}

func objectOf(t testing.TB, text string) *unstructured.Unstructured {
	t.Helper()
	o := &unstructured.Unstructured{}
	must(t, yaml.Unmarshal([]byte(strings.TrimSuffix(strings.TrimSpace(text), "---")), &o.Object))
	return o
}

// TestRights: a user gets through the controller what he could do himself, and nothing else. The
// API server sees to that without our webhooks, which this cluster has not.
func TestRights(t *testing.T) {
	t.Parallel()
	ns := namespace(t)
	root, err := testbed.SourceDir("")
	must(t, err)
	kubectl(t, "apply", "-f", filepath.Join(root, "deploy", "rights", "policies.yaml"))

	// Every user may write the objects of all four kinds. bob has the role edit besides, pat one
	// pod to patch, rob one to restart and ann a secret and pods to look at.
	apply(t, fmt.Sprintf(`
apiVersion: rbac.authorization.k8s.io/v1
kind: Role
metadata: {namespace: %[1]s, name: kinds}
rules:
- apiGroups: [apps.kruise.io]
  resources: [containerrecreaterequests, imagepulljobs, imagelistpulljobs]
  verbs: [create, get, update, patch]
- {apiGroups: [cri-proxy.io], resources: [inplacerollouts, inplacerollouts/status], verbs: [create, get, update, patch]}
---
apiVersion: rbac.authorization.k8s.io/v1
kind: RoleBinding
metadata: {namespace: %[1]s, name: kinds}
roleRef: {apiGroup: rbac.authorization.k8s.io, kind: Role, name: kinds}
subjects:
- {apiGroup: rbac.authorization.k8s.io, kind: User, name: eve}
- {apiGroup: rbac.authorization.k8s.io, kind: User, name: bob}
- {apiGroup: rbac.authorization.k8s.io, kind: User, name: pat}
- {apiGroup: rbac.authorization.k8s.io, kind: User, name: rob}
- {apiGroup: rbac.authorization.k8s.io, kind: User, name: ann}
---
apiVersion: rbac.authorization.k8s.io/v1
kind: RoleBinding
metadata: {namespace: %[1]s, name: bob}
roleRef: {apiGroup: rbac.authorization.k8s.io, kind: ClusterRole, name: edit}
subjects: [{apiGroup: rbac.authorization.k8s.io, kind: User, name: bob}]
---
`, ns))
	for user, rules := range map[string]string{
		"pat": `{apiGroups: [""], resources: [pods], resourceNames: [web], verbs: [patch]}`,
		"rob": `{apiGroups: [""], resources: [pods], resourceNames: [web], verbs: [restart]}`,
		"ann": `{apiGroups: [""], resources: [secrets], resourceNames: [one], verbs: [get]}, ` +
			`{apiGroups: [""], resources: [pods], verbs: [list]}`,
	} {
		apply(t, fmt.Sprintf(`
apiVersion: rbac.authorization.k8s.io/v1
kind: Role
metadata: {namespace: %[1]s, name: %[2]s}
rules: [%[3]s]
---
apiVersion: rbac.authorization.k8s.io/v1
kind: RoleBinding
metadata: {namespace: %[1]s, name: %[2]s}
roleRef: {apiGroup: rbac.authorization.k8s.io, kind: Role, name: %[2]s}
subjects: [{apiGroup: rbac.authorization.k8s.io, kind: User, name: %[2]s}]
---
`, ns, user, rules))
	}
	one, two := bed.Image("busybox:1.0"), bed.Image("busybox:2.0")
	for _, name := range []string{"web", "other"} {
		apply(t, fmt.Sprintf(`
apiVersion: v1
kind: Pod
metadata: {name: %s, namespace: %s, labels: {app: web}}
spec:
  terminationGracePeriodSeconds: 1
  containers: [{name: app, image: %s, command: [sh, -c, %s]}]
---
`, name, ns, one, loop))
	}
	apply(t, fmt.Sprintf(`
apiVersion: apps/v1
kind: StatefulSet
metadata: {name: db, namespace: %[1]s, annotations: {cri-proxy.io/in-place: "true"}}
spec:
  replicas: 1
  serviceName: db
  updateStrategy: {type: OnDelete}
  selector: {matchLabels: {app: db}}
  template:
    metadata: {labels: {app: db}}
    spec:
      terminationGracePeriodSeconds: 1
      containers: [{name: app, image: %[2]s, command: [sh, -c, %[3]s]}]
---
`, ns, one, loop))

	job := func(name, rest string) string {
		return fmt.Sprintf(
			`{apiVersion: apps.kruise.io/v1beta1, kind: ImagePullJob, metadata: {namespace: %s, name: %s}, `+
				`spec: {image: %q, completionPolicy: {type: Always}%s}}`, ns, name, two, rest)
	}
	list := func(name, rest string) string {
		return fmt.Sprintf(
			`{apiVersion: apps.kruise.io/v1alpha1, kind: ImageListPullJob, metadata: {namespace: %s, name: %s}, `+
				`spec: {images: [%q], completionPolicy: {type: Always}%s}}`, ns, name, two, rest)
	}
	byPod := rollout(ns, "by-pod", "{podName: web}", two, "")
	byLabel := rollout(ns, "by-label", "{selector: {matchLabels: {app: web}}}", two, "")
	ofSet := rollout(ns, "of-set", "{workloadRef: {kind: StatefulSet, name: db}}", two, "")
	ofWeb := recreate(ns, "of-web", "web", "containers: [{name: app}]")
	ofOther := recreate(ns, "of-other", "other", "containers: [{name: app}]")
	private := job("private", ", pullSecrets: [one]")
	privates := list("privates", ", pullSecrets: [one]")
	byPods := strings.Replace(job("by-pods", ", podSelector: {matchLabels: {app: web}}"), "v1beta1", "v1alpha1", 1)
	public := job("public", "")
	ready(t, ns, "web")
	ready(t, ns, "other")

	// The API server takes up new policies, and new roles, a moment after they are there.
	eve := asUser(t, "eve")
	eventually(t, "the policies are in force", func() bool {
		for _, text := range []string{byPod, ofWeb, private, privates} {
			err := eve.Create(t.Context(), objectOf(t, text), client.DryRunAll)
			if !apierrors.IsForbidden(err) || !strings.Contains(err.Error(), "rights.cri-proxy.io") {
				return false
			}
		}
		return true
	})
	for _, tt := range []struct {
		user    string
		may     []string
		mayNot  []string
		because string
	}{
		{user: "eve", may: []string{public}, mayNot: []string{byPod},
			because: `grant the verb patch on pods "web" in namespace "` + ns + `"`},
		{user: "eve", mayNot: []string{byLabel}, because: "grant the verb patch on pods in namespace"},
		{user: "eve", mayNot: []string{ofSet}, because: `grant the verb patch on statefulsets.apps "db"`},
		{user: "eve", mayNot: []string{ofWeb},
			because: "grant one of the verbs patch, delete and restart on pods, or create on pods/exec"},
		{user: "eve", mayNot: []string{private, privates}, because: `grant the verb get on secrets "one"`},
		{user: "eve", mayNot: []string{byPods}, because: "grant the verb list on pods"},
		{user: "bob", may: []string{byPod, byLabel, ofSet, ofWeb, ofOther, private, privates, byPods, public}},
		{user: "pat", may: []string{byPod, ofWeb}, mayNot: []string{byLabel, ofSet, ofOther, private, byPods},
			because: "rights.cri-proxy.io"},
		{user: "rob", may: []string{ofWeb}, mayNot: []string{byPod, ofOther}, because: "rights.cri-proxy.io"},
		{user: "ann", may: []string{private, privates, byPods},
			mayNot: []string{byPod, ofWeb, job("two", ", pullSecrets: [one, two]")}, because: "rights.cri-proxy.io"},
	} {
		user := asUser(t, tt.user)
		for _, text := range tt.may {
			if err := user.Create(t.Context(), objectOf(t, text), client.DryRunAll); err != nil {
				t.Errorf("%s: %v", tt.user, err)
			}
		}
		for _, text := range tt.mayNot {
			err := user.Create(t.Context(), objectOf(t, text))
			if !apierrors.IsForbidden(err) || !strings.Contains(err.Error(), tt.because) {
				t.Errorf("%s: %v, want %s\n%s", tt.user, err, tt.because, text)
			}
		}
	}
	kubelet := asUser(t, "system:node:"+bed.NodeName, "system:nodes")
	for _, text := range []string{byPod, ofWeb, private, privates, public} {
		if err := kubelet.Create(t.Context(), objectOf(t, text)); !apierrors.IsForbidden(err) {
			t.Errorf("kubelet: %v\n%s", err, text)
		}
	}
	for _, name := range []string{"web", "other"} {
		if c := container(t, getPod(t, ns, name), "app"); c.RestartCount != 0 || c.Image != one {
			t.Errorf("pod %s has been changed by who may not: %+v", name, c)
		}
	}

	// What is allowed is carried out, and nobody else may change it on the way.
	must(t, asUser(t, "rob").Create(t.Context(), objectOf(t, ofWeb)))
	if why := outcome(completed(t, ns, "of-web")); why != "" {
		t.Error(why)
	}
	must(t, asUser(t, "pat").Create(t.Context(), objectOf(t, byPod)))
	if why := complete(ended(t, ns, "by-pod")); why != "" {
		t.Error(why)
	}
	if c := container(t, getPod(t, ns, "web"), "app"); c.RestartCount != 2 || c.Image != two {
		t.Errorf("pod web has not been changed by who may: %+v", c)
	}
	there := func() *unstructured.Unstructured {
		o := objectOf(t, byPod)
		must(t, api.Get(t.Context(), client.ObjectKeyFromObject(o), o))
		return o
	}
	for what, patch := range map[string]string{
		"another image": fmt.Sprintf(`{"spec": {"containers": [{"name": "app", "image": %q}]}}`,
			bed.Image("busybox:3.0")),
		"again":   `{"metadata": {"annotations": {"cri-proxy.io/retry": "again"}}}`,
		"a pause": `{"spec": {"paused": true}}`,
	} {
		if err := eve.Patch(t.Context(), there(),
			client.RawPatch("application/merge-patch+json", []byte(patch))); !apierrors.IsForbidden(err) {
			t.Errorf("eve, %s: %v", what, err)
		}
	}
	must(t, eve.Patch(t.Context(), there(),
		client.RawPatch("application/merge-patch+json", []byte(`{"metadata": {"labels": {"a": "b"}}}`))))
	// A rollback puts back what the status says was there before.
	back := fmt.Sprintf(`{"status": {"failedRevision": %q, "completionTime": null, "previousImages": {"app": %q}}}`,
		getRollout(t, ns, "by-pod").Status.ObservedRevision, bed.Image("busybox:3.0"))
	if err := eve.Status().
		Patch(t.Context(), there(),
			client.RawPatch("application/merge-patch+json", []byte(back))); !apierrors.IsForbidden(err) {
		t.Errorf("eve, a rollback to another image: %v", err)
	}

	// The controller's own objects pass: the rollout of an annotated workload, and the jobs of a
	// list.
	eventually(t, "the annotated StatefulSet has its rollout", func() bool {
		return api.Get(t.Context(), client.ObjectKey{Namespace: ns, Name: "statefulset-db"}, objectOf(t, ofSet)) == nil
	})
	must(t, asUser(t, "bob").
		Create(t.Context(), objectOf(t, list("both", ", pullSecrets: [one], podSelector: {matchLabels: {app: web}}"))))
	eventually(t, "the list has its job", func() bool {
		return strings.Contains(kubectl(t, "-n", ns, "get", "imagepulljobs", "-o", "name"), "/both-")
	})
}
