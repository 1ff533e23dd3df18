// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package rollout

import (
	"cmp"
	"fmt"
	"maps"
	"slices"
	"testing"
	"time"

	appsv1 "k8s.io/api/apps/v1"
	"sigs.k8s.io/controller-runtime/pkg/client"

	inplace "github.com/cri-proxy/cri-proxy/api/inplace/v1alpha1"
	"github.com/cri-proxy/cri-proxy/controller/rollout/podtemplate"
	"github.com/cri-proxy/cri-proxy/controller/rollout/workload"
)

// history are the ReplicaSets by revision, the newest first.
func (b *bed) history() []appsv1.ReplicaSet {
	b.t.Helper()
	var sets appsv1.ReplicaSetList
	if err := b.api.List(b.ctx, &sets, client.InNamespace("ns")); err != nil {
		b.t.Fatal(err)
	}
	slices.SortFunc(sets.Items, func(x, y appsv1.ReplicaSet) int { return cmp.Compare(numberOf(&y), numberOf(&x)) })
	return sets.Items
}

// undo is kubectl rollout undo.
func (b *bed) undo() {
	b.t.Helper()
	sets := b.history()
	user(b, &appsv1.Deployment{}, func(d *appsv1.Deployment) {
		if d.Spec.Paused {
			b.t.Fatal("you cannot rollback a paused deployment")
		}
		t := sets[1].Spec.Template.DeepCopy()
		delete(t.Labels, hashLabel)
		d.Spec.Template, d.Annotations = *t, maps.Clone(sets[1].Annotations)
		delete(d.Annotations, revisionNote)
	})
}

// kubectl rollout undo goes one back after a rollout in place, too, and what comes after that is
// rolled in place: the pods stay, whichever ReplicaSet has had an image before.
func TestUndoGoesOneBack(t *testing.T) {
	for _, killed := range []bool{false, true} {
		t.Run(fmt.Sprint("killed ", killed), func(t *testing.T) {
			inBed(t, func(t *testing.T, b *bed) {
				b.addNodes(3)
				b.addDeployment(3)
				roll := func(image, previous string) {
					t.Helper()
					before := b.uids()
					if b.get("web") == nil {
						b.create("web", spec{Target: ref(workload.KindDeployment), Containers: to(image)})
					} else {
						b.edit("web", func(r *rollout) { r.Spec.Containers = to(image) })
					}
					for i := 0; killed && i < 40; i++ {
						time.Sleep(time.Duration(70+i*290%900) * time.Millisecond)
						b.restart()
					}
					b.want(b.until("ended", "web", 5*time.Minute, func(r *rollout) bool {
						return ended(r) &&
							r.Status.TargetImages["app"] == image
					}), "True RolledOut", "3/3/3/0/0")
					time.Sleep(2 * time.Second)
					b.atRest(workload.KindDeployment, image)
					if after := b.uids(); fmt.Sprint(after) != fmt.Sprint(before) {
						t.Errorf("to %s: pods %v, were %v", image, after, before)
					}
					sets := b.history()
					if len(sets) < 2 || replicasOf(&sets[0]) == 0 || replicasOf(&sets[1]) != 0 ||
						numberOf(&sets[0]) == numberOf(&sets[1]) {
						t.Fatalf("ReplicaSets %+v", sets)
					}
					if got := podtemplate.Images(&sets[1].Spec.Template)["app"]; got != previous {
						t.Errorf("to %s: the revision before has %s, want %s", image, got, previous)
					}
				}
				undone := func(image string) {
					t.Helper()
					b.undo()
					time.Sleep(20 * time.Second)
					b.atRest(workload.KindDeployment, image)
				}
				roll("app:2", "app:1")
				roll("app:3", "app:2")
				roll("app:2", "app:3")
				roll("app:3", "app:2")
				undone("app:2")
				roll("app:4", "app:2")
				roll("app:3", "app:4") // the first ReplicaSet has that, and is older
				undone("app:4")
				roll("app:5", "app:4")
			})
		})
	}
}

// A rollback leaves no revision, nor does a rollout of a Deployment that keeps no history.
func TestNoHistory(t *testing.T) {
	inBed(t, func(t *testing.T, b *bed) {
		b.addNodes(3)
		b.addDeployment(2)
		b.create("web", spec{Target: ref(workload.KindDeployment), Containers: to("app:crash")})
		b.until("rolled back", "web", 5*time.Minute, ended)
		user(b, &appsv1.Deployment{}, func(d *appsv1.Deployment) { d.Spec.RevisionHistoryLimit = replicas(0) })
		time.Sleep(2 * time.Second)
		b.edit("web", func(r *rollout) { r.Spec.Containers = to("app:2") })
		b.until("ended", "web", 5*time.Minute, func(r *rollout) bool {
			return ended(r) &&
				condition(r, inplace.ConditionComplete) == "True RolledOut"
		})
		if n := len(b.history()); n != 1 {
			t.Errorf("%d ReplicaSets", n)
		}
	})
}
