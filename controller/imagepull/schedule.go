// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package imagepull

import (
	"container/heap"
	"time"
)

// entry is a node in a heap. It counts while the node's own field has the same key.
type entry struct {
	key int64
	n   *nodeState
}

// entries is a heap of nodes, the smallest key first.
type entries []entry

func (e entries) Len() int           { return len(e) }
func (e entries) Less(i, k int) bool { return e[i].key < e[k].key }
func (e entries) Swap(i, k int)      { e[i], e[k] = e[k], e[i] }

// Push implements heap.Interface.
func (e *entries) Push(x any) { *e = append(*e, x.(entry)) }

// Pop implements heap.Interface.
func (e *entries) Pop() any {
	last := len(*e) - 1
	x := (*e)[last]
	*e = (*e)[:last]
	return x
}

// afterAll is more than any job has nodes: nodes that have the image pull again after all others.
const afterAll = 1 << 40

// schedule says what is to be done next, and with which node. Each node is in one part of it, or in
// none.
type schedule struct {
	// made is when the schedule was made: alarms count from then.
	made time.Time
	// pulls has nodes that wait until fewer nodes pull, alarms those that wait for their time, and
	// probes those that wait for a probe. adopted nodes pull already, and nobody follows them yet.
	pulls, alarms   entries
	probes, adopted []*nodeState
}

// clear takes all nodes off the schedule.
func (s *schedule) clear() { s.pulls, s.alarms, s.probes, s.adopted = nil, nil, nil, nil }

// remove takes a node off the schedule.
func (s *schedule) remove(n *nodeState) { n.pullKey, n.alarmKey = 0, 0 }

// pullInOrder has a node pull, in the order of the keys, once fewer nodes pull.
func (s *schedule) pullInOrder(n *nodeState, key int64) {
	n.pullKey = key
	heap.Push(&s.pulls, entry{key, n})
}

// lookAt has a node looked at again at a time.
func (s *schedule) lookAt(n *nodeState, at time.Time) {
	n.alarmKey = max(int64(at.Sub(s.made)), 1)
	heap.Push(&s.alarms, entry{n.alarmKey, n})
}

// waiting says that nodes wait for others.
func (s *schedule) waiting() bool { return len(s.pulls) > 0 || len(s.probes) > 0 }

// nextToPull takes the node that pulls next; nil if none waits.
func (s *schedule) nextToPull() *nodeState {
	for len(s.pulls) > 0 {
		if e := heap.Pop(&s.pulls).(entry); e.n.pullKey == e.key {
			e.n.pullKey = 0
			return e.n
		}
	}
	return nil
}

// nextToProbe takes the node that has waited longest for a probe; nil if none waits.
func (s *schedule) nextToProbe(now time.Time) *nodeState {
	for len(s.probes) > 0 {
		n := s.probes[0]
		s.probes = s.probes[1:]
		due := n.call == nil && n.target.Ready && !now.Before(n.retryAt)
		if due && (n.phase == unknown || n.phase == failed && !n.gaveUp()) {
			return n
		}
	}
	return nil
}

// takeAdopted takes the nodes that pull already.
func (s *schedule) takeAdopted() []*nodeState {
	adopted := s.adopted
	s.adopted = nil
	return adopted
}

// takeDue takes the nodes whose time has come.
func (s *schedule) takeDue(now time.Time) (due []*nodeState) {
	for len(s.alarms) > 0 && s.alarms[0].key <= int64(now.Sub(s.made)) {
		if e := heap.Pop(&s.alarms).(entry); e.n.alarmKey == e.key {
			due = append(due, e.n)
		}
	}
	return due
}

// nextWakeup is how long until the passing of time alone lets something begin; 0 means never.
func (s *schedule) nextWakeup(now time.Time) time.Duration {
	for len(s.alarms) > 0 && s.alarms[0].n.alarmKey != s.alarms[0].key {
		heap.Pop(&s.alarms)
	}
	if len(s.alarms) == 0 {
		return 0
	}
	return max(time.Duration(s.alarms[0].key)-now.Sub(s.made), time.Millisecond)
}
