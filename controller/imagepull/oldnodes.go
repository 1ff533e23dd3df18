// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package imagepull

import (
	"strings"

	opsv1 "github.com/cri-proxy/cri-proxy/api/ops/v1"
)

// failureOf is why the last attempt of a pull failed after which the node waits for the next one. A
// node says "attempt 2 of 4 in 1s: REASON: TEXT". The reason is empty if the node does not name it.
func failureOf(op *opsv1.PullOperation) (reason, text string) {
	_, text, ok := strings.Cut(op.GetMessage(), ": ")
	if !ok {
		return "", op.GetMessage()
	}
	if word, rest, ok := strings.Cut(text, ": "); ok && !strings.Contains(word, " ") {
		return word, rest
	}
	return "", text
}

// notPinned begins what a node says of an image that it has and does not pin.
const notPinned = "not pinned: "

// unlimited is in what a node says of an image that it pulls, or has pulled, faster than it was
// told to: "pulled without the speed limit of RATE: WHY", after what else there is to say.
const unlimited = "without the speed limit of "

// notPinnedOf is why a node does not pin an image that it has. ok says that it does not.
func notPinnedOf(op *opsv1.PullOperation) (why string, ok bool) {
	why, ok = strings.CutPrefix(op.GetMessage(), notPinned)
	why, _, _ = strings.Cut(why, "; pulled "+unlimited)
	return why, ok
}

// limitNotKeptOf says that a node does not keep the speed limit, and why not; empty if it does.
func limitNotKeptOf(op *opsv1.PullOperation) string {
	if _, why, ok := strings.Cut(op.GetMessage(), unlimited); ok {
		return unlimited + why
	}
	return ""
}
