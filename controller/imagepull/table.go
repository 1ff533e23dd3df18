// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package imagepull

import (
	"math"
	"time"

	"github.com/sirupsen/logrus"

	"github.com/cri-proxy/cri-proxy/controller/imagepull/report"
	"github.com/cri-proxy/cri-proxy/controller/imagepull/spec"
	"github.com/cri-proxy/cri-proxy/controller/pullsecrets"
)

// table is what is known of the nodes of a job, and the rules by which it changes. It commands no
// node and starts no goroutine.
type table struct {
	metrics *Metrics
	log     logrus.FieldLogger

	spec   *spec.Spec
	nodes  nodeStates // in the order in which they pull
	byName map[string]*nodeState
	counts [phases]int
	// verifying is the number of nodes that are.
	verifying int
	schedule  schedule
	// probes are under way. unverified and lingering are the numbers of nodes that are.
	probes, unverified, lingering int
	// older says that nodes may know the job from before: from another controller, or for another
	// image.
	older    bool
	throttle report.Throttle
	// keys are the pull secrets that were read last; nil before that.
	keys     *pullsecrets.Keyring
	reported reported
}

func newTable(s *spec.Spec, m *Metrics, log logrus.FieldLogger, now time.Time) *table {
	return &table{metrics: m, log: log, spec: s, byName: map[string]*nodeState{}, schedule: schedule{made: now}}
}

// setSpec takes up a spec that may have changed, and returns the nodes that the job no longer
// chooses. With unverified, new nodes may already be pulling. arrangeAll has to follow.
func (t *table) setSpec(s *spec.Spec, unverified bool) (gone []*nodeState) {
	newWork, newParams, newSecrets := s.Work != t.spec.Work, s.Params != t.spec.Params, !s.SameSecrets(t.spec)
	t.spec = s
	nodes, byName := make(nodeStates, 0, len(s.Nodes)), make(map[string]*nodeState, len(s.Nodes))
	for _, target := range s.Nodes {
		n := t.byName[target.Node.Name]
		if n == nil {
			n = &nodeState{target: target}
			t.counts[unknown]++
			mark(&n.unverified, &t.unverified, unverified)
			t.throttle.Add(0)
		}
		moved := n.target.Node != target.Node
		if target.Ready && !n.target.Ready {
			n.retryAt = time.Time{}
		}
		n.target = target
		busy := n.call != nil || n.phase == active
		switch {
		case newWork, moved && busy, newParams && (busy || n.phase == failed):
			t.reset(n)
		case newSecrets && n.phase == failed:
			t.reset(n)
			n.staleFailures = true
		case newSecrets && n.phase == active:
			t.interrupt(n) // the node is told to pull again, with the other secrets
		}
		nodes, byName[n.name()] = append(nodes, n), n
	}
	for name, n := range t.byName {
		if byName[name] == nil {
			mark(&n.unverified, &t.unverified, false)
			mark(&n.verifying, &t.verifying, false)
			if n.lingering { // the flag stays: the node is to be cleaned up
				t.lingering--
			}
			t.counts[n.phase]--
			t.throttle.Add(0)
			t.interrupt(n)
			gone = append(gone, n)
		}
	}
	t.nodes, t.byName, t.older = nodes, byName, t.older || newWork
	if newWork || newParams || newSecrets {
		t.throttle.Reset()
		t.reported.retries, t.reported.count = nil, 0
	}
	return gone
}

// pulling is how many nodes pull, or may be pulling.
func (t *table) pulling() int { return t.counts[active] + t.lingering }

// reset begins with a node from the start.
func (t *table) reset(n *nodeState) {
	mark(&n.lingering, &t.lingering, n.mayPull())
	t.interrupt(n)
	n.reached()
	mark(&n.verifying, &t.verifying, false)
	n.op, n.retries, n.retryAt = nil, 0, time.Time{}
	t.setPhase(n, unknown)
	t.setFraction(n, 0)
}

// interrupt ends the call to a node.
func (t *table) interrupt(n *nodeState) {
	if n.call == nil {
		return
	}
	if n.call.probes() {
		t.probes--
	}
	n.call.stop()
	n.call = nil
}

// mark sets a flag of a node, and the number of nodes that have the flag.
func mark(flag *bool, count *int, is bool) {
	switch {
	case is && !*flag:
		*count++
	case !is && *flag:
		*count--
	}
	*flag = is
}

func (t *table) setPhase(n *nodeState, p phase) {
	before := n.unit()
	t.counts[n.phase]--
	t.counts[p]++
	n.phase = p
	if p != failed {
		n.reason, n.message = "", ""
	}
	n.lastFailure = ""
	t.throttle.Add(math.Abs(n.unit() - before))
}

func (t *table) setFraction(n *nodeState, f float64) {
	before := n.unit()
	n.fraction = f
	t.throttle.Add(math.Abs(n.unit() - before))
}

// begin lets a node pull.
func (t *table) begin(n *nodeState, now time.Time) {
	n.begun, n.op = now, nil
	t.setPhase(n, active)
}

// beginNext lets a node pull that is the next to do so. If the job is done with the node, the node
// makes sure of the image, or tries again.
func (t *table) beginNext(n *nodeState, now time.Time) {
	if n.phase != pending {
		mark(&n.verifying, &t.verifying, n.phase == succeeded)
		n.round++
	}
	n.adopted = false
	t.begin(n, now)
}

// fail gives a node up, with the reason in one word and the message for people, and reports that.
func (t *table) fail(n *nodeState, reason, message string) {
	t.giveUp(n, reason, message)
	t.reported.failed(n.name(), reason, message)
	t.log.WithFields(logrus.Fields{"node": n.name(), "reason": reason}).Warn("no image on the node: " + message)
}

// giveUp is fail for a node that was given up before: by another controller, which has reported it.
func (t *table) giveUp(n *nodeState, reason, message string) {
	if t.counts[failed] == 0 {
		t.throttle.Urge()
	}
	mark(&n.verifying, &t.verifying, false)
	mark(&n.lingering, &t.lingering, false)
	t.setPhase(n, failed)
	n.reason, n.message = reason, message
}

// arrange puts a node on the schedule.
func (t *table) arrange(n *nodeState, now time.Time) {
	t.schedule.remove(n)
	switch {
	case n.call != nil:
	case n.phase == active: // a probe has found it so, or its call was interrupted
		n.adopted = true
		t.schedule.adopted = append(t.schedule.adopted, n)
	case n.phase == succeeded || n.gaveUp():
		switch {
		case !t.spec.Never || !n.target.Ready:
		case now.Before(n.retryAt):
			t.schedule.lookAt(n, n.retryAt)
		default:
			t.schedule.pullInOrder(n, afterAll+n.order)
		}
	case !n.target.Ready:
		switch t.leaveOut(n, now); {
		case n.lingering:
			t.schedule.lookAt(n, n.since.Add(silenceTimeout))
		case !n.done():
			t.schedule.lookAt(n, n.since.Add(nodeTimeout))
		}
	case n.phase == pending:
		t.schedule.pullInOrder(n, n.order)
	case now.Before(n.retryAt):
		t.schedule.lookAt(n, n.retryAt)
	default:
		t.schedule.probes = append(t.schedule.probes, n)
	}
}

// arrangeAll puts all nodes on the schedule.
func (t *table) arrangeAll(now time.Time) {
	t.schedule.clear()
	for i, n := range t.nodes {
		n.order = int64(i + 1)
		t.arrange(n, now)
	}
}

// idle says that nothing is under way.
func (t *table) idle() bool { return t.counts[active] == 0 && t.probes == 0 }

// finished says that no node has anything left to do.
func (t *table) finished() bool {
	return t.counts[succeeded]+t.counts[failed]+t.verifying == len(t.nodes) && t.unverified == 0
}
