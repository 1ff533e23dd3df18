// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package list

import (
	"fmt"

	"k8s.io/apimachinery/pkg/api/meta"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/cri-proxy/cri-proxy/api/apps/v1beta1"
	"github.com/cri-proxy/cri-proxy/controller/imagepull/report"
	"github.com/cri-proxy/cri-proxy/controller/imagepull/spec"
	"github.com/cri-proxy/cri-proxy/controller/kstatus"
)

// done says that all nodes of a child are done, and that the child does not begin again.
func done(child *v1beta1.ImagePullJob) bool {
	s := &child.Status
	if child.Spec.CompletionPolicy.Type != v1beta1.Never {
		return s.CompletionTime != nil && !spec.BeginsAnew(child)
	}
	return s.StartTime != nil && s.Desired == s.Succeeded+s.Failed
}

// succeeded says that all nodes of a child that is done have the image.
func succeeded(child *v1beta1.ImagePullJob) bool {
	s := &child.Status
	return s.Failed == 0 && !meta.IsStatusConditionFalse(s.Conditions, v1beta1.ConditionSucceeded)
}

// retriesOf is what a child at work says of nodes that try again; empty if none does.
func retriesOf(child *v1beta1.ImagePullJob) string {
	c := meta.FindStatusCondition(child.Status.Conditions, v1beta1.ConditionComplete)
	if c != nil && c.Status == metav1.ConditionFalse && c.Reason == report.Pulling {
		return c.Message
	}
	return ""
}

// count adds a child to the status.
func count(next *v1beta1.ImageListPullJobStatus, child *v1beta1.ImagePullJob) {
	s := &child.Status
	if s.Active > 0 {
		next.Active++
	}
	if done(child) {
		next.Completed++
		if succeeded(child) {
			next.Succeeded++
		}
	}
	if s.Failed > 0 || done(child) && !succeeded(child) {
		message := fmt.Sprintf("failed on %d of %d nodes", s.Failed, s.Desired)
		if c := meta.FindStatusCondition(s.Conditions, v1beta1.ConditionSucceeded); s.Failed == 0 && c != nil {
			message = c.Message
		}
		if text := report.Reasons(s); text != "" {
			message += ": " + text
		}
		next.FailedImageStatuses = append(next.FailedImageStatuses, &v1beta1.FailedImageStatus{
			ImagePullJob: child.Name, Name: child.Spec.Image, Message: report.Shorten(message),
		})
	}
}

// setReady sets the conditions that kstatus reads. blocked is what keeps the list from ever ending,
// retries what keeps nodes trying.
func setReady(s *v1beta1.ImageListPullJobStatus, blocked, retries string) {
	standing, reason, message := kstatus.AtWork, report.Pulling, retries
	switch {
	case blocked != "":
		standing, reason, message = kstatus.Failed, eventForeignJob, blocked
	case s.Completed < s.Desired:
	case s.Succeeded < s.Desired:
		standing, reason = kstatus.Failed, report.NodesFailed
		message = fmt.Sprintf("%d of %d images are on all nodes", s.Succeeded, s.Desired)
	default:
		standing, reason = kstatus.Current, report.Succeeded
		message = fmt.Sprintf("all %d images are on all nodes", s.Desired)
	}
	kstatus.Set(&s.Conditions, s.ObservedGeneration, standing, reason, message)
}
