// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package rollout

import (
	"testing"
	"time"

	appsv1 "k8s.io/api/apps/v1"
	corev1 "k8s.io/api/core/v1"
	"sigs.k8s.io/controller-runtime/pkg/client"

	inplace "github.com/cri-proxy/cri-proxy/api/inplace/v1alpha1"
	opsv1 "github.com/cri-proxy/cri-proxy/api/ops/v1"
	"github.com/cri-proxy/cri-proxy/controller/pods"
	"github.com/cri-proxy/cri-proxy/controller/rollout/evaluate"
	"github.com/cri-proxy/cri-proxy/controller/rollout/workload"
)

func always(p *corev1.Pod) {
	for i := range p.Spec.Containers {
		p.Spec.Containers[i].ImagePullPolicy = corev1.PullAlways
	}
}

// restarts are those of a container in all pods, by what they run.
func (b *bed) restarts(container string) map[string]int32 {
	counts := map[string]int32{}
	for _, pod := range b.pods() {
		cs := pods.Status(pod, container)
		counts[cs.ImageID] += cs.RestartCount
	}
	return counts
}

// A rollout of the image that the pods have already brings what its tag names now, where kubelet
// would too.
func TestTag(t *testing.T) {
	for _, tt := range []struct {
		name    string
		pod     func(*corev1.Pod)
		moves   string // the tag
		changes []change
		restart bool // of the controller, all the time
		app     map[string]int32
		side    map[string]int32
		asked   int // questions for tags
		writes  int // of pods
	}{
		{
			name: "not moved", pod: always, changes: to("app:1"),
			app: map[string]int32{"id of app:1": 0}, side: map[string]int32{"id of side:1": 0}, asked: 3,
		},
		{
			name: "moved", pod: always, moves: "app:1", changes: to("app:1"),
			app: map[string]int32{"moved": 3}, side: map[string]int32{"id of side:1": 0}, asked: 3, writes: 3,
		},
		{
			name: "moved, and the controller dies", pod: always, moves: "app:1", changes: to("app:1"), restart: true,
			app: map[string]int32{"moved": 3}, side: map[string]int32{"id of side:1": 0}, asked: 3, writes: 3,
		},
		{
			name: "moved, with a gate", pod: func(p *corev1.Pod) { always(p); gated(p) }, moves: "app:1",
			changes: to("app:1"),
			app:     map[string]int32{"moved": 3}, side: map[string]int32{"id of side:1": 0}, asked: 3, writes: 3,
		},
		{
			name: "moved, and kubelet would not pull", pod: func(*corev1.Pod) {}, moves: "app:1", changes: to("app:1"),
			app: map[string]int32{"id of app:1": 0}, side: map[string]int32{"id of side:1": 0},
		},
		{
			name: "of two one has moved", pod: always, moves: "side:1",
			changes: []change{{Name: "app", Image: "app:1"}, {Name: "side", Image: "side:1"}},
			app:     map[string]int32{"id of app:1": 0}, side: map[string]int32{"moved": 3}, asked: 6, writes: 3,
		},
		{
			name: "moved beside a new image", pod: always, moves: "side:1",
			changes: []change{{Name: "app", Image: "app:2"}, {Name: "side", Image: "side:1"}},
			app:     map[string]int32{"id of app:2": 3}, side: map[string]int32{"moved": 3}, asked: 3, writes: 3,
		},
		{
			name: "not moved beside a new image, and the controller dies", pod: always,
			changes: []change{{Name: "app", Image: "app:2"}, {Name: "side", Image: "side:1"}}, restart: true,
			app: map[string]int32{"id of app:2": 3}, side: map[string]int32{"id of side:1": 0}, asked: 3, writes: 3,
		},
		{
			name: "a restart", pod: always, moves: "app:1", changes: []change{{Name: "app"}},
			app: map[string]int32{"moved": 3}, side: map[string]int32{"id of side:1": 0}, writes: 3,
		},
	} {
		t.Run(tt.name, func(t *testing.T) {
			inBed(t, func(t *testing.T, b *bed) {
				b.addNodes(2)
				b.addPods(3, 2, tt.pod)
				if tt.moves != "" {
					b.moveTag(tt.moves, "moved")
				}
				time.Sleep(time.Minute)
				shut := 0
				for _, pod := range b.pods() {
					b.watch(pod.Name, func(_, now *corev1.Pod) {
						if by, _ := evaluate.OutOfServiceBy(now); by != "" {
							shut++
						}
					})
				}
				b.create("all", spec{Target: all(), Containers: tt.changes})
				looks := 0
				r := b.until("ended", "all", 5*time.Minute, func(r *rollout) bool {
					if looks++; tt.restart && looks%10 == 0 {
						b.restart()
					}
					return ended(r)
				})
				b.want(r, "True RolledOut", "3/3/3/0/0")
				if app, side := b.restarts("app"), b.restarts("side"); !equal(app, tt.app) || !equal(side, tt.side) {
					t.Errorf("restarts of app %v, of side %v; want %v, %v", app, side, tt.app, tt.side)
				}
				asked := 0
				for _, r := range b.fleet.prepared() {
					c := r.GetContainers()[0]
					if c.GetImage() != "app:2" {
						asked++
					}
					if c.GetPullPolicy() != opsv1.PullPolicy_PULL_POLICY_ALWAYS {
						t.Errorf("the node is to pull by %s", c.GetPullPolicy())
					}
				}
				if n := b.counted("patch v1.Pod"); asked != tt.asked || n != tt.writes {
					t.Errorf("%d questions, %d writes of pods; want %d, %d", asked, n, tt.asked, tt.writes)
				}
				if b.peak > 1 || shut > 0 && tt.writes == 0 {
					t.Errorf("%d pods were unavailable at once, %d times one was taken out of service", b.peak, shut)
				}
				if left := b.fleet.unfinished(); len(left) > 0 {
					t.Errorf("left: %v", left)
				}
			})
		})
	}
}

func equal(a, b map[string]int32) bool {
	if len(a) != len(b) {
		return false
	}
	for k, v := range a {
		if w, ok := b[k]; !ok || v != w {
			return false
		}
	}
	return true
}

// Pods that are as they should be are not taken out of service for a look at their tags.
func TestTagNotMovedLeavesGates(t *testing.T) {
	inBed(t, func(t *testing.T, b *bed) {
		b.addNodes(1)
		b.addPods(3, 1, gated, always)
		time.Sleep(time.Minute)
		b.create("all", spec{Target: all(), Containers: to("app:1"), Strategy: settings{DrainSeconds: 30}})
		b.want(b.until("ended", "all", 30*time.Second, ended), "True RolledOut", "3/3/3/0/0")
		if n := b.counted("status v1.Pod"); n > 0 {
			t.Errorf("%d writes of gates", n)
		}
	})
}

// A tag that moves after the rollout is brought by the next value of the annotation, and by no
// other write.
func TestTagMovesAgain(t *testing.T) {
	inBed(t, func(t *testing.T, b *bed) {
		b.addNodes(5)
		b.addDeployment(2)
		b.setPullPolicy(corev1.PullAlways)
		time.Sleep(time.Minute)
		b.create("web", spec{Target: ref(workload.KindDeployment), Containers: to("app:1")})
		b.want(b.until("ended", "web", time.Minute, ended), "True RolledOut", "2/2/2/0/0")
		b.moveTag("app:1", "moved")
		b.edit("web", func(r *rollout) { r.Spec.Strategy.MaxUnavailable = number(2) })
		time.Sleep(time.Minute)
		if got := b.restarts("app"); got["moved"] != 0 {
			t.Errorf("restarts %v", got)
		}
		b.edit("web", func(r *rollout) { r.Annotations = map[string]string{inplace.RetryAnnotation: "2"} })
		b.want(b.until("ended again", "web", time.Minute, func(r *rollout) bool {
			return ended(r) &&
				r.Status.ObservedRevision == evaluate.RevisionOf(r)
		}), "True RolledOut", "2/2/2/0/0")
		if got := b.restarts("app"); len(got) != 1 || got["moved"] == 0 {
			t.Errorf("runs %v", got)
		}
		b.atRest(workload.KindDeployment, "app:1")
	})
}

// setPullPolicy changes the pull policy of all pods, which only a test can.
func (b *bed) setPullPolicy(policy corev1.PullPolicy) {
	for _, pod := range b.pods() {
		b.change(client.ObjectKeyFromObject(pod), pod.UID, func(p *corev1.Pod) bool {
			for i := range p.Spec.Containers {
				p.Spec.Containers[i].ImagePullPolicy = policy
			}
			return true
		})
	}
}

// What cannot be pulled fails the pod before anything is touched, as kubelet could not start it
// either.
func TestTagCannotBePulled(t *testing.T) {
	inBed(t, func(t *testing.T, b *bed) {
		b.addNodes(1)
		b.addPods(2, 1, always)
		b.fleet.breaks[":1"] = "PullFailed"
		b.create("all", spec{Target: all(), Containers: to("app:1"), Strategy: settings{OnFailure: inplace.Pause}})
		r := b.until("failed", "all", time.Minute, func(r *rollout) bool { return len(r.Status.Failures) > 0 })
		if f := r.Status.Failures[0]; f.Reason != "PullFailed" || b.counted("patch v1.Pod") != 0 {
			t.Errorf("failure %+v, %d writes of pods", f, b.counted("patch v1.Pod"))
		}
	})
}

// Somebody's restart goes before the question: it is asked again.
func TestTagAskedAgain(t *testing.T) {
	inBed(t, func(t *testing.T, b *bed) {
		b.addNodes(1)
		b.addPods(1, 1, always)
		b.moveTag("app:1", "moved")
		b.fleet.breaks[":1"] = "Cancelled"
		b.create("all", spec{Target: all(), Containers: to("app:1")})
		time.Sleep(4 * time.Second)
		b.fleet.mu.Lock()
		clear(b.fleet.breaks)
		b.fleet.mu.Unlock()
		b.want(b.until("ended", "all", time.Minute, ended), "True RolledOut", "1/1/1/0/0")
		if got := b.restarts("app"); got["moved"] != 1 {
			t.Errorf("restarts %v", got)
		}
	})
}

// A workload's own rollout names containers that nobody has asked for: they stay as they are.
func TestTagOfFollowedTemplate(t *testing.T) {
	inBed(t, func(t *testing.T, b *bed) {
		b.addNodes(5)
		b.addStatefulSet(2)
		b.setPullPolicy(corev1.PullAlways)
		b.moveTag("side:1", "moved")
		time.Sleep(time.Minute)
		user(b, &appsv1.StatefulSet{}, func(s *appsv1.StatefulSet) {
			s.Annotations = map[string]string{inplace.InPlaceAnnotation: "true"}
			s.Spec.Template.Spec.Containers[0].Image = "app:2"
		})
		b.want(b.until("ended", "statefulset-web", time.Minute, func(r *rollout) bool { return r != nil && ended(r) }),
			"True RolledOut", "2/2/2/0/0")
		if got := b.restarts("side"); got["moved"] != 0 {
			t.Errorf("restarts %v", got)
		}
	})
}

// A node that does not come to an end with the pull fails the pod.
func TestTagPullNeverEnds(t *testing.T) {
	inBed(t, func(t *testing.T, b *bed) {
		b.addNodes(1)
		b.addPods(2, 1, always)
		b.fleet.change("node-0", func(n *simNode) { n.deaf = true })
		b.create("all", spec{Target: all(), Containers: to("app:1"), Strategy: settings{OnFailure: inplace.Pause,
			ProgressDeadlineSeconds: 60}})
		r := b.until("failed", "all", 2*time.Minute, func(r *rollout) bool { return len(r.Status.Failures) > 0 })
		if f := r.Status.Failures[0]; f.Reason != evaluate.FailDeadline {
			t.Errorf("failure %+v", f)
		}
		time.Sleep(time.Minute)
		if left := b.fleet.unfinished(); len(left) > 0 {
			t.Errorf("left: %v", left)
		}
	})
}
