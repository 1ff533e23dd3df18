// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package imagepull

import (
	"context"
	"fmt"
	"math"
	"strings"
	"sync"
	"time"

	"github.com/distribution/reference"
	"github.com/sirupsen/logrus"
	"sigs.k8s.io/controller-runtime/pkg/client"

	opsv1 "github.com/cri-proxy/cri-proxy/api/ops/v1"
	"github.com/cri-proxy/cri-proxy/controller/crew"
	"github.com/cri-proxy/cri-proxy/controller/nodes"
	"github.com/cri-proxy/cri-proxy/controller/pullsecrets"
)

const (
	// surveyWidth is how many nodes of a job are surveyed at once.
	surveyWidth = 128
	// nodePatience is how long a node may be away before it counts as failed (OpenKruise's figure). It is tried again
	// even then.
	nodePatience = 10 * time.Minute
	// proxyPatience is how often a node may refuse the connection before it counts as failed: about half a minute.
	proxyPatience = 6
	// resurveyAfter is how soon a node is tried again that counts as failed because it could not be commanded.
	resurveyAfter = time.Minute
	// retryMin and retryMax are how soon a job of type Never pulls again on a node that failed.
	retryMin = 10 * time.Minute
	retryMax = 6 * time.Hour

	// noNodesPatience is how long a job that ends waits for the first node that matches: labels and pods come with it, and a moment
	// later.
	noNodesPatience = 30 * time.Second

	// cancelReason begins what a node is told when the controller cancels a pull.
	cancelReason = "ImagePullJob: "
)

// phase is where a node stands.
type phase int

const (
	// unknown has to be surveyed.
	unknown phase = iota
	// pending waits for its turn.
	pending
	// active has its turn.
	active
	succeeded
	failed
	phases // their number
)

// member is a node of a run; the fields are guarded by the run's mutex.
type member struct {
	target target
	phase  phase
	// epoch counts how often the node was begun with anew; what a goroutine of an earlier one says does not count.
	epoch int
	// ended is closed when the goroutine ends that talks to the node, which cancel hastens; nil when there is none.
	ended  chan struct{}
	cancel context.CancelFunc
	// suspect may be pulling though it is not active: nothing new is begun before it has been asked.
	suspect bool
	// stale says that what the node tells of pulls that have failed was before the run.
	stale bool
	// away is why the node cannot be commanded, since when, and how often that was tried.
	away  trouble
	since time.Time
	tries int
	// untaken says that it answered and did not take the command.
	untaken bool
	// retryAt is when to turn to the node again.
	retryAt time.Time
	round   int
	// held had the image before, and is pulling to make sure that it still has.
	held bool

	// again is why the last attempt failed, while the node tries again.
	again string

	op       *opsv1.PullOperation
	begun    time.Time
	fraction float64
	// reason and message are why it failed.
	reason, message string
	retries         int
}

// done says that the job need not wait for the node.
func (m *member) done() bool { return m.phase == succeeded || m.phase == failed || m.held }

// unit is how much of the node's work is done.
func (m *member) unit() float64 {
	if m.done() {
		return 1
	}
	return m.fraction
}

func (m *member) busy() bool { return m.ended != nil }

// run is one job at work.
type run struct {
	nodes   Nodes
	secrets client.Reader
	crew    *crew.Crew
	metrics *Metrics
	log     logrus.FieldLogger
	// wake lets the reconciler look at the job, soon.
	wake func()

	// keysMu lets one goroutine at a time read the secrets. It is taken before mu.
	keysMu sync.Mutex

	mu      sync.Mutex
	wish    *wish
	members []*member // in the order of their turn
	byName  map[string]*member
	counts  [phases]int
	// surveys are under way; suspects is the number of members that are.
	surveys, suspects int
	// leavers had their turn when they were no longer chosen, and may still be pulling.
	leavers int
	closed  bool
	// older says that nodes may know of the job from before: from another controller, or for another image.
	older bool
	// woken says that the reconciler has been woken, or wakes by itself soon.
	woken bool
	// planned is when the reconciler looks by itself, at the latest; zero means never.
	planned time.Time
	pace    pace
	// keys were read at keysAt.
	keys   *pullsecrets.Keyring
	keysAt time.Time
	told   told
}

// newRun begins a run. With resume the job may have been at work before; with again it had ended, and what failed then does not count.
func newRun(r *Reconciler, w *wish, resume, again bool, wake func()) *run {
	u := &run{
		nodes: r.Nodes, secrets: r.APIReader, crew: r.crew, metrics: r.Metrics, wake: wake,
		log:  r.Log.WithFields(logrus.Fields{"job": w.job.String(), "image": w.request.GetImage()}),
		wish: &wish{work: w.work, params: w.params}, byName: map[string]*member{}, older: resume,
	}
	u.follow(w, resume)
	for _, m := range u.members {
		m.stale = again
	}
	return u
}

// apply makes the run follow a job and nodes that may have changed, and goes on with what can be done.
func (u *run) apply(w *wish) {
	u.mu.Lock()
	defer u.mu.Unlock()
	if u.closed {
		return
	}
	u.follow(w, false)
	u.kick(time.Now())
}

// follow takes up a wish; with suspect, new nodes may already be pulling. The caller holds the mutex.
func (u *run) follow(w *wish, suspect bool) {
	newWork, newParams := w.work != u.wish.work, w.params != u.wish.params
	u.wish = w
	members, byName := make([]*member, 0, len(w.nodes)), make(map[string]*member, len(w.nodes))
	for _, t := range w.nodes {
		m := u.byName[t.node.Name]
		if m == nil {
			m = &member{target: t}
			u.counts[unknown]++
			u.setSuspect(m, suspect)
			u.pace.moved(0)
		}
		moved := m.target.node != t.node
		if t.ready && !m.target.ready {
			m.retryAt = time.Time{}
		}
		m.target = t
		if newWork || moved && m.phase == active || newParams && (m.phase == active || m.phase == failed) {
			u.anew(m)
		}
		members, byName[t.node.Name] = append(members, m), m
	}
	var gone []*member
	leavers := 0
	for name, m := range u.byName {
		if byName[name] == nil {
			if m.phase == active {
				leavers++
			}
			u.setSuspect(m, false)
			u.counts[m.phase]--
			u.pace.moved(0)
			m.hang()
			gone = append(gone, m)
		}
	}
	u.members, u.byName = members, byName
	u.older = u.older || newWork
	if newWork || newParams {
		u.pace.again()
		u.told.again = nil
	}
	// A node that was deleted does not answer, and there is no harm in asking.
	u.leavers += leavers
	u.dismiss(gone, true, "the node is no longer chosen", func(int) {
		u.mu.Lock()
		defer u.mu.Unlock()
		u.leavers -= leavers
		u.kick(time.Now())
	})
}

// hang ends what is being said to the node.
func (m *member) hang() {
	m.epoch++
	if m.cancel != nil {
		m.cancel()
	}
}

// anew begins with a node from the start.
func (u *run) anew(m *member) {
	if m.phase == active {
		u.setSuspect(m, true)
	}
	m.hang()
	u.present(m)
	m.held, m.op, m.retries, m.retryAt = false, nil, 0, time.Time{}
	u.setPhase(m, unknown)
	u.setFraction(m, 0)
}

func (u *run) setSuspect(m *member, suspect bool) {
	switch {
	case suspect && !m.suspect:
		u.suspects++
	case !suspect && m.suspect:
		u.suspects--
	}
	m.suspect = suspect
}

func (u *run) setPhase(m *member, p phase) {
	before := m.unit()
	u.counts[m.phase]--
	u.counts[p]++
	m.phase = p
	if p != failed {
		m.reason, m.message = "", ""
	}
	m.again = ""
	u.pace.moved(math.Abs(m.unit() - before))
}

func (u *run) setFraction(m *member, f float64) {
	before := m.unit()
	m.fraction = f
	u.pace.moved(math.Abs(m.unit() - before))
}

// present notes that the node can be commanded.
func (u *run) present(m *member) {
	m.away, m.since, m.tries, m.untaken = trouble{}, time.Time{}, 0, false
}

// fail gives a node up, with the reason in one word and the message for people.
func (u *run) fail(m *member, reason, message string) {
	if u.counts[failed] == 0 {
		u.pace.urgent = true
	}
	m.held = false
	u.setPhase(m, failed)
	m.reason, m.message = reason, message
	u.told.failed(m.target.node.Name, reason, message)
	u.log.WithFields(logrus.Fields{"node": m.target.node.Name, "reason": reason}).Warn("no image on the node: " + message)
}

// troubled notes that the node could not be commanded and decides when to try again.
func (u *run) troubled(m *member, t trouble, now time.Time) {
	if m.since.IsZero() {
		m.since = now
	}
	m.tries++
	m.away = t
	u.pace.moved(0)
	switch {
	case m.phase == failed:
		m.reason, m.message = t.reason, t.message
		m.retryAt = now.Add(resurveyAfter)
	case t.final || t.reason == reasonNoProxy && m.tries >= proxyPatience || now.Sub(m.since) >= nodePatience:
		u.fail(m, t.reason, t.message)
		u.metrics.failed(t.reason)
		m.retryAt = now.Add(resurveyAfter)
	default:
		u.setPhase(m, unknown)
		m.retryAt = now.Add(min(time.Second<<min(m.tries-1, 5), 30*time.Second))
	}
}

// leaveOut notes that the node is not to be commanded as it is.
func (u *run) leaveOut(m *member, now time.Time) {
	u.setSuspect(m, false)
	if m.away.reason != m.target.reason {
		m.away = trouble{reason: m.target.reason, message: m.target.message}
		u.pace.moved(0)
	}
	if m.since.IsZero() {
		m.since = now
	}
	if m.phase != failed && now.Sub(m.since) >= nodePatience {
		u.fail(m, m.target.reason, m.target.message)
		u.metrics.failed(m.target.reason)
	}
}

// kick begins all that can be begun: surveys, then pulls in the order of their turn. The caller holds the mutex.
func (u *run) kick(now time.Time) {
	if u.closed {
		return
	}
	for _, m := range u.members {
		switch {
		case m.busy() || m.phase == succeeded || m.phase == failed && m.away.reason == "":
		case m.phase == active: // found so by a survey
			u.visit(m)
		case !m.target.ready:
			u.leaveOut(m, now)
		case m.phase != pending && !now.Before(m.retryAt) && u.surveys < surveyWidth:
			u.survey(m)
		}
	}
	if u.suspects > 0 {
		return
	}
	limit := u.wish.limit()
	for _, m := range u.members {
		if u.counts[active]+u.leavers >= limit {
			return
		}
		if m.phase == pending && !m.busy() && m.target.ready && !now.Before(m.retryAt) {
			u.pull(m, now)
		}
	}
	if !u.wish.never {
		return
	}
	for _, m := range u.members {
		if u.counts[active]+u.leavers >= limit {
			return
		}
		if !m.busy() && m.target.ready && !now.Before(m.retryAt) && (m.phase == succeeded || m.phase == failed && m.away.reason == "") {
			m.held = m.phase == succeeded
			m.round++
			u.pull(m, now)
		}
	}
}

// nextLook is how long until the passing of time alone lets something begin; 0 means never. The caller holds the mutex.
func (u *run) nextLook(now time.Time) time.Duration {
	var next time.Duration
	at := func(t time.Time) {
		if d := max(t.Sub(now), time.Millisecond); next == 0 || d < next {
			next = d
		}
	}
	full := u.counts[active]+u.leavers >= u.wish.limit() || u.suspects > 0
	for _, m := range u.members {
		surveyed := m.phase == unknown || m.phase == failed && m.away.reason != ""
		switch {
		case m.busy():
		case !m.target.ready:
			if !m.done() && !m.since.IsZero() {
				at(m.since.Add(nodePatience))
			}
		case surveyed && u.surveys < surveyWidth, m.phase == pending && !full, u.wish.never && m.done() && !full:
			at(m.retryAt)
		}
	}
	return next
}

// idle says that nothing is under way. The caller holds the mutex.
func (u *run) idle() bool { return u.counts[active] == 0 && u.surveys == 0 }

// finished says that no node has anything left to do. The caller holds the mutex.
func (u *run) finished() bool {
	for _, m := range u.members {
		if !m.done() {
			return false
		}
	}
	return u.suspects == 0
}

// news wakes the reconciler if there is something to write. The caller holds the mutex.
func (u *run) news() {
	if u.woken || u.closed {
		return
	}
	idle := u.idle()
	if u.pace.dirty && (u.pace.worthIt(len(u.members)) || idle) {
		u.woken = true
		u.wake()
	}
}

// planAhead wakes the reconciler if it would look too late by itself: a node to which something was being said when it looked last was left out
// of nextLook. The caller holds the mutex.
func (u *run) planAhead(now time.Time) {
	if u.woken || u.closed {
		return
	}
	if look := u.nextLook(now); look > 0 && (u.planned.IsZero() || now.Add(look).Before(u.planned)) {
		u.woken = true
		u.wake()
	}
}

// talk runs f in a goroutine of the node's. f gets the epoch it belongs to. The caller holds the mutex.
func (u *run) talk(m *member, f func(ctx context.Context, epoch int)) {
	epoch, ended := m.epoch, make(chan struct{})
	m.ended = ended
	u.crew.Do(func(ctx context.Context) {
		ctx, cancel := context.WithCancel(ctx)
		defer cancel()
		u.mu.Lock()
		m.cancel = cancel
		if m.epoch != epoch {
			cancel()
		}
		u.mu.Unlock()
		f(ctx, epoch)
		u.mu.Lock()
		defer u.mu.Unlock()
		m.ended, m.cancel = nil, nil
		close(ended)
		now := time.Now()
		u.kick(now)
		u.news()
		u.planAhead(now)
	})
}

// survey asks a node what it does and has done for the job.
func (u *run) survey(m *member) {
	u.surveys++
	w, node, older := u.wish, m.target.node, u.older
	u.talk(m, func(ctx context.Context, epoch int) {
		found, err := u.lookAt(ctx, w, node)
		if err == nil && older {
			err = u.lookAtPins(ctx, w, node, &found)
		}
		u.mu.Lock()
		defer u.mu.Unlock()
		u.surveys--
		u.pace.moved(0)
		if m.epoch != epoch || u.closed || ctx.Err() != nil {
			return
		}
		u.setSuspect(m, false)
		if err != nil {
			u.troubled(m, troubleOf(err), time.Now())
			return
		}
		u.adopt(m, found, time.Now())
	})
}

// found is what a node has to say of a job.
type found struct {
	// latest is the most telling pull for what the job wants now, or nil.
	latest *opsv1.PullOperation
	round  int
	// rounds is the highest round of any.
	rounds int
	// pinned says that the node keeps the image for the job.
	pinned bool
}

// lookAt surveys a node: what the job no longer wants is cancelled, and let go of.
func (u *run) lookAt(ctx context.Context, w *wish, node nodes.Node) (found, error) {
	var f found
	ops, err := u.nodes.ListPulls(ctx, node)
	if err != nil {
		return f, err
	}
	for _, op := range ops {
		work, params, round, ours := w.parse(op.GetUid())
		if !ours {
			continue
		}
		over := op.GetFinishTime() != nil
		if work != w.work || params != w.params && op.GetPhase() != opsv1.PullPhase_PULL_SUCCEEDED {
			if over {
				continue
			}
			if _, err := u.nodes.CancelPull(ctx, node, op.GetUid(), cancelReason+"it has been changed"); err != nil && !notFound(err) {
				return f, err
			}
			continue
		}
		if params == w.params {
			f.rounds = max(f.rounds, round)
		}
		if f.latest == nil || telling(op) > telling(f.latest) || telling(op) == telling(f.latest) && round > f.round {
			f.latest, f.round = op, round
		}
	}
	return f, nil
}

// lookAtPins surveys what a node keeps for the job: what it no longer wants is let go of, and what it wants tells of a
// pull that the node has forgotten.
func (u *run) lookAtPins(ctx context.Context, w *wish, node nodes.Node, f *found) error {
	pins, err := u.nodes.ListPins(ctx, node)
	if err != nil {
		return err
	}
	for _, pin := range pins {
		switch {
		case pin.GetOwner() != w.request.GetOwner():
		case sameImage(pin.GetImage(), w.request.GetImage()):
			f.pinned = f.pinned || !pin.GetGone()
		default:
			if _, err := u.nodes.ReleasePins(ctx, node, pin.GetOwner(), pin.GetImageId()); err != nil {
				return err
			}
		}
	}
	return nil
}

// sameImage compares references as they are written in pods.
func sameImage(a, b string) bool {
	x, errX := reference.ParseNormalizedNamed(a)
	y, errY := reference.ParseNormalizedNamed(b)
	if errX != nil || errY != nil {
		return a == b
	}
	dx, okX := x.(reference.Digested)
	dy, okY := y.(reference.Digested)
	if okX && okY { // a tag beside a digest does not count
		return x.Name() == y.Name() && dx.Digest() == dy.Digest()
	}
	return reference.TagNameOnly(x).String() == reference.TagNameOnly(y).String()
}

// telling ranks pulls: one that succeeded, one that runs, one that failed.
func telling(op *opsv1.PullOperation) int {
	switch {
	case op.GetPhase() == opsv1.PullPhase_PULL_SUCCEEDED:
		return 2
	case op.GetFinishTime() == nil:
		return 1
	}
	return 0
}

// adopt takes over what a survey found.
func (u *run) adopt(m *member, f found, now time.Time) {
	stale := m.stale
	m.round, m.retryAt, m.stale = f.rounds, time.Time{}, false
	op := f.latest
	switch {
	case op == nil && f.pinned:
		u.succeed(m, nil, now)
	case op == nil:
		if m.away = (trouble{}); !m.untaken { // else it has to take the command first
			u.present(m)
		}
		u.setPhase(m, pending)
	case op.GetPhase() == opsv1.PullPhase_PULL_SUCCEEDED:
		u.succeed(m, op, now)
	case op.GetFinishTime() == nil:
		m.round = f.round
		u.pull(m, now)
	// The node's clock and the API server's may differ: begun is for a run that another controller goes on with.
	case stale, op.GetFinishTime().AsTime().Before(u.wish.begun), op.GetPhase() == opsv1.PullPhase_PULL_CANCELLED && overdueText(op) == "":
		m.round++ // the job has begun again since
		u.setPhase(m, pending)
	default:
		u.present(m)
		m.op = op
		u.told.count = maxFailureEvents // told by the controller that saw it
		reason, message := op.GetReason(), op.GetMessage()
		if text := overdueText(op); text != "" {
			reason, message = reasonOverdue, text
		}
		u.fail(m, reason, message)
		m.retryAt = now.Add(retryMin)
	}
}

// succeed notes that the node has the image.
func (u *run) succeed(m *member, op *opsv1.PullOperation, now time.Time) {
	u.present(m)
	m.op, m.held, m.retries = op, false, 0
	u.setFraction(m, 1)
	u.setPhase(m, succeeded)
	since := now
	if t := op.GetFinishTime(); t != nil && t.AsTime().Before(now) {
		since = t.AsTime()
	}
	m.retryAt = since.Add(u.wish.renewEvery())
}

// settle notes how a pull has ended.
func (u *run) settle(m *member, op *opsv1.PullOperation, now time.Time) {
	switch {
	case op.GetPhase() == opsv1.PullPhase_PULL_SUCCEEDED:
		u.succeed(m, op, now)
	case op.GetPhase() == opsv1.PullPhase_PULL_CANCELLED && strings.Contains(op.GetMessage(), cancelReason):
		// By this controller, for what has been overtaken by another change.
		m.round++
		u.setPhase(m, pending)
		return
	default:
		u.present(m)
		m.op = op
		message := op.GetMessage()
		if message == "" {
			message = fmt.Sprintf("the node says only: %s, %s", op.GetPhase(), op.GetReason())
		}
		u.fail(m, op.GetReason(), message)
		m.retryAt = now.Add(min(retryMin<<min(m.retries, 10), retryMax))
		m.retries++
	}
	u.metrics.pulled(op, now.Sub(m.begun))
}

// close ends the run: nothing is begun any more, and what is being said to nodes ends. What nodes do goes on.
func (u *run) close() {
	u.mu.Lock()
	defer u.mu.Unlock()
	u.closed = true
	for _, m := range u.members {
		m.hang()
	}
}
