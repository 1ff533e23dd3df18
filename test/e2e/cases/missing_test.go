// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package cases

import (
	"fmt"
	"strings"
	"testing"

	corev1 "k8s.io/api/core/v1"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"
)

// TestMissing asks for restarts of containers that kubelet could not make anew. Each is refused in
// kubelet's words, and the old container runs on as if nothing had been asked.
func TestMissing(t *testing.T) {
	t.Parallel()
	ns := namespace(t)
	never, always := moveTag(t, "busybox:missing", "busybox:1.0"), bed.Image("missing-always:1")
	crane(t, "mutate", bed.Image("busybox:1.0"), "-t", always, "--label", "of=TestMissing")
	cases := []struct {
		name string
		// spec is that of the container, volumes that of the pod.
		spec, volumes string
		// words are what kubelet says, where it does not always say the same, or names a directory
		// of the machine.
		words string
	}{
		{name: "env-config-map", spec: `env: [{name: A, valueFrom: {configMapKeyRef: {name: whole, key: a}}}]`},
		{name: "upgrade", spec: `env: [{name: A, valueFrom: {configMapKeyRef: {name: whole, key: a}}}]`},
		{name: "env-secret", spec: `env: [{name: A, valueFrom: {secretKeyRef: {name: whole, key: a}}}]`},
		{name: "env-config-map-key", spec: `env: [{name: A, valueFrom: {configMapKeyRef: {name: part, key: a}}}]`},
		{name: "env-secret-key", spec: `env: [{name: A, valueFrom: {secretKeyRef: {name: part, key: a}}}]`},
		{name: "env-from-config-map", spec: `envFrom: [{configMapRef: {name: part}}, {configMapRef: {name: whole}}]`},
		{name: "env-from-secret", spec: `envFrom: [{secretRef: {name: whole}}]`},
		{
			name:    "env-file-key",
			spec:    `env: [{name: A, valueFrom: {fileKeyRef: {volumeName: work, path: one/settings, key: A}}}]`,
			volumes: `[{name: work, emptyDir: {}}]`,
			words:   `environment variable key "A" not found in file`,
		},
		{
			name:    "sub-path-leads-out",
			spec:    `volumeMounts: [{name: work, mountPath: /work}, {name: work, mountPath: /sub, subPath: one}]`,
			volumes: `[{name: work, emptyDir: {}}]`,
			words:   `failed to prepare subPath for volumeMount "work"`,
		},
		{
			name: "sub-path-steps-up",
			spec: `volumeMounts: [{name: work, mountPath: /work}, {name: work, mountPath: /sub, subPathExpr: "$(NOTE)"}]
    env: [{name: NOTE, valueFrom: {fieldRef: {fieldPath: "metadata.annotations['note']"}}}]`,
			volumes: `[{name: work, emptyDir: {}}]`,
		},
		{
			name: "sub-path-of-unknown",
			spec: `volumeMounts: [{name: work, mountPath: /sub, subPathExpr: "$(A)"}]
    env: [{name: A, valueFrom: {configMapKeyRef: {name: part, key: a, optional: true}}}]`,
			volumes: `[{name: work, emptyDir: {}}]`,
		},
		{name: "image-never", spec: "image: " + never + "\n    imagePullPolicy: Never"},
		{name: "image-always", spec: "image: " + always + "\n    imagePullPolicy: Always", words: "not found"},
	}
	pods := fmt.Sprintf(`
apiVersion: v1
kind: ConfigMap
metadata: {name: whole, namespace: %[1]s}
data: {a: x, b: x}
---
apiVersion: v1
kind: ConfigMap
metadata: {name: part, namespace: %[1]s}
data: {a: x, b: x}
---
apiVersion: v1
kind: Secret
metadata: {name: whole, namespace: %[1]s}
stringData: {a: x, b: x}
---
apiVersion: v1
kind: Secret
metadata: {name: part, namespace: %[1]s}
stringData: {a: x, b: x}
---
`, ns)
	// With Never, the image must be there already; its name is one that kubelet has pulled from
	// before, or else kubelet doubts whether the pod may have it.
	pullOnNode(t, never)
	for _, c := range cases {
		image, volumes, setup := "\n    image: "+bed.Image("busybox:1.0"), "", ""
		if strings.HasPrefix(c.spec, "image:") {
			image = ""
		}
		if c.volumes != "" {
			volumes = "\n  volumes: " + c.volumes
			setup = fmt.Sprintf(`
  initContainers:
  - name: setup
    image: %s
    command: [sh, -c, "mkdir /work/one; echo \"A='x'\" >/work/one/settings"]
    volumeMounts: [{name: work, mountPath: /work}]`, bed.Image("busybox:1.0"))
		}
		pods += fmt.Sprintf(`
apiVersion: v1
kind: Pod
metadata: {name: %s, namespace: %s, annotations: {note: one}}
spec:
  terminationGracePeriodSeconds: 2%s%s
  containers:
  - name: app%s
    command: [sh, -c, %s]
    %s
---
`, c.name, ns, volumes, setup, image, loop, c.spec)
	}
	create(t, pods)
	before := allReady(t, ns)

	// What they need goes.
	kubectl(t, "-n", ns, "delete", "configmap/whole", "secret/whole")
	for _, kind := range []string{"configmap", "secret"} {
		kubectl(t, "-n", ns, "patch", kind, "part", "--type=json", "-p", `[{"op":"remove","path":"/data/a"}]`)
	}
	root := fmt.Sprintf("%s/kubelet/pods/%s/volumes/kubernetes.io~empty-dir/work", bed.NodeDir,
		before["env-file-key"].UID)
	writeFile(t, root+"/one/settings", "B='x'\n")
	kubectl(t, "-n", ns, "exec", "sub-path-leads-out", "--", "sh", "-c", "mv /work/one /work/was; ln -s /etc /work/one")
	kubectl(t, "-n", ns, "annotate", "pods", "sub-path-steps-up", "--overwrite", "note=../one")
	removeFromNode(t, never)
	crane(t, "delete", always)

	requests := rollout(ns, "upgrade", "{podName: upgrade}", bed.Image("busybox:2.0"), "progressDeadlineSeconds: 30")
	for _, c := range cases {
		if c.name == "upgrade" {
			continue
		}
		requests += recreate(ns, c.name, c.name, "containers: [{name: app}]")
	}
	apply(t, requests)
	told := map[string]string{}
	for _, c := range cases {
		if c.name == "upgrade" {
			told[c.name] = complete(ended(t, ns, c.name))
			continue
		}
		told[c.name] = outcome(completed(t, ns, c.name))
	}
	after := map[string]*corev1.Pod{}
	for _, c := range cases {
		after[c.name] = getPod(t, ns, c.name)
		if container(t, after[c.name], "app").State.Running != nil {
			endProcess(t, after[c.name], "app") // kubelet is the judge
		}
	}
	for _, c := range cases {
		t.Run(c.name, func(t *testing.T) {
			now := after[c.name]
			was, is := container(t, before[c.name], "app"), container(t, now, "app")
			if is.ContainerID != was.ContainerID || is.State.Running == nil || is.RestartCount != 0 {
				t.Errorf("the old container was touched: it was %s and is %s", states(before[c.name]), states(now))
			}
			if now.Spec.Containers[0].Image != before[c.name].Spec.Containers[0].Image {
				t.Errorf("the pod's image is %s", now.Spec.Containers[0].Image)
			}
			if told[c.name] == "" {
				t.Fatal("the request has succeeded")
			}
			words := ""
			eventually(t, "kubelet says why it makes no container", func() bool {
				w := container(t, getPod(t, ns, c.name), "app").State.Waiting
				// It may say at first that it waits before the next attempt.
				if w == nil || w.Message == "" || w.Reason == "CrashLoopBackOff" {
					return false
				}
				words = w.Message
				return true
			})
			want := words
			if c.words != "" {
				want = c.words
			}
			if !strings.Contains(words, want) {
				t.Errorf("the test is wrong: kubelet says\n  %s", words)
			}
			if !strings.Contains(told[c.name], want) {
				t.Errorf("the request says\n  %s\nkubelet says\n  %s", told[c.name], words)
			}
		})
	}
}

// imageService is containerd's, around the proxy.
func imageService(t testing.TB) runtimeapi.ImageServiceClient {
	t.Helper()
	conn, err := bed.DialRuntime()
	must(t, err)
	t.Cleanup(func() { _ = conn.Close() })
	return runtimeapi.NewImageServiceClient(conn)
}

func pullOnNode(t testing.TB, image string) {
	t.Helper()
	_, err := imageService(t).PullImage(t.Context(),
		&runtimeapi.PullImageRequest{Image: &runtimeapi.ImageSpec{Image: image}})
	must(t, err)
}

// removeFromNode removes a name of an image, and the image with its last name.
func removeFromNode(t testing.TB, image string) {
	t.Helper()
	_, err := imageService(t).RemoveImage(t.Context(),
		&runtimeapi.RemoveImageRequest{Image: &runtimeapi.ImageSpec{Image: image}})
	must(t, err)
}

// onNode says whether the node has an image of that name.
func onNode(t testing.TB, image string) bool {
	t.Helper()
	resp, err := imageService(t).ImageStatus(t.Context(),
		&runtimeapi.ImageStatusRequest{Image: &runtimeapi.ImageSpec{Image: image}})
	must(t, err)
	return resp.GetImage() != nil
}
