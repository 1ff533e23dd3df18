// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package imagepull

import (
	"context"
	"sync"
	"time"

	"golang.org/x/sync/errgroup"

	"github.com/cri-proxy/cri-proxy/controller/imagepull/command"
	"github.com/cri-proxy/cri-proxy/controller/imagepull/spec"
	"github.com/cri-proxy/cri-proxy/controller/retry"
)

// cleanUpTimeout is how long nodes that do not answer are told to forget a job.
const cleanUpTimeout = 30 * time.Second

// cleanup is a node that is being told to forget a job. It outlasts the jobState: a job that ends,
// and begins again, takes over a node that it chooses again.
type cleanup struct {
	// pulling says that the node may be pulling for the job.
	pulling bool
	// stop ends the cleanup early. ended is closed when the node is told nothing more.
	stop  func()
	ended chan struct{}
	// tell tells the node once.
	tell func(running context.Context) error
}

// newCleanup notes that a node is to forget the job: with pins, the node's pins go too. The node
// counts as pulling until it has answered, or the cleanup has ended.
func (j *jobState) newCleanup(n *nodeState, s *spec.Spec, pins bool, code string) *cleanup {
	ctx, stop := context.WithCancel(context.Background())
	before, node := n.quiet, n.target.Node
	c := &cleanup{pulling: n.mayPull(), stop: stop, ended: make(chan struct{})}
	c.tell = func(running context.Context) error {
		defer context.AfterFunc(running, stop)()
		if !waitFor(ctx, before) {
			return nil
		}
		err := j.command.CleanUp(ctx, s, node, pins, code)
		if err != nil && ctx.Err() == nil && !command.TroubleOf(err).Final {
			return err
		}
		return nil
	}
	n.quiet = c.ended
	if j.memory.cleanups == nil {
		j.memory.cleanups = map[string]*cleanup{}
	}
	j.memory.cleanups[n.name()] = c
	return c
}

// waitFor waits until a call has ended, and says whether to go on: ctx is not done. There was no
// call if ended is nil.
func waitFor(ctx context.Context, ended <-chan struct{}) bool {
	if ended != nil {
		select {
		case <-ended:
		case <-ctx.Done():
		}
	}
	return ctx.Err() == nil
}

// cleanUp cancels the job's pulls on the nodes, with code, and, with pins, releases its pins. It
// goes on until all nodes have answered or cleanUpTimeout has passed, and then calls done.
func (j *jobState) cleanUp(nodes []*nodeState, pins bool, code string, done func()) {
	if len(nodes) == 0 {
		return
	}
	var left []*cleanup
	for _, n := range nodes {
		left = append(left, j.newCleanup(n, j.table.spec, pins, code))
	}
	j.workers.Do(func(ctx context.Context) {
		ctx, cancel := context.WithTimeout(ctx, cleanUpTimeout)
		defer cancel()
		for wait := retryInterval; ; wait = min(2*wait, retryIntervalMax) {
			left = j.tellAll(ctx, left)
			if len(left) == 0 || !retry.Sleep(ctx, wait) {
				break
			}
		}
		if len(left) > 0 {
			j.log.WithField("nodes", len(left)).Warn("nodes could not be told to leave the job alone: " +
				"what they pull goes on, and what they pin expires")
		}
		for _, c := range left {
			j.endCleanup(c)
		}
		done()
	})
}

// tellAll tells each node once, and returns those that have to be told again.
func (j *jobState) tellAll(ctx context.Context, nodes []*cleanup) (left []*cleanup) {
	var mu sync.Mutex
	var g errgroup.Group
	g.SetLimit(command.MaxAtOnce)
	for _, c := range nodes {
		g.Go(func() error {
			if c.tell(ctx) == nil && ctx.Err() == nil {
				j.endCleanup(c)
				return nil
			}
			mu.Lock()
			defer mu.Unlock()
			left = append(left, c)
			return nil
		})
	}
	_ = g.Wait() // none returns an error
	return left
}

// endCleanup notes that a node is told nothing more.
func (j *jobState) endCleanup(c *cleanup) {
	c.stop()
	close(c.ended)
	j.inbox.noteCleanedUp()
	if c.pulling {
		j.tracker.Wake(j.request)
	}
}

// cleanUpAll is cleanUp on all nodes of the job. It returns how many these are.
func (j *jobState) cleanUpAll(pins bool, code string, done func()) int {
	j.cleanUp(j.table.nodes, pins, code, done)
	return len(j.table.nodes)
}

// takeBack takes over nodes that are being told to forget the job, and that it chooses again.
func (j *jobState) takeBack() {
	t := j.table
	for name, c := range j.memory.cleanups {
		n := t.byName[name]
		if n == nil {
			continue
		}
		c.stop()
		n.quiet = c.ended
		mark(&n.lingering, &t.lingering, c.pulling && !c.over())
		delete(j.memory.cleanups, name)
	}
}

// over says that the node is told nothing more.
func (c *cleanup) over() bool {
	select {
	case <-c.ended:
		return true
	default:
		return false
	}
}

// leaving is how many nodes may be pulling that the job does not choose any more.
func (m *memory) leaving() (pulling int) {
	for name, c := range m.cleanups {
		switch {
		case c.over():
			delete(m.cleanups, name)
		case c.pulling:
			pulling++
		}
	}
	return pulling
}
