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

// run has the node carry out an operation, and follows it until it has ended: what the node says
// goes into t. begin starts the operation, or finds it if it was started before. pod is the name of
// the pod.
func (s *Session) run(
	t *nodeOperation, node nodes.Node, pod string, begin func(context.Context) (*opsv1.Operation, error),
) {
	w, deadline := s.State, s.Strategy.Deadline
	f := nodes.Follow[*opsv1.Operation]{
		Node: node, UID: t.uid, For: w.request, Renew: watchRenew, Retry: backOff,
		Begin: func(ctx context.Context) (*opsv1.Operation, error) {
			op, err := begin(ctx)
			w.noteAPI(t, err)
			return op, err
		},
		Each: func(_ context.Context, _, op *opsv1.Operation) bool {
			w.note(t, op)
			return false // note has
		},
		Until: func(op *opsv1.Operation) (nodes.Next, time.Duration) {
			if slices.ContainsFunc(op.GetContainers(), func(c *opsv1.ContainerOperation) bool {
				return c.GetPull().GetReason() == opsv1.ReasonCredentialsNeeded
			}) {
				return nodes.Again, 0
			}
			return nodes.GoOn, 0
		},
		GiveUp: func(err error, silent time.Duration, _ bool) bool { return w.givesUp(t, err, silent, deadline, pod) },
		End:    func(context.Context, nodes.State[*opsv1.Operation]) bool { return false },
	}
	key := f.Key() // f holds much, and lasts as long as the follow only
	t.forget = func() { w.tracker.Forget(key) }
	w.tracker.Ensure(f)
}

// givesUp writes into t how an operation has ended for the controller because of an error, and
// returns true if it has. The node may be silent until the deadline.
func (w *State) givesUp(t *nodeOperation, err error, silent, deadline time.Duration, pod string) bool {
	if errors.Is(err, errImageThere) {
		w.change(t, func() { t.same = true })
		return true
	}
	why := troubleOf(err)
	if !why.final && !why.stale {
		if silent < deadline {
			return false
		}
		if dryrun.IsAPIStatus(err) {
			why.Failure = dryrun.TooLong(pod, deadline, err)
		}
	}
	w.change(t, func() { t.failed, t.stale, t.answered = &why.Failure, why.stale, true })
	return true
}

// errImageThere: a container already has the image that admission makes of the goal's.
var errImageThere = errors.New("the image is there")

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

// note keeps what the node says. An operation that has finished does not change any more.
func (w *State) note(t *nodeOperation, op *opsv1.Operation) {
	w.change(t, func() {
		t.answered = true
		if t.op.GetFinishTime() != nil {
			return
		}
		if was := t.op.GetCreateTime(); was != nil && !proto.Equal(was, op.GetCreateTime()) {
			t.commitRequested = false // the node has lost its journal and begun anew
		}
		t.op = op
	})
}

// change changes an operation that is still of interest, and wakes the reconciler.
func (w *State) change(t *nodeOperation, f func()) {
	w.mu.Lock()
	over := t.over
	if !over {
		f()
	}
	w.mu.Unlock()
	if !over {
		w.wake()
	}
}

// wake has the rollout reconciled. The caller does not hold the mutex.
func (w *State) wake() { w.tracker.Wake(w.request) }
