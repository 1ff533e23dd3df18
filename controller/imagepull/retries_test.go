// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package imagepull_test

import (
	"context"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/api/meta"
	"sigs.k8s.io/controller-runtime/pkg/client"

	"github.com/cri-proxy/cri-proxy/api/apps/v1beta1"
	"github.com/cri-proxy/cri-proxy/controller/kstatus"
)

// A secret or an image that comes a moment after the job makes no node fail, and the status says
// what the nodes wait for.
func TestComesLater(t *testing.T) {
	key := secret("key", corev1.SecretTypeDockerConfigJson, ".dockerconfigjson",
		`{"auths":{"r.io":{"username":"u","password":"p"}}}`)
	other := secret("key", corev1.SecretTypeDockerConfigJson, ".dockerconfigjson",
		`{"auths":{"r.io":{"username":"v","password":"p"}}}`)
	for _, tt := range []struct {
		name   string
		node   simNode
		after  time.Duration
		before []client.Object
		come   func(b *bed) error
		why    string
	}{
		{"secret", simNode{user: "u"}, 2 * time.Second, nil,
			func(b *bed) error { return b.api.Create(context.Background(), key.DeepCopy()) }, "Unauthorized"},
		{"right secret", simNode{user: "u"}, 2 * time.Second, []client.Object{other},
			func(b *bed) error { return b.api.Update(context.Background(), key.DeepCopy()) }, "Unauthorized"},
		{"in the last back-off", simNode{user: "u"}, 6 * time.Second, nil,
			func(b *bed) error { return b.api.Create(context.Background(), key.DeepCopy()) }, "Unauthorized"},
		{"image", simNode{}, 2 * time.Second, nil, func(b *bed) error { return nil }, "NotFound"},
		{"right secret, old node", simNode{user: "u", old: true}, 2 * time.Second, []client.Object{other},
			func(b *bed) error { return b.api.Update(context.Background(), key.DeepCopy()) }, "Unauthorized"},
		{"image, old node", simNode{old: true}, 2 * time.Second, nil, func(b *bed) error { return nil }, "NotFound"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			inBed(t, func(t *testing.T, b *bed) {
				if tt.why == "NotFound" {
					tt.node.comes = time.Now().Add(tt.after)
				}
				tt.node.takes = time.Second
				b.add("node", &tt.node)
				for _, o := range tt.before {
					if err := b.api.Create(context.Background(), o.DeepCopyObject().(client.Object)); err != nil {
						t.Fatal(err)
					}
				}
				t0 := template{PullSecrets: []string{"key"}}
				b.create("job", spec{Image: "r.io/app", ImagePullJobTemplate: t0})
				b.createList("list",
					v1beta1.ImageListPullJobSpec{Images: []string{"r.io/app"}, ImagePullJobTemplate: t0})
				why := "1 node tries again, node node says: " + tt.why + ": the registry says no: look"
				j := b.until("told why", "job", 500*time.Millisecond,
					func(j *job) bool { return strings.HasSuffix(j.Status.Message, why) })
				if j.Status.Message != "job is running, progress 0.0%; "+why ||
					condition(j, kstatus.Reconciling) != "True Pulling" || j.Status.Failed != 0 ||
					len(j.Status.SlowestNodes) != 1 ||
					j.Status.SlowestNodes[0].Message != tt.why+": the registry says no: look" {
					t.Errorf("status %+v", j.Status)
				}
				b.untilList("told why", "list", time.Second, func(l *list) bool {
					for _, c := range l.Status.Conditions {
						if c.Type == kstatus.Reconciling && c.Message == "r.io/app: "+why {
							return true
						}
					}
					return false
				})
				time.Sleep(tt.after)
				if err := tt.come(b); err != nil {
					t.Fatal(err)
				}
				j = b.until("completed", "job", 8*time.Second, completed)
				b.want(j, "True Succeeded", "1/0/1/0")
				if j.Status.Message != "job has completed" || strings.Contains(b.told(), "PullImageFailed") {
					t.Errorf("message %q, events:\n%s", j.Status.Message, b.told())
				}
				l := b.untilList("completed", "list", time.Minute,
					func(l *list) bool { return l.Status.CompletionTime != nil })
				if l.Status.Succeeded != 1 {
					t.Errorf("list %+v", l.Status)
				}
			})
		})
	}
}

// Many nodes that a registry refuses read the secrets together.
func TestSecretsAreReadTogether(t *testing.T) {
	inBed(t, func(t *testing.T, b *bed) {
		for i := range 200 {
			b.add("node-"+string(rune('a'+i/26))+string(rune('a'+i%26)), &simNode{takes: time.Second, user: "u"})
		}
		reads := 0
		b.mu.Lock()
		b.refuse = func(o client.Object) error {
			if _, ok := o.(*corev1.Secret); ok {
				reads++
			}
			return nil
		}
		b.mu.Unlock()
		b.create("job",
			spec{Image: "r.io/app",
				ImagePullJobTemplate: template{PullSecrets: []string{"key"}, Parallelism: parallel(200)}})
		j := b.until("completed", "job", time.Minute, completed)
		b.want(j, "True NodesFailed", "200/0/0/200")
		synctest.Wait()
		b.mu.Lock()
		defer b.mu.Unlock()
		if reads < 4 || reads > 16 {
			t.Errorf("%d reads", reads)
		}
	})
}

// A job that has failed begins again when a change may help, and is not deleted meanwhile.
func TestFailedBeginsAnew(t *testing.T) {
	for name, change := range map[string]func(*job){
		"timeout":     func(j *job) { j.Spec.PullPolicy = &v1beta1.PullPolicy{TimeoutSeconds: number(int32(3600))} },
		"limit":       func(j *job) { j.Spec.PullPolicy = &v1beta1.PullPolicy{BackoffLimit: number(int32(9))} },
		"parallelism": func(j *job) { j.Spec.Parallelism = parallel(2) },
		"deadline":    func(j *job) { j.Spec.CompletionPolicy.ActiveDeadlineSeconds = number(int64(3600)) },
		"rate":        func(j *job) { j.Annotations = map[string]string{v1beta1.BytesPerSecondAnnotation: "1Gi"} },
		"image":       func(j *job) { j.Spec.Image = "other" },
		"end":         nil,
	} {
		t.Run(name, func(t *testing.T) {
			inBed(t, func(t *testing.T, b *bed) {
				b.addMany(1, time.Second)
				b.add("poor", &simNode{takes: time.Second, outcome: "Timeout"})
				b.create("job",
					spec{ImagePullJobTemplate: template{
						CompletionPolicy: v1beta1.CompletionPolicy{TTLSecondsAfterFinished: number(int32(60))}}})
				j := b.until("failed", "job", 20*time.Second, completed)
				b.want(j, "True NodesFailed", "2/0/1/1")
				if want := "job has failed: 1 of 2 nodes have no image: Timeout on 1 (poor): the registry says " +
					"Timeout"; j.Status.Message != want {
					t.Errorf("message %q, want %q", j.Status.Message, want)
				}
				b.fleet.change("poor", func(n *simNode) { n.outcome = "" })
				b.restart()
				if change == nil { // nothing else begins it anew
					b.edit("job", func(j *job) { j.Spec.CompletionPolicy.TTLSecondsAfterFinished = number(int32(90)) })
					time.Sleep(70 * time.Second)
					synctest.Wait()
					if j := b.get("job"); !completed(j) || j.Status.Failed != 1 ||
						j.Status.ObservedGeneration != j.Generation {
						t.Errorf("%+v", j)
					}
					b.until("deleted", "job", time.Minute, gone)
					return
				}
				time.Sleep(59 * time.Second)
				before := b.fleet.begun("node-0")["node-0"]
				b.edit("job", change)
				j = b.until("at work", "job", time.Second, func(j *job) bool { return j.Status.CompletionTime == nil })
				if condition(j, "Succeeded") != "" || condition(j, kstatus.Reconciling) != "True Pulling" {
					t.Errorf("status %+v", j.Status)
				}
				j = b.until("completed", "job", 50*time.Second, completed)
				b.want(j, "True Succeeded", "2/0/2/0")
				if n := b.fleet.begun("node-0")["node-0"] - before; n != 0 && name != "image" {
					t.Errorf("%d pulls more on a node that had the image", n)
				}
				// Success is final.
				b.edit("job", func(j *job) { j.Spec.Parallelism = parallel(7) })
				j = b.until("seen", "job", time.Second,
					func(j *job) bool { return j.Status.ObservedGeneration == j.Generation })
				if !completed(j) {
					t.Errorf("status %+v", j.Status)
				}
				b.until("deleted", "job", 61*time.Second, gone)
			})
		})
	}
}

// Failures from before a job begins again do not count, whatever the clocks say; failures
// afterwards do.
func TestFailuresOfBeforeDoNotCount(t *testing.T) {
	for name, tt := range map[string]struct {
		takes, after, ahead time.Duration
	}{
		"in the same second":     {takes: 1100 * time.Millisecond, after: 100 * time.Millisecond},
		"a clock that is ahead":  {takes: time.Second, after: 10 * time.Second, ahead: 30 * time.Second},
		"a clock that is behind": {takes: time.Second, after: 10 * time.Second, ahead: -time.Hour},
	} {
		t.Run(name, func(t *testing.T) {
			inBed(t, func(t *testing.T, b *bed) {
				b.add("poor", &simNode{takes: tt.takes, outcome: "Timeout", ahead: tt.ahead})
				b.create("job", spec{})
				b.until("failed", "job", 20*time.Second, completed)
				again := func(outcome string, parallelism int) *job {
					b.fleet.change("poor", func(n *simNode) { n.outcome = outcome })
					time.Sleep(tt.after)
					generation := b.get("job").Generation
					b.edit("job", func(j *job) { j.Spec.Parallelism = parallel(parallelism) })
					b.until("at work", "job", time.Second,
						func(j *job) bool { return j.Generation > generation && j.Status.CompletionTime == nil })
					return b.until("completed", "job", 50*time.Second, completed)
				}
				b.want(again("Timeout", 2), "True NodesFailed", "1/0/0/1")
				b.want(again("", 3), "True Succeeded", "1/0/1/0")
				if n := b.fleet.begun("poor")["poor"]; n != 3 {
					t.Errorf("%d pulls", n)
				}
			})
		})
	}
}

// The job says that a node does not keep the speed limit, also beside a pin that does not fit.
func TestLimitNotKept(t *testing.T) {
	for name, old := range map[string]bool{"a node": false, "an old node": true} {
		t.Run(name, func(t *testing.T) {
			inBed(t, func(t *testing.T, b *bed) {
				b.addMany(2, time.Second)
				b.create("kept", spec{}, v1beta1.BytesPerSecondAnnotation, "20Mi")
				j := b.until("completed", "kept", time.Minute, completed)
				if c := meta.FindStatusCondition(j.Status.Conditions, v1beta1.ConditionSpeedLimitKept); c != nil {
					t.Errorf("condition %+v", c)
				}
				b.fleet.change("node-1", func(n *simNode) {
					n.full, n.fast, n.old = "no room", "the registry has not told", old
				})
				b.create("job", spec{Image: "other"}, v1beta1.BytesPerSecondAnnotation, "20Mi")
				j = b.until("completed", "job", time.Minute, completed)
				b.want(j, "True Succeeded", "2/0/2/0")
				for kind, want := range map[string]string{
					v1beta1.ConditionSpeedLimitKept: "1 node pulls as fast as it can, node node-1: " +
						"without the speed limit of 20.0 MiB/s: the registry has not told",
					v1beta1.ConditionPinned: "on 1 nodes kubelet may remove the image when the disk is full, " +
						"node node-1 says: no room",
				} {
					c := meta.FindStatusCondition(j.Status.Conditions, kind)
					if c == nil || c.Status != "False" || c.Message != want {
						t.Errorf("%s: %+v, want %s", kind, c, want)
					}
				}
			})
		})
	}
}
