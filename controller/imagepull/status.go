// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package imagepull

import (
	"fmt"
	"math"
	"slices"
	"strings"
	"time"

	"k8s.io/apimachinery/pkg/api/meta"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/cri-proxy/cri-proxy/api/apps/v1beta1"
	opsv1 "github.com/cri-proxy/cri-proxy/api/ops/v1"
	"github.com/cri-proxy/cri-proxy/controller/kstatus"
)

// How much of a job the status tells.
const (
	maxFailedNodes = 2000
	maxDetails     = 20
	maxSlowest     = 5
	maxMessage     = 300
)

// Messages are OpenKruise's, up to a colon or semicolon. It counts finished nodes where we count bytes, and says of every job that has
// ended that it has completed.
const (
	messageNoProgress = "job is running, no progress"
	messageNoNodes    = messageNoProgress + "; no node matches"
	messageProgress   = "job is running, progress %.1f%%"
	messageCompleted  = "job has completed"
	messageFailed     = "job has failed"
	messageDeadline   = "job exceeds activeDeadlineSeconds"
)

// Reasons of the conditions.
const (
	completePulling     = "Pulling"
	completePaused      = "Paused"
	completeWaiting     = "WaitingForNodes"
	completeUpToDate    = "UpToDate"
	completeInvalidSpec = "InvalidSpec"

	completeSucceeded   = "Succeeded"
	completeNodesFailed = "NodesFailed"
	completeNoNodes     = "NoMatchingNodes"
	completeDeadline    = "DeadlineExceeded"

	secretsFound   = "Found"
	secretsMissing = "MissingOrInvalid"

	pinsBounded = "Bounded"
)

// reasonPresent is the node's word for a pull for which nothing had to be done.
const reasonPresent = "Present"

// report is what the status is to say of the run: before is what it says now. The caller holds the mutex.
func (u *run) report(before *v1beta1.ImagePullJobStatus) *v1beta1.ImagePullJobStatus {
	s := &v1beta1.ImagePullJobStatus{
		StartTime: before.StartTime, CompletionTime: before.CompletionTime, Conditions: slices.Clone(before.Conditions),
		ObservedGeneration: before.ObservedGeneration, ObservedWork: before.ObservedWork,
		Desired: int32(len(u.members)),
	}
	var (
		done        float64
		known, told int64
		left, busy  []*member
	)
	for _, m := range u.members {
		share := m.fraction
		switch {
		case m.phase == succeeded || m.held:
			s.Succeeded++
			share = 1
		case m.phase == failed:
			s.Failed++
		case m.phase == active:
			s.Active++
			busy = append(busy, m)
		case m.away.reason != "":
			s.Skipped++
			left = append(left, m)
		}
		done += share
		if total := m.op.GetBytesTotal(); total > 0 {
			known, told = known+total, told+1
			s.BytesDone += min(m.op.GetBytesDone(), total)
		}
	}
	if told > 0 {
		s.BytesTotal = known + known/told*(int64(len(u.members))-told)
	}
	if s.Desired > 0 {
		s.Percent = int32(100*done/float64(s.Desired) + 1e-6)
		s.Progress = fmt.Sprintf("%d%%", s.Percent)
		s.Message = fmt.Sprintf(messageProgress, math.Floor(1000*done/float64(s.Desired)+1e-5)/10)
		if again := u.again(); again != "" {
			s.Message += "; " + again
		}
	} else {
		s.Message = messageNoNodes
	}

	byName := func(a, b *member) int { return strings.Compare(a.target.node.Name, b.target.node.Name) }
	tellFailures(s, u.failures())
	slices.SortFunc(left, byName)
	for _, m := range first(left, maxDetails) {
		s.SkippedNodes = append(s.SkippedNodes, v1beta1.NodePullFailure{Node: m.target.node.Name, Reason: m.away.reason, Message: shorten(m.away.message)})
	}
	slices.SortStableFunc(busy, func(a, b *member) int { return a.begun.Compare(b.begun) })
	for _, m := range first(busy, maxSlowest) {
		begun := metav1.NewTime(m.begun)
		s.SlowestNodes = append(s.SlowestNodes, v1beta1.NodePullProgress{
			Node: m.target.node.Name, Phase: phaseName(m.op.GetPhase()), Reason: m.op.GetReason(), Message: waitsFor(m),
			BytesDone: m.op.GetBytesDone(), BytesTotal: m.op.GetBytesTotal(), BytesPerSecond: m.op.GetBytesPerSecond(),
			Attempt: m.op.GetAttempt(), StartTime: &begun,
		})
	}
	u.tellSecrets(s)
	u.tellLimit(s)
	if text := u.unpinned(); text != "" {
		setCondition(s, v1beta1.ConditionPinned, false, pinsBounded, text)
	} else {
		meta.RemoveStatusCondition(&s.Conditions, v1beta1.ConditionPinned)
	}
	return s
}

// notPinned begins what a node says of an image that it has and does not pin.
const notPinned = "not pinned: "

// unpinned says what of the pins that the job asks for there is not; empty if all is as it asks. The caller holds the mutex.
func (u *run) unpinned() string {
	var parts []string
	if u.wish.shortened != "" {
		parts = append(parts, u.wish.shortened)
	}
	count, example := 0, ""
	for _, m := range u.members {
		if why, ok := strings.CutPrefix(m.op.GetMessage(), notPinned); ok && m.phase == succeeded {
			if count++; count == 1 {
				why, _, _ = strings.Cut(why, "; pulled "+unlimited)
				example = fmt.Sprintf("node %s says: %s", m.target.node.Name, shorten(why))
			}
		}
	}
	if count > 0 {
		parts = append(parts, fmt.Sprintf("on %d nodes kubelet may remove the image when the disk is full, %s", count, example))
	}
	return strings.Join(parts, "; ")
}

func (u *run) tellSecrets(s *v1beta1.ImagePullJobStatus) {
	switch {
	case u.keys == nil:
	case !u.keys.Asked:
		meta.RemoveStatusCondition(&s.Conditions, v1beta1.ConditionPullSecretsFound)
	case len(u.keys.Wrong) > 0:
		setCondition(s, v1beta1.ConditionPullSecretsFound, false, secretsMissing, strings.Join(first(u.keys.Wrong, maxDetails), "; "))
	default:
		message := ""
		if image := u.wish.request.GetImage(); !u.keys.Has(image) { // which may need none
			message = "none of them has credentials for the registry of " + image
		}
		setCondition(s, v1beta1.ConditionPullSecretsFound, true, secretsFound, message)
	}
}

// tellRunning sets the condition of a job that has not ended. The caller holds the mutex.
func (u *run) tellRunning(s *v1beta1.ImagePullJobStatus) {
	reason, message := completePulling, ""
	switch {
	case u.finished() && s.Desired == 0:
		reason, message = withoutNodes(u.wish.never)
	case u.finished():
		reason, message = completeUpToDate, "no node has anything left to do; nodes that join later get the image too"
	case u.wish.limit() == 0:
		reason, message = completePaused, "parallelism is 0: no node begins to pull"
	case s.Active == 0 && s.Skipped > 0:
		reason, message = completeWaiting, fmt.Sprintf("%d nodes cannot be commanded now, see skippedNodes; they are tried again", s.Skipped)
	default:
		message = u.again()
	}
	setCondition(s, v1beta1.ConditionComplete, false, reason, message)
	meta.RemoveStatusCondition(&s.Conditions, v1beta1.ConditionSucceeded)
}

// withoutNodes is the condition of a job that has not ended and that no node matches.
func withoutNodes(never bool) (reason, message string) {
	if never {
		return completeNoNodes, "no node matches; nodes that join later get the image"
	}
	return completeWaiting, fmt.Sprintf("no node matches; the job fails if none does within %s of its start", noNodesPatience)
}

// conclude makes the status that of a job that has ended. With late, its deadline was over before that.
func conclude(s *v1beta1.ImagePullJobStatus, late bool, now time.Time) (reason string) {
	end := metav1.NewTime(now)
	s.CompletionTime = &end
	s.Message = messageCompleted
	var message string
	switch {
	case late:
		over := s.Desired - s.Succeeded - s.Failed
		s.Message, reason = messageDeadline, completeDeadline
		message = fmt.Sprintf("%d of %d nodes have the image; %d were not done, what they pulled is cancelled", s.Succeeded, s.Desired, over)
		s.Failed += over
		if over > 0 {
			s.FailureReasons = append(s.FailureReasons, v1beta1.FailureCount{Reason: completeDeadline, Count: over})
		}
	case s.Desired == 0:
		reason, message = completeNoNodes, "no node matches: see the job's selectors, and the labels of nodes or pods; nothing was pulled. A job of type Never waits for nodes"
		s.Message = messageFailed + ": " + message
	case s.Failed > 0:
		reason = completeNodesFailed
		message = fmt.Sprintf("%d of %d nodes have no image: %s", s.Failed, s.Desired, reasonsText(s))
		s.Message = shorten(messageFailed + ": " + message)
	default:
		reason, message = completeSucceeded, fmt.Sprintf("all %d nodes have the image", s.Desired)
	}
	s.Active, s.Skipped, s.SlowestNodes = 0, 0, nil
	setCondition(s, v1beta1.ConditionComplete, true, reason, message)
	setCondition(s, v1beta1.ConditionSucceeded, reason == completeSucceeded || reason == completeDeadline && s.Failed == 0 && s.Desired > 0, reason, message)
	return reason
}

// tellReady says for kstatus how the job stands. One that never ends is current while no node has anything left to do.
func tellReady(s *v1beta1.ImagePullJobStatus) {
	c := meta.FindStatusCondition(s.Conditions, v1beta1.ConditionComplete)
	if c == nil {
		return
	}
	standing, reason, message := kstatus.AtWork, c.Reason, c.Message
	atRest := c.Status == metav1.ConditionTrue || c.Reason == completeUpToDate || c.Reason == completeNoNodes
	ended := meta.FindStatusCondition(s.Conditions, v1beta1.ConditionSucceeded)
	switch {
	case atRest && s.Failed > 0 && c.Status == metav1.ConditionFalse:
		standing, reason, message = kstatus.Failed, completeNodesFailed, fmt.Sprintf("%d of %d nodes have no image: %s", s.Failed, s.Desired, reasonsText(s))
	case atRest && s.Failed > 0, ended != nil && ended.Status == metav1.ConditionFalse, c.Reason == completeInvalidSpec:
		standing = kstatus.Failed
	case atRest:
		standing = kstatus.Current
	}
	kstatus.Set(&s.Conditions, s.ObservedGeneration, standing, reason, message)
}

func setCondition(s *v1beta1.ImagePullJobStatus, kind string, is bool, reason, message string) {
	status := metav1.ConditionFalse
	if is {
		status = metav1.ConditionTrue
	}
	meta.SetStatusCondition(&s.Conditions, metav1.Condition{
		Type: kind, Status: status, Reason: reason, Message: message, ObservedGeneration: s.ObservedGeneration,
	})
}

func phaseName(p opsv1.PullPhase) string {
	switch p {
	case opsv1.PullPhase_PULL_RESOLVING:
		return "Resolving"
	case opsv1.PullPhase_PULL_FETCHING:
		return "Fetching"
	case opsv1.PullPhase_PULL_UNPACKING:
		return "Unpacking"
	}
	return "Waiting"
}

// waitsFor is what a node says of what it waits for, or said of why it tries again.
func waitsFor(m *member) string {
	if m.again == "" && m.op.GetPhase() == opsv1.PullPhase_PULL_WAITING {
		return shorten(m.op.GetMessage())
	}
	return shorten(m.again)
}

func first[T any](list []T, n int) []T { return list[:min(len(list), n)] }

func shorten(text string) string {
	if len(text) <= maxMessage {
		return text
	}
	return strings.ToValidUTF8(text[:maxMessage], "") + "…"
}
