// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package rollout

import (
	"cmp"
	"slices"

	corev1 "k8s.io/api/core/v1"
)

const (
	// lookAheadMin and lookAheadMax bound how many pods are prepared beyond those that the budget lets go now. That is
	// enough to keep the pace, and a rollout that is stopped has prepared little in vain.
	lookAheadMin = 2
	lookAheadMax = 32
	// turnsMax is how many pods are changed at once, whatever the budget says: each of them needs a stream to its node.
	turnsMax = 500
	// freeTurns is how many pods are changed at once of those that are not available anyway.
	freeTurns = 10
)

// readiness is how far the node is with the preparation of a pod.
type readiness int

const (
	unprepared readiness = iota
	preparing
	prepared
)

// candidate is what the plan has to know of a pod.
type candidate struct {
	pod *corev1.Pod
	// ordinal is the place in a StatefulSet, -1 elsewhere.
	ordinal int
	verdict verdict
	turn    bool
	// preparation is how far the node is; prepared for pods that need no preparation.
	preparation readiness
}

// limits are the limits that a plan keeps.
type limits struct {
	desired, maxUnavailable int
	// keep is how many pods stay as they are; in a StatefulSet those with ordinals below firstOrdinal + keep.
	keep, firstOrdinal int
	// halted: no further pod begins.
	halted bool
	// ordered: one pod after the other, in the order of StatefulSets.
	ordered bool
	// allowed says whether the disruption budgets let an available pod go, and counts the pods that it lets go.
	allowed func(*corev1.Pod) (bool, string)
}

// plan says which pods are next.
type plan struct {
	// prepare are the pods whose nodes have to prepare them, begin the pods to change now; both by index.
	prepare, begin []int
	// held is how many outdated pods the partition keeps.
	held int
	// blocked says what budget holds pods back.
	blocked string
	// unavailable is how many pods are not available, or disrupted.
	unavailable, available int
}

// Next says which pods are next. The candidates are all active pods.
func decide(pods []candidate, l limits) plan {
	var p plan
	turns, written := 0, 0
	for _, c := range pods {
		if c.verdict.available && !c.verdict.disrupted {
			p.available++
		}
		if c.turn {
			turns++
		}
		if c.verdict.stage != outdated && c.verdict.stage != left {
			written++
		}
	}
	p.unavailable = max(l.desired-p.available, 0)

	order := inOrder(pods)
	order = slices.DeleteFunc(order, func(i int) bool { return pods[i].verdict.stage != outdated })
	order, p.held = unpartitioned(pods, order, written, l)

	unavailable, free := p.unavailable, max(freeTurns, l.maxUnavailable)
	waiting := 0
	for _, i := range order {
		if !pods[i].turn && pods[i].preparation != unprepared {
			waiting++
		}
	}
	ahead := max(min(l.maxUnavailable-p.unavailable, turnsMax), 0) + min(max(l.maxUnavailable, lookAheadMin), lookAheadMax)
	blocked := false
	for _, i := range order {
		c := &pods[i]
		switch {
		case c.turn:
			p.begin = append(p.begin, i) // it goes on
			continue
		case l.halted:
			continue
		case c.preparation == unprepared:
			if waiting < ahead {
				waiting++
				p.prepare = append(p.prepare, i)
			}
		}
		if c.preparation != prepared {
			blocked = blocked || l.ordered && c.verdict.serving
			continue
		}
		if turns >= turnsMax {
			continue
		}
		if c.verdict.serving {
			cost := 0
			if c.verdict.available {
				cost = 1
			}
			if blocked || unavailable+cost > l.maxUnavailable {
				continue
			}
			if ok, why := l.allowed(c.pod); !ok {
				p.blocked = why
				blocked = blocked || l.ordered
				continue
			}
			unavailable += cost
		} else if turns >= free {
			continue
		}
		turns++
		p.begin = append(p.begin, i)
	}
	return p
}

// inOrder sorts the pods. Those that are not ready cost nothing and go first, then the highest ordinal, then the first name.
func inOrder(pods []candidate) []int {
	order := make([]int, len(pods))
	for i := range order {
		order[i] = i
	}
	slices.SortFunc(order, func(a, b int) int {
		x, y := &pods[a], &pods[b]
		if x.verdict.serving != y.verdict.serving {
			if y.verdict.serving {
				return -1
			}
			return 1
		}
		return cmp.Or(cmp.Compare(y.ordinal, x.ordinal), cmp.Compare(x.pod.Name, y.pod.Name))
	})
	return order
}

// unpartitioned leaves out the pods that the partition keeps, and returns how many it has left out.
func unpartitioned(pods []candidate, order []int, written int, l limits) ([]int, int) {
	if l.keep == 0 {
		return order, 0
	}
	if l.ordered {
		var free []int
		for _, i := range order {
			if pods[i].turn || pods[i].ordinal >= l.firstOrdinal+l.keep {
				free = append(free, i)
			}
		}
		return free, len(order) - len(free)
	}
	// Pods that have begun are not stopped by a partition.
	slices.SortStableFunc(order, func(a, b int) int {
		if pods[a].turn != pods[b].turn && pods[a].turn {
			return -1
		} else if pods[a].turn != pods[b].turn {
			return 1
		}
		return 0
	})
	free := max(l.desired-l.keep-written, 0)
	for free < len(order) && pods[order[free]].turn {
		free++
	}
	if free >= len(order) {
		return order, 0
	}
	return order[:free], len(order) - free
}
