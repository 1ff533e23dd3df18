// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package report

import (
	"fmt"
	"time"

	"k8s.io/apimachinery/pkg/api/meta"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/cri-proxy/cri-proxy/api/apps/v1beta1"
	"github.com/cri-proxy/cri-proxy/controller/kstatus"
	"github.com/cri-proxy/cri-proxy/controller/objects"
)

// Messages are OpenKruise's, up to a colon or semicolon. OpenKruise counts finished nodes where we
// count bytes, and says of each job that has ended that it has completed.
const (
	MessageNoProgress = "job is running, no progress"
	MessageNoNodes    = MessageNoProgress + "; no node matches"
	MessageProgress   = "job is running, progress %.1f%%"
	messageCompleted  = "job has completed"
	messageFailed     = "job has failed"
	messageDeadline   = "job exceeds activeDeadlineSeconds"
)

// Reasons of the condition Complete of a job that has not ended.
const (
	Pulling     = "Pulling"
	Paused      = "Paused"
	Waiting     = "WaitingForNodes"
	UpToDate    = "UpToDate"
	InvalidSpec = "InvalidSpec"
)

// Reasons of the conditions of a job that has ended. NoNodes is also that of a job that never ends
// and matches no node.
const (
	Succeeded        = "Succeeded"
	NodesFailed      = "NodesFailed"
	NoNodes          = "NoMatchingNodes"
	DeadlineExceeded = "DeadlineExceeded"
)

// EventCompleted is the reason of the Event of a job or list that has succeeded.
const EventCompleted = "PullCompleted"

// SetCondition sets a condition of a job.
func SetCondition(s *v1beta1.ImagePullJobStatus, kind string, is bool, reason, message string) {
	status := metav1.ConditionFalse
	if is {
		status = metav1.ConditionTrue
	}
	meta.SetStatusCondition(&s.Conditions, metav1.Condition{
		Type: kind, Status: status, Reason: reason, Message: message, ObservedGeneration: s.ObservedGeneration,
	})
}

// End turns the status of a job at work into that of a job that has ended, and returns the reason
// of its conditions. late says that the job's deadline passed first.
func End(s *v1beta1.ImagePullJobStatus, late bool, now time.Time) (reason string) {
	end := metav1.NewTime(now)
	s.CompletionTime = &end
	s.Message = messageCompleted
	var message string
	switch {
	case late:
		over := s.Desired - s.Succeeded - s.Failed
		s.Message, reason = messageDeadline, DeadlineExceeded
		message = fmt.Sprintf("%d of %d nodes have the image; %d were not done, what they pulled is cancelled",
			s.Succeeded, s.Desired, over)
		s.Failed += over
		if over > 0 {
			s.FailureReasons = append(s.FailureReasons, v1beta1.FailureCount{Reason: DeadlineExceeded, Count: over})
		}
	case s.Desired == 0:
		reason = NoNodes
		message = "no node matches: see the job's selectors, and the labels of nodes or pods; nothing was pulled. " +
			"A job of type Never waits for nodes"
		s.Message = messageFailed + ": " + message
	case s.Failed > 0:
		reason = NodesFailed
		message = withoutImage(s)
		s.Message = Shorten(messageFailed + ": " + message)
	default:
		reason, message = Succeeded, fmt.Sprintf("all %d nodes have the image", s.Desired)
	}
	s.Active, s.Skipped, s.SlowestNodes, s.SkippedNodes = 0, 0, nil, nil
	succeeded := reason == Succeeded || reason == DeadlineExceeded && s.Failed == 0 && s.Desired > 0
	SetCondition(s, v1beta1.ConditionComplete, true, reason, message)
	SetCondition(s, v1beta1.ConditionSucceeded, succeeded, reason, message)
	return reason
}

func withoutImage(s *v1beta1.ImagePullJobStatus) string {
	return fmt.Sprintf("%d of %d nodes have no image: %s", s.Failed, s.Desired, Reasons(s))
}

// SetReady sets the conditions that kstatus reads. A job that never ends is current while no node
// has anything left to do.
func SetReady(s *v1beta1.ImagePullJobStatus) {
	c := meta.FindStatusCondition(s.Conditions, v1beta1.ConditionComplete)
	if c == nil {
		return
	}
	standing, reason, message := kstatus.AtWork, c.Reason, c.Message
	atRest := c.Status == metav1.ConditionTrue || c.Reason == UpToDate || c.Reason == NoNodes
	failed := meta.IsStatusConditionFalse(s.Conditions, v1beta1.ConditionSucceeded)
	switch {
	case atRest && s.Failed > 0 && c.Status == metav1.ConditionFalse:
		standing, reason, message = kstatus.Failed, NodesFailed, withoutImage(s)
	case atRest && s.Failed > 0, failed, c.Reason == InvalidSpec:
		standing = kstatus.Failed
	case atRest:
		standing = kstatus.Current
	}
	kstatus.Set(&s.Conditions, s.ObservedGeneration, standing, reason, message)
}

// maxMessage bounds what the status quotes.
const maxMessage = 300

// Shorten cuts a text to what a status has room for.
func Shorten(text string) string { return objects.Clip(text, maxMessage) }

// First is the beginning of a list, of at most n elements.
func First[T any](list []T, n int) []T { return list[:min(len(list), n)] }
