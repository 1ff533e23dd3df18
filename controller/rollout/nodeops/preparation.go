// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package nodeops

import (
	"context"
	"fmt"
	"time"

	"google.golang.org/grpc/codes"

	opsv1 "github.com/cri-proxy/cri-proxy/api/ops/v1"
	"github.com/cri-proxy/cri-proxy/controller/nodes"
	"github.com/cri-proxy/cri-proxy/controller/objects"
	"github.com/cri-proxy/cri-proxy/controller/pullsecrets"
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
	tracker *operationTracker
	item    *Item
	request *opsv1.PrepareUpgradeRequest
	// change is the change of the pod that follows, label the label of revision that the pod gets
	// by it.
	change *dryrun.PodChange
	label  string
}

// begin asks the API server what it would make of the change, and has the node prepare that.
func (p *preparation) begin(ctx context.Context) (*opsv1.Operation, error) {
	c, pod := p.tracker, p.item.Pod
	c.w.mu.Lock()
	phase := c.t.op.GetPhase()
	c.w.mu.Unlock()
	if opsv1.Armed(phase) { // the pod may be changed already: nobody needs to ask whether it may be
		if op, err := c.d.Nodes.GetOperation(ctx, c.node, c.t.uid); nodes.Code(err) != codes.NotFound {
			return op, err
		}
	}
	answers, err := p.admission(ctx)
	if err != nil {
		return nil, err
	}
	now, err := c.d.launch(ctx, c.w, pod, p.label)
	if err != nil {
		return nil, err
	}
	var images []string
	for _, r := range p.request.GetContainers() {
		if r.PullPolicy, r.Environment, err = now.container(ctx, r.GetName()); err != nil {
			return nil, err
		}
		images = append(images, pullsecrets.Pulled(r.GetImage(), r.GetPullPolicy(), r.GetEnvironment())...)
	}
	p.request.Credentials = now.ring.For(images...)
	op, err := c.d.Nodes.PrepareUpgrade(ctx, c.node, p.request)
	if nodes.Code(err) == codes.AlreadyExists {
		// A controller of another version has begun it, with some other detail.
		op, err = c.d.Nodes.GetOperation(ctx, c.node, c.t.uid)
	}
	if err != nil {
		return nil, err
	}
	// The node may have prepared what admission answered before.
	for _, has := range op.GetContainers() {
		asked := p.change.Images[has.GetName()]
		if expected := answers.Of(has.GetName(), asked); asked != "" && has.GetImage() != expected {
			err = dryrun.Unsteady("pod "+pod.Name, has.GetName(), asked, has.GetImage(), expected)
			c.change(func() { c.t.op, c.t.failed, c.t.answered = op, dryrun.Refusal(err), true })
			return nil, err
		}
	}
	c.w.Learn(p.item.Ops, c.t, p.change.Images, answers)
	return op, nil
}

// admission asks the API server what it makes of the images of the change, and puts that into the
// request. The error is errThere if the change has to be another one.
func (p *preparation) admission(ctx context.Context) (evaluate.Rewrites, error) {
	c, pod := p.tracker, p.item.Pod
	answers, more, err := dryrun.Pod(ctx, c.d.Client, pod, p.change)
	if err == nil && len(more) > 0 {
		c.w.LearnMore(p.item.Ops, c.t, more)
		return nil, errThere // all of them are prepared together
	}
	if err == nil && len(answers) > 0 { // is it the same each time?
		err = c.d.stillSo(ctx, p.item, p.change, answers)
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
		c.w.Learn(p.item.Ops, c.t, p.change.Images, answers)
		return nil, errThere // those that are not are prepared without those that are
	}
	return answers, nil
}
