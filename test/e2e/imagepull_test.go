// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package e2e

import (
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	apiwatch "k8s.io/apimachinery/pkg/watch"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"
	"sigs.k8s.io/controller-runtime/pkg/client"

	"github.com/cri-proxy/cri-proxy/api/apps/v1beta1"
	"github.com/cri-proxy/cri-proxy/test/testbed"
)

// imageOnNode returns an image as containerd itself has it, or nil.
func imageOnNode(t testing.TB, image string) *runtimeapi.Image {
	t.Helper()
	conn, err := bed.DialRuntime()
	must(t, err)
	defer func() { _ = conn.Close() }()
	resp, err := runtimeapi.NewImageServiceClient(conn).
		ImageStatus(t.Context(), &runtimeapi.ImageStatusRequest{Image: &runtimeapi.ImageSpec{Image: image}})
	must(t, err)
	return resp.GetImage()
}

// pinned waits until an image of the node is, or is not any more, pinned: containerd's CRI plugin
// learns of labels by an event.
func pinned(t testing.TB, image string, want bool) {
	t.Helper()
	eventually(t, fmt.Sprintf("it is %v that %s is pinned", want, image), func() bool {
		got := imageOnNode(t, image)
		if got == nil {
			t.Fatalf("image %s is not there", image)
		}
		return got.GetPinned() == want
	})
}

// removeImage takes an image off the node, so that the test finds none of another one's.
func removeImage(t testing.TB, image string) {
	t.Helper()
	conn, err := bed.DialRuntime()
	must(t, err)
	defer func() { _ = conn.Close() }()
	_, err = runtimeapi.NewImageServiceClient(conn).
		RemoveImage(t.Context(), &runtimeapi.RemoveImageRequest{Image: &runtimeapi.ImageSpec{Image: image}})
	must(t, err)
}

// pulled waits until the job has completed and returns it.
func pulled(t testing.TB, ns, name string) *v1beta1.ImagePullJob {
	t.Helper()
	job := &v1beta1.ImagePullJob{}
	eventually(t, "job "+name+" has completed", func() bool {
		must(t, api.Get(t.Context(), client.ObjectKey{Namespace: ns, Name: name}, job))
		return job.Status.CompletionTime != nil
	})
	return job
}

// TestImagePullJob applies the manifest as found in the field, verbatim.
func TestImagePullJob(t *testing.T) {
	ns := namespace(t)
	const image = "docker.io/library/nginx:latest"
	removeImage(t, image)
	// Content of its own: kubelet pulls an image that it has pulled under another name before, to
	// see whether this pod may have it (KEP-2535).
	must(t, bed.PushLargeImage(t.Context(), "library/nginx:latest", 1, 1))
	root, err := testbed.SourceDir("")
	must(t, err)
	manifest, err := os.ReadFile(filepath.Join(root, "deploy", "examples", "nginx-preheat.yaml"))
	must(t, err)
	apply(t, strings.Replace(string(manifest), "metadata:\n", "metadata:\n  namespace: "+ns+"\n", 1))

	job := pulled(t, ns, "nginx-preheat")
	if s := job.Status; s.Desired != 1 || s.Succeeded != 1 || s.Failed != 0 || s.Active != 0 {
		t.Errorf("status: %+v", s)
	}
	pinned(t, image, true)
	columns := kubectl(t, "-n", ns, "get", "imagepulljob", "nginx-preheat", "--no-headers")
	if !strings.Contains(columns, "job has completed") || !strings.Contains(columns, "100") {
		t.Errorf("kubectl get imagepulljob: %q", columns)
	}

	// A pod that uses it starts without a pull.
	apply(t, fmt.Sprintf(`
apiVersion: v1
kind: Pod
metadata: {name: user, namespace: %s}
spec:
  terminationGracePeriodSeconds: 1
  containers: [{name: nginx, image: "nginx:latest", imagePullPolicy: IfNotPresent}]
`, ns))
	ready(t, ns, "user")
	for _, c := range kubeletCalls(t, "PullImage") {
		if c.Image == "nginx:latest" || c.Image == image {
			t.Errorf("kubelet pulled: %+v", c)
		}
	}

	// With the job goes the pin; the image stays.
	kubectl(t, "-n", ns, "delete", "imagepulljob", "nginx-preheat", "--timeout=60s")
	pinned(t, image, false)
}

// TestImagePullJobProgress watches a larger image, in the older version of the API and in the newer
// one.
func TestImagePullJobProgress(t *testing.T) {
	ns := namespace(t)
	image := pushed(t, "large:1", 4, 8)
	var before v1beta1.ImagePullJobList
	must(t, api.List(t.Context(), &before, client.InNamespace(ns)))
	watch, err := api.Watch(t.Context(), &before, client.InNamespace(ns),
		&client.ListOptions{Raw: &metav1.ListOptions{ResourceVersion: before.ResourceVersion}})
	must(t, err)
	defer watch.Stop()
	apply(t, fmt.Sprintf(`
apiVersion: apps.kruise.io/v1beta1
kind: ImagePullJob
metadata:
  name: large
  namespace: %s
  annotations: {cri-proxy.io/bytes-per-second: 8Mi}
spec:
  image: %s
  selector: {names: [%s]}
  completionPolicy: {type: Always, ttlSecondsAfterFinished: 1}
`, ns, image, bed.NodeName))
	seen := map[string]bool{}
	job := &v1beta1.ImagePullJob{}
	for gone := false; !gone; { // it is finished and goes by itself
		select {
		case e, ok := <-watch.ResultChan():
			if !ok {
				t.Fatalf("the watch has ended, status %+v", job.Status)
			}
			if now, is := e.Object.(*v1beta1.ImagePullJob); is {
				job = now
				seen[job.Status.Progress] = true
			}
			gone = e.Type == apiwatch.Deleted
		case <-time.After(2 * time.Minute):
			t.Fatalf("the job is there still, status %+v", job.Status)
		}
	}
	if job.Status.Succeeded != 1 {
		b, _ := json.Marshal(job.Status)
		t.Errorf("status at the end: %s", b)
	}
	t.Logf("progress: %v, status %+v", seen, job.Status)
	if len(seen) < 4 {
		t.Errorf("progress was only %v", seen)
	}
	if imageOnNode(t, image) == nil {
		t.Error("the image is not on the node")
	}
}

// TestImagePullJobFails says what is wrong, in words that a user can act on.
func TestImagePullJobFails(t *testing.T) {
	ns := namespace(t)
	job := func(name, image, more string) string {
		return fmt.Sprintf(`
---
apiVersion: apps.kruise.io/v1alpha1
kind: ImagePullJob
metadata: {name: %s, namespace: %s}
spec:
  image: %s
  completionPolicy: {type: Always}
  pullPolicy: {backoffLimit: 0, timeoutSeconds: 20}
  %s
`, name, ns, image, more)
	}
	apply(t, job("missing", bed.Image("no-such-image:1"), "")+job("nowhere", bed.Image("busybox:1.0"),
		"selector: {names: [no-such-node]}"))
	missing := pulled(t, ns, "missing")
	if s := missing.Status; s.Failed != 1 || len(s.FailedNodes) != 1 || s.FailedNodes[0] != bed.NodeName {
		t.Errorf("missing: %+v", s)
	}
	b, err := json.Marshal(missing.Status)
	must(t, err)
	if !strings.Contains(string(b), "NotFound") {
		t.Errorf("the status does not say why: %s", b)
	}
	// Its end is in cases.
	untilJob(t, "without nodes", ns, "nowhere", func(j *v1beta1.ImagePullJob) bool {
		return complete(j) == "False WaitingForNodes" && j.Status.Desired == 0
	})
}
