// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package imagepull

import (
	"container/heap"
	"time"
)

// place is a node in a line. The node has left the line if its own field has another key.
type place struct {
	key int64
	n   *nodeState
}

// line is a heap of nodes, the smallest key first.
type line []place

func (l line) Len() int           { return len(l) }
func (l line) Less(i, k int) bool { return l[i].key < l[k].key }
func (l line) Swap(i, k int)      { l[i], l[k] = l[k], l[i] }

// Push implements heap.Interface.
func (l *line) Push(x any) { *l = append(*l, x.(place)) }

// Pop implements heap.Interface.
func (l *line) Pop() any {
	last := len(*l) - 1
	p := (*l)[last]
	*l = (*l)[:last]
	return p
}

// afterAll is more than any job has nodes: nodes that have the image pull again after all others.
const afterAll = 1 << 40

// arrange puts a node where it is found when its time comes: in the line of those that wait for
// their turn to pull, in the one of those to be probed, or in the one that an hour makes due.
func (t *table) arrange(n *nodeState, now time.Time) {
	n.turn, n.alarm = 0, 0
	wait := func(key int64) {
		n.turn = key
		heap.Push(&t.turns, place{key, n})
	}
	switch {
	case n.call != nil:
	case n.phase == active: // a probe has found it so
		t.adopted = append(t.adopted, n)
	case n.phase == succeeded || n.gaveUp():
		switch {
		case !t.spec.Never || !n.target.Ready:
		case now.Before(n.retryAt):
			t.setAlarm(n, n.retryAt)
		default:
			wait(afterAll + n.order)
		}
	case !n.target.Ready:
		switch t.leaveOut(n, now); {
		case n.lingering:
			t.setAlarm(n, n.since.Add(silenceTimeout))
		case !n.done():
			t.setAlarm(n, n.since.Add(nodeTimeout))
		}
	case n.phase == pending:
		wait(n.order)
	case now.Before(n.retryAt):
		t.setAlarm(n, n.retryAt)
	default:
		t.survey = append(t.survey, n)
	}
}

// arrangeAll arranges all nodes.
func (t *table) arrangeAll(now time.Time) {
	t.turns, t.alarms, t.survey, t.adopted = nil, nil, nil, nil
	for i, n := range t.nodes {
		n.order = int64(i + 1)
		t.arrange(n, now)
	}
}

// nextToPull takes the node whose turn it is; nil if none waits.
func (t *table) nextToPull() *nodeState {
	for len(t.turns) > 0 {
		if p := heap.Pop(&t.turns).(place); p.n.turn == p.key && t.byName[p.n.name()] == p.n {
			p.n.turn = 0
			return p.n
		}
	}
	return nil
}

// nextToProbe takes the node that has waited longest for a probe; nil if none waits.
func (t *table) nextToProbe(now time.Time) *nodeState {
	for len(t.survey) > 0 {
		n := t.survey[0]
		t.survey = t.survey[1:]
		due := n.call == nil && n.target.Ready && !now.Before(n.retryAt)
		if due && (n.phase == unknown || n.phase == failed && !n.gaveUp()) && t.byName[n.name()] == n {
			return n
		}
	}
	return nil
}

func (t *table) setAlarm(n *nodeState, at time.Time) {
	n.alarm = max(int64(at.Sub(t.made)), 1)
	heap.Push(&t.alarms, place{n.alarm, n})
}

// ring arranges the nodes that an hour has made due.
func (t *table) ring(now time.Time) {
	var due []*nodeState
	for len(t.alarms) > 0 && t.alarms[0].key <= int64(now.Sub(t.made)) {
		if p := heap.Pop(&t.alarms).(place); p.n.alarm == p.key {
			due = append(due, p.n)
		}
	}
	for _, n := range due {
		if t.byName[n.name()] == n {
			t.arrange(n, now)
		}
	}
}

// nextWakeup is how long until the passing of time alone lets something begin; 0 means never.
func (t *table) nextWakeup(now time.Time) time.Duration {
	for len(t.alarms) > 0 && t.alarms[0].n.alarm != t.alarms[0].key {
		heap.Pop(&t.alarms)
	}
	if len(t.alarms) == 0 {
		return 0
	}
	return max(time.Duration(t.alarms[0].key)-now.Sub(t.made), time.Millisecond)
}
