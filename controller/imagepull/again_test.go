// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package imagepull_test

import (
	"fmt"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"sigs.k8s.io/controller-runtime/pkg/client"
	"sigs.k8s.io/controller-runtime/pkg/reconcile"

	"github.com/cri-proxy/cri-proxy/api/apps/v1beta1"
	joblist "github.com/cri-proxy/cri-proxy/controller/imagepull/list"
	jobspec "github.com/cri-proxy/cri-proxy/controller/imagepull/spec"
	"github.com/cri-proxy/cri-proxy/controller/nodes"
)

// A node joins at the moment at which a job begins again. The job chooses it.
func TestNodeJoinsWhenJobBeginsAgain(t *testing.T) {
	inBed(t, func(t *testing.T, b *bed) {
		b.addMany(1, time.Minute)
		b.create("job", spec{})
		b.until("completed", "job", 2*time.Minute, completed)
		b.mu.Lock()
		b.slow = func() time.Duration { return 2 * time.Second }
		b.mu.Unlock()
		b.edit("job", func(j *job) { j.Spec.Image = "nginx:2" })
		time.Sleep(time.Second) // the job knows its nodes, and writes that it begins
		synctest.Wait()
		b.add("late", &simNode{takes: time.Second})
		time.Sleep(10 * time.Second)
		b.mu.Lock()
		b.slow = nil
		b.mu.Unlock()
		j := b.until("completed", "job", 5*time.Minute, completed)
		b.want(j, "True Succeeded", "2/0/2/0")
	})
}

// A list does not end because of a child that has ended, and that is about to begin again.
func TestListWaitsForChildThatBeginsAgain(t *testing.T) {
	inBed(t, func(t *testing.T, b *bed) {
		b.addMany(1, time.Second)
		b.createList("list", v1beta1.ImageListPullJobSpec{Images: []string{"a"}})
		l := b.untilList("completed", "list", time.Minute, func(l *list) bool { return l.Status.CompletionTime != nil })
		b.kill()
		child := b.get(b.childrenOf("list")["a"])
		child.Spec.SandboxConfig = &v1beta1.SandboxConfig{Labels: map[string]string{"a": "b"}}
		child.Generation++
		if err := b.api.Update(t.Context(), child); err != nil {
			t.Fatal(err)
		}
		l.Status = v1beta1.ImageListPullJobStatus{StartTime: l.Status.StartTime, ObservedWork: jobspec.ListWork(l)}
		if err := b.api.Status().Update(t.Context(), l); err != nil {
			t.Fatal(err)
		}
		lists := &joblist.Reconciler{Client: b.api, Log: b.r.Log}
		if _, err := lists.Reconcile(t.Context(),
			reconcile.Request{NamespacedName: client.ObjectKeyFromObject(l)}); err != nil {
			t.Fatal(err)
		}
		if s := b.getList("list").Status; s.Completed != 0 || s.CompletionTime != nil {
			t.Errorf("status %+v", s)
		}
	})
}

// A controller that starts does not report again the failures that another one has seen, and does
// report those that follow. A pull that somebody has cancelled by hand stays cancelled.
func TestFailuresAcrossRestart(t *testing.T) {
	inBed(t, func(t *testing.T, b *bed) {
		b.add("first", &simNode{takes: time.Second, outcome: "Timeout"})
		b.add("second", &simNode{takes: time.Hour})
		b.add("third", &simNode{takes: time.Minute, outcome: "Timeout"})
		b.create("job", spec{ImagePullJobTemplate: template{Parallelism: parallel(3)}})
		b.until("at work", "job", time.Minute,
			func(j *job) bool { return j.Status.Failed == 1 && b.fleet.flying("uid-job") == 2 })
		uid := b.fleet.last("second").GetUid()
		if _, err := b.fleet.CancelPull(t.Context(), nodes.Node{Name: "second"}, uid, "", "by hand"); err != nil {
			t.Fatal(err)
		}
		b.until("half failed", "job", time.Minute, func(j *job) bool { return j.Status.Failed == 2 })
		b.restart()
		j := b.until("completed", "job", 2*time.Minute, completed)
		b.want(j, "True NodesFailed", "3/0/0/3")
		told := b.told()
		for name, n := range b.fleet.begun() {
			if count := strings.Count(told, "PullImageFailed: node "+name); count != 1 || n != 1 {
				t.Errorf("%s: %d pulls, %d events:\n%s", name, n, count, told)
			}
		}
	})
}

// A node whose clock is far behind is not told to pull again and again.
func TestNeverAndClockBehind(t *testing.T) {
	inBed(t, func(t *testing.T, b *bed) {
		b.add("node", &simNode{takes: time.Second, ahead: -30 * time.Hour})
		b.create("job", spec{ImagePullJobTemplate: template{
			CompletionPolicy: v1beta1.CompletionPolicy{Type: v1beta1.Never}}})
		b.until("done", "job", time.Minute, func(j *job) bool { return j.Status.Succeeded == 1 })
		time.Sleep(10 * time.Hour)
		synctest.Wait()
		if n := b.fleet.begun()["node"]; n != 1 {
			t.Errorf("%d pulls", n)
		}
	})
}

// Of each image that a job is about, ten failed nodes have an Event of their own.
func TestFailureEventsOfEachImage(t *testing.T) {
	inBed(t, func(t *testing.T, b *bed) {
		b.add("keeper", &simNode{takes: time.Hour})
		for i := range 12 {
			b.add(fmt.Sprintf("poor-%d", i), &simNode{takes: time.Second, outcome: "Timeout"})
		}
		b.create("job", spec{ImagePullJobTemplate: template{Parallelism: parallel(13)}})
		for i, want := range []int{10, 20} {
			b.until("failed", "job", time.Minute, func(j *job) bool { return j.Status.Failed == 12 })
			if n := strings.Count(b.told(), "PullImageFailed"); n != want {
				t.Errorf("%d events, want %d", n, want)
			}
			b.edit("job", func(j *job) { j.Spec.Image = fmt.Sprint("nginx:", i) })
			b.until("at work", "job", time.Minute, func(j *job) bool { return j.Status.Failed == 0 })
		}
	})
}
