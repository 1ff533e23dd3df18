// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package rollout

import (
	"cmp"
	"context"
	"fmt"
	"maps"
	"slices"
	"strings"
	"time"

	corev1 "k8s.io/api/core/v1"
	apiequality "k8s.io/apimachinery/pkg/api/equality"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	"k8s.io/apimachinery/pkg/api/meta"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
	"sigs.k8s.io/controller-runtime/pkg/client"

	inplace "github.com/cri-proxy/cri-proxy/api/inplace/v1alpha1"
	"github.com/cri-proxy/cri-proxy/controller/apierror"
	"github.com/cri-proxy/cri-proxy/controller/kstatus"
)

const (
	// maxFailures is how many failures the status names.
	maxFailures = 10
	// writePause is the least time between two status writes of which the second has only other numbers.
	writePause = 2 * time.Second
)

// noteFailures collects the pods that have failed, tells of new ones, and returns how many there are.
func (p *pass) noteFailures() int {
	now := map[types.UID]inplace.PodFailure{}
	for _, i := range p.items {
		if i.verdict.stage == broken {
			now[i.pod.UID] = inplace.PodFailure{Pod: i.pod.Name, Node: i.pod.Spec.NodeName, Reason: i.verdict.failure.reason, Message: i.verdict.failure.message}
		}
	}
	for _, pod := range p.ended {
		if pod.Spec.RestartPolicy != corev1.RestartPolicyNever {
			continue
		}
		if why := brokenContainer(pod, markOf(pod), &p.strategy); why != nil {
			now[pod.UID] = inplace.PodFailure{Pod: pod.Name, Node: pod.Spec.NodeName, Reason: why.reason, Message: why.message}
		}
	}
	if why := p.work.refused[p.goal.revision]; why != nil && !p.goal.undo {
		now[p.rollout.UID] = inplace.PodFailure{Pod: p.target.what, Reason: why.reason, Message: why.message}
	}
	for uid, f := range now {
		f.Message = clip(f.Message, 500)
		now[uid] = f
		if was, known := p.work.failures[uid]; !known || p.goal.undo && was.Reason != f.Reason {
			p.r.Metrics.pod(f.Reason)
			p.log.WithField("pod", f.Pod).WithField("reason", f.Reason).Warn("pod failed: " + f.Message)
			if len(p.work.told) < maxTold {
				p.tell(corev1.EventTypeWarning, eventPodFailed, subject(f)+": "+f.Reason+": "+f.Message, string(uid)+f.Reason)
			}
		}
	}
	p.work.failures = now
	return len(now)
}

// failures are what the status says of them, and how many there are.
func (p *pass) failures() ([]inplace.PodFailure, int32) {
	list := slices.Collect(maps.Values(p.work.failures))
	count := len(list)
	if p.goal.undo {
		// What made the rollout go back stays to be read.
		names := map[string]bool{}
		for _, f := range p.rollout.Status.Failures {
			names[f.Pod] = true
		}
		list = slices.DeleteFunc(list, func(f inplace.PodFailure) bool { return names[f.Pod] })
		count = max(int(p.rollout.Status.Failed), len(p.rollout.Status.Failures)+len(list))
		list = append(list, p.rollout.Status.Failures...)
	}
	slices.SortFunc(list, func(a, b inplace.PodFailure) int { return cmp.Compare(a.Pod, b.Pod) })
	return list[:min(len(list), maxFailures)], int32(count)
}

// turnBack begins the rollback.
func (p *pass) turnBack(ctx context.Context) error {
	next := p.report()
	next.FailedRevision = p.goal.revision
	next.Message = "rolling back: " + p.firstFailure()
	setCondition(next, inplace.ConditionDegraded, true, inplace.ReasonRollingBack, next.Message)
	setCondition(next, inplace.ConditionProgressing, true, inplace.ReasonRollingBack, next.Message)
	if err := p.writeStatus(ctx, next); err != nil {
		return err
	}
	p.event(corev1.EventTypeWarning, eventRollingBack, next.Message)
	p.log.Warn(next.Message)
	p.wait = stalePause
	return nil
}

// subject names what has failed: a pod, or the workload.
func subject(f inplace.PodFailure) string {
	if strings.Contains(f.Pod, " ") {
		return f.Pod
	}
	return "pod " + f.Pod
}

func (p *pass) firstFailure() string {
	list, count := p.failures()
	if count == 0 {
		return ""
	}
	text := fmt.Sprintf("%s: %s: %s", subject(list[0]), list[0].Reason, list[0].Message)
	if count > 1 {
		text += fmt.Sprintf(" (and %d more)", count-1)
	}
	return clip(text, 600)
}

// report is the status as far as it follows from the pods.
func (p *pass) report() *inplace.InPlaceRolloutStatus {
	next := p.rollout.Status.DeepCopy()
	next.ObservedGeneration = p.rollout.Generation
	next.Desired, next.Updated, next.Ready, next.Unavailable = int32(p.target.desired), 0, 0, int32(p.plan.unavailable)
	next.Failures, next.Failed = p.failures()
	for _, i := range p.items {
		if i.verdict.serving {
			next.Ready++
		}
		if i.verdict.stage == updated && !i.unlabelled && p.isTarget(i) {
			next.Updated++
		}
	}
	next.CurrentImages = map[string]string{}
	var pods []*corev1.Pod
	for _, i := range p.items {
		pods = append(pods, i.pod)
	}
	for _, c := range p.rollout.Spec.Containers {
		if image := usual(pods, c.Name, ""); image != "" {
			next.CurrentImages[c.Name] = image
		}
	}
	if limit := p.strategy.unavailableLimit(p.target.desired); p.plan.unavailable > limit {
		setCondition(next, inplace.ConditionAvailable, false, inplace.ReasonMinimumUnavail, fmt.Sprintf("%d of %d pods are unavailable, at most %d may be", p.plan.unavailable, p.target.desired, limit))
	} else {
		setCondition(next, inplace.ConditionAvailable, true, inplace.ReasonMinimumAvail, "")
	}
	return next
}

// isTarget says that a pod has the images of the spec.
func (p *pass) isTarget(i *item) bool {
	for _, c := range p.rollout.Spec.Containers {
		if have, _ := containerOf(i.pod, c.Name); c.Image != "" && (have == nil || !i.known.has(i.m.mark, c.Name, have.Image, p.work.template.of(c.Name, c.Image))) {
			return false
		}
	}
	return true
}

// tally counts the pods by where they stand.
type tally struct {
	outdated, changing, updated, unlabelled, broken, available, open, turns, left, unwritten int
}

func (p *pass) tally() tally {
	var t tally
	for _, i := range p.items {
		switch i.verdict.stage {
		case outdated:
			t.outdated++
		case changing:
			t.changing++
		case updated:
			t.updated++
			if i.unlabelled {
				t.unlabelled++
			}
			if i.verdict.available && !i.stale {
				t.available++
			}
			if i.m.api.count > 0 && i.m.refused == nil {
				t.unwritten++ // its label; that is tried again
			}
		case broken:
			t.broken++
		case left:
			t.left++
		}
		if shut, _ := shutBy(i.pod); shut == p.rollout.UID {
			t.open++
		}
		if i.m.turn {
			t.turns++
		}
	}
	return t
}

// conclude says how it stands, and ends the rollout if it has ended.
func (p *pass) conclude(ctx context.Context) error {
	next := p.report()
	t := p.tally()
	p.progress(t)
	undo := p.goal.undo
	through := t.outdated+t.changing+t.left+t.unlabelled+t.unwritten == 0 && p.blocked == "" && t.open == 0 && len(p.items) > 0 || len(p.items) == 0 && p.target.desired == 0 && p.target.workload != nil && p.blocked == ""
	whole := through && t.broken == 0 && t.available == t.updated && t.available >= p.target.desired
	switch {
	case whole && !undo, through && undo && (whole || p.stuck()), undo && t.changing+t.open == 0 && p.blocked == "" && p.cornered(), through && p.strategy.onFailure == inplace.Continue && t.broken > 0 && t.available == t.updated:
		done, trouble, err := p.settleWorkload(ctx)
		if err != nil {
			return err
		}
		if done {
			return p.complete(ctx, next, t)
		}
		next.Message = "the pods are done; waiting for the workload's controller"
		if trouble != "" {
			next.Message = trouble
			p.stand(next, true, inplace.ReasonAPIError, trouble)
		}
		p.wait = sooner(p.wait, blockedPause)
	case undo:
		next.Message = "rolling back: " + p.firstFailure() + p.noWayBack()
		p.stand(next, true, inplace.ReasonRollingBack, next.Message)
	case t.broken > 0 || len(p.work.failures) > 0:
		reason := inplace.ReasonStopped
		next.Message = "stopped: " + p.firstFailure() + "; change the containers, or the annotation " + inplace.RetryAnnotation + ", to go on"
		if p.strategy.onFailure == inplace.Continue {
			reason, next.Message = inplace.ReasonPodsFailed, p.firstFailure()
		}
		if p.work.refused[p.goal.revision] != nil { // the workload goes on by itself
			done, trouble, err := p.settleWorkload(ctx)
			switch {
			case err != nil:
				return err
			case trouble != "":
				next.Message = trouble + "; " + next.Message
			case done && p.strategy.onFailure == inplace.Continue && t.changing+t.turns+t.open == 0:
				return p.complete(ctx, next, t) // of the pods none can go on
			}
		}
		setCondition(next, inplace.ConditionDegraded, true, reason, next.Message)
		p.stand(next, reason == inplace.ReasonPodsFailed, reason, next.Message)
	case p.blocked != "" && p.stuck():
		next.Message = fmt.Sprintf("nothing has changed for %s: %s", p.strategy.deadline, p.blocked)
		p.stand(next, false, inplace.ReasonStuck, next.Message)
		p.tell(corev1.EventTypeWarning, inplace.ReasonStuck, next.Message, "blocked")
	case p.blocked != "":
		next.Message = p.blocked
		p.stand(next, true, p.blockedReason, p.blocked)
	case len(p.items) == 0:
		next.Message = "there are no " + p.target.what
		p.stand(next, true, inplace.ReasonNoPods, next.Message)
	case p.rollout.Spec.Paused && t.changing+t.turns == 0:
		next.Message = fmt.Sprintf("paused with %d of %d pods updated", next.Updated, next.Desired)
		p.stand(next, true, inplace.ReasonPaused, next.Message)
	case p.plan.held > 0 && t.changing+t.turns == 0 && t.outdated == p.plan.held:
		next.Message = fmt.Sprintf("%d of %d pods are updated, the partition keeps %d", next.Updated, next.Desired, p.plan.held)
		p.stand(next, true, inplace.ReasonPartitioned, next.Message)
	case p.plan.blocked != "":
		next.Message = p.plan.blocked
		p.stand(next, true, inplace.ReasonBudget, next.Message)
		p.tell(corev1.EventTypeNormal, eventBlocked, next.Message, "budget")
	case p.apiTrouble() != "":
		next.Message = p.apiTrouble()
		p.stand(next, true, inplace.ReasonAPIError, next.Message)
		p.tell(corev1.EventTypeWarning, inplace.ReasonAPIError, next.Message, "")
	case t.left > 0 && t.outdated+t.changing+t.turns == 0:
		next.Message = fmt.Sprintf("%d pods are left to the workload's own strategy: %s; delete them to have them made anew", t.left, p.obstacle)
		p.stand(next, false, inplace.ReasonNotInPlace, next.Message)
		p.tell(corev1.EventTypeWarning, eventNotInPlace, next.Message, "left")
	case p.stuck():
		next.Message = fmt.Sprintf("nothing has changed for %s: %d pods are unavailable", p.strategy.deadline, p.plan.unavailable)
		p.stand(next, false, inplace.ReasonStuck, next.Message)
	default:
		next.Message = fmt.Sprintf("%d of %d pods are updated", next.Updated, next.Desired)
		p.stand(next, true, inplace.ReasonRollingOut, "")
	}
	p.aside(next)
	if p.work.failuresGone() && !undo {
		setCondition(next, inplace.ConditionDegraded, false, inplace.ReasonAsExpected, "")
	}
	p.tellSecrets()
	p.wait = sooner(p.wait, lookAgain)
	if left := p.work.lastWrite.Add(writePause).Sub(p.now); left > 0 && minor(&p.rollout.Status, next) {
		if !apiequality.Semantic.DeepEqual(&p.rollout.Status, next) {
			p.wait = sooner(p.wait, left)
		}
		return nil
	}
	return p.writeStatus(ctx, next)
}

// aside adds to the message how many pods the rollout leaves alone though they have its labels.
func (p *pass) aside(next *inplace.InPlaceRolloutStatus) {
	if text := leftOut(p.target.mirrors); text != "" {
		next.Message += "; " + text
	}
}

// tellSecrets tells of secrets that cannot be used: the images are pulled without them.
func (p *pass) tellSecrets() {
	p.work.mu.Lock()
	var wrong []string
	for _, name := range sortedKeys(p.work.keys) {
		wrong = append(wrong, p.work.keys[name].ring.Wrong...)
	}
	p.work.mu.Unlock()
	if len(wrong) > 0 {
		text := "pulling without: " + strings.Join(wrong, "; ")
		p.tell(corev1.EventTypeWarning, eventSecrets, text, text)
	}
}

func (w *work) failuresGone() bool { return len(w.failures) == 0 }

// stand sets the condition Progressing, and Complete to False with the same reason.
func (p *pass) stand(next *inplace.InPlaceRolloutStatus, progressing bool, reason, message string) {
	setCondition(next, inplace.ConditionProgressing, progressing, reason, message)
	setCondition(next, inplace.ConditionComplete, false, reason, message)
}

// progress notes when the picture of the pods last changed.
func (p *pass) progress(t tally) {
	picture := [4]int{t.outdated, t.changing, t.available, p.plan.available}
	if picture != p.work.progress || p.work.progressed.IsZero() {
		p.work.progress, p.work.progressed = picture, p.now
	}
}

// stuck says that nothing has changed for longer than pods may take.
func (p *pass) stuck() bool { return p.now.Sub(p.work.progressed) >= p.strategy.deadline }

// cornered says that pods that cannot be put back keep the others from it, and have done so for too long.
func (p *pass) cornered() bool {
	return p.noWayBack() != "" && p.stuck() && p.plan.blocked == "" && !p.rollout.Spec.Paused
}

// noWayBack says of the first pod that cannot be put back why that is; empty without.
func (p *pass) noWayBack() string {
	for _, i := range p.items {
		if f := i.verdict.failure; i.verdict.stage == broken && len(i.verdict.images) > 0 {
			return clip(fmt.Sprintf("; pod %s cannot be put back: %s: %s", i.pod.Name, f.reason, f.message), 600)
		}
	}
	return ""
}

// minor says that a status differs from the one before in numbers only.
func minor(before, after *inplace.InPlaceRolloutStatus) bool {
	if before.ObservedGeneration != after.ObservedGeneration || before.Failed != after.Failed || len(before.Conditions) != len(after.Conditions) {
		return false
	}
	for _, c := range after.Conditions {
		if b := meta.FindStatusCondition(before.Conditions, c.Type); b == nil || b.Status != c.Status || b.Reason != c.Reason {
			return false
		}
	}
	return true
}

// settleWorkload lets the workload's own controller go on. The API server may not have that: then trouble says so, and it is tried again.
func (p *pass) settleWorkload(ctx context.Context) (done bool, trouble string, err error) {
	if p.target.workload == nil {
		return true, "", nil
	}
	t := &p.work.settling
	if !p.waits(t) {
		done, err = p.target.workload.settle(ctx)
		switch {
		case err == nil:
			*t = apiTrouble{}
			return done, "", nil
		case apierrors.IsConflict(err), apierrors.IsNotFound(err), refusal(err) == nil && !apiStatus(err):
			return false, "", err
		}
		t.note(err, p.now)
		p.waits(t)
	}
	trouble = fmt.Sprintf("%s is paused and cannot go on: %s", p.target.what, t.text)
	if t.count >= apierror.Tries {
		p.tell(corev1.EventTypeWarning, inplace.ReasonAPIError, trouble, "settle")
	}
	return false, trouble, nil
}

// complete ends the rollout.
func (p *pass) complete(ctx context.Context, next *inplace.InPlaceRolloutStatus, t tally) error {
	now := metav1.NewTime(p.now)
	next.CompletionTime = &now
	p.work.mu.Lock()
	for _, i := range p.items {
		if i.verdict.stage == outdated {
			p.abort(i.m.node, i.m.visit, "the rollout has ended without the pod")
		}
	}
	p.work.mu.Unlock()
	switch {
	case p.goal.undo:
		next.Message = "rolled back: " + p.firstFailure() + p.noWayBack()
		if t.outdated > 0 {
			next.Message += fmt.Sprintf("; %d pods are left as they are: pods that cannot be put back have used up maxUnavailable", t.outdated)
		}
		if t.available < t.updated || t.broken > 0 {
			next.Message += fmt.Sprintf("; %d pods are not available after it", t.updated+t.broken-t.available)
		}
		if w, ok := p.target.workload.(*onDelete); ok && w.follows() {
			next.Message += "; to try again set another image, or change annotation " + inplace.RetryAnnotation + " of " + w.name()
		}
		p.stand(next, false, inplace.ReasonRolledBack, next.Message)
		setCondition(next, inplace.ConditionDegraded, true, inplace.ReasonRolledBack, next.Message)
	case t.broken > 0 || p.work.refused[p.goal.revision] != nil:
		next.Message = fmt.Sprintf("%d of %d pods are updated, %d have failed: %s", next.Updated, next.Desired, next.Failed, p.firstFailure())
		p.stand(next, false, inplace.ReasonPodsFailed, next.Message)
		setCondition(next, inplace.ConditionDegraded, true, inplace.ReasonPodsFailed, next.Message)
	default:
		success := metav1.NewMicroTime(p.now)
		next.LastSuccessTime = &success
		next.Message = fmt.Sprintf("all %d pods are updated", next.Updated)
		p.aside(next)
		setCondition(next, inplace.ConditionProgressing, true, inplace.ReasonRolledOut, next.Message)
		setCondition(next, inplace.ConditionComplete, true, inplace.ReasonRolledOut, next.Message)
		setCondition(next, inplace.ConditionDegraded, false, inplace.ReasonAsExpected, "")
	}
	return p.end(ctx, next)
}

// end writes the last status of a rollout, and lets go of it.
func (p *pass) end(ctx context.Context, next *inplace.InPlaceRolloutStatus) error {
	if err := p.giveBack(ctx); err != nil {
		return err
	}
	if err := p.writeStatus(ctx, next); err != nil {
		return err
	}
	p.r.endTurn(p.work)
	reason := meta.FindStatusCondition(next.Conditions, inplace.ConditionComplete).Reason
	kind := corev1.EventTypeNormal
	if reason != inplace.ReasonRolledOut {
		kind = corev1.EventTypeWarning
	}
	p.event(kind, reason, next.Message)
	p.r.Metrics.completed(reason)
	p.log.WithField("reason", reason).Info("rollout ended: " + next.Message)
	return p.retire(ctx)
}

// refuse says what is wrong with a rollout and leaves it until that is corrected.
func (p *pass) refuse(ctx context.Context, why *specError) error {
	p.r.endTurn(p.work)
	next := p.rollout.Status.DeepCopy()
	next.ObservedGeneration, next.Message = p.rollout.Generation, why.Message
	p.stand(next, false, inplace.ReasonInvalidTarget, why.Message)
	p.tell(corev1.EventTypeWarning, eventInvalid, why.Message, why.Message)
	p.wait = sooner(p.wait, lookAgain)
	return p.writeStatus(ctx, next)
}

// tellReady says for kstatus how the rollout stands, as kstatus would say it of a workload: one whose partition holds pods back on
// purpose is current, one that is paused is not.
func tellReady(s *inplace.InPlaceRolloutStatus) {
	c, going := meta.FindStatusCondition(s.Conditions, inplace.ConditionComplete), meta.FindStatusCondition(s.Conditions, inplace.ConditionProgressing)
	if c == nil || going == nil {
		return
	}
	standing, message := kstatus.AtWork, cmp.Or(c.Message, s.Message)
	switch {
	case c.Status == metav1.ConditionTrue, c.Reason == inplace.ReasonPartitioned && s.Failed == 0:
		standing = kstatus.Current
	case going.Status == metav1.ConditionFalse:
		standing = kstatus.Failed
	}
	if standing == kstatus.AtWork {
		message = c.Message // not the numbers, which are in the counts: each would be a change
	}
	kstatus.Set(&s.Conditions, s.ObservedGeneration, standing, c.Reason, message)
}

// setCondition sets a condition; its time changes with its status only.
func setCondition(s *inplace.InPlaceRolloutStatus, kind string, is bool, reason, message string) {
	status := metav1.ConditionFalse
	if is {
		status = metav1.ConditionTrue
	}
	meta.SetStatusCondition(&s.Conditions, metav1.Condition{Type: kind, Status: status, Reason: reason, Message: clip(message, 1000), ObservedGeneration: s.ObservedGeneration})
}

func clip(text string, most int) string {
	if len(text) <= most {
		return text
	}
	return strings.ToValidUTF8(text[:most], "") + "…"
}

// patch writes the change of metadata and spec since before, unless someone else wrote in between.
func (p *pass) patch(ctx context.Context, before *inplace.InPlaceRollout) error {
	if apiequality.Semantic.DeepEqual(before, p.rollout) {
		return nil
	}
	err := p.r.Client.Patch(ctx, p.rollout, client.MergeFromWithOptions(before, client.MergeFromWithOptimisticLock{}))
	if err == nil {
		p.wrote("rollout")
	}
	return err
}

// writeStatus writes next if it differs.
func (p *pass) writeStatus(ctx context.Context, next *inplace.InPlaceRolloutStatus) error {
	tellReady(next)
	if apiequality.Semantic.DeepEqual(&p.rollout.Status, next) {
		return nil
	}
	before := p.rollout.DeepCopy()
	p.rollout.Status = *next
	if err := p.r.Client.Status().Patch(ctx, p.rollout, client.MergeFromWithOptions(before, client.MergeFromWithOptimisticLock{})); err != nil {
		return err
	}
	p.work.lastWrite = p.now
	p.wrote("rollout status")
	return nil
}

func (p *pass) wrote(object string) {
	p.r.Metrics.wrote(object)
	p.work.written = versionOf(p.rollout.ResourceVersion)
}
