// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package nodeops

import (
	"fmt"
	"maps"
	"slices"
	"time"

	opsv1 "github.com/cri-proxy/cri-proxy/api/ops/v1"
	"github.com/cri-proxy/cri-proxy/controller/retry"
	"github.com/cri-proxy/cri-proxy/controller/rollout/evaluate"
)

// SettlePreparation decides what to do about a preparation that has ended though the pod was not
// changed.
func (s *Session) SettlePreparation(i *Item) {
	w, m := s.State, i.Ops
	w.mu.Lock()
	defer w.mu.Unlock()
	t := m.Upgrade
	if t == nil || t.over || i.Stale || m.State.IsOf(i.Goal) && t.uid == m.State.Operation {
		return
	}
	once, unchanged, held := false, false, false
	switch {
	case t.same:
		m.Upgrade = nil
		return
	case t.failed != nil && !t.stale:
		if !t.takenBack {
			t.takenBack = true
			s.abort(m.node, t, t.failed.Message)
		}
		m.gaveWay = false
	case t.failed != nil:
		once = t.stale
		m.gaveWay = m.gaveWay && t.stale && !t.commitRequested
		held = m.gaveWay
	case t.op.GetFinishTime() != nil && t.op.GetPhase() != opsv1.Phase_PHASE_SUCCEEDED:
		c := evaluate.Culprit(t.op)
		t.failed = &evaluate.Failure{Reason: evaluate.FailPreparation, Message: evaluate.AccountOf(t.op)}
		if c.GetReason() != "" {
			t.failed.Reason = c.GetReason()
		}
		// A restart takes precedence over a preparation, which then finds another container.
		// Neither is the pod's fault.
		m.gaveWay = !t.commitRequested && (c.GetReason() == opsv1.ReasonCancelled || m.gaveWay &&
			c.GetReason() == opsv1.ReasonExpectedIDDiffers)
		held = c.GetReason() == opsv1.ReasonHoldTimeout || m.gaveWay
		once, unchanged = retryable(c.GetReason()), c.GetReason() == opsv1.ReasonImageUnchanged
	case t.op.GetPhase() != opsv1.Phase_PHASE_PREPARED && !opsv1.Armed(t.op.GetPhase()):
		if left := t.begun.Add(s.Strategy.Deadline + prepareSlack).Sub(s.Now); left > 0 {
			*s.Wait = retry.Sooner(*s.Wait, left)
			return
		}
		t.failed = &evaluate.Failure{Reason: evaluate.FailDeadline,
			Message: fmt.Sprintf("node %s has not made the images ready within %s", m.node.Name, s.Strategy.Deadline)}
		t.takenBack = true
		s.abort(m.node, t, "it took too long")
	default:
		m.gaveWay = false
		return
	}
	switch {
	case held, once && m.tries < roundsMax:
		if m.round++; !held { // a budget may hold a pod back for days
			m.tries++
		}
		m.Upgrade = nil
		after := min(retryInterval<<m.tries, retryIntervalMax)
		if m.gaveWay {
			after = gaveWayInterval
		}
		s.again(m, after)
	case i.Goal.Undo, unchanged:
		// A rollback must come, with the node's help or without. An image that runs already needs
		// no help.
		m.Plain, m.Upgrade = true, nil
	}
}

// again has the pod looked at again after a while.
func (s *Session) again(m *PodOps, after time.Duration) {
	m.retryAt, *s.Wait = s.Now.Add(after), retry.Sooner(*s.Wait, after)
}

// Preparation is how far the node is with everything that the pod needs.
func (s *Session) Preparation(i *Item) evaluate.Readiness {
	return min(s.tagsChecked(i), s.imagesReady(i))
}

// imagesReady is how far the node is with the images.
func (s *Session) imagesReady(i *Item) evaluate.Readiness {
	if len(i.Status.Images) == 0 || i.Ops.Plain {
		return evaluate.Prepared
	}
	if _, running := evaluate.RunningIDs(i.Pod, slices.Sorted(maps.Keys(i.Status.Images))); !running {
		return evaluate.Prepared // there is nothing to take over from
	}
	s.State.mu.Lock()
	defer s.State.mu.Unlock()
	t := i.Ops.Upgrade
	switch {
	case t == nil || t.uid != s.upgradeUID(i):
		if s.Now.Before(i.Ops.retryAt) {
			return evaluate.Preparing
		}
		return evaluate.Unprepared
	case t.op.GetPhase() == opsv1.Phase_PHASE_PREPARED || opsv1.Armed(t.op.GetPhase()):
		return evaluate.Prepared
	}
	return evaluate.Preparing
}
