// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package rollout

import (
	"strings"
	"sync"
	"testing"
	"time"

	appsv1 "k8s.io/api/apps/v1"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	inplace "github.com/cri-proxy/cri-proxy/api/inplace/v1alpha1"
	"github.com/cri-proxy/cri-proxy/controller/pods"
	"github.com/cri-proxy/cri-proxy/controller/rollout/workload"
)

// changes are the moments at which pods run another container.
func (b *bed) changes() func() []time.Time {
	var mu sync.Mutex
	var at []time.Time
	for _, pod := range b.pods() {
		b.watch(pod.Name, func(before, now *corev1.Pod) {
			old, other := pods.Status(before, "app"), pods.Status(now, "app")
			if old != nil && old.ContainerID != other.ContainerID {
				mu.Lock()
				defer mu.Unlock()
				at = append(at, time.Now())
			}
		})
	}
	return func() []time.Time {
		mu.Lock()
		defer mu.Unlock()
		return at
	}
}

// A workload's own minReadySeconds is kept as the rollout's is: of the two the longer.
func TestMinReadyOfWorkload(t *testing.T) {
	for _, tt := range []struct {
		name, kind string
		changes    []change // none: the annotation on the workload
		own, spec  int32
		want       time.Duration
		startFirst bool
		byLabel    bool
	}{
		{"StatefulSet", workload.KindStatefulSet, to("app:2"), 15, 0, 15 * time.Second, false, false},
		{"DaemonSet", workload.KindDaemonSet, to("app:2"), 15, 5, 15 * time.Second, false, false},
		{"Deployment", workload.KindDeployment, to("app:2"), 15, 0, 15 * time.Second, false, false},
		{"Deployment, StartFirst", workload.KindDeployment, to("app:2"), 15, 1, 15 * time.Second, true, false},
		{"restarts", workload.KindDeployment, []change{{Name: "app"}}, 15, 0, 15 * time.Second, false, false},
		{"the rollout's is longer", workload.KindStatefulSet, to("app:2"), 5, 20, 20 * time.Second, false, false},
		{"longer than pods may take", workload.KindStatefulSet, to("app:2"), 900, 0, 900 * time.Second, false, false},
		{"pods of a StatefulSet by label", workload.KindStatefulSet, to("app:2"), 15, 0, 15 * time.Second, false, true},
		{"pods of a DaemonSet by label", workload.KindDaemonSet, to("app:2"), 15, 0, 15 * time.Second, false, true},
		{"pods of a Deployment by label", workload.KindDeployment, to("app:2"), 15, 0, 15 * time.Second, false, true},
		{"annotated StatefulSet", workload.KindStatefulSet, nil, 15, 0, 15 * time.Second, false, false},
		{"annotated DaemonSet", workload.KindDaemonSet, nil, 15, 0, 15 * time.Second, false, false},
	} {
		t.Run(tt.name, func(t *testing.T) {
			inBed(t, func(t *testing.T, b *bed) {
				b.addNodes(3)
				b.addOf(tt.kind, 3)
				name := "web"
				turn := func(t *corev1.PodTemplateSpec, o *metav1.ObjectMeta) {
					if tt.changes == nil {
						t.Spec.Containers[0].Image = "app:2"
						o.Annotations = map[string]string{inplace.InPlaceAnnotation: "true"}
					}
				}
				switch tt.kind {
				case workload.KindStatefulSet:
					user(b, &appsv1.StatefulSet{},
						func(s *appsv1.StatefulSet) {
							s.Spec.MinReadySeconds = tt.own
							turn(&s.Spec.Template,
								&s.ObjectMeta)
						})
				case workload.KindDaemonSet:
					user(b, &appsv1.DaemonSet{},
						func(d *appsv1.DaemonSet) {
							d.Spec.MinReadySeconds = tt.own
							turn(&d.Spec.Template,
								&d.ObjectMeta)
						})
				case workload.KindDeployment:
					user(b, &appsv1.Deployment{}, func(d *appsv1.Deployment) { d.Spec.MinReadySeconds = tt.own })
					var sets appsv1.ReplicaSetList
					if err := b.api.List(b.ctx, &sets); err != nil {
						t.Fatal(err)
					}
					sets.Items[0].Spec.MinReadySeconds = tt.own // as the Deployment's controller does
					if err := b.api.Update(b.ctx, &sets.Items[0]); err != nil {
						t.Fatal(err)
					}
				}
				at := b.changes()
				if tt.changes == nil {
					name = strings.ToLower(tt.kind) + "-web"
				} else {
					s := settings{MinReadySeconds: tt.spec}
					if tt.startFirst {
						s.Order = inplace.StartFirst
					}
					target := ref(tt.kind)
					if tt.byLabel {
						target = all()
					}
					b.create(name, spec{Target: target, Containers: tt.changes, Strategy: s})
				}
				b.want(b.until("ended", name, 2*time.Hour, func(r *rollout) bool { return r != nil && ended(r) }),
					"True RolledOut", "3/3/3/0/0")
				all := at()
				if len(all) != 3 {
					t.Fatalf("changes at %v", all)
				}
				for i := range all[1:] {
					if got := all[i+1].Sub(all[i]); got < tt.want {
						t.Errorf("%s between two pods, want %s", got, tt.want)
					}
				}
				for _, r := range b.fleet.prepared() {
					if got := r.GetContainers()[0].GetMinReadySeconds(); tt.startFirst && got != 15 {
						t.Errorf("the node lets both run for %d seconds", got)
					}
				}
			})
		})
	}
}

// mirror makes a pod one that kubelet shows of its own.
func mirror(p *corev1.Pod) {
	p.Annotations = map[string]string{corev1.MirrorPodAnnotationKey: "hash"}
	p.OwnerReferences = []metav1.OwnerReference{{APIVersion: "v1", Kind: "Node", Name: p.Spec.NodeName,
		UID: "uid-node"}}
}

// Static pods with the labels are left out, and nobody's failure.
func TestMirrorPods(t *testing.T) {
	for _, tt := range []struct {
		name string
		left func(*corev1.Pod)
	}{
		{"by annotation", func(p *corev1.Pod) { mirror(p); p.OwnerReferences = nil }},
		{"by owner", func(p *corev1.Pod) { mirror(p); p.Annotations = nil }},
	} {
		t.Run(tt.name, func(t *testing.T) {
			inBed(t, func(t *testing.T, b *bed) {
				b.addNodes(2)
				b.addPods(2, 2)
				b.addPod("static-0", "node-0", tt.left)
				b.addPod("static-1", "node-1", tt.left)
				b.create("all", spec{Target: all(), Containers: to("app:2")})
				r := b.until("ended", "all", time.Minute, ended)
				b.want(r, "True RolledOut", "2/2/2/0/0")
				if want := "all 2 pods are updated; 2 static pods are left out"; r.Status.Message != want {
					t.Errorf("message %q, want %q", r.Status.Message, want)
				}
				if got := b.images("app"); got["app:1"] != 2 || got["app:2"] != 2 {
					t.Errorf("images %v", got)
				}
				b.create("one", spec{Target: inplace.Target{PodName: "static-0"}, Containers: to("app:2"),
					Strategy: settings{OnFailure: inplace.Pause}})
				r = b.until("refused", "one", time.Minute, func(r *rollout) bool { return len(r.Status.Failures) > 0 })
				if f := r.Status.Failures[0]; f.Reason != "StaticPod" ||
					!strings.Contains(f.Message, "make a ContainerRecreateRequest") ||
					!strings.Contains(f.Message, "change its manifest on node node-0") {
					t.Errorf("failure %+v", f)
				}
			})
		})
	}
}

// Where there is nothing but static pods the rollout says so.
func TestOnlyMirrorPods(t *testing.T) {
	inBed(t, func(t *testing.T, b *bed) {
		b.addNodes(1)
		b.addPod("static-0", "node-0", mirror)
		b.create("all", spec{Target: all(), Containers: to("app:2")})
		b.until("without pods", "all", time.Minute, func(r *rollout) bool {
			return r.Status.Message == "there are no pods with app=web; 1 static pod is left out"
		})
	})
}
