// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package pull

import (
	"time"

	opsv1 "github.com/cri-proxy/cri-proxy/api/ops/v1"
)

// renewalLead is how long before its next attempt a node that the registry has refused is to have
// the secrets of that moment.
const renewalLead = 250 * time.Millisecond

// Renewal says when a node is to get credentials again, which may have changed since.
type Renewal struct {
	attempt int32 // that failed
	at      time.Time
	done    bool
}

// Note takes up what the node says, and returns how long to wait for the renewal; 0 means for ever.
func (r *Renewal) Note(op *opsv1.PullOperation, now time.Time) time.Duration {
	why, _ := FailureOf(op)
	if op.GetReason() != opsv1.PullReasonBackOff || op.GetAttempt() == 0 ||
		why != opsv1.PullReasonNotFound && why != opsv1.PullReasonUnauthorized {
		return 0
	}
	if r.attempt != op.GetAttempt() {
		after := opsv1.PullBackOff(op.GetAttempt())
		if op.GetRetryAfter() != nil {
			after = op.GetRetryAfter().AsDuration()
		}
		*r = Renewal{attempt: op.GetAttempt(), at: now.Add(after - renewalLead)}
	}
	if r.done {
		return 0
	}
	return max(r.at.Sub(now), time.Millisecond)
}

// Due says, once for each attempt, that it is time.
func (r *Renewal) Due(now time.Time) bool {
	if r.attempt == 0 || r.done || now.Before(r.at) {
		return false
	}
	r.done = true
	return true
}
