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

	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	"k8s.io/apimachinery/pkg/runtime/schema"
	"sigs.k8s.io/controller-runtime/pkg/client"

	inplace "github.com/cri-proxy/cri-proxy/api/inplace/v1alpha1"
	"github.com/cri-proxy/cri-proxy/controller/pods"
	"github.com/cri-proxy/cri-proxy/controller/rollout/evaluate"
	"github.com/cri-proxy/cri-proxy/controller/rollout/podtemplate"
	"github.com/cri-proxy/cri-proxy/controller/rollout/workload"
)

// specOf is the pod spec of what admission is asked about.
func specOf(o client.Object) *corev1.PodSpec {
	if pod, ok := o.(*corev1.Pod); ok {
		return &pod.Spec
	}
	return &podtemplate.Of(o).Spec
}

// imageOf is the image of container app.
func imageOf(o client.Object) string {
	if spec := specOf(o); len(spec.Containers) > 0 {
		return spec.Containers[0].Image
	}
	return ""
}

func isPod(o client.Object) bool {
	_, ok := o.(*corev1.Pod)
	return ok
}

func forbidden(o client.Object) error {
	return apierrors.NewForbidden(schema.GroupResource{Resource: "things"}, o.GetName(),
		errors.New("ValidatingAdmissionPolicy 'images' denied request: image is not signed"))
}

// served fails if a pod is out of service, has another image than want, or has something ready on
// its node.
func (b *bed) served(want string) {
	b.t.Helper()
	for _, pod := range b.pods() {
		by, _ := evaluate.OutOfServiceBy(pod)
		c := pods.Condition(pod, corev1.PodReady)
		if pod.Spec.Containers[0].Image != want || runningImage(pod, "app") != want || by != "" || c == nil ||
			c.Status != corev1.ConditionTrue {
			b.t.Errorf("pod %s is to run %s, runs %s, shut by %q, ready %v", pod.Name, pod.Spec.Containers[0].Image,
				runningImage(pod, "app"), by, c)
		}
	}
	if left := b.fleet.unfinished(); len(left) > 0 {
		b.t.Errorf("nodes still have %q", left)
	}
}

// What admission denies has not been prepared on a node, not with either order, and the rollout
// ends with the server's words.
func TestPodIsDenied(t *testing.T) {
	for _, order := range []inplace.Order{inplace.StopFirst, inplace.StartFirst} {
		for _, policy := range []inplace.FailurePolicy{inplace.Rollback, inplace.Pause} {
			t.Run(fmt.Sprint(order, " ", policy), func(t *testing.T) {
				inBed(t, func(t *testing.T, b *bed) {
					b.addNodes(2)
					b.addPods(3, 2, gated)
					b.policy = func(o client.Object, _ bool) error {
						if imageOf(o) == "app:2" {
							return forbidden(o)
						}
						return nil
					}
					b.create("all", spec{Target: all(), Containers: to("app:2"),
						Strategy: settings{Order: order, OnFailure: policy}})
					b.until("over", "all", time.Minute, func(r *rollout) bool {
						return strings.HasPrefix(condition(r, inplace.ConditionDegraded), "True ")
					})
					time.Sleep(10 * time.Minute)
					r := b.get("all")
					if len(r.Status.Failures) == 0 || r.Status.Failures[0].Reason != evaluate.FailDenied ||
						!strings.Contains(r.Status.Failures[0].Message, "image is not signed") {
						t.Errorf("status %+v", r.Status)
					}
					if !strings.Contains(b.told(), "image is not signed") {
						t.Errorf("events:\n%s", b.told())
					}
					if n := len(b.fleet.prepared()); n > 0 {
						t.Errorf("nodes have prepared %d times", n)
					}
					b.served("app:1")
					if n := b.counted("patch v1.Pod"); n > 0 {
						t.Errorf("%d writes of pods", n)
					}
					// A policy that is taken back, and a person who says so.
					b.policy = nil
					b.edit("all", func(r *rollout) { r.Annotations = map[string]string{inplace.RetryAnnotation: "1"} })
					r = b.until("ended", "all", 10*time.Minute,
						func(r *rollout) bool { return condition(r, inplace.ConditionComplete) == "True RolledOut" })
					b.want(r, "True RolledOut", "3/3/3/0/0")
				})
			})
		}
	}
}

// A policy that comes after the preparation finds nothing changed: not when the pod is asked about
// a second time, and not at the patch.
func TestPodIsDeniedLate(t *testing.T) {
	for _, tt := range []struct {
		name   string
		denied func(asked int, dry bool) bool
	}{
		{"before the commit", func(asked int, _ bool) bool { return asked > 1 }},
		{"at the patch", func(_ int, dry bool) bool { return !dry }},
	} {
		t.Run(tt.name, func(t *testing.T) {
			inBed(t, func(t *testing.T, b *bed) {
				b.addNodes(1)
				b.addPods(1, 1, gated)
				var mu sync.Mutex
				asked := 0
				b.policy = func(o client.Object, dry bool) error {
					mu.Lock()
					defer mu.Unlock()
					if imageOf(o) != "app:2" {
						return nil
					}
					if asked++; tt.denied(asked, dry) {
						return forbidden(o)
					}
					return nil
				}
				b.create("all", spec{Target: all(), Containers: to("app:2")})
				b.until("over", "all", time.Minute,
					func(r *rollout) bool { return condition(r, inplace.ConditionComplete) == "False RolledBack" })
				time.Sleep(time.Minute)
				if r := b.get("all"); r.Status.Failures[0].Reason != evaluate.FailDenied ||
					!strings.Contains(r.Status.Failures[0].Message, "image is not signed") {
					t.Errorf("status %+v", r.Status)
				}
				b.served("app:1")
				if n := len(b.fleet.prepared()); n != 1 {
					t.Errorf("prepared %d times", n)
				}
			})
		})
	}
}

// A webhook that is away is told of, and waited for: until it is back, or the deadline has passed.
// It may go before the preparation, between that and the commit, or at the patch.
func TestAPIServerFails(t *testing.T) {
	whens := map[string]func(asked int, dry bool) bool{
		"first":  func(int, bool) bool { return true },
		"commit": func(asked int, _ bool) bool { return asked > 2 },
		"patch":  func(_ int, dry bool) bool { return !dry },
	}
	for when, fails := range whens {
		for _, back := range []bool{true, false} {
			t.Run(fmt.Sprintf("%s, comes back %v", when, back), func(t *testing.T) {
				inBed(t, func(t *testing.T, b *bed) {
					b.addNodes(1)
					b.addPods(2, 1, gated)
					var mu sync.Mutex
					asked, failed, down := 0, 0, true
					b.policy = func(o client.Object, dry bool) error {
						mu.Lock()
						defer mu.Unlock()
						if imageOf(o) != "app:2" {
							return nil
						}
						if asked++; !down || !fails(asked, dry) {
							return nil
						}
						failed++
						return apierrors.NewInternalError(fmt.Errorf("failed calling webhook %q for %s: connection "+
							"refused", "sign.example.com", o.GetName()))
					}
					b.create("all", spec{Target: all(), Containers: to("app:2"),
						Strategy: settings{ProgressDeadlineSeconds: 120}})
					r := b.until("told", "all", time.Minute, func(r *rollout) bool {
						return strings.Contains(condition(r, inplace.ConditionProgressing), inplace.ReasonAPIError)
					})
					if !strings.Contains(r.Status.Message, "sign.example.com") ||
						!strings.Contains(b.told(), "sign.example.com") {
						t.Errorf("message %q, events:\n%s", r.Status.Message, b.told())
					}
					if back {
						time.Sleep(time.Minute)
						mu.Lock()
						down = false
						mu.Unlock()
						b.want(b.until("ended", "all", 10*time.Minute, ended), "True RolledOut", "2/2/2/0/0")
						b.served("app:2")
						return
					}
					r = b.until("over", "all", 5*time.Minute,
						func(r *rollout) bool { return condition(r, inplace.ConditionComplete) == "False RolledBack" })
					if r.Status.Failures[0].Reason != evaluate.FailDeadline ||
						!strings.Contains(r.Status.Failures[0].Message, "sign.example.com") {
						t.Errorf("status %+v", r.Status)
					}
					time.Sleep(time.Minute)
					b.served("app:1")
					if failed > 60 {
						t.Errorf("%d tries in two minutes", failed)
					}
				})
			})
		}
	}
}

// A workload whose template must not get the image goes on as it is.
func TestTemplateIsDenied(t *testing.T) {
	for _, kind := range []string{workload.KindStatefulSet, workload.KindDaemonSet, workload.KindDeployment,
		"ReplicaSet"} {
		for _, late := range []bool{false, true} {
			t.Run(fmt.Sprintf("%s, late %v", kind, late), func(t *testing.T) {
				inBed(t, func(t *testing.T, b *bed) {
					b.addNodes(3)
					of := kind
					if kind == "ReplicaSet" {
						of = workload.KindDeployment
					}
					b.addOf(of, 3)
					b.policy = func(o client.Object, dry bool) error {
						if strings.HasSuffix(fmt.Sprintf("%T", o), "."+kind) && imageOf(o) == "app:2" &&
							(!late || !dry) {
							return forbidden(o)
						}
						return nil
					}
					b.create("web", spec{Target: ref(of), Containers: to("app:2")})
					b.until("over", "web", 5*time.Minute,
						func(r *rollout) bool {
							return strings.HasPrefix(condition(r, inplace.ConditionDegraded),
								"True ")
						})
					time.Sleep(5 * time.Minute)
					r := b.get("web")
					if condition(r, inplace.ConditionComplete) != "False RolledBack" ||
						r.Status.Failures[0].Reason != evaluate.FailDenied ||
						!strings.Contains(r.Status.Failures[0].Message, "image is not signed") {
						t.Errorf("status %+v", r.Status)
					}
					b.atRest(of, "app:1")
					b.served("app:1")
					if !strings.Contains(b.told(), "image is not signed") {
						t.Errorf("events:\n%s", b.told())
					}
				})
			})
		}
	}
}

// rewriter makes something of image app:2, wherever it is asked for, as a function of how often it
// was asked.
func rewriter(where func(client.Object) bool, become func(asked int) string) func(client.Object, bool) error {
	var mu sync.Mutex
	asked := 0
	return func(o client.Object, _ bool) error {
		mu.Lock()
		defer mu.Unlock()
		if where(o) && imageOf(o) == "app:2" {
			asked++
			specOf(o).Containers[0].Image = become(asked)
		}
		return nil
	}
}

// What admission makes of an image is what pods and templates become.
func TestImageIsRewritten(t *testing.T) {
	mirror := func(int) string { return "mirror.example.com/app:2" }
	everywhere := func(client.Object) bool { return true }
	for _, kind := range []string{"Pod", workload.KindStatefulSet, workload.KindDaemonSet, workload.KindDeployment} {
		for name, where := range map[string]func(client.Object) bool{"everywhere": everywhere, "pods": isPod} {
			t.Run(kind+" "+name, func(t *testing.T) {
				inBed(t, func(t *testing.T, b *bed) {
					b.addNodes(4)
					target := all()
					if kind == "Pod" {
						b.addPods(4, 4, gated)
					} else {
						b.addOf(kind, 4)
						target = ref(kind)
					}
					before := b.uids()
					b.policy = rewriter(where, mirror)
					b.create("web", spec{Target: target, Containers: to("app:2")})
					r := b.until("ended", "web", 5*time.Minute, ended)
					b.want(r, "True RolledOut", "4/4/4/0/0")
					prepared, patched := len(b.fleet.prepared()), b.counted("patch v1.Pod")
					templates := b.templateWrites()
					if prepared != 4 || patched != 4 || templates > 4 {
						t.Errorf("prepared %d times, pods patched %d times, templates %d times", prepared, patched,
							templates)
					}
					for _, p := range b.fleet.prepared() {
						if got := p.GetContainers()[0].GetImage(); got != mirror(1) {
							t.Errorf("prepared %s", got)
						}
					}
					time.Sleep(10 * time.Minute)
					b.restart()
					time.Sleep(10 * time.Minute)
					b.served(mirror(1))
					if n := b.counted("patch v1.Pod"); n != patched || b.templateWrites() != templates ||
						len(b.fleet.prepared()) != prepared {
						t.Errorf("it is not at rest: %d writes of pods, %d of templates, prepared %d times", n,
							b.templateWrites(), len(b.fleet.prepared()))
					}
					if after := b.uids(); fmt.Sprint(after) != fmt.Sprint(before) {
						t.Errorf("pods %v, were %v", after, before)
					}
					b.want(b.get("web"), "True RolledOut", "4/4/4/0/0")
					// Back to what was there.
					b.edit("web", func(r *rollout) { r.Spec.Containers[0].Image = r.Status.PreviousImages["app"] })
					r = b.until("ended", "web", 5*time.Minute, func(r *rollout) bool {
						return ended(r) &&
							r.Status.ObservedGeneration == 2
					})
					b.want(r, "True RolledOut", "4/4/4/0/0")
					b.served("app:1")
				})
			})
		}
	}
}

// templateWrites counts changes of workloads.
func (b *bed) templateWrites() (n int) {
	for _, kind := range []string{"StatefulSet", "DaemonSet", "Deployment", "ReplicaSet"} {
		n += b.counted("patch v1." + kind)
	}
	return n
}

// An image that admission makes into another one each time cannot be prepared: the rollout says so,
// and no object is written again and again.
func TestImageIsRewrittenAnew(t *testing.T) {
	anew := func(asked int) string { return fmt.Sprintf("app:2-%d", asked) }
	for _, kind := range []string{"Pod", "pods of " + workload.KindStatefulSet, workload.KindStatefulSet,
		workload.KindDaemonSet, workload.KindDeployment, "ReplicaSet"} {
		t.Run(kind, func(t *testing.T) {
			inBed(t, func(t *testing.T, b *bed) {
				b.addNodes(3)
				target, of := all(), kind
				switch kind {
				case "Pod":
					b.addPods(3, 3, gated)
				case "ReplicaSet":
					of = workload.KindDeployment
				case "pods of " + workload.KindStatefulSet:
					of = workload.KindStatefulSet
				}
				if kind != "Pod" {
					b.addOf(of, 3)
					target = ref(of)
				}
				b.policy = rewriter(func(o client.Object) bool {
					if of != kind && kind != "ReplicaSet" {
						return isPod(o)
					}
					return strings.HasSuffix(fmt.Sprintf("%T", o), "."+kind)
				}, anew)
				b.create("web", spec{Target: target, Containers: to("app:2")})
				b.until("over", "web", time.Minute,
					func(r *rollout) bool { return condition(r, inplace.ConditionComplete) == "False RolledBack" })
				time.Sleep(time.Minute)
				pods, templates := b.counted("patch v1.Pod"), b.templateWrites()
				time.Sleep(2 * time.Minute)
				r := b.get("web")
				if r.Status.Failures[0].Reason != evaluate.FailRewritten {
					t.Errorf("status %+v", r.Status)
				}
				if pods != b.counted("patch v1.Pod") || templates != b.templateWrites() || templates > 5 || pods > 0 {
					t.Errorf("%d writes of pods, %d of templates, then %d and %d", pods, templates,
						b.counted("patch v1.Pod"), b.templateWrites())
				}
				b.served("app:1")
				if kind != "Pod" {
					b.atRest(of, "app:1")
				}
			})
		})
	}
}

// Admission that lets the dry run be and changes the image when it is written has the last word
// once, not again and again.
func TestImageIsRewrittenUnasked(t *testing.T) {
	for _, kind := range []string{"Pod", workload.KindStatefulSet, workload.KindDeployment} {
		t.Run(kind, func(t *testing.T) {
			inBed(t, func(t *testing.T, b *bed) {
				b.addNodes(2)
				target := all()
				if kind == "Pod" {
					b.addPods(2, 2, gated)
				} else {
					b.addOf(kind, 2)
					target = ref(kind)
				}
				b.policy = func(o client.Object, dry bool) error {
					if (kind == "Pod") == isPod(o) && imageOf(o) == "app:2" && !dry {
						specOf(o).Containers[0].Image = "app:9"
					}
					return nil
				}
				b.create("web", spec{Target: target, Containers: to("app:2")})
				b.until("over", "web", 5*time.Minute,
					func(r *rollout) bool { return condition(r, inplace.ConditionComplete) == "False RolledBack" })
				time.Sleep(time.Minute)
				if r := b.get("web"); r.Status.Failures[0].Reason != evaluate.FailRewritten {
					t.Errorf("status %+v", r.Status)
				}
				if n := b.counted("patch v1.Pod") + b.templateWrites(); n > 12 {
					t.Errorf("%d writes", n)
				}
				b.served("app:1")
				if kind != "Pod" {
					b.atRest(kind, "app:1")
				}
			})
		})
	}
}

// The same for the template of a workload, which goes on as it was.
func TestAPIServerFailsOnTemplate(t *testing.T) {
	for _, kind := range []string{workload.KindStatefulSet, workload.KindDaemonSet, workload.KindDeployment,
		"ReplicaSet"} {
		for _, late := range []bool{false, true} {
			for _, back := range []bool{true, false} {
				t.Run(fmt.Sprintf("%s, late %v, comes back %v", kind, late, back), func(t *testing.T) {
					inBed(t, func(t *testing.T, b *bed) {
						b.addNodes(3)
						of := kind
						if kind == "ReplicaSet" {
							of = workload.KindDeployment
						}
						b.addOf(of, 3)
						var mu sync.Mutex
						failed, down := 0, true
						b.policy = func(o client.Object, dry bool) error {
							mu.Lock()
							defer mu.Unlock()
							if !down || !strings.HasSuffix(fmt.Sprintf("%T", o), "."+kind) || imageOf(o) != "app:2" ||
								late && dry {
								return nil
							}
							failed++
							return apierrors.NewInternalError(
								errors.New(`failed calling webhook "sign.example.com": connection refused`))
						}
						b.create("web", spec{Target: ref(of), Containers: to("app:2"),
							Strategy: settings{ProgressDeadlineSeconds: 120}})
						r := b.until("told", "web", time.Minute, func(r *rollout) bool {
							return strings.Contains(condition(r, inplace.ConditionProgressing), inplace.ReasonAPIError)
						})
						if !strings.Contains(r.Status.Message, "sign.example.com") ||
							!strings.Contains(b.told(), "sign.example.com") {
							t.Errorf("message %q, events:\n%s", r.Status.Message, b.told())
						}
						if back {
							time.Sleep(time.Minute)
							mu.Lock()
							down = false
							mu.Unlock()
							b.want(b.until("ended", "web", 10*time.Minute, ended), "True RolledOut", "3/3/3/0/0")
							b.atRest(of, "app:2")
							return
						}
						r = b.until("over", "web", 5*time.Minute,
							func(r *rollout) bool {
								return condition(r,
									inplace.ConditionComplete) == "False RolledBack"
							})
						if r.Status.Failures[0].Reason != evaluate.FailDeadline ||
							!strings.Contains(r.Status.Failures[0].Message, "sign.example.com") {
							t.Errorf("status %+v", r.Status)
						}
						time.Sleep(time.Minute)
						b.atRest(of, "app:1")
						b.served("app:1")
						if failed > 60 {
							t.Errorf("%d tries in two minutes", failed)
						}
					})
				})
			}
		}
	}
}
