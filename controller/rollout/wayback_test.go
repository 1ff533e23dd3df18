// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package rollout

import (
	"errors"
	"fmt"
	"strings"
	"sync"
	"testing"
	"time"

	appsv1 "k8s.io/api/apps/v1"
	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"sigs.k8s.io/controller-runtime/pkg/client"

	inplace "github.com/cri-proxy/cri-proxy/api/inplace/v1alpha1"
	"github.com/cri-proxy/cri-proxy/controller/rollout/dryrun"
	"github.com/cri-proxy/cri-proxy/controller/rollout/evaluate"
	"github.com/cri-proxy/cri-proxy/controller/rollout/workload"
)

// A label that cannot be written at once is written before the rollout ends.
func TestLabelFails(t *testing.T) {
	inBed(t, func(t *testing.T, b *bed) {
		b.addNodes(2)
		b.addOf(workload.KindStatefulSet, 2)
		for _, pod := range b.pods() { // somebody has changed them
			b.change(client.ObjectKeyFromObject(pod), pod.UID,
				func(p *corev1.Pod) bool { p.Spec.Containers[0].Image = "app:2"; return true })
		}
		time.Sleep(time.Minute)
		var mu sync.Mutex
		failed := map[string]int{}
		b.policy = func(o client.Object, dry bool) error {
			mu.Lock()
			defer mu.Unlock()
			if isPod(o) && !dry {
				if failed[o.GetName()]++; failed[o.GetName()] < 5 {
					return apierrors.NewInternalError(errors.New("etcdserver: request timed out"))
				}
			}
			return nil
		}
		b.create("web", spec{Target: ref(workload.KindStatefulSet), Containers: to("app:2")})
		b.want(b.until("ended", "web", 5*time.Minute, ended), "True RolledOut", "2/2/2/0/0")
		b.atRest(workload.KindStatefulSet, "app:2")
		if !strings.Contains(b.told(), "etcdserver") {
			t.Errorf("events:\n%s", b.told())
		}
	})
}

// Both containers are rewritten, in pods that were made so, with the controller killed all the
// while: each pod is changed once, and goes back to what it had when the new image is bad.
func TestRewrittenAndKilled(t *testing.T) {
	for _, kind := range []string{"Pod", workload.KindStatefulSet, workload.KindDaemonSet, workload.KindDeployment} {
		for _, everywhere := range []bool{false, true} {
			t.Run(fmt.Sprint(kind, everywhere), func(t *testing.T) {
				inBed(t, func(t *testing.T, b *bed) {
					b.addNodes(4)
					target := all()
					if kind == "Pod" {
						b.addPods(4, 4, gated)
					} else {
						b.addOf(kind, 4)
						target = ref(kind)
					}
					b.made()
					b.policy = toMirror(func(o client.Object) bool {
						return everywhere &&
							kind != workload.KindDeployment || isPod(o)
					})
					wait := func(generation int64) *rollout {
						t.Helper()
						for i := range 60 {
							time.Sleep(time.Duration(70+i*290%900) * time.Millisecond)
							b.restart()
						}
						return b.until("ended", "web", 10*time.Minute,
							func(r *rollout) bool { return ended(r) && r.Status.ObservedGeneration == generation })
					}
					both := []change{{Name: "app", Image: "app:2"}, {Name: "side", Image: "side:1"}}
					b.create("web", spec{Target: target, Containers: both})
					b.want(wait(1), "True RolledOut", "4/4/4/0/0")
					b.served(mirrored + "app:2")
					if n := b.counted("patch v1.Pod"); n > 5 {
						t.Errorf("%d writes of pods", n)
					}
					b.edit("web", func(r *rollout) { r.Spec.Containers[0].Image = "app:crash" })
					if r := wait(2); condition(r, inplace.ConditionComplete) != "False RolledBack" {
						t.Errorf("status %+v", r.Status)
					}
					// what a controller that was killed has had prepared is held for an hour
					time.Sleep(65 * time.Minute)
					b.served(mirrored + "app:2")
					b.sides(mirrored + "side:1")
				})
			})
		}
	}
}

// The way back is denied for pods, or for the template, or both: the rollout ends, and what serves
// goes on serving.
func TestWayBackIsDenied(t *testing.T) {
	for _, kind := range []string{"Pod", workload.KindStatefulSet, workload.KindDeployment} {
		for name, where := range map[string]func(client.Object) bool{
			"pods": isPod, "template": func(o client.Object) bool { return !isPod(o) },
			"both": func(client.Object) bool { return true },
			"late": nil,
		} {
			t.Run(kind+" "+name, func(t *testing.T) {
				inBed(t, func(t *testing.T, b *bed) {
					b.addNodes(3)
					target := all()
					if kind == "Pod" {
						b.addPods(3, 3, gated)
					} else {
						b.addOf(kind, 3)
						target = ref(kind)
					}
					var mu sync.Mutex
					back := false
					b.policy = func(o client.Object, dry bool) error {
						mu.Lock()
						defer mu.Unlock()
						if _, set := o.(*appsv1.ReplicaSet); imageOf(o) == "app:1" && back && !set &&
							(where == nil && !dry || where != nil && where(o)) {
							return forbidden(o)
						}
						return nil
					}
					b.create("web", spec{Target: target, Containers: to("app:2"),
						Strategy: settings{ProgressDeadlineSeconds: 60}})
					b.until("some", "web", time.Minute, func(r *rollout) bool { return r.Status.Updated > 0 })
					mu.Lock()
					back = true
					mu.Unlock()
					start := func(d time.Duration) {
						b.mu.Lock()
						defer b.mu.Unlock()
						b.kubelet.start = d
					}
					start(time.Hour) // what is new from now on does not get ready
					b.until("back", "web", 20*time.Minute,
						func(r *rollout) bool {
							return r.Status.CompletionTime != nil ||
								r.Status.FailedRevision != ""
						})
					start(time.Second)
					r := b.until("ended", "web", 20*time.Minute, ended)
					if name != "template" && (!strings.Contains(r.Status.Message, "not signed") ||
						!strings.Contains(b.told(), "not signed")) {
						t.Errorf("message %s\n%s", r.Status.Message, b.told())
					}
					time.Sleep(time.Minute)
					for _, pod := range b.pods() {
						if by, _ := evaluate.OutOfServiceBy(pod); by != "" {
							t.Errorf("pod %s is shut by %s", pod.Name, by)
						}
					}
					if left := b.fleet.unfinished(); len(left) > 0 {
						t.Errorf("nodes still have %q", left)
					}
					if kind == workload.KindDeployment {
						if d := read(b, &appsv1.Deployment{}); d.Spec.Paused {
							t.Errorf("paused; status %+v", r.Status)
						}
					}
				})
			})
		}
	}
}

// A gate that cannot be closed because that is denied: the rollout fails at once, with the words.
func TestGateIsDenied(t *testing.T) {
	for _, denied := range []bool{true, false} {
		t.Run(fmt.Sprint(denied), func(t *testing.T) {
			inBed(t, func(t *testing.T, b *bed) {
				b.addNodes(2)
				b.addPods(2, 2, gated)
				b.statusPolicy = func(pod *corev1.Pod) error {
					if by, _ := evaluate.OutOfServiceBy(pod); by == "" {
						return nil
					}
					if denied {
						return forbidden(pod)
					}
					return apierrors.NewInternalError(errors.New("webhook: image is not signed"))
				}
				b.create("all", spec{Target: all(), Containers: to("app:2"),
					Strategy: settings{ProgressDeadlineSeconds: 120}})
				r := b.until("over", "all", 10*time.Minute, ended)
				if want := evaluate.FailDenied; len(r.Status.Failures) == 0 || denied &&
					r.Status.Failures[0].Reason != want || !strings.Contains(r.Status.Message, "not signed") {
					t.Errorf("status %+v", r.Status)
				}
				b.served("app:1")
			})
		})
	}
}

// A gate that cannot be opened is told of, and opened when it can be.
func TestGateStaysShut(t *testing.T) {
	for _, kind := range []string{"Pod", workload.KindStatefulSet} {
		t.Run(kind, func(t *testing.T) {
			inBed(t, func(t *testing.T, b *bed) {
				b.addNodes(2)
				target := all()
				if kind == "Pod" {
					b.addPods(2, 2, gated)
				} else {
					b.addStatefulSet(2, func(s *appsv1.StatefulSet) {
						s.Spec.Template.Spec.ReadinessGates = []corev1.PodReadinessGate{
							{ConditionType: inplace.ReadyGate}}
					})
					target = ref(kind)
				}
				var mu sync.Mutex
				down := true
				b.statusPolicy = func(pod *corev1.Pod) error {
					mu.Lock()
					defer mu.Unlock()
					if by, _ := evaluate.OutOfServiceBy(pod); by != "" || !down {
						return nil
					}
					return apierrors.NewInternalError(errors.New("webhook is away"))
				}
				b.create("all", spec{Target: target, Containers: to("app:2"),
					Strategy: settings{ProgressDeadlineSeconds: 3600}})
				b.until("told", "all", 10*time.Minute,
					func(r *rollout) bool { return strings.Contains(r.Status.Message, "webhook is away") })
				if !strings.Contains(b.told(), "webhook is away") {
					t.Errorf("events:\n%s", b.told())
				}
				mu.Lock()
				down = false
				mu.Unlock()
				b.want(b.until("ended", "all", 10*time.Minute, ended), "True RolledOut", "2/2/2/0/0")
				b.served("app:2")
			})
		})
	}
}

// What admission makes of a container that nobody has asked to be changed is part of the change: it
// is prepared, and goes back with it.
func TestOtherContainerOfPod(t *testing.T) {
	for _, kind := range []string{"Pod", workload.KindStatefulSet, workload.KindDeployment} {
		for _, side := range []string{"side:2", "side:gone", "anew"} {
			t.Run(kind+" "+side, func(t *testing.T) {
				inBed(t, func(t *testing.T, b *bed) {
					b.addNodes(2)
					target := all()
					if kind == "Pod" {
						b.addPods(2, 2, gated)
					} else {
						b.addOf(kind, 2)
						target = ref(kind)
					}
					var mu sync.Mutex
					asked := 0
					b.policy = func(o client.Object, _ bool) error {
						mu.Lock()
						defer mu.Unlock()
						if isPod(o) && imageOf(o) == "app:2" {
							specOf(o).Containers[1].Image = side
							if asked++; side == "anew" {
								specOf(o).Containers[1].Image = fmt.Sprint("side:", asked+1)
							}
						}
						return nil
					}
					b.create("web", spec{Target: target, Containers: to("app:2"),
						Strategy: settings{ProgressDeadlineSeconds: 120}})
					r := b.until("ended", "web", 20*time.Minute, ended)
					if side == "side:2" {
						b.want(r, "True RolledOut", "2/2/2/0/0")
						b.served("app:2")
						b.sides("side:2")
						for _, p := range b.fleet.prepared() {
							if len(p.GetContainers()) != 2 {
								t.Errorf("prepared %v", p)
							}
						}
						if kind != "Pod" {
							b.atRest(kind, "app:2")
						}
						return
					}
					if condition(r, inplace.ConditionComplete) != "False RolledBack" {
						t.Errorf("status %+v", r.Status)
					}
					time.Sleep(time.Minute)
					b.served("app:1")
					b.sides("side:1")
				})
			})
		}
	}
}

// Admission that changes another container only once the pod is prepared: both are prepared then.
func TestOtherContainerLater(t *testing.T) {
	inBed(t, func(t *testing.T, b *bed) {
		b.addNodes(1)
		b.addPods(1, 1, gated)
		var mu sync.Mutex
		asked := 0
		b.policy = func(o client.Object, _ bool) error {
			mu.Lock()
			defer mu.Unlock()
			if imageOf(o) == "app:2" {
				if asked++; asked > 1 {
					specOf(o).Containers[1].Image = "side:2"
				}
			}
			return nil
		}
		b.create("all", spec{Target: all(), Containers: to("app:2")})
		b.want(b.until("ended", "all", 5*time.Minute, ended), "True RolledOut", "1/1/1/0/0")
		b.served("app:2")
		b.sides("side:2")
		if all := b.fleet.prepared(); len(all) != 2 || len(all[1].GetContainers()) != 2 {
			t.Errorf("prepared %v", all)
		}
	})
}

// A sidecar is asked about where it is, and what admission makes of it is recognised.
func TestSidecarIsRewritten(t *testing.T) {
	inBed(t, func(t *testing.T, b *bed) {
		b.addNodes(1)
		always := corev1.ContainerRestartPolicyAlways
		b.addPods(1, 1, gated, func(p *corev1.Pod) {
			p.Spec.InitContainers = []corev1.Container{{Name: "proxy", Image: "proxy:1", RestartPolicy: &always},
				{Name: "setup", Image: "setup:1"}}
		})
		b.policy = func(o client.Object, _ bool) error {
			for i := range specOf(o).InitContainers {
				if c := &specOf(o).InitContainers[i]; c.Name == "proxy" {
					c.Image = mirrored + strings.TrimPrefix(c.Image, mirrored)
				}
			}
			return nil
		}
		b.create("all", spec{Target: all(), Containers: []change{{Name: "proxy", Image: "proxy:2"}}})
		time.Sleep(5 * time.Minute)
		pod := b.pod("web-0")
		if got := pod.Spec.InitContainers[0].Image; got != mirrored+"proxy:2" ||
			pod.Spec.InitContainers[1].Image != "setup:1" {
			t.Errorf("init containers %+v", pod.Spec.InitContainers)
		}
		if n := b.counted("patch v1.Pod"); n > 2 { // there and, as nothing runs it here, back
			t.Errorf("%d writes of pods", n)
		}
	})
}

// An annotated workload whose images admission rewrites, in pods alone or in its template, too.
func TestFollowedAndRewritten(t *testing.T) {
	for name, where := range map[string]func(client.Object) bool{"pods": isPod,
		"all": func(client.Object) bool { return true }} {
		t.Run(name, func(t *testing.T) {
			inBed(t, func(t *testing.T, b *bed) {
				b.addNodes(3)
				prefix := ""
				if name == "all" {
					prefix = mirrored
				}
				b.addStatefulSet(3, func(s *appsv1.StatefulSet) {
					s.Annotations = map[string]string{inplace.InPlaceAnnotation: "true"}
					s.Spec.Template.Spec.Containers[0].Image = prefix + "app:1"
					s.Spec.Template.Spec.Containers[1].Image = prefix + "side:1"
				})
				if name == "pods" {
					b.made()
				}
				b.policy = toMirror(where)
				time.Sleep(time.Minute)
				writes := b.counted("patch v1.Pod")
				user(b, &appsv1.StatefulSet{},
					func(s *appsv1.StatefulSet) { s.Spec.Template.Spec.Containers[0].Image = prefix + "app:2" })
				r := b.until("ended", "statefulset-web", 5*time.Minute,
					func(r *rollout) bool { return ended(r) && r.Status.TargetImages["app"] == prefix+"app:2" })
				b.want(r, "True RolledOut", "3/3/3/0/0")
				b.served(mirrored + "app:2")
				b.sides(mirrored + "side:1")
				if n := b.counted("patch v1.Pod") - writes; writes > 0 || n != 3 {
					t.Errorf("%d writes of pods before, %d then", writes, n)
				}
				user(b, &appsv1.StatefulSet{},
					func(s *appsv1.StatefulSet) { s.Spec.Template.Spec.Containers[0].Image = prefix + "app:crash" })
				b.until("ended", "statefulset-web", 5*time.Minute, func(r *rollout) bool {
					return ended(r) && condition(r, inplace.ConditionComplete) == "False RolledBack"
				})
				time.Sleep(5 * time.Minute)
				if r := b.get("statefulset-web"); condition(r, inplace.ConditionComplete) != "False RolledBack" {
					t.Errorf("status %+v", r.Status)
				}
				b.served(mirrored + "app:2")
			})
		})
	}
}

// A partition holds with rewritten images and a controller that is killed.
func TestPartitionAndRewritten(t *testing.T) {
	for _, kind := range []string{"Pod", workload.KindDeployment, workload.KindStatefulSet} {
		t.Run(kind, func(t *testing.T) {
			inBed(t, func(t *testing.T, b *bed) {
				b.addNodes(4)
				target := all()
				if kind == "Pod" {
					b.addPods(4, 4, gated)
				} else {
					b.addOf(kind, 4)
					target = ref(kind)
				}
				b.made()
				b.policy = toMirror(isPod)
				b.create("web", spec{Target: target, Containers: []change{{Name: "app", Image: "app:2"},
					{Name: "side", Image: "side:1"}}, Strategy: settings{Partition: number(2)}})
				held := func(r *rollout) bool {
					return condition(r, inplace.ConditionProgressing) == "True Partitioned" && r.Status.Updated == 2
				}
				b.until("held", "web", 5*time.Minute, held)
				for range 3 {
					b.restart()
					time.Sleep(time.Minute)
					if got := b.images("app"); got[mirrored+"app:2"] != 2 {
						t.Errorf("images %v", got)
					}
				}
				b.until("held", "web", time.Second, held)
				b.edit("web", func(r *rollout) { r.Spec.Paused = true })
				b.restart()
				time.Sleep(time.Minute)
				if r := b.get("web"); r.Status.Updated != 2 {
					t.Errorf("status %+v", r.Status)
				}
			})
		})
	}
}

// A rollout of a Deployment whose images are rewritten leaves it with one ReplicaSet that has pods,
// and these pods, when it is deleted, wherever it was, on the way there or back.
func TestRewrittenDeploymentDeleted(t *testing.T) {
	for i := range 24 {
		t.Run(fmt.Sprint(i), func(t *testing.T) {
			inBed(t, func(t *testing.T, b *bed) {
				b.addNodes(2)
				b.addDeployment(2)
				before := b.uids()
				b.policy = func(o client.Object, _ bool) error {
					if c := &specOf(o).Containers[0]; !strings.HasPrefix(c.Image, mirrored) {
						c.Image = mirrored + c.Image
					}
					return nil
				}
				b.create("web", spec{Target: ref(workload.KindDeployment), Containers: to("app:crash")})
				if i >= 12 {
					b.until("back", "web", time.Minute, func(r *rollout) bool { return r.Status.FailedRevision != "" })
				}
				time.Sleep(time.Duration(i%12) * 150 * time.Millisecond)
				b.delete(&rollout{ObjectMeta: metav1.ObjectMeta{Name: "web"}})
				b.restart()
				b.until("gone", "web", time.Minute, gone)
				time.Sleep(time.Minute)
				d := read(b, &appsv1.Deployment{})
				var sets appsv1.ReplicaSetList
				if err := b.api.List(t.Context(), &sets, client.InNamespace("ns")); err != nil {
					t.Fatal(err)
				}
				active := 0
				for i := range sets.Items {
					if replicasOf(&sets.Items[i]) > 0 {
						active++
					}
				}
				if d.Spec.Paused || active != 1 || len(sets.Items) > 2 { // one is for kubectl rollout undo
					t.Errorf("paused %v, %d ReplicaSets, %d with pods", d.Spec.Paused, len(sets.Items), active)
				}
				if after := b.uids(); fmt.Sprint(after) != fmt.Sprint(before) {
					t.Errorf("pods %v, were %v", after, before)
				}
			})
		})
	}
}

// Once a pod is changed, nobody asks whether it may be.
func TestAskedNoMore(t *testing.T) {
	for _, denied := range []bool{false, true} {
		t.Run(fmt.Sprint(denied), func(t *testing.T) {
			inBed(t, func(t *testing.T, b *bed) {
				b.addNodes(1)
				b.kubelet.sync = 5 * time.Minute
				b.addPods(1, 1, gated)
				var mu sync.Mutex
				written, after := false, 0
				b.policy = func(o client.Object, dry bool) error {
					mu.Lock()
					defer mu.Unlock()
					switch {
					case imageOf(o) != "app:2":
					case !written:
						written = !dry
					case denied:
						after++
						return forbidden(o)
					default:
						after++
						return apierrors.NewInternalError(errors.New("webhook is away"))
					}
					return nil
				}
				b.create("all", spec{Target: all(), Containers: to("app:2")})
				b.want(b.until("ended", "all", 9*time.Minute, ended), "True RolledOut", "1/1/1/0/0")
				b.served("app:2")
				if after > 0 || strings.Contains(b.told(), "away") {
					t.Errorf("asked %d times after the change; events:\n%s", after, b.told())
				}
			})
		})
	}
}

// What is denied is still an answer of the API server, so that it is counted and told when a
// reconciler returns it.
func TestDeniedIsAnAnswer(t *testing.T) {
	if err := fmt.Errorf("settling: %w", dryrun.Denied(forbidden(&corev1.Pod{}),
		"pod web-0")); !dryrun.IsAPIStatus(err) || dryrun.Refusal(err) == nil || !apierrors.IsForbidden(err) {
		t.Errorf("%v", err)
	}
}

// How often is the API server asked about many pods that wait, and about those that have what they
// should?
func TestAsksOfManyPods(t *testing.T) {
	inBed(t, func(t *testing.T, b *bed) {
		b.addNodes(10)
		b.addPods(200, 10, gated)
		b.made()
		var mu sync.Mutex
		asked := 0
		made := toMirror(isPod)
		b.policy = func(o client.Object, dry bool) error {
			mu.Lock()
			defer mu.Unlock()
			if dry {
				asked++
			}
			return made(o, dry)
		}
		b.create("all", spec{Target: all(), Containers: []change{{Name: "app", Image: "app:1"},
			{Name: "side", Image: "side:1"}}, Strategy: settings{MaxUnavailable: percent("25%")}})
		b.want(b.until("ended", "all", 10*time.Minute, ended), "True RolledOut", "200/200/200/0/0")
		if n := b.counted("patch v1.Pod") + b.counted("status v1.Pod"); asked > 450 || n > 0 {
			t.Errorf("asked %d times, %d writes", asked, n)
		}
		mu.Lock()
		asked = 0
		mu.Unlock()
		b.edit("all", func(r *rollout) { r.Spec.Containers[0].Image = "app:2" })
		b.want(b.until("ended", "all", time.Hour, func(r *rollout) bool {
			return ended(r) &&
				r.Status.ObservedGeneration == 2
		}), "True RolledOut", "200/200/200/0/0")
		if asked > 1400 || b.counted("patch v1.Pod") != 200 {
			t.Errorf("asked %d times, %d writes", asked, b.counted("patch v1.Pod"))
		}
	})
}
