// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package rollout

import (
	"fmt"
	"strings"
	"testing"
	"time"

	appsv1 "k8s.io/api/apps/v1"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	inplace "github.com/cri-proxy/cri-proxy/api/inplace/v1alpha1"
	"github.com/cri-proxy/cri-proxy/controller/pods"
	"github.com/cri-proxy/cri-proxy/controller/rollout/evaluate"
	"github.com/cri-proxy/cri-proxy/controller/rollout/workload"
)

func annotated(o metav1.Object) {
	o.SetAnnotations(map[string]string{inplace.InPlaceAnnotation: "true"})
}

// setImage is kubectl set image.
func (b *bed) setImage(kind, image string) {
	b.t.Helper()
	if kind == workload.KindStatefulSet {
		user(b, &appsv1.StatefulSet{}, func(s *appsv1.StatefulSet) { s.Spec.Template.Spec.Containers[0].Image = image })
	} else {
		user(b, &appsv1.DaemonSet{}, func(d *appsv1.DaemonSet) { d.Spec.Template.Spec.Containers[0].Image = image })
	}
}

// The pods of an annotated workload follow the images of its template: forward, back, into a
// failure and out of it.
func TestFollow(t *testing.T) {
	for _, kind := range []string{workload.KindStatefulSet, workload.KindDaemonSet} {
		t.Run(kind, func(t *testing.T) {
			inBed(t, func(t *testing.T, b *bed) {
				b.addNodes(4)
				if kind == workload.KindStatefulSet {
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
				for n := range 2 { // and tried once more
					b.setImage(kind, "app:crash")
					if n > 0 {
						b.annotate(kind, inplace.RetryAnnotation, "once more")
					}
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

// annotate sets an annotation of the workload.
func (b *bed) annotate(kind, key, value string) {
	b.t.Helper()
	if kind == workload.KindStatefulSet {
		user(b, &appsv1.StatefulSet{}, func(s *appsv1.StatefulSet) { s.Annotations[key] = value; s.Generation-- })
	} else {
		user(b, &appsv1.DaemonSet{}, func(d *appsv1.DaemonSet) { d.Annotations[key] = value; d.Generation-- })
	}
}

// scale is kubectl scale, or as good as that: something besides the template is changed.
func (b *bed) scale(kind string) {
	b.t.Helper()
	if kind == workload.KindStatefulSet {
		user(b, &appsv1.StatefulSet{},
			func(s *appsv1.StatefulSet) { s.Spec.Replicas = replicas(int(*s.Spec.Replicas) - 1) })
	} else {
		user(b, &appsv1.DaemonSet{}, func(d *appsv1.DaemonSet) { d.Spec.MinReadySeconds++ })
	}
}

// A GitOps controller that puts the image that has failed into the template again and again: it is
// tried once, put back once, and then left, which is said once.
func TestFollowFight(t *testing.T) {
	for _, kind := range []string{workload.KindStatefulSet, workload.KindDaemonSet} {
		t.Run(kind, func(t *testing.T) {
			inBed(t, func(t *testing.T, b *bed) {
				b.addNodes(3)
				if kind == workload.KindStatefulSet {
					b.addStatefulSet(3, func(s *appsv1.StatefulSet) { annotated(s) })
				} else {
					b.addDaemonSet(func(d *appsv1.DaemonSet) { annotated(d) })
				}
				name := strings.ToLower(kind) + "-web"
				b.until("there", name, time.Minute, ended)
				restarts := func() (n int32) {
					for _, pod := range b.pods() {
						for _, c := range pod.Status.ContainerStatuses {
							n += c.RestartCount
						}
					}
					return n
				}
				all := []string{"patch v1." + kind, "patch v1alpha1.InPlaceRollout", "status v1alpha1.InPlaceRollout",
					"patch v1.Pod", "status v1.Pod"}
				sum := func() (n int) {
					for _, what := range all {
						n += b.counted(what)
					}
					return n
				}
				at, first := map[time.Duration]int{}, int32(0)
				for n := range 24 { // for two minutes
					b.setImage(kind, "app:crash")
					time.Sleep(5 * time.Second)
					at[time.Duration(n+1)*5*time.Second] = sum()
					if n == 11 {
						first = restarts()
						b.restart() // what is known is not only in memory
					}
				}
				if n := at[2*time.Minute] - at[time.Minute]; n > 1 {
					t.Errorf("%d writes in the second minute", n)
				}
				if n := b.counted("patch v1." + kind); n > 1 {
					t.Errorf("the template was written %d times", n)
				}
				if n := restarts(); n > first {
					t.Errorf("%d restarts, were %d", n, first)
				}
				t.Logf("writes %v, %d restarts", at, first)
				r := b.get(name)
				if condition(r, inplace.ConditionComplete) != "False NotTriedAgain" ||
					condition(r, inplace.ConditionDegraded) != "True RolledBack" {
					t.Errorf("status %+v", r.Status)
				}
				said := "web Warning NotTriedAgain: what has failed"
				if n := strings.Count(b.told(), "\n"+said); n != 1 || !strings.Contains(r.Status.Message,
					"annotation cri-proxy.io/retry of the "+kind) {
					t.Errorf("said %d times, message %q, events\n%s", n, r.Status.Message, b.told())
				}
				if got := b.images("app"); got["app:1"] != 3 {
					t.Errorf("images %v", got)
				}
				// Git has the good one again: that is a goal, which is reached.
				b.setImage(kind, "app:1")
				b.want(b.until("ended", name, time.Minute, func(r *rollout) bool {
					return ended(r) &&
						r.Status.TargetImages["app"] == "app:1"
				}), "True RolledOut", "3/3/3/0/0")
				b.atRest(kind, "app:1")
			})
		})
	}
}

// After a rollback the good image that somebody sets is a goal, also if nobody saw the failed one
// in between; what is not about the template is none.
func TestFollowGoodAgain(t *testing.T) {
	for _, kind := range []string{workload.KindStatefulSet, workload.KindDaemonSet} {
		t.Run(kind, func(t *testing.T) {
			inBed(t, func(t *testing.T, b *bed) {
				b.addNodes(4)
				if kind == workload.KindStatefulSet {
					b.addStatefulSet(5, func(s *appsv1.StatefulSet) { annotated(s) })
				} else {
					b.addDaemonSet(func(d *appsv1.DaemonSet) { annotated(d) })
				}
				name := strings.ToLower(kind) + "-web"
				b.until("there", name, time.Minute, ended)
				b.setImage(kind, "app:crash")
				rolledBack := func(r *rollout) bool {
					return ended(r) && condition(r, inplace.ConditionComplete) == "False RolledBack"
				}
				r := b.until("rolled back", name, 5*time.Minute, rolledBack)
				if !strings.Contains(r.Status.Message, "change annotation cri-proxy.io/retry of "+kind+" web") {
					t.Errorf("message %q", r.Status.Message)
				}
				b.atRest(kind, "app:1")
				b.scale(kind)
				time.Sleep(time.Minute)
				if !rolledBack(b.get(name)) {
					t.Errorf("status %+v", b.get(name).Status)
				}
				b.annotate(kind, corev1.LastAppliedConfigAnnotation, "with app:1") // kubectl apply of what is there
				b.until("complete", name, time.Minute, func(r *rollout) bool {
					return ended(r) &&
						condition(r, inplace.ConditionComplete) == "True RolledOut"
				})
				b.setImage(kind, "app:crash")
				b.until("rolled back", name, 5*time.Minute, rolledBack)
				b.kill() // and does not see what is set first
				b.setImage(kind, "app:crash")
				b.setImage(kind, "app:1")
				b.start()
				b.until("complete", name, time.Minute, func(r *rollout) bool {
					return ended(r) &&
						condition(r, inplace.ConditionComplete) == "True RolledOut"
				})
				b.atRest(kind, "app:1")
			})
		})
	}
}

// The strategy of the rollout that an annotation makes is in another annotation, or in a rollout
// that is there before.
func TestFollowStrategy(t *testing.T) {
	t.Run("annotation", func(t *testing.T) {
		inBed(t, func(t *testing.T, b *bed) {
			b.addNodes(3)
			b.addStatefulSet(4, func(s *appsv1.StatefulSet) {
				annotated(s)
				s.Annotations[inplace.StrategyAnnotation] = `{"maxUnavailable": "50%", "onFailure": "Pause"}`
			})
			r := b.until("there", "statefulset-web", time.Minute, ended)
			if s := r.Spec.Strategy; s.MaxUnavailable.String() != "50%" || s.OnFailure != inplace.Pause ||
				s.ProgressDeadlineSeconds != 600 || s.Order != inplace.StopFirst {
				t.Errorf("strategy %+v", s)
			}
			b.annotate(workload.KindStatefulSet, inplace.StrategyAnnotation, `{"maxUnavailable": 3}`)
			r = b.until("changed", "statefulset-web", time.Minute,
				func(r *rollout) bool { return r.Spec.Strategy.MaxUnavailable.IntValue() == 3 })
			if !ended(r) || r.Spec.Strategy.OnFailure != inplace.Rollback {
				t.Errorf("rollout %+v", r)
			}
			b.annotate(workload.KindStatefulSet, inplace.StrategyAnnotation,
				`{"maxUnavailable": 3, "onfailing": "Pause"}`)
			b.setImage(workload.KindStatefulSet, "app:2")
			time.Sleep(time.Minute)
			if n := strings.Count(b.told(),
				"web Warning InvalidTarget: the pods do not follow the images of the template: annotation "+
					"cri-proxy.io/in-place-strategy: "); n != 1 || b.images("app")["app:1"] != 4 {
				t.Errorf("said %d times, images %v, events\n%s", n, b.images("app"), b.told())
			}
			b.annotate(workload.KindStatefulSet, inplace.StrategyAnnotation, "")
			b.until("ended", "statefulset-web", time.Minute, func(r *rollout) bool {
				return ended(r) &&
					r.Status.TargetImages["app"] == "app:2"
			})
		})
	})
	t.Run("made before", func(t *testing.T) {
		inBed(t, func(t *testing.T, b *bed) {
			b.addNodes(3)
			b.addStatefulSet(4)
			ttl := int32(3600)
			b.create("statefulset-web", spec{Target: ref(workload.KindStatefulSet), Containers: to("app:1"),
				Strategy: settings{MaxUnavailable: number(3), OnFailure: inplace.Pause}, TTLSecondsAfterFinished: &ttl})
			b.until("ended", "statefulset-web", time.Minute, ended)
			user(b, &appsv1.StatefulSet{}, func(s *appsv1.StatefulSet) { annotated(s) })
			r := b.until("taken over", "statefulset-web", time.Minute,
				func(r *rollout) bool { return ended(r) && len(r.OwnerReferences) == 1 && len(r.Spec.Containers) == 2 })
			if s := r.Spec.Strategy; s.MaxUnavailable.IntValue() != 3 || s.OnFailure != inplace.Pause ||
				r.Spec.TTLSecondsAfterFinished != nil {
				t.Errorf("rollout %+v", r.Spec)
			}
			b.setImage(workload.KindStatefulSet, "app:2")
			b.want(b.until("ended", "statefulset-web", time.Minute, func(r *rollout) bool {
				return ended(r) &&
					r.Status.TargetImages["app"] == "app:2"
			}), "True RolledOut", "4/4/4/0/0")
			b.atRest(workload.KindStatefulSet, "app:2")
		})
	})
	t.Run("of another workload", func(t *testing.T) {
		inBed(t, func(t *testing.T, b *bed) {
			b.addNodes(3)
			b.addStatefulSet(1)
			b.create("statefulset-web", spec{Target: inplace.Target{PodName: "other"}, Containers: to("app:1")})
			user(b, &appsv1.StatefulSet{}, func(s *appsv1.StatefulSet) { annotated(s) })
			time.Sleep(time.Minute)
			if !strings.Contains(b.told(), "there is another InPlaceRollout statefulset-web") ||
				len(b.get("statefulset-web").OwnerReferences) != 0 {
				t.Errorf("events\n%s", b.told())
			}
		})
	})
}

// The rollout of an annotated workload waits for one that somebody has made for the same
// containers, and says so once; then it goes on.
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
					Target: inplace.Target{WorkloadRef: &inplace.WorkloadRef{APIVersion: "apps/v1",
						Kind: workload.KindStatefulSet, Name: "web"}},
					Containers: []change{{Name: "app", Image: "app:2"}},
					Strategy:   settings{DrainSeconds: 60},
				})
				b.until("at work", "manual", time.Minute, func(r *rollout) bool { return r.Status.StartTime != nil })
				if !tc.there {
					user(b, &appsv1.StatefulSet{}, func(s *appsv1.StatefulSet) { annotated(s) })
				}
				b.edit("manual", func(r *rollout) { r.Spec.Paused = true })
				time.Sleep(5 * time.Minute)
				said := "web Normal WaitingForRollout: the pods do not follow the images of the template yet: " +
					"InPlaceRollout manual is at work on container app of StatefulSet web"
				if n := strings.Count(b.told(), said); n != 1 {
					t.Errorf("said %d times, events\n%s", n, b.told())
				}
				if n := b.counted("refused"); n != 1 {
					t.Errorf("%d writes were refused", n)
				}
				b.edit("manual", func(r *rollout) { r.Spec.Paused = false })
				b.until("ended", "manual", 10*time.Minute, ended)
				r := b.until("follows", own, time.Minute, func(r *rollout) bool {
					return r != nil && ended(r) &&
						r.Status.TargetImages["app"] == "app:2"
				})
				b.want(r, "True RolledOut", "2/2/2/0/0")
				b.atRest(workload.KindStatefulSet, "app:2")
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
		if !strings.Contains(b.told(), "annotation cri-proxy.io/in-place has no effect: set updateStrategy.type to "+
			"OnDelete") || b.get("statefulset-web") != nil {
			t.Errorf("events\n%s", b.told())
		}
		user(b, &appsv1.StatefulSet{},
			func(s *appsv1.StatefulSet) { s.Spec.UpdateStrategy.Type = appsv1.OnDeleteStatefulSetStrategyType })
		b.until("there", "statefulset-web", time.Minute, ended)
		user(b, &appsv1.StatefulSet{}, func(s *appsv1.StatefulSet) {
			s.Spec.Template.Spec.Containers[0].Image = "app:2"
			s.Spec.Template.Spec.Containers = append(s.Spec.Template.Spec.Containers,
				corev1.Container{Name: "third", Image: "third:1"})
		})
		r := b.until("left", "statefulset-web", time.Minute,
			func(r *rollout) bool { return condition(r, inplace.ConditionProgressing) == "False NotInPlace" })
		if got := b.images("app"); got["app:1"] != 2 || r.Status.Failed != 0 ||
			!strings.Contains(b.told(), "Warning NotInPlace") {
			t.Errorf("images %v, status %+v, events\n%s", got, r.Status, b.told())
		}
		b.remove("web-0")
		b.remove("web-1")
		b.until("ended", "statefulset-web", time.Minute, ended)
		b.atRest(workload.KindStatefulSet, "app:2")
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
			p.OwnerReferences = []metav1.OwnerReference{{APIVersion: "apps.kruise.io/v1alpha1", Kind: "CloneSet",
				Name: "a", UID: "b"}}
		})
		b.addPod("orphan", "node-0", gate(inplace.ReadyGate, corev1.PodCondition{Type: inplace.ReadyGate,
			Status: corev1.ConditionFalse, Reason: "InPlaceRollout", Message: "uid-gone x", LastTransitionTime: now}))
		b.addPod("other", "node-0", gate(inplace.ReadyGate, corev1.PodCondition{Type: inplace.ReadyGate,
			Status: corev1.ConditionFalse, Reason: "ByHand", LastTransitionTime: now}))
		time.Sleep(time.Minute)
		for name, want := range map[string]bool{"new": true, "kruise-gate": true, "kruise-pod": false, "orphan": true,
			"other": false} {
			if got := pods.Condition(b.pod(name), corev1.PodReady).Status == corev1.ConditionTrue; got != want {
				t.Errorf("pod %s ready: %v", name, got)
			}
		}
	})
}

// kubectl rollout restart of an annotated workload restarts all containers of all pods in place,
// each once; afterwards the pods are of the template's revision, and later images are rolled in
// place, too.
func TestFollowRestart(t *testing.T) {
	for _, kind := range []string{workload.KindStatefulSet, workload.KindDaemonSet} {
		for _, killed := range []bool{false, true} {
			t.Run(fmt.Sprint(kind, " killed ", killed), func(t *testing.T) {
				inBed(t, func(t *testing.T, b *bed) {
					b.addNodes(4)
					if kind == workload.KindStatefulSet {
						b.addStatefulSet(4, func(s *appsv1.StatefulSet) { annotated(s) })
					} else {
						b.addDaemonSet(func(d *appsv1.DaemonSet) { annotated(d) })
					}
					name := strings.ToLower(kind) + "-web"
					b.until("there", name, time.Minute, ended)
					before := b.uids()
					edit := func(image, at string) {
						t.Helper()
						set := func(t *corev1.PodTemplateSpec) {
							t.Spec.Containers[0].Image = image
							if t.Annotations = nil; at != "" {
								t.Annotations = map[string]string{evaluate.RestartedAt: at}
							}
						}
						if kind == workload.KindStatefulSet {
							user(b, &appsv1.StatefulSet{}, func(s *appsv1.StatefulSet) { set(&s.Spec.Template) })
						} else {
							user(b, &appsv1.DaemonSet{}, func(d *appsv1.DaemonSet) { set(&d.Spec.Template) })
						}
						for i := 0; killed && i < 40; i++ {
							time.Sleep(time.Duration(70+i*290%900) * time.Millisecond)
							b.restart()
						}
						time.Sleep(2 * time.Second)
						b.want(b.until("ended", name, 10*time.Minute, ended), "True RolledOut", "4/4/4/0/0")
						b.atRest(kind, image)
					}
					restarts := func(app, side int32, at string) {
						t.Helper()
						for _, pod := range b.pods() {
							c := pod.Status.ContainerStatuses
							app, side := app+1, side+1 // the bed counts the first start
							if c[0].RestartCount != app || c[1].RestartCount != side ||
								pod.Annotations[evaluate.RestartedAt] != at {
								t.Errorf("pod %s: restarts %d and %d, want %d and %d; annotations %v", pod.Name,
									c[0].RestartCount, c[1].RestartCount, app, side, pod.Annotations)
							}
						}
					}
					edit("app:1", "noon")
					restarts(1, 1, "noon")
					edit("app:2", "noon")
					restarts(2, 1, "noon")
					edit("app:3", "one") // both at once: one restart of each
					restarts(3, 2, "one")
					edit("app:3", "") // kubectl rollout undo
					restarts(4, 3, "")
					if after := b.uids(); fmt.Sprint(after) != fmt.Sprint(before) {
						t.Errorf("pods %v, were %v", after, before)
					}
					if b.peak > 1 {
						t.Errorf("%d were not ready at once", b.peak)
					}
					if !killed && !strings.Contains(b.told(),
						"web Normal InPlaceRollout: all containers of the pods are restarted in place") {
						t.Errorf("events\n%s", b.told())
					}
				})
			})
		}
	}
}

// Pods that have the images of the template and not the rest of it are not counted as updated: the
// workload does not count them, either.
func TestCountIsTheWorkloads(t *testing.T) {
	inBed(t, func(t *testing.T, b *bed) {
		b.addNodes(3)
		b.addStatefulSet(3)
		user(b, &appsv1.StatefulSet{},
			func(s *appsv1.StatefulSet) { s.Spec.Template.Spec.Containers[0].Env[0].Value = "changed" })
		b.remove("web-1")
		time.Sleep(5 * time.Second)
		b.create("web", spec{Target: ref(workload.KindStatefulSet), Containers: to("app:1")})
		r := b.until("left", "web", time.Minute,
			func(r *rollout) bool { return condition(r, inplace.ConditionProgressing) == "False NotInPlace" })
		if r.Status.Updated != 1 {
			t.Errorf("%d are updated, one is", r.Status.Updated)
		}
	})
}

// A restart that somebody has asked of a workload whose pods are deleted by hand comes with the
// next rollout.
func TestRestartWithRollout(t *testing.T) {
	inBed(t, func(t *testing.T, b *bed) {
		b.addNodes(3)
		b.addStatefulSet(3)
		user(b, &appsv1.StatefulSet{}, func(s *appsv1.StatefulSet) {
			s.Spec.Template.Annotations = map[string]string{evaluate.RestartedAt: "noon"}
		})
		b.create("web", spec{Target: ref(workload.KindStatefulSet), Containers: to("app:2")})
		b.want(b.until("ended", "web", 5*time.Minute, ended), "True RolledOut", "3/3/3/0/0")
		b.atRest(workload.KindStatefulSet, "app:2")
		for _, pod := range b.pods() {
			// the bed counts the first start
			if c := pod.Status.ContainerStatuses; c[0].RestartCount != 2 || c[1].RestartCount != 2 {
				t.Errorf("pod %s: restarts %d and %d", pod.Name, c[0].RestartCount, c[1].RestartCount)
			}
		}
	})
}
