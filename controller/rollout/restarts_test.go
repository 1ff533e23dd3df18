// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package rollout

import (
	"strings"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	inplace "github.com/cri-proxy/cri-proxy/api/inplace/v1alpha1"
)

// A rollout that only restarts goes from pod to pod as fast as one of an image: the write that lets
// a pod be restarted is noticed at once.
func TestRestartsDoNotPause(t *testing.T) {
	for _, tt := range []struct {
		name   string
		change func(*bed)
	}{
		{"without a gate", func(b *bed) { b.addPods(4, 2) }},
		{"with a gate", func(b *bed) { b.addPods(4, 2, gated) }},
	} {
		t.Run(tt.name, func(t *testing.T) {
			inBed(t, func(t *testing.T, b *bed) {
				b.addNodes(2)
				tt.change(b)
				begun := time.Now()
				b.create("all", spec{Target: all(), Containers: []change{{Name: "app"}},
					Strategy: settings{MinReadySeconds: 5, ProgressDeadlineSeconds: 30}})
				b.want(b.until("ended", "all", 5*time.Minute, ended), "True RolledOut", "4/4/4/0/0")
				// The node takes a second for each, then it must have been ready for long enough.
				if took := time.Since(begun); took > 4*8*time.Second {
					t.Errorf("4 pods took %s", took)
				}
			})
		})
	}
}

// The mark of a restart that has failed is in nobody's way later, whoever left it.
func TestFailedRestartLeavesNothing(t *testing.T) {
	restart := []change{{Name: "app"}}
	for _, tt := range []struct {
		name string
		then func(*bed)
		end  string
	}{
		{"another rollout restarts", func(b *bed) { b.create("then", spec{Target: all(), Containers: restart}) },
			"then"},
		{"another rollout changes the image",
			func(b *bed) { b.create("then", spec{Target: all(), Containers: to("app:2")}) }, "then"},
		{"another rollout changes another container", func(b *bed) {
			b.create("then", spec{Target: all(), Containers: []change{{Name: "side", Image: "side:2"}}})
		}, "then"},
		{"the same rollout tries again", func(b *bed) {
			b.edit("all", func(r *rollout) { r.Annotations = map[string]string{inplace.RetryAnnotation: "1"} })
		}, "all"},
		{"the same rollout changes the image",
			func(b *bed) { b.edit("all", func(r *rollout) { r.Spec.Containers = to("app:2") }) }, "all"},
		{"the first one is gone", func(b *bed) {
			b.delete(b.get("all"))
			b.until("deleted", "all", time.Minute, gone)
			b.create("then", spec{Target: all(), Containers: restart})
		}, "then"},
		{"the node does not know of it any more", func(b *bed) {
			b.fleet.change("node-0", func(n *simNode) { clear(n.ops) })
			b.create("then", spec{Target: all(), Containers: restart})
		}, "then"},
		{"the controller is another one", func(b *bed) {
			b.restart()
			b.create("then", spec{Target: all(), Containers: restart})
		}, "then"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			inBed(t, func(t *testing.T, b *bed) {
				b.addNodes(1)
				b.addPods(2, 1, gated)
				time.Sleep(time.Minute)
				b.fleet.fails = "CreateFailed"
				b.create("all", spec{Target: all(), Containers: restart,
					Strategy: settings{OnFailure: inplace.Continue}})
				r := b.until("ended", "all", time.Minute, ended)
				if r.Status.Failed != 2 || r.Status.Failures[0].Reason != "RestartFailed" {
					t.Fatalf("status %+v", r.Status)
				}
				if n := b.unready(); n != 0 {
					t.Errorf("%d pods are left out of service", n)
				}
				b.fleet.mu.Lock()
				b.fleet.fails = ""
				b.fleet.mu.Unlock()
				tt.then(b)
				b.until("complete", tt.end, 20*time.Second, func(r *rollout) bool {
					return ended(r) && condition(r, inplace.ConditionComplete) == "True RolledOut"
				})
				for _, pod := range b.pods() {
					if pod.Status.ContainerStatuses[0].RestartCount+pod.Status.ContainerStatuses[1].RestartCount != 1 {
						t.Errorf("%s has %+v", pod.Name, pod.Status.ContainerStatuses)
					}
				}
			})
		})
	}
}

// A restart that a node is still at work on keeps its pod from being counted on, though its rollout
// is gone.
func TestRestartOfGoneRolloutCounts(t *testing.T) {
	inBed(t, func(t *testing.T, b *bed) {
		b.addNodes(1)
		b.addPods(3, 1)
		time.Sleep(time.Minute)
		b.fleet.lasts = 50 * time.Second
		begun := time.Now()
		b.create("all", spec{Target: inplace.Target{PodName: "web-0"}, Containers: []change{{Name: "app"}}})
		time.Sleep(5 * time.Second)
		b.delete(b.get("all"))
		b.until("deleted", "all", time.Minute, gone)
		at := b.changes()
		b.create("then", spec{Target: all(), Containers: to("app:2")})
		b.want(b.until("ended", "then", 5*time.Minute, ended), "True RolledOut", "3/3/3/0/0")
		for _, when := range at() {
			if when.Sub(begun) < 50*time.Second {
				t.Errorf("another pod is begun after %s", when.Sub(begun))
			}
		}
	})
}

// A restart that kubelet could not carry out either, because what the spec names is not there,
// fails at once, and leaves the pod as it was.
func TestRestartWithoutItsConfig(t *testing.T) {
	inBed(t, func(t *testing.T, b *bed) {
		b.addNodes(1)
		b.addPods(2, 1, gated, func(p *corev1.Pod) {
			p.Spec.Containers[0].Env = []corev1.EnvVar{{Name: "A",
				ValueFrom: &corev1.EnvVarSource{ConfigMapKeyRef: &corev1.ConfigMapKeySelector{
					LocalObjectReference: corev1.LocalObjectReference{Name: "conf"}, Key: "a",
				}}}}
		})
		time.Sleep(time.Minute)
		b.create("all", spec{Target: all(), Containers: []change{{Name: "app"}},
			Strategy: settings{OnFailure: inplace.Pause}})
		r := b.until("failed", "all", 20*time.Second, func(r *rollout) bool { return len(r.Status.Failures) > 0 })
		if f := r.Status.Failures[0]; !strings.Contains(f.Message, `configmap "conf" not found`) {
			t.Errorf("failure %+v", f)
		}
		b.until("in service", "all", 10*time.Second, func(*rollout) bool { return b.unready() == 0 })
		if err := b.api.Create(b.ctx, &corev1.ConfigMap{ObjectMeta: metav1.ObjectMeta{Namespace: "ns", Name: "conf"},
			Data: map[string]string{"a": "b"}}); err != nil {
			t.Fatal(err)
		}
		b.edit("all", func(r *rollout) { r.Annotations = map[string]string{inplace.RetryAnnotation: "1"} })
		b.want(b.until("ended", "all", 20*time.Second, ended), "True RolledOut", "2/2/2/0/0")
	})
}
