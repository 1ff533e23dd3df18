// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package imagepull

import (
	"fmt"
	"math"
	"time"

	"github.com/sirupsen/logrus"
	"google.golang.org/grpc/codes"

	opsv1 "github.com/cri-proxy/cri-proxy/api/ops/v1"
	"github.com/cri-proxy/cri-proxy/controller/imagepull/command"
	"github.com/cri-proxy/cri-proxy/controller/imagepull/pull"
	"github.com/cri-proxy/cri-proxy/controller/imagepull/report"
	"github.com/cri-proxy/cri-proxy/controller/imagepull/spec"
	"github.com/cri-proxy/cri-proxy/controller/nodes"
	"github.com/cri-proxy/cri-proxy/controller/pullsecrets"
)

const (
	// nodeTimeout is how long a node may be away before it counts as failed (OpenKruise's figure).
	// The controller tries it again even then.
	nodeTimeout = 10 * time.Minute
	// maxRefusals is how often a node may refuse the connection before it counts as failed: about
	// half a minute.
	maxRefusals = 6
	// reprobeInterval is how soon a node is probed again that counts as failed because it could not
	// be commanded.
	reprobeInterval = time.Minute
	// retryMin and retryMax are how soon a job that never ends pulls again on a node that failed.
	retryMin = 10 * time.Minute
	retryMax = 6 * time.Hour
	// maxConflicts is how many UIDs are passed over that the node has for something else.
	maxConflicts = 5
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

// unreached notes that the node could not be commanded, and decides when to try again.
func (t *table) unreached(n *nodeState, why command.Trouble, now time.Time) {
	if n.since.IsZero() {
		n.since = now
	}
	n.tries++
	n.away = why
	t.throttle.Add(0)
	if now.Sub(n.since) >= silenceTimeout {
		mark(&n.lingering, &t.lingering, false)
	}
	switch {
	case n.phase == failed:
		n.reason, n.message = why.Reason, why.Message
		n.retryAt = now.Add(reprobeInterval)
	case why.Final || why.Reason == command.ReasonNoProxy && n.tries >= maxRefusals || now.Sub(n.since) >= nodeTimeout:
		t.fail(n, why.Reason, why.Message)
		t.metrics.failed(why.Reason)
		n.retryAt = now.Add(reprobeInterval)
	default:
		t.setPhase(n, unknown)
		n.retryAt = now.Add(min(time.Second<<min(n.tries-1, 5), 30*time.Second))
	}
}

// leaveOut notes that the node must not be commanded as it is.
func (t *table) leaveOut(n *nodeState, now time.Time) {
	mark(&n.unverified, &t.unverified, false)
	reason, message := n.target.Reason, n.target.Message
	if n.away.Reason != reason {
		n.away = command.Trouble{Reason: reason, Message: message}
		t.throttle.Add(0)
	}
	if n.since.IsZero() {
		n.since = now
	}
	if now.Sub(n.since) >= silenceTimeout {
		mark(&n.lingering, &t.lingering, false)
	}
	if n.phase != failed && now.Sub(n.since) >= nodeTimeout {
		t.fail(n, reason, message)
		t.metrics.failed(reason)
	}
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

// adopt takes over what a probe has found.
func (t *table) adopt(n *nodeState, f command.Found, now time.Time) {
	stale := n.staleFailures
	mark(&n.lingering, &t.lingering, false) // the probe has cancelled what the job no longer wants
	n.round, n.retryAt, n.staleFailures = f.Rounds, time.Time{}, false
	op := f.Latest
	switch {
	case op == nil && f.Pinned:
		t.succeed(n, nil, now)
	case op == nil:
		n.answered()
		t.setPhase(n, pending)
	case op.GetPhase() == opsv1.PullPhase_PULL_SUCCEEDED:
		since := now
		if finish := op.GetFinishTime().AsTime(); finish.Before(now) {
			since = now.Add(finish.Sub(now)) // by the clock of now
		}
		t.succeed(n, op, since)
	case op.GetFinishTime() == nil:
		n.round = f.Round
		t.begin(n, now)
	// The clocks of the node and of the API server may differ. Begun is for a job that another
	// controller goes on with.
	case stale, op.GetFinishTime().AsTime().Before(t.spec.Begun),
		pull.CancelledByController(op) && pull.OverdueText(op) == "":
		n.answered()
		n.round++ // the job has begun again since
		t.setPhase(n, pending)
	default:
		n.reached()
		n.op = op
		reason, message := op.GetReason(), op.GetMessage()
		if text := pull.OverdueText(op); text != "" {
			reason, message = pull.ReasonOverdue, text
		}
		t.giveUp(n, reason, message)
		n.retryAt = now.Add(retryMin)
	}
}

// succeed notes that the node has the image, since a time.
func (t *table) succeed(n *nodeState, op *opsv1.PullOperation, since time.Time) {
	n.reached()
	mark(&n.verifying, &t.verifying, false)
	n.op, n.retries = op, 0
	t.setFraction(n, 1)
	t.setPhase(n, succeeded)
	n.retryAt = since.Add(t.spec.RenewEvery())
}

// finish notes how a pull has ended.
func (t *table) finish(n *nodeState, op *opsv1.PullOperation, now time.Time) {
	switch {
	case op.GetPhase() == opsv1.PullPhase_PULL_SUCCEEDED:
		t.succeed(n, op, now) // and not when the node says: its clock may be behind
	case pull.CancelledByController(op):
		// This controller has cancelled it, for a change that another one has overtaken.
		n.round++
		t.setPhase(n, pending)
		return
	default:
		n.reached()
		n.op = op
		message := op.GetMessage()
		if message == "" {
			message = fmt.Sprintf("the node says only: %s, %s", op.GetPhase(), op.GetReason())
		}
		t.fail(n, op.GetReason(), message)
		n.retryAt = now.Add(min(retryMin<<min(n.retries, 10), retryMax))
		n.retries++
	}
	t.metrics.pulled(op, now.Sub(n.begun))
}

// yield lets other nodes pull instead of a node that could not be told to, or has become silent.
func (t *table) yield(n *nodeState, err error, why command.Trouble, since, now time.Time) {
	conflict := nodes.Code(err) == codes.AlreadyExists
	verifying := n.verifying
	mark(&n.verifying, &t.verifying, false)
	switch {
	case conflict && n.retries < maxConflicts:
		n.round++
		n.retries++
		t.setPhase(n, pending)
	case why.Final && why.Reason == command.ReasonInvalidRequest:
		n.reached()
		t.fail(n, why.Reason, why.Message)
		n.retryAt = now.Add(retryMax)
		t.metrics.failed(why.Reason)
	case verifying:
		// It had the image when it last answered.
		t.setPhase(n, succeeded)
		n.retryAt = now.Add(retryMin)
	default:
		if n.untaken = true; n.since.IsZero() {
			n.since = since
		}
		mark(&n.lingering, &t.lingering, why.Lost || n.adopted)
		t.setPhase(n, unknown)
		t.unreached(n, why, now)
	}
}

// progress notes what a node says of its pull.
func (t *table) progress(n *nodeState, op *opsv1.PullOperation) {
	n.reached()
	if op.GetPhase() != n.op.GetPhase() || op.GetReason() != n.op.GetReason() {
		t.throttle.Add(0)
	}
	n.op = op
	t.noteRetry(n, op)
	if total := op.GetBytesTotal(); total > 0 {
		// Never the whole: unpacking and naming the image come last.
		t.setFraction(n, max(n.fraction, min(float64(op.GetBytesDone())/float64(total), 0.99)))
	}
}
