// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package imagepull_test

import (
	"fmt"
	"math/rand/v2"
	"slices"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	corev1 "k8s.io/api/core/v1"

	"github.com/cri-proxy/cri-proxy/api/apps/v1beta1"
)

// Edits and outages come in any order. No more nodes pull than may, and once all is quiet, the job
// comes to its end: the nodes that it chooses have its image, and none pulls.
func TestAnythingInAnyOrder(t *testing.T) {
	const count = 5
	for seed := range uint64(30) {
		t.Run(fmt.Sprint(seed), func(t *testing.T) {
			inBed(t, func(t *testing.T, b *bed) {
				random := rand.New(rand.NewPCG(seed, 1))
				var all, did []string
				for i := range count {
					name := fmt.Sprintf("node-%d", i)
					all = append(all, name)
					takes := time.Duration(1+random.IntN(60)) * time.Second
					b.add(name, &simNode{takes: takes, slow: time.Duration(random.IntN(2)) * time.Second})
				}
				some := func() []string {
					list := slices.DeleteFunc(slices.Clone(all), func(string) bool { return random.IntN(2) == 0 })
					return append(list, all[random.IntN(count)])
				}
				b.create("job", spec{ImagePullJobTemplate: template{
					Selector: names(all...), Parallelism: parallel(2)}})
				// A controller that starts does not know of nodes that are away, or were let go.
				restarts := seed%2 == 1
				var back []func() // what ends outages, each within 25 s
				later := func(end func()) {
					at := time.Now().Add(time.Duration(random.IntN(20)) * time.Second)
					back = append(back, func() {
						if end != nil && time.Now().After(at) {
							end()
							end = nil
						}
					})
				}
				do := []func(){
					func() { b.edit("job", func(j *job) { j.Spec.Image = fmt.Sprintf("nginx:%d", random.IntN(3)) }) },
					func() { b.edit("job", func(j *job) { j.Spec.Selector = names(some()...) }) },
					func() {
						b.edit("job", func(j *job) {
							j.Spec.PullPolicy = &v1beta1.PullPolicy{TimeoutSeconds: number(int32(100 + random.IntN(3)))}
						})
					},
					func() {
						b.edit("job", func(j *job) { j.Spec.PullSecrets = []string{fmt.Sprint(random.IntN(3))} })
					},
					func() {
						b.edit("job", func(j *job) { j.Annotations = map[string]string{v1beta1.PinForAnnotation: "?"} })
					},
					func() { b.edit("job", func(j *job) { j.Annotations = nil }) },
					func() {
						b.edit("job", func(j *job) {
							j.Spec.CompletionPolicy.ActiveDeadlineSeconds = number(int64(20 + random.IntN(100)))
						})
					},
					func() {
						name := all[random.IntN(count)]
						b.node(name, ready(corev1.ConditionUnknown))
						later(func() { b.node(name, ready(corev1.ConditionTrue)) })
					},
					func() {
						b.edit("job", func(j *job) {
							kinds := []v1beta1.CompletionPolicyType{v1beta1.Always, v1beta1.Never}
							j.Spec.CompletionPolicy.Type = kinds[random.IntN(2)]
						})
					},
					func() {
						name := all[random.IntN(count)]
						b.removeNode(name)
						later(func() { b.node(name) })
					},
					func() {
						name := all[random.IntN(count)]
						b.fleet.change(name, func(n *simNode) { n.loses, n.busy = random.IntN(2), random.IntN(2) })
					},
					func() {
						if restarts {
							b.restart()
							return
						}
						name := all[random.IntN(count)]
						b.fleet.change(name, func(n *simNode) { n.silent = true })
						later(func() { b.fleet.change(name, func(n *simNode) { n.silent = false }) })
					},
				}
				for range 30 {
					i := random.IntN(len(do))
					did = append(did, fmt.Sprint(i))
					do[i]()
					time.Sleep(time.Duration(random.IntN(5000)) * time.Millisecond)
					for _, end := range back {
						end()
					}
				}
				time.Sleep(20 * time.Second)
				for _, end := range back {
					end()
				}
				b.edit("job", func(j *job) {
					j.Spec.CompletionPolicy.Type = v1beta1.Always
					j.Annotations, j.Spec.CompletionPolicy.ActiveDeadlineSeconds = nil, nil
					j.Spec.Image, j.Spec.Selector = "nginx:last", names(some()...)
				})
				j := b.until("completed", "job", 30*time.Minute, func(j *job) bool {
					return completed(j) && j.Status.ObservedGeneration == j.Generation
				})
				if condition(j, "Succeeded") != "True Succeeded" {
					t.Errorf("status %+v", j.Status)
				}
				time.Sleep(cleanUpTimeout)
				synctest.Wait()
				for _, name := range all {
					pins := strings.Join(b.fleet.pinned(name), " ")
					if chosen := slices.Contains(j.Spec.Selector.Names, name); chosen && pins != "nginx:last" {
						t.Errorf("%s pins %q", name, pins)
					}
					if pulling := b.fleet.pulling(name); len(pulling) != 0 {
						t.Errorf("%s pulls %v", name, pulling)
					}
				}
				if peak := b.fleet.peak["uid-job"]; peak > 2 && !restarts {
					t.Errorf("%d nodes pulled at once", peak)
				}
				if t.Failed() {
					t.Logf("did %s", did)
				}
			})
		})
	}
}
