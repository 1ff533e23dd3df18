// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package imagepull

import (
	"context"
	"time"

	"github.com/sirupsen/logrus"
	"sigs.k8s.io/controller-runtime/pkg/reconcile"

	opsv1 "github.com/cri-proxy/cri-proxy/api/ops/v1"
	"github.com/cri-proxy/cri-proxy/controller/imagepull/command"
	"github.com/cri-proxy/cri-proxy/controller/imagepull/spec"
	"github.com/cri-proxy/cri-proxy/controller/nodes"
	"github.com/cri-proxy/cri-proxy/controller/workerpool"
)

// jobState is one job at work: the table of its nodes, and the calls to them. The job's reconcile
// owns it; what the calls bring is in the inbox.
type jobState struct {
	workers *workerpool.Pool
	tracker *nodes.Tracker[*opsv1.PullOperation]
	log     logrus.FieldLogger
	command *command.Client
	memory  *memory
	inbox   *inbox // of the memory
	request reconcile.Request
	table   *table
}

// call is a call to a node that is under way.
type call struct {
	// stop ends the call early. ended is closed when the call has ended.
	stop  func()
	ended <-chan struct{}
	// key is that of the pull; the zero key is that of a probe.
	key nodes.Key

	result // guarded by the inbox
}

// result is what has become of a call.
type result struct {
	over bool
	// found or err is what a probe has found.
	found command.Found
	err   error
	// overdue is how a pull has ended that was overdue. The tracker knows of other pulls.
	overdue *opsv1.PullOperation
}

// probes says that the call is a probe.
func (c *call) probes() bool { return c.key == nodes.Key{} }

// newJobState begins with a job. With resume, another controller may have been at work on it. With
// again, the job had ended, and the failures from before do not count.
func newJobState(r *Reconciler, s *spec.Spec, m *memory, resume, again bool) *jobState {
	log := r.Log.WithFields(logrus.Fields{"job": s.Job.String(), "image": s.Request.GetImage()})
	j := &jobState{
		workers: r.workers, tracker: r.tracker, log: log, command: command.New(r.Nodes, r.APIReader, m.inbox.noteKeys),
		memory: m, inbox: &m.inbox, request: reconcile.Request{NamespacedName: s.Job},
		table: newTable(s, r.Metrics, log, time.Now()),
	}
	j.table.older = resume
	j.table.setSpec(s, resume)
	j.takeBack()
	j.table.arrangeAll(time.Now())
	for _, n := range j.table.nodes {
		n.staleFailures = again
	}
	return j
}

// apply takes up a job and nodes that have changed.
func (j *jobState) apply(s *spec.Spec, now time.Time) {
	gone := j.table.setSpec(s, false)
	j.takeBack()
	j.table.arrangeAll(now)
	// A node that was deleted does not answer, and there is no harm in asking.
	j.cleanUp(gone, true, opsv1.CancelCodeNotChosen, func() {})
}

// step takes in what the nodes have said, and begins all that can begin: probes, then pulls in the
// order of the nodes. It looks only at nodes of which there is something new.
func (j *jobState) step(now time.Time) {
	t := j.table
	for _, n := range j.inbox.open(t) {
		if t.byName[n.name()] == n && j.takeIn(n, now) {
			t.arrange(n, now)
		}
	}
	for _, n := range t.schedule.takeDue(now) {
		t.arrange(n, now)
	}
	for _, n := range t.schedule.takeAdopted() {
		j.pull(n)
	}
	for t.probes < command.MaxAtOnce {
		n := t.schedule.nextToProbe(now)
		if n == nil {
			break
		}
		j.probe(n)
	}
	for free := t.spec.Parallelism() - j.memory.leaving(); t.unverified == 0 && t.pulling() < free; {
		n := t.schedule.nextToPull()
		if n == nil {
			break
		}
		t.beginNext(n, now)
		j.pull(n)
	}
	j.inbox.wait(t.schedule.waiting(), len(t.nodes))
}

// takeIn takes in what has become of the call to a node, and says whether the call has ended.
func (j *jobState) takeIn(n *nodeState, now time.Time) (ended bool) {
	c, t := n.call, j.table
	if c == nil {
		return false
	}
	r := j.inbox.resultOf(c)
	if !c.probes() {
		return j.takeInPull(n, r, now)
	}
	if !r.over {
		return false
	}
	n.call = nil
	t.probes--
	t.throttle.Add(0)
	if mark(&n.unverified, &t.unverified, false); r.err != nil {
		t.unreached(n, command.TroubleOf(r.err), now)
	} else {
		t.adopt(n, r.found, now)
	}
	return true
}

func (j *jobState) takeInPull(n *nodeState, r result, now time.Time) (ended bool) {
	s, _ := j.tracker.Get(n.call.key)
	if !r.over {
		if s.Op != nil && s.Op != n.op && !s.Finished() {
			j.table.progress(n, s.Op)
		}
		return false
	}
	j.tracker.Forget(n.call.key)
	n.call = nil
	switch {
	case s.Finished():
		j.table.finish(n, s.Op, now)
	case r.overdue != nil:
		j.table.finish(n, r.overdue, now)
	default:
		j.table.yield(n, s.Err, command.TroubleOf(s.Err), s.Since, now)
	}
	return true
}

// probe asks a node what it does and has done for the job.
func (j *jobState) probe(n *nodeState) {
	t := j.table
	t.probes++
	s, node, older, before := t.spec, n.target.Node, t.older, n.quiet
	ctx, stop := context.WithCancel(context.Background())
	ended := make(chan struct{})
	c := &call{stop: stop, ended: ended}
	n.call, n.quiet = c, ended
	j.workers.Do(func(running context.Context) {
		defer close(ended)
		defer stop()
		defer context.AfterFunc(running, stop)()
		waitFor(ctx, before)
		found, err := j.command.Probe(ctx, s, node, older)
		if ctx.Err() == nil {
			j.inbox.noteEnd(n, c, result{over: true, found: found, err: err})
			j.tracker.Wake(j.request)
		}
	})
}

// close ends the calls to nodes. What the nodes do goes on.
func (j *jobState) close() {
	for _, n := range j.table.nodes {
		j.table.interrupt(n)
	}
}
