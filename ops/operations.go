// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package ops

import (
	"context"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/sirupsen/logrus"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	opsv1 "github.com/cri-proxy/cri-proxy/api/ops/v1"
	"github.com/cri-proxy/cri-proxy/ops/crinode"
	"github.com/cri-proxy/cri-proxy/ops/operation"
	"github.com/cri-proxy/cri-proxy/ops/store"
)

const (
	// maxActive bounds unfinished operations: more than a node has containers (kubelet's
	// default is 110 pods) would only be a caller gone wild.
	maxActive = 1024
	// finished operations are answered for an hour, so that a controller that was away that
	// long still learns the outcome, and at most maxFinished of them.
	keepFinished = time.Hour
	maxFinished  = 2000
)

// operations are those that the node knows: unfinished ones, and finished ones for a while.
type operations struct {
	disk *store.Store
	log  logrus.FieldLogger

	// queue says that there are operations which are accepted and not yet started.
	queue chan struct{}
	// late says that there are ends which could not be written.
	late chan struct{}

	mu      sync.Mutex // guards all following fields
	all     map[string]*operation.Operation
	waiting []*operation.Operation
	closed  bool
	// unwritten are finished operations whose end the journal does not have. The next process would
	// resume them, and restart a container that was reported as left alone.
	unwritten []*operation.Operation
}

func newOperations(disk *store.Store, log logrus.FieldLogger) *operations {
	return &operations{
		disk: disk, log: log, queue: make(chan struct{}, 1), late: make(chan struct{}, 1),
		all: map[string]*operation.Operation{},
	}
}

// accept begins an operation: once it returns nil, the operation is in the journal. A command whose
// UID is known is taken as repeated.
func (t *operations) accept(c operation.Command, pod *opsv1.PodRef) (*operation.Operation, error) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.closed {
		return nil, status.Error(codes.Unavailable, "cri-proxy is shutting down; try again")
	}
	uid := c.Restart.GetUid()
	if known := t.all[uid]; known != nil {
		return known, known.Repeat(c)
	}
	active := t.activeLocked()
	if active >= maxActive {
		return nil, status.Errorf(codes.ResourceExhausted, "%d operations are unfinished on this node, "+
			"which is the most it takes; wait for some to finish (cri-proxy ctl ops --active)", active)
	}
	if err := t.expireLocked(time.Now()); err != nil {
		return nil, status.Error(codes.Internal, err.Error())
	}
	o := operation.New(c, pod, t.disk)
	if err := o.Accept(); err != nil {
		return nil, status.Errorf(codes.Internal, "the operation was not accepted and nothing was done: %v", err)
	}
	t.all[uid] = o
	t.waiting = append(t.waiting, o)
	select {
	case t.queue <- struct{}{}:
	default:
	}
	return o, nil
}

// add takes an operation from the journal. One that has not finished waits to be taken up again.
func (t *operations) add(o *operation.Operation) {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.all[o.UID()] = o
	if !o.Finished() {
		t.waiting = append(t.waiting, o)
	}
}

// sortWaiting puts the operations of the journal in order: those that wait for the same slot get it
// in the order in which they came.
func (t *operations) sortWaiting() {
	t.mu.Lock()
	defer t.mu.Unlock()
	slices.SortStableFunc(t.waiting, func(a, b *operation.Operation) int {
		return a.CreateTime().Compare(b.CreateTime())
	})
}

// next returns the operations that wait to be started. None waits after that.
func (t *operations) next() []*operation.Operation {
	t.mu.Lock()
	defer t.mu.Unlock()
	waiting := t.waiting
	t.waiting = nil
	return waiting
}

// close accepts no more operations, and reports whether all ends are written.
func (t *operations) close() bool {
	t.mu.Lock()
	t.closed = true
	t.mu.Unlock()
	return t.writeEnds()
}

func (t *operations) activeLocked() int {
	n := 0
	for _, o := range t.all {
		if !o.Finished() {
			n++
		}
	}
	return n
}

// active returns the operations that have not finished.
func (t *operations) active() []*operation.Operation {
	t.mu.Lock()
	defer t.mu.Unlock()
	var all []*operation.Operation
	for _, o := range t.all {
		if !o.Finished() {
			all = append(all, o)
		}
	}
	return all
}

// lookup returns the operation, or nil.
func (t *operations) lookup(uid string) *operation.Operation {
	t.mu.Lock()
	defer t.mu.Unlock()
	return t.all[uid]
}

// list returns all operations, newest first.
func (t *operations) list() []*opsv1.Operation {
	t.mu.Lock()
	ops := make([]*operation.Operation, 0, len(t.all))
	for _, o := range t.all {
		ops = append(ops, o)
	}
	t.mu.Unlock()
	out := make([]*opsv1.Operation, 0, len(ops))
	for _, o := range ops {
		out = append(out, o.Snapshot())
	}
	slices.SortFunc(out, func(a, b *opsv1.Operation) int {
		return b.GetCreateTime().AsTime().Compare(a.GetCreateTime().AsTime())
	})
	return out
}

// expire forgets finished operations that are too old or too many.
func (t *operations) expire() error {
	t.mu.Lock()
	defer t.mu.Unlock()
	return t.expireLocked(time.Now())
}

// expireLocked forgets finished operations that are too old or too many. The caller holds t.mu.
func (t *operations) expireLocked(now time.Time) error {
	type done struct {
		uid string
		at  time.Time
	}
	var finished []done
	for uid, o := range t.all {
		if at, ok := o.FinishedAt(); ok && !o.IsLeftAlone() {
			finished = append(finished, done{uid, at})
		}
	}
	slices.SortFunc(finished, func(a, b done) int { return a.at.Compare(b.at) })
	var gone []string
	for i, d := range finished {
		if now.Sub(d.at) > keepFinished || len(finished)-i > maxFinished {
			gone = append(gone, d.uid)
		}
	}
	if err := t.disk.Journal.Remove(gone); err != nil {
		return err
	}
	for _, uid := range gone {
		delete(t.all, uid)
	}
	return nil
}

// writeLater queues the end of the operation to be written as soon as the journal can be written.
func (t *operations) writeLater(o *operation.Operation) {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.unwritten = append(t.unwritten, o)
	select {
	case t.late <- struct{}{}:
	default:
	}
}

// writePause is how long writeAgain waits between its tries: a disk that is full stays so for a
// while.
const writePause = time.Second

// writeAgain writes ends that could not be written, until ctx ends.
func (t *operations) writeAgain(ctx context.Context) {
	for {
		select {
		case <-t.late:
		case <-ctx.Done():
			return
		}
		for crinode.Sleep(ctx, writePause) == nil && !t.writeEnds() {
			continue
		}
	}
}

// writeEnds tries to write the ends that are not written, and reports whether it has written all.
func (t *operations) writeEnds() bool {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.unwritten = slices.DeleteFunc(t.unwritten, func(o *operation.Operation) bool {
		return t.all[o.UID()] != o || o.Save() == nil
	})
	return len(t.unwritten) == 0
}

// unleavable returns the operations that Run would not leave at once, ordered: they wait for a
// container to stop, which nothing cuts short, or are about to start its successor. Run can leave
// all others at any time.
func (t *operations) unleavable() []string {
	t.mu.Lock()
	defer t.mu.Unlock()
	var uids []string
	for uid, o := range t.all {
		// An operation that finishes meanwhile has no such container any more.
		if !o.Finished() && slices.ContainsFunc(o.Records(), busy) {
			uids = append(uids, uid)
		}
	}
	slices.SortFunc(uids, strings.Compare)
	return uids
}

func busy(c store.Container) bool { return c.Unleavable() }
