// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package rollout

import (
	"cmp"
	"fmt"
	"maps"
	"slices"
	"time"

	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/api/meta"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"

	inplace "github.com/cri-proxy/cri-proxy/api/inplace/v1alpha1"
	"github.com/cri-proxy/cri-proxy/controller/kstatus"
	"github.com/cri-proxy/cri-proxy/controller/objects"
	"github.com/cri-proxy/cri-proxy/controller/pods"
	"github.com/cri-proxy/cri-proxy/controller/rollout/evaluate"
	"github.com/cri-proxy/cri-proxy/controller/rollout/nodeops"
	"github.com/cri-proxy/cri-proxy/controller/rollout/notice"
	"github.com/cri-proxy/cri-proxy/controller/rollout/workload"
)

// summary is what a look at a rollout has found. All that the status says follows from it.
type summary struct {
	rollout  *inplace.InPlaceRollout
	strategy *evaluate.Strategy
	goal     evaluate.Goal
	target   *workload.Target
	plan     evaluate.Plan
	items    []*nodeops.Item
	tally    tally
	now      time.Time
	// progressed is when the picture of the pods last changed.
	progressed time.Time
	// failed are the pods that have failed, by UID, and perhaps the workload.
	failed map[types.UID]inplace.PodFailure
	// template is what the API server makes of images in the workload's template. refused says that
	// the template is not changed at all.
	template evaluate.Rewrites
	refused  bool
	// blocked says what holds the rollout back as a whole, blockedReason is the reason of its
	// condition.
	blockedReason, blocked string
	// notInPlaceReason is why pods are left to their workload.
	notInPlaceReason string
	// trouble is what the API server has failed with again and again.
	trouble string
}

// tally counts the pods by where they stand.
type tally struct {
	outdated, changing, updated, unlabelled, broken, available, outOfService, updating, skipped, unwritten int
}

// picture changes when a rollout gets on.
type picture [4]int

// standing is how a rollout stands while it goes on: what its message and its conditions
// Progressing and Complete say.
type standing struct {
	// when says whether a row of the table applies.
	when            bool
	progressing     bool
	reason, message string
	// numbers says that the message is only numbers, which the conditions do not repeat.
	numbers bool
	// event is the reason of an Event of the message, kind its type, and key the rest of what it is
	// told once for.
	kind, event, key string
}

// standing looks up how a rollout stands that has neither ended nor failed: the first row that
// applies counts.
func (s *summary) standing(next *inplace.InPlaceRolloutStatus) standing {
	t := s.tally
	atRest := t.changing+t.updating == 0
	unchanged := fmt.Sprintf("nothing has changed for %s: ", s.strategy.Deadline)
	back := ""
	if s.goal.Undo {
		back = "rolling back: " + s.firstFailure() + s.noWayBack()
	}
	table := []standing{
		{
			when:        s.goal.Undo,
			progressing: true, reason: inplace.ReasonRollingBack, message: back,
		}, {
			when:   s.blocked != "" && s.stuck(),
			reason: inplace.ReasonStuck, message: unchanged + s.blocked,
			kind: corev1.EventTypeWarning, event: inplace.ReasonStuck, key: "blocked",
		}, {
			when:        s.blocked != "",
			progressing: true, reason: s.blockedReason, message: s.blocked,
		}, {
			when:        len(s.items) == 0,
			progressing: true, reason: inplace.ReasonNoPods, message: "there are no " + s.target.What,
		}, {
			when:        s.rollout.Spec.Paused && atRest,
			progressing: true, reason: inplace.ReasonPaused,
			message: fmt.Sprintf("paused with %d of %d pods updated", next.Updated, next.Desired),
		}, {
			when:        s.plan.Held > 0 && atRest && t.outdated == s.plan.Held,
			progressing: true, reason: inplace.ReasonPartitioned,
			message: fmt.Sprintf("%d of %d pods are updated, the partition keeps %d", next.Updated, next.Desired,
				s.plan.Held),
		}, {
			when:        s.plan.Blocked != "",
			progressing: true, reason: inplace.ReasonBudget, message: s.plan.Blocked,
			kind: corev1.EventTypeNormal, event: notice.EventBlocked, key: "budget",
		}, {
			when:        s.trouble != "",
			progressing: true, reason: inplace.ReasonAPIError, message: s.trouble,
			kind: corev1.EventTypeWarning, event: inplace.ReasonAPIError,
		}, {
			when:   t.skipped > 0 && t.outdated == 0 && atRest,
			reason: inplace.ReasonNotInPlace,
			message: fmt.Sprintf("%d pods are left to the workload's own strategy: %s; delete them to have them "+
				"made anew",
				t.skipped, s.notInPlaceReason),
			kind: corev1.EventTypeWarning, event: notice.EventNotInPlace, key: "left",
		}, {
			when:   s.stuck(),
			reason: inplace.ReasonStuck, message: unchanged + fmt.Sprintf("%d pods are unavailable",
				s.plan.Unavailable),
		}, {
			when:        true,
			progressing: true, reason: inplace.ReasonRollingOut, numbers: true,
			message: fmt.Sprintf("%d of %d pods are updated", next.Updated, next.Desired),
		},
	}
	return table[slices.IndexFunc(table, func(row standing) bool { return row.when })]
}

// done returns true if no pod has anything left to do.
func (s *summary) done() bool {
	t := s.tally
	if len(s.items) == 0 {
		return s.target.Desired == 0 && s.target.Workload != nil && s.blocked == ""
	}
	return t.outdated+t.changing+t.skipped+t.unlabelled+t.unwritten == 0 && s.blocked == "" && t.outOfService == 0
}

// allAvailable returns true if all pods are updated and available.
func (s *summary) allAvailable() bool {
	t := s.tally
	return s.done() && t.broken == 0 && t.available == t.updated && t.available >= s.target.Desired
}

// finished returns true if the pods have nothing left to do for the rollout.
func (s *summary) finished() bool {
	t := s.tally
	switch {
	case !s.goal.Undo && s.allAvailable():
		return true
	case s.goal.Undo && s.done() && (s.allAvailable() || s.stuck()):
		return true
	case s.goal.Undo && t.changing+t.outOfService == 0 && s.blocked == "" && s.rollbackBlocked():
		return true
	}
	return s.done() && s.strategy.OnFailure == inplace.Continue && t.broken > 0 && t.available == t.updated
}

// failing returns true if something has failed, and the rollout does not go back.
func (s *summary) failing() bool {
	return !s.goal.Undo && (s.tally.broken > 0 || len(s.failed) > 0)
}

// stuck returns true if nothing has changed for longer than a pod may take.
func (s *summary) stuck() bool { return s.now.Sub(s.progressed) >= s.strategy.Deadline }

// rollbackBlocked returns true if pods that cannot be put back have kept the others from it for too
// long.
func (s *summary) rollbackBlocked() bool {
	return s.noWayBack() != "" && s.stuck() && s.plan.Blocked == "" && !s.rollout.Spec.Paused
}

// noWayBack says of the first pod that cannot be put back why that is; empty without.
func (s *summary) noWayBack() string {
	for _, i := range s.items {
		if f := i.Status.Failure; i.Status.Stage == evaluate.Broken && len(i.Status.Images) > 0 {
			return objects.Clip(fmt.Sprintf("; pod %s cannot be put back: %s: %s", i.Pod.Name, f.Reason, f.Message),
				600)
		}
	}
	return ""
}

// failures are what the status says of what has failed, and how many there are.
func (s *summary) failures() ([]inplace.PodFailure, int32) {
	list := slices.Collect(maps.Values(s.failed))
	count := len(list)
	if s.goal.Undo {
		// What made the rollout go back stays to be read.
		names := map[string]bool{}
		for _, f := range s.rollout.Status.Failures {
			names[f.Pod] = true
		}
		list = slices.DeleteFunc(list, func(f inplace.PodFailure) bool { return names[f.Pod] })
		count = max(int(s.rollout.Status.Failed), len(s.rollout.Status.Failures)+len(list))
		list = append(list, s.rollout.Status.Failures...)
	}
	slices.SortFunc(list, func(a, b inplace.PodFailure) int { return cmp.Compare(a.Pod, b.Pod) })
	return list[:min(len(list), maxFailures)], int32(count)
}

func (s *summary) firstFailure() string {
	list, count := s.failures()
	if count == 0 {
		return ""
	}
	text := fmt.Sprintf("%s: %s: %s", notice.Subject(list[0]), list[0].Reason, list[0].Message)
	if count > 1 {
		text += fmt.Sprintf(" (and %d more)", count-1)
	}
	return objects.Clip(text, 600)
}

// status is the status as far as it follows from the pods.
func (s *summary) status() *inplace.InPlaceRolloutStatus {
	next := s.rollout.Status.DeepCopy()
	next.ObservedGeneration = s.rollout.Generation
	next.Desired, next.Updated, next.Ready, next.Unavailable = int32(s.target.Desired), 0, 0, int32(s.plan.Unavailable)
	next.Failures, next.Failed = s.failures()
	var pods []*corev1.Pod
	for _, i := range s.items {
		if i.Status.Serving {
			next.Ready++
		}
		if i.Status.Stage == evaluate.Updated && !i.Unlabelled && s.isTarget(i) {
			next.Updated++
		}
		pods = append(pods, i.Pod)
	}
	next.CurrentImages = map[string]string{}
	for _, c := range s.rollout.Spec.Containers {
		if image := workload.Usual(pods, c.Name, ""); image != "" {
			next.CurrentImages[c.Name] = image
		}
	}
	if limit := s.strategy.UnavailableLimit(s.target.Desired); s.plan.Unavailable > limit {
		notice.SetCondition(next, inplace.ConditionAvailable, false, inplace.ReasonMinimumUnavail,
			fmt.Sprintf("%d of %d pods are unavailable, at most %d may be", s.plan.Unavailable, s.target.Desired,
				limit))
	} else {
		notice.SetCondition(next, inplace.ConditionAvailable, true, inplace.ReasonMinimumAvail, "")
	}
	return next
}

// isTarget returns true if a pod has the images of the spec.
func (s *summary) isTarget(i *nodeops.Item) bool {
	for _, c := range s.rollout.Spec.Containers {
		if c.Image == "" {
			continue
		}
		have := pods.Changeable(i.Pod, c.Name)
		if have == nil || !i.Facts.Has(i.Ops.State, c.Name, have.Image, s.template.Of(c.Name, c.Image)) {
			return false
		}
	}
	return true
}

// outcome writes into the status what has become of a rollout that has ended.
func (s *summary) outcome(next *inplace.InPlaceRolloutStatus) {
	now := metav1.NewTime(s.now)
	next.CompletionTime = &now
	t := s.tally
	switch {
	case s.goal.Undo:
		next.Message = "rolled back: " + s.firstFailure() + s.noWayBack()
		if t.outdated > 0 {
			next.Message += fmt.Sprintf("; %d pods are left as they are: pods that cannot be put back have used up "+
				"maxUnavailable", t.outdated)
		}
		if t.available < t.updated || t.broken > 0 {
			next.Message += fmt.Sprintf("; %d pods are not available after it", t.updated+t.broken-t.available)
		}
		if name := workload.OwnName(s.target.Workload); name != "" {
			next.Message += "; to try again set another image, or change annotation " + inplace.RetryAnnotation +
				" of " + name
		}
		setProgressing(next, false, inplace.ReasonRolledBack, next.Message)
		notice.SetCondition(next, inplace.ConditionDegraded, true, inplace.ReasonRolledBack, next.Message)
	case t.broken > 0 || s.refused:
		next.Message = fmt.Sprintf("%d of %d pods are updated, %d have failed: %s", next.Updated, next.Desired,
			next.Failed, s.firstFailure())
		setProgressing(next, false, inplace.ReasonPodsFailed, next.Message)
		notice.SetCondition(next, inplace.ConditionDegraded, true, inplace.ReasonPodsFailed, next.Message)
	default:
		success := metav1.NewMicroTime(s.now)
		next.LastSuccessTime = &success
		next.Message = fmt.Sprintf("all %d pods are updated", next.Updated)
		s.addLeftOut(next)
		notice.SetCondition(next, inplace.ConditionProgressing, true, inplace.ReasonRolledOut, next.Message)
		notice.SetCondition(next, inplace.ConditionComplete, true, inplace.ReasonRolledOut, next.Message)
		notice.SetCondition(next, inplace.ConditionDegraded, false, inplace.ReasonAsExpected, "")
	}
}

// addLeftOut adds to the message how many pods the rollout leaves alone though they have its
// labels.
func (s *summary) addLeftOut(next *inplace.InPlaceRolloutStatus) {
	if text := workload.LeftOut(s.target.Mirrors); text != "" {
		next.Message += "; " + text
	}
}

// tallyOf counts the pods of a rollout.
func tallyOf(rollout types.UID, items []*nodeops.Item) tally {
	var t tally
	for _, i := range items {
		switch i.Status.Stage {
		case evaluate.Outdated:
			t.outdated++
		case evaluate.Updating:
			t.changing++
		case evaluate.Updated:
			t.updated++
			if i.Unlabelled {
				t.unlabelled++
			}
			if i.Status.Available && !i.Stale {
				t.available++
			}
			if i.Ops.API.Count > 0 && i.Ops.Refused == nil {
				t.unwritten++ // its label; that is tried again
			}
		case evaluate.Broken:
			t.broken++
		case evaluate.Skipped:
			t.skipped++
		}
		if shut, _ := evaluate.OutOfServiceBy(i.Pod); shut == rollout {
			t.outOfService++
		}
		if i.Ops.Updating {
			t.updating++
		}
	}
	return t
}

// setProgressing sets the condition Progressing, and Complete to False with the same reason.
func setProgressing(next *inplace.InPlaceRolloutStatus, progressing bool, reason, message string) {
	notice.SetCondition(next, inplace.ConditionProgressing, progressing, reason, message)
	notice.SetCondition(next, inplace.ConditionComplete, false, reason, message)
}

// numbersOnly returns true if a status differs from the one before in numbers only.
func numbersOnly(before, after *inplace.InPlaceRolloutStatus) bool {
	if before.ObservedGeneration != after.ObservedGeneration || before.Failed != after.Failed ||
		len(before.Conditions) != len(after.Conditions) {
		return false
	}
	for _, c := range after.Conditions {
		if b := meta.FindStatusCondition(before.Conditions, c.Type); b == nil || b.Status != c.Status ||
			b.Reason != c.Reason {
			return false
		}
	}
	return true
}

// setKstatus sets the conditions of kstatus, as kstatus would see a workload: a rollout whose
// partition holds pods back on purpose is current, a paused one is not.
func setKstatus(s *inplace.InPlaceRolloutStatus) {
	c, going := meta.FindStatusCondition(s.Conditions, inplace.ConditionComplete),
		meta.FindStatusCondition(s.Conditions, inplace.ConditionProgressing)
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
