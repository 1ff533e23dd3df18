// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package imagepull_test

import (
	"fmt"
	"math"
	"math/rand/v2"
	"testing"
	"time"

	"github.com/cri-proxy/cri-proxy/api/apps/v1beta1"
)

const (
	manyNodes = 2000
	manyAbout = 50 // parallelism
)

// crowdOf adds nodes whose pulls take 50 to 200 ms. 5 % of them fail or hang. It returns how long
// the pulls take together, and which nodes are well.
func crowdOf(b *bed, n int) (total time.Duration, well []string) {
	random := rand.New(rand.NewPCG(1, 2))
	for i := range n {
		node := &simNode{takes: 50*time.Millisecond + time.Duration(random.Int64N(int64(150*time.Millisecond)))}
		name := fmt.Sprintf("node-%d", i)
		switch random.IntN(100) {
		case 0, 1:
			node.outcome = "NotFound"
		case 2, 3:
			node.silent = true
		case 4:
			node.stuck = true
		default:
			well = append(well, name)
		}
		if !node.silent {
			total += node.takes
		}
		if node.stuck {
			total += 2 * time.Second
		}
		b.add(name, node)
	}
	return total, well
}

func budget(n int) int { return 20 + int(2*math.Sqrt(float64(n))) }

func quickPolicy() *v1beta1.PullPolicy {
	timeout, limit := int32(1), int32(1)
	return &v1beta1.PullPolicy{TimeoutSeconds: &timeout, BackoffLimit: &limit}
}

// With 2,000 nodes, parallelism holds, nodes that hang hold up nobody, and the API server gets
// O(√N) writes.
func TestManyNodes(t *testing.T) {
	inBed(t, func(t *testing.T, b *bed) {
		total, well := crowdOf(b, manyNodes)
		begin := time.Now()
		b.create("job",
			spec{ImagePullJobTemplate: v1beta1.ImagePullJobTemplate{Parallelism: parallel(manyAbout),
				PullPolicy: quickPolicy()}})
		ideal := total / manyAbout
		b.until("through with the nodes that answer", "job", 10*ideal, func(*job) bool {
			b.fleet.mu.Lock()
			defer b.fleet.mu.Unlock()
			for _, name := range well {
				n := b.fleet.nodes[name]
				if len(n.pins) == 0 {
					return false
				}
			}
			return true
		})
		took := time.Since(begin)
		if bound := ideal*5/4 + 2*time.Second; took > bound {
			t.Errorf("took %s; the pulls take %s with %d at once, so at most %s", took, ideal, manyAbout, bound)
		}
		j := b.until("completed", "job", 20*time.Minute, completed)
		if got := int(j.Status.Succeeded); got != len(well) || int(j.Status.Failed) != manyNodes-len(well) {
			t.Errorf("%d succeeded, %d failed; want %d and the rest", got, j.Status.Failed, len(well))
		}
		if peak := b.fleet.peak["uid-job"]; peak > manyAbout || peak < manyAbout {
			t.Errorf("%d nodes pulled at once, want %d", peak, manyAbout)
		}
		writes := b.writesOf("job")
		if writes > budget(manyNodes) {
			t.Errorf("%d API writes, want at most %d", writes, budget(manyNodes))
		}
		if b.looks > 5 {
			t.Errorf("%d times all nodes were looked at, though none has changed", b.looks)
		}
		for name, n := range b.fleet.begun(well...) {
			if n != 1 {
				t.Errorf("%d pulls on %s", n, name)
			}
		}
		if len(j.Status.Failures) != maxDetails || len(j.Status.FailedNodes) != int(j.Status.Failed) {
			t.Errorf("%d failures told, %d names", len(j.Status.Failures), len(j.Status.FailedNodes))
		}
		t.Logf("%d nodes, %d at once: %s, of which the pulls alone take %s; %d API writes, %d events; calls %v; %+v",
			manyNodes, manyAbout, took, ideal, writes, len(b.events), b.fleet.calls, j.Status.FailureReasons)
	})
}

// A controller is killed midway, and the next one goes on: no node pulls twice, and no node pulls
// that must wait.
func TestManyNodesControllerKilled(t *testing.T) {
	inBed(t, func(t *testing.T, b *bed) {
		_, well := crowdOf(b, manyNodes)
		b.create("job",
			spec{ImagePullJobTemplate: v1beta1.ImagePullJobTemplate{Parallelism: parallel(manyAbout),
				PullPolicy: quickPolicy()}})
		for _, share := range []int{20, 60} {
			b.until("on its way", "job", 10*time.Minute, func(j *job) bool { return j.Status.Percent >= int32(share) })
			b.kill()
			time.Sleep(30 * time.Millisecond) // some end unseen
			b.start()
		}
		j := b.until("completed", "job", 30*time.Minute, completed)
		if int(j.Status.Succeeded) != len(well) {
			t.Errorf("%d succeeded, want %d", j.Status.Succeeded, len(well))
		}
		if peak := b.fleet.peak["uid-job"]; peak > manyAbout {
			t.Errorf("%d nodes pulled at once, want at most %d", peak, manyAbout)
		}
		for name, n := range b.fleet.begun() {
			if n > 1 {
				t.Errorf("%d pulls on %s", n, name)
			}
		}
		if writes := b.writesOf("job"); writes > budget(manyNodes) {
			t.Errorf("%d API writes, want at most %d", writes, budget(manyNodes))
		}
	})
}

// The number of writes grows with the square root of the number of nodes, and the status of a small
// job moves smoothly.
func TestWrites(t *testing.T) {
	for _, n := range []int{1, 3, 10, 100, 500} {
		t.Run(fmt.Sprint(n), func(t *testing.T) {
			inBed(t, func(t *testing.T, b *bed) {
				for i := range n {
					b.add(fmt.Sprintf("node-%d", i), &simNode{takes: 2 * time.Minute, steps: 100})
				}
				b.create("job",
					spec{ImagePullJobTemplate: v1beta1.ImagePullJobTemplate{Parallelism: parallel(max(n/10, 1))}})
				j := b.until("completed", "job", 12*time.Hour, completed)
				b.want(j, "True Succeeded", fmt.Sprintf("%d/0/%d/0", n, n))
				if writes := b.writesOf("job"); writes > budget(n) || writes < 10 {
					t.Errorf("%d writes, want at most %d and more than a few", writes, budget(n))
				}
				last := int32(0)
				for _, s := range b.history["job"] {
					if s.Percent < last || s.Percent > last+12 {
						t.Errorf("percent from %d to %d", last, s.Percent)
					}
					last = s.Percent
				}
				if last != 100 || j.Status.Progress != "100%" || j.Status.BytesDone != int64(n)*imageBytes ||
					j.Status.BytesTotal != j.Status.BytesDone {
					t.Errorf("in the end %d %%, %d of %d bytes", last, j.Status.BytesDone, j.Status.BytesTotal)
				}
				t.Logf("%d nodes: %d writes", n, b.writesOf("job"))
			})
		})
	}
}
