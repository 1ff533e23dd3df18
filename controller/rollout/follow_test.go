// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package rollout

import (
	"strings"
	"testing"
	"time"

	appsv1 "k8s.io/api/apps/v1"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	inplace "github.com/cri-proxy/cri-proxy/api/inplace/v1alpha1"
)

func annotated(o metav1.Object) {
	o.SetAnnotations(map[string]string{inplace.InPlaceAnnotation: "true"})
}

// setImage is kubectl set image.
func (b *bed) setImage(kind, image string) {
	b.t.Helper()
	if kind == kindStatefulSet {
		user(b, &appsv1.StatefulSet{}, func(s *appsv1.StatefulSet) { s.Spec.Template.Spec.Containers[0].Image = image })
	} else {
		user(b, &appsv1.DaemonSet{}, func(d *appsv1.DaemonSet) { d.Spec.Template.Spec.Containers[0].Image = image })
	}
}

// The pods of an annotated workload follow the images of its template: forward, back, into a failure and out of it.
func TestFollow(t *testing.T) {
	for _, kind := range []string{kindStatefulSet, kindDaemonSet} {
		t.Run(kind, func(t *testing.T) {
			inBed(t, func(t *testing.T, b *bed) {
				b.addNodes(4)
				if kind == kindStatefulSet {
					b.addStatefulSet(4, func(s *appsv1.StatefulSet) { annotated(s) })
				} else {
					b.addDaemonSet(func(d *appsv1.DaemonSet) { annotated(d) })
				}
				name := strings.ToLower(kind) + "-web"
				before := b.uids()
				with := func(image string) func(*rollout) bool {
					return func(r *rollout) bool { return ended(r) && r.Status.TargetImages["app"] == image }
				}
				r := b.until("there", name, time.Minute, with("app:1"))
				b.want(r, "True RolledOut", "4/4/4/0/0")
				b.setImage(kind, "app:2")
				b.want(b.until("ended", name, 5*time.Minute, with("app:2")), "True RolledOut", "4/4/4/0/0")
				b.atRest(kind, "app:2")
				b.setImage(kind, "app:1") // kubectl rollout undo
				b.until("ended", name, 5*time.Minute, with("app:1"))
				b.atRest(kind, "app:1")
				for range 2 { // and tried once more
					b.setImage(kind, "app:crash")
					time.Sleep(2 * time.Second)
					r = b.until("ended", name, 5*time.Minute, with("app:crash"))
					if condition(r, inplace.ConditionComplete) != "False RolledBack" {
						t.Errorf("status %+v", r.Status)
					}
					time.Sleep(time.Minute)
					b.atRest(kind, "app:1")
				}
				// Another image in the middle, twice.
				b.setImage(kind, "app:3")
				b.until("on its way", name, time.Minute, func(*rollout) bool { return b.images("app")["app:3"] > 0 })
				b.setImage(kind, "app:crash")
				time.Sleep(500 * time.Millisecond)
				b.setImage(kind, "app:4")
				b.until("ended", name, 5*time.Minute, with("app:4"))
				b.atRest(kind, "app:4")
				if after := b.uids(); len(after) != 4 || after["web-0"] != before["web-0"] {
					t.Errorf("pods %v, were %v", after, before)
				}
			})
		})
	}
}

// The rollout of an annotated workload waits for one that somebody has made for the same containers, and says so once; then it goes on.
func TestFollowWaits(t *testing.T) {
	for _, tc := range []struct {
		name  string
		there bool // the rollout of the workload, before the other one comes
	}{{"changed", true}, {"made", false}} {
		t.Run(tc.name, func(t *testing.T) {
			inBed(t, func(t *testing.T, b *bed) {
				b.webhook = true
				b.addNodes(2)
				b.addStatefulSet(2, func(s *appsv1.StatefulSet) {
					if tc.there {
						annotated(s)
					}
				})
				own := "statefulset-web"
				if tc.there {
					b.until("ended", own, time.Minute, ended)
				}
				b.create("manual", spec{
					Target:     inplace.Target{WorkloadRef: &inplace.WorkloadRef{APIVersion: "apps/v1", Kind: kindStatefulSet, Name: "web"}},
					Containers: []change{{Name: "app", Image: "app:2"}},
					Strategy:   settings{DrainSeconds: 60},
				})
				b.until("at work", "manual", time.Minute, func(r *rollout) bool { return r.Status.StartTime != nil })
				if !tc.there {
					user(b, &appsv1.StatefulSet{}, func(s *appsv1.StatefulSet) { annotated(s) })
				}
				b.edit("manual", func(r *rollout) { r.Spec.Paused = true })
				time.Sleep(5 * time.Minute)
				said := "web Normal WaitingForRollout: the pods do not follow the images of the template yet: InPlaceRollout manual is at work on container app of StatefulSet web"
				if n := strings.Count(b.told(), said); n != 1 {
					t.Errorf("said %d times, events\n%s", n, b.told())
				}
				if n := b.counted("refused"); n != 1 {
					t.Errorf("%d writes were refused", n)
				}
				b.edit("manual", func(r *rollout) { r.Spec.Paused = false })
				b.until("ended", "manual", 10*time.Minute, ended)
				r := b.until("follows", own, time.Minute, func(r *rollout) bool { return r != nil && ended(r) && r.Status.TargetImages["app"] == "app:2" })
				b.want(r, "True RolledOut", "2/2/2/0/0")
				b.atRest(kindStatefulSet, "app:2")
			})
		})
	}
}

// What an annotation cannot do is said, and what is more than images is left to the workload.
func TestFollowNot(t *testing.T) {
	inBed(t, func(t *testing.T, b *bed) {
		b.addNodes(3)
		b.addStatefulSet(2, func(s *appsv1.StatefulSet) {
			annotated(s)
			s.Spec.UpdateStrategy.Type = appsv1.RollingUpdateStatefulSetStrategyType
		})
		if !strings.Contains(b.told(), "annotation cri-proxy.io/in-place has no effect: set updateStrategy.type to OnDelete") || b.get("statefulset-web") != nil {
			t.Errorf("events\n%s", b.told())
		}
		user(b, &appsv1.StatefulSet{}, func(s *appsv1.StatefulSet) { s.Spec.UpdateStrategy.Type = appsv1.OnDeleteStatefulSetStrategyType })
		b.until("there", "statefulset-web", time.Minute, ended)
		user(b, &appsv1.StatefulSet{}, func(s *appsv1.StatefulSet) {
			s.Spec.Template.Spec.Containers[0].Image = "app:2"
			s.Spec.Template.Spec.Containers = append(s.Spec.Template.Spec.Containers, corev1.Container{Name: "third", Image: "third:1"})
		})
		r := b.until("left", "statefulset-web", time.Minute, func(r *rollout) bool { return condition(r, inplace.ConditionProgressing) == "False NotInPlace" })
		if got := b.images("app"); got["app:1"] != 2 || r.Status.Failed != 0 || !strings.Contains(b.told(), "Warning NotInPlace") {
			t.Errorf("images %v, status %+v, events\n%s", got, r.Status, b.told())
		}
		b.remove("web-0")
		b.remove("web-1")
		b.until("ended", "statefulset-web", time.Minute, ended)
		b.atRest(kindStatefulSet, "app:2")
		user(b, &appsv1.StatefulSet{}, func(s *appsv1.StatefulSet) { s.Annotations = nil })
		b.until("gone", "statefulset-web", time.Minute, gone)
	})
}

// The gates of new pods are opened, and those of pods whose rollout has gone.
func TestGatesOfPods(t *testing.T) {
	inBed(t, func(t *testing.T, b *bed) {
		b.addNodes(1)
		now := metav1.Now()
		gate := func(kind corev1.PodConditionType, conditions ...corev1.PodCondition) func(*corev1.Pod) {
			return func(p *corev1.Pod) {
				p.Spec.ReadinessGates = []corev1.PodReadinessGate{{ConditionType: kind}}
				p.Status.Conditions = conditions
			}
		}
		b.addPod("new", "node-0", gate(inplace.ReadyGate))
		b.addPod("kruise-gate", "node-0", gate(inplace.KruiseReadyGate))
		b.addPod("kruise-pod", "node-0", gate(inplace.KruiseReadyGate), func(p *corev1.Pod) {
			p.OwnerReferences = []metav1.OwnerReference{{APIVersion: "apps.kruise.io/v1alpha1", Kind: "CloneSet", Name: "a", UID: "b"}}
		})
		b.addPod("orphan", "node-0", gate(inplace.ReadyGate, corev1.PodCondition{Type: inplace.ReadyGate, Status: corev1.ConditionFalse, Reason: gateUpdating, Message: "uid-gone x", LastTransitionTime: now}))
		b.addPod("other", "node-0", gate(inplace.ReadyGate, corev1.PodCondition{Type: inplace.ReadyGate, Status: corev1.ConditionFalse, Reason: "ByHand", LastTransitionTime: now}))
		time.Sleep(time.Minute)
		for name, want := range map[string]bool{"new": true, "kruise-gate": true, "kruise-pod": false, "orphan": true, "other": false} {
			if got := conditionOf(b.pod(name), corev1.PodReady).Status == corev1.ConditionTrue; got != want {
				t.Errorf("pod %s ready: %v", name, got)
			}
		}
	})
}
