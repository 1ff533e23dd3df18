// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package rollout

import (
	"context"
	"fmt"
	"strings"
	"time"

	corev1 "k8s.io/api/core/v1"
	apiequality "k8s.io/apimachinery/pkg/api/equality"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	"k8s.io/apimachinery/pkg/api/meta"
	"k8s.io/apimachinery/pkg/types"

	inplace "github.com/cri-proxy/cri-proxy/api/inplace/v1alpha1"
	"github.com/cri-proxy/cri-proxy/controller/apierror"
	"github.com/cri-proxy/cri-proxy/controller/objects"
	"github.com/cri-proxy/cri-proxy/controller/retry"
	"github.com/cri-proxy/cri-proxy/controller/rollout/dryrun"
	"github.com/cri-proxy/cri-proxy/controller/rollout/evaluate"
	"github.com/cri-proxy/cri-proxy/controller/rollout/notice"
	"github.com/cri-proxy/cri-proxy/controller/rollout/requeue"
)

const (
	// maxFailures is how many failures the status names.
	maxFailures = 10
	// writeInterval is the least time between two writes of a status in which only numbers have
	// changed.
	writeInterval = 2 * time.Second
)

// writeStatus writes next if it differs.
func (p *pass) writeStatus(ctx context.Context, next *inplace.InPlaceRolloutStatus) error {
	setKstatus(next)
	before := p.rollout.DeepCopy()
	p.rollout.Status = *next
	wrote, err := p.writer.PatchStatus(ctx, p.rollout, before)
	if wrote {
		p.work.lastWrite = p.now
	}
	return err
}

// noteFailures collects the pods that have failed, writes Events of new ones, and returns how many
// there are.
func (p *pass) noteFailures() int {
	now := map[types.UID]inplace.PodFailure{}
	for _, i := range p.items {
		if i.Status.Stage == evaluate.Broken {
			now[i.Pod.UID] = inplace.PodFailure{Pod: i.Pod.Name, Node: i.Pod.Spec.NodeName,
				Reason: i.Status.Failure.Reason, Message: i.Status.Failure.Message}
		}
	}
	for _, pod := range p.ended {
		if pod.Spec.RestartPolicy != corev1.RestartPolicyNever {
			continue
		}
		if why := evaluate.BrokenContainer(pod, evaluate.StateOf(pod), &p.strategy); why != nil {
			now[pod.UID] = inplace.PodFailure{Pod: pod.Name, Node: pod.Spec.NodeName, Reason: why.Reason,
				Message: why.Message}
		}
	}
	if why := p.work.refused[p.goal.Revision]; why != nil && !p.goal.Undo {
		now[p.rollout.UID] = inplace.PodFailure{Pod: p.target.What, Reason: why.Reason, Message: why.Message}
	}
	for uid, f := range now {
		f.Message = objects.Clip(f.Message, 500)
		now[uid] = f
		if was, known := p.work.failures[uid]; !known || p.goal.Undo && was.Reason != f.Reason {
			p.r.Metrics.Pod(f.Reason)
			p.log.WithField("pod", f.Pod).WithField("reason", f.Reason).Warn("pod failed: " + f.Message)
			if len(p.work.reported) < maxReported {
				p.teller.tell(corev1.EventTypeWarning, notice.EventPodFailed,
					notice.Subject(f)+": "+f.Reason+": "+f.Message, string(uid)+f.Reason)
			}
		}
	}
	p.work.failures = now
	return len(now)
}

// startRollback begins the rollback.
func (p *pass) startRollback(ctx context.Context) error {
	s := summarize(p)
	next := s.status()
	next.FailedRevision = p.goal.Revision
	next.Message = "rolling back: " + s.firstFailure()
	notice.SetCondition(next, inplace.ConditionDegraded, true, inplace.ReasonRollingBack, next.Message)
	notice.SetCondition(next, inplace.ConditionProgressing, true, inplace.ReasonRollingBack, next.Message)
	if err := p.writeStatus(ctx, next); err != nil {
		return err
	}
	p.teller.event(corev1.EventTypeWarning, notice.EventRollingBack, next.Message)
	p.log.Warn(next.Message)
	p.wait = requeue.StaleInterval
	return nil
}

// summarize sums up what this pass has found.
func summarize(p *pass) *summary {
	return &summary{
		rollout: p.rollout, strategy: &p.strategy, goal: p.goal, target: p.target, plan: p.plan, items: p.items,
		tally: tallyOf(p.rollout.UID, p.items), now: p.now, progressed: p.work.progressed, failed: p.work.failures,
		template: p.work.memory.Template, refused: p.work.refused[p.goal.Revision] != nil,
		blockedReason: p.blockedReason, blocked: p.blocked, notInPlaceReason: p.notInPlaceReason,
		trouble: p.work.ops.Trouble(p.items),
	}
}

// conclude writes the status, and ends the rollout if it has ended.
func (p *pass) conclude(ctx context.Context) error {
	s := summarize(p)
	t := s.tally
	s.progressed = p.work.noteProgress(picture{t.outdated, t.changing, t.available, p.plan.Available}, p.now)
	next := s.status()
	var ended bool
	var err error
	switch {
	case s.finished():
		ended, err = p.finish(ctx, next)
	case s.failing():
		ended, err = p.stop(ctx, s, next)
	default:
		row := s.standing(next)
		next.Message = row.message
		if row.numbers {
			row.message = ""
		}
		setProgressing(next, row.progressing, row.reason, row.message)
		if row.event != "" {
			p.teller.tell(row.kind, row.event, next.Message, row.key)
		}
	}
	if err != nil {
		return err
	} else if ended {
		for _, i := range p.items {
			if i.Status.Stage == evaluate.Outdated {
				p.ops.AbortUpgrade(i.Ops, "the rollout has ended without the pod")
			}
		}
		s.outcome(next)
		return p.end(ctx, next)
	}
	s.addLeftOut(next)
	if len(p.work.failures) == 0 && !p.goal.Undo {
		notice.SetCondition(next, inplace.ConditionDegraded, false, inplace.ReasonAsExpected, "")
	}
	if wrong := p.work.ops.WrongSecrets(); len(wrong) > 0 { // the images are pulled without them
		text := "pulling without: " + strings.Join(wrong, "; ")
		p.teller.tell(corev1.EventTypeWarning, notice.EventSecrets, text, text)
	}
	p.wait = retry.Sooner(p.wait, requeue.ResyncPeriod)
	if left := p.work.lastWrite.Add(writeInterval).Sub(p.now); left > 0 && numbersOnly(&p.rollout.Status, next) {
		if !apiequality.Semantic.DeepEqual(&p.rollout.Status, next) {
			p.wait = retry.Sooner(p.wait, left)
		}
		return nil
	}
	return p.writeStatus(ctx, next)
}

// finish lets the workload go on when the pods are done, and returns true once it does.
func (p *pass) finish(ctx context.Context, next *inplace.InPlaceRolloutStatus) (bool, error) {
	done, trouble, err := p.settleWorkload(ctx)
	if done || err != nil {
		return done, err
	}
	next.Message = "the pods are done; waiting for the workload's controller"
	if trouble != "" {
		next.Message = trouble
		setProgressing(next, true, inplace.ReasonAPIError, trouble)
	}
	p.wait = retry.Sooner(p.wait, requeue.BlockedInterval)
	return false, nil
}

// stop writes into the status what has failed, and returns true if the rollout ends because of
// that.
func (p *pass) stop(ctx context.Context, s *summary, next *inplace.InPlaceRolloutStatus) (bool, error) {
	reason := inplace.ReasonStopped
	next.Message = "stopped: " + s.firstFailure() + "; change the containers, or the annotation " +
		inplace.RetryAnnotation + ", to go on"
	if p.strategy.OnFailure == inplace.Continue {
		reason, next.Message = inplace.ReasonPodsFailed, s.firstFailure()
	}
	if s.refused { // the workload goes on by itself
		done, trouble, err := p.settleWorkload(ctx)
		switch {
		case err != nil:
			return false, err
		case trouble != "":
			next.Message = trouble + "; " + next.Message
		case done && p.strategy.OnFailure == inplace.Continue &&
			s.tally.changing+s.tally.updating+s.tally.outOfService == 0:
			return true, nil // of the pods none can go on
		}
	}
	notice.SetCondition(next, inplace.ConditionDegraded, true, reason, next.Message)
	setProgressing(next, reason == inplace.ReasonPodsFailed, reason, next.Message)
	return false, nil
}

// noteProgress remembers when the picture of the pods last changed, and returns that.
func (w *work) noteProgress(now picture, at time.Time) time.Time {
	if now != w.progress || w.progressed.IsZero() {
		w.progress, w.progressed = now, at
	}
	return w.progressed
}

// settleWorkload lets the workload's own controller go on. trouble says that the API server refuses
// that; it is tried again.
func (p *pass) settleWorkload(ctx context.Context) (done bool, trouble string, err error) {
	if p.target.Workload == nil {
		return true, "", nil
	}
	t := &p.work.settling
	if !p.waits(t) {
		done, err = p.target.Workload.Resume(ctx)
		switch {
		case err == nil:
			*t = dryrun.Trouble{}
			return done, "", nil
		case apierrors.IsConflict(err), apierrors.IsNotFound(err), dryrun.Refusal(err) == nil &&
			!dryrun.IsAPIStatus(err):
			return false, "", err
		}
		t.Note(err, p.now)
		p.waits(t)
	}
	trouble = fmt.Sprintf("%s is paused and cannot go on: %s", p.target.What, t.Text)
	if t.Count >= apierror.Tries {
		p.teller.tell(corev1.EventTypeWarning, inplace.ReasonAPIError, trouble, "settle")
	}
	return false, trouble, nil
}

// end writes the last status of a rollout.
func (p *pass) end(ctx context.Context, next *inplace.InPlaceRolloutStatus) error {
	if err := p.env.GiveBack(ctx, p.target); err != nil {
		return err
	}
	if err := p.writeStatus(ctx, next); err != nil {
		return err
	}
	p.r.admissions.end(p.rollout.UID)
	reason := meta.FindStatusCondition(next.Conditions, inplace.ConditionComplete).Reason
	kind := corev1.EventTypeNormal
	if reason != inplace.ReasonRolledOut {
		kind = corev1.EventTypeWarning
	}
	p.teller.event(kind, reason, next.Message)
	p.r.Metrics.Completed(reason)
	p.log.WithField("reason", reason).Info("rollout ended: " + next.Message)
	return p.cleanup(ctx)
}

// refuse writes into the status what is wrong with a rollout. Nothing happens until that is
// corrected.
func (p *pass) refuse(ctx context.Context, why *apierror.SpecError) error {
	p.r.admissions.end(p.rollout.UID)
	next := p.rollout.Status.DeepCopy()
	next.ObservedGeneration, next.Message = p.rollout.Generation, why.Message
	setProgressing(next, false, inplace.ReasonInvalidTarget, why.Message)
	p.teller.tell(corev1.EventTypeWarning, notice.EventInvalid, why.Message, why.Message)
	p.wait = retry.Sooner(p.wait, requeue.ResyncPeriod)
	return p.writeStatus(ctx, next)
}
