// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package deploy

import (
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"testing"
	"time"

	discoveryv1 "k8s.io/api/discovery/v1"
	"sigs.k8s.io/controller-runtime/pkg/client"

	"github.com/cri-proxy/cri-proxy/api/apps/v1beta1"
	inplace "github.com/cri-proxy/cri-proxy/api/inplace/v1alpha1"
)

// testImage pushes the controller's image, twice: equal sources give the same one.
func testImage(t *testing.T) {
	build := func() string {
		// a commit meanwhile is no difference
		out, err := program(t, "run", "./image", "-dir", root, "-platforms", "linux/"+runtime.GOARCH, "-insecure",
			"-buildvcs=false",
			"-to", imageRef+":"+tag, "github.com/cri-proxy/cri-proxy/cmd/cri-controller")
		must(t, err)
		lines := strings.Split(strings.TrimSpace(out), "\n")
		return lines[len(lines)-1]
	}
	first, second := build(), build()
	if first != second || !strings.HasPrefix(first, imageRef+"@sha256:") {
		t.Errorf("built %s, then %s", first, second)
	}
}

// certificateLife is short, so that all of them are renewed while the story goes on.
const certificateLife = "1m"

// testKustomize installs as the README says and sees the controller work.
func testKustomize(t *testing.T) {
	kubectl(t, "apply", "-k", overlay(t))
	pods := controllers(t, "cri-proxy-system")
	name, _ := leader(t, "cri-proxy-system", "")
	if name != pods[0].Name && name != pods[1].Name {
		t.Errorf("%s leads, and the pods are %s and %s", name, pods[0].Name, pods[1].Name)
	}

	t.Run("there is no shell", func(t *testing.T) {
		out, err := bed.Kubectl(t.Context(), "-n", "cri-proxy-system", "exec", name, "--", "sh", "-c", "id")
		if err == nil || !strings.Contains(err.Error(), "executable file not found") {
			t.Errorf("%v %s", err, out)
		}
	})
	t.Run("the process is nobody", func(t *testing.T) {
		for _, p := range pods {
			status, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", pid(t, &p)))
			must(t, err)
			for _, want := range []string{"\nUid:\t65532\t65532\t", "\nGid:\t65532\t65532\t",
				"\nCapEff:\t0000000000000000\n", "\nNoNewPrivs:\t1\n", "\nSeccomp:\t2\n"} {
				if !strings.Contains(string(status), want) {
					t.Errorf("%q is not in\n%s", want, status)
				}
			}
		}
	})
	t.Run("metrics", func(t *testing.T) {
		eventually(t, "the Service has both pods", func() (string, bool) {
			var slices discoveryv1.EndpointSliceList
			must(t, api.List(t.Context(), &slices, client.InNamespace("cri-proxy-system"),
				client.MatchingLabels{"kubernetes.io/service-name": "cri-controller-metrics"}))
			n := 0
			for _, s := range slices.Items {
				n += len(s.Endpoints)
			}
			return fmt.Sprint(n, " endpoints"), n == 2
		})
		for _, p := range pods {
			c := http.Client{Timeout: 5 * time.Second}
			resp, err := c.Get("http://" + p.Status.PodIP + ":8080/metrics")
			must(t, err)
			text, err := io.ReadAll(resp.Body)
			resp.Body.Close()
			must(t, err)
			if !strings.Contains(string(text), "\ncriproxy_controller_") {
				t.Errorf("pod %s has no metrics of its own", p.Name)
			}
		}
	})
	t.Run("a pull and a rollout", func(t *testing.T) {
		must(t, bed.CreateNamespace(t.Context(), "first"))
		startWork(t, "first", 1, 4)
		finishWork(t, "first", 1)
	})
}

// overlay is a kustomization as a user has one, and what the bed lacks: see the package comment.
func overlay(t *testing.T) string {
	t.Helper()
	dir := t.TempDir()
	base, err := filepath.Rel(dir, filepath.Join(root, "deploy"))
	must(t, err)
	host, port := apiServer(t)
	patch, err := json.Marshal([]map[string]any{
		{"op": "add", "path": "/spec/template/spec/containers/0/args/-", "value": "--node-port=" + opsPort()},
		{"op": "add", "path": "/spec/template/spec/containers/0/args/-", "value": "--certificate-life=" +
			certificateLife},
		{"op": "add", "path": "/spec/template/spec/containers/0/args/-", "value": "--node-condition-period=1s"},
		{"op": "add", "path": "/spec/template/spec/containers/0/env", "value": []map[string]string{
			{"name": "KUBERNETES_SERVICE_HOST", "value": host}, {"name": "KUBERNETES_SERVICE_PORT", "value": port},
		}},
	})
	must(t, err)
	text, err := json.Marshal(map[string]any{
		"apiVersion": "kustomize.config.k8s.io/v1beta1", "kind": "Kustomization",
		"resources": []string{base},
		"images":    []map[string]string{{"name": "cri-controller", "newName": imageRef, "newTag": tag}},
		"patches":   []map[string]any{{"target": map[string]string{"kind": "Deployment"}, "patch": string(patch)}},
	})
	must(t, err)
	must(t, os.WriteFile(filepath.Join(dir, "kustomization.yaml"), text, 0o644))
	return dir
}

// opsPort is where the bed's proxy listens for commands.
func opsPort() string { return bed.OpsAddress[strings.LastIndex(bed.OpsAddress, ":")+1:] }

// startWork begins a rollout over that many pods, and a pull of 2 MiB/s that takes about as many
// seconds.
func startWork(t *testing.T, namespace string, pods, seconds int) {
	t.Helper()
	must(t, bed.PushLargeImage(t.Context(), namespace+":1", 2, seconds))
	startRollout(t, namespace, pods)
	startPull(t, namespace)
}

func startRollout(t *testing.T, namespace string, pods int) {
	t.Helper()
	apply(t, fmt.Sprintf(`
apiVersion: apps/v1
kind: StatefulSet
metadata: {name: shop, namespace: %[1]s}
spec:
  replicas: %[2]d
  podManagementPolicy: Parallel
  updateStrategy: {type: OnDelete}
  serviceName: shop
  selector: {matchLabels: {app: shop}}
  template:
    metadata: {labels: {app: shop}}
    spec:
      terminationGracePeriodSeconds: 2
      containers:
      - {name: app, image: "%[3]s"}
`, namespace, pods, bed.Image("app:1")))
	eventually(t, "the pods are ready", func() (string, bool) {
		ready := 0
		for _, p := range shop(t, namespace) {
			if isReady(&p) {
				ready++
			}
		}
		return fmt.Sprint(ready, " are"), ready == pods
	})
	apply(t, fmt.Sprintf(`
apiVersion: cri-proxy.io/v1alpha1
kind: InPlaceRollout
metadata: {name: shop, namespace: %[1]s}
spec:
  target: {workloadRef: {kind: StatefulSet, name: shop}}
  containers: [{name: app, image: "%[2]s"}]
  strategy: {maxUnavailable: 1, minReadySeconds: 2}
`, namespace, bed.Image("app:2")))
}

func startPull(t *testing.T, namespace string) {
	t.Helper()
	apply(t, fmt.Sprintf(`
apiVersion: apps.kruise.io/v1beta1
kind: ImagePullJob
metadata: {name: ahead, namespace: %[1]s, annotations: {cri-proxy.io/bytes-per-second: 2Mi}}
spec: {image: "%[2]s", completionPolicy: {type: Always}}
`, namespace, bed.Image(namespace+":1")))
}

func rollout(t *testing.T, namespace string) *inplace.InPlaceRollout {
	t.Helper()
	r := &inplace.InPlaceRollout{}
	must(t, api.Get(t.Context(), client.ObjectKey{Namespace: namespace, Name: "shop"}, r))
	return r
}

func job(t *testing.T, namespace string) *v1beta1.ImagePullJob {
	t.Helper()
	j := &v1beta1.ImagePullJob{}
	must(t, api.Get(t.Context(), client.ObjectKey{Namespace: namespace, Name: "ahead"}, j))
	return j
}
