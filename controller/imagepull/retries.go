// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package imagepull

import (
	"fmt"
	"slices"
	"time"

	opsv1 "github.com/cri-proxy/cri-proxy/api/ops/v1"
	"github.com/cri-proxy/cri-proxy/controller/imagepull/report"
)

// renewalLead is how long before its next attempt a node that the registry has refused is to have
// the secrets of that moment.
const renewalLead = 250 * time.Millisecond

// renewal says when a node is to get credentials again, which may have changed since.
type renewal struct {
	attempt int32 // that failed
	at      time.Time
	done    bool
}

// note takes up what the node says, and returns how long to wait for the renewal; 0 means for ever.
func (r *renewal) note(op *opsv1.PullOperation, now time.Time) time.Duration {
	why, _ := failureOf(op)
	if op.GetReason() != opsv1.PullReasonBackOff || op.GetAttempt() == 0 ||
		why != opsv1.PullReasonNotFound && why != opsv1.PullReasonUnauthorized {
		return 0
	}
	if r.attempt != op.GetAttempt() {
		after := opsv1.PullBackOff(op.GetAttempt())
		if op.GetRetryAfter() != nil {
			after = op.GetRetryAfter().AsDuration()
		}
		*r = renewal{attempt: op.GetAttempt(), at: now.Add(after - renewalLead)}
	}
	if r.done {
		return 0
	}
	return max(r.at.Sub(now), time.Millisecond)
}

// due says, once for each attempt, that it is time.
func (r *renewal) due(now time.Time) bool {
	if r.attempt == 0 || r.done || now.Before(r.at) {
		return false
	}
	r.done = true
	return true
}

// failureOf is why the attempt failed after which a node waits for the next one. The reason is
// empty if the node does not name it.
func failureOf(op *opsv1.PullOperation) (reason, text string) {
	if f := op.GetLastFailure(); f != nil {
		return f.GetReason(), f.GetMessage()
	}
	return oldFailureOf(op)
}

// noteRetry notes that an attempt has failed and that the node tries again. A reason that is new
// makes the status urgent.
func (t *table) noteRetry(n *nodeState, op *opsv1.PullOperation) {
	switch {
	case op.GetReason() == opsv1.PullReasonBackOff:
		reason, text := failureOf(op)
		if n.lastFailure = text; reason != "" {
			n.lastFailure = reason + ": " + text
		}
		if len(t.reported.retries) < report.MaxDetails && !slices.Contains(t.reported.retries, reason) {
			t.reported.retries = append(t.reported.retries, reason)
			t.throttle.urgent = true
			t.throttle.add(0)
		}
	case op.GetPhase() == opsv1.PullPhase_PULL_FETCHING, op.GetPhase() == opsv1.PullPhase_PULL_UNPACKING:
		n.lastFailure = ""
	}
}

// retries says how many nodes try again, and why the first of them does; empty if none does.
func (nodes nodeStates) retries() string {
	count := 0
	var one *nodeState
	for _, n := range nodes {
		if n.phase == active && n.lastFailure != "" {
			if count++; one == nil || n.name() < one.name() {
				one = n
			}
		}
	}
	if count == 0 {
		return ""
	}
	return fmt.Sprintf("%s again, node %s says: %s", counted(count, "node tries", "nodes try"), one.name(),
		report.Shorten(one.lastFailure))
}

func counted(n int, one, many string) string {
	if n == 1 {
		return "1 " + one
	}
	return fmt.Sprintf("%d %s", n, many)
}
