// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package imagepull_test

import (
	"context"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
	"sigs.k8s.io/controller-runtime/pkg/client"
	"sigs.k8s.io/controller-runtime/pkg/reconcile"

	"github.com/cri-proxy/cri-proxy/api/apps/v1beta1"
)

type list = v1beta1.ImageListPullJob

func (b *bed) createList(name string, s v1beta1.ImageListPullJobSpec, annotations ...string) {
	b.t.Helper()
	l := &list{ObjectMeta: metav1.ObjectMeta{Namespace: "ns", Name: name, UID: types.UID("uid-" + name), Generation: 1,
		Annotations: map[string]string{}}, Spec: s}
	for i := 0; i < len(annotations); i += 2 {
		l.Annotations[annotations[i]] = annotations[i+1]
	}
	if err := b.api.Create(context.Background(), l); err != nil {
		b.t.Fatal(err)
	}
	b.lists.Add(reconcile.Request{NamespacedName: client.ObjectKeyFromObject(l)})
}

func (b *bed) getList(name string) *list {
	b.t.Helper()
	var l list
	err := b.api.Get(context.Background(), types.NamespacedName{Namespace: "ns", Name: name}, &l)
	if apierrors.IsNotFound(err) {
		return nil
	}
	if err != nil {
		b.t.Fatal(err)
	}
	return &l
}

func (b *bed) editList(name string, change func(*list)) {
	b.t.Helper()
	l := b.getList(name)
	change(l)
	l.Generation++
	if err := b.api.Update(context.Background(), l); err != nil {
		b.t.Fatal(err)
	}
	b.lists.Add(reconcile.Request{NamespacedName: client.ObjectKeyFromObject(l)})
}

func (b *bed) untilList(what, name string, within time.Duration, so func(*list) bool) *list {
	b.t.Helper()
	for end := time.Now().Add(within); ; time.Sleep(within / 1000) {
		synctest.Wait()
		l := b.getList(name)
		if so(l) {
			return l
		}
		if time.Now().After(end) {
			b.t.Fatalf("list %s not %s within %s: %+v\nevents:\n%s", name, what, within, l, b.told())
		}
	}
}

// children returns the images of the list's jobs that are not being deleted, by name of the job.
func (b *bed) childrenOf(name string) map[string]string {
	var all v1beta1.ImagePullJobList
	if err := b.api.List(context.Background(), &all); err != nil {
		b.t.Fatal(err)
	}
	images := map[string]string{}
	for _, j := range all.Items {
		if strings.HasPrefix(j.Name, name+"-") && j.DeletionTimestamp == nil {
			images[j.Spec.Image] = j.Name
		}
	}
	return images
}

func TestList(t *testing.T) {
	inBed(t, func(t *testing.T, b *bed) {
		b.addMany(2, time.Second)
		b.add("bad", &simNode{takes: time.Second, outcome: "NotFound"})
		b.createList("list", v1beta1.ImageListPullJobSpec{Images: []string{"a", "b"}, ImagePullJobTemplate: template{
			Selector: names("node-0", "node-1"), CompletionPolicy: v1beta1.CompletionPolicy{Type: v1beta1.Always,
				TTLSecondsAfterFinished: number(int32(60))},
		}}, v1beta1.PinForAnnotation, "2h")
		l := b.untilList("completed", "list", time.Minute, func(l *list) bool { return l.Status.CompletionTime != nil })
		if s := l.Status; s.Desired != 2 || s.Completed != 2 || s.Succeeded != 2 || s.Active != 0 ||
			s.StartTime == nil ||
			len(s.FailedImageStatuses) != 0 {
			t.Errorf("status %+v", s)
		}
		children := b.childrenOf("list")
		if len(children) != 2 || l.Labels[v1beta1.TemplateHashLabel] == "" {
			t.Errorf("children %v, labels %v", children, l.Labels)
		}
		child := b.get(children["a"])
		if child.Labels[v1beta1.TemplateHashLabel] != l.Labels[v1beta1.TemplateHashLabel] ||
			child.Spec.CompletionPolicy.TTLSecondsAfterFinished != nil ||
			child.Annotations[v1beta1.PinForAnnotation] != "2h" ||
			!metav1.IsControlledBy(child, l) {
			t.Errorf("child %+v", child)
		}
		writes := b.writesOf("list")
		b.untilList("gone", "list", 2*time.Minute, func(l *list) bool { return l == nil })
		if b.writesOf("list") != writes+1 {
			t.Errorf("%d writes while it waited to be deleted", b.writesOf("list")-writes)
		}
		// The garbage collector deletes the children, and nothing holds it up. Their pins stay.
		for _, name := range children {
			if j := b.get(name); len(j.Finalizers) != 0 {
				t.Errorf("child %s has finalizers %v", name, j.Finalizers)
			}
			b.delete(name)
		}
		time.Sleep(cleanUpTimeout)
		if len(b.fleet.pinned("node-0")) != 2 {
			t.Errorf("pins %v", b.fleet.pinned("node-0"))
		}
	})
}

func TestListWithFailures(t *testing.T) {
	inBed(t, func(t *testing.T, b *bed) {
		b.addMany(1, time.Second)
		b.add("bad", &simNode{takes: time.Second, outcome: "NotFound"})
		b.createList("list",
			v1beta1.ImageListPullJobSpec{Images: []string{"a"},
				ImagePullJobTemplate: template{Parallelism: parallel(2)}})
		l := b.untilList("completed", "list", time.Minute, func(l *list) bool { return l.Status.CompletionTime != nil })
		s := l.Status
		if s.Completed != 1 || s.Succeeded != 0 || len(s.FailedImageStatuses) != 1 {
			t.Fatalf("status %+v", s)
		}
		if f := s.FailedImageStatuses[0]; f.Name != "a" || f.ImagePullJob != b.childrenOf("list")["a"] ||
			!strings.Contains(f.Message, "failed on 1 of 2 nodes: NotFound on 1 (bad): the registry says NotFound") {
			t.Errorf("failure %+v", f)
		}
	})
}

// The list reports an image for which the API server refuses a job. The other images go their way.
func TestListDenied(t *testing.T) {
	inBed(t, func(t *testing.T, b *bed) {
		b.addMany(1, time.Second)
		b.denyImage("a")
		b.createList("list", v1beta1.ImageListPullJobSpec{Images: []string{"a", "b"}})
		l := b.untilList("as far as it goes", "list", time.Minute,
			func(l *list) bool { return l.Status.Succeeded == 1 })
		if f := l.Status.FailedImageStatuses; len(f) != 1 || f[0].Name != "a" ||
			!strings.Contains(f[0].Message, "exceeded quota: jobs") {
			t.Errorf("status %+v", l.Status)
		}
		time.Sleep(10 * time.Minute)
		if n := strings.Count(b.told(), "exceeded quota: jobs"); n != 1 {
			t.Errorf("told %d times:\n%s", n, b.told())
		}
		b.denyImage("")
		l = b.untilList("completed", "list", time.Minute, func(l *list) bool { return l.Status.CompletionTime != nil })
		if l.Status.Succeeded != 2 || len(l.Status.FailedImageStatuses) != 0 {
			t.Errorf("status %+v", l.Status)
		}
	})
}

// The jobs follow the images and the template of the list. The list creates a child again that
// somebody deletes while the list is at work, and not after its end.
func TestListChanged(t *testing.T) {
	inBed(t, func(t *testing.T, b *bed) {
		b.addMany(1, time.Minute)
		b.createList("list", v1beta1.ImageListPullJobSpec{Images: []string{"a", "b"}})
		b.untilList("at work", "list", time.Minute, func(l *list) bool { return l.Status.Active == 2 })
		before := b.childrenOf("list")
		b.editList("list", func(l *list) { l.Spec.Images = []string{"b", "c"} })
		b.untilList("changed", "list", 10*time.Second, func(*list) bool {
			now := b.childrenOf("list")
			return len(now) == 2 && now["b"] == before["b"] && now["c"] != ""
		})
		b.editList("list", func(l *list) { l.Spec.Parallelism = parallel(5) })
		b.untilList("changed", "list", 10*time.Second, func(*list) bool {
			now := b.childrenOf("list")
			return len(now) == 2 && now["b"] != before["b"]
		})
		b.delete(b.childrenOf("list")["c"])
		b.untilList("completed", "list", 5*time.Minute,
			func(l *list) bool { return l.Status.CompletionTime != nil && l.Status.Succeeded == 2 })
		b.delete(b.childrenOf("list")["c"])
		time.Sleep(time.Minute)
		synctest.Wait()
		if now := b.childrenOf("list"); len(now) != 1 {
			t.Errorf("children of a completed list: %v", now)
		}
		b.editList("list", func(l *list) { l.Spec.Images = []string{"b", "d"} })
		b.untilList("completed again", "list", 5*time.Minute, func(l *list) bool {
			return l.Status.CompletionTime != nil && l.Status.Succeeded == 2 && b.childrenOf("list")["d"] != ""
		})
	})
}

func TestListNever(t *testing.T) {
	inBed(t, func(t *testing.T, b *bed) {
		b.addMany(1, time.Second)
		b.createList("list",
			v1beta1.ImageListPullJobSpec{Images: []string{"a", "b"},
				ImagePullJobTemplate: template{CompletionPolicy: v1beta1.CompletionPolicy{Type: v1beta1.Never}}})
		b.untilList("served", "list", time.Minute, func(l *list) bool { return l.Status.Succeeded == 2 })
		b.add("late", &simNode{takes: time.Second})
		b.untilList("served late", "list", time.Minute, func(l *list) bool {
			return l.Status.Succeeded == 2 && len(b.fleet.pinned("late")) == 2 && l.Status.CompletionTime == nil
		})
	})
}
