// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package imagepull

import (
	"context"
	"sync"
	"time"

	"github.com/sirupsen/logrus"

	opsv1 "github.com/cri-proxy/cri-proxy/api/ops/v1"
	"github.com/cri-proxy/cri-proxy/controller/crew"
	"github.com/cri-proxy/cri-proxy/controller/imagepull/command"
	"github.com/cri-proxy/cri-proxy/controller/imagepull/spec"
	"github.com/cri-proxy/cri-proxy/controller/pullsecrets"
)

// jobState is one job at work: the table of its nodes, and the goroutines that talk to them.
type jobState struct {
	crew    *crew.Crew
	metrics *Metrics
	log     logrus.FieldLogger
	calls   *command.Client
	// wake lets the reconciler look at the job, soon.
	wake func()

	mu    sync.Mutex
	table *table
	// closed says that nothing begins any more.
	closed bool
	// woken says that the reconciler has been woken, or wakes by itself soon.
	woken bool
	// planned is when the reconciler looks by itself, at the latest; zero means never.
	planned time.Time
}

// newJobState begins with a job. With resume, another controller may have been at work on it. With
// again, the job had ended, and the failures from before do not count.
func newJobState(r *Reconciler, s *spec.Spec, resume, again bool, wake func()) *jobState {
	log := r.Log.WithFields(logrus.Fields{"job": s.Job.String(), "image": s.Request.GetImage()})
	j := &jobState{
		crew: r.crew, metrics: r.Metrics, wake: wake, log: log,
		table: &table{metrics: r.Metrics, log: log, spec: s, byName: map[string]*nodeState{}, older: resume},
	}
	j.calls = command.New(r.Nodes, r.APIReader, j.noteKeys)
	j.table.setSpec(s, resume)
	for _, n := range j.table.nodes {
		n.staleFailures = again
	}
	return j
}

// apply takes up a job and nodes that may have changed, and goes on with what can be done.
func (j *jobState) apply(s *spec.Spec) {
	j.mu.Lock()
	defer j.mu.Unlock()
	if j.closed {
		return
	}
	gone := j.table.setSpec(s, false)
	active := countActive(gone)
	j.table.removed += active
	// A node that was deleted does not answer, and there is no harm in asking.
	j.cleanUp(gone, true, opsv1.CancelCodeNotChosen, func(int) {
		j.mu.Lock()
		defer j.mu.Unlock()
		j.table.removed -= active
		j.schedule(time.Now())
	})
	j.schedule(time.Now())
}

func countActive(nodes []*nodeState) (count int) {
	for _, n := range nodes {
		if n.phase == active {
			count++
		}
	}
	return count
}

// schedule begins all that can begin: probes, then pulls in the order of the nodes. The caller
// holds the mutex.
func (j *jobState) schedule(now time.Time) {
	if j.closed {
		return
	}
	t := j.table
	for _, n := range t.nodes {
		switch {
		case n.busy() || n.phase == succeeded || n.gaveUp():
		case n.phase == active: // a probe has found it so
			j.pull(n)
		case !n.target.Ready:
			t.leaveOut(n, now)
		case n.phase != pending && !now.Before(n.retryAt) && t.probes < command.MaxAtOnce:
			j.probe(n)
		}
	}
	if t.unverified > 0 {
		return
	}
	parallelism := t.spec.Parallelism()
	for _, n := range t.nodes {
		if t.full(parallelism) {
			return
		}
		if n.phase == pending && !n.busy() && n.target.Ready && !now.Before(n.retryAt) {
			t.begin(n, now)
			j.pull(n)
		}
	}
	if !t.spec.Never {
		return
	}
	for _, n := range t.nodes {
		if t.full(parallelism) {
			return
		}
		if !n.busy() && n.target.Ready && !now.Before(n.retryAt) && (n.phase == succeeded || n.gaveUp()) {
			n.verifying = n.phase == succeeded
			n.round++
			t.begin(n, now)
			j.pull(n)
		}
	}
}

// notify wakes the reconciler if there is something to write. The caller holds the mutex.
func (j *jobState) notify() {
	if j.woken || j.closed {
		return
	}
	idle := j.table.idle()
	if p := &j.table.throttle; p.WorthWaking(len(j.table.nodes), idle) {
		j.woken = true
		j.wake()
	}
}

// ensureWakeup wakes the reconciler if a node that was busy at the last reconcile needs attention
// before the next planned one. The caller holds the mutex.
func (j *jobState) ensureWakeup(now time.Time) {
	if j.woken || j.closed {
		return
	}
	if next := j.table.nextWakeup(now); next > 0 && (j.planned.IsZero() || now.Add(next).Before(j.planned)) {
		j.woken = true
		j.wake()
	}
}

// talk runs f in the node's goroutine. f gets the epoch to which it belongs. The caller holds the
// mutex.
func (j *jobState) talk(n *nodeState, f func(ctx context.Context, epoch int)) {
	epoch, ended := n.epoch, make(chan struct{})
	n.ended = ended
	j.crew.Do(func(ctx context.Context) {
		ctx, cancel := context.WithCancel(ctx)
		defer cancel()
		j.mu.Lock()
		n.cancel = cancel
		if n.epoch != epoch {
			cancel()
		}
		j.mu.Unlock()
		f(ctx, epoch)
		j.mu.Lock()
		defer j.mu.Unlock()
		n.ended, n.cancel = nil, nil
		close(ended)
		now := time.Now()
		j.schedule(now)
		j.notify()
		j.ensureWakeup(now)
	})
}

// change runs f with the mutex, unless the node has begun again since, and wakes the reconciler if
// the change is worth it.
func (j *jobState) change(n *nodeState, epoch int, f func()) {
	j.mu.Lock()
	defer j.mu.Unlock()
	if n.epoch != epoch || j.closed {
		return
	}
	f()
	j.notify()
}

// probe asks a node what it does and has done for the job. The caller holds the mutex.
func (j *jobState) probe(n *nodeState) {
	t := j.table
	t.probes++
	s, node, older := t.spec, n.target.Node, t.older
	j.talk(n, func(ctx context.Context, epoch int) {
		found, err := j.calls.Probe(ctx, s, node, older)
		j.mu.Lock()
		defer j.mu.Unlock()
		t.probes--
		t.throttle.Add(0)
		if n.epoch != epoch || j.closed || ctx.Err() != nil {
			return
		}
		t.setUnverified(n, false)
		if err != nil {
			t.unreached(n, command.TroubleOf(err), time.Now())
			return
		}
		t.adopt(n, found, time.Now())
	})
}

// noteKeys takes up pull secrets that were read. before is nil if they are the first.
func (j *jobState) noteKeys(before, keys *pullsecrets.Keyring) {
	j.mu.Lock()
	defer j.mu.Unlock()
	if before == nil && keys.Asked || len(keys.Wrong) > 0 != (before != nil && len(before.Wrong) > 0) {
		j.table.throttle.Urge()
	}
	j.table.keys = keys
}

// close ends the work on the job: nothing begins any more, and the goroutines end. What the nodes
// do goes on.
func (j *jobState) close() {
	j.mu.Lock()
	defer j.mu.Unlock()
	j.closed = true
	for _, n := range j.table.nodes {
		n.interrupt()
	}
}
