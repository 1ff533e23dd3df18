// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package cases

import (
	"encoding/json"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
	"time"

	"github.com/sirupsen/logrus"
	admissionregistrationv1 "k8s.io/api/admissionregistration/v1"
	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	"k8s.io/apimachinery/pkg/api/meta"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/runtime/schema"
	"k8s.io/apimachinery/pkg/runtime/serializer"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/apimachinery/pkg/watch"
	"k8s.io/client-go/rest"
	"k8s.io/client-go/tools/clientcmd"
	"sigs.k8s.io/controller-runtime/pkg/client"
	"sigs.k8s.io/yaml"

	"github.com/cri-proxy/cri-proxy/api/scheme"
	"github.com/cri-proxy/cri-proxy/controller/admission"
	"github.com/cri-proxy/cri-proxy/test/kruiseapi"
	"github.com/cri-proxy/cri-proxy/test/testbed"
)

// kruisePod has all that requests have a copy of, and can be taken out of service.
const kruisePod = `
apiVersion: v1
kind: Pod
metadata: {namespace: %[1]s, name: %[2]s}
spec:
  terminationGracePeriodSeconds: 4
  readinessGates: [{conditionType: KruisePodReady}]
  containers:
  - name: app
    image: %[3]q
    command: [sh, -c, %[4]s]
    ports: [{name: bye, containerPort: 8080}]
    lifecycle: {preStop: {httpGet: {path: /bye, port: bye, host: 127.0.0.1}}}
  - name: sidecar
    image: %[3]q
    command: [sh, -c, %[4]s]
    lifecycle: {preStop: {exec: {command: ["true"]}}}
---
`

// hookMux lets handlers be registered as in a webhook server.
type hookMux struct{ *http.ServeMux }

func (m hookMux) Register(path string, hook http.Handler) { m.Handle(path, hook) }

// serveWebhooks serves the controller's webhooks in this process and registers them as
// deploy/webhook does, for some namespaces.
func serveWebhooks(t *testing.T, name string, namespaces ...string) {
	t.Helper()
	scheme, err := scheme.New()
	must(t, err)
	config, err := clientcmd.BuildConfigFromFlags("", bed.Kubeconfig)
	must(t, err)
	from, err := client.New(config, client.Options{Scheme: scheme})
	must(t, err)
	log := logrus.New()
	log.SetOutput(io.Discard)
	mux := hookMux{http.NewServeMux()}
	admission.Register(mux, scheme, from, log)
	server := httptest.NewTLSServer(mux)
	t.Cleanup(server.Close)
	ca := pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: server.Certificate().Raw})

	root, err := testbed.SourceDir("")
	must(t, err)
	text, err := os.ReadFile(filepath.Join(root, "deploy", "webhook", "configurations.yaml"))
	must(t, err)
	here := &metav1.LabelSelector{MatchExpressions: []metav1.LabelSelectorRequirement{
		{Key: corev1.LabelMetadataName, Operator: metav1.LabelSelectorOpIn, Values: namespaces},
	}}
	to := func(c *admissionregistrationv1.WebhookClientConfig) {
		url := server.URL + *c.Service.Path
		*c = admissionregistrationv1.WebhookClientConfig{URL: &url, CABundle: ca}
	}
	documents := strings.Split(string(text), "\n---\n")
	var mutating admissionregistrationv1.MutatingWebhookConfiguration
	must(t, yaml.UnmarshalStrict([]byte(documents[0]), &mutating))
	for i := range mutating.Webhooks {
		to(&mutating.Webhooks[i].ClientConfig)
		mutating.Webhooks[i].NamespaceSelector = here
	}
	var validating admissionregistrationv1.ValidatingWebhookConfiguration
	must(t, yaml.UnmarshalStrict([]byte(documents[1]), &validating))
	for i := range validating.Webhooks {
		to(&validating.Webhooks[i].ClientConfig)
		validating.Webhooks[i].NamespaceSelector = here
	}
	mutating.Name, validating.Name = name, name
	for _, o := range []client.Object{&mutating, &validating} {
		must(t, api.Create(t.Context(), o))
	}
	dropAfter(t, "mutatingwebhookconfiguration", name)
	dropAfter(t, "validatingwebhookconfiguration", name)
	for _, ns := range namespaces {
		eventually(t, "the webhooks are asked", func() bool {
			err := applyIn(t, ns,
				strings.Replace(recreate(ns, "x", "x",
					"containers: [{name: x, statusContext: {containerID: x, restartCount: 1}}]"), "---", "", 1),
				"--dry-run=server")
			return err != nil && strings.Contains(err.Error(), "default.containerrecreaterequest.cri-proxy.io") &&
				applyIn(t, ns, recreate(ns, "x", "x", "containers: [{name: x}]"), "--dry-run=server") != nil
		})
	}
}

// applyIn is kubectl apply of one manifest that may name no namespace.
func applyIn(t testing.TB, ns, manifest string, more ...string) error {
	t.Helper()
	file := filepath.Join(scratchDir(t), "manifest.yaml")
	must(t, os.WriteFile(file, []byte(manifest), 0o600))
	_, err := bed.Kubectl(t.Context(), append([]string{"-n", ns, "apply", "-f", file}, more...)...)
	return err
}

// inService says that nothing keeps the pod out of service, as OpenKruise's controller for the gate
// does.
func inService(t testing.TB, ns, name string) *corev1.Pod {
	t.Helper()
	eventuallySaying(t, "the containers of pod "+name+" run", func() string { return states(getPod(t, ns, name)) },
		func() bool {
			p := getPod(t, ns, name)
			for _, s := range p.Status.ContainerStatuses {
				if s.State.Running == nil {
					return false
				}
			}
			return len(p.Status.ContainerStatuses) == len(p.Spec.Containers)
		})
	kubectl(t, "-n", ns, "patch", "pod", name, "--subresource=status", "-p",
		`{"status":{"conditions":[{"type":"KruisePodReady","status":"True"}]}}`)
	return ready(t, ns, name)
}

// TestKruiseClients uses the kinds with OpenKruise's Go types, in each version, on an API server
// with the webhooks.
func TestKruiseClients(t *testing.T) {
	t.Parallel()
	ns := namespace(t)
	config, err := clientcmd.BuildConfigFromFlags("", bed.Kubeconfig)
	must(t, err)
	config.QPS, config.Burst = 200, 400
	image := bed.Image("busybox:1.0")
	for _, name := range []string{"v1alpha1", "v1beta1"} {
		apply(t, fmt.Sprintf(kruisePod, ns, name, image, loop))
	}
	serveWebhooks(t, ns, ns)

	t.Run("requests v1alpha1", func(t *testing.T) {
		t.Parallel()
		crr := useRequests[kruiseapi.V1alpha1](t, config, ns, kruiseapi.GroupV1alpha1,
			func(s *kruiseapi.RequestStatusV1alpha1) *kruiseapi.RequestStatusV1alpha1 { return s })
		if crr.Annotations["crr.apps.kruise.io/unready-acquired"] == "" ||
			!strings.Contains(crr.Annotations["crr.apps.kruise.io/sync-container-statuses"],
				`"name":"sidecar","ready":true`) {
			t.Errorf("annotations %v", crr.Annotations)
		}
	})
	t.Run("requests v1beta1", func(t *testing.T) {
		t.Parallel()
		crr := useRequests[kruiseapi.V1beta1](t, config, ns, kruiseapi.GroupV1beta1,
			func(s *kruiseapi.RequestStatusV1beta1) *kruiseapi.RequestStatusV1alpha1 {
				return &s.RequestStatusV1alpha1
			})
		c := meta.FindStatusCondition(crr.Status.Conditions, "PreRecreateGrace")
		if c == nil || c.Status != metav1.ConditionTrue || c.LastTransitionTime.UTC().
			Format(time.RFC3339) != crr.Annotations["crr.apps.kruise.io/unready-acquired"] {
			t.Errorf("condition %+v; annotations %v", c, crr.Annotations)
		}
		p := getPod(t, ns, "v1beta1")
		if s := crr.Status.ContainerStatusSnapshot; len(s) != 2 || s[0].ContainerID != container(t, p, "app").
			ContainerID || !s[0].Ready || s[0].RestartCount != 1 {
			t.Errorf("snapshot %+v of %s", s, states(p))
		}
	})
	t.Run("image jobs", func(t *testing.T) {
		t.Parallel()
		template := kruiseapi.PullTemplate{
			PullSecrets: []string{"none"}, Selector: &kruiseapi.NodeSelector{Names: []string{"none"}},
			SandboxConfig:    &kruiseapi.SandboxConfig{Labels: map[string]string{"a": "b"}},
			ImagePullPolicy:  "IfNotPresent",
			CompletionPolicy: kruiseapi.CompletionPolicy{Type: "Always", TTLSecondsAfterFinished: new(int32(600))},
		}
		job := kruiseapi.JobSpec{Image: "nginx:1.9.1", PullTemplate: template}
		list := kruiseapi.ListJobSpec{Images: []string{"nginx:1.9.1", "busybox:1.29.2"}, PullTemplate: template}
		useJobs[kruiseapi.JobSpec, kruiseapi.JobStatus, kruiseapi.V1alpha1](t, config, ns, kruiseapi.GroupV1alpha1,
			"ImagePullJob", job)
		useJobs[kruiseapi.JobSpec, kruiseapi.JobStatus, kruiseapi.V1beta1](t, config, ns, kruiseapi.GroupV1beta1,
			"ImagePullJob", job)
		useJobs[kruiseapi.ListJobSpec, kruiseapi.ListJobStatus, kruiseapi.V1alpha1](t, config, ns,
			kruiseapi.GroupV1alpha1, "ImageListPullJob", list)
		useJobs[kruiseapi.ListJobSpec, kruiseapi.ListJobStatus, kruiseapi.V1beta1](t, config, ns,
			kruiseapi.GroupV1beta1, "ImageListPullJob", list)
	})
	t.Run("rights v1beta1", func(t *testing.T) {
		t.Parallel()
		root, err := testbed.SourceDir("")
		must(t, err)
		kubectl(t, "apply", "-f", filepath.Join(root, "deploy", "rights", "policies.yaml"))
		kubectl(t, "-n", ns, "create", "role", "requests", "--verb=create",
			"--resource=containerrecreaterequests.apps.kruise.io")
		kubectl(t, "-n", ns, "create", "rolebinding", "requests", "--role=requests", "--user=kim")
		o := objectOf(t, strings.Replace(recreate(ns, "kims", "v1beta1", "containers: [{name: app}]"), "v1alpha1",
			"v1beta1", 1))
		eventually(t, "the policy is asked for requests of v1beta1 too", func() bool {
			err = asUser(t, "kim").Create(t.Context(), o.DeepCopy(), client.DryRunAll)
			return apierrors.IsForbidden(err) &&
				strings.Contains(err.Error(), "must be allowed to restart containers of pod")
		})
	})
}

// useRequests goes through the life of a request with typed clients of one version, and returns it
// as it is in the end. base are the fields of its status that both versions have.
func useRequests[Version, Status any](
	t *testing.T, config *rest.Config, ns string, version schema.GroupVersion,
	base func(*Status) *kruiseapi.RequestStatusV1alpha1,
) *kruiseapi.Object[kruiseapi.RequestSpec, Status, Version] {
	type object = kruiseapi.Object[kruiseapi.RequestSpec, Status, Version]
	const kind = "ContainerRecreateRequest"
	name := version.Version
	c, err := kruiseapi.NewClient(config, version, ns, "containerrecreaterequests")
	must(t, err)
	pod := inService(t, ns, name)
	fresh := func(name string) *object {
		return &object{ObjectMeta: metav1.ObjectMeta{Name: name}, Spec: kruiseapi.RequestSpec{
			PodName: pod.Name, Containers: []kruiseapi.Container{{Name: "app"}, {Name: "sidecar"}},
			Strategy: &kruiseapi.RequestStrategy{FailurePolicy: "Ignore", OrderedRecreate: true,
				ForceRecreate: true, UnreadyGracePeriodSeconds: new(int64(2)), MinStartedSeconds: 1},
			ActiveDeadlineSeconds: new(int64(120)), TTLSecondsAfterFinished: new(int32(600)),
		}}
	}
	filled := func(o *object) {
		t.Helper()
		for i, s := range []corev1.ContainerStatus{container(t, pod, "app"), container(t, pod, "sidecar")} {
			if have := o.Spec.Containers[i].StatusContext; have == nil || have.ContainerID != s.ContainerID ||
				have.RestartCount != s.RestartCount {
				t.Errorf("statusContext %+v, want %s and %d", have, s.ContainerID, s.RestartCount)
			}
		}
		app, sidecar := o.Spec.Containers[0], o.Spec.Containers[1]
		if app.PreStop == nil || app.PreStop.HTTPGet == nil || app.PreStop.HTTPGet.Path != "/bye" ||
			len(app.Ports) != 1 || app.Ports[0].Name != "bye" {
			t.Errorf("hook %+v and ports %+v of app", app.PreStop, app.Ports)
		}
		if sidecar.PreStop == nil || sidecar.PreStop.Exec == nil || sidecar.Ports != nil {
			t.Errorf("hook %+v and ports %+v of sidecar", sidecar.PreStop, sidecar.Ports)
		}
		if g := o.Spec.Strategy.TerminationGracePeriodSeconds; g == nil || *g != 4 {
			t.Errorf("grace %v", g)
		}
		if l := o.Labels; l["crr.apps.kruise.io/pod-uid"] != string(pod.UID) ||
			l["crr.apps.kruise.io/node-name"] != pod.Spec.NodeName {
			t.Errorf("labels %v", l)
		}
	}
	strict := metav1.CreateOptions{FieldValidation: metav1.FieldValidationStrict}
	get := func() *object {
		t.Helper()
		o := &object{}
		must(t, c.Get(t.Context(), name, o))
		return o
	}
	patch := func(kind types.PatchType, data []byte, manager string) *object {
		t.Helper()
		o, options := &object{},
			metav1.PatchOptions{FieldManager: manager, FieldValidation: metav1.FieldValidationStrict}
		if kind == types.ApplyPatchType {
			options.Force = new(true)
		}
		must(t, c.Patch(t.Context(), name, kind, data, o, options))
		return o
	}

	dry := &object{}
	must(t, c.Create(t.Context(), fresh(name), dry, metav1.CreateOptions{FieldValidation: metav1.FieldValidationStrict,
		DryRun: []string{metav1.DryRunAll}}))
	filled(dry)
	if err := c.Get(t.Context(), name, &object{}); !apierrors.IsNotFound(err) {
		t.Errorf("after a dry run: %v", err)
	}
	for what, change := range map[string]func(*kruiseapi.Container){
		"statusContext": func(c *kruiseapi.Container) {
			c.StatusContext = &kruiseapi.ContainerContext{ContainerID: "containerd://x"}
		},
		"preStop": func(c *kruiseapi.Container) {
			c.PreStop = &kruiseapi.Handler{Exec: &corev1.ExecAction{Command: []string{"a"}}}
		},
		"ports": func(c *kruiseapi.Container) { c.Ports = []corev1.ContainerPort{{ContainerPort: 1}} },
	} {
		o := fresh(name)
		change(&o.Spec.Containers[0])
		if err := c.Create(t.Context(), o, &object{}, strict); !apierrors.IsBadRequest(err) ||
			!strings.Contains(err.Error(), "read-only") {
			t.Errorf("%s given by the user: %v", what, err)
		}
	}

	o := &object{}
	must(t, c.Create(t.Context(), fresh(name), o, strict))
	filled(o)
	watched, err := c.Watch(t.Context(), name, o.ResourceVersion)
	must(t, err)
	defer watched.Stop()

	// Again, in all ways: nothing changes.
	generation := o.Generation
	again := func(what string, o *object) {
		t.Helper()
		filled(o)
		if o.Generation != generation {
			t.Errorf("%s: generation %d, was %d", what, o.Generation, generation)
		}
	}
	apiVersion, k := version.WithKind(kind).ToAPIVersionAndKind()
	manifest := fresh(name)
	manifest.APIVersion, manifest.Kind = apiVersion, k
	text, err := json.Marshal(manifest)
	must(t, err)
	file := filepath.Join(scratchDir(t), "request.json")
	must(t, os.WriteFile(file, text, 0o600))
	eventually(t, "the manifest is put in its place", func() bool {
		_, err := bed.Kubectl(t.Context(), "-n", ns, "replace", "--validate=strict", "-f", file)
		if err != nil && !strings.Contains(err.Error(), "the object has been modified") {
			t.Fatal(err)
		}
		return err == nil
	})
	again("replaced", get())
	kubectl(t, "-n", ns, "apply", "--server-side", "--field-manager=other", "--force-conflicts", "-f", file)
	again("applied by the server", patch(types.ApplyPatchType, text, "typed"))
	again("labelled", patch(types.MergePatchType, []byte(`{"metadata":{"labels":{"a":"b"}}}`), ""))
	eventually(t, "the typed object is put in its place", func() bool {
		now := get()
		now.Labels["a"] = "c"
		o = &object{}
		err := c.Update(t.Context(), name, now, o, metav1.UpdateOptions{FieldValidation: metav1.FieldValidationStrict})
		if err != nil && !apierrors.IsConflict(err) {
			t.Fatal(err)
		}
		return err == nil
	})
	again("updated", o)

	eventually(t, "the request is accepted", func() bool { return get().Annotations["cri-proxy.io/accepted"] != "" })
	for what, data := range map[string]string{
		"podName is changed":       `{"spec":{"podName":"x"}}`,
		"the strategy is changed":  `{"spec":{"strategy":{"orderedRecreate":false}}}`,
		"the pod's UID is changed": `{"metadata":{"labels":{"crr.apps.kruise.io/pod-uid":"x"}}}`,
		"an unknown field is sent": `{"spec":{"podNames":"x"}}`,
	} {
		if err := c.Patch(t.Context(), name, types.MergePatchType, []byte(data), &object{},
			metav1.PatchOptions{FieldValidation: metav1.FieldValidationStrict}); err == nil {
			t.Errorf("%s, and nobody says anything", what)
		}
	}

	timeout := time.After(2 * time.Minute)
	for done := false; !done; {
		select {
		case e, open := <-watched.ResultChan():
			seen, ok := e.Object.(*object)
			switch {
			case !open, !ok, e.Type != watch.Modified:
				t.Fatalf("watch: %v %T %+v", e.Type, e.Object, e.Object)
			default:
				done = base(&seen.Status).Phase == "Completed"
			}
		case <-timeout:
			t.Fatalf("not completed: %s", kubectl(t, "-n", ns, "get", "crr", name, "-o", "yaml"))
		}
	}
	eventually(t, "the request is at rest", func() bool {
		o = get()
		return o.Labels["crr.apps.kruise.io/active"] == ""
	})
	for _, s := range base(&o.Status).ContainerRecreateStates {
		if s.Phase != "Succeeded" || !s.IsKilled {
			t.Errorf("%+v", s)
		}
	}
	filled(o) // still the containers of then
	list := &kruiseapi.List[kruiseapi.RequestSpec, Status, Version]{}
	must(t, c.List(t.Context(), list))
	if len(list.Items) == 0 || list.Items[0].Spec.PodName == "" {
		t.Errorf("list %+v", list)
	}
	raw, err := c.Raw(t.Context(), name)
	must(t, err)
	understood(t, version, kind, raw)
	must(t, c.Delete(t.Context(), name, metav1.DeleteOptions{}))
	return o
}

// useJobs goes through the life of an image job that finds no nodes.
func useJobs[Spec, Status, Version any](
	t *testing.T, config *rest.Config, ns string, version schema.GroupVersion, kind string, spec Spec,
) {
	t.Helper()
	type object = kruiseapi.Object[Spec, Status, Version]
	name := version.Version
	c, err := kruiseapi.NewClient(config, version, ns, strings.ToLower(kind)+"s")
	must(t, err)
	fresh := func() *object { return &object{ObjectMeta: metav1.ObjectMeta{Name: name}, Spec: spec} }

	must(t, c.Create(t.Context(), fresh(), &object{},
		metav1.CreateOptions{FieldValidation: metav1.FieldValidationStrict, DryRun: []string{metav1.DryRunAll}}))
	if err := c.Get(t.Context(), name, &object{}); !apierrors.IsNotFound(err) {
		t.Errorf("after a dry run: %v", err)
	}
	o := &object{}
	must(t, c.Create(t.Context(), fresh(), o, metav1.CreateOptions{FieldValidation: metav1.FieldValidationStrict}))
	watched, err := c.Watch(t.Context(), name, o.ResourceVersion)
	must(t, err)
	defer watched.Stop()
	must(t, c.Patch(t.Context(), name, types.MergePatchType, []byte(`{"spec":{"parallelism":2}}`), &object{},
		metav1.PatchOptions{FieldValidation: metav1.FieldValidationStrict}))
	manifest := fresh()
	manifest.APIVersion, manifest.Kind = version.WithKind(kind).ToAPIVersionAndKind()
	text, err := json.Marshal(manifest)
	must(t, err)
	must(t, c.Patch(t.Context(), name, types.ApplyPatchType, text, &object{},
		metav1.PatchOptions{FieldManager: "typed", Force: new(true), FieldValidation: metav1.FieldValidationStrict}))
	if err := c.Patch(t.Context(), name, types.MergePatchType, []byte(`{"spec":{"images":"x","image":[]}}`), &object{},
		metav1.PatchOptions{FieldValidation: metav1.FieldValidationStrict}); err == nil {
		t.Error("a wrong type, and nobody says anything")
	}
	eventually(t, "the typed object is put in its place", func() bool {
		now := &object{}
		must(t, c.Get(t.Context(), name, now))
		err := c.Update(t.Context(), name, now, &object{},
			metav1.UpdateOptions{FieldValidation: metav1.FieldValidationStrict})
		if err != nil && !apierrors.IsConflict(err) {
			t.Fatal(err)
		}
		return err == nil
	})
	select {
	case e := <-watched.ResultChan():
		if _, ok := e.Object.(*object); !ok {
			t.Errorf("watch: %v %T %+v", e.Type, e.Object, e.Object)
		}
	case <-time.After(time.Minute):
		t.Error("the watch tells nothing")
	}
	list := &kruiseapi.List[Spec, Status, Version]{}
	must(t, c.List(t.Context(), list))
	if len(list.Items) == 0 {
		t.Error("the list is empty")
	}
	raw, err := c.Raw(t.Context(), name)
	must(t, err)
	understood(t, version, kind, raw)
	must(t, c.Delete(t.Context(), name, metav1.DeleteOptions{}))
}

var (
	unknownField = regexp.MustCompile(`^unknown field "(.*)"$`)
	index        = regexp.MustCompile(`\[[0-9]+\]`)
)

// understood says what of an answer OpenKruise's types have no field for, and is not known to be
// ours.
func understood(t *testing.T, version schema.GroupVersion, kind string, raw []byte) {
	t.Helper()
	decoder := serializer.NewCodecFactory(kruiseapi.NewScheme(), serializer.EnableStrict).UniversalDeserializer()
	_, _, err := decoder.Decode(raw, nil, nil)
	if err == nil {
		return
	}
	strict, ok := errors.AsType[interface {
		error
		Errors() []error
	}](err)
	if !runtime.IsStrictDecodingError(err) || !ok {
		t.Fatal(err)
	}
	for _, err := range strict.Errors() {
		m := unknownField.FindStringSubmatch(err.Error())
		if m == nil || !kruiseapi.Added(version, kind, index.ReplaceAllString(m[1], "[]")) {
			t.Errorf("%s in %s", err, raw)
		}
	}
}

// manuals are the manifests of OpenKruise's documentation of these kinds, without its comments:
// what is answered here must be in docs/MIGRATION.md, beside what OpenKruise answers. "" is for
// what is taken.
var manuals = []struct{ source, manifest, refused string }{
	{"Container Restart, Submit request", `
apiVersion: apps.kruise.io/v1alpha1
kind: ContainerRecreateRequest
metadata:
  namespace: pod-namespace
  name: xxx
spec:
  podName: pod-name
  containers:
  - name: app
  - name: sidecar
  strategy:
    failurePolicy: Fail
    orderedRecreate: false
    terminationGracePeriodSeconds: 30
    unreadyGracePeriodSeconds: 3
    minStartedSeconds: 10
  activeDeadlineSeconds: 300
  ttlSecondsAfterFinished: 1800
`, ""},
	{"Kruise v0.9.0, release notes", `
apiVersion: apps.kruise.io/v1alpha1
kind: ContainerRecreateRequest
metadata:
  namespace: pod-namespace
  name: xxx
spec:
  podName: pod-name
  containers:
  - name: app
  - name: sidecar
`, ""},
	{"proposal of the enhanced livenessProbe", `
apiVersion: apps.kruise.io/v1alpha1
kind: ContainerRecreateRequest
metadata:
  labels:
    crr.apps.kruise.io/node-name: pod-node-name
    crr.apps.kruise.io/pod-name: pod-name
    crr.apps.kruise.io/pod-uid: 1ad8e5b3-0b0c-4367-a64b-1b3c97bf1686
  name: pod-name-b1e8901771bc
  namespace: pod-namespace
spec:
  containers:
  - name: app
    statusContext:
      containerID: docker://e92a39jhg9ddk8k6f8321and45723daf1ac5fe
      restartCount: 1
  podName: pod-name
  strategy:
    failurePolicy: Fail
    terminationGracePeriodSeconds: 1
`, "preStop, ports and statusContext are read-only"},
	{"ImagePullJob, high-level", `
apiVersion: apps.kruise.io/v1alpha1
kind: ImagePullJob
metadata:
  name: job-with-always
spec:
  image: nginx:1.9.1
  parallelism: 10
  selector:
    names:
    - node-1
    - node-2
    matchLabels:
      node-type: xxx
  completionPolicy:
    type: Always
    activeDeadlineSeconds: 1200
    ttlSecondsAfterFinished: 300
  pullPolicy:
    backoffLimit: 3
    timeoutSeconds: 300
`, "names excludes matchLabels"},
	{"ImagePullJob, high-level, with the podSelector of its comment", `
apiVersion: apps.kruise.io/v1alpha1
kind: ImagePullJob
metadata:
  name: job-with-always
spec:
  image: nginx:1.9.1
  parallelism: 10
  podSelector:
    matchLabels:
      pod-label: xxx
    matchExpressions:
    - key: pod-label
      operator: In
      values:
      - xxx
  completionPolicy:
    type: Always
    activeDeadlineSeconds: 1200
    ttlSecondsAfterFinished: 300
  pullPolicy:
    backoffLimit: 3
    timeoutSeconds: 300
`, ""},
	{"ImagePullJob, Configure secrets", `
apiVersion: apps.kruise.io/v1alpha1
kind: ImagePullJob
metadata:
  name: with-secrets
spec:
  image: nginx:1.9.1
  completionPolicy: {}
  pullSecrets:
  - secret-name1
  - secret-name2
`, ""},
	{"ImagePullJob, Attach metadata into cri interface", `
apiVersion: apps.kruise.io/v1alpha1
kind: ImagePullJob
metadata:
  name: with-metadata
spec:
  completionPolicy: {}
  image: nginx:1.9.1
  sandboxConfig:
    annotations:
      io.kubernetes.image.metrics.tags: "cluster=cn-shanghai"
    labels:
      io.kubernetes.image.app: "foo"
`, ""},
	{"ImagePullJob, without a completionPolicy", `
apiVersion: apps.kruise.io/v1alpha1
kind: ImagePullJob
metadata:
  name: without-policy
spec:
  image: nginx:1.9.1
`, "spec.completionPolicy: Required value"},
	{"ImagePullJob, Image Pull Policy, one of both", `
apiVersion: apps.kruise.io/v1alpha1
kind: ImagePullJob
metadata:
  name: with-policy
spec:
  completionPolicy: {}
  image: nginx:1.9.1
  imagePullPolicy: Always
`, ""},
	{"ImagePullJob, Image Pull Policy, as it is written", `
apiVersion: apps.kruise.io/v1alpha1
kind: ImagePullJob
metadata:
  name: with-policies
spec:
  completionPolicy: {}
  image: nginx:1.9.1
  imagePullPolicy: Always | IfNotPresent
`, ""},
	{"Kruise v0.8.0, release notes", `
apiVersion: apps.kruise.io/v1alpha1
kind: ImagePullJob
metadata:
  name: test-imagepulljob
spec:
  image: nginx:latest
  completionPolicy:
    type: Always
  parallelism: 10
  pullPolicy:
    backoffLimit: 3
    timeoutSeconds: 300
  selector:
    matchLabels:
      node-label: xxx
`, ""},
	{"ImageListPullJob", `
apiVersion: apps.kruise.io/v1alpha1
kind: ImageListPullJob
metadata:
  name: job-with-always
spec:
  images:
  - nginx:1.9.1
  - busybox:1.29.2
  parallelism: 10
  selector:
    names:
    - node-1
    - node-2
    matchLabels:
      node-type: xxx
  completionPolicy:
    type: Always
    activeDeadlineSeconds: 1200
    ttlSecondsAfterFinished: 300
  pullPolicy:
    backoffLimit: 3
    timeoutSeconds: 300
`, "names excludes matchLabels"},
	{"proposal of the ImageListPullJob", `
apiVersion: apps.kruise.io/v1alpha1
kind: ImageListPullJob
metadata:
  name: job-list-with-always
spec:
  images:
  - nginx:1.9.1
  - busybox:1.35
  - httpd:2.4.38
  completionPolicy:
    type: Always
    ttlSecondsAfterFinished: 30
`, ""},
	{"ImagePullJob, NodeImage (low-level)", `
apiVersion: apps.kruise.io/v1alpha1
kind: NodeImage
metadata:
  name: node-xxx
spec: {}
`, `no matches for kind "NodeImage"`},
}

// TestKruiseManuals applies the manifests of OpenKruise's documentation, in either version.
func TestKruiseManuals(t *testing.T) {
	t.Parallel()
	const ns = "pod-namespace"
	namespaceNamed(t, ns)
	apply(t, fmt.Sprintf(kruisePod, ns, "pod-name", bed.Image("busybox:1.0"), loop))
	serveWebhooks(t, ns, ns)
	pod := inService(t, ns, "pod-name")
	root, err := testbed.SourceDir("")
	must(t, err)
	table, err := os.ReadFile(filepath.Join(root, "docs", "MIGRATION.md"))
	must(t, err)
	for _, tt := range manuals {
		if !strings.Contains(string(table), "| "+tt.source+" |") {
			t.Errorf("docs/MIGRATION.md has no row %q", tt.source)
		}
		for _, version := range []string{"v1alpha1", "v1beta1"} {
			t.Run(tt.source+" "+version, func(t *testing.T) {
				manifest := strings.Replace(tt.manifest, "kruise.io/v1alpha1", "kruise.io/"+version, 1)
				err := applyIn(t, ns, manifest)
				if tt.refused != "" {
					if err == nil || !strings.Contains(err.Error(), tt.refused) {
						t.Errorf("%v, want %q", err, tt.refused)
					}
					return
				}
				must(t, err)
				o := objectOf(t, manifest)
				name := strings.ToLower(o.GetKind()) + "." + version + ".apps.kruise.io/" + o.GetName()
				defer kubectl(t, "-n", ns, "delete", name, "--wait=true")
				kubectl(t, "-n", ns, "get", name)
				must(t, applyIn(t, ns, manifest)) // nothing changes
				must(t, applyIn(t, ns, manifest, "--server-side", "--force-conflicts"))
				if o.GetKind() == "ContainerRecreateRequest" {
					got := kubectl(t, "-n", ns, "get", name, "-o",
						"jsonpath={.metadata.labels.crr\\.apps\\.kruise\\.io/pod-uid} "+
							"{.spec.containers[0].statusContext.containerID}")
					if uid, id, _ := strings.Cut(got, " "); uid != string(pod.UID) ||
						!strings.HasPrefix(id, "containerd://") {
						t.Errorf("it has %q", got)
					}
				}
			})
		}
	}
}
