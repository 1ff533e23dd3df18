// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package e2e

import (
	"context"
	"encoding/base64"
	"fmt"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"k8s.io/apimachinery/pkg/api/meta"
	"sigs.k8s.io/controller-runtime/pkg/client"

	"github.com/cri-proxy/cri-proxy/api/apps/v1beta1"
	opsv1 "github.com/cri-proxy/cri-proxy/api/ops/v1"
	"github.com/cri-proxy/cri-proxy/test/testbed"
)

// pushed pushes an image of its own for the test and returns how pods name it.
func pushed(t testing.TB, name string, layers, mib int) string {
	t.Helper()
	removeImage(t, bed.Image(name)) // of an earlier run
	must(t, bed.PushLargeImage(t.Context(), name, layers, mib))
	return bed.Image(name)
}

// imageJob is a manifest. spec is lines below spec, limit bytes a second.
func imageJob(ns, name, image, limit string, spec ...string) string {
	if len(spec) == 0 {
		spec = []string{"completionPolicy: {}"}
	}
	return fmt.Sprintf("---\napiVersion: apps.kruise.io/v1beta1\nkind: ImagePullJob\nmetadata: {name: %s, namespace: "+
		"%s, annotations: {cri-proxy.io/bytes-per-second: %q}}\nspec:\n  image: %s\n  %s\n",
		name, ns, limit, image, strings.Join(spec, "\n  "))
}

// untilJob polls a job until it is so, and returns it.
func untilJob(t testing.TB, what, ns, name string, so func(*v1beta1.ImagePullJob) bool) *v1beta1.ImagePullJob {
	t.Helper()
	job := &v1beta1.ImagePullJob{}
	defer func() {
		if t.Failed() {
			t.Logf("job %s: %+v", name, job.Status)
		}
	}()
	eventually(t, "job "+name+" is "+what, func() bool {
		must(t, api.Get(t.Context(), client.ObjectKey{Namespace: ns, Name: name}, job))
		return so(job)
	})
	return job
}

func underWay(job *v1beta1.ImagePullJob) bool {
	return job.Status.Active == 1 && job.Status.BytesDone > 0
}

// complete is status and reason of the condition Complete: "True Succeeded".
func complete(job *v1beta1.ImagePullJob) string {
	c := meta.FindStatusCondition(job.Status.Conditions, v1beta1.ConditionComplete)
	if c == nil {
		return ""
	}
	return string(c.Status) + " " + c.Reason
}

func images(t testing.TB) opsv1.ImagesClient {
	t.Helper()
	return opsv1.NewImagesClient(adminConn(t))
}

// pullsOf are the node's pulls for a job, the newest first.
func pullsOf(t testing.TB, job *v1beta1.ImagePullJob) []*opsv1.PullOperation {
	t.Helper()
	return pullsBy(t, images(t), job)
}

// fetched waits until the node has so many percent of a job's image, and returns the job and its
// pulls. The job's status tells some time later, when there may be nothing left to fetch.
func fetched(t testing.TB, ns, name string, percent int64) (*v1beta1.ImagePullJob, []*opsv1.PullOperation) {
	t.Helper()
	node, job := images(t), &v1beta1.ImagePullJob{}
	must(t, api.Get(t.Context(), client.ObjectKey{Namespace: ns, Name: name}, job))
	var ops []*opsv1.PullOperation
	eventually(t, fmt.Sprintf("the node has %d %% of the image of job %s", percent, name), func() bool {
		ops = pullsBy(t, node, job)
		return len(ops) > 0 && ops[0].GetBytesTotal() > 0 && ops[0].GetBytesDone()*100 >= ops[0].GetBytesTotal()*percent
	})
	return job, ops
}

func pullsBy(t testing.TB, node opsv1.ImagesClient, job *v1beta1.ImagePullJob) []*opsv1.PullOperation {
	t.Helper()
	list, err := node.ListPulls(t.Context(), &opsv1.ListPullsRequest{})
	must(t, err)
	var mine []*opsv1.PullOperation
	for _, op := range list.GetPulls() {
		if op.GetOwner() == owner(job) {
			mine = append(mine, op)
		}
	}
	return mine
}

func owner(job *v1beta1.ImagePullJob) string {
	return fmt.Sprintf("ImagePullJob/%s/%s/%s", job.Namespace, job.Name, job.UID)
}

// pinsOf are the images that the node keeps for a job.
func pinsOf(t testing.TB, job *v1beta1.ImagePullJob) []string {
	t.Helper()
	list, err := images(t).ListPins(t.Context(), &opsv1.ListPinsRequest{})
	must(t, err)
	var mine []string
	for _, p := range list.GetPins() {
		if p.GetOwner() == owner(job) {
			mine = append(mine, p.GetImage())
		}
	}
	return mine
}

// failedWith checks that a job has failed on the node for the reason, and that its status says so
// with the words.
func failedWith(t testing.TB, job *v1beta1.ImagePullJob, reason string, words ...string) {
	t.Helper()
	s := job.Status
	if complete(job) != "True NodesFailed" || s.Failed != 1 || len(s.Failures) != 1 || s.Failures[0].Reason != reason ||
		s.Failures[0].Node != bed.NodeName {
		t.Errorf("job %s has not failed with %s: %+v", job.Name, reason, s)
		return
	}
	t.Logf("job %s: %s: %s", job.Name, reason, s.Failures[0].Message)
	for _, w := range words {
		if !strings.Contains(s.Failures[0].Message, w) {
			t.Errorf("job %s: %q is not in %q", job.Name, w, s.Failures[0].Message)
		}
	}
}

// privateRegistry starts a registry that asks for a name and a password, for images of host.
func privateRegistry(t testing.TB, host string) {
	t.Helper()
	auth, err := bed.BasicAuth()
	must(t, err)
	addr, err := bed.StartRegistryAs(t.Context(), "registry-"+host, testbed.RegistryOptions{Auth: auth})
	must(t, err)
	t.Cleanup(func() { _ = bed.Process("registry-" + host).Signal(syscall.SIGKILL) })
	must(t, bed.MapRegistry(host, "http://"+addr))
}

// TestImagePullJobProxyKilled kills the only process that has the credentials of a pull: the
// controller gives them again.
func TestImagePullJobProxyKilled(t *testing.T) {
	ns := namespace(t)
	const host = "forgotten.e2e"
	privateRegistry(t, host)
	removeImage(t, host+"/forgotten:1")
	must(t, bed.PushLargeImage(t.Context(), "forgotten:1", 2, 8))
	apply(t, fmt.Sprintf("apiVersion: v1\nkind: Secret\nmetadata: {name: good, namespace: %s}\ntype: "+
		"kubernetes.io/dockerconfigjson\nstringData: {.dockerconfigjson: "+
		"'{\"auths\":{\"%s\":{\"username\":\"%s\",\"password\":\"%s\"}}}'}\n",
		ns, host, testbed.RegistryUser, testbed.RegistryPassword)+
		imageJob(ns, "job", host+"/forgotten:1", "4Mi", "completionPolicy: {}", "pullSecrets: [good]"))
	_, before := fetched(t, ns, "job", 40)
	restartProxy(t, syscall.SIGKILL)
	job := pulled(t, ns, "job")
	ops := pullsOf(t, job)
	if complete(job) != "True Succeeded" || len(ops) != 1 || len(before) != 1 || ops[0].GetUid() != before[0].GetUid() {
		t.Fatalf("%+v, pulls %v", job.Status, ops)
	}
	// What this process has fetched is the rest.
	if rest :=
		ops[0].GetBytesTotal() - before[0].GetBytesDone(); ops[0].GetBytesFetched() > rest+ops[0].GetBytesTotal()/20 {
		t.Errorf("fetched %d again, %d were missing", ops[0].GetBytesFetched(), rest)
	}
}

// TestImagePullSecrets has a registry that asks for a name and a password.
func TestImagePullSecrets(t *testing.T) {
	ns := namespace(t)
	const host = "private.e2e"
	privateRegistry(t, host)
	encoded := base64.StdEncoding.EncodeToString([]byte(testbed.RegistryUser + ":" + testbed.RegistryPassword))
	secret := func(name, kind, key, value string) string {
		return fmt.Sprintf("---\napiVersion: v1\nkind: Secret\nmetadata: {name: %s, namespace: %s}\ntype: "+
			"kubernetes.io/%s\nstringData: {%s: '%s'}\n", name, ns, kind, key, value)
	}
	var b strings.Builder
	b.WriteString(secret("good", "dockerconfigjson", ".dockerconfigjson",
		fmt.Sprintf(`{"auths":{"https://%s/v1/":{"auth":"%s"}}}`, host, encoded)))
	b.WriteString(secret("older", "dockercfg", ".dockercfg",
		fmt.Sprintf(`{"%s":{"username":"%s","password":"%s"}}`, host, testbed.RegistryUser, testbed.RegistryPassword)))
	b.WriteString(secret("bad", "dockerconfigjson", ".dockerconfigjson",
		fmt.Sprintf(`{"auths":{"%s":{"username":"%s","password":"x%s"}}}`, host, testbed.RegistryUser,
			testbed.RegistryPassword)))
	apply(t, b.String())
	begin := func(name string, secrets string) {
		removeImage(t, host+"/private/"+name+":1")
		must(t, bed.PushLargeImage(t.Context(), "private/"+name+":1", 1, 1))
		apply(t, imageJob(ns, name, host+"/private/"+name+":1", "0", "completionPolicy: {}", "pullSecrets: "+secrets))
	}
	for name, secrets := range map[string]string{"right": "[good]", "in-the-older-form": "[older]", "wrong": "[bad]",
		"wrong-and-right": "[bad, good]", "none": "[]", "absent": "[no-such-secret]"} {
		begin(name, secrets)
	}
	for _, name := range []string{"right", "in-the-older-form", "wrong-and-right"} {
		if job := pulled(t, ns, name); complete(job) != "True Succeeded" ||
			!meta.IsStatusConditionTrue(job.Status.Conditions, v1beta1.ConditionPullSecretsFound) {
			t.Errorf("%s: %+v", name, job.Status)
		}
	}
	for _, name := range []string{"wrong", "none"} {
		failedWith(t, pulled(t, ns, name), "Unauthorized", host, "pull secret")
	}
	absent := pulled(t, ns, "absent")
	failedWith(t, absent, "Unauthorized", "pull secret")
	if c := meta.FindStatusCondition(absent.Status.Conditions, v1beta1.ConditionPullSecretsFound); c == nil ||
		c.Status != "False" || !strings.Contains(c.Message, "no-such-secret of pullSecrets does not exist") {
		t.Errorf("condition of the job whose secret does not exist: %+v", c)
	}

	// The default ServiceAccount's secrets count without the job naming them.
	kubectl(t, "-n", ns, "patch", "serviceaccount", "default", "-p", `{"imagePullSecrets":[{"name":"good"}]}`)
	begin("of-the-account", "[]")
	if job := pulled(t, ns, "of-the-account"); complete(job) != "True Succeeded" {
		t.Errorf("with the ServiceAccount's secret: %+v", job.Status)
	}
	apply(t, fmt.Sprintf("apiVersion: v1\nkind: Pod\nmetadata: {name: user, namespace: %s}\nspec:\n  "+
		"terminationGracePeriodSeconds: 1\n  containers: [{name: app, image: '%s/private/of-the-account:1'}]\n", ns,
		host))
	ready(t, ns, "user")
	asked := 0
	for _, c := range kubeletCalls(t, "PullImage") {
		if strings.HasPrefix(c.Image, host+"/private/of-the-account") {
			asked++
		}
	}
	if asked != 1 { // with the pod's own secret, for its record; everything is there
		t.Errorf("kubelet has asked for the image %d times", asked)
	}

	// Nobody can read the password but who may read the secret.
	said := map[string]string{"jobs": kubectl(t, "-n", ns, "get", "imagepulljobs", "-o", "yaml"),
		"events": kubectl(t, "-n", ns, "get", "events", "-o", "yaml")}
	for _, name := range []string{bed.LogFile("cri-proxy"), bed.LogFile("cri-controller"),
		filepath.Join(bed.StateDir, "pulls.db")} {
		content, err := os.ReadFile(name)
		must(t, err)
		said[name] = string(content)
	}
	for where, text := range said {
		if text == "" || strings.Contains(text, testbed.RegistryPassword) || strings.Contains(text, encoded) {
			t.Errorf("%s are empty or tell the password", where)
		}
	}
}

// TestImagePullJobReferences names images in other ways than by a tag that exists.
func TestImagePullJobReferences(t *testing.T) {
	ns := namespace(t)
	image := pushed(t, "digested:1", 1, 1)
	digest := digestOf(t, "digested", "1")
	repository := bed.Image("digested")
	// The host is nobody's, so it is not the bed's registry that answers.
	must(t, bed.MapRegistry("127.0.0.1:1", "http://127.0.0.1:1"))
	once := []string{"completionPolicy: {}", "pullPolicy: {backoffLimit: 0}"}
	apply(t, imageJob(ns, "by-digest", repository+"@"+digest, "0", once...)+
		imageJob(ns, "by-both", image+"@"+digest, "0", once...)+
		imageJob(ns, "no-tag", repository+":no-such-tag", "0", once...)+
		imageJob(ns, "no-digest", repository+"@sha256:"+strings.Repeat("0", 64), "0", once...)+
		imageJob(ns, "no-registry", "127.0.0.1:1/x:1", "0", once...))
	for _, name := range []string{"by-digest", "by-both"} {
		job := pulled(t, ns, name)
		if complete(job) != "True Succeeded" || len(pinsOf(t, job)) != 1 {
			t.Errorf("%s: %+v", name, job.Status)
		}
	}
	pinned(t, repository+"@"+digest, true)
	if got := imageOnNode(t, repository+"@"+digest); len(got.GetRepoDigests()) != 1 {
		t.Errorf("the image on the node: %v", got)
	}
	for _, name := range []string{"no-tag", "no-digest"} {
		failedWith(t, pulled(t, ns, name), "NotFound", "check name, tag and digest")
	}
	failedWith(t, pulled(t, ns, "no-registry"), "RegistryUnavailable", "connection refused")
	// What is no reference at all is refused at once.
	err := bed.KubectlApply(t.Context(), imageJob(ns, "nonsense", "'UPPER case'", "0"))
	if err == nil || !strings.Contains(err.Error(), "image must be a reference as in a pod") {
		t.Errorf("nonsense is not refused: %v", err)
	}
}

func digestOf(t testing.TB, repository, tag string) string {
	t.Helper()
	req, err := http.NewRequestWithContext(t.Context(), http.MethodHead,
		fmt.Sprintf("http://%s/v2/%s/manifests/%s", bed.Registry, repository, tag), nil)
	must(t, err)
	req.Header["Accept"] = []string{"application/vnd.oci.image.manifest.v1+json",
		"application/vnd.docker.distribution.manifest.v2+json"}
	resp, err := http.DefaultClient.Do(req)
	must(t, err)
	must(t, resp.Body.Close())
	digest := resp.Header.Get("Docker-Content-Digest")
	if digest == "" {
		t.Fatalf("no digest of %s:%s: %s", repository, tag, resp.Status)
	}
	return digest
}

// TestImagePullJobsOfOneImage has two jobs that want the same: it comes once, and stays pinned as
// long as one of them is there.
func TestImagePullJobsOfOneImage(t *testing.T) {
	ns := namespace(t)
	image := pushed(t, "shared:1", 2, 6)
	apply(t, imageJob(ns, "one", image, "8Mi")+imageJob(ns, "other", image, "8Mi"))
	one, other := pulled(t, ns, "one"), pulled(t, ns, "other")
	fetched := int64(0)
	for _, job := range []*v1beta1.ImagePullJob{one, other} {
		if complete(job) != "True Succeeded" {
			t.Errorf("%s: %+v", job.Name, job.Status)
		}
		for _, op := range pullsOf(t, job) {
			fetched += op.GetBytesFetched()
		}
	}
	// What is below its two layers may be on the node already.
	if own, total := int64(12<<20), max(one.Status.BytesTotal, other.Status.BytesTotal); fetched < own ||
		fetched > total*105/100 {
		t.Errorf("%d bytes were fetched of %d", fetched, total)
	}
	kubectl(t, "-n", ns, "delete", "imagepulljob", "one", "--timeout=60s")
	// A job that has ended has no finalizer: its pins are let go of when it has gone.
	eventually(t, "the pins of the job that has gone are let go of", func() bool { return len(pinsOf(t, one)) == 0 })
	if there := pinsOf(t, other); len(there) != 1 {
		t.Errorf("with one of the jobs gone the pins of the other are %v", there)
	}
	pinned(t, image, true)
	kubectl(t, "-n", ns, "delete", "imagepulljob", "other", "--timeout=60s")
	pinned(t, image, false)
}

// TestImagePullJobDeleted deletes a job midway; another one goes on from what it has left.
func TestImagePullJobDeleted(t *testing.T) {
	ns := namespace(t)
	image := pushed(t, "given-up:1", 2, 8)
	apply(t, imageJob(ns, "first", image, "2Mi")) // so that it is not through before kubectl has deleted it
	job, _ := fetched(t, ns, "first", 40)
	kubectl(t, "-n", ns, "delete", "imagepulljob", "first", "--timeout=60s")
	ops := pullsOf(t, job)
	if len(ops) != 1 || ops[0].GetPhase() != opsv1.PullPhase_PULL_CANCELLED ||
		!strings.Contains(ops[0].GetMessage(), "the job was deleted") {
		t.Errorf("the node's pulls are %v", ops)
	}
	if len(pinsOf(t, job)) != 0 || imageOnNode(t, image) != nil {
		t.Error("the image is there, or pinned")
	}
	apply(t, imageJob(ns, "second", image, "0"))
	second := pulled(t, ns, "second")
	if ops := pullsOf(t, second); len(ops) != 1 || ops[0].GetBytesFetched() > ops[0].GetBytesTotal()*2/3 {
		t.Errorf("it does not go on from where the first was: %v", ops)
	}
}

// TestImagePullJobEdited changes a job at work: another image, then none at once, then one.
func TestImagePullJobEdited(t *testing.T) {
	ns := namespace(t)
	old, image := pushed(t, "edited:1", 2, 8), pushed(t, "edited:2", 2, 4)
	apply(t, imageJob(ns, "job", old, "1Mi")) // so that it is under way as long as it may take
	untilJob(t, "under way", ns, "job", underWay)
	kubectl(t, "-n", ns, "patch", "imagepulljob", "job", "--type=merge", "-p",
		fmt.Sprintf(`{"spec":{"image":%q,"parallelism":0}}`, image))
	job := untilJob(t, "paused", ns, "job", func(j *v1beta1.ImagePullJob) bool { return complete(j) == "False Paused" })
	if s := job.Status; s.Active != 0 || s.Succeeded != 0 || s.ObservedGeneration != job.Generation {
		t.Errorf("paused: %+v", s)
	}
	eventually(t, "the first pull is cancelled", func() bool {
		ops := pullsOf(t, job)
		return len(ops) == 1 && ops[0].GetPhase() == opsv1.PullPhase_PULL_CANCELLED &&
			strings.Contains(ops[0].GetMessage(), "it has been changed")
	})
	kubectl(t, "-n", ns, "patch", "imagepulljob", "job", "--type=merge", "-p",
		`{"metadata":{"annotations":{"cri-proxy.io/bytes-per-second":"0"}},"spec":{"parallelism":"100%"}}`)
	job = pulled(t, ns, "job")
	if complete(job) != "True Succeeded" || len(pullsOf(t, job)) != 2 {
		t.Errorf("in the end: %+v, pulls %v", job.Status, pullsOf(t, job))
	}
	pinned(t, image, true)
	if imageOnNode(t, old) != nil || len(pinsOf(t, job)) != 1 {
		t.Error("the first image is there, or the second is not pinned")
	}

	// One that has ended begins again, and lets go of what it no longer wants.
	kubectl(t, "-n", ns, "patch", "imagepulljob", "job", "--type=merge", "-p",
		fmt.Sprintf(`{"spec":{"image":%q}}`, old))
	job = untilJob(t, "through with the first image", ns, "job", func(j *v1beta1.ImagePullJob) bool {
		return complete(j) == "True Succeeded" && j.Status.ObservedGeneration == j.Generation
	})
	pinned(t, old, true)
	pinned(t, image, false)
}

// TestImagePullJobDeadline has a registry that is too slow for the job's deadline.
func TestImagePullJobDeadline(t *testing.T) {
	ns := namespace(t)
	image := pushed(t, "late:1", 2, 8)
	apply(t, imageJob(ns, "late", image, "2Mi", "pullPolicy: {timeoutSeconds: 3}",
		"completionPolicy: {activeDeadlineSeconds: 3}"))
	job := pulled(t, ns, "late")
	c := meta.FindStatusCondition(job.Status.Conditions, v1beta1.ConditionComplete)
	if s := job.Status; s.Failed != 1 || c.Reason != "DeadlineExceeded" && c.Reason != "NodesFailed" ||
		len(s.FailedNodes) != 1 {
		t.Errorf("%+v", s)
	}
	eventually(t, "nothing goes on", func() bool {
		ops := pullsOf(t, job)
		return len(ops) == 1 && ops[0].GetFinishTime() != nil
	})
	if imageOnNode(t, image) != nil {
		t.Error("the image is there")
	}
}

// TestImagePullJobNever has a job that stays, and a node that it chooses only later.
func TestImagePullJobNever(t *testing.T) {
	ns := namespace(t)
	image := pushed(t, "later:1", 1, 1)
	apply(t, imageJob(ns, "stays", image, "0", "selector: {matchLabels: {pool: "+ns+"}}",
		"completionPolicy: {type: Never}"))
	job := untilJob(t, "waiting for nodes", ns, "stays",
		func(j *v1beta1.ImagePullJob) bool { return complete(j) == "False NoMatchingNodes" })
	if job.Status.Desired != 0 {
		t.Errorf("%+v", job.Status)
	}
	kubectl(t, "label", "node", bed.NodeName, "pool="+ns)
	t.Cleanup(func() { _, _ = bed.Kubectl(context.WithoutCancel(t.Context()), "label", "node", bed.NodeName, "pool-") })
	job = untilJob(t, "up to date", ns, "stays",
		func(j *v1beta1.ImagePullJob) bool { return complete(j) == "False UpToDate" && j.Status.Succeeded == 1 })
	pinned(t, image, true)
	if job.Status.CompletionTime != nil {
		t.Errorf("%+v", job.Status)
	}
	// A node that is no longer chosen is let go of.
	kubectl(t, "label", "node", bed.NodeName, "pool-")
	eventually(t, "the pin is released", func() bool { return len(pinsOf(t, job)) == 0 })
}

// TestImagePullJobControllerKilled lets the node work alone for a while.
func TestImagePullJobControllerKilled(t *testing.T) {
	ns := namespace(t)
	image := pushed(t, "alone:1", 2, 8)
	apply(t, imageJob(ns, "job", image, "6Mi")+imageJob(ns, "next", pushed(t, "alone:2", 1, 1), "0"))
	job, _ := fetched(t, ns, "job", 1)
	must(t, bed.StopController(t.Context(), syscall.SIGKILL))
	eventually(t, "the node has finished alone", func() bool { return imageOnNode(t, image).GetPinned() })
	must(t, api.Get(t.Context(), client.ObjectKeyFromObject(job), job))
	if job.Status.CompletionTime != nil {
		t.Error("the controller was not killed midway")
	}
	must(t, bed.StartController(t.Context()))
	if job = pulled(t, ns, "job"); complete(job) != "True Succeeded" || len(pullsOf(t, job)) != 1 {
		t.Errorf("%+v, pulls %v", job.Status, pullsOf(t, job))
	}
	if next := pulled(t, ns, "next"); complete(next) != "True Succeeded" {
		t.Errorf("%+v", next.Status)
	}
}

// TestImageListPullJob pulls three images, one of which there is not.
func TestImageListPullJob(t *testing.T) {
	ns := namespace(t)
	a, b := pushed(t, "list/a:1", 1, 1), pushed(t, "list/b:1", 1, 1)
	missing := bed.Image("list/no-such-image:1")
	apply(t, fmt.Sprintf(`
apiVersion: apps.kruise.io/v1beta1
kind: ImageListPullJob
metadata: {name: list, namespace: %s}
spec:
  images: [%s, %s, %s]
  parallelism: 5
  selector: {}
  pullPolicy: {backoffLimit: 1}
  completionPolicy: {type: Always}
`, ns, a, b, missing))
	list := &v1beta1.ImageListPullJob{}
	eventually(t, "the list has completed", func() bool {
		must(t, api.Get(t.Context(), client.ObjectKey{Namespace: ns, Name: "list"}, list))
		return list.Status.CompletionTime != nil
	})
	s := list.Status
	if s.Desired != 3 || s.Completed != 3 || s.Succeeded != 2 || s.Active != 0 || len(s.FailedImageStatuses) != 1 {
		t.Fatalf("%+v", s)
	}
	if f := s.FailedImageStatuses[0]; f.Name != missing ||
		!strings.Contains(f.Message, "failed on 1 of 1 nodes: NotFound on 1") || f.ImagePullJob == "" {
		t.Errorf("%+v", f)
	}
	pinned(t, a, true)
	pinned(t, b, true)
	if columns := strings.Fields(kubectl(t, "-n", ns, "get", "imagelistpulljob", "list", "--no-headers")); len(
		columns) != 5 || columns[1] != "3" || columns[2] != "2" || columns[3] != "3" {
		t.Errorf("kubectl get: %q", columns)
	}

	// An edit: one image less.
	kubectl(t, "-n", ns, "patch", "imagelistpulljob", "list", "--type=merge", "-p",
		fmt.Sprintf(`{"spec":{"images":[%q]}}`, a))
	eventually(t, "the list has completed again", func() bool {
		must(t, api.Get(t.Context(), client.ObjectKey{Namespace: ns, Name: "list"}, list))
		return list.Status.CompletionTime != nil && list.Status.Desired == 1 && list.Status.Succeeded == 1
	})
	pinned(t, b, false)

	kubectl(t, "-n", ns, "delete", "imagelistpulljob", "list", "--timeout=60s")
	eventually(t, "the list's jobs are gone, and their pins", func() bool {
		return kubectl(t, "-n", ns, "get", "imagepulljobs", "-o", "name") == "" && !imageOnNode(t, a).GetPinned()
	})
}
