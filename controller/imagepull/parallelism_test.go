// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package imagepull_test

import (
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/cri-proxy/cri-proxy/api/apps/v1beta1"
)

// A node whose pull goes on, and that does not answer, keeps its place among those that pull: after
// an edit of the image, when the job no longer chooses the node, and when the job ends and begins
// again.
func TestParallelismAcrossEdits(t *testing.T) {
	deadline := func(seconds int64) v1beta1.CompletionPolicy {
		return v1beta1.CompletionPolicy{Type: v1beta1.Always, ActiveDeadlineSeconds: number(seconds)}
	}
	for name, tt := range map[string]struct {
		policy v1beta1.CompletionPolicy
		change func(t *testing.T, b *bed)
	}{
		"another image": {change: func(_ *testing.T, b *bed) {
			b.edit("job", func(j *job) { j.Spec.Image = "nginx:2" })
		}},
		"another timeout": {change: func(_ *testing.T, b *bed) {
			b.edit("job", func(j *job) { j.Spec.PullPolicy = &v1beta1.PullPolicy{TimeoutSeconds: number(int32(60))} })
		}},
		"not chosen": {change: func(_ *testing.T, b *bed) {
			b.edit("job", func(j *job) { j.Spec.Selector = names("node-1", "node-2") })
		}},
		"another image, then not chosen": {change: func(_ *testing.T, b *bed) {
			b.edit("job", func(j *job) { j.Spec.Image = "nginx:2" })
			time.Sleep(time.Second)
			b.edit("job", func(j *job) { j.Spec.Selector = names("node-1", "node-2") })
		}},
		"not chosen, then chosen": {change: func(_ *testing.T, b *bed) {
			b.edit("job", func(j *job) { j.Spec.Selector = names("node-1", "node-2") })
			time.Sleep(time.Second)
			b.edit("job", func(j *job) { j.Spec.Selector = names("node-0", "node-1", "node-2") })
		}},
		"not chosen, ended, begun again": {change: func(t *testing.T, b *bed) {
			b.edit("job", func(j *job) { j.Spec.Selector = names("none") })
			time.Sleep(time.Second)
			b.edit("job", func(j *job) { j.Spec.Selector, j.Spec.Parallelism = names("node-3"), parallel(2) })
			b.until("completed", "job", 10*time.Second, completed)
			b.edit("job", func(j *job) {
				j.Spec.Selector, j.Spec.Parallelism = names("node-1", "node-2"), parallel(1)
			})
		}},
		"late, begun again": {policy: deadline(10), change: func(t *testing.T, b *bed) {
			b.until("completed", "job", 11*time.Second, completed)
			b.edit("job", func(j *job) { j.Spec.CompletionPolicy = deadline(3600) })
		}},
		"late, begun again elsewhere": {policy: deadline(10), change: func(t *testing.T, b *bed) {
			b.until("completed", "job", 11*time.Second, completed)
			b.edit("job", func(j *job) {
				j.Spec.CompletionPolicy, j.Spec.Selector = deadline(3600), names("node-1", "node-2")
			})
		}},
		"wrong, then elsewhere": {change: func(_ *testing.T, b *bed) {
			b.edit("job", func(j *job) { j.Annotations = map[string]string{v1beta1.PinForAnnotation: "soon"} })
			b.until("refused", "job", time.Second,
				func(j *job) bool { return condition(j, "Complete") == "False InvalidSpec" })
			b.edit("job", func(j *job) {
				j.Annotations = nil
				j.Spec.Selector = names("node-1", "node-2")
			})
		}},
	} {
		t.Run(name, func(t *testing.T) {
			inBed(t, func(t *testing.T, b *bed) {
				b.addMany(3, time.Hour)
				b.add("node-3", &simNode{takes: time.Second})
				b.create("job", spec{ImagePullJobTemplate: template{
					Selector: names("node-0"), CompletionPolicy: tt.policy,
				}})
				b.until("at work", "job", time.Second, func(*job) bool { return b.fleet.flying("uid-job") == 1 })
				b.edit("job", func(j *job) { j.Spec.Selector = names("node-0", "node-1", "node-2") })
				time.Sleep(time.Second)
				synctest.Wait()
				b.fleet.change("node-0", func(n *simNode) { n.silent = true })
				tt.change(t, b)
				// The other nodes are quick to answer; none of them may begin.
				time.Sleep(silenceTimeout / 2)
				synctest.Wait()
				if n := len(b.fleet.pulling("node-1")) + len(b.fleet.pulling("node-2")); n != 0 {
					t.Errorf("%d nodes pull beside the one that is silent", n)
				}
				b.fleet.change("node-0", func(n *simNode) { n.silent = false })
				b.until("at work", "job", silenceTimeout, func(j *job) bool {
					return len(b.fleet.pulling("node-0"))+len(b.fleet.pulling("node-1"))+
						len(b.fleet.pulling("node-2")) == 1
				})
				time.Sleep(5 * time.Minute)
				synctest.Wait()
				j := b.get("job")
				if flying := b.fleet.flying("uid-job"); flying != 1 || j.Status.Active != 1 {
					t.Errorf("%d pulls, status %+v", flying, j.Status)
				}
				if images := strings.Join(b.fleet.pulling("node-0"), " "); images != "" &&
					(images != j.Spec.Image || j.Spec.Selector.Names[0] != "node-0") {
					t.Errorf("node-0 pulls %s", images)
				}
				if peak := b.fleet.peak["uid-job"]; peak > 2 || peak > 1 && !strings.Contains(name, "ended") {
					t.Errorf("%d nodes pulled at once", peak)
				}
			})
		})
	}
}

// A node that stays silent does not hold up the others for longer than silenceTimeout.
func TestSilentNodeGivesItsPlace(t *testing.T) {
	for name, change := range map[string]func(*job){
		"another image": func(j *job) { j.Spec.Image = "nginx:2" },
		"not chosen":    func(j *job) { j.Spec.Selector = names("node-1") },
	} {
		for how, quiet := range map[string]func(*bed){
			"silent":    func(b *bed) { b.fleet.change("node-0", func(n *simNode) { n.silent = true }) },
			"refused":   func(b *bed) { b.fleet.change("node-0", func(n *simNode) { n.refused = true }) },
			"not ready": func(b *bed) { b.node("node-0", ready("Unknown")) },
		} {
			t.Run(name+", "+how, func(t *testing.T) {
				inBed(t, func(t *testing.T, b *bed) {
					b.addMany(2, time.Hour)
					b.create("job", spec{ImagePullJobTemplate: template{Selector: names("node-0")}})
					b.until("at work", "job", time.Second, func(*job) bool { return b.fleet.flying("uid-job") == 1 })
					quiet(b)
					b.edit("job", func(j *job) {
						j.Spec.Selector = names("node-0", "node-1")
						change(j)
					})
					b.until("on the other node", "job", silenceTimeout+20*time.Second,
						func(*job) bool { return len(b.fleet.pulling("node-1")) == 1 })
				})
			})
		}
	}
}

// A node whose answer to the command is lost counts as pulling.
func TestAnswerLost(t *testing.T) {
	inBed(t, func(t *testing.T, b *bed) {
		b.addMany(3, time.Minute)
		for name := range b.fleet.begun() {
			b.fleet.change(name, func(n *simNode) { n.loses = 1 })
		}
		b.create("job", spec{})
		j := b.until("completed", "job", 10*time.Minute, completed)
		b.want(j, "True Succeeded", "3/0/3/0")
		if peak := b.fleet.peak["uid-job"]; peak != 1 {
			t.Errorf("%d nodes pulled at once", peak)
		}
	})
}

// A node that pulls, and refuses to be told to pull again, counts as pulling.
func TestToldAgain(t *testing.T) {
	inBed(t, func(t *testing.T, b *bed) {
		b.addMany(2, time.Minute)
		b.create("job", spec{})
		b.until("at work", "job", time.Second, func(*job) bool { return b.fleet.flying("uid-job") == 1 })
		for name, n := range b.fleet.begun() {
			b.fleet.change(name, func(node *simNode) { node.busy = n })
		}
		b.edit("job", func(j *job) { j.Spec.PullSecrets = []string{"key"} })
		j := b.until("completed", "job", 10*time.Minute, completed)
		b.want(j, "True Succeeded", "2/0/2/0")
		if peak := b.fleet.peak["uid-job"]; peak != 1 {
			t.Errorf("%d nodes pulled at once", peak)
		}
	})
}

// The same holds for a node that the job lets go, and chooses again, while the node is not ready.
func TestNodeThatIsNotReadyGivesItsPlace(t *testing.T) {
	inBed(t, func(t *testing.T, b *bed) {
		b.addMany(2, time.Hour)
		b.create("job", spec{ImagePullJobTemplate: template{Selector: names("node-0")}})
		b.until("at work", "job", time.Second, func(*job) bool { return b.fleet.flying("uid-job") == 1 })
		b.fleet.change("node-0", func(n *simNode) { n.silent = true })
		b.node("node-0", ready("Unknown"))
		b.edit("job", func(j *job) { j.Spec.Selector = names("none") })
		time.Sleep(5 * time.Second)
		b.edit("job", func(j *job) { j.Spec.Selector = names("node-0", "node-1") })
		time.Sleep(silenceTimeout / 2)
		synctest.Wait()
		if n := len(b.fleet.pulling("node-1")); n != 0 {
			t.Errorf("%d nodes pull beside the one that is silent", n)
		}
		b.until("on the other node", "job", silenceTimeout, func(*job) bool {
			return len(b.fleet.pulling("node-1")) == 1
		})
	})
}

// A node that the job lets go while it is silent, and chooses again, keeps its pin: what told it to
// forget the job ends.
func TestChosenAgain(t *testing.T) {
	inBed(t, func(t *testing.T, b *bed) {
		b.addMany(2, time.Second)
		b.fleet.change("node-1", func(n *simNode) { n.takes = 10 * time.Minute })
		b.create("job", spec{ImagePullJobTemplate: template{Parallelism: parallel(2)}})
		b.until("half done", "job", 10*time.Second, func(j *job) bool { return j.Status.Succeeded == 1 })
		b.fleet.change("node-0", func(n *simNode) { n.silent = true })
		b.edit("job", func(j *job) { j.Spec.Selector = names("node-1") })
		time.Sleep(12 * time.Second)
		b.edit("job", func(j *job) { j.Spec.Selector = names("node-0", "node-1") })
		time.Sleep(100 * time.Millisecond)
		b.fleet.change("node-0", func(n *simNode) { n.silent = false })
		j := b.until("half done", "job", time.Minute, func(j *job) bool { return j.Status.Succeeded == 1 })
		time.Sleep(cleanUpTimeout)
		if pins := strings.Join(b.fleet.pinned("node-0"), " "); pins != "nginx" {
			t.Errorf("node-0 pins %q; status %+v", pins, j.Status)
		}
	})
}
