// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package deploy

import (
	"context"
	"crypto/tls"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	admissionv1 "k8s.io/api/admissionregistration/v1"
	corev1 "k8s.io/api/core/v1"
	discoveryv1 "k8s.io/api/discovery/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"sigs.k8s.io/controller-runtime/pkg/client"
	"sigs.k8s.io/yaml"

	appsv1alpha1 "github.com/cri-proxy/cri-proxy/api/apps/v1alpha1"
	inplace "github.com/cri-proxy/cri-proxy/api/inplace/v1alpha1"
)

// targets are what deploy/examples and the requests below are about.
const targets = `
apiVersion: v1
kind: Pod
metadata: {namespace: pod-namespace, name: my-pod, labels: {app: lone}}
spec:
  terminationGracePeriodSeconds: 0
  initContainers: [{name: setup, image: "%[2]s", command: ["true"]}]
  containers: [{name: app, image: "%[1]s"}]
---
apiVersion: apps/v1
kind: Deployment
metadata: {namespace: pod-namespace, name: my-deployment}
spec:
  replicas: 0
  selector: {matchLabels: {app: d}}
  template:
    metadata: {labels: {app: d}}
    spec: {containers: [{name: app, image: "%[1]s"}, {name: sidecar, image: "%[1]s"}], readinessGates: [{conditionType: cri-proxy.io/in-place-ready}]}
---
apiVersion: apps/v1
kind: StatefulSet
metadata: {namespace: pod-namespace, name: my-statefulset}
spec:
  replicas: 0
  serviceName: s
  updateStrategy: {type: OnDelete}
  selector: {matchLabels: {app: s}}
  template:
    metadata: {labels: {app: s}}
    spec: {containers: [{name: app, image: "%[1]s"}]}
---
apiVersion: apps/v1
kind: StatefulSet
metadata: {namespace: pod-namespace, name: rolling}
spec:
  replicas: 0
  serviceName: r
  selector: {matchLabels: {app: r}}
  template:
    metadata: {labels: {app: r}}
    spec: {containers: [{name: app, image: "%[1]s"}]}
`

// testWebhooks: what is wrong is refused by kubectl apply with a text that helps, and nothing else
// is.
func testWebhooks(t *testing.T) {
	must(t, bed.CreateNamespace(t.Context(), "pod-namespace"))
	apply(t, fmt.Sprintf(targets, bed.Image("app:1"), bed.Image("busybox:1.0")))
	eventually(t, "the pod runs", func() (string, bool) {
		var p corev1.Pod
		must(t, api.Get(t.Context(), client.ObjectKey{Namespace: "pod-namespace", Name: "my-pod"}, &p))
		return fmt.Sprintf("%+v", p.Status), p.Status.Phase == corev1.PodRunning
	})

	// Kubelet has just been restarted, and where the controller manager sees a node that is not
	// ready it takes the pods out of their Services, until kubelet writes their status anew.
	// Webhooks without endpoints refuse nothing.
	controllers(t, "cri-proxy-system")
	eventually(t, "the webhooks answer, whichever replica is asked", func() (string, bool) {
		var list discoveryv1.EndpointSliceList
		must(t, api.List(t.Context(), &list, client.InNamespace("cri-proxy-system"),
			client.MatchingLabels{"kubernetes.io/service-name": webhookService(t)}))
		ready := 0
		for _, s := range list.Items {
			for _, e := range s.Endpoints {
				if e.Conditions.Ready == nil || *e.Conditions.Ready {
					ready++
				}
			}
		}
		err := api.Create(t.Context(), wrong("pod-namespace", "wrong"), client.DryRunAll)
		return fmt.Sprintf("%d endpoints; %v", ready, err), ready == 2 && err != nil &&
			strings.Contains(err.Error(), "no pod pod-namespace/none")
	})

	const (
		crr = "apiVersion: apps.kruise.io/v1alpha1\nkind: ContainerRecreateRequest\nmetadata: {namespace: " +
			"pod-namespace, name: bad}\nspec: "
		old = "apiVersion: apps.kruise.io/v1alpha1\nkind: ImagePullJob\nmetadata: {namespace: pod-namespace, name: " +
			"bad%s}\nspec: "
		job = "apiVersion: apps.kruise.io/v1beta1\nkind: ImagePullJob\nmetadata: {namespace: pod-namespace, name: " +
			"bad%s}\nspec: "
		list = "apiVersion: apps.kruise.io/v1alpha1\nkind: ImageListPullJob\nmetadata: {namespace: pod-namespace, " +
			"name: bad%s}\nspec: "
		ipr = "apiVersion: cri-proxy.io/v1alpha1\nkind: InPlaceRollout\nmetadata: {namespace: pod-namespace, name: " +
			"bad}\nspec: "
	)
	plain, slow := "", ", annotations: {cri-proxy.io/bytes-per-second: slow}"
	for _, tt := range []struct{ name, manifest, want string }{
		// By the webhooks.
		{"a pod that is not there", crr + "{podName: my-pot, containers: [{name: app}]}",
			"no pod pod-namespace/my-pot: podName must name a pod in the namespace of the request"},
		{"a container that is not there", crr + "{podName: my-pod, containers: [{name: web}]}",
			"pod my-pod has no container web; it has app"},
		{"an init container", crr + "{podName: my-pod, containers: [{name: setup}]}",
			"only regular containers and init containers with restartPolicy Always can be recreated"},
		{"an image that is none", fmt.Sprintf(old, plain) + "{image: a@sha256:" + strings.Repeat("a", 40) +
			", completionPolicy: {}}", "is no image reference"},
		{"a speed that is none", fmt.Sprintf(job, slow) + "{image: a, completionPolicy: {}}",
			"it must be a quantity of bytes, such as 20Mi"},
		{"a speed that is none, in the older version", fmt.Sprintf(old, slow) + "{image: a, completionPolicy: {}}",
			"it must be a quantity of bytes, such as 20Mi"},
		{"a selector that is none", fmt.Sprintf(job, plain) +
			"{image: a, completionPolicy: {}, selector: {matchExpressions: [{key: a, operator: In}]}}",
			"spec.selector: "},
		{"a list with a speed that is none", fmt.Sprintf(list, slow) + "{images: [a, b], completionPolicy: {}}",
			"it must be a quantity of bytes, such as 20Mi"},
		{"a StatefulSet that rolls by itself",
			ipr + "{target: {workloadRef: {kind: StatefulSet, name: rolling}}, containers: [{name: app, image: b}]}",
			"set updateStrategy.type to OnDelete"},
		{"a template without the container",
			ipr + "{target: {workloadRef: {kind: Deployment, name: my-deployment}}, containers: [{name: web, image: " +
				"b}]}", "has no container web that can be changed in place; it has app, sidecar"},
		{"a pod without the container", ipr + "{target: {podName: my-pod}, containers: [{name: web}]}",
			"has no container web that can be restarted in place; it has app"},
		// By the schema.
		{"an empty podName", crr + `{podName: "", containers: [{name: app}]}`,
			"podName can not be empty: name a pod in the namespace of the request"},
		{"no containers", crr + "{podName: my-pod, containers: []}",
			"containers list can not be empty: name at least one container of the pod"},
		{"a container twice", crr + "{podName: my-pod, containers: [{name: app}, {name: app}]}",
			`Duplicate value: {"name":"app"}`},
		{"too short a deadline", crr + "{podName: my-pod, containers: [{name: app}], activeDeadlineSeconds: 2}",
			"activeDeadlineSeconds can not be less than 3"},
		{"a negative grace",
			crr + "{podName: my-pod, containers: [{name: app}], strategy: {terminationGracePeriodSeconds: -1}}",
			"spec.strategy.terminationGracePeriodSeconds"},
		{"an unknown policy", crr + "{podName: my-pod, containers: [{name: app}], strategy: {failurePolicy: Maybe}}",
			`supported values: "Fail", "Ignore"`},
		{"read-only fields", crr + "{podName: my-pod, containers: [{name: app, statusContext: {containerID: x, " +
			"restartCount: 1}}]}",
			"preStop, ports and statusContext are read-only: they are taken from the pod, leave them out"},
		{"two ways to choose nodes", fmt.Sprintf(job, plain) +
			"{image: a, completionPolicy: {}, selector: {names: [node]}, podSelector: {matchLabels: {a: b}}}",
			"selector and podSelector exclude each other"},
		{"a job without end with a deadline", fmt.Sprintf(job, plain) +
			"{image: a, completionPolicy: {type: Never, activeDeadlineSeconds: 700}}",
			"can only work with type Always"},
		{"no target", ipr + "{target: {}, containers: [{name: app}]}",
			"choose the pods by exactly one of podName, selector and workloadRef"},
		{"nothing unavailable",
			ipr + "{target: {podName: my-pod}, containers: [{name: app}], strategy: {maxUnavailable: 0}}",
			"maxUnavailable must be a number from 1 or a percentage from 1% to 100%"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			if err := bed.KubectlApply(t.Context(), tt.manifest); err == nil ||
				!strings.Contains(err.Error(), tt.want) {
				t.Errorf("%v\nwant %q", err, tt.want)
			}
		})
	}

	t.Run("examples", func(t *testing.T) {
		files, err := filepath.Glob(filepath.Join(root, "deploy", "examples", "*.yaml"))
		must(t, err)
		if len(files) < 5 {
			t.Fatal(files)
		}
		for _, file := range files {
			text, err := os.ReadFile(file)
			must(t, err)
			for range 2 { // the second time nothing may be changed, and nothing refused
				if err := bed.KubectlApply(t.Context(), string(text)); err != nil {
					t.Errorf("%s: %v", filepath.Base(file), err)
				}
			}
			kubectl(t, "apply", "--server-side", "--force-conflicts", "-f", file)
		}
	})
	t.Run("what create returns is filled in", func(t *testing.T) {
		r := request("pod-namespace", "labelled")
		must(t, api.Create(t.Context(), r))
		var p corev1.Pod
		must(t, api.Get(t.Context(), client.ObjectKey{Namespace: "pod-namespace", Name: "my-pod"}, &p))
		filled := func(r *appsv1alpha1.ContainerRecreateRequest) {
			t.Helper()
			if l := r.Labels; l[appsv1alpha1.PodUIDLabel] != string(p.UID) ||
				l[appsv1alpha1.NodeNameLabel] != p.Spec.NodeName {
				t.Errorf("labels %v of a request for pod %s on %s", l, p.UID, p.Spec.NodeName)
			}
			if c := r.Spec.Containers[0].StatusContext; c == nil || !strings.HasPrefix(c.ContainerID, "containerd://") {
				t.Errorf("statusContext %+v", c)
			}
			if g := r.Spec.Strategy.TerminationGracePeriodSeconds; g == nil ||
				*g != *p.Spec.TerminationGracePeriodSeconds {
				t.Errorf("grace %v", g)
			}
		}
		filled(r)
		if r.Labels[appsv1alpha1.ActiveLabel] != "true" {
			t.Errorf("labels %v", r.Labels)
		}
		// The manifest in its place, as by kubectl replace, changes nothing.
		eventually(t, "it is put in its place", func() (string, bool) {
			now, again := request("pod-namespace", "labelled"), request("pod-namespace", "labelled")
			must(t, api.Get(t.Context(), client.ObjectKeyFromObject(now), now))
			again.ResourceVersion = now.ResourceVersion
			err := api.Update(t.Context(), again)
			if err != nil && !apierrors.IsConflict(err) {
				t.Fatal(err)
			}
			r = again
			return fmt.Sprint(err), err == nil
		})
		filled(r)
	})
	t.Run("labels of an accepted request", func(t *testing.T) {
		eventually(t, "the request is accepted", func() (string, bool) {
			r := request("pod-namespace", "labelled")
			must(t, api.Get(t.Context(), client.ObjectKeyFromObject(r), r))
			return fmt.Sprintf("%+v", r), r.Annotations["cri-proxy.io/accepted"] != ""
		})
		_, err := bed.Kubectl(t.Context(), "-n", "pod-namespace", "label", "crr", "labelled", "--overwrite",
			appsv1alpha1.PodUIDLabel+"=other")
		if err == nil || !strings.Contains(err.Error(), "label crr.apps.kruise.io/pod-uid is immutable") {
			t.Error(err)
		}
	})
	t.Run("two rollouts of one container", func(t *testing.T) {
		// The first one waits for its pod, which has a container of that name only later.
		apply(t, strings.Replace(ipr, "name: bad", "name: first", 1)+"{target: {podName: later}, paused: true, "+
			"containers: [{name: app, image: b}]}")
		second := ipr + "{target: {podName: later}, containers: [{name: app, image: c}]}"
		eventually(t, "every replica's cache has the first", func() (string, bool) {
			for range 4 { // requests come to either of them
				var r inplace.InPlaceRollout
				must(t, yaml.Unmarshal([]byte(second), &r))
				if err := api.Create(t.Context(), &r, client.DryRunAll); err == nil ||
					!strings.Contains(err.Error(), "is at work") {
					return fmt.Sprint(err), false
				}
			}
			return "", true
		})
		err := bed.KubectlApply(t.Context(), second)
		if err == nil ||
			!strings.Contains(err.Error(),
				"InPlaceRollout first is at work on container app of pod later: wait for its end") {
			t.Error(err)
		}
	})
}

// webhookService is the Service that the API server asks.
func webhookService(t *testing.T) string {
	t.Helper()
	var v admissionv1.ValidatingWebhookConfiguration
	must(t, api.Get(t.Context(), client.ObjectKey{Name: "cri-controller"}, &v))
	return v.Webhooks[0].ClientConfig.Service.Name
}

func request(namespace, name string) *appsv1alpha1.ContainerRecreateRequest {
	return &appsv1alpha1.ContainerRecreateRequest{
		ObjectMeta: metav1.ObjectMeta{Namespace: namespace, Name: name},
		Spec: appsv1alpha1.ContainerRecreateRequestSpec{
			PodName: "my-pod", Containers: []appsv1alpha1.ContainerRecreateRequestContainer{{Name: "app"}},
		},
	}
}

// wrong is an object that the webhooks refuse, and nobody else.
func wrong(namespace, name string) *appsv1alpha1.ContainerRecreateRequest {
	r := request(namespace, name)
	r.Spec.PodName = "none"
	return r
}

// testCertificate: while the certificate changes, no request of the API server to the webhooks
// fails: failures are ignored, so what is wrong would be let through.
func testCertificate(t *testing.T) {
	pods := controllers(t, "cri-proxy-system")
	before := serial(t, &pods[0])
	if other := serial(t, &pods[1]); other != before {
		t.Fatalf("the replicas show %s and %s", before, other)
	}
	ctx, stop := context.WithCancel(t.Context())
	var wg sync.WaitGroup
	var asked int
	wg.Go(func() {
		for ; ctx.Err() == nil; asked++ {
			err := api.Create(ctx, wrong("pod-namespace", fmt.Sprint("wrong-", asked)))
			if ctx.Err() == nil && (err == nil || !strings.Contains(err.Error(), "no pod pod-namespace/none")) {
				t.Errorf("request %d: %v", asked, err)
			}
		}
	})
	secret := []string{"-n", "cri-proxy-system", "patch", "secret", "cri-controller-webhook-tls", "--type=json", "-p",
		`[{"op": "remove", "path": "/data"}]`}
	for range 2 {
		kubectl(t, secret...)
		eventually(t, "both replicas show another certificate", func() (string, bool) {
			a, b := serial(t, &pods[0]), serial(t, &pods[1])
			return a + " " + b, a == b && a != before
		})
		before = serial(t, &pods[0])
	}
	stop()
	wg.Wait()
	t.Logf("%d requests while the certificate changed twice", asked)
	if asked < 20 {
		t.Errorf("only %d requests", asked)
	}

	// The manifests have neither certificate nor CA.
	kept := storedCertificate(t)
	for _, how := range [][]string{{"apply", "-k", overlay(t)},
		{"apply", "--server-side", "--force-conflicts", "-k", overlay(t)}} {
		kubectl(t, how...)
		if now := storedCertificate(t); now != kept || !strings.Contains(kept, "BEGIN CERTIFICATE") {
			t.Errorf("kubectl %s changed the certificate:\n%s\nwas\n%s", strings.Join(how, " "), now, kept)
		}
	}
	controllers(t, "cri-proxy-system")
}

// storedCertificate is what is stored of the webhooks' certificate: the Secret without the key, and
// the CAs of all webhooks.
func storedCertificate(t *testing.T) string {
	t.Helper()
	var s corev1.Secret
	must(t, api.Get(t.Context(), client.ObjectKey{Namespace: "cri-proxy-system", Name: "cri-controller-webhook-tls"},
		&s))
	var m admissionv1.MutatingWebhookConfiguration
	must(t, api.Get(t.Context(), client.ObjectKey{Name: "cri-controller"}, &m))
	var v admissionv1.ValidatingWebhookConfiguration
	must(t, api.Get(t.Context(), client.ObjectKey{Name: "cri-controller"}, &v))
	text := string(s.Data["tls.crt"])
	for _, w := range m.Webhooks {
		text += w.Name + "\n" + string(w.ClientConfig.CABundle)
	}
	for _, w := range v.Webhooks {
		text += w.Name + "\n" + string(w.ClientConfig.CABundle)
	}
	return text
}

// serial is that of the certificate that a pod shows.
func serial(t *testing.T, pod *corev1.Pod) string {
	t.Helper()
	insecure := &tls.Config{InsecureSkipVerify: true} //nolint:gosec // it is looked at, not trusted
	d := tls.Dialer{NetDialer: &net.Dialer{Timeout: 5 * time.Second}, Config: insecure}
	conn, err := d.DialContext(t.Context(), "tcp", pod.Status.PodIP+":9443")
	must(t, err)
	defer conn.Close()
	return conn.(*tls.Conn).ConnectionState().PeerCertificates[0].SerialNumber.String()
}

// testAway: without a controller everything can be created, changed and deleted, that of before
// too.
func testAway(t *testing.T) {
	must(t, api.Create(t.Context(), request("pod-namespace", "kept")))
	eventually(t, "the request is accepted", func() (string, bool) {
		r := request("pod-namespace", "kept")
		must(t, api.Get(t.Context(), client.ObjectKeyFromObject(r), r))
		// the finalizer goes when it is done, which is soon
		return fmt.Sprintf("%+v", r), r.Annotations["cri-proxy.io/accepted"] != ""
	})
	kubectl(t, "-n", "cri-proxy-system", "scale", "deployment/cri-controller", "--replicas=0")
	eventually(t, "the controllers are gone", func() (string, bool) {
		var list corev1.PodList
		must(t, api.List(t.Context(), &list, client.InNamespace("cri-proxy-system")))
		return fmt.Sprint(len(list.Items), " pods"), len(list.Items) == 0
	})
	must(t, api.Create(t.Context(), wrong("pod-namespace", "unchecked")))
	kubectl(t, "-n", "pod-namespace", "annotate", "ipr", "--all", "note=x")
	must(t, api.Delete(t.Context(), request("pod-namespace", "unchecked")))
	kept := request("pod-namespace", "kept")
	must(t, api.Delete(t.Context(), kept))
	if err := api.Get(t.Context(), client.ObjectKeyFromObject(kept), kept); err == nil {
		kubectl(t, "-n", "pod-namespace", "patch", "crr", "kept", "--type=merge", "-p",
			`{"metadata":{"finalizers":null}}`)
	}
	if err := api.Get(t.Context(), client.ObjectKeyFromObject(kept), kept); !apierrors.IsNotFound(err) {
		t.Errorf("it is there still: %v", err)
	}
	kubectl(t, "-n", "cri-proxy-system", "scale", "deployment/cri-controller", "--replicas=2")
	controllers(t, "cri-proxy-system")
	kubectl(t, "delete", "namespace", "pod-namespace", "--wait=false")
}
