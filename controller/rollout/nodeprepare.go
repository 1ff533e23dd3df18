// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package rollout

import (
	"fmt"
	"maps"
	"slices"
	"time"

	opsv1 "github.com/cri-proxy/cri-proxy/api/ops/v1"
)

// SettlePreparation decides what to do about a preparation that has ended though the pod was not changed.
func (s *session) settlePreparation(i *item) {
	w, m := s.state, i.m
	w.mu.Lock()
	defer w.mu.Unlock()
	t := m.visit
	if t == nil || t.over || i.stale || m.mark.by(i.goal) && t.uid == m.mark.Operation {
		return
	}
	once, unchanged, held := false, false, false
	switch {
	case t.same:
		m.visit = nil
		return
	case t.failed != nil && !t.stale:
		if !t.takenBack {
			t.takenBack = true
			s.abort(m.node, t, t.failed.message)
		}
		m.gaveWay = false
	case t.failed != nil:
		once = t.stale
		m.gaveWay = m.gaveWay && t.stale && !t.committed
		held = m.gaveWay
	case t.op.GetFinishTime() != nil && t.op.GetPhase() != opsv1.Phase_PHASE_SUCCEEDED:
		c := culprit(t.op)
		t.failed = &failure{failPreparation, accountOf(t.op)}
		if c.GetReason() != "" {
			t.failed.reason = c.GetReason()
		}
		// A restart takes precedence over a preparation, which then finds another container. Neither is the pod's fault.
		m.gaveWay = !t.committed && (c.GetReason() == reasonCancelled || m.gaveWay && c.GetReason() == reasonDiffers)
		held = c.GetReason() == reasonHeld || m.gaveWay
		once, unchanged = slices.Contains(again, c.GetReason()), c.GetReason() == reasonUnchanged
	case t.op.GetPhase() != opsv1.Phase_PHASE_PREPARED && !armed(t.op.GetPhase()):
		if left := t.begun.Add(s.strategy.deadline + prepareSlack).Sub(s.now); left > 0 {
			*s.wait = sooner(*s.wait, left)
			return
		}
		t.failed = &failure{failDeadline, fmt.Sprintf("node %s has not made the images ready within %s", m.node.Name, s.strategy.deadline)}
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
		m.visit = nil
		after := min(tellPause<<m.tries, tellPauseMax)
		if m.gaveWay {
			after = gaveWayPause
		}
		s.again(m, after)
	case i.goal.undo, unchanged:
		// A rollback must come, with the node's help or without. An image that runs already needs no help.
		m.plain, m.visit = true, nil
	}
}

// again has the pod looked at again after a while.
func (s *session) again(m *member, after time.Duration) {
	m.retryAt, *s.wait = s.now.Add(after), sooner(*s.wait, after)
}

// preparation is how far the node is with everything that the pod needs.
func (s *session) preparation(i *item) readiness { return min(s.looking(i), s.imagesReady(i)) }

// imagesReady is how far the node is with the images.
func (s *session) imagesReady(i *item) readiness {
	if len(i.verdict.images) == 0 || i.m.plain {
		return prepared
	}
	if _, running := idsOf(i.pod, slices.Sorted(maps.Keys(i.verdict.images))); !running {
		return prepared // there is nothing to take over from
	}
	s.state.mu.Lock()
	defer s.state.mu.Unlock()
	t := i.m.visit
	switch {
	case t == nil || t.uid != s.upgradeUID(i):
		if s.now.Before(i.m.retryAt) {
			return preparing
		}
		return unprepared
	case t.op.GetPhase() == opsv1.Phase_PHASE_PREPARED || armed(t.op.GetPhase()):
		return prepared
	}
	return preparing
}
