// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package evaluate

import (
	"cmp"
	"slices"

	corev1 "k8s.io/api/core/v1"
)

const (
	// lookAheadMin and lookAheadMax bound how many pods are prepared beyond those that the budget
	// lets go now. That is enough to keep the pace, and a rollout that is stopped has prepared
	// little in vain.
	lookAheadMin = 2
	lookAheadMax = 32
	// updatingMax is how many pods are changed at once, whatever the budget says: each of them
	// needs a stream to its node.
	updatingMax = 500
	// freeMax is how many pods are changed at once of those that are not available anyway.
	freeMax = 10
)

// Readiness is how far the node is with the preparation of a pod.
type Readiness int

// The node has not begun yet, is at it, or is done.
const (
	Unprepared Readiness = iota
	Preparing
	Prepared
)

// Candidate is what the plan has to know of a pod.
type Candidate struct {
	Pod *corev1.Pod
	// Ordinal is the place in a StatefulSet, -1 elsewhere.
	Ordinal  int
	Status   PodStatus
	Updating bool
	// Preparation is how far the node is; prepared for pods that need no preparation.
	Preparation Readiness
}

// Limits are the limits that a plan keeps.
type Limits struct {
	Desired, MaxUnavailable int
	// Keep is how many pods stay as they are; in a StatefulSet those with ordinals below
	// FirstOrdinal + Keep.
	Keep, FirstOrdinal int
	// Halted: no further pod begins.
	Halted bool
	// Ordered: one pod after the other, in the order of StatefulSets.
	Ordered bool
	// Allowed says whether the disruption budgets let an available pod go, and counts the pods that
	// it lets go.
	Allowed func(*corev1.Pod) (bool, string)
}

// Plan says which pods are next.
type Plan struct {
	// Prepare are the pods whose nodes have to prepare them, Begin the pods to change now; both by
	// index.
	Prepare, Begin []int
	// Held is how many outdated pods the partition keeps.
	Held int
	// Blocked says what budget holds pods back.
	Blocked string
	// Unavailable is how many pods are not available, or disrupted.
	Unavailable, Available int
}

// Next says which pods are next. The candidates are all active pods.
func Next(pods []Candidate, l Limits) Plan {
	var p Plan
	updating, written := 0, 0
	for _, c := range pods {
		if c.Status.Available && !c.Status.Disrupted {
			p.Available++
		}
		if c.Updating {
			updating++
		}
		if c.Status.Stage != Outdated && c.Status.Stage != Skipped {
			written++
		}
	}
	p.Unavailable = max(l.Desired-p.Available, 0)

	order := inOrder(pods)
	order = slices.DeleteFunc(order, func(i int) bool { return pods[i].Status.Stage != Outdated })
	order, p.Held = unpartitioned(pods, order, written, l)

	unavailable, free := p.Unavailable, max(freeMax, l.MaxUnavailable)
	waiting := 0
	for _, i := range order {
		if !pods[i].Updating && pods[i].Preparation != Unprepared {
			waiting++
		}
	}
	ahead := max(min(l.MaxUnavailable-p.Unavailable, updatingMax), 0) + min(max(l.MaxUnavailable, lookAheadMin),
		lookAheadMax)
	blocked := false
	for _, i := range order {
		c := &pods[i]
		switch {
		case c.Updating:
			p.Begin = append(p.Begin, i) // it goes on
			continue
		case l.Halted:
			continue
		case c.Preparation == Unprepared:
			if waiting < ahead {
				waiting++
				p.Prepare = append(p.Prepare, i)
			}
		}
		if c.Preparation != Prepared {
			blocked = blocked || l.Ordered && c.Status.Serving
			continue
		}
		if updating >= updatingMax {
			continue
		}
		if c.Status.Serving {
			cost := 0
			if c.Status.Available {
				cost = 1
			}
			if blocked || unavailable+cost > l.MaxUnavailable {
				continue
			}
			if ok, why := l.Allowed(c.Pod); !ok {
				p.Blocked = why
				blocked = blocked || l.Ordered
				continue
			}
			unavailable += cost
		} else if updating >= free {
			continue
		}
		updating++
		p.Begin = append(p.Begin, i)
	}
	return p
}

// inOrder sorts the pods. Those that are not ready cost nothing and go first, then the highest
// ordinal, then the first name.
func inOrder(pods []Candidate) []int {
	order := make([]int, len(pods))
	for i := range order {
		order[i] = i
	}
	slices.SortFunc(order, func(a, b int) int {
		x, y := &pods[a], &pods[b]
		if x.Status.Serving != y.Status.Serving {
			if y.Status.Serving {
				return -1
			}
			return 1
		}
		return cmp.Or(cmp.Compare(y.Ordinal, x.Ordinal), cmp.Compare(x.Pod.Name, y.Pod.Name))
	})
	return order
}

// unpartitioned leaves out the pods that the partition keeps, and returns how many it has left out.
func unpartitioned(pods []Candidate, order []int, written int, l Limits) ([]int, int) {
	if l.Keep == 0 {
		return order, 0
	}
	if l.Ordered {
		var free []int
		for _, i := range order {
			if pods[i].Updating || pods[i].Ordinal >= l.FirstOrdinal+l.Keep {
				free = append(free, i)
			}
		}
		return free, len(order) - len(free)
	}
	// Pods that have begun are not stopped by a partition.
	slices.SortStableFunc(order, func(a, b int) int {
		if pods[a].Updating != pods[b].Updating && pods[a].Updating {
			return -1
		} else if pods[a].Updating != pods[b].Updating {
			return 1
		}
		return 0
	})
	free := max(l.Desired-l.Keep-written, 0)
	for free < len(order) && pods[order[free]].Updating {
		free++
	}
	if free >= len(order) {
		return order, 0
	}
	return order[:free], len(order) - free
}
