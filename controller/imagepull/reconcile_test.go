// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package imagepull_test

import (
	"context"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/api/meta"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"sigs.k8s.io/controller-runtime/pkg/client"

	"github.com/cri-proxy/cri-proxy/api/apps/v1beta1"
	opsv1 "github.com/cri-proxy/cri-proxy/api/ops/v1"
	jobspec "github.com/cri-proxy/cri-proxy/controller/imagepull/spec"
	"github.com/cri-proxy/cri-proxy/controller/kstatus"
	"github.com/cri-proxy/cri-proxy/controller/nodes"
)

type template = v1beta1.ImagePullJobTemplate

func names(list ...string) *v1beta1.ImagePullJobNodeSelector {
	return &v1beta1.ImagePullJobNodeSelector{Names: list}
}

func number[T any](n T) *T { return &n }

func TestJob(t *testing.T) {
	inBed(t, func(t *testing.T, b *bed) {
		b.addMany(3, time.Minute)
		b.add("virtual", &simNode{})
		b.node("virtual", func(n *corev1.Node) { n.Labels["type"] = "virtual-kubelet" })
		b.create("job", spec{ImagePullJobTemplate: template{
			Parallelism: parallel(2), Selector: &v1beta1.ImagePullJobNodeSelector{},
			PodSelector: &v1beta1.ImagePullJobPodSelector{},
			SandboxConfig: &v1beta1.SandboxConfig{Labels: map[string]string{"a": "b"},
				Annotations: map[string]string{"c": "d"}},
		}}, v1beta1.BytesPerSecondAnnotation, "20Mi")
		j := b.until("half way", "job", time.Minute, func(j *job) bool { return j.Status.Percent >= 20 })
		b.want(j, "False Pulling", "3/2/0/0")
		if s := j.Status.SlowestNodes; len(s) != 2 || s[0].Phase != "Fetching" || s[0].BytesTotal != imageBytes ||
			s[0].StartTime == nil {
			t.Errorf("slowest nodes %+v", s)
		}
		if !strings.HasPrefix(j.Status.Message, fmt.Sprintf("job is running, progress %d.", j.Status.Percent)) ||
			j.Status.BytesTotal != 3*imageBytes || j.Status.BytesDone < imageBytes/2 {
			t.Errorf("status %+v", j.Status)
		}
		j = b.until("completed", "job", 3*time.Minute, completed)
		b.want(j, "True Succeeded", "3/0/3/0")
		if j.Status.Message != "job has completed" || condition(j, "Succeeded") != "True Succeeded" ||
			j.Status.Progress != "100%" || j.Status.ObservedGeneration != 1 {
			t.Errorf("status %+v", j.Status)
		}
		r := b.fleet.last("node-1")
		if r.GetImage() != "nginx" || r.GetPolicy() != opsv1.PullPolicy_PULL_POLICY_IF_NOT_PRESENT ||
			r.GetMaxAttempts() != 4 || r.GetAttemptTimeout().AsDuration() != 10*time.Minute ||
			r.GetPinFor().AsDuration() != 24*time.Hour || r.GetBytesPerSecond() != 20<<20 ||
			r.GetOwner() != "ImagePullJob/ns/job/uid-job" ||
			r.GetSandboxLabels()["a"] != "b" || r.GetSandboxAnnotations()["c"] != "d" ||
			!strings.HasPrefix(r.GetUid(), "uid-job.") {
			t.Errorf("request %v", r)
		}
		if told := b.told(); !strings.Contains(told, "PullStarted: pulling nginx on 3 nodes, at most 2 at once") ||
			!strings.Contains(told, "PullCompleted: all 3 nodes have the image") {
			t.Errorf("events:\n%s", told)
		}
	})
}

// A job that matches no node does not succeed: it waits a moment for nodes, and fails. A job that
// never ends goes on waiting.
func TestNoMatchingNodes(t *testing.T) {
	inBed(t, func(t *testing.T, b *bed) {
		b.addMany(1, time.Second)
		other := template{Selector: names("other")}
		b.create("always", spec{ImagePullJobTemplate: other})
		b.create("early",
			spec{ImagePullJobTemplate: template{Selector: names("other"),
				CompletionPolicy: v1beta1.CompletionPolicy{ActiveDeadlineSeconds: number(int64(10))}}})
		b.createList("list", v1beta1.ImageListPullJobSpec{Images: []string{"a"}, ImagePullJobTemplate: other})
		j := b.until("waiting", "always", time.Second, func(j *job) bool { return condition(j, "Complete") != "" })
		if condition(j, kstatus.Reconciling) != "True WaitingForNodes" ||
			j.Status.Message != "job is running, no progress; no node matches" {
			t.Errorf("status %+v", j.Status)
		}
		j = b.until("completed", "early", 11*time.Second, completed)
		if j.Status.CompletionTime.Sub(j.Status.StartTime.Time) != 10*time.Second ||
			condition(j, "Succeeded") != "False DeadlineExceeded" {
			t.Errorf("status %+v", j.Status)
		}
		j = b.until("completed", "always", time.Minute, completed)
		b.want(j, "True NoMatchingNodes", "0/0/0/0")
		if j.Status.CompletionTime.Sub(j.Status.StartTime.Time) != noNodesTimeout ||
			condition(j, "Succeeded") != "False NoMatchingNodes" ||
			condition(j, kstatus.Stalled) != "True NoMatchingNodes" ||
			!strings.HasPrefix(j.Status.Message, "job has failed: no node matches: ") {
			t.Errorf("status %+v", j.Status)
		}
		if !strings.Contains(b.told(), "always Warning PullIncomplete: no node matches") {
			t.Errorf("events:\n%s", b.told())
		}
		l := b.untilList("completed", "list", time.Minute, func(l *list) bool { return l.Status.CompletionTime != nil })
		if s := l.Status; s.Completed != 1 || s.Succeeded != 0 || len(s.FailedImageStatuses) != 1 ||
			!strings.HasPrefix(s.FailedImageStatuses[0].Message, "no node matches") {
			t.Errorf("list %+v", l.Status)
		}

		b.create("never",
			spec{ImagePullJobTemplate: template{Selector: names("other"),
				CompletionPolicy: v1beta1.CompletionPolicy{Type: v1beta1.Never}}})
		b.until("waiting", "never", 10*time.Second,
			func(j *job) bool { return condition(j, "Complete") == "False NoMatchingNodes" })
		b.create("soon", spec{ImagePullJobTemplate: other})
		time.Sleep(noNodesTimeout / 2)
		b.add("other", &simNode{takes: time.Second})
		b.until("served", "never", time.Minute, func(j *job) bool { return j.Status.Succeeded == 1 })
		j = b.until("completed", "soon", time.Minute, completed)
		b.want(j, "True Succeeded", "1/0/1/0")
		// A job that has failed begins again when somebody changes it; a job that has succeeded
		// does not.
		b.edit("always", func(j *job) { j.Spec.Selector = names("node-0") })
		j = b.until("completed anew", "always", time.Minute,
			func(j *job) bool { return completed(j) && j.Status.Succeeded == 1 })
		b.want(j, "True Succeeded", "1/0/1/0")
	})
}

// A job of type Never serves nodes that join later, and forgets nodes that leave. It makes sure of
// the image while the image is pinned, and tries again where it failed.
func TestNever(t *testing.T) {
	inBed(t, func(t *testing.T, b *bed) {
		b.addMany(3, time.Second)
		b.create("job",
			spec{ImagePullJobTemplate: template{Parallelism: parallel(3),
				CompletionPolicy: v1beta1.CompletionPolicy{Type: v1beta1.Never}}})
		j := b.until("done", "job", time.Minute, func(j *job) bool { return j.Status.Succeeded == 3 })
		b.want(j, "False UpToDate", "3/0/3/0")
		b.add("late", &simNode{takes: time.Second})
		b.until("served late", "job", time.Minute,
			func(j *job) bool { return j.Status.Succeeded == 4 && j.Status.Desired == 4 })
		b.removeNode("node-0")
		b.until("one less", "job", time.Minute,
			func(j *job) bool { return j.Status.Succeeded == 3 && j.Status.Desired == 3 })
		b.restart()
		time.Sleep(time.Minute)
		writes := b.writesOf("job")
		time.Sleep(12 * time.Hour)
		synctest.Wait()
		if n := b.fleet.begun("node-1")["node-1"]; n != 1 {
			t.Errorf("%d pulls on a node", n)
		}
		time.Sleep(10 * time.Hour)
		synctest.Wait()
		if n := b.fleet.begun("node-1")["node-1"]; n != 2 {
			t.Errorf("%d pulls on a node after the better part of the pin's life", n)
		}
		if more := b.writesOf("job") - writes; more > 2 {
			t.Errorf("%d writes while nothing happened", more)
		}

		b.add("poor", &simNode{takes: time.Second, outcome: "RegistryUnavailable"})
		j = b.until("failed", "job", 5*time.Minute, func(j *job) bool { return j.Status.Failed == 1 })
		if f := j.Status.Failures; len(f) != 1 || f[0].Node != "poor" || f[0].Reason != "RegistryUnavailable" {
			t.Errorf("failures %+v", f)
		}
		b.fleet.change("poor", func(n *simNode) { n.outcome = "" })
		j = b.until("tried again", "job", time.Hour,
			func(j *job) bool { return j.Status.Failed == 0 && j.Status.Succeeded == 4 })
		if len(j.Status.FailedNodes) != 0 || j.Status.CompletionTime != nil {
			t.Errorf("status %+v", j.Status)
		}
	})
}

// A node fails, for a job that never ends, while the reconciler writes a status. The node is tried
// again in time, though nothing else happens for the better part of a day.
func TestFailedDuringReconcile(t *testing.T) {
	inBed(t, func(t *testing.T, b *bed) {
		b.add("well", &simNode{takes: time.Second})
		b.add("poor", &simNode{takes: time.Minute, outcome: "RegistryUnavailable"})
		b.create("job",
			spec{ImagePullJobTemplate: template{Parallelism: parallel(2),
				CompletionPolicy: v1beta1.CompletionPolicy{Type: v1beta1.Never}}})
		begin := time.Now()
		b.until("half done", "job", time.Minute, func(j *job) bool { return j.Status.Succeeded == 1 })
		b.mu.Lock()
		b.slow = func() time.Duration { return max(time.Until(begin.Add(2*time.Minute)), 0) }
		b.mu.Unlock()
		time.Sleep(3 * time.Minute)
		synctest.Wait()
		if n := b.fleet.begun("poor")["poor"]; n != 1 {
			t.Fatalf("%d pulls on the node that fails", n)
		}
		b.fleet.change("poor", func(n *simNode) { n.outcome = "" })
		j := b.until("tried again", "job", 13*time.Minute, func(j *job) bool { return j.Status.Succeeded == 2 })
		b.want(j, "False UpToDate", "2/0/2/0")
	})
}

func TestPausedAndResumed(t *testing.T) {
	inBed(t, func(t *testing.T, b *bed) {
		b.addMany(4, time.Minute)
		b.create("job", spec{ImagePullJobTemplate: template{Parallelism: parallel(0)}})
		j := b.until("paused", "job", time.Minute,
			func(j *job) bool { return condition(j, "Complete") == "False Paused" })
		b.want(j, "False Paused", "4/0/0/0")
		b.edit("job", func(j *job) { j.Spec.Parallelism = parallel(2) })
		b.until("at work", "job", time.Minute, func(*job) bool { return b.fleet.flying("uid-job") == 2 })
		b.edit("job", func(j *job) { j.Spec.Parallelism = parallel(0) })
		time.Sleep(5 * time.Minute)
		synctest.Wait()
		if n := b.fleet.flying("uid-job"); n != 0 {
			t.Errorf("%d pulls while paused", n)
		}
		b.want(b.get("job"), "False Paused", "4/0/2/0")
		b.edit("job", func(j *job) { j.Spec.Parallelism.Type, j.Spec.Parallelism.StrVal = 1, "100%" })
		b.until("completed", "job", 2*time.Minute, completed)
		if b.fleet.peak["uid-job"] != 2 {
			t.Errorf("%d at once", b.fleet.peak["uid-job"])
		}
	})
}

// Somebody edits the image midway. The job cancels and releases the old image, and pulls the new
// one everywhere. At no time do more nodes pull than may.
func TestImageChanged(t *testing.T) {
	inBed(t, func(t *testing.T, b *bed) {
		b.addMany(10, time.Minute)
		for i := range 5 {
			b.fleet.change(fmt.Sprintf("node-%d", i), func(n *simNode) { n.old = true })
		}
		b.create("job", spec{ImagePullJobTemplate: template{Parallelism: parallel(4)}})
		b.until("half way", "job", 5*time.Minute,
			func(j *job) bool { return j.Status.Succeeded >= 4 && b.fleet.flying("uid-job") > 0 })
		b.edit("job", func(j *job) { j.Spec.Image = "nginx:2" })
		j := b.until("completed", "job", 10*time.Minute, completed)
		b.want(j, "True Succeeded", "10/0/10/0")
		if j.Status.ObservedGeneration != 2 {
			t.Errorf("observed generation %d", j.Status.ObservedGeneration)
		}
		if b.fleet.peak["uid-job"] > 4 {
			t.Errorf("%d at once", b.fleet.peak["uid-job"])
		}
		for name := range b.fleet.begun() {
			if r := b.fleet.last(name); r.GetImage() != "nginx:2" {
				t.Errorf("%s has %s", name, r.GetImage())
			}
			if pins := strings.Join(b.fleet.pinned(name), " "); pins != "nginx:2" {
				t.Errorf("%s pins %s", name, pins)
			}
		}
		if writes := b.writesOf("job"); writes > 2*budget(10) {
			t.Errorf("%d writes", writes)
		}
	})
}

// Somebody edits the time limit. Pulls under way begin again with the new one, failed nodes try
// again, and nodes that are done stay done.
func TestPullPolicyChanged(t *testing.T) {
	inBed(t, func(t *testing.T, b *bed) {
		b.add("done", &simNode{takes: time.Second})
		b.add("fails", &simNode{takes: time.Second, outcome: "Timeout"})
		b.add("hangs", &simNode{takes: time.Second, stuck: true})
		b.create("job", spec{ImagePullJobTemplate: template{Parallelism: parallel(3)}})
		b.until("under way", "job", time.Minute,
			func(j *job) bool { return j.Status.Failed == 1 && j.Status.Succeeded == 1 })
		b.fleet.change("fails", func(n *simNode) { n.outcome = "" })
		b.edit("job", func(j *job) {
			j.Spec.PullPolicy = &v1beta1.PullPolicy{TimeoutSeconds: number(int32(60)), BackoffLimit: number(int32(1))}
		})
		j := b.until("completed", "job", 4*time.Minute, completed)
		b.want(j, "True NodesFailed", "3/0/2/1")
		if got := b.fleet.begun(); got["done"] != 1 || got["fails"] != 2 || got["hangs"] != 2 {
			t.Errorf("pulls begun: %v", got)
		}
		if r := b.fleet.last("hangs"); r.GetAttemptTimeout().AsDuration() != time.Minute || r.GetMaxAttempts() != 2 {
			t.Errorf("request %v", r)
		}
	})
}

func TestSelectorChanged(t *testing.T) {
	inBed(t, func(t *testing.T, b *bed) {
		b.addMany(3, time.Minute)
		b.create("job",
			spec{ImagePullJobTemplate: template{Parallelism: parallel(2), Selector: names("node-0", "node-1")}})
		b.until("at work", "job", time.Minute, func(*job) bool { return b.fleet.flying("uid-job") == 2 })
		time.Sleep(10 * time.Second)
		b.edit("job", func(j *job) { j.Spec.Selector = names("node-1", "node-2") })
		j := b.until("completed", "job", 5*time.Minute, completed)
		b.want(j, "True Succeeded", "2/0/2/0")
		if b.fleet.peak["uid-job"] != 2 {
			t.Errorf("%d at once", b.fleet.peak["uid-job"])
		}
		if got := b.fleet.begun(); got["node-0"] != 1 || got["node-1"] != 1 || got["node-2"] != 1 {
			t.Errorf("pulls begun: %v", got)
		}
		if op := b.fleet.nodes["node-0"].pulls[b.fleet.last("node-0").
			GetUid()].op; op.GetPhase() != opsv1.PullPhase_PULL_CANCELLED {
			t.Errorf("pull on the node that was let go: %v", op)
		}
	})
}

// A job that has ended begins again when what it is about changes, and not when anything else does.
func TestCompletedJobChanged(t *testing.T) {
	inBed(t, func(t *testing.T, b *bed) {
		b.add("good", &simNode{takes: time.Second})
		b.add("bad", &simNode{takes: time.Second, outcome: "NotFound"})
		b.create("job", spec{ImagePullJobTemplate: template{Parallelism: parallel(2)}})
		first := b.until("completed", "job", time.Minute, completed)
		b.want(first, "True NodesFailed", "2/0/1/1")
		b.edit("job", func(j *job) { j.Spec.CompletionPolicy.TTLSecondsAfterFinished = number(int32(3600)) })
		time.Sleep(time.Minute)
		synctest.Wait()
		if got := b.fleet.begun(); got["good"] != 1 || got["bad"] != 1 {
			t.Errorf("pulls begun after an edit of the TTL: %v", got)
		}
		b.fleet.change("bad", func(n *simNode) { n.outcome = "" })
		b.edit("job", func(j *job) { j.Spec.Selector = names("good", "bad") })
		j := b.until("completed again", "job", time.Minute, func(j *job) bool {
			return completed(j) && j.Status.CompletionTime.After(first.Status.CompletionTime.Time)
		})
		b.want(j, "True Succeeded", "2/0/2/0")
		if got := b.fleet.begun(); got["good"] != 1 || got["bad"] != 2 {
			t.Errorf("pulls begun: %v", got)
		}
		b.edit("job", func(j *job) { j.Spec.Image = "nginx:2" })
		b.until("completed a third time", "job", time.Minute, func(*job) bool {
			return strings.Join(b.fleet.pinned("good"), " ") == "nginx:2" &&
				strings.Join(b.fleet.pinned("bad"), " ") == "nginx:2"
		})
	})
}

func TestDeletedJob(t *testing.T) {
	inBed(t, func(t *testing.T, b *bed) {
		b.addMany(4, time.Minute)
		b.create("job", spec{ImagePullJobTemplate: template{Parallelism: parallel(2)}})
		b.until("half way", "job", 5*time.Minute,
			func(j *job) bool { return j.Status.Succeeded == 2 && b.fleet.flying("uid-job") == 2 })
		b.delete("job")
		b.until("gone", "job", time.Second, gone)
		if n := b.fleet.flying("uid-job"); n != 0 {
			t.Errorf("%d pulls go on", n)
		}
		for name := range b.fleet.begun() {
			if pins := b.fleet.pinned(name); len(pins) != 0 {
				t.Errorf("%s pins %v", name, pins)
			}
		}
	})
}

// The deletion of a job that had ended before the controller began does not wait for nodes that are
// away. The other nodes are told.
func TestDeletedJobWithNodesAway(t *testing.T) {
	inBed(t, func(t *testing.T, b *bed) {
		b.addMany(3, time.Second)
		b.create("job", spec{})
		b.until("completed", "job", time.Minute, completed)
		b.fleet.change("node-1", func(n *simNode) { n.silent = true })
		b.restart()
		begin := time.Now()
		b.delete("job")
		b.until("gone", "job", time.Second, gone)
		if took := time.Since(begin); took > time.Second {
			t.Errorf("took %s, though a job that has ended holds nothing", took)
		}
		time.Sleep(10 * time.Second)
		for name, want := range map[string]int{"node-0": 0, "node-1": 1, "node-2": 0} {
			if pins := b.fleet.pinned(name); len(pins) != want {
				t.Errorf("%s pins %v", name, pins)
			}
		}
	})
}

// The pins of a job outlive the job when ttlSecondsAfterFinished has passed. The finalizer does not
// outlive the job's end.
func TestTimeToLive(t *testing.T) {
	inBed(t, func(t *testing.T, b *bed) {
		b.addMany(1, time.Second)
		b.create("job",
			spec{ImagePullJobTemplate: template{
				CompletionPolicy: v1beta1.CompletionPolicy{TTLSecondsAfterFinished: number(int32(20))}}})
		begin := time.Now()
		b.until("gone", "job", time.Minute, gone)
		if took := time.Since(begin); took < 20*time.Second || took > 23*time.Second {
			t.Errorf("gone after %s", took)
		}
		if len(b.fleet.pinned("node-0")) != 1 {
			t.Error("no pin left")
		}
		b.create("keeps", spec{Image: "other"}, v1beta1.PinForAnnotation, "1h")
		b.until("completed and free", "keeps", time.Minute,
			func(j *job) bool { return completed(j) && len(j.Finalizers) == 0 })
		if pins := b.fleet.pinned("node-0"); len(pins) != 2 {
			t.Errorf("pins %v of two jobs that have ended", pins)
		}
	})
}

func TestDeadline(t *testing.T) {
	inBed(t, func(t *testing.T, b *bed) {
		b.add("quick", &simNode{takes: time.Second})
		b.add("slow", &simNode{takes: time.Hour})
		b.add("away", &simNode{silent: true})
		b.create("job", spec{ImagePullJobTemplate: template{
			Parallelism:      parallel(3),
			CompletionPolicy: v1beta1.CompletionPolicy{ActiveDeadlineSeconds: number(int64(60))},
		}})
		begin := time.Now()
		j := b.until("completed", "job", 5*time.Minute, completed)
		if took := time.Since(begin); took < time.Minute || took > time.Minute+time.Second {
			t.Errorf("took %s", took)
		}
		b.want(j, "True DeadlineExceeded", "3/0/1/2")
		if j.Status.Message != "job exceeds activeDeadlineSeconds" ||
			strings.Join(j.Status.FailedNodes, " ") != "away slow" ||
			condition(j, "Succeeded") != "False DeadlineExceeded" {
			t.Errorf("status %+v", j.Status)
		}
		// The status says which nodes those are and how far they were.
		if len(j.Status.SkippedNodes) != 0 {
			t.Errorf("skipped nodes of a job that has ended: %+v", j.Status.SkippedNodes)
		}
		why := meta.FindStatusCondition(j.Status.Conditions, "Succeeded").Message
		if r := j.Status.FailureReasons; len(r) != 1 || r[0].Count != 2 ||
			strings.Join(r[0].Nodes, " ") != "away slow" ||
			!strings.Contains(why, "DeadlineExceeded on 2 (away, slow): ") {
			t.Errorf("%q, reasons %+v", why, r)
		}
		if f := j.Status.Failures; len(f) != 2 || !strings.HasPrefix(f[0].Message, "NodeUnreachable: ") ||
			!strings.HasPrefix(f[1].Message, "it was ") {
			t.Errorf("failures %+v", f)
		}
		time.Sleep(time.Second)
		synctest.Wait()
		if n := b.fleet.flying("uid-job"); n != 0 || len(b.fleet.pinned("quick")) != 1 {
			t.Errorf("%d pulls go on; quick pins %v", n, b.fleet.pinned("quick"))
		}
	})
}

// Two jobs for one image do not disturb each other, neither while they run nor when somebody
// deletes one.
func TestTwoJobsOneImage(t *testing.T) {
	inBed(t, func(t *testing.T, b *bed) {
		b.addMany(4, time.Minute)
		b.create("one", spec{ImagePullJobTemplate: template{Parallelism: parallel(1)}})
		b.create("two", spec{ImagePullJobTemplate: template{Parallelism: parallel(2), ImagePullPolicy: "Always"}})
		b.until("at work", "one", time.Minute,
			func(*job) bool { return b.fleet.flying("uid-one") == 1 && b.fleet.flying("uid-two") == 2 })
		time.Sleep(70 * time.Second)
		b.delete("one")
		b.until("gone", "one", time.Minute, gone)
		j := b.until("completed", "two", 5*time.Minute, completed)
		b.want(j, "True Succeeded", "4/0/4/0")
		for name := range b.fleet.begun() {
			if pins := b.fleet.nodes[name].pins; len(pins) != 1 ||
				!pins[simPin{"ImagePullJob/ns/two/uid-two", "nginx"}] {
				t.Errorf("%s pins %v", name, pins)
			}
		}
	})
}

// A node without a proxy, one that is not ready, and one that does not answer hold up nobody, and
// the job ends.
func TestNodesAway(t *testing.T) {
	inBed(t, func(t *testing.T, b *bed) {
		b.add("well", &simNode{takes: time.Second})
		b.add("bare", &simNode{refused: true})
		b.add("down", &simNode{takes: time.Second})
		b.node("down", ready(corev1.ConditionUnknown))
		b.add("mute", &simNode{takes: time.Second, silent: true})
		b.add("busy", &simNode{takes: time.Second, busy: 3})
		b.create("job", spec{}) // one at a time
		j := b.until("waiting", "job", 3*time.Minute,
			func(j *job) bool { return condition(j, "Complete") == "False WaitingForNodes" && j.Status.Failed == 1 })
		if s := j.Status; s.Succeeded != 2 || s.Skipped != 2 || len(s.SkippedNodes) != 2 ||
			s.SkippedNodes[0].Reason != "NodeNotReady" || s.SkippedNodes[1].Reason != "NodeUnreachable" {
			t.Errorf("status %+v", s)
		}
		if f := j.Status.Failures; len(f) != 1 || f[0].Reason != "NoProxy" ||
			!strings.Contains(f[0].Message, "install cri-proxy") {
			t.Errorf("failures %+v", f)
		}
		// Nodes that come back in time get the image, also the node that had failed.
		b.node("down", ready(corev1.ConditionTrue))
		b.fleet.change("bare", func(n *simNode) { n.refused = false })
		b.until("two served", "job", 2*time.Minute,
			func(j *job) bool { return j.Status.Succeeded == 4 && j.Status.Failed == 0 })
		j = b.until("completed", "job", nodeTimeout+time.Minute, completed)
		b.want(j, "True NodesFailed", "5/0/4/1")
		if f := j.Status.Failures; len(f) != 1 || f[0].Node != "mute" || f[0].Reason != "NodeUnreachable" {
			t.Errorf("failures %+v", f)
		}
		if !strings.Contains(b.told(), "PullImageFailed: node bare: NoProxy") ||
			!strings.Contains(b.told(), "PullIncomplete: 1 of 5 nodes have no image") {
			t.Errorf("events:\n%s", b.told())
		}
	})
}

// A node that falls silent while it pulls lets another node pull after a while, and goes on when it
// is back.
func TestNodeFallsSilent(t *testing.T) {
	inBed(t, func(t *testing.T, b *bed) {
		b.addMany(2, 2*time.Minute)
		b.create("job", spec{})
		b.until("at work", "job", time.Minute, func(*job) bool { return b.fleet.flying("uid-job") == 1 })
		var first, second string
		for name, n := range b.fleet.begun() {
			if n == 1 {
				first = name
			} else {
				second = name
			}
		}
		b.fleet.change(first, func(n *simNode) { n.silent = true })
		begin := time.Now()
		b.until("on the other node", "job", 5*time.Minute, func(*job) bool { return b.fleet.begun()[second] == 1 })
		if took := time.Since(begin); took < silenceTimeout || took > silenceTimeout+newsTimeout+15*time.Second {
			t.Errorf("took %s", took)
		}
		b.fleet.change(first, func(n *simNode) { n.silent = false })
		j := b.until("completed", "job", 5*time.Minute, completed)
		b.want(j, "True Succeeded", "2/0/2/0")
		if b.fleet.begun()[first] != 1 {
			t.Errorf("%d pulls on the node that was silent", b.fleet.begun()[first])
		}
	})
}

// A pull that has outlived its process on the node gets its credentials again.
func TestCredentialsNeeded(t *testing.T) {
	inBed(t, func(t *testing.T, b *bed) {
		b.add("node", &simNode{takes: time.Second, lacks: true})
		b.create("job", spec{})
		j := b.until("completed", "job", 30*time.Second, completed)
		b.want(j, "True Succeeded", "1/0/1/0")
	})
}

// The controller passes over a UID that the node has for something else. A pull that somebody
// cancels by hand fails.
func TestOddAnswers(t *testing.T) {
	inBed(t, func(t *testing.T, b *bed) {
		b.add("node", &simNode{takes: time.Minute})
		b.create("job", spec{})
		b.until("at work", "job", time.Second, func(*job) bool { return b.fleet.flying("uid-job") == 1 })
		uid := b.fleet.last("node").GetUid()
		if _, err := b.fleet.CancelPull(t.Context(), nodes.Node{Name: "node"}, uid, "", "by hand"); err != nil {
			t.Fatal(err)
		}
		j := b.until("completed", "job", time.Minute, completed)
		b.want(j, "True NodesFailed", "1/0/0/1")
		if f := j.Status.Failures; len(f) != 1 || f[0].Reason != "Cancelled" || f[0].Message != "by hand" {
			t.Errorf("failures %+v", f)
		}
		w, _ := jobspec.Of(&job{ObjectMeta: metav1.ObjectMeta{Namespace: "ns", Name: "other", UID: "uid-other"},
			Spec: spec{Image: "nginx"}})
		if _, err := b.fleet.Pull(t.Context(), nodes.Node{Name: "node"},
			&opsv1.PullRequest{Uid: w.PullUID(0), Image: "else"}); err != nil {
			t.Fatal(err)
		}
		b.create("other", spec{})
		j = b.until("completed", "other", 5*time.Minute, completed)
		b.want(j, "True Succeeded", "1/0/1/0")
	})
}

func TestInvalidSpec(t *testing.T) {
	inBed(t, func(t *testing.T, b *bed) {
		b.addMany(1, time.Second)
		b.create("job", spec{}, v1beta1.PinForAnnotation, "soon")
		j := b.until("refused", "job", time.Second,
			func(j *job) bool { return condition(j, "Complete") == "False InvalidSpec" })
		if !strings.Contains(j.Status.Message, v1beta1.PinForAnnotation) || len(b.fleet.calls) != 0 {
			t.Errorf("message %q, calls %v", j.Status.Message, b.fleet.calls)
		}
		b.edit("job", func(j *job) { j.Annotations[v1beta1.PinForAnnotation] = "2h" })
		b.until("completed", "job", time.Minute, completed)
		b.create("selector", spec{ImagePullJobTemplate: template{Selector: &v1beta1.ImagePullJobNodeSelector{
			LabelSelector: metav1.LabelSelector{
				MatchExpressions: []metav1.LabelSelectorRequirement{{Key: "a", Operator: "Near"}}},
		}}})
		b.until("refused", "selector", time.Second,
			func(j *job) bool { return condition(j, "Complete") == "False InvalidSpec" })
		if !strings.Contains(b.told(), "selector Warning InvalidSpec: spec.selector") {
			t.Errorf("events:\n%s", b.told())
		}
	})
}

func TestPodSelector(t *testing.T) {
	inBed(t, func(t *testing.T, b *bed) {
		b.addMany(4, time.Second)
		for i, p := range []*corev1.Pod{
			{Spec: corev1.PodSpec{NodeName: "node-0"}},
			{Spec: corev1.PodSpec{NodeName: "node-1"}, Status: corev1.PodStatus{Phase: corev1.PodSucceeded}}, {},
		} {
			p.Namespace, p.Name, p.Labels = "ns", string(rune('a'+i)), map[string]string{"app": "web"}
			if err := b.api.Create(t.Context(), p); err != nil {
				t.Fatal(err)
			}
		}
		other := &corev1.Pod{ObjectMeta: metav1.ObjectMeta{Namespace: "elsewhere", Name: "a",
			Labels: map[string]string{"app": "web"}}, Spec: corev1.PodSpec{NodeName: "node-2"}}
		if err := b.api.Create(t.Context(), other); err != nil {
			t.Fatal(err)
		}
		// node-3 has created this pod with kubelet's credentials, to get what is for the pods of
		// the namespace.
		mirror := &corev1.Pod{ObjectMeta: metav1.ObjectMeta{
			Namespace: "ns", Name: "mirror", Labels: map[string]string{"app": "web"},
			Annotations: map[string]string{corev1.MirrorPodAnnotationKey: "x"},
		}, Spec: corev1.PodSpec{NodeName: "node-3"}}
		if err := b.api.Create(t.Context(), mirror); err != nil {
			t.Fatal(err)
		}
		pods := &v1beta1.ImagePullJobPodSelector{
			LabelSelector: metav1.LabelSelector{MatchLabels: map[string]string{"app": "web"}}}
		b.create("job",
			spec{ImagePullJobTemplate: template{PodSelector: pods, Selector: &v1beta1.ImagePullJobNodeSelector{}}})
		j := b.until("completed", "job", time.Minute, completed)
		b.want(j, "True Succeeded", "1/0/1/0")
		if b.fleet.last("node-0") == nil || b.fleet.last("node-3") != nil {
			t.Error("not on the pod's node and no other")
		}
		b.create("never",
			spec{ImagePullJobTemplate: template{PodSelector: pods,
				CompletionPolicy: v1beta1.CompletionPolicy{Type: v1beta1.Never}}})
		got := b.r.JobsOfPod(t.Context(),
			&corev1.Pod{ObjectMeta: metav1.ObjectMeta{Namespace: "ns", Labels: map[string]string{"app": "web"}}})
		if len(got) != 1 || got[0].Name != "never" {
			t.Errorf("jobs of the pod: %v", got)
		}
	})
}

func secret(name string, kind corev1.SecretType, key, data string) *corev1.Secret {
	return &corev1.Secret{ObjectMeta: metav1.ObjectMeta{Namespace: "ns", Name: name}, Type: kind,
		Data: map[string][]byte{key: []byte(data)}}
}

const password = "hunter2"

func secretsForTest() []client.Object {
	auth := base64.StdEncoding.EncodeToString([]byte("bob:" + password))
	return []client.Object{
		secret("json", corev1.SecretTypeDockerConfigJson, ".dockerconfigjson",
			`{"auths":{"https://registry:5000/v2/":{"auth":"`+auth+`"},"registry:5000/team":{"username":"u","password":"`+
				password+`"},"*.example.com":{"identitytoken":"`+password+`"}}}`),
		secret("cfg", corev1.SecretTypeDockercfg, ".dockercfg",
			`{"https://index.docker.io/v1/":{"username":"d","password":"`+password+`"}}`),
		secret("opaque", corev1.SecretTypeOpaque, "x", password),
		secret("broken", corev1.SecretTypeDockerConfigJson, ".dockerconfigjson",
			`{"auths":{"a":{"auth":"`+password+`!"}}}`),
		&corev1.ServiceAccount{ObjectMeta: metav1.ObjectMeta{Namespace: "ns", Name: "default"},
			ImagePullSecrets: []corev1.LocalObjectReference{{Name: "cfg"}, {Name: "lost"}}},
	}
}

// Secrets reach the nodes and nobody else.
func TestPullSecrets(t *testing.T) {
	inBed(t, func(t *testing.T, b *bed) {
		b.addMany(1, time.Second)
		for _, o := range secretsForTest() {
			if err := b.api.Create(t.Context(), o); err != nil {
				t.Fatal(err)
			}
		}
		b.create("job",
			spec{Image: "registry:5000/team/app:1",
				ImagePullJobTemplate: template{PullSecrets: []string{"json", "missing", "opaque", "broken"}}})
		j := b.until("completed", "job", time.Minute, completed)
		b.want(j, "True Succeeded", "1/0/1/0")
		var got []string
		for _, c := range b.fleet.last("node-0").GetCredentials() {
			got = append(got, c.GetMatch()+" "+c.GetUsername()+" "+c.GetPassword()+c.GetIdentityToken())
		}
		want := "registry:5000/team u hunter2\nregistry:5000 bob hunter2" // and none of other registries
		if strings.Join(got, "\n") != want {
			t.Errorf("credentials\n%s\nwant\n%s", strings.Join(got, "\n"), want)
		}
		if condition(j, v1beta1.ConditionPullSecretsFound) != "False MissingOrInvalid" {
			t.Errorf("conditions %+v", j.Status.Conditions)
		}
		told := b.told()
		for _, part := range []string{"PullSecretMissing", "secret missing of pullSecrets does not exist",
			"secret lost of imagePullSecrets of ServiceAccount default",
			"secret opaque of pullSecrets cannot be used: its type is",
			"secret broken of pullSecrets cannot be used: the auth"} {
			if !strings.Contains(told, part) {
				t.Errorf("no %q in the events:\n%s", part, told)
			}
		}
		status, err := json.Marshal(j)
		if err != nil || strings.Contains(told, password) || strings.Contains(string(status), password) {
			t.Error("a password has got out")
		}
	})
}

// While the API server does not hand out the secrets, no node pulls without them.
func TestSecretsUnreadable(t *testing.T) {
	inBed(t, func(t *testing.T, b *bed) {
		b.addMany(1, time.Second)
		b.refuse = func(o client.Object) error {
			if _, ok := o.(*corev1.ServiceAccount); ok {
				return errors.New("try later")
			}
			return nil
		}
		b.create("job", spec{})
		j := b.until("waiting", "job", time.Minute, func(j *job) bool { return j.Status.Skipped == 1 })
		if s := j.Status.SkippedNodes; s[0].Reason != "PullSecretsUnreadable" || b.fleet.last("node-0") != nil {
			t.Errorf("skipped %+v", s)
		}
		b.mu.Lock()
		b.refuse = nil
		b.mu.Unlock()
		b.until("completed", "job", time.Minute, completed)
	})
}

// A finalizer that OpenKruise left on a job does not keep the job from being deleted.
func TestForeignFinalizer(t *testing.T) {
	inBed(t, func(t *testing.T, b *bed) {
		b.addMany(1, time.Second)
		j := &job{ObjectMeta: metav1.ObjectMeta{Namespace: "ns", Name: "job", UID: "uid-job",
			Finalizers: []string{v1beta1.DeletionProtectionFinalizer}}, Spec: spec{Image: "nginx"}}
		if err := b.api.Create(context.Background(), j); err != nil {
			t.Fatal(err)
		}
		b.delete("job")
		b.until("gone", "job", time.Minute, gone)
	})
}

// A job lasts longer than the nodes remember its pulls. Another controller goes on with the job
// without doing the pulls again, and an edit releases the image of before.
func TestForgottenPulls(t *testing.T) {
	inBed(t, func(t *testing.T, b *bed) {
		b.addMany(4, time.Minute)
		b.create("job", spec{})
		b.until("half way", "job", 5*time.Minute, func(j *job) bool { return j.Status.Succeeded == 2 })
		b.kill()
		begun := b.fleet.begun()
		for name := range begun {
			b.fleet.forget(name)
		}
		b.start()
		time.Sleep(time.Second)
		synctest.Wait()
		if flying := b.fleet.flying("uid-job"); flying != 1 {
			t.Errorf("%d pulls at once", flying)
		}
		j := b.until("completed", "job", 5*time.Minute, completed)
		b.want(j, "True Succeeded", "4/0/4/0")
		for name, n := range b.fleet.begun() {
			if n != 1 {
				t.Errorf("%d pulls on %s", n, name)
			}
			b.fleet.forget(name)
		}
		b.edit("job", func(j *job) { j.Spec.Image, j.Spec.Parallelism = "nginx:2", parallel(4) })
		b.until("completed again", "job", 5*time.Minute, func(j *job) bool {
			for name := range begun {
				if strings.Join(b.fleet.pinned(name), " ") != "nginx:2" {
					return false
				}
			}
			return completed(j)
		})
	})
}

// TestPinsAreBounded: the cluster's limits hold, whatever a job asks, and the job says what it does
// not get.
func TestPinsAreBounded(t *testing.T) {
	inBed(t, func(t *testing.T, b *bed) {
		b.r.Limits = jobspec.Limits{PinFor: 12 * time.Hour, PinPercent: 30}
		b.addMany(2, time.Second)
		b.create("long", spec{}, v1beta1.PinForAnnotation, "744h")
		b.create("short", spec{}, v1beta1.PinForAnnotation, "1h")
		j := b.until("completed", "long", time.Minute, completed)
		for _, got := range b.fleet.requestsOf("node-0") {
			want := map[bool]time.Duration{true: 12 * time.Hour,
				false: time.Hour}[strings.Contains(got.GetOwner(), "/long/")]
			if got.GetPinFor().AsDuration() != want || got.GetPinPercent() != 30 {
				t.Errorf("%s: pinned for %s, %d %%", got.GetOwner(), got.GetPinFor().AsDuration(), got.GetPinPercent())
			}
		}
		const text = "pinned for 12h0m0s and not for 744h0m0s, which is more than this cluster allows"
		if c := meta.FindStatusCondition(j.Status.Conditions, v1beta1.ConditionPinned); c == nil ||
			c.Status != "False" ||
			!strings.Contains(c.Message, text) {
			t.Errorf("conditions %+v", j.Status.Conditions)
		}
		if j := b.until("completed", "short", time.Minute, completed); meta.FindStatusCondition(j.Status.Conditions,
			v1beta1.ConditionPinned) != nil {
			t.Errorf("conditions %+v", j.Status.Conditions)
		}
		if strings.Count(b.told(), "PinsBounded") != 1 || !strings.Contains(b.told(), text) {
			t.Errorf("events\n%s", b.told())
		}
		// A node that has no room for a pin says so.
		b.fleet.change("node-1", func(n *simNode) { n.full = "the pins of others hold 8 GiB" })
		b.create("full", spec{Image: "large"})
		j = b.until("completed", "full", time.Minute, completed)
		b.want(j, "True Succeeded", "2/0/2/0")
		if c := meta.FindStatusCondition(j.Status.Conditions, v1beta1.ConditionPinned); c == nil ||
			c.Message != "on 1 nodes kubelet may remove the image when the disk is full, node node-1 says: the pins "+
				"of others hold 8 GiB" {
			t.Errorf("conditions %+v", j.Status.Conditions)
		}
	})
}

// The status of a job or list that has ended is about the present spec, also when the change does
// not begin the job again.
func TestChangedAfterTheEnd(t *testing.T) {
	inBed(t, func(t *testing.T, b *bed) {
		b.addMany(1, time.Second)
		b.create("job", spec{})
		b.createList("list", v1beta1.ImageListPullJobSpec{Images: []string{"a"}})
		j := b.until("completed", "job", time.Minute, completed)
		l := b.untilList("completed", "list", time.Minute, func(l *list) bool { return l.Status.CompletionTime != nil })
		for _, conditions := range []bool{meta.IsStatusConditionTrue(j.Status.Conditions, kstatus.Ready),
			meta.IsStatusConditionTrue(l.Status.Conditions, kstatus.Ready)} {
			if !conditions {
				t.Errorf("not Ready at the end: %+v, %+v", j.Status.Conditions, l.Status.Conditions)
			}
		}
		b.edit("job", func(j *job) { j.Spec.CompletionPolicy.TTLSecondsAfterFinished = number(int32(3600)) })
		j = b.until("seen", "job", time.Minute,
			func(j *job) bool { return j.Status.ObservedGeneration == j.Generation })
		if !completed(j) || b.fleet.begun()["node-0"] > 2 {
			t.Errorf("begun again: %+v", j.Status)
		}
	})
}
