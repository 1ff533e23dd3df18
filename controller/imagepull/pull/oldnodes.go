// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package pull

import (
	"strings"

	opsv1 "github.com/cri-proxy/cri-proxy/api/ops/v1"
)

// Nodes of the version before say in the message of a pull what others say in fields. This file
// reads these messages, and goes with the next release.

// oldFailureOf reads "attempt 2 of 4 in 1s: REASON: TEXT". A message without a reason is the text.
func oldFailureOf(op *opsv1.PullOperation) (reason, text string) {
	_, text, ok := strings.Cut(op.GetMessage(), ": ")
	if !ok {
		return "", op.GetMessage()
	}
	if word, rest, ok := strings.Cut(text, ": "); ok && !strings.Contains(word, " ") {
		return word, rest
	}
	return "", text
}

// oldUnlimited is in the message of an image that a node pulls, or has pulled, faster than it was
// told to: "pulled without the speed limit of RATE: WHY", after what else there is to say.
const oldUnlimited = "without the speed limit of "

// oldNotPinned reads "not pinned: WHY", which an image has that a node has and does not pin.
func oldNotPinned(op *opsv1.PullOperation) string {
	why, ok := strings.CutPrefix(op.GetMessage(), "not pinned: ")
	if !ok {
		return ""
	}
	why, _, _ = strings.Cut(why, "; pulled "+oldUnlimited)
	return why
}

// oldLimitNotKept reads why a node does not keep the speed limit.
func oldLimitNotKept(op *opsv1.PullOperation) string {
	if _, why, ok := strings.Cut(op.GetMessage(), oldUnlimited); ok {
		return oldUnlimited + why
	}
	return ""
}
