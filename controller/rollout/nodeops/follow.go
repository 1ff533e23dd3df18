// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package nodeops

import (
	"context"
	"errors"
	"slices"
	"time"

	"google.golang.org/protobuf/proto"

	opsv1 "github.com/cri-proxy/cri-proxy/api/ops/v1"
	"github.com/cri-proxy/cri-proxy/controller/apierror"
	"github.com/cri-proxy/cri-proxy/controller/nodes"
	"github.com/cri-proxy/cri-proxy/controller/rollout/dryrun"
)

// operationTracker runs one operation on a node, and writes into the nodeOperation what the node
// says.
type operationTracker struct {
	d    *Driver
	w    *State
	t    *nodeOperation
	node nodes.Node
	// pod is the name of the pod.
	pod string
	// begin starts the operation, or finds it if it was started before.
	begin func(context.Context) (*opsv1.Operation, error)
	// timeout is how long the node may be away.
	timeout time.Duration
}

// start follows the operation in the background until it has ended.
func (c *operationTracker) start() {
	c.d.Crew.Do(func(ctx context.Context) {
		ctx, cancel := context.WithCancel(ctx)
		defer cancel()
		c.w.mu.Lock()
		c.t.cancel = cancel
		over := c.t.over
		c.w.mu.Unlock()
		if !over {
			c.run(ctx)
		}
	})
}

func (c *operationTracker) run(ctx context.Context) {
	var silent time.Time
	for tries := 0; ; tries++ {
		op, err := c.begin(ctx)
		c.w.noteAPI(c.t, err)
		if err == nil {
			silent, tries = time.Time{}, 0
			c.note(op)
			if op.GetFinishTime() != nil {
				return
			}
			if op, err = c.watch(ctx, op.GetUid()); err == nil && op.GetFinishTime() != nil {
				return
			}
		}
		if ctx.Err() != nil {
			return
		}
		if errors.Is(err, errThere) {
			c.change(func() { c.t.same = true })
			return
		}
		if err != nil {
			if t := troubleOf(err); t.final || t.stale {
				c.change(func() { c.t.failed, c.t.stale, c.t.answered = &t.Failure, t.stale, true })
				return
			} else if silent.IsZero() {
				silent = time.Now()
			} else if time.Since(silent) >= c.timeout {
				if dryrun.IsAPIStatus(err) {
					t.Failure = dryrun.TooLong(c.pod, c.timeout, err)
				}
				c.change(func() { c.t.failed, c.t.answered = &t.Failure, true })
				return
			}
		}
		if !Pause(ctx, min(retryInterval<<min(tries, 4), retryIntervalMax)) {
			return
		}
	}
}

// errThere: a container already has the image that admission makes of the goal's.
var errThere = errors.New("the image is there")

// noteAPI counts errors of the API server, so that people are told after some of them.
func (w *State) noteAPI(t *nodeOperation, err error) {
	w.mu.Lock()
	if err == nil {
		t.api = dryrun.Trouble{}
	} else if dryrun.IsAPIStatus(err) {
		t.api.Note(err, time.Now())
	}
	tell := t.api.Count == apierror.Tries
	w.mu.Unlock()
	if tell {
		w.wake()
	}
}

// watch follows the operation until it has ended, or needs credentials, or until there were no news
// for watchRenew.
func (c *operationTracker) watch(ctx context.Context, uid string) (*opsv1.Operation, error) {
	watching, cancel := context.WithCancel(ctx)
	defer cancel()
	patience := time.AfterFunc(watchRenew, cancel)
	defer patience.Stop()
	var last *opsv1.Operation
	err := c.d.Nodes.WatchOperation(watching, c.node, uid, func(op *opsv1.Operation) {
		patience.Reset(watchRenew)
		last = op
		c.note(op)
		if slices.ContainsFunc(op.GetContainers(),
			func(x *opsv1.ContainerOperation) bool {
				return x.GetPull().GetReason() == opsv1.ReasonCredentialsNeeded
			}) {
			cancel()
		}
	})
	if watching.Err() != nil {
		err = nil // it is asked again
	}
	return last, err
}

// note keeps what the node says. An operation that has finished does not change any more.
func (c *operationTracker) note(op *opsv1.Operation) {
	c.change(func() {
		c.t.answered = true
		if c.t.op.GetFinishTime() != nil {
			return
		}
		if was := c.t.op.GetCreateTime(); was != nil && !proto.Equal(was, op.GetCreateTime()) {
			c.t.commitRequested = false // the node has lost its journal and begun anew
		}
		c.t.op = op
	})
}

func (c *operationTracker) change(f func()) {
	c.w.mu.Lock()
	over := c.t.over
	if !over {
		f()
	}
	c.w.mu.Unlock()
	if !over {
		c.w.wake()
	}
}

// Pause waits and says whether to go on.
func Pause(ctx context.Context, d time.Duration) bool {
	timer := time.NewTimer(d)
	defer timer.Stop()
	select {
	case <-timer.C:
		return true
	case <-ctx.Done():
		return false
	}
}
