// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package admission

import (
	"context"
	"encoding/json"
	"errors"
	"io"
	"maps"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/sirupsen/logrus"
	admissionv1 "k8s.io/api/admission/v1"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	"k8s.io/apimachinery/pkg/runtime"
	"sigs.k8s.io/controller-runtime/pkg/client"
	"sigs.k8s.io/controller-runtime/pkg/client/fake"
	"sigs.k8s.io/controller-runtime/pkg/client/interceptor"
	"sigs.k8s.io/controller-runtime/pkg/webhook/admission"
	"sigs.k8s.io/yaml"

	"github.com/cri-proxy/cri-proxy/api/scheme"
)

// cluster has the objects that the tests refer to.
const cluster = `
apiVersion: v1
kind: Node
metadata: {name: n1}
---
apiVersion: v1
kind: Pod
metadata: {namespace: ns, name: web-0, uid: web-0-uid, labels: {app: web},
    ownerReferences: [{apiVersion: apps/v1, kind: StatefulSet, name: web, uid: u, controller: true}]}
spec:
  nodeName: n1
  initContainers: [{name: setup}, {name: mesh, restartPolicy: Always}]
  containers: [{name: app, image: "app:1"}, {name: logs, image: "logs:1"}]
  ephemeralContainers: [{name: debug}]
status:
  phase: Running
  containerStatuses:
  - {name: app, containerID: "containerd://a", state: {running: {}}}
  - {name: logs, containerID: "containerd://l", state: {waiting: {reason: CrashLoopBackOff}}}
  initContainerStatuses: [{name: mesh, containerID: "containerd://m"}]
---
apiVersion: v1
kind: Pod
metadata: {namespace: ns, name: front-5d9c-x, uid: f, labels: {app: front, pod-template-hash: 5d9c},
    ownerReferences: [{apiVersion: apps/v1, kind: ReplicaSet, name: front-5d9c, uid: u, controller: true}]}
spec: {nodeName: n1, containers: [{name: app, image: "app:1"}],
    readinessGates: [{conditionType: cri-proxy.io/in-place-ready}]}
status: {phase: Running, containerStatuses: [{name: app, state: {waiting: {reason: ContainerCreating}}}]}
---
apiVersion: v1
kind: Pod
metadata: {namespace: ns, name: ended, uid: e}
spec: {nodeName: n1, containers: [{name: app}]}
status: {phase: Succeeded}
---
apiVersion: v1
kind: Pod
metadata: {namespace: ns, name: going, uid: g, deletionTimestamp: "2026-01-01T00:00:00Z", finalizers: [x/y]}
spec: {nodeName: n1, containers: [{name: app}]}
status: {phase: Running}
---
apiVersion: v1
kind: Pod
metadata: {namespace: ns, name: waiting, uid: w}
spec: {containers: [{name: app}]}
status: {phase: Pending}
---
apiVersion: v1
kind: Pod
metadata: {namespace: ns, name: lost, uid: l}
spec: {nodeName: n9, containers: [{name: app}]}
status: {phase: Running}
---
apiVersion: v1
kind: Pod
metadata: {namespace: ns, name: static, uid: s, labels: {static: "yes"}, annotations: {kubernetes.io/config.mirror: x}}
spec: {nodeName: n1, containers: [{name: app}]}
status: {phase: Running}
---
apiVersion: v1
kind: Pod
metadata: {namespace: ns, name: hooked, uid: h}
spec: {nodeName: n1, containers: [{name: app, lifecycle: {postStart: {httpGet: {path: /, port: nowhere}}}}]}
status: {phase: Running, containerStatuses: [{name: app, containerID: "containerd://h"}]}
---
apiVersion: apps/v1
kind: StatefulSet
metadata: {namespace: ns, name: web}
spec:
  updateStrategy: {type: OnDelete}
  template: {spec: {initContainers: [{name: setup}, {name: mesh, restartPolicy: Always}],
      containers: [{name: app, image: "app:1"}, {name: logs, image: "logs:1"}]}}
---
apiVersion: apps/v1
kind: StatefulSet
metadata: {namespace: ns, name: rolling}
spec: {updateStrategy: {type: RollingUpdate}, template: {spec: {containers: [{name: app, image: "app:1"}]}}}
---
apiVersion: apps/v1
kind: DaemonSet
metadata: {namespace: ns, name: rolling}
spec: {updateStrategy: {type: RollingUpdate}, template: {spec: {containers: [{name: app, image: "app:1"}]}}}
---
apiVersion: apps/v1
kind: DaemonSet
metadata: {namespace: ns, name: going, deletionTimestamp: "2026-01-01T00:00:00Z", finalizers: [x/y]}
spec: {updateStrategy: {type: OnDelete}, template: {spec: {containers: [{name: app, image: "app:1"}]}}}
---
apiVersion: apps/v1
kind: Deployment
metadata: {namespace: ns, name: front}
spec: {template: {spec: {containers: [{name: app, image: "app:1"}],
    readinessGates: [{conditionType: cri-proxy.io/in-place-ready}]}}}
`

// asked has the webhooks, as a server has them.
type asked map[string]http.Handler

func (a asked) Register(path string, hook http.Handler) { a[path] = hook }

func serve(t *testing.T, from client.Reader) asked {
	t.Helper()
	scheme, err := scheme.New()
	if err != nil {
		t.Fatal(err)
	}
	log := logrus.New()
	log.SetOutput(io.Discard)
	hooks := asked{}
	Register(hooks, scheme, from, log)
	return hooks
}

// ask sends an object to a webhook: as an update if before is set.
func (a asked) ask(t *testing.T, path, before, manifest string) admission.Response {
	t.Helper()
	o := object2(t, manifest)
	req := admission.Request{AdmissionRequest: admissionv1.AdmissionRequest{
		UID: "u", Operation: admissionv1.Create, Namespace: o.GetNamespace(), Name: o.GetName(), Object: raw(t, o),
	}}
	if before != "" {
		req.Operation, req.OldObject = admissionv1.Update, raw(t, object2(t, before))
	}
	return a[path].(*admission.Webhook).Handle(t.Context(), req)
}

func object2(t *testing.T, manifest string) *unstructured.Unstructured {
	t.Helper()
	text, err := yaml.YAMLToJSON([]byte(manifest))
	if err != nil {
		t.Fatal(err, manifest)
	}
	o := &unstructured.Unstructured{}
	if err := o.UnmarshalJSON(text); err != nil {
		t.Fatal(err, manifest)
	}
	return o
}

func raw(t *testing.T, o *unstructured.Unstructured) runtime.RawExtension {
	t.Helper()
	text, err := o.MarshalJSON()
	if err != nil {
		t.Fatal(err)
	}
	return runtime.RawExtension{Raw: text}
}

func reader(t *testing.T, more ...string) client.WithWatch {
	t.Helper()
	scheme, err := scheme.New()
	if err != nil {
		t.Fatal(err)
	}
	b := fake.NewClientBuilder().WithScheme(scheme)
	for _, document := range append(strings.Split(cluster, "\n---\n"), more...) {
		b.WithObjects(object2(t, document))
	}
	return b.Build()
}

const (
	crr  = "apiVersion: apps.kruise.io/v1alpha1\nkind: ContainerRecreateRequest\n"
	job  = "apiVersion: apps.kruise.io/v1beta1\nkind: ImagePullJob\n"
	list = "apiVersion: apps.kruise.io/v1beta1\nkind: ImageListPullJob\n"
	ipr  = "apiVersion: cri-proxy.io/v1alpha1\nkind: InPlaceRollout\n"
	meta = "metadata: {namespace: ns, name: x, uid: x-uid}\n"
)

// accepted is a request that the controller has taken up.
const accepted = crr + `
metadata:
  namespace: ns
  name: x
  uid: x-uid
  labels: {crr.apps.kruise.io/pod-uid: web-0-uid, crr.apps.kruise.io/node-name: n1, crr.apps.kruise.io/active: "true"}
  annotations:
    cri-proxy.io/restart-order: StartFirst
    crr.apps.kruise.io/unready-acquired: "2026-01-01T00:00:00Z"
    cri-proxy.io/accepted: '{"request":"x-uid","podUID":"web-0-uid","nodeName":"n1"}'
spec: {podName: web-0, containers: [{name: app}]}
`

// active is a rollout at work.
func active(name, target, container string) string {
	return ipr + "metadata: {namespace: ns, name: " + name + "}\nspec: {target: {" + target +
		"}, containers: [{name: " +
		container + ", image: 'a:1'}]}"
}

func TestWebhooks(t *testing.T) {
	request := func(spec string) string { return crr + meta + "spec: {" + spec + "}" }
	pull := func(spec string) string { return job + meta + "spec: {completionPolicy: {}, " + spec + "}" }
	pulls := func(spec string) string { return list + meta + "spec: {completionPolicy: {}, " + spec + "}" }
	annotated := func(key, value string) string {
		return job + "metadata: {namespace: ns, name: x, annotations: {" + key + ": '" + value +
			"'}}\nspec: {completionPolicy: {}, image: a}"
	}
	roll := func(target string, more ...string) string {
		return ipr + meta + "spec: {target: {" + target + "}, containers: [{name: app, image: 'app:2'}" +
			strings.Join(more, "") + "]}"
	}
	restart := func(target, name string) string {
		return ipr + meta + "spec: {target: {" + target + "}, containers: [{name: " + name + "}]}"
	}
	const web = "workloadRef: {kind: StatefulSet, name: web}"
	tests := []struct {
		name, path       string
		others           []string
		before, manifest string
		wrong            string // "" for none
		code             int32
		warning          string
	}{
		{name: "a regular container", path: PathValidateRecreate,
			manifest: request("podName: web-0, containers: [{name: app}]")},
		{name: "a native sidecar", path: PathValidateRecreate,
			manifest: request("podName: web-0, containers: [{name: mesh}]")},
		{name: "a container in a crash loop", path: PathValidateRecreate,
			manifest: request("podName: web-0, containers: [{name: logs}]")},
		{name: "a pod that is not there", path: PathValidateRecreate,
			manifest: request("podName: web, containers: [{name: app}]"),
			wrong:    "no pod ns/web: podName must name a pod in the namespace of the request"},
		{name: "a pod that has ended", path: PathValidateRecreate,
			manifest: request("podName: ended, containers: [{name: app}]"),
			wrong:    "pod ns/ended has ended (phase Succeeded): only containers of an active pod can be recreated"},
		{name: "a pod that goes", path: PathValidateRecreate,
			manifest: request("podName: going, containers: [{name: app}]"),
			wrong:    "pod ns/going is being deleted: its containers are not recreated"},
		{name: "a pod on no node", path: PathValidateRecreate,
			manifest: request("podName: waiting, containers: [{name: app}]"),
			wrong:    "pod ns/waiting is not on a node yet (phase Pending): create the request once it runs"},
		{name: "a node that is not there", path: PathValidateRecreate,
			manifest: request("podName: lost, containers: [{name: app}]"),
			wrong:    "node n9 of pod ns/lost does not exist"},
		{name: "a container twice", path: PathValidateRecreate,
			manifest: request("podName: web-0, containers: [{name: app}, {name: app}]"),
			wrong:    "container app is listed twice: list it once"},
		{name: "no such container", path: PathValidateRecreate,
			manifest: request("podName: web-0, containers: [{name: ap}]"),
			wrong:    "pod web-0 has no container ap; it has app, logs, mesh"},
		{name: "an init container", path: PathValidateRecreate,
			manifest: request("podName: web-0, containers: [{name: setup}]"),
			wrong:    "container setup is an init container that runs to its end"},
		{name: "an ephemeral container", path: PathValidateRecreate,
			manifest: request("podName: web-0, containers: [{name: debug}]"),
			wrong:    "container debug is an ephemeral container: it cannot be recreated"},
		{name: "a container that was never started", path: PathValidateRecreate,
			manifest: request("podName: front-5d9c-x, containers: [{name: app}]"),
			wrong: "container app has not been started yet (ContainerCreating): there is nothing to recreate, " +
				"wait until it runs"},
		{name: "a hook that cannot work", path: PathValidateRecreate,
			manifest: request("podName: hooked, containers: [{name: app}]"),
			wrong:    "container app has a postStart handler that kubelet would stop the new container for"},
		{name: "all that is wrong", path: PathValidateRecreate,
			manifest: request("podName: web-0, containers: [{name: ap}, {name: setup}]"),
			wrong:    "it has app, logs, mesh; container setup is an init"},
		{name: "an unknown order", path: PathValidateRecreate,
			manifest: crr + "metadata: {namespace: ns, name: x, annotations: {cri-proxy.io/restart-order: " +
				"Both}}\nspec: " +
				"{podName: web-0, containers: [{name: app}]}",
			wrong: `annotation cri-proxy.io/restart-order is "Both": it must be StopFirst or StartFirst, or left out`},
		{name: "parallel or not", path: PathValidateRecreate,
			manifest: crr + "metadata: {namespace: ns, name: x, annotations: {cri-proxy.io/parallel-recreate: " +
				"\"yes\"}}\nspec: {podName: web-0, containers: [{name: app}]}",
			wrong: `annotation cri-proxy.io/parallel-recreate is "yes": it must be "true" or "false", or left out`},
		{name: "StartFirst for too long", path: PathValidateRecreate,
			manifest: crr + "metadata: {namespace: ns, name: x, annotations: {cri-proxy.io/restart-order: " +
				"StartFirst}}\nspec: " +
				"{podName: web-0, containers: [{name: app}], strategy: {minStartedSeconds: 3601}}",
			wrong: "minStartedSeconds is 3601, and at most 3600"},

		{name: "an accepted request applied again", path: PathValidateRecreate, before: accepted, manifest: accepted},
		{name: "a request that is not accepted yet", path: PathValidateRecreate,
			before: request("podName: web-0, containers: [{name: app}]"), manifest: accepted},
		{name: "a note on it", path: PathValidateRecreate, before: accepted,
			manifest: strings.Replace(accepted, "  labels: {", "  labels: {mine: x, ", 1)},
		{name: "its completion", path: PathValidateRecreate, before: accepted,
			manifest: strings.Replace(accepted, `, crr.apps.kruise.io/active: "true"`, "", 1)},
		{name: "another pod UID", path: PathValidateRecreate, before: accepted,
			manifest: strings.Replace(accepted, "pod-uid: web-0-uid", "pod-uid: other", 1),
			wrong:    "label crr.apps.kruise.io/pod-uid is immutable", code: 403},
		{name: "no node name", path: PathValidateRecreate, before: accepted,
			manifest: strings.Replace(accepted, "crr.apps.kruise.io/node-name: n1, ", "", 1),
			wrong: `label crr.apps.kruise.io/node-name is immutable: it says which pod the request was accepted for; ` +
				`keep its value "n1"`, code: 403},
		{name: "replaced by the manifest", path: PathValidateRecreate, before: accepted,
			manifest: request("podName: web-0, containers: [{name: app}]"),
			wrong:    "keep its value \"web-0-uid\", or create another request", code: 403},
		{name: "what it was accepted for", path: PathValidateRecreate, before: accepted,
			manifest: strings.Replace(accepted, `"nodeName":"n1"`, `"nodeName":"n2"`, 1),
			wrong:    "annotation cri-proxy.io/accepted is immutable", code: 403},
		{name: "parallel afterwards", path: PathValidateRecreate, before: accepted,
			manifest: strings.Replace(accepted, "order: StartFirst",
				"order: StartFirst\n    cri-proxy.io/parallel-recreate: \"true\"", 1),
			wrong: "annotation cri-proxy.io/parallel-recreate is immutable: it was read when the request was accepted",
			code:  403},
		{name: "another order", path: PathValidateRecreate, before: accepted,
			manifest: strings.Replace(accepted, "order: StartFirst", "order: StopFirst", 1),
			wrong: "annotation cri-proxy.io/restart-order is immutable: it was read when the request was accepted; " +
				"leave it " +
				"as it was, or create another ContainerRecreateRequest", code: 403},
		{name: "the time of the drain", path: PathValidateRecreate, before: accepted,
			manifest: strings.Replace(accepted, "2026-01-01T", "2027-01-01T", 1),
			wrong:    "annotation crr.apps.kruise.io/unready-acquired is immutable", code: 403},

		{name: "an image", path: PathValidateJob, manifest: pull("image: 'nginx:1.29'")},
		{name: "every way to choose", path: PathValidateJob,
			manifest: pull("image: a, selector: {}, podSelector: {matchExpressions: [{key: app, operator: In, " +
				"values: [a]}]}")},
		{name: "an image that is none", path: PathValidateJob, manifest: pull("image: Nginx"),
			wrong: `image "Nginx" is no image reference`},
		{name: "an image like a digest", path: PathValidateJob, manifest: pull("image: " + strings.Repeat("a", 64)),
			wrong: "it must be [REGISTRY[:PORT]/]NAME[:TAG][@DIGEST], as in a pod"},
		{name: "a short digest", path: PathValidateJob, manifest: pull("image: a@sha256:" + strings.Repeat("a", 32)),
			wrong: "is no image reference"},
		{name: "a pin of words", path: PathValidateJob, manifest: annotated("cri-proxy.io/pin-for", "a day"),
			wrong: `annotation cri-proxy.io/pin-for is "a day": it must be a duration from 0s to 744h, such as 36h`},
		{name: "a pin for too long", path: PathValidateJob, manifest: annotated("cri-proxy.io/pin-for", "745h"),
			wrong: "it must be a duration from 0s to 744h"},
		{name: "a speed of words", path: PathValidateJob, manifest: annotated("cri-proxy.io/bytes-per-second", "fast"),
			wrong: `annotation cri-proxy.io/bytes-per-second is "fast": it must be a quantity of bytes, such as 20Mi`},
		{name: "an operator that is none", path: PathValidateJob,
			manifest: pull("image: a, selector: {matchExpressions: [{key: a, operator: Is, values: [b]}]}"),
			wrong:    `spec.selector: "Is" is not a valid label selector operator`},
		{name: "an operator without values", path: PathValidateJob,
			manifest: pull("image: a, podSelector: {matchExpressions: [{key: a, operator: In}]}"),
			wrong:    "spec.podSelector: "},
		{name: "a label that is none", path: PathValidateJob,
			manifest: pull("image: a, selector: {matchLabels: {a: 'b c'}}"),
			wrong:    "spec.selector: "},
		{name: "a policy that is none", path: PathValidateJob, manifest: pull("image: a, imagePullPolicy: Never"),
			warning: `spec.imagePullPolicy "Never" is taken for Always`},
		{name: "a negative number of attempts", path: PathValidateJob,
			manifest: pull("image: a, pullPolicy: {backoffLimit: -1}"),
			warning:  "spec.pullPolicy.backoffLimit -1 is taken for 3"},
		{name: "no time", path: PathValidateJob, manifest: pull("image: a, pullPolicy: {timeoutSeconds: 0}"),
			warning: "spec.pullPolicy.timeoutSeconds 0 is taken for 600"},
		{name: "another speed", path: PathValidateJob, before: pull("image: a"),
			manifest: annotated("cri-proxy.io/bytes-per-second", "-1"), wrong: "it must be a quantity of bytes"},

		{name: "images", path: PathValidateList, manifest: pulls("images: [a, 'b:1']")},
		{name: "two images that are none", path: PathValidateList, manifest: pulls("images: [a, Bb, Cc]"),
			wrong: "image \"Bb\" is no image reference (invalid reference format: repository name (library/Bb) " +
				"must be " +
				"lowercase): it must be [REGISTRY[:PORT]/]NAME[:TAG][@DIGEST], as in a pod\nimage \"Cc\""},
		{name: "one image by two names", path: PathValidateList,
			manifest: pulls("images: [nginx, 'docker.io/library/nginx:latest']"),
			warning:  "nginx and docker.io/library/nginx:latest are the same image"},
		{name: "an annotation for all", path: PathValidateList,
			manifest: strings.Replace(pulls("images: [a, b]"), "uid: x-uid", "annotations: {cri-proxy.io/pin-for: x}",
				1),
			wrong: "annotation cri-proxy.io/pin-for"},
		{name: "a policy for all", path: PathValidateList,
			manifest: pulls("images: [a, b], imagePullPolicy: Sometimes"),
			warning:  "is taken for Always"},
		{name: "a selector for all", path: PathValidateList,
			manifest: pulls("images: [a], selector: {matchLabels: {'a b': c}}"), wrong: "spec.selector: "},

		{name: "a pod", path: PathValidateRollout, manifest: roll("podName: web-0")},
		{name: "a StatefulSet", path: PathValidateRollout, manifest: roll(web, ", {name: mesh}")},
		{name: "a Deployment", path: PathValidateRollout,
			manifest: roll("workloadRef: {kind: Deployment, name: front}")},
		{name: "a selector", path: PathValidateRollout, manifest: roll("selector: {matchLabels: {app: web}}")},
		{name: "a pod that comes later", path: PathValidateRollout, manifest: roll("podName: later"),
			warning: "there is no pod later in namespace ns: the rollout waits for it"},
		{name: "a workload that comes later", path: PathValidateRollout,
			manifest: roll("workloadRef: {kind: StatefulSet, name: later}"),
			warning:  "there is no StatefulSet later in namespace ns: the rollout waits for it"},
		{name: "pods that come later", path: PathValidateRollout,
			manifest: roll("selector: {matchLabels: {app: later}}"),
			warning:  "no pod in namespace ns has labels app=later: the rollout waits for one"},
		{name: "an image of a rollout that is none", path: PathValidateRollout,
			manifest: strings.Replace(roll("podName: web-0"), "app:2", "App", 1),
			wrong:    `container app: image "App" is no image reference`},
		{name: "a pod that ended", path: PathValidateRollout, manifest: roll("podName: ended"),
			wrong: "pod ended has ended (phase Succeeded): only containers of an active pod can be changed"},
		{name: "a pod that is going", path: PathValidateRollout, manifest: roll("podName: going"),
			wrong: "pod going is being deleted"},
		{name: "a static pod", path: PathValidateRollout, manifest: roll("podName: static"),
			wrong: "pod static is a static pod, which is changed on its node only: for another image change its " +
				"manifest on " +
				"node n1, to restart its containers make a ContainerRecreateRequest for it"},
		{name: "a static pod by label", path: PathValidateRollout,
			manifest: roll("selector: {matchLabels: {static: 'yes'}}"),
			warning:  "1 static pod is left out"},
		{name: "a static pod among those of another", path: PathValidateRollout,
			others:   []string{active("o", "selector: {matchLabels: {static: 'yes'}}", "app")},
			manifest: roll("selector: {matchExpressions: [{key: static, operator: Exists}]}"),
			warning:  "1 static pod is left out"},
		{name: "a container that the pod has not", path: PathValidateRollout,
			manifest: roll("podName: front-5d9c-x", ", {name: mesh}"),
			wrong:    "pod front-5d9c-x has no container mesh that can be restarted in place; it has app"},
		{name: "an init container of a pod", path: PathValidateRollout, manifest: restart("podName: web-0", "setup"),
			wrong: "pod web-0 has no container setup that can be restarted in place; it has app, logs, mesh"},
		{name: "a container that a chosen pod has not", path: PathValidateRollout,
			manifest: restart("selector: {matchExpressions: [{key: app, operator: Exists}]}", "logs"),
			wrong:    "pod front-5d9c-x has no container logs"},
		{name: "a container that the template has not", path: PathValidateRollout,
			manifest: roll(web, ", {name: apps, image: b}"),
			wrong: "the template of StatefulSet web has no container apps that can be changed in place; " +
				"it has app, logs, mesh"},
		{name: "a selector that is none", path: PathValidateRollout,
			manifest: roll("selector: {matchExpressions: [{key: app, operator: In}]}"),
			wrong:    "spec.target.selector: "},
		{name: "a StatefulSet that rolls by itself", path: PathValidateRollout,
			manifest: roll("workloadRef: {kind: StatefulSet, name: rolling}"),
			wrong: "StatefulSet rolling has updateStrategy RollingUpdate, with which its controller replaces the " +
				"pods: set " +
				"updateStrategy.type to OnDelete"},
		{name: "a DaemonSet that rolls by itself", path: PathValidateRollout,
			manifest: roll("workloadRef: {kind: DaemonSet, name: rolling}"),
			wrong:    "DaemonSet rolling has updateStrategy RollingUpdate"},
		{name: "a DaemonSet that goes", path: PathValidateRollout,
			manifest: roll("workloadRef: {kind: DaemonSet, name: going}"), wrong: "DaemonSet going is being deleted"},
		{name: "a drain without a gate", path: PathValidateRollout,
			manifest: strings.Replace(roll(web), "spec: {", "spec: {strategy: {drainSeconds: 5}, ", 1),
			warning: "spec.strategy.drainSeconds has no effect: the template of StatefulSet web has no " +
				"readiness gate " +
				"cri-proxy.io/in-place-ready"},
		{name: "a drain with a gate", path: PathValidateRollout,
			manifest: strings.Replace(roll("podName: front-5d9c-x"), "spec: {", "spec: {strategy: {drainSeconds: 5}, ",
				1)},

		{name: "the same workload", path: PathValidateRollout, others: []string{active("o", web, "app")},
			manifest: roll(web),
			wrong: "InPlaceRollout o is at work on container app of StatefulSet web: wait for its end (kubectl wait " +
				"--for=condition=Complete ipr/o), change that one instead, or delete it"},
		{name: "another container", path: PathValidateRollout, others: []string{active("o", web, "logs")},
			manifest: roll(web),
			warning:  "InPlaceRollout o is at work on StatefulSet web: the rollout waits for its end"},
		{name: "another workload", path: PathValidateRollout,
			others: []string{active("o", "workloadRef: {kind: DaemonSet, name: web}", "app")}, manifest: roll(web)},
		{name: "the same pod", path: PathValidateRollout, others: []string{active("o", "podName: later", "app")},
			manifest: roll("podName: later"), wrong: "InPlaceRollout o is at work on container app of pod later"},
		{name: "another pod", path: PathValidateRollout, others: []string{active("o", "podName: later", "app")},
			manifest: roll("podName: web-0")},
		{name: "a pod of a workload", path: PathValidateRollout, others: []string{active("o", web, "app")},
			manifest: roll("podName: web-0"), wrong: "o is at work on container app of pod web-0"},
		{name: "the workload of a pod", path: PathValidateRollout,
			others:   []string{active("o", "podName: web-0", "app")},
			manifest: roll(web), wrong: "o is at work on container app of pod web-0"},
		{name: "a pod of a Deployment", path: PathValidateRollout,
			others:   []string{active("o", "workloadRef: {kind: Deployment, name: front}", "app")},
			manifest: roll("podName: front-5d9c-x"), wrong: "o is at work on container app of pod front-5d9c-x"},
		{name: "a pod of another Deployment", path: PathValidateRollout,
			others:   []string{active("o", "workloadRef: {kind: Deployment, name: fron}", "app")},
			manifest: roll("podName: front-5d9c-x")},
		{name: "a pod that is chosen", path: PathValidateRollout,
			others:   []string{active("o", "selector: {matchLabels: {app: web}}", "app")},
			manifest: roll("podName: web-0"),
			wrong:    "o is at work on container app of pod web-0"},
		{name: "a workload whose pods are chosen", path: PathValidateRollout,
			others:   []string{active("o", "selector: {matchLabels: {app: front}}", "app")},
			manifest: roll("workloadRef: {kind: Deployment, name: front}"),
			wrong:    "o is at work on container app of pod front-5d9c-x"},
		{name: "selectors that meet", path: PathValidateRollout,
			others:   []string{active("o", "selector: {matchExpressions: [{key: app, operator: Exists}]}", "app")},
			manifest: roll("selector: {matchLabels: {app: web}}"), wrong: "o is at work on container app of pod web-0"},
		{name: "selectors that do not meet", path: PathValidateRollout,
			others:   []string{active("o", "selector: {matchLabels: {app: front}}", "app")},
			manifest: roll("selector: {matchLabels: {app: web}}")},
		{name: "one that is being deleted", path: PathValidateRollout,
			others: []string{strings.Replace(active("o", web, "app"), "name: o}",
				"name: o, deletionTimestamp: '2026-01-01T00:00:00Z', finalizers: [x/y]}", 1)}, manifest: roll(web)},
		{name: "itself", path: PathValidateRollout, others: []string{active("x", web, "app")},
			before: active("x", web, "app"), manifest: roll(web)},

		{name: "a pause while another is at work", path: PathValidateRollout, others: []string{active("o", web, "app")},
			before: roll(web), manifest: strings.Replace(roll(web), "spec: {", "spec: {paused: true, ", 1)},
		{name: "a pause of what cannot be carried out", path: PathValidateRollout, before: roll("podName: ended"),
			manifest: strings.Replace(roll("podName: ended"), "spec: {", "spec: {paused: true, ", 1)},
		{name: "the next image while another is at work", path: PathValidateRollout,
			others: []string{active("o", web, "app")}, before: roll(web),
			manifest: strings.Replace(roll(web), "app:2", "app:3", 1), wrong: "o is at work"},
		{name: "a retry while another is at work", path: PathValidateRollout, others: []string{active("o", web, "app")},
			before:   roll(web),
			manifest: strings.Replace(roll(web), "uid: x-uid", "annotations: {cri-proxy.io/retry: again}", 1),
			wrong:    "o is at work"},
		{name: "other labels", path: PathValidateRollout, before: roll("selector: {matchLabels: {app: web}}"),
			manifest: roll("selector: {matchLabels: {app: front}}"),
			wrong:    "the target is immutable: create another InPlaceRollout", code: 403},
		{name: "what is being deleted", path: PathValidateRollout, before: roll("podName: ended"),
			manifest: strings.Replace(roll("podName: ended", ", {name: b}"), "uid: x-uid",
				"deletionTimestamp: '2026-01-01T00:00:00Z'", 1)},
	}
	alone := serve(t, reader(t))
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			hooks := alone
			if len(tt.others) > 0 {
				hooks = serve(t, reader(t, tt.others...))
			}
			resp := hooks.ask(t, tt.path, tt.before, tt.manifest)
			text := ""
			if !resp.Allowed {
				text = resp.Result.Message
			}
			if tt.wrong == "" && text != "" || !strings.Contains(text, tt.wrong) {
				t.Errorf("refused with %q, want %q", text, tt.wrong)
			}
			if code := max(tt.code, 400); tt.wrong != "" && resp.Result.Code != code {
				t.Errorf("code %d, want %d", resp.Result.Code, code)
			}
			if warnings := strings.Join(resp.Warnings, "\n"); tt.warning == "" && warnings != "" ||
				!strings.Contains(warnings, tt.warning) {
				t.Errorf("warnings %q, want %q", warnings, tt.warning)
			}
		})
	}
}

// labels are the labels of an active request for pod web-0.
const labels = `{"crr.apps.kruise.io/active":"true","crr.apps.kruise.io/node-name":"n1",` +
	`"crr.apps.kruise.io/pod-uid":"web-0-uid"}`

// filledPod has everything that requests have a copy of.
const filledPod = `
apiVersion: v1
kind: Pod
metadata: {namespace: ns, name: full, uid: full-uid}
spec:
  nodeName: n1
  terminationGracePeriodSeconds: 45
  containers:
  - {name: web, ports: [{name: bye, containerPort: 8080, protocol: TCP}],
      lifecycle: {preStop: {httpGet: {path: /bye, port: bye, scheme: HTTP}}}}
  - {name: exec, ports: [{containerPort: 81}], lifecycle: {preStop: {exec: {command: [bye]}}}}
  - {name: sleeper, lifecycle: {preStop: {sleep: {seconds: 3}}}}
  - {name: plain}
status:
  phase: Running
  containerStatuses:
  - {name: web, containerID: "containerd://w", restartCount: 3}
  - {name: exec, containerID: "containerd://e"}
  - {name: sleeper, containerID: "containerd://s"}
  - {name: plain, containerID: "containerd://p"}
`

// TestFill: the answer to a create has what OpenKruise's webhook fills in. The patch adds only
// values that are missing.
func TestFill(t *testing.T) {
	tests := []struct {
		name, manifest string
		want           map[string]string // by path; "" is any
	}{
		{"a pod on a node", crr + meta + "spec: {podName: web-0, containers: [{name: app}, {name: mesh}]}",
			map[string]string{
				"/metadata/labels":                 labels,
				"/spec/containers/0/statusContext": `{"containerID":"containerd://a","restartCount":0}`,
				"/spec/containers/1/statusContext": `{"containerID":"containerd://m","restartCount":0}`,
			}},
		{"a copied manifest", strings.Replace(accepted, "pod-uid: web-0-uid", "pod-uid: other", 1), map[string]string{
			"/metadata/labels/crr.apps.kruise.io~1pod-uid": `"web-0-uid"`,
			"/spec/containers/0/statusContext":             `{"containerID":"containerd://a","restartCount":0}`,
		}},
		{"hooks, ports and grace",
			crr + meta + "spec: {podName: full, containers: [{name: web}, {name: exec, strategy: " +
				"{}}, {name: sleeper}, {name: plain}]}", map[string]string{
				"/metadata/labels":                 strings.Replace(labels, "web-0", "full", 1),
				"/spec/containers/0/statusContext": `{"containerID":"containerd://w","restartCount":3}`,
				"/spec/containers/0/preStop":       `{"httpGet":{"path":"/bye","port":"bye","scheme":"HTTP"}}`,
				"/spec/containers/0/ports":         `[{"containerPort":8080,"name":"bye","protocol":"TCP"}]`,
				"/spec/containers/1/statusContext": `{"containerID":"containerd://e","restartCount":0}`,
				"/spec/containers/1/preStop":       `{"exec":{"command":["bye"]}}`,
				"/spec/containers/2/statusContext": `{"containerID":"containerd://s","restartCount":0}`,
				"/spec/containers/3/statusContext": `{"containerID":"containerd://p","restartCount":0}`,
				"/spec/strategy":                   `{"terminationGracePeriodSeconds":45}`,
			}},
		{"a grace and a strategy of the user's own",
			crr + meta + "spec: {podName: full, containers: [{name: plain}], strategy: {failurePolicy: Fail, " +
				"terminationGracePeriodSeconds: 0}}", map[string]string{
				"/metadata/labels":                 strings.Replace(labels, "web-0", "full", 1),
				"/spec/containers/0/statusContext": `{"containerID":"containerd://p","restartCount":0}`,
			}},
		{"the strategy that the schema gives",
			crr + meta + "spec: {podName: full, containers: [{name: plain}], strategy: {failurePolicy: Fail}}",
			map[string]string{
				"/metadata/labels":                             strings.Replace(labels, "web-0", "full", 1),
				"/spec/containers/0/statusContext":             `{"containerID":"containerd://p","restartCount":0}`,
				"/spec/strategy/terminationGracePeriodSeconds": "45",
			}},
		{"a container that is not there", crr + meta + "spec: {podName: web-0, containers: [{name: app}, {name: ap}]}",
			map[string]string{
				"/metadata/labels":                 labels,
				"/spec/containers/0/statusContext": `{"containerID":"containerd://a","restartCount":0}`,
			}},
		{"a pod on no node", crr + meta + "spec: {podName: waiting, containers: [{name: app}]}", nil},
		{"no pod", crr + meta + "spec: {podName: none, containers: [{name: app}]}", nil},
		{"what the schema refuses", crr + meta + "spec: {podName: 5, containers: x}", nil},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			resp := serve(t, reader(t, filledPod)).ask(t, PathDefaultRecreate, "", tt.manifest)
			if !resp.Allowed || len(resp.Warnings) > 0 {
				t.Fatalf("%+v", resp)
			}
			wantPatches(t, resp, tt.want)
		})
	}
}

// wantPatches compares the values that a patch adds or replaces, by path.
func wantPatches(t *testing.T, resp admission.Response, want map[string]string) {
	t.Helper()
	got := map[string]string{}
	for _, p := range resp.Patches {
		if p.Operation == "remove" {
			t.Errorf("patch %s", p.Json())
		}
		value, err := json.Marshal(p.Value)
		if err != nil {
			t.Fatal(err)
		}
		got[p.Path] = string(value)
	}
	if !maps.Equal(got, want) {
		t.Errorf("patches\n%v\nwant\n%v", got, want)
	}
}

// TestReadOnly: users may not set what the webhook fills in.
func TestReadOnly(t *testing.T) {
	for name, field := range map[string]string{
		"statusContext": `statusContext: {containerID: "containerd://a", restartCount: 0}`,
		"preStop":       "preStop: {exec: {command: [a]}}", "ports": "ports: [{containerPort: 80}]",
	} {
		t.Run(name, func(t *testing.T) {
			resp := serve(t, reader(t)).ask(t, PathDefaultRecreate, "",
				crr+meta+"spec: {podName: web-0, containers: [{name: app, "+field+"}]}")
			if resp.Allowed || resp.Result.Code != http.StatusBadRequest ||
				resp.Result.Message != "preStop, ports and statusContext are read-only: they are taken from the "+
					"pod, leave them out" {
				t.Errorf("%+v", resp)
			}
		})
	}
}

// TestRefill: a manifest that replaces a request has nothing of what was filled in, and changes
// nothing.
func TestRefill(t *testing.T) {
	const manifest = crr + meta + "spec: {podName: full, containers: [{name: web}], strategy: {failurePolicy: Fail}}"
	const before = crr + `
metadata:
  namespace: ns
  name: x
  uid: x-uid
  labels: {crr.apps.kruise.io/pod-uid: full-uid, crr.apps.kruise.io/node-name: n1, crr.apps.kruise.io/active: "true",
      mine: x}
  annotations:
    crr.apps.kruise.io/unready-acquired: "2026-01-01T00:00:00Z"
    cri-proxy.io/accepted: '{"request":"x-uid","podUID":"full-uid","nodeName":"n1"}'
    mine: x
spec:
  podName: full
  containers:
  - {name: web, statusContext: {containerID: "containerd://w", restartCount: 3},
      preStop: {httpGet: {path: /bye, port: bye}}, ports: [{containerPort: 8080}]}
  strategy: {failurePolicy: Fail, terminationGracePeriodSeconds: 45}
`
	containers := map[string]string{
		"/spec/containers/0/statusContext": `{"containerID":"containerd://w","restartCount":3}`,
		"/spec/containers/0/preStop":       `{"httpGet":{"path":"/bye","port":"bye"}}`,
		"/spec/containers/0/ports":         `[{"containerPort":8080}]`,
	}
	with := func(more map[string]string) map[string]string {
		all := maps.Clone(containers)
		maps.Copy(all, more)
		return all
	}
	annotations :=
		`{"cri-proxy.io/accepted":"{\"request\":\"x-uid\",\"podUID\":\"full-uid\",\"nodeName\":\"n1\"}",` +
			`"crr.apps.kruise.io/unready-acquired":"2026-01-01T00:00:00Z"}`
	filled := strings.Replace(labels, "web-0", "full", 1)
	grace := map[string]string{"/spec/strategy/terminationGracePeriodSeconds": "45", "/metadata/labels": filled,
		"/metadata/annotations": annotations}
	tests := []struct {
		name, before, manifest string
		want                   map[string]string
	}{
		{"the same manifest", before, manifest, with(grace)},
		{"the object as it is", before, before, nil},
		{"a note on it", before, strings.Replace(before, "mine: x", "mine: y", 2), nil},
		{"a completed one", before + "status: {completionTime: \"2026-01-01T00:00:00Z\"}\n", manifest,
			with(map[string]string{
				"/spec/strategy/terminationGracePeriodSeconds": "45", "/metadata/annotations": annotations,
				"/metadata/labels": `{"crr.apps.kruise.io/node-name":"n1","crr.apps.kruise.io/pod-uid":"full-uid"}`,
			})},
		{"a grace of the user's own taken away", strings.Replace(before, "Seconds: 45", "Seconds: 44", 1), manifest,
			with(map[string]string{
				"/metadata/labels": filled, "/metadata/annotations": annotations,
			})},
		{"a grace of the pod before this one",
			strings.ReplaceAll(strings.Replace(before, "Seconds: 45", "Seconds: 44", 1),
				"full-uid", "other-uid"), manifest, with(map[string]string{
				"/spec/strategy/terminationGracePeriodSeconds": "44",
				"/metadata/labels":      strings.Replace(filled, "full-uid", "other-uid", 1),
				"/metadata/annotations": strings.Replace(annotations, "full-uid", "other-uid", 1),
			})},
		{"another container", before, strings.Replace(manifest, "name: web", "name: plain", 1), grace},
		{"other values", before, strings.NewReplacer("pod-uid: full-uid", "pod-uid: y", "containerd://w",
			"containerd://y",
			"Seconds: 45", "Seconds: 1").Replace(before), nil},
		{"one made without webhooks", manifest, manifest, nil},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			resp := serve(t, reader(t, filledPod)).ask(t, PathDefaultRecreate, tt.before, tt.manifest)
			if !resp.Allowed || len(resp.Warnings) > 0 {
				t.Fatalf("%+v", resp)
			}
			wantPatches(t, resp, tt.want)
		})
	}
}

// TestNothingDependsOnThem: the webhooks let through what they cannot check.
func TestNothingDependsOnThem(t *testing.T) {
	scheme, err := scheme.New()
	if err != nil {
		t.Fatal(err)
	}
	manifests := map[string]string{
		PathDefaultRecreate:  crr + meta + "spec: {podName: web-0, containers: [{name: app}]}",
		PathValidateRecreate: crr + meta + "spec: {podName: web-0, containers: [{name: app}]}",
		PathValidateRollout:  active("x", "podName: p", "app"),
	}
	for name, get := range map[string]func(){"an error": func() {}, "a panic": func() { panic("a bug") }} {
		from := fake.NewClientBuilder().WithScheme(scheme).WithInterceptorFuncs(interceptor.Funcs{
			Get: func(context.Context, client.WithWatch, client.ObjectKey, client.Object, ...client.GetOption) error {
				get()
				return errors.New("etcd is away")
			},
		}).Build()
		for path, manifest := range manifests {
			t.Run(name+path, func(t *testing.T) {
				resp := serve(t, from).ask(t, path, "", manifest)
				if !resp.Allowed || len(resp.Patches) > 0 {
					t.Errorf("%+v", resp)
				}
				if path != PathDefaultRecreate &&
					(len(resp.Warnings) != 1 ||
						!strings.Contains(resp.Warnings[0], "status will say whether it can be carried out")) {
					t.Errorf("warnings %q", resp.Warnings)
				}
			})
		}
	}
}

// TestConfigurations: the manifests name the paths that are served, and nothing on which users
// depend.
func TestConfigurations(t *testing.T) {
	text, err := os.ReadFile(filepath.Join("..", "..", "deploy", "webhook", "configurations.yaml"))
	if err != nil {
		t.Fatal(err)
	}
	hooks := serve(t, reader(t))
	named := map[string]bool{}
	for _, document := range strings.Split(string(text), "\n---\n") {
		webhooks, _, err := unstructured.NestedSlice(object2(t, document).Object, "webhooks")
		if err != nil {
			t.Fatal(err)
		}
		for _, w := range webhooks {
			hook := w.(map[string]any)
			path, _, _ := unstructured.NestedString(hook, "clientConfig", "service", "path")
			named[path] = true
			if hooks[path] == nil {
				t.Errorf("%v: nothing is served at %s", hook["name"], path)
			}
			if hook["failurePolicy"] != "Ignore" || hook["sideEffects"] != "None" ||
				hook["matchPolicy"] != "Equivalent" {
				t.Errorf("%v: %v", hook["name"], hook)
			}
			rules, _, _ := unstructured.NestedSlice(hook, "rules")
			for _, r := range rules {
				operations, _, _ := unstructured.NestedStringSlice(r.(map[string]any), "operations")
				resources, _, _ := unstructured.NestedStringSlice(r.(map[string]any), "resources")
				if slices.Contains(operations, "DELETE") || slices.Contains(operations, "*") ||
					strings.ContainsAny(strings.Join(resources, ","), "*/") {
					t.Errorf("%v: %v of %v", hook["name"], operations, resources)
				}
			}
		}
	}
	if len(named) != len(hooks) {
		t.Errorf("%d paths are served, and the manifests name %v", len(hooks), named)
	}
}
