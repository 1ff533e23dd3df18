// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package rollout

import (
	"fmt"
	"strings"
	"testing"
	"time"

	appsv1 "k8s.io/api/apps/v1"

	inplace "github.com/cri-proxy/cri-proxy/api/inplace/v1alpha1"
	"github.com/cri-proxy/cri-proxy/controller/rollout/evaluate"
	"github.com/cri-proxy/cri-proxy/controller/rollout/workload"
)

// What somebody does to a Deployment while a rollout holds it wins: the rollout ends, whenever that
// was, and the Deployment goes on and is left alone.
func TestDeploymentSuperseded(t *testing.T) {
	type change struct {
		name string
		do   func(*appsv1.Deployment)
		want string // the image, and the environment
	}
	setEnv := func(d *appsv1.Deployment) { d.Spec.Template.Spec.Containers[0].Env[0].Value = "changed" }
	image := func(image string) func(*appsv1.Deployment) {
		return func(d *appsv1.Deployment) { d.Spec.Template.Spec.Containers[0].Image = image }
	}
	replaced := func(f func(*appsv1.Deployment)) func(*appsv1.Deployment) {
		return func(d *appsv1.Deployment) { // as kubectl replace and kubectl rollout undo do
			d.Annotations, d.Spec.Paused = nil, false
			f(d)
		}
	}
	for _, c := range []change{
		{"environment", setEnv, "app:2 changed"},
		{"restart", func(d *appsv1.Deployment) {
			d.Spec.Template.Annotations = map[string]string{evaluate.RestartedAt: "now"}
		}, "app:2 b"},
		{"another image", image("app:5"), "app:5 b"},
		{"the image of before", image("app:1"), "app:1 b"},
		{"replaced", replaced(setEnv), "app:2 changed"},
		{"replaced by what was before", replaced(image("app:1")), "app:1 b"},
		{"resumed, then changed", func(d *appsv1.Deployment) { d.Spec.Paused = false; image("app:5")(d) }, "app:5 b"},
	} {
		t.Run(c.name, func(t *testing.T) {
			inBed(t, func(t *testing.T, b *bed) {
				b.addNodes(3)
				b.addDeployment(4)
				b.create("web", spec{Target: ref(workload.KindDeployment), Containers: to("app:2"),
					Strategy: settings{Partition: number(2)}})
				b.until("held", "web", 5*time.Minute,
					func(r *rollout) bool { return condition(r, inplace.ConditionProgressing) == "True Partitioned" })
				if d := read(b, &appsv1.Deployment{}); !d.Spec.Paused {
					t.Fatal("it is not paused")
				}
				user(b, &appsv1.Deployment{}, c.do)
				r := b.until("ended", "web", time.Minute, ended)
				if condition(r, inplace.ConditionComplete) != "False Superseded" ||
					condition(r, inplace.ConditionProgressing) != "False Superseded" ||
					condition(r, inplace.ConditionDegraded) != "False AsExpected" ||
					!strings.Contains(b.told(), "web Warning Superseded: somebody has") {
					t.Errorf("status %+v, events\n%s", r.Status, b.told())
				}
				time.Sleep(time.Minute)
				writes := b.counted("patch v1.Deployment") + b.counted("patch v1.ReplicaSet")
				time.Sleep(10 * time.Minute)
				if more := b.counted("patch v1.Deployment") + b.counted("patch v1.ReplicaSet"); more != writes {
					t.Errorf("%d more writes", more-writes)
				}
				d := read(b, &appsv1.Deployment{})
				if d.Spec.Paused || d.Annotations[inplace.PausedByAnnotation] != "" ||
					d.Annotations[inplace.TemplateAnnotation] != "" {
					t.Errorf("paused %v, annotations %v", d.Spec.Paused, d.Annotations)
				}
				app := d.Spec.Template.Spec.Containers[0]
				if got := app.Image + " " + app.Env[0].Value; got != c.want {
					t.Errorf("the template has %s", got)
				}
				for _, pod := range b.pods() {
					if got := runningImage(pod, "app") + " " + pod.Spec.Containers[0].Env[0].Value; got != c.want {
						t.Errorf("pod %s has %s", pod.Name, got)
					}
				}
			})
		})
	}
}

// The same at any moment, with the controller killed all the while: the user's template is there in
// the end, and the Deployment goes on.
func TestDeploymentSupersededAnyTime(t *testing.T) {
	for i := range 16 {
		t.Run(fmt.Sprint(i), func(t *testing.T) {
			inBed(t, func(t *testing.T, b *bed) {
				b.addNodes(3)
				b.addDeployment(4)
				b.create("web", spec{Target: ref(workload.KindDeployment), Containers: to("app:2"),
					Strategy: settings{Partition: number(1)}})
				time.Sleep(time.Duration(i) * 90 * time.Millisecond)
				user(b, &appsv1.Deployment{},
					func(d *appsv1.Deployment) { d.Spec.Template.Spec.Containers[0].Env[0].Value = "changed" })
				for n := range 10 {
					time.Sleep(time.Duration(70+n*190%900) * time.Millisecond)
					b.restart()
				}
				// If it had written nothing yet it goes on after the Deployment's own rollout, and
				// the partition holds it there.
				b.until("settled", "web", 5*time.Minute, func(r *rollout) bool {
					return ended(r) || condition(r, inplace.ConditionProgressing) == "True Partitioned"
				})
				time.Sleep(time.Minute)
				d := read(b, &appsv1.Deployment{})
				if ended(b.get("web")) && d.Spec.Paused ||
					d.Spec.Template.Spec.Containers[0].Env[0].Value != "changed" || b.unready() != 0 {
					t.Errorf("paused %v, template %+v, %d not ready", d.Spec.Paused, d.Spec.Template, b.unready())
				}
			})
		})
	}
}

// A StatefulSet or DaemonSet whose template somebody puts back all the while, as GitOps controllers
// do: the rollout writes it once.
func TestTemplateSuperseded(t *testing.T) {
	for _, kind := range []string{workload.KindStatefulSet, workload.KindDaemonSet} {
		for _, annotations := range []bool{true, false} {
			t.Run(fmt.Sprint(kind, " annotations kept ", annotations), func(t *testing.T) {
				inBed(t, func(t *testing.T, b *bed) {
					b.addNodes(3)
					b.addOf(kind, 3)
					b.create("web", spec{Target: ref(kind), Containers: to("app:2"),
						Strategy: settings{DrainSeconds: 10}})
					for range 60 {
						time.Sleep(2 * time.Second)
						b.setImage(kind, "app:1")
						if !annotations {
							if kind == workload.KindStatefulSet {
								user(b, &appsv1.StatefulSet{}, func(s *appsv1.StatefulSet) { s.Annotations = nil })
							} else {
								user(b, &appsv1.DaemonSet{}, func(d *appsv1.DaemonSet) { d.Annotations = nil })
							}
						}
					}
					r := b.until("ended", "web", time.Minute, ended)
					if condition(r, inplace.ConditionComplete) != "False Superseded" {
						t.Errorf("status %+v", r.Status)
					}
					if n := b.counted("patch v1." + kind); n > 1 {
						t.Errorf("%d writes", n)
					}
				})
			})
		}
	}
}

// A rollout that waits for a workload longer than its deadline says so.
func TestBlockedTooLong(t *testing.T) {
	inBed(t, func(t *testing.T, b *bed) {
		b.addNodes(3)
		b.addDeployment(2)
		user(b, &appsv1.Deployment{}, func(d *appsv1.Deployment) {
			d.Spec.Paused = true
			d.Spec.Template.Spec.Containers[0].Env[0].Value = "changed"
		})
		b.create("web", spec{Target: ref(workload.KindDeployment), Containers: to("app:2"),
			Strategy: settings{ProgressDeadlineSeconds: 30}})
		b.until("waits", "web", 10*time.Second,
			func(r *rollout) bool { return condition(r, inplace.ConditionProgressing) == "True WaitingForWorkload" })
		r := b.until("late", "web", time.Minute, func(r *rollout) bool {
			return condition(r, inplace.ConditionProgressing) == "False ProgressDeadlineExceeded"
		})
		if !strings.Contains(r.Status.Message, "let its own rollout finish first") ||
			!strings.Contains(b.told(), "Warning ProgressDeadlineExceeded") {
			t.Errorf("message %q, events\n%s", r.Status.Message, b.told())
		}
		user(b, &appsv1.Deployment{}, func(d *appsv1.Deployment) { d.Spec.Paused = false })
		b.want(b.until("ended", "web", 5*time.Minute, ended), "True RolledOut", "2/2/2/0/0")
	})
}
