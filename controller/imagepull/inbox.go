// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package imagepull

import (
	"maps"
	"slices"
	"sync"
	"time"

	"github.com/cri-proxy/cri-proxy/controller/pullsecrets"
)

// gatherMin and gatherPer1000 are how long news of a job are collected: a fixed time, and so much
// for each 1,000 nodes.
const gatherMin, gatherPer1000 = 50 * time.Millisecond, 50 * time.Millisecond

// inbox has what calls to nodes have brought since the last reconcile of a job.
type inbox struct {
	mu sync.Mutex
	// news are the nodes of which there is something new.
	news map[*nodeState]struct{}
	// keys are pull secrets that were read; nil if none were. urgent says that the status is to
	// tell of them.
	keys   *pullsecrets.Keyring
	urgent bool
	// waiting says that nodes wait for others to come to an end, and hurry that one has.
	waiting, hurry bool
	nodes          int
}

// open empties the inbox and returns the nodes of which there is something new.
func (in *inbox) open(t *table) []*nodeState {
	in.mu.Lock()
	defer in.mu.Unlock()
	news := slices.Collect(maps.Keys(in.news))
	if in.keys != nil {
		t.keys = in.keys
	}
	if in.urgent {
		t.throttle.Urge()
	}
	in.news, in.keys, in.urgent, in.hurry = nil, nil, false, false
	return news
}

// wait notes whether nodes wait for others, and how many nodes there are.
func (in *inbox) wait(waiting bool, nodes int) {
	in.mu.Lock()
	defer in.mu.Unlock()
	in.waiting, in.nodes = waiting, nodes
}

// gather is how long to collect news. A node that can begin now does not wait for them.
func (in *inbox) gather() time.Duration {
	in.mu.Lock()
	defer in.mu.Unlock()
	if in.hurry {
		return 0
	}
	return gatherMin + time.Duration(in.nodes)*gatherPer1000/1000
}

// note notes that there is something new of a node.
func (in *inbox) note(n *nodeState) {
	in.mu.Lock()
	defer in.mu.Unlock()
	in.add(n)
}

func (in *inbox) add(n *nodeState) {
	if in.news == nil {
		in.news = map[*nodeState]struct{}{}
	}
	in.news[n] = struct{}{}
}

// noteEnd notes that the call to a node has ended.
func (in *inbox) noteEnd(n *nodeState, c *call, r result) {
	in.mu.Lock()
	defer in.mu.Unlock()
	c.result = r
	in.add(n)
	in.hurry = in.hurry || in.waiting
}

func (in *inbox) resultOf(c *call) result {
	in.mu.Lock()
	defer in.mu.Unlock()
	return c.result
}

// noteCleanedUp notes that a node is told nothing more that the job does not choose.
func (in *inbox) noteCleanedUp() {
	in.mu.Lock()
	defer in.mu.Unlock()
	in.hurry = in.hurry || in.waiting
}

// noteKeys notes pull secrets that were read. before is nil if they are the first.
func (in *inbox) noteKeys(before, keys *pullsecrets.Keyring) {
	in.mu.Lock()
	defer in.mu.Unlock()
	if before == nil && keys.Asked || len(keys.Wrong) > 0 != (before != nil && len(before.Wrong) > 0) {
		in.urgent = true
	}
	in.keys = keys
}
