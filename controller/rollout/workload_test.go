// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package rollout

import (
	"fmt"
	"slices"
	"strings"
	"testing"
	"time"

	appsv1 "k8s.io/api/apps/v1"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
	"sigs.k8s.io/controller-runtime/pkg/client"

	inplace "github.com/cri-proxy/cri-proxy/api/inplace/v1alpha1"
	"github.com/cri-proxy/cri-proxy/controller/rollout/podtemplate"
	"github.com/cri-proxy/cri-proxy/controller/rollout/workload"
)

func ref(kind string) inplace.Target {
	return inplace.Target{WorkloadRef: &inplace.WorkloadRef{APIVersion: "apps/v1", Kind: kind, Name: "web"}}
}

// uids are those of the pods, by name.
func (b *bed) uids() map[string]types.UID {
	uids := map[string]types.UID{}
	for _, pod := range b.pods() {
		uids[pod.Name] = pod.UID
	}
	return uids
}

// atRest says that a workload's controller has nothing left to do.
func (b *bed) atRest(kind, image string) {
	b.t.Helper()
	switch kind {
	case workload.KindStatefulSet:
		s := read(b, &appsv1.StatefulSet{})
		for _, pod := range b.pods() {
			if pod.Labels[podtemplate.RevisionLabel] != s.Status.UpdateRevision {
				b.t.Errorf("pod %s is of revision %s, not %s", pod.Name, pod.Labels[podtemplate.RevisionLabel],
					s.Status.UpdateRevision)
			}
		}
		if got := podtemplate.Images(&s.Spec.Template)["app"]; got != image {
			b.t.Errorf("template has %s", got)
		}
	case workload.KindDaemonSet:
		d := read(b, &appsv1.DaemonSet{})
		want := b.revise(d, workload.KindDaemonSet, &d.Spec.Template)
		for _, pod := range b.pods() {
			if pod.Labels[podtemplate.RevisionLabel] != want {
				b.t.Errorf("pod %s is of revision %s, not %s", pod.Name, pod.Labels[podtemplate.RevisionLabel], want)
			}
		}
		if got := podtemplate.Images(&d.Spec.Template)["app"]; got != image {
			b.t.Errorf("template has %s", got)
		}
	case workload.KindDeployment:
		d := read(b, &appsv1.Deployment{})
		var sets appsv1.ReplicaSetList
		if err := b.api.List(b.ctx, &sets); err != nil {
			b.t.Fatal(err)
		}
		active := withPods(sets.Items)
		if d.Spec.Paused || d.Annotations[inplace.PausedByAnnotation] != "" || len(active) != 1 {
			b.t.Fatalf("paused %v, annotations %v, %d ReplicaSets have pods", d.Spec.Paused, d.Annotations, len(active))
		}
		for _, t := range []*corev1.PodTemplateSpec{&d.Spec.Template, &active[0].Spec.Template} {
			if got := podtemplate.Images(t)["app"]; got != image {
				b.t.Errorf("template has %s", got)
			}
		}
	}
	for _, pod := range b.pods() {
		if runningImage(pod, "app") != image {
			b.t.Errorf("pod %s runs %s", pod.Name, runningImage(pod, "app"))
		}
	}
}

// withPods are the ReplicaSets that have pods.
func withPods(sets []appsv1.ReplicaSet) []appsv1.ReplicaSet {
	return slices.DeleteFunc(slices.Clone(sets), func(s appsv1.ReplicaSet) bool { return replicasOf(&s) == 0 })
}

func (b *bed) addOf(kind string, n int) {
	switch kind {
	case workload.KindStatefulSet:
		b.addStatefulSet(n)
	case workload.KindDaemonSet:
		b.addDaemonSet()
	case workload.KindDeployment:
		b.addDeployment(n)
	}
}

// Of each kind: the same pods with another image, the template too, back again, and back by itself
// after a failure, with the controller killed all the while or not.
func TestWorkload(t *testing.T) {
	for _, kind := range []string{workload.KindStatefulSet, workload.KindDaemonSet, workload.KindDeployment} {
		for _, killed := range []bool{false, true} {
			t.Run(fmt.Sprint(kind, " killed ", killed), func(t *testing.T) {
				inBed(t, func(t *testing.T, b *bed) {
					b.addNodes(5)
					b.addOf(kind, 5)
					before := b.uids()
					wait := func(generation int64) *rollout {
						t.Helper()
						for i := 0; killed && i < 60; i++ {
							time.Sleep(time.Duration(70+i*290%900) * time.Millisecond)
							b.restart()
						}
						return b.until("ended", "web", 10*time.Minute,
							func(r *rollout) bool { return ended(r) && r.Status.ObservedGeneration == generation })
					}
					b.create("web", spec{Target: ref(kind), Containers: to("app:2"),
						Strategy: settings{MaxUnavailable: number(2)}})
					b.want(wait(1), "True RolledOut", "5/5/5/0/0")
					b.atRest(kind, "app:2")
					b.edit("web", func(r *rollout) { r.Spec.Containers[0].Image = r.Status.PreviousImages["app"] })
					b.want(wait(2), "True RolledOut", "5/5/5/0/0")
					b.atRest(kind, "app:1")
					b.edit("web", func(r *rollout) { r.Spec.Containers[0].Image = "app:crash" })
					r := wait(3)
					if condition(r, inplace.ConditionComplete) != "False RolledBack" || r.Status.Failed == 0 {
						t.Errorf("status %+v", r.Status)
					}
					b.atRest(kind, "app:1")
					if after := b.uids(); fmt.Sprint(after) != fmt.Sprint(before) {
						t.Errorf("pods %v, were %v", after, before)
					}
					if b.peak > 2 {
						t.Errorf("%d were not ready at once", b.peak)
					}
				})
			})
		}
	}
}

// Scaling, pods that are deleted, a partition and a pause in the middle leave no pod on the wrong
// image.
func TestWorkloadChanges(t *testing.T) {
	for _, kind := range []string{workload.KindStatefulSet, workload.KindDeployment} {
		t.Run(kind, func(t *testing.T) {
			inBed(t, func(t *testing.T, b *bed) {
				scale := func(n int) {
					if kind == workload.KindStatefulSet {
						user(b, &appsv1.StatefulSet{}, func(s *appsv1.StatefulSet) { s.Spec.Replicas = replicas(n) })
					} else {
						user(b, &appsv1.Deployment{}, func(d *appsv1.Deployment) { d.Spec.Replicas = replicas(n) })
					}
				}
				b.addNodes(5)
				b.addOf(kind, 6)
				b.create("web", spec{Target: ref(kind), Containers: to("app:2"),
					Strategy: settings{Partition: number(3)}})
				b.until("held", "web", 5*time.Minute,
					func(r *rollout) bool { return condition(r, inplace.ConditionProgressing) == "True Partitioned" })
				if got := b.images("app"); got["app:2"] != 3 || kind == workload.KindStatefulSet &&
					runningImage(b.pod("web-2"), "app") != "app:1" {
					t.Errorf("images %v", got)
				}
				scale(8)
				b.until("held", "web", 5*time.Minute, func(r *rollout) bool {
					return condition(r, inplace.ConditionProgressing) == "True Partitioned" && r.Status.Ready == 8
				})
				b.edit("web", func(r *rollout) { r.Spec.Strategy.Partition = number(0) })
				b.remove(b.pods()[0].Name)
				time.Sleep(3 * time.Second)
				b.edit("web", func(r *rollout) { r.Spec.Paused = true })
				scale(5)
				time.Sleep(time.Minute)
				b.edit("web", func(r *rollout) { r.Spec.Paused = false })
				b.want(b.until("ended", "web", 10*time.Minute, ended), "True RolledOut", "5/5/5/0/0")
				b.atRest(kind, "app:2")
			})
		})
	}
}

// A StatefulSet goes from the highest ordinal down.
func TestOrdinals(t *testing.T) {
	inBed(t, func(t *testing.T, b *bed) {
		b.addNodes(3)
		b.addStatefulSet(12)
		var order []string
		for _, pod := range b.pods() {
			b.watch(pod.Name, func(before, now *corev1.Pod) {
				if before != nil && before.Spec.Containers[0].Image != now.Spec.Containers[0].Image {
					order = append(order, now.Name)
				}
			})
		}
		b.create("web", spec{Target: ref(workload.KindStatefulSet), Containers: to("app:2")})
		b.until("ended", "web", 10*time.Minute, ended)
		var want []string
		for i := range 12 {
			want = append(want, fmt.Sprintf("web-%d", 11-i))
		}
		if !slices.Equal(order, want) {
			t.Errorf("order %v", order)
		}
	})
}

// What a rollout of a workload refuses, and what it waits for.
func TestRefused(t *testing.T) {
	tests := []struct {
		name   string
		target inplace.Target
		setUp  func(*bed)
		change change
		want   string
	}{
		{"no such workload", ref(workload.KindDaemonSet), func(*bed) {}, to("app:2")[0],
			"there is no DaemonSet web in namespace ns"},
		{"a strategy that replaces pods", ref(workload.KindStatefulSet), func(b *bed) {
			b.addStatefulSet(1,
				func(s *appsv1.StatefulSet) {
					s.Spec.UpdateStrategy.Type = appsv1.RollingUpdateStatefulSetStrategyType
				})
		}, to("app:2")[0], "set updateStrategy.type to OnDelete"},
		{"no such container", ref(workload.KindDeployment), func(b *bed) { b.addDeployment(1) },
			change{Name: "none", Image: "a"}, "no container none that can be changed in place; it has app, side"},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			inBed(t, func(t *testing.T, b *bed) {
				b.addNodes(3)
				tt.setUp(b)
				b.create("web", spec{Target: tt.target, Containers: []change{tt.change}})
				b.until("refused", "web", time.Minute, func(r *rollout) bool {
					return condition(r, inplace.ConditionProgressing) == "False InvalidTarget" &&
						strings.Contains(r.Status.Message, tt.want)
				})
				b.delete(&rollout{ObjectMeta: metav1.ObjectMeta{Name: "web"}})
				b.until("gone", "web", time.Minute, gone)
			})
		})
	}
}

// A Deployment that the rollout has paused goes on when the rollout is deleted, wherever it was,
// and has no further ReplicaSet.
func TestDeploymentDeleted(t *testing.T) {
	for i := range 12 {
		t.Run(fmt.Sprint(i), func(t *testing.T) {
			inBed(t, func(t *testing.T, b *bed) {
				b.addNodes(3)
				b.addDeployment(4)
				b.create("web", spec{Target: ref(workload.KindDeployment), Containers: to("app:2")})
				time.Sleep(time.Duration(i) * 190 * time.Millisecond)
				b.delete(&rollout{ObjectMeta: metav1.ObjectMeta{Name: "web"}})
				b.restart()
				b.until("gone", "web", time.Minute, gone)
				time.Sleep(time.Minute)
				d := read(b, &appsv1.Deployment{})
				var sets appsv1.ReplicaSetList
				if err := b.api.List(t.Context(), &sets, client.InNamespace("ns")); err != nil {
					t.Fatal(err)
				}
				if active := withPods(sets.Items); d.Spec.Paused || len(active) != 1 || b.unready() != 0 {
					t.Errorf("paused %v, %d ReplicaSets with pods, %d not ready", d.Spec.Paused, len(active),
						b.unready())
				}
			})
		})
	}
}

// Pods of a template that differs in more than images are left to the workload.
func TestNotInPlace(t *testing.T) {
	inBed(t, func(t *testing.T, b *bed) {
		b.addNodes(3)
		b.addStatefulSet(3)
		user(b, &appsv1.StatefulSet{},
			func(s *appsv1.StatefulSet) { s.Spec.Template.Spec.Containers[0].Env[0].Value = "changed" })
		b.create("web", spec{Target: ref(workload.KindStatefulSet), Containers: to("app:2")})
		b.until("left", "web", time.Minute,
			func(r *rollout) bool { return condition(r, inplace.ConditionProgressing) == "False NotInPlace" })
		if got := b.images("app"); got["app:1"] != 3 {
			t.Errorf("images %v", got)
		}
		for i := range 3 {
			b.remove(fmt.Sprintf("web-%d", i))
		}
		b.until("ended", "web", time.Minute, ended)
		b.atRest(workload.KindStatefulSet, "app:2")
	})
}
