// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package rollout

import (
	"fmt"
	"slices"
	"strings"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"

	inplace "github.com/cri-proxy/cri-proxy/api/inplace/v1alpha1"
	"github.com/cri-proxy/cri-proxy/controller/rollout/evaluate"
	"github.com/cri-proxy/cri-proxy/controller/rollout/workload"
)

// turnsOf are the rollouts that have written into each pod, in their order, and complains of a pod
// that is written while the rollout which wrote it before has not ended.
type turnsOf map[string][]types.UID

// watchTurns begins to collect them, for all pods there are.
func (b *bed) watchTurns() turnsOf {
	turns := turnsOf{}
	for _, pod := range b.pods() {
		b.watch(pod.Name, func(before, now *corev1.Pod) {
			m := evaluate.StateOf(now)
			if m == nil ||
				before.Annotations[inplace.PodStateAnnotation] == now.Annotations[inplace.PodStateAnnotation] {
				return
			}
			seen := turns[now.Name]
			if n := len(seen); n > 0 && seen[n-1] == m.Rollout {
				b.t.Errorf("%s is written to a second time by %s", now.Name, m.Rollout)
			} else if n > 0 {
				if r := b.get(strings.TrimPrefix(string(seen[n-1]), "uid-")); r != nil &&
					r.Status.CompletionTime == nil {
					b.t.Errorf("%s is written to by %s, though %s is at work on it", now.Name, m.Rollout, seen[n-1])
				}
			}
			turns[now.Name] = append(seen, m.Rollout)
		})
	}
	return turns
}

// Rollouts that are made in the same instant and have pods in common: one goes first, and the
// others leave the pods alone until it has ended, with the controller killed on the way or not.
func TestSameInstant(t *testing.T) {
	one := inplace.Target{PodName: "web-0"}
	labelled := inplace.Target{
		Selector: &metav1.LabelSelector{
			MatchExpressions: []metav1.LabelSelectorRequirement{{Key: "app", Operator: metav1.LabelSelectorOpExists}}}}
	side := []change{{Name: "side"}}
	for _, tt := range []struct {
		name     string
		workload string
		targets  []inplace.Target
		changes  [][]change
	}{
		{"one pod", "", []inplace.Target{one, one}, [][]change{to("app:2"), to("app:3")}},
		{"a pod that is chosen", "", []inplace.Target{one, all()}, [][]change{to("app:2"), to("app:3")}},
		{"selectors", "", []inplace.Target{labelled, all(), all()}, [][]change{to("app:2"), to("app:3"), to("app:4")}},
		{"other containers", "", []inplace.Target{all(), all()}, [][]change{to("app:2"), side}},
		{"restarts", "", []inplace.Target{all(), labelled}, [][]change{{{Name: "app"}}, side}},
		{"a StatefulSet", workload.KindStatefulSet, []inplace.Target{ref(workload.KindStatefulSet),
			ref(workload.KindStatefulSet)}, [][]change{to("app:2"), to("app:3")}},
		{"a DaemonSet", workload.KindDaemonSet, []inplace.Target{ref(workload.KindDaemonSet),
			ref(workload.KindDaemonSet)}, [][]change{to("app:2"), to("app:3")}},
		{"a Deployment", workload.KindDeployment, []inplace.Target{ref(workload.KindDeployment),
			ref(workload.KindDeployment), ref(workload.KindDeployment)}, [][]change{to("app:2"), to("app:3"),
			to("app:4")}},
		{"a StatefulSet and its pods", workload.KindStatefulSet, []inplace.Target{ref(workload.KindStatefulSet), all()},
			[][]change{to("app:2"), side}},
		{"a pod and its DaemonSet", workload.KindDaemonSet, []inplace.Target{{PodName: "web-of-node-0"},
			ref(workload.KindDaemonSet)}, [][]change{to("app:2"), to("app:3")}},
		{"pods and their Deployment", workload.KindDeployment, []inplace.Target{labelled, ref(workload.KindDeployment)},
			[][]change{side, to("app:3")}},
	} {
		for _, killed := range []bool{false, true} {
			t.Run(fmt.Sprint(tt.name, " killed ", killed), func(t *testing.T) {
				inBed(t, func(t *testing.T, b *bed) {
					b.addNodes(3)
					if tt.workload == "" {
						b.addPods(4, 3, gated)
					} else {
						b.addOf(tt.workload, 4)
					}
					time.Sleep(time.Second)
					turns := b.watchTurns()
					var names []string
					for i, target := range tt.targets {
						names = append(names, string(rune('a'+i)))
						b.create(names[i], spec{Target: target, Containers: tt.changes[i]})
					}
					b.until("queued", "a", 5*time.Second, func(*rollout) bool {
						waiting := 0
						for _, name := range names {
							if r := b.get(name); condition(r,
								inplace.ConditionProgressing) == "True WaitingForRollout" &&
								strings.HasPrefix(r.Status.Message, "waiting for InPlaceRollout ") {
								waiting++
							}
						}
						return waiting == len(names)-1
					})
					for i := 0; killed && i < 30; i++ {
						time.Sleep(time.Duration(15+i*290%900) * time.Millisecond)
						b.restart()
					}
					for _, name := range names {
						b.until("ended", name, 10*time.Minute, ended)
						if r := b.get(name); condition(r, inplace.ConditionComplete) != "True RolledOut" {
							t.Errorf("status %+v", r.Status)
						}
					}
					if b.peak > 1 {
						t.Errorf("%d pods were not ready at once", b.peak)
					}
					if len(turns["web-0"]) != len(names) && tt.workload == workload.KindStatefulSet ||
						tt.workload == "" && len(turns["web-0"]) != len(names) {
						t.Errorf("web-0 was written to by %v", turns["web-0"])
					}
					if b.fleet.pinned() != 0 || b.unready() != 0 {
						t.Errorf("%d pins are left, %d pods are not ready", b.fleet.pinned(), b.unready())
					}
				})
			})
		}
	}
}

// createInTurn makes a rollout and lets the controller see it before the next one.
func (b *bed) createInTurn(name string, s spec) {
	b.t.Helper()
	b.create(name, s)
	time.Sleep(2 * cacheLag)
}

// Made in the same instant and seen together, the name decides; the one that was let in stays,
// whoever comes later and would go before it.
func TestFirst(t *testing.T) {
	for _, tt := range []struct {
		name  string
		order []string
		pause time.Duration // between the two
		first string
	}{
		{"together", []string{"b", "a"}, 0, "a"},
		{"one is seen a moment later", []string{"b", "a"}, time.Millisecond, "b"},
		{"one is seen when the other has begun", []string{"b", "a"}, 100 * time.Millisecond, "b"},
		{"older", []string{"b", "a"}, 2 * time.Second, "b"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			inBed(t, func(t *testing.T, b *bed) {
				b.addNodes(1)
				b.addPods(3, 1)
				if tt.pause == 0 {
					b.kill()
				}
				for _, name := range tt.order {
					b.create(name, spec{Target: all(), Containers: to("app:of-" + name)})
					time.Sleep(tt.pause)
				}
				if tt.pause == 0 {
					b.start()
				}
				for range 3 {
					time.Sleep(2500 * time.Millisecond)
					b.restart()
				}
				second := tt.order[1-slices.Index(tt.order, tt.first)]
				b.until("waiting", second, 3*time.Second, func(r *rollout) bool {
					return condition(r, inplace.ConditionProgressing) == "True WaitingForRollout" &&
						condition(r, inplace.ConditionComplete) == "False WaitingForRollout" &&
						strings.HasPrefix(r.Status.Message,
							"waiting for InPlaceRollout "+tt.first+", which is at work on pod web-0: it goes on "+
								"when") && r.Status.StartTime == nil
				})
				if !strings.Contains(b.told(), second+" Normal WaitingForRollout: ") {
					t.Errorf("events\n%s", b.told())
				}
				b.want(b.until("ended", tt.first, time.Minute, ended), "True RolledOut", "3/3/3/0/0")
				b.want(b.until("ended", second, time.Minute, ended), "True RolledOut", "3/3/3/0/0")
			})
		})
	}
}

// Who waits goes on when the one before it is deleted in the middle, cannot be carried out, or is
// given more to do after its end.
func TestTurnEnds(t *testing.T) {
	t.Run("deleted", func(t *testing.T) {
		inBed(t, func(t *testing.T, b *bed) {
			b.addNodes(2)
			b.addPods(4, 2, gated)
			b.createInTurn("a", spec{Target: all(), Containers: to("app:2"), Strategy: settings{DrainSeconds: 10}})
			b.create("b", spec{Target: all(), Containers: to("app:3")})
			b.until("draining", "a", time.Minute, func(*rollout) bool { return b.unready() == 1 })
			b.delete(&rollout{ObjectMeta: metav1.ObjectMeta{Name: "a"}})
			b.want(b.until("ended", "b", 5*time.Minute, ended), "True RolledOut", "4/4/4/0/0")
		})
	})
	t.Run("refused", func(t *testing.T) {
		inBed(t, func(t *testing.T, b *bed) {
			b.addNodes(3)
			b.addStatefulSet(2)
			b.createInTurn("a", spec{Target: ref(workload.KindStatefulSet),
				Containers: []change{{Name: "none", Image: "app:2"}}})
			b.create("b", spec{Target: ref(workload.KindStatefulSet), Containers: to("app:3")})
			b.want(b.until("ended", "b", 5*time.Minute, ended), "True RolledOut", "2/2/2/0/0")
			b.until("refused", "a", time.Minute, func(r *rollout) bool {
				return condition(r, inplace.ConditionProgressing) == "False InvalidTarget"
			})
		})
	})
	t.Run("more to do", func(t *testing.T) {
		inBed(t, func(t *testing.T, b *bed) {
			b.addNodes(2)
			b.addPods(4, 2)
			b.createInTurn("a", spec{Target: all(), Containers: to("app:2")})
			b.create("b", spec{Target: all(), Containers: to("app:3")})
			b.until("ended", "a", time.Minute, ended)
			b.until("on its way", "b", time.Minute, func(*rollout) bool { return b.images("app")["app:3"] > 0 })
			b.edit("a", func(r *rollout) { r.Spec.Containers[0].Image = "app:4" })
			b.until("waiting", "a", 5*time.Second, func(r *rollout) bool {
				return condition(r, inplace.ConditionComplete) == "False WaitingForRollout"
			})
			b.want(b.until("ended", "b", time.Minute, ended), "True RolledOut", "4/4/4/0/0")
			b.want(b.until("ended", "a", time.Minute, func(r *rollout) bool {
				return ended(r) &&
					r.Status.ObservedGeneration == 2
			}), "True RolledOut", "4/4/4/0/0")
			if got := b.images("app"); got["app:4"] != 4 {
				t.Errorf("images %v", got)
			}
		})
	})
}

// A rollout gets a pod in common with an earlier one while both are at work: the later one steps
// back, with its pods in service and nothing prepared that is in the way, and goes on afterwards.
func TestStepBack(t *testing.T) {
	inBed(t, func(t *testing.T, b *bed) {
		b.addNodes(2)
		b.addPods(4, 2, gated)
		for i := range 4 {
			b.addPod(fmt.Sprintf("db-%d", i), "node-1", gated,
				func(p *corev1.Pod) { p.Labels = map[string]string{"app": "db"} })
		}
		slow := settings{DrainSeconds: 30}
		b.createInTurn("web", spec{Target: all(), Containers: to("app:2"), Strategy: slow})
		b.createInTurn("db",
			spec{Target: inplace.Target{Selector: &metav1.LabelSelector{MatchLabels: map[string]string{"app": "db"}}},
				Containers: to("app:3"), Strategy: slow})
		b.until("draining", "db", time.Minute, func(*rollout) bool { return b.unready() == 2 })
		common := b.pod("db-2")
		b.change(types.NamespacedName{Namespace: "ns", Name: "db-2"}, common.UID, func(p *corev1.Pod) bool {
			p.Labels = map[string]string{"app": "db", "also": "web"}
			return true
		})
		b.create("also",
			spec{Target: inplace.Target{Selector: &metav1.LabelSelector{MatchLabels: map[string]string{"also": "web"}}},
				Containers: to("app:4")})
		b.until("waiting", "also", 10*time.Second, func(r *rollout) bool {
			return condition(r, inplace.ConditionProgressing) == "True WaitingForRollout" &&
				strings.Contains(r.Status.Message, "InPlaceRollout db, which is at work on pod db-2")
		})
		// Now web, which came first, is about a pod of db.
		b.change(types.NamespacedName{Namespace: "ns", Name: "db-1"}, b.pod("db-1").UID, func(p *corev1.Pod) bool {
			p.Labels = map[string]string{"app": "web"}
			return true
		})
		b.change(types.NamespacedName{Namespace: "ns", Name: "db-0"}, b.pod("db-0").UID, func(p *corev1.Pod) bool {
			p.Labels = map[string]string{"app": "db", "also": "web"}
			return true
		})
		for _, name := range []string{"web", "db", "also"} {
			b.until("ended", name, 10*time.Minute, ended)
		}
		got := ""
		for _, pod := range b.pods() {
			got += pod.Name + " " + runningImage(pod, "app") + " "
		}
		if got != "db-0 app:4 db-1 app:2 db-2 app:4 db-3 app:3 web-0 app:2 web-1 app:2 web-2 app:2 web-3 app:2 " ||
			b.unready() != 0 || b.fleet.pinned() != 0 {
			t.Errorf("%s, %d not ready, %d pins", got, b.unready(), b.fleet.pinned())
		}
	})
}
