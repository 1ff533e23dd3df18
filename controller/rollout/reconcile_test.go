// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package rollout

import (
	"maps"
	"slices"
	"strings"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	policyv1 "k8s.io/api/policy/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	inplace "github.com/cri-proxy/cri-proxy/api/inplace/v1alpha1"
	"github.com/cri-proxy/cri-proxy/controller/pods"
	"github.com/cri-proxy/cri-proxy/controller/rollout/evaluate"
)

func TestPod(t *testing.T) {
	inBed(t, func(t *testing.T, b *bed) {
		b.addNodes(1)
		b.addPods(1, 1)
		b.create("one", spec{Target: inplace.Target{PodName: "web-0"}, Containers: to("app:2")})
		r := b.until("ended", "one", time.Minute, ended)
		b.want(r, "True RolledOut", "1/1/1/0/0")
		pod := b.pod("web-0")
		if runningImage(pod, "app") != "app:2" || runningImage(pod, "side") != "side:1" ||
			pod.Annotations["other"] != "kept" {
			t.Errorf("pod %+v", pod)
		}
		if n := b.counted("patch v1.Pod") + b.counted("status v1.Pod"); n != 1 {
			t.Errorf("%d writes for the pod", n)
		}
		if b.fleet.pinned() != 0 {
			t.Error("pins are left")
		}
		p := b.fleet.prepared()
		if len(p) != 1 || p[0].GetOwner() != "InPlaceRollout/ns/one/uid-one" ||
			!p[0].GetContainers()[0].GetRunAsNonRoot() || p[0].GetContainers()[0].GetExpectedContainerId() == "" {
			t.Errorf("prepared %v", p)
		}
	})
}

// Pods go one after another, and no more are unavailable than may be.
func TestSelector(t *testing.T) {
	for _, tt := range []struct {
		name string
		max  *settings
		peak int
	}{
		{"one", &settings{}, 1},
		{"three", &settings{MaxUnavailable: number(3)}, 3},
		{"a quarter", &settings{MaxUnavailable: percent("25%")}, 2},
		{"with time to show", &settings{MaxUnavailable: number(2), MinReadySeconds: 10}, 2},
	} {
		t.Run(tt.name, func(t *testing.T) {
			inBed(t, func(t *testing.T, b *bed) {
				b.addNodes(3)
				b.addPods(10, 3)
				time.Sleep(time.Minute)
				b.create("all", spec{Target: all(), Containers: to("app:2"), Strategy: *tt.max})
				r := b.until("ended", "all", 10*time.Minute, ended)
				b.want(r, "True RolledOut", "10/10/10/0/0")
				if b.peak != tt.peak {
					t.Errorf("%d were not ready at once, want %d", b.peak, tt.peak)
				}
				if got := b.images("app"); got["app:2"] != 10 {
					t.Errorf("images %v", got)
				}
				if r.Status.PreviousImages["app"] != "app:1" || r.Status.TargetImages["app"] != "app:2" ||
					r.Status.CurrentImages["app"] != "app:2" {
					t.Errorf("status %+v", r.Status)
				}
			})
		})
	}
}

// A pod with a gate is out of service before anything is stopped, and back when the new container
// is ready.
func TestGate(t *testing.T) {
	inBed(t, func(t *testing.T, b *bed) {
		b.addNodes(2)
		b.addPods(4, 2, gated)
		var shut, patched time.Time
		b.watch("web-3", func(before, now *corev1.Pod) {
			if by, _ := evaluate.OutOfServiceBy(now); by != "" && shut.IsZero() {
				shut = time.Now()
			}
			if now.Spec.Containers[0].Image == "app:2" && patched.IsZero() {
				patched = time.Now()
				if c := pods.Condition(now, corev1.PodReady); c.Status != corev1.ConditionFalse {
					t.Error("patched while ready")
				}
			}
		})
		b.create("all", spec{Target: all(), Containers: to("app:2"), Strategy: settings{DrainSeconds: 20}})
		r := b.until("ended", "all", 10*time.Minute, ended)
		b.want(r, "True RolledOut", "4/4/4/0/0")
		if d := patched.Sub(shut); d < 20*time.Second || d > 25*time.Second {
			t.Errorf("drained for %s", d)
		}
		if n := b.counted("patch v1.Pod") + b.counted("status v1.Pod"); n != 3*4 || b.peak != 1 {
			t.Errorf("%d writes for 4 pods, peak %d", n, b.peak)
		}
	})
}

// A container without an image is restarted, in the same turn as the other gets its image: one stop
// each.
func TestRestartAndImage(t *testing.T) {
	inBed(t, func(t *testing.T, b *bed) {
		b.addNodes(1)
		b.addPods(2, 1)
		b.create("all", spec{Target: all(), Containers: []change{{Name: "app", Image: "app:2"}, {Name: "side"}}})
		r := b.until("ended", "all", time.Minute, ended)
		b.want(r, "True RolledOut", "2/2/2/0/0")
		for _, pod := range b.pods() {
			for _, c := range pod.Status.ContainerStatuses {
				if c.RestartCount != 1 {
					t.Errorf("pod %s container %s restarted %d times", pod.Name, c.Name, c.RestartCount)
				}
			}
		}
		// Once more only when asked.
		b.edit("all", func(r *rollout) { r.Spec.Containers = []change{{Name: "side"}} })
		r = b.until("ended", "all", time.Minute, func(r *rollout) bool {
			return ended(r) &&
				r.Status.ObservedGeneration == 2
		})
		b.want(r, "True RolledOut", "2/2/2/0/0")
		b.restart()
		time.Sleep(time.Minute)
		for _, pod := range b.pods() {
			if n := pods.Status(pod, "side").RestartCount; n != 2 {
				t.Errorf("pod %s restarted %d times", pod.Name, n)
			}
		}
		b.edit("all", func(r *rollout) { r.Annotations = map[string]string{inplace.RetryAnnotation: "1"} })
		time.Sleep(time.Second)
		b.until("ended", "all", time.Minute, ended)
		if n := pods.Status(b.pod("web-0"), "side").RestartCount; n != 3 {
			t.Errorf("restarted %d times", n)
		}
	})
}

// What goes wrong with an image, and what becomes of it.
func TestFailure(t *testing.T) {
	for _, tt := range []struct {
		name, image string
		policy      inplace.FailurePolicy
		reason      string // of the failure
		complete    string
		changed     int // pods that were patched, at most
	}{
		{"the image cannot be pulled", "app:missing", inplace.Rollback, "PullFailed", "False RolledBack", 0},
		{"the new container ends", "app:crash", inplace.Rollback, "ContainerExited", "False RolledBack", 2},
		{"the new container does not get ready", "app:slow", inplace.Rollback, evaluate.FailDeadline,
			"False RolledBack", 2},
		{"kubelet cannot pull", "app:gone", inplace.Rollback, "ImagePullBackOff", "False RolledBack", 2},
		{"stop", "app:crash", inplace.Pause, "ContainerExited", "False StoppedOnFailure", 2},
		{"stop before anything was touched", "app:missing", inplace.Pause, "PullFailed", "False StoppedOnFailure", 0},
		{"go on", "app:missing", inplace.Continue, "PullFailed", "False PodsFailed", 0},
	} {
		t.Run(tt.name, func(t *testing.T) {
			inBed(t, func(t *testing.T, b *bed) {
				b.addNodes(2)
				b.addPods(6, 2)
				b.fleet.breaks[":missing"] = "PullFailed"
				b.create("all", spec{Target: all(), Containers: to(tt.image),
					Strategy: settings{MaxUnavailable: number(2), OnFailure: tt.policy, ProgressDeadlineSeconds: 60}})
				b.until("over", "all", 10*time.Minute,
					func(r *rollout) bool { return condition(r, inplace.ConditionComplete) == tt.complete })
				time.Sleep(5 * time.Second)
				r := b.get("all")
				if len(r.Status.Failures) == 0 || r.Status.Failures[0].Reason != tt.reason ||
					!strings.HasPrefix(condition(r, inplace.ConditionDegraded), "True ") {
					t.Errorf("status %+v", r.Status)
				}
				patched := 0
				for _, pod := range b.pods() {
					if pod.Annotations[inplace.PodStateAnnotation] != "" {
						patched++
					}
				}
				if patched > tt.changed || b.peak > 2 {
					t.Errorf("%d pods were changed, want at most %d; %d were not ready at once", patched, tt.changed,
						b.peak)
				}
				if tt.policy == inplace.Rollback {
					if got := b.images("app"); got["app:1"] != 6 || r.Status.Updated != 0 || r.Status.Ready != 6 {
						t.Errorf("images %v, status %+v", got, r.Status)
					}
					if got := b.fleet.unfinished(); len(got) > 0 {
						t.Errorf("nodes still have %q", got)
					}
					// The next image goes its way.
					b.edit("all", func(r *rollout) { r.Spec.Containers[0].Image = "app:2" })
					r = b.until("ended", "all", 10*time.Minute, func(r *rollout) bool {
						return ended(r) &&
							r.Status.ObservedGeneration == 2
					})
					b.want(r, "True RolledOut", "6/6/6/0/0")
				}
			})
		})
	}
}

// What nodes have ready for a change that is taken back, or for images that are not wanted any
// more, they do not keep: it would stand in the way of what comes next.
func TestNothingStaysReady(t *testing.T) {
	t.Run("kubelet has not come", func(t *testing.T) {
		inBed(t, func(t *testing.T, b *bed) {
			b.addNodes(2)
			b.addPods(4, 2)
			b.kubelet.sync = 5 * time.Minute
			b.create("all", spec{Target: all(), Containers: to("app:2"),
				Strategy: settings{MaxUnavailable: number(2), ProgressDeadlineSeconds: 30}})
			b.until("back", "all", 10*time.Minute,
				func(r *rollout) bool { return condition(r, inplace.ConditionComplete) == "False RolledBack" })
			if got := b.fleet.unfinished(); len(got) > 0 || b.images("app")["app:1"] != 4 {
				t.Errorf("nodes still have %q; images %v", got, b.images("app"))
			}
			for _, pod := range b.pods() {
				if got := pod.Spec.Containers[0].Image; got != "app:1" {
					t.Errorf("pod %s is to run %s", pod.Name, got)
				}
			}
		})
	})
	t.Run("another image is wanted", func(t *testing.T) {
		inBed(t, func(t *testing.T, b *bed) {
			b.addNodes(2)
			b.addPods(6, 2)
			b.create("all", spec{Target: all(), Containers: to("app:2"), Strategy: settings{MaxUnavailable: number(1)}})
			b.until("on its way", "all", time.Minute, func(r *rollout) bool { return b.images("app")["app:2"] >= 1 })
			b.edit("all", func(r *rollout) { r.Spec.Containers[0].Image = "app:3" })
			r := b.until("ended", "all", 2*time.Minute, func(r *rollout) bool {
				return ended(r) &&
					r.Status.ObservedGeneration == 2
			})
			b.want(r, "True RolledOut", "6/6/6/0/0")
			if got := b.fleet.unfinished(); len(got) > 0 {
				t.Errorf("nodes still have %q", got)
			}
		})
	})
}

// A partition keeps pods; lowering it goes on.
func TestPartition(t *testing.T) {
	inBed(t, func(t *testing.T, b *bed) {
		b.addNodes(2)
		b.addPods(5, 2)
		b.create("all", spec{Target: all(), Containers: to("app:2"), Strategy: settings{Partition: percent("50%")}})
		r := b.until("held", "all", time.Minute,
			func(r *rollout) bool { return condition(r, inplace.ConditionProgressing) == "True Partitioned" })
		b.want(r, "False Partitioned", "5/2/5/0/0")
		time.Sleep(time.Hour)
		b.edit("all", func(r *rollout) { r.Spec.Strategy.Partition = number(1) })
		b.until("further", "all", time.Minute, func(r *rollout) bool {
			return r.Status.Updated == 4 && condition(r, inplace.ConditionProgressing) == "True Partitioned"
		})
		b.edit("all", func(r *rollout) { r.Spec.Strategy.Partition = nil })
		b.until("ended", "all", time.Minute, ended)
	})
}

func TestPause(t *testing.T) {
	inBed(t, func(t *testing.T, b *bed) {
		b.addNodes(2)
		b.addPods(6, 2)
		b.create("all", spec{Target: all(), Containers: to("app:2")})
		b.until("on its way", "all", time.Minute, func(r *rollout) bool { return r.Status.Updated == 2 })
		b.edit("all", func(r *rollout) { r.Spec.Paused = true })
		r := b.until("paused", "all", time.Minute,
			func(r *rollout) bool { return condition(r, inplace.ConditionProgressing) == "True Paused" })
		updated := r.Status.Updated
		time.Sleep(3 * time.Hour) // longer than nodes hold
		if r = b.get("all"); r.Status.Updated != updated || updated > 3 {
			t.Errorf("%d updated, %d when paused", r.Status.Updated, updated)
		}
		b.edit("all", func(r *rollout) { r.Spec.Paused = false })
		b.want(b.until("ended", "all", time.Minute, ended), "True RolledOut", "6/6/6/0/0")
	})
}

// The next image in the middle: every pod ends with it, and a failure goes back to the last that
// was good.
func TestEdit(t *testing.T) {
	for _, tt := range []struct{ next, end string }{{"app:3", "app:3"}, {"app:crash", "app:1"}, {"app:1", "app:1"}} {
		t.Run(tt.next, func(t *testing.T) {
			inBed(t, func(t *testing.T, b *bed) {
				b.addNodes(2)
				b.addPods(6, 2)
				b.create("all", spec{Target: all(), Containers: to("app:2"),
					Strategy: settings{MaxUnavailable: number(2)}})
				b.until("on its way", "all", time.Minute,
					func(r *rollout) bool { return b.images("app")["app:2"] >= 3 })
				b.edit("all", func(r *rollout) { r.Spec.Containers[0].Image = tt.next })
				b.until("ended", "all", 10*time.Minute, func(r *rollout) bool {
					return ended(r) &&
						r.Status.ObservedGeneration == 2
				})
				if got := b.images("app"); got[tt.end] != 6 || b.peak > 3 {
					t.Errorf("images %v, peak %d; events\n%s", got, b.peak, b.told())
				}
			})
		})
	}
}

// Pods that come, go and break in the middle.
func TestPodsChange(t *testing.T) {
	inBed(t, func(t *testing.T, b *bed) {
		b.addNodes(3)
		b.addPods(6, 2)
		b.addPod("pending", "")
		b.addPod("broken", "node-2", func(p *corev1.Pod) {
			p.Status.ContainerStatuses = []corev1.ContainerStatus{
				{Name: "app",
					State: corev1.ContainerState{Waiting: &corev1.ContainerStateWaiting{Reason: "ImagePullBackOff",
						Message: "Back-off pulling image \"app:1\""}}},
				{Name: "side", Image: "side:1", ContainerID: "containerd://s", Ready: true,
					State: corev1.ContainerState{Running: &corev1.ContainerStateRunning{}}},
			}
			setReady(p, false)
		})
		b.create("all", spec{Target: all(), Containers: to("app:2"), Strategy: settings{MaxUnavailable: number(3)}})
		b.until("on its way", "all", time.Minute, func(r *rollout) bool { return b.images("app")["app:2"] >= 2 })
		b.remove("web-0")
		b.remove("web-5")
		b.remove("pending")
		b.addPod("web-0", "node-2") // made anew elsewhere, with the old image
		b.addPod("late", "node-1")
		r := b.until("ended", "all", 5*time.Minute, ended)
		b.want(r, "True RolledOut", "7/7/7/0/0")
		if got := b.images("app"); got["app:2"] != 7 {
			t.Errorf("images %v", got)
		}
	})
}

// A node that is away fails its pods, and one that comes back in time does not.
func TestNodeAway(t *testing.T) {
	inBed(t, func(t *testing.T, b *bed) {
		b.addNodes(2)
		b.addPods(4, 2)
		b.fleet.change("node-1", func(n *simNode) { n.silent = true })
		b.create("all", spec{Target: all(), Containers: to("app:2"), Strategy: settings{OnFailure: inplace.Pause,
			ProgressDeadlineSeconds: 120}})
		time.Sleep(time.Minute)
		b.fleet.change("node-1", func(n *simNode) { n.silent = false })
		b.until("ended", "all", 5*time.Minute, ended)
		b.fleet.change("node-0", func(n *simNode) { n.refused = true })
		b.edit("all", func(r *rollout) { r.Spec.Containers[0].Image = "app:3" })
		r := b.until("stopped", "all", 10*time.Minute,
			func(r *rollout) bool { return condition(r, inplace.ConditionProgressing) == "False StoppedOnFailure" })
		if r.Status.Failures[0].Reason != evaluate.FailUnreachable || !strings.Contains(r.Status.Failures[0].Message,
			"install cri-proxy") {
			t.Errorf("status %+v", r.Status)
		}
		b.fleet.change("node-0", func(n *simNode) { n.refused = false })
		b.edit("all", func(r *rollout) { r.Annotations = map[string]string{inplace.RetryAnnotation: "1"} })
		b.until("ended", "all", 5*time.Minute, ended)
	})
}

// A node that loses its journal after the commit begins anew, and has to be told of the commit
// again.
func TestNodeForgets(t *testing.T) {
	inBed(t, func(t *testing.T, b *bed) {
		b.addNodes(1)
		b.addPods(1, 1)
		b.fleet.change("node-0", func(n *simNode) { n.forgets = true })
		b.create("all", spec{Target: all(), Containers: to("app:2"), Strategy: settings{ProgressDeadlineSeconds: 60}})
		b.want(b.until("ended", "all", 2*time.Minute, ended), "True RolledOut", "1/1/1/0/0")
		if n := len(b.fleet.nodes["node-0"].requests); n != 2 {
			t.Errorf("begun %d times", n)
		}
	})
}

// A controller that is killed at any moment is followed by one that goes on: nothing is done twice.
func TestControllerDies(t *testing.T) {
	inBed(t, func(t *testing.T, b *bed) {
		b.addNodes(3)
		b.addPods(9, 3, gated)
		b.create("all", spec{Target: all(), Containers: []change{{Name: "app", Image: "app:2"}, {Name: "side"}},
			Strategy: settings{MaxUnavailable: number(2), DrainSeconds: 3}})
		for i := 0; !ended(b.get("all")); i++ {
			time.Sleep(time.Duration(100+i*370%1900) * time.Millisecond)
			b.restart()
			if i > 500 {
				t.Fatalf("no end: %+v", b.get("all").Status)
			}
		}
		b.want(b.get("all"), "True RolledOut", "9/9/9/0/0")
		if b.peak > 2 {
			t.Errorf("%d were not ready at once", b.peak)
		}
		for _, pod := range b.pods() {
			for _, c := range pod.Status.ContainerStatuses {
				if c.RestartCount != 1 {
					t.Errorf("pod %s container %s restarted %d times", pod.Name, c.Name, c.RestartCount)
				}
			}
		}
	})
}

// A disruption budget holds pods back that are ready.
func TestBudget(t *testing.T) {
	inBed(t, func(t *testing.T, b *bed) {
		b.addNodes(2)
		b.addPods(6, 2)
		b.fleet.holds = nodeHolds / 10 // nodes may, and it is the number of times that matters
		budget := &policyv1.PodDisruptionBudget{
			ObjectMeta: metav1.ObjectMeta{Namespace: "ns", Name: "web"},
			Spec: policyv1.PodDisruptionBudgetSpec{
				Selector: &metav1.LabelSelector{MatchLabels: map[string]string{"app": "web"}}},
			Status: policyv1.PodDisruptionBudgetStatus{DesiredHealthy: 6},
		}
		if err := b.api.Create(t.Context(), budget); err != nil {
			t.Fatal(err)
		}
		b.create("all", spec{Target: all(), Containers: to("app:2"), Strategy: settings{MaxUnavailable: number(3)}})
		b.until("held back", "all", time.Minute,
			func(r *rollout) bool { return condition(r, inplace.ConditionProgressing) == "True DisruptionBudget" })
		time.Sleep(nodeHolds) // it is prepared anew more often than failures would be
		if times := map[string]int{}; b.peak != 0 {
			t.Errorf("%d were not ready", b.peak)
		} else {
			for _, r := range b.fleet.prepared() {
				times[r.GetPod().GetName()]++
			}
			if most := slices.Max(slices.Collect(maps.Values(times))); most <= rounds {
				t.Errorf("prepared %d times, which says nothing about more than %d", most, rounds)
			}
		}
		budget.Status.DesiredHealthy, budget.Status.DisruptionsAllowed = 5, 1
		if err := b.api.Status().Update(t.Context(), budget); err != nil {
			t.Fatal(err)
		}
		b.until("ended", "all", 5*time.Minute, ended)
		if b.peak != 1 {
			t.Errorf("%d were not ready at once", b.peak)
		}
	})
}

// A rollout that is deleted in the middle leaves pods in service and no pins.
func TestDelete(t *testing.T) {
	inBed(t, func(t *testing.T, b *bed) {
		b.addNodes(2)
		b.addPods(6, 2, gated)
		b.create("all", spec{Target: all(), Containers: to("app:2"), Strategy: settings{DrainSeconds: 30}})
		b.until("draining", "all", time.Minute, func(*rollout) bool { return b.unready() == 1 })
		b.delete(&rollout{ObjectMeta: metav1.ObjectMeta{Name: "all"}})
		b.until("gone", "all", time.Minute, gone)
		time.Sleep(time.Minute)
		if b.unready() != 0 || b.fleet.pinned() != 0 {
			t.Errorf("%d not ready, %d pins", b.unready(), b.fleet.pinned())
		}
	})
}

func TestTimeToLive(t *testing.T) {
	inBed(t, func(t *testing.T, b *bed) {
		b.addNodes(1)
		b.addPods(1, 1)
		ttl := int32(60)
		b.create("one", spec{Target: inplace.Target{PodName: "web-0"}, Containers: to("app:2"),
			TTLSecondsAfterFinished: &ttl})
		b.until("ended", "one", time.Minute, ended)
		b.until("gone", "one", 2*time.Minute, gone)
	})
}

// The nodes get the credentials of the pod's imagePullSecrets, and of its ServiceAccount's.
func TestPullSecrets(t *testing.T) {
	inBed(t, func(t *testing.T, b *bed) {
		b.addNodes(1)
		b.addPod("web-0", "node-0", func(p *corev1.Pod) {
			p.Spec.ImagePullSecrets = []corev1.LocalObjectReference{{Name: "of-pod"}, {Name: "missing"}}
		})
		account := &corev1.ServiceAccount{ObjectMeta: metav1.ObjectMeta{Namespace: "ns", Name: "web"},
			ImagePullSecrets: []corev1.LocalObjectReference{{Name: "of-account"}}}
		if err := b.api.Create(t.Context(), account); err != nil {
			t.Fatal(err)
		}
		for _, name := range []string{"of-pod", "of-account"} {
			secret := &corev1.Secret{
				ObjectMeta: metav1.ObjectMeta{Namespace: "ns", Name: name}, Type: corev1.SecretTypeDockerConfigJson,
				Data: map[string][]byte{
					corev1.DockerConfigJsonKey: []byte(`{"auths":{"https://index.docker.io/v1/":{"username":"` + name +
						`","password":"p"},"elsewhere":{"username":"u","password":"p"}}}`)},
			}
			if err := b.api.Create(t.Context(), secret); err != nil {
				t.Fatal(err)
			}
		}
		b.create("one", spec{Target: inplace.Target{PodName: "web-0"}, Containers: to("app:2")})
		b.until("ended", "one", time.Minute, ended)
		got := ""
		for _, c := range b.fleet.prepared()[0].GetCredentials() {
			got += c.GetMatch() + " " + c.GetUsername() + " " + c.GetPassword() + "; "
		}
		if got != "index.docker.io of-pod p; index.docker.io of-account p; " { // and none for other registries
			t.Errorf("credentials %s", got)
		}
		if !strings.Contains(b.told(), "PullSecretMissing: pulling without: secret missing of imagePullSecrets does "+
			"not exist in namespace ns") {
			t.Errorf("events\n%s", b.told())
		}
	})
}

// What a node warns of in a change that succeeds is told once, on the pod and on the rollout,
// without what a hook has printed.
func TestWarnings(t *testing.T) {
	inBed(t, func(t *testing.T, b *bed) {
		b.addNodes(1)
		b.addPods(1, 1)
		b.fleet.warnings = []string{"memory had run out in the pod", "preStop hook failed: s3cret"}
		b.create("one", spec{Target: all(), Containers: to("app:2")})
		b.until("ended", "one", time.Minute, ended)
		const text = "container app: memory had run out in the pod; its preStop hook failed, what it printed is in " +
			"the log of cri-proxy on the node"
		for _, want := range []string{"web-0 Warning UpgradeWarning: " + text,
			"one Warning UpgradeWarning: pod web-0, " + text} {
			if strings.Count(b.told(), want) != 1 {
				t.Errorf("not told once: %s\nevents\n%s", want, b.told())
			}
		}
		if strings.Contains(b.told(), "s3cret") {
			t.Errorf("an event tells what a hook printed\n%s", b.told())
		}
	})
}

// A node that is taken away, and its pods a while after it, fail nothing.
func TestNodeGone(t *testing.T) {
	inBed(t, func(t *testing.T, b *bed) {
		b.addNodes(3)
		b.addPods(9, 3)
		b.mu.Lock()
		delete(b.nodes, "node-1")
		b.mu.Unlock()
		b.create("all", spec{Target: all(), Containers: to("app:2")})
		time.Sleep(40 * time.Second)
		for _, name := range []string{"web-1", "web-4", "web-7"} {
			b.remove(name)
			b.addPod(name+"-anew", "node-2")
		}
		b.want(b.until("ended", "all", 5*time.Minute, ended), "True RolledOut", "9/9/9/0/0")
	})
}
