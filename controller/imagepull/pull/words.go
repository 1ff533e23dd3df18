// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package pull

import (
	"cmp"
	"strings"

	opsv1 "github.com/cri-proxy/cri-proxy/api/ops/v1"
)

// PhaseName is the word for the phase of a pull that goes on.
func PhaseName(p opsv1.PullPhase) string {
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

// FailureOf is why the attempt failed after which a node waits for the next one. The reason is
// empty if the node does not name it.
func FailureOf(op *opsv1.PullOperation) (reason, text string) {
	if f := op.GetLastFailure(); f != nil {
		return f.GetReason(), f.GetMessage()
	}
	return oldFailureOf(op)
}

// NotPinned is why an image that was to be pinned is not; empty if it is.
func NotPinned(op *opsv1.PullOperation) string { return cmp.Or(op.GetNotPinned(), oldNotPinned(op)) }

// LimitNotKept is why a node does not keep the speed limit; empty if it does.
func LimitNotKept(op *opsv1.PullOperation) string {
	return cmp.Or(op.GetLimitNotKept(), oldLimitNotKept(op))
}

// cancelReason begins what the controller says when it cancels a pull.
const cancelReason = "ImagePullJob: "

// CancelText says to people why the controller cancels a pull, for a code that is not
// opsv1.CancelCodeOverdue.
func CancelText(code string) string {
	why := "the job was deleted"
	switch code {
	case opsv1.CancelCodeChanged:
		why = "it has been changed"
	case opsv1.CancelCodeNotChosen:
		why = "the node is no longer chosen"
	case opsv1.CancelCodeDeadline:
		why = "activeDeadlineSeconds is over"
	}
	return cancelReason + why
}

// CancelledByController says that a controller has cancelled the pull, and not somebody by hand.
func CancelledByController(op *opsv1.PullOperation) bool {
	return op.GetPhase() == opsv1.PullPhase_PULL_CANCELLED &&
		(op.GetCancelCode() != "" || strings.Contains(op.GetMessage(), cancelReason))
}
