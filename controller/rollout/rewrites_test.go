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
	policyv1 "k8s.io/api/policy/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
	"sigs.k8s.io/controller-runtime/pkg/client"

	inplace "github.com/cri-proxy/cri-proxy/api/inplace/v1alpha1"
	"github.com/cri-proxy/cri-proxy/controller/pods"
	"github.com/cri-proxy/cri-proxy/controller/rollout/evaluate"
	"github.com/cri-proxy/cri-proxy/controller/rollout/podtemplate"
	"github.com/cri-proxy/cri-proxy/controller/rollout/workload"
)

const mirrored = "mirror.example.com/"

// toMirror makes images those of a mirror, in what where is true of.
func toMirror(where func(client.Object) bool) func(client.Object, bool) error {
	return func(o client.Object, _ bool) error {
		if where(o) {
			for i := range specOf(o).Containers {
				c := &specOf(o).Containers[i]
				if !strings.HasPrefix(c.Image, mirrored) {
					c.Image = mirrored + c.Image
				}
			}
		}
		return nil
	}
}

// made makes the pods' images those of a mirror, as if admission had done so when they were made.
func (b *bed) made() {
	for _, pod := range b.pods() {
		b.change(client.ObjectKeyFromObject(pod), pod.UID, func(p *corev1.Pod) bool {
			for i := range p.Spec.Containers {
				c, cs := &p.Spec.Containers[i], pods.Status(p, p.Spec.Containers[i].Name)
				c.Image = mirrored + c.Image
				cs.Image = c.Image
			}
			return true
		})
	}
	time.Sleep(time.Second)
}

func (b *bed) sides(want string) {
	b.t.Helper()
	for _, pod := range b.pods() {
		if pod.Spec.Containers[1].Image != want {
			b.t.Errorf("container side of pod %s is to run %s", pod.Name, pod.Spec.Containers[1].Image)
		}
	}
}

// Of two containers, one is there already as admission makes it: the other one alone is prepared,
// once.
func TestOneOfTwoIsThere(t *testing.T) {
	inBed(t, func(t *testing.T, b *bed) {
		b.addNodes(2)
		b.addPods(2, 2, gated)
		b.made()
		b.policy = toMirror(isPod)
		b.create("all", spec{Target: all(), Containers: []change{{Name: "app", Image: "app:2"},
			{Name: "side", Image: "side:1"}}})
		b.want(b.until("ended", "all", 5*time.Minute, ended), "True RolledOut", "2/2/2/0/0")
		b.served(mirrored + "app:2")
		b.sides(mirrored + "side:1")
		if n, writes := len(b.fleet.prepared()), b.counted("patch v1.Pod"); n != 2 || writes != 2 {
			t.Errorf("prepared %d times, %d writes of pods", n, writes)
		}
	})
}

// A tag that moves while a pod waits, prepared: what the node has ready is never committed for
// another image.
func TestAnswerMoves(t *testing.T) {
	for _, restart := range []bool{false, true} {
		t.Run(fmt.Sprint(restart), func(t *testing.T) {
			inBed(t, func(t *testing.T, b *bed) {
				b.addNodes(2)
				b.addPods(2, 2, gated)
				budget := &policyv1.PodDisruptionBudget{
					ObjectMeta: metav1.ObjectMeta{Namespace: "ns", Name: "web", Generation: 1},
					Spec:       policyv1.PodDisruptionBudgetSpec{Selector: webSelector},
					Status:     policyv1.PodDisruptionBudgetStatus{DesiredHealthy: 2, ObservedGeneration: 1},
				}
				if err := b.api.Create(t.Context(), budget); err != nil {
					t.Fatal(err)
				}
				var mu sync.Mutex
				digest := "app@sha256:" + strings.Repeat("a", 64)
				b.policy = func(o client.Object, _ bool) error {
					mu.Lock()
					defer mu.Unlock()
					if imageOf(o) == "app:2" {
						specOf(o).Containers[0].Image = digest
					}
					return nil
				}
				b.create("all", spec{Target: all(), Containers: to("app:2"),
					Strategy: settings{OnFailure: inplace.Pause}})
				time.Sleep(10 * time.Second)
				mu.Lock()
				digest = "app@sha256:" + strings.Repeat("b", 64)
				mu.Unlock()
				if restart {
					b.restart()
				}
				time.Sleep(3 * time.Minute)
				r := b.get("all")
				if len(r.Status.Failures) == 0 || r.Status.Failures[0].Reason != evaluate.FailRewritten {
					t.Errorf("status %+v", r.Status)
				}
				b.served("app:1")
			})
		})
	}
}

// A tag that has moved since an earlier revision is asked about anew.
func TestTagMovesBetween(t *testing.T) {
	inBed(t, func(t *testing.T, b *bed) {
		b.addNodes(2)
		b.addPods(2, 2, gated)
		var mu sync.Mutex
		digest := "app@sha256:" + strings.Repeat("a", 64)
		b.policy = func(o client.Object, _ bool) error {
			mu.Lock()
			defer mu.Unlock()
			if imageOf(o) == "app:2" {
				specOf(o).Containers[0].Image = digest
			}
			return nil
		}
		b.create("all", spec{Target: all(), Containers: to("app:2")})
		b.until("ended", "all", 5*time.Minute, ended)
		b.served(digest)
		mu.Lock()
		digest = "app@sha256:" + strings.Repeat("b", 64)
		mu.Unlock()
		b.edit("all", func(r *rollout) { r.Annotations = map[string]string{inplace.RetryAnnotation: "1"} })
		b.until("ended", "all", 5*time.Minute, func(r *rollout) bool {
			return ended(r) &&
				r.Status.ObservedGeneration == 2
		})
		b.served(digest)
		// And once more, with nothing moved: nothing is written.
		writes, prepared := b.counted("patch v1.Pod"), len(b.fleet.prepared())
		b.edit("all", func(r *rollout) { r.Annotations = map[string]string{inplace.RetryAnnotation: "2"} })
		b.want(b.until("ended", "all", 5*time.Minute, func(r *rollout) bool {
			return ended(r) &&
				r.Status.ObservedGeneration == 3
		}), "True RolledOut", "2/2/2/0/0")
		if b.counted("patch v1.Pod") != writes || len(b.fleet.prepared()) != prepared {
			t.Errorf("%d writes, then %d; prepared %d times, then %d", writes, b.counted("patch v1.Pod"), prepared,
				len(b.fleet.prepared()))
		}
	})
}

// A webhook that is away for too long before the commit: the rollout stops, and the node has
// nothing ready any more.
func TestCommitGivesUp(t *testing.T) {
	for _, policy := range []inplace.FailurePolicy{inplace.Pause, inplace.Continue, inplace.Rollback} {
		t.Run(string(policy), func(t *testing.T) {
			inBed(t, func(t *testing.T, b *bed) {
				b.addNodes(1)
				b.addPods(1, 1, gated)
				var mu sync.Mutex
				asked := 0
				b.policy = func(o client.Object, _ bool) error {
					mu.Lock()
					defer mu.Unlock()
					if imageOf(o) != "app:2" {
						return nil
					}
					if asked++; asked == 1 {
						return nil
					}
					return apierrors.NewInternalError(
						errors.New(`failed calling webhook "sign.example.com": connection refused`))
				}
				b.create("all", spec{Target: all(), Containers: to("app:2"),
					Strategy: settings{Order: inplace.StartFirst, OnFailure: policy, ProgressDeadlineSeconds: 120}})
				b.until("over", "all", 10*time.Minute,
					func(r *rollout) bool {
						return strings.HasPrefix(condition(r, inplace.ConditionDegraded),
							"True ")
					})
				time.Sleep(5 * time.Minute)
				b.served("app:1")
				if n := b.fleet.called("AbortUpgrade"); n > 3 {
					t.Errorf("aborted %d times", n)
				}
			})
		})
	}
}

// A rollout that goes on after failures ends when its template is denied.
func TestTemplateIsDeniedContinue(t *testing.T) {
	for _, kind := range []string{workload.KindStatefulSet, workload.KindDeployment} {
		t.Run(kind, func(t *testing.T) {
			inBed(t, func(t *testing.T, b *bed) {
				b.addNodes(2)
				b.addOf(kind, 2)
				b.policy = func(o client.Object, _ bool) error {
					if !isPod(o) && imageOf(o) == "app:2" {
						return forbidden(o)
					}
					return nil
				}
				b.create("web", spec{Target: ref(kind), Containers: to("app:2"),
					Strategy: settings{OnFailure: inplace.Continue}})
				r := b.until("ended", "web", 10*time.Minute, ended)
				if condition(r, inplace.ConditionComplete) != "False PodsFailed" ||
					!strings.Contains(r.Status.Message, "image is not signed") {
					t.Errorf("status %+v", r.Status)
				}
				b.atRest(kind, "app:1")
			})
		})
	}
}

// A container that does not run, so that nothing is prepared, has what admission makes of its
// image.
func TestIsThereUnprepared(t *testing.T) {
	inBed(t, func(t *testing.T, b *bed) {
		b.kubelet.sync = time.Hour
		b.addNodes(1)
		b.addPods(1, 1, gated)
		b.made()
		b.policy = toMirror(isPod)
		pod := b.pod("web-0")
		b.change(types.NamespacedName{Namespace: "ns", Name: "web-0"}, pod.UID, func(p *corev1.Pod) bool {
			cs := pods.Status(p, "app")
			cs.Ready, cs.State = false,
				corev1.ContainerState{Waiting: &corev1.ContainerStateWaiting{Reason: "CrashLoopBackOff",
					Message: "back-off"}}
			setReady(p, false)
			return true
		})
		time.Sleep(time.Second)
		b.create("all", spec{Target: all(), Containers: to("app:1")})
		time.Sleep(5 * time.Minute)
		if n, calls := b.counted("patch v1.Pod"), b.fleet.called("Restart"); n > 0 || calls > 0 {
			t.Errorf("%d writes of pods, %d restarts; status %+v", n, calls, b.get("all").Status)
		}
	})
}

// Admission that makes something of other containers' images, too, as soon as a Deployment is
// written.
func TestOtherContainerOfTemplate(t *testing.T) {
	for _, kind := range []string{workload.KindDeployment, workload.KindStatefulSet, workload.KindDaemonSet} {
		for name, where := range map[string]func(client.Object) bool{
			"workload":   func(o client.Object) bool { _, set := o.(*appsv1.ReplicaSet); return !isPod(o) && !set },
			"all":        func(client.Object) bool { return true },
			"ReplicaSet": func(o client.Object) bool { _, set := o.(*appsv1.ReplicaSet); return set },
		} {
			t.Run(kind+" "+name, func(t *testing.T) {
				inBed(t, func(t *testing.T, b *bed) {
					b.addNodes(2)
					b.addOf(kind, 2)
					b.policy = toMirror(where)
					b.create("web", spec{Target: ref(kind), Containers: to("app:2"),
						Strategy: settings{ProgressDeadlineSeconds: 120}})
					r := b.until("over", "web", 5*time.Minute,
						func(r *rollout) bool { return r.Status.CompletionTime != nil })
					time.Sleep(time.Minute)
					if kind == workload.KindDeployment {
						if d := read(b, &appsv1.Deployment{}); d.Spec.Paused {
							t.Errorf("the Deployment is paused; status %+v", r.Status)
						}
					}
				})
			})
		}
	}
}

// Pods whose other containers admission has changed when they were made are of the template's
// revision after the rollout.
func TestLabelOfRewrittenPods(t *testing.T) {
	for _, kind := range []string{workload.KindStatefulSet, workload.KindDaemonSet} {
		t.Run(kind, func(t *testing.T) {
			inBed(t, func(t *testing.T, b *bed) {
				b.addNodes(2)
				b.addOf(kind, 2)
				b.made()
				b.policy = toMirror(isPod)
				b.create("web", spec{Target: ref(kind), Containers: to("app:2")})
				b.want(b.until("ended", "web", 5*time.Minute, ended), "True RolledOut", "2/2/2/0/0")
				want := ""
				if kind == workload.KindStatefulSet {
					want = read(b, &appsv1.StatefulSet{}).Status.UpdateRevision
				} else {
					d := read(b, &appsv1.DaemonSet{})
					want = b.revise(d, workload.KindDaemonSet, &d.Spec.Template)
				}
				for _, pod := range b.pods() {
					if pod.Labels[podtemplate.RevisionLabel] != want {
						t.Errorf("pod %s is of revision %s, not %s", pod.Name, pod.Labels[podtemplate.RevisionLabel],
							want)
					}
				}
				b.served(mirrored + "app:2")
			})
		})
	}
}

// A Deployment that must not be let go on is told of.
func TestDeploymentCannotGoOn(t *testing.T) {
	for _, policy := range []inplace.FailurePolicy{inplace.Pause, inplace.Rollback} {
		t.Run(string(policy), func(t *testing.T) {
			inBed(t, func(t *testing.T, b *bed) {
				b.addNodes(2)
				b.addOf(workload.KindDeployment, 2)
				paused := false
				b.policy = func(o client.Object, dry bool) error {
					d, is := o.(*appsv1.Deployment)
					if is && !dry && d.Spec.Paused && !paused {
						paused = true
						return nil
					}
					if !isPod(o) && paused {
						return forbidden(o)
					}
					return nil
				}
				b.create("web", spec{Target: ref(workload.KindDeployment), Containers: to("app:2"),
					Strategy: settings{OnFailure: policy}})
				time.Sleep(3 * time.Minute)
				r := b.get("web")
				if !strings.HasPrefix(condition(r, inplace.ConditionDegraded), "True ") ||
					!strings.Contains(r.Status.Message, "Deployment web") ||
					!strings.Contains(r.Status.Message, "paused") {
					t.Errorf("status %+v\n%s", r.Status, b.told())
				}
			})
		})
	}
}

// called is how often a method was called.
func (f *fleet) called(method string) int {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.calls[method]
}
