// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package imagepull_test

import (
	"strings"
	"testing"
	"time"

	"github.com/cri-proxy/cri-proxy/api/apps/v1beta1"
)

// The controller ends such a pull. The controller that comes after it does not begin the pull
// again.
func TestEndlessPullAndRestart(t *testing.T) {
	for name, old := range map[string]bool{"a node": false, "an old node": true} {
		t.Run(name, func(t *testing.T) {
			inBed(t, func(t *testing.T, b *bed) {
				b.add("endless", &simNode{takes: time.Second, endless: "Fetching", old: old})
				b.add("slow", &simNode{takes: time.Hour, stuck: true}) // to its own timeout
				b.create("job",
					spec{ImagePullJobTemplate: template{Parallelism: parallel(2),
						PullPolicy: &v1beta1.PullPolicy{TimeoutSeconds: number(int32(3600)),
							BackoffLimit: number(int32(0))}}})
				b.until("through with one", "job", 3*time.Hour, func(j *job) bool { return j.Status.Failed == 1 })
				b.restart()
				j := b.until("completed", "job", 3*time.Hour, completed)
				b.want(j, "True NodesFailed", "2/0/0/2")
				if f := j.Status.Failures; len(f) != 2 || f[0].Node != "endless" || f[0].Reason != "Overdue" ||
					!strings.Contains(f[0].Message, "ctl pulls") {
					t.Errorf("failures %+v", f)
				}
				if n := b.fleet.begun()["endless"]; n != 1 {
					t.Errorf("%d pulls on the node that does not end", n)
				}
			})
		})
	}
}

// A node that answers for ever, and does not come to an end, no longer keeps others from pulling.
func TestEndlessPull(t *testing.T) {
	for how, bound := range map[string]time.Duration{
		"Fetching": 2*time.Minute + time.Second, // two attempts of a minute
		"InQueue":  queueAllowance,
	} {
		t.Run(how, func(t *testing.T) {
			inBed(t, func(t *testing.T, b *bed) {
				b.addMany(2, time.Second)
				b.create("job",
					spec{ImagePullJobTemplate: template{
						PullPolicy: &v1beta1.PullPolicy{TimeoutSeconds: number(int32(60)),
							BackoffLimit: number(int32(1))}}})
				// Both, since one of them pulls first.
				b.fleet.change("node-0", func(n *simNode) { n.endless = how })
				b.fleet.change("node-1", func(n *simNode) { n.endless = how })
				var first, second string
				b.until("under way", "job", time.Minute, func(*job) bool {
					for name, n := range b.fleet.begun() {
						if n == 1 {
							first = name
						} else {
							second = name
						}
					}
					return first != "" && second != ""
				})
				b.fleet.change(second, func(n *simNode) { n.endless = "" })
				begin := time.Now()
				j := b.until("completed", "job", bound+10*time.Minute, completed)
				if took := time.Since(begin); took < bound || took > bound+overdueSlack+time.Minute {
					t.Errorf("took %s, bound %s", took, bound)
				}
				b.want(j, "True NodesFailed", "2/0/1/1")
				if f := j.Status.Failures; len(f) != 1 || f[0].Node != first || f[0].Reason != "Overdue" ||
					!strings.Contains(f[0].Message, "ctl pulls") {
					t.Errorf("failures %+v", f)
				}
				if b.fleet.flying("uid-job") != 0 {
					t.Error("the pull goes on")
				}
			})
		})
	}
}
