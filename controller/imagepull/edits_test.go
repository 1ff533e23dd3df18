// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package imagepull_test

import (
	"slices"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"

	"github.com/cri-proxy/cri-proxy/api/apps/v1beta1"
)

// An edit is carried out, whatever the controller does with a node at that moment. The node's name
// is "node"; "keeper" pulls all the time, so that the job does not end.
func TestEditAtAnyMoment(t *testing.T) {
	moments := []struct {
		name string
		// node is how the node behaves, come brings the moment about, back ends it.
		node       simNode
		come, back func(*bed)
		// forgets says that the node has given its place to others.
		forgets bool
	}{
		{name: "being probed", node: simNode{slow: 2 * time.Second}, come: func(*bed) { time.Sleep(time.Second) }},
		{name: "being told to pull", node: simNode{slowPull: 2 * time.Second},
			come: func(*bed) { time.Sleep(time.Second) }},
		{name: "just told to pull", node: simNode{slowPull: 2 * time.Second},
			come: func(*bed) { time.Sleep(2*time.Second + time.Millisecond) }},
		{name: "pulling", come: func(*bed) { time.Sleep(10 * time.Second) }},
		{name: "being probed after another edit", come: func(b *bed) {
			time.Sleep(10 * time.Second)
			b.fleet.change("node", func(n *simNode) { n.slow = 2 * time.Second })
			b.edit("job", func(j *job) { j.Spec.Image = "r.io/app:1" })
			time.Sleep(time.Second)
		}},
		{name: "being told to cancel", come: func(b *bed) {
			time.Sleep(10 * time.Second)
			b.fleet.change("node", func(n *simNode) { n.slow = 2 * time.Second })
			b.edit("job", func(j *job) { j.Spec.Image = "r.io/app:1" })
			time.Sleep(3 * time.Second)
		}},
		{name: "not chosen for a moment", come: func(b *bed) {
			time.Sleep(10 * time.Second)
			b.fleet.change("node", func(n *simNode) { n.slow = 2 * time.Second })
			b.edit("job", func(j *job) { j.Spec.Selector = names("keeper") })
			time.Sleep(time.Second)
			b.edit("job", func(j *job) { j.Spec.Selector = names("node", "keeper") })
		}},
		{name: "just silent", come: func(b *bed) {
			time.Sleep(10 * time.Second)
			b.fleet.change("node", func(n *simNode) { n.silent = true })
			time.Sleep(10 * time.Second)
		}},
		{name: "silent for long", come: func(b *bed) {
			time.Sleep(10 * time.Second)
			b.fleet.change("node", func(n *simNode) { n.silent = true })
			time.Sleep(90 * time.Second)
		}, forgets: true},
		{name: "silent from the start", node: simNode{silent: true}, come: func(*bed) { time.Sleep(time.Minute) }},
		{name: "without a proxy", node: simNode{refused: true}, come: func(*bed) { time.Sleep(time.Minute) }},
		{name: "not ready", come: func(b *bed) {
			time.Sleep(10 * time.Second)
			b.node("node", ready(corev1.ConditionUnknown))
			time.Sleep(10 * time.Second)
		}, back: func(b *bed) { b.node("node", ready(corev1.ConditionTrue)) }},
		{name: "in back-off", node: simNode{user: "nobody"}, come: func(*bed) { time.Sleep(2500 * time.Millisecond) }},
		{name: "failed", node: simNode{user: "nobody"}, come: func(*bed) { time.Sleep(20 * time.Second) }},
		{name: "pulling, and others write", come: func(b *bed) {
			time.Sleep(10 * time.Second)
			b.mu.Lock()
			b.clashes = 1
			b.mu.Unlock()
		}},
		{name: "waiting", come: func(b *bed) {
			b.edit("job", func(j *job) { j.Spec.Parallelism = parallel(0) })
			time.Sleep(10 * time.Second)
			b.edit("job", func(j *job) { j.Spec.Parallelism = parallel(2) })
		}},
	}
	edits := []struct {
		name string
		edit func(*job)
		done func(*bed) bool
	}{
		{"image", func(j *job) { j.Spec.Image = "r.io/app:2" }, func(b *bed) bool {
			r := b.fleet.last("node")
			return r.GetImage() == "r.io/app:2" && len(b.fleet.pulling("node")) <= 1
		}},
		{"image of before", func(j *job) { j.Spec.Image = "r.io/app" }, func(b *bed) bool {
			r := b.fleet.last("node")
			return r.GetImage() == "r.io/app" && len(b.fleet.pulling("node")) <= 1
		}},
		{"nodes", func(j *job) { j.Spec.Selector = names("other", "keeper") }, func(b *bed) bool {
			return b.fleet.last("other") != nil && len(b.fleet.pulling("node")) == 0
		}},
		{"secrets", func(j *job) { j.Spec.PullSecrets = []string{"new"} }, func(b *bed) bool {
			return slices.Equal(b.fleet.given("node"), []string{"new"})
		}},
		{"timeout", func(j *job) { j.Spec.PullPolicy = &v1beta1.PullPolicy{TimeoutSeconds: number(int32(77))} },
			func(b *bed) bool {
				r := b.fleet.last("node")
				return r.GetAttemptTimeout().AsDuration() == 77*time.Second && len(b.fleet.pulling("node")) <= 1
			}},
		{"parallelism", func(j *job) {
			j.Spec.Parallelism, j.Spec.Selector = parallel(3), names("node", "other", "keeper")
		}, func(b *bed) bool { return b.fleet.last("other") != nil && b.fleet.last("node") != nil }},
		{"pause", func(j *job) { j.Spec.Parallelism = parallel(0) }, func(b *bed) bool { return true }},
	}
	for _, m := range moments {
		for _, e := range edits {
			t.Run(m.name+"/"+e.name, func(t *testing.T) {
				inBed(t, func(t *testing.T, b *bed) {
					for _, user := range []string{"old", "new"} {
						key := secret(user, corev1.SecretTypeDockerConfigJson, ".dockerconfigjson",
							`{"auths":{"r.io":{"username":"`+user+`","password":"p"}}}`)
						if err := b.api.Create(t.Context(), key); err != nil {
							t.Fatal(err)
						}
					}
					node := m.node
					node.takes = time.Hour
					b.add("node", &node)
					b.add("other", &simNode{takes: time.Hour})
					b.add("keeper", &simNode{takes: time.Hour})
					b.create("job", spec{Image: "r.io/app", ImagePullJobTemplate: template{
						Selector: names("node", "keeper"), PullSecrets: []string{"old"}, Parallelism: parallel(2),
					}})
					m.come(b)
					b.edit("job", func(j *job) {
						e.edit(j)
						j.Finalizers = nil // as kubectl replace does
					})
					time.Sleep(time.Second)
					if m.back != nil {
						m.back(b) // else nothing but the edit wakes the job
					}
					b.fleet.change("node", func(n *simNode) { n.silent, n.refused = false, false })
					b.until("done as edited", "job", 45*time.Second, func(*job) bool { return e.done(b) })
					time.Sleep(2 * time.Minute)
					if !e.done(b) {
						t.Errorf("not as edited in the end")
					}
					want := max(2, int(b.get("job").Spec.Parallelism.IntVal))
					if peak := b.fleet.peak["uid-job"]; peak > want && !m.forgets {
						t.Errorf("%d nodes pulled at once, of %d", peak, want)
					}
				})
			})
		}
	}
}
