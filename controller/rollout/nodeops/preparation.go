// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package nodeops

import (
	"cmp"
	"context"
	"fmt"
	"time"

	opsv1 "github.com/cri-proxy/cri-proxy/api/ops/v1"
	"github.com/cri-proxy/cri-proxy/controller/nodes"
	"github.com/cri-proxy/cri-proxy/controller/objects"
	"github.com/cri-proxy/cri-proxy/controller/retry"
	"github.com/cri-proxy/cri-proxy/controller/rollout/dryrun"
	"github.com/cri-proxy/cri-proxy/controller/rollout/evaluate"
	"github.com/cri-proxy/cri-proxy/controller/rollout/podtemplate"
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
		t.end()
		m.Upgrade = nil
		return
	case t.failed != nil && !t.stale:
		if !t.takenBack {
			t.takenBack = true
			s.Driver.abort(m.node, t, t.failed.Message)
		}
		m.gaveWay = false
	case t.failed != nil:
		once = t.stale
		m.gaveWay = m.gaveWay && t.stale && !t.commitRequested
		held = m.gaveWay
	case t.op.GetFinishTime() != nil && t.op.GetPhase() != opsv1.Phase_PHASE_SUCCEEDED:
		reason := evaluate.Culprit(t.op).GetReason()
		t.failed = failureOf(t.op)
		// A restart takes precedence over a preparation, which then finds another container.
		// Neither is the pod's fault.
		m.gaveWay = !t.commitRequested && (reason == opsv1.ReasonCancelled || m.gaveWay &&
			reason == opsv1.ReasonExpectedIDDiffers)
		held = reason == opsv1.ReasonHoldTimeout || m.gaveWay
		once, unchanged = retryable(reason), reason == opsv1.ReasonImageUnchanged
	case t.op.GetPhase() != opsv1.Phase_PHASE_PREPARED && !opsv1.Armed(t.op.GetPhase()):
		if !s.overdue(t) {
			return
		}
		t.failed = &evaluate.Failure{Reason: evaluate.FailDeadline,
			Message: fmt.Sprintf("node %s has not made the images ready within %s", m.node.Name, s.Strategy.Deadline)}
		t.takenBack = true
		s.Driver.abort(m.node, t, "it took too long")
	default:
		m.gaveWay = false
		return
	}
	switch {
	case held, once && m.tries < roundsMax:
		if m.round++; !held { // a budget may hold a pod back for days
			m.tries++
		}
		t.end()
		m.Upgrade = nil
		after := backOff(m.tries)
		if m.gaveWay {
			after = gaveWayInterval
		}
		s.again(m, after)
	case i.Goal.Undo, unchanged:
		// A rollback must come, with the node's help or without. An image that runs already needs
		// no help.
		t.end()
		m.Plain, m.Upgrade = true, nil
	}
}

// again has the pod looked at again after a while.
func (s *Session) again(m *PodOps, after time.Duration) {
	m.retryAt, *s.Wait = s.Now.Add(after), retry.Sooner(*s.Wait, after)
}

// overdue returns true if the node has taken too long for an operation. Until then it has the pod
// looked at again when the time has come.
func (s *Session) overdue(t *nodeOperation) bool {
	left := t.begun.Add(s.Strategy.Deadline + prepareSlack).Sub(s.Now)
	if left > 0 {
		*s.Wait = retry.Sooner(*s.Wait, left)
	}
	return left <= 0
}

// failureOf says why the preparation of a pod by an operation has failed.
func failureOf(op *opsv1.Operation) *evaluate.Failure {
	return &evaluate.Failure{
		Reason:  cmp.Or(evaluate.Culprit(op).GetReason(), evaluate.FailPreparation),
		Message: evaluate.AccountOf(op),
	}
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
	if _, running := evaluate.RunningIDs(i.Pod, objects.SortedKeys(i.Status.Images)); !running {
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

// preparation begins the upgrade of a pod on its node.
type preparation struct {
	d       *Driver
	w       *State
	t       *nodeOperation
	node    nodes.Node
	item    *Item
	request *opsv1.PrepareUpgradeRequest
	// change is the change of the pod that follows.
	change *dryrun.PodChange
}

// begin asks the API server what it would make of the change, and has the node prepare that.
func (p *preparation) begin(ctx context.Context) (*opsv1.Operation, error) {
	pod := p.item.Pod
	p.w.mu.Lock()
	phase := p.t.op.GetPhase()
	p.w.mu.Unlock()
	if opsv1.Armed(phase) { // the pod may be changed already: nobody needs to ask whether it may be
		if op, err := p.d.Nodes.GetOperation(ctx, p.node, p.t.uid); !nodes.NotFound(err) {
			return op, err
		}
	}
	answers, err := p.admission(ctx)
	if err != nil {
		return nil, err
	}
	now, err := p.d.launch(ctx, p.w, pod, p.change.Label)
	if err != nil {
		return nil, err
	}
	for _, r := range p.request.GetContainers() {
		if r.PullPolicy, r.Environment, err = now.container(ctx, r.GetName(), r.GetImage()); err != nil {
			return nil, err
		}
	}
	p.request.Credentials = now.credentials()
	op, err := p.d.Nodes.PrepareUpgrade(ctx, p.node, p.request)
	if op, err = p.d.orFind(ctx, p.node, p.t.uid, op, err); err != nil {
		return nil, err
	}
	// The node may have prepared what admission answered before.
	for _, has := range op.GetContainers() {
		asked := p.change.Images[has.GetName()]
		if expected := answers.Of(has.GetName(), asked); asked != "" && has.GetImage() != expected {
			err = dryrun.Unsteady("pod "+pod.Name, has.GetName(), asked, has.GetImage(), expected)
			p.w.change(p.t, func() { p.t.op, p.t.failed, p.t.answered = op, dryrun.Refusal(err), true })
			return nil, err
		}
	}
	p.w.Learn(p.item.Ops, p.t, p.change.Images, answers)
	return op, nil
}

// admission asks the API server what it makes of the images of the change, and puts that into the
// request. The error is errImageThere if the change has to be another one.
func (p *preparation) admission(ctx context.Context) (evaluate.Rewrites, error) {
	pod := p.item.Pod
	answers, more, err := dryrun.Pod(ctx, p.d.Client, pod, p.change)
	if err == nil && len(more) > 0 {
		p.w.LearnMore(p.item.Ops, p.t, more)
		return nil, errImageThere // all of them are prepared together
	}
	if err == nil && len(answers) > 0 { // is it the same each time?
		err = p.d.recheck(ctx, p.item, p.change, answers)
	}
	if err != nil {
		return nil, err
	}
	have, there := podtemplate.PodImages(pod), false
	for _, r := range p.request.GetContainers() {
		r.Image = answers.Of(r.GetName(), p.change.Images[r.GetName()])
		there = there || r.GetImage() == have[r.GetName()]
	}
	if there {
		p.w.Learn(p.item.Ops, p.t, p.change.Images, answers)
		return nil, errImageThere // those that are not are prepared without those that are
	}
	return answers, nil
}
