// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package cases

import (
	"fmt"
	"strings"
	"syscall"
	"testing"

	"k8s.io/apimachinery/pkg/api/meta"
	"sigs.k8s.io/controller-runtime/pkg/client"

	"github.com/cri-proxy/cri-proxy/api/apps/v1beta1"
	"github.com/cri-proxy/cri-proxy/controller/kstatus"
	"github.com/cri-proxy/cri-proxy/test/testbed"
)

// ahead is an ImagePullJob for the node; spec is what it has beyond that.
func ahead(ns, name, image, spec string) string {
	return fmt.Sprintf(`
apiVersion: apps.kruise.io/v1beta1
kind: ImagePullJob
metadata: {namespace: %s, name: %s}
spec: {image: "%s", completionPolicy: {}%s}
---
`, ns, name, image, spec)
}

// untilPull waits until an ImagePullJob is so.
func untilPull(t testing.TB, what, ns, name string, so func(*v1beta1.ImagePullJob) bool) *v1beta1.ImagePullJob {
	t.Helper()
	job := &v1beta1.ImagePullJob{}
	eventuallySaying(t, "job "+name+" is "+what, func() string { return fmt.Sprintf("%+v", job.Status) }, func() bool {
		must(t, api.Get(t.Context(), client.ObjectKey{Namespace: ns, Name: name}, job))
		return so(job)
	})
	return job
}

func pullEnded(j *v1beta1.ImagePullJob) bool { return j.Status.CompletionTime != nil }

func pullCondition(j *v1beta1.ImagePullJob, kind string) string {
	c := meta.FindStatusCondition(j.Status.Conditions, kind)
	if c == nil {
		return ""
	}
	return string(c.Status) + " " + c.Reason
}

// triesAgain says that nodes of a job try again, for a reason.
func triesAgain(reason string) func(*v1beta1.ImagePullJob) bool {
	return func(j *v1beta1.ImagePullJob) bool {
		c := meta.FindStatusCondition(j.Status.Conditions, kstatus.Reconciling)
		return strings.Contains(j.Status.Message,
			"; 1 node tries again, node "+bed.NodeName+" says: "+reason+": registry ") &&
			c != nil && strings.Contains(c.Message, reason)
	}
}

// TestPullsWait: a secret or an image that comes after the job, as GitOps brings them, is waited
// for with words; once a job has failed, an edit of it helps.
func TestPullsWait(t *testing.T) {
	t.Parallel()
	ns := namespace(t)
	const host = "waited.cases"
	auth, err := bed.BasicAuth()
	must(t, err)
	addr, err := bed.StartRegistryAs(t.Context(), "registry-"+host, testbed.RegistryOptions{Auth: auth})
	must(t, err)
	t.Cleanup(func() { _ = bed.Process("registry-" + host).Signal(syscall.SIGKILL) })
	must(t, bed.MapRegistry(host, "http://"+addr))
	push := func(name string) { // content that nobody has had before
		t.Helper()
		crane(t, "mutate", bed.Image("busybox:1.0"), "--label", "for="+t.Name()+name, "--tag", bed.Image(name))
	}
	push("waited-secret:1")
	const patient = ", pullPolicy: {backoffLimit: 8}" // this machine has much to do
	apply(t, ahead(ns, "secret", host+"/waited-secret:1", ", pullSecrets: [key]"+patient)+
		ahead(ns, "image", bed.Image("waited-image:1"), patient)+
		ahead(ns, "edited", bed.Image("waited-edit:1"), ", pullPolicy: {backoffLimit: 0}")+
		fmt.Sprintf(`
apiVersion: apps.kruise.io/v1beta1
kind: ImageListPullJob
metadata: {namespace: %s, name: list}
spec: {images: ["%s"], completionPolicy: {}%s}
`, ns, bed.Image("waited-list:1"), patient))

	untilPull(t, "trying again", ns, "image", triesAgain("NotFound"))
	push("waited-image:1")
	push("waited-list:1")
	if got := pullJob(t, ns, "image"); got != "Succeeded 1" {
		t.Errorf("the image that came later: %s", got)
	}
	job := untilPull(t, "trying again", ns, "secret", triesAgain("Unauthorized"))
	if got := pullCondition(job, v1beta1.ConditionPullSecretsFound); got != "False MissingOrInvalid" {
		t.Errorf("PullSecretsFound: %s", got)
	}
	apply(t, fmt.Sprintf(`
apiVersion: v1
kind: Secret
metadata: {name: key, namespace: %s}
type: kubernetes.io/dockerconfigjson
stringData: {.dockerconfigjson: '{"auths":{"%s":{"username":"%s","password":"%s"}}}'}
`, ns, host, testbed.RegistryUser, testbed.RegistryPassword))
	job = untilPull(t, "ended", ns, "secret", pullEnded)
	if pullCondition(job, "Succeeded") != "True Succeeded" ||
		pullCondition(job, v1beta1.ConditionPullSecretsFound) != "True Found" ||
		job.Status.Message != "job has completed" {
		t.Errorf("the secret that came later: %+v", job.Status)
	}
	list := &v1beta1.ImageListPullJob{}
	eventuallySaying(t, "the list has completed", func() string { return fmt.Sprintf("%+v", list.Status) },
		func() bool {
			must(t, api.Get(t.Context(), client.ObjectKey{Namespace: ns, Name: "list"}, list))
			return list.Status.CompletionTime != nil
		})
	if list.Status.Succeeded != 1 {
		t.Errorf("the list: %+v", list.Status)
	}

	job = untilPull(t, "ended", ns, "edited", pullEnded)
	if !strings.HasPrefix(job.Status.Message,
		"job has failed: 1 of 1 nodes have no image: NotFound on 1 ("+bed.NodeName+"): registry ") ||
		pullCondition(job, kstatus.Stalled) != "True NodesFailed" {
		t.Errorf("the job that failed: %+v", job.Status)
	}
	push("waited-edit:1")
	kubectl(t, "-n", ns, "patch", "imagepulljobs.apps.kruise.io", "edited", "--type=merge", "-p",
		`{"spec":{"pullPolicy":{"timeoutSeconds":300}}}`)
	job = untilPull(t, "ended well", ns, "edited",
		func(j *v1beta1.ImagePullJob) bool { return pullEnded(j) && j.Status.ObservedGeneration == j.Generation })
	if pullCondition(job, "Complete") != "True Succeeded" || job.Status.Failed != 0 ||
		len(job.Status.FailedNodes) != 0 {
		t.Errorf("the job that was edited: %+v", job.Status)
	}
}

// TestPullsSayWhatIsTrue: no node, an image for other nodes, a secret without credentials; and what
// kubectl shows.
func TestPullsSayWhatIsTrue(t *testing.T) {
	t.Parallel()
	ns := namespace(t)
	crane(t, "mutate", bed.Image("busybox:1.0"), "--set-platform", "linux/arm64", "--tag", bed.Image("foreign:1"))
	apply(t, fmt.Sprintf(`
apiVersion: v1
kind: Secret
metadata: {name: store, namespace: %s}
type: kubernetes.io/dockerconfigjson
stringData: {.dockerconfigjson: '{"auths":{"%s":{}},"credsStore":"desktop"}'}
---
`, ns, bed.Registry)+ // first: a job that is carried out at once would not find it
		ahead(ns, "nowhere", bed.Image("busybox:1.0"), ", selector: {names: [no-such-node]}")+
		ahead(ns, "foreign", bed.Image("foreign:1"), "")+
		ahead(ns, "store", bed.Image("busybox:1.0"),
			fmt.Sprintf(", pullSecrets: [store], selector: {names: [%s]}", bed.NodeName)))
	job := untilPull(t, "waiting", ns, "nowhere",
		func(j *v1beta1.ImagePullJob) bool { return pullCondition(j, "Complete") != "" })
	if pullCondition(job, "Complete") != "False WaitingForNodes" ||
		pullCondition(job, kstatus.Reconciling) != "True WaitingForNodes" {
		t.Errorf("a job without nodes: %+v", job.Status)
	}

	job = untilPull(t, "ended", ns, "foreign", pullEnded)
	if s := job.Status; pullCondition(job, "Complete") != "True NodesFailed" || len(s.Failures) != 1 ||
		s.Failures[0].Reason != "InvalidImage" ||
		!strings.Contains(s.Failures[0].Message, "is for linux/arm64, this node is linux/amd64") ||
		strings.Contains(s.Failures[0].Message, "attempts") {
		t.Errorf("an image for other nodes: %+v", s)
	}

	job = untilPull(t, "ended", ns, "store", pullEnded)
	c := meta.FindStatusCondition(job.Status.Conditions, v1beta1.ConditionPullSecretsFound)
	if pullCondition(job, "Complete") != "True Succeeded" || c == nil || c.Status != "False" ||
		!strings.HasPrefix(c.Message,
			"secret store of pullSecrets has no credentials: it names only a credential store") {
		t.Errorf("a secret without credentials: %+v", job.Status)
	}
	// Numbers are there when they are 0, and the columns in OpenKruise's order.
	if got := kubectl(t, "-n", ns, "get", "imagepulljobs.apps.kruise.io", "store", "-o",
		"jsonpath={.status.active} {.status.failed} {.status.skipped} {.status.bytesDone} {.status.bytesTotal}"); len(
		strings.Fields(got)) != 5 {
		t.Errorf("numbers: %q", got)
	}
	lines := strings.Split(kubectl(t, "-n", ns, "get", "imagepulljobs.v1beta1.apps.kruise.io", "store", "foreign"),
		"\n")
	if got := strings.Join(strings.Fields(lines[0]), " "); got != "NAME TOTAL ACTIVE SUCCEED FAILED AGE "+
		"PROGRESS IMAGE MESSAGE" {
		t.Errorf("columns %s", got)
	}
	for i, want := range []string{"1 0 1 0 % 100% " + bed.Image("busybox:1.0") + " job has completed",
		"1 0 0 1 % % " + bed.Image("foreign:1") + " job has failed: 1 of 1 nodes"} {
		f := strings.Fields(lines[i+1])
		got := strings.Join(f[1:], " ")
		for j, w := range strings.Fields(want) {
			if w != "%" && f[j+1] != w {
				t.Errorf("%s, want %s", got, want)
			}
		}
	}

	job = untilPull(t, "ended", ns, "nowhere", pullEnded)
	if s := job.Status; pullCondition(job, "Complete") != "True NoMatchingNodes" ||
		pullCondition(job, "Succeeded") != "False NoMatchingNodes" ||
		pullCondition(job, kstatus.Stalled) != "True NoMatchingNodes" || s.Desired != 0 ||
		!strings.HasPrefix(s.Message, "job has failed: no node matches: ") {
		t.Errorf("a job without nodes: %+v", s)
	}
	if out, err := bed.Kubectl(t.Context(), "-n", ns, "wait", "--for=condition=Succeeded", "--timeout=1s",
		"imagepulljobs.apps.kruise.io/nowhere"); err == nil {
		t.Errorf("kubectl wait passes: %s", out)
	}
}
