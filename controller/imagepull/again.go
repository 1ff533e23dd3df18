// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package imagepull

import (
	"fmt"
	"slices"
	"strings"
	"time"

	opsv1 "github.com/cri-proxy/cri-proxy/api/ops/v1"
)

const (
	// secretsLead is how long before its next attempt a node that the registry said no to is to have the secrets of the moment.
	secretsLead = 250 * time.Millisecond
	// secretsAgain is how long secrets are used that were read for a node which needs others: a job reads them twice a second at most,
	// whatever the number of its nodes.
	secretsAgain = 500 * time.Millisecond

	// reasonBackOff is the node's word for a pull that waits for its next attempt.
	reasonBackOff = "BackOff"
)

// whyAgain is what the node says of the attempt after which it waits for the next one: "attempt 2 of 4 in 1s: REASON: TEXT". The reason is
// empty if it is not told.
func whyAgain(op *opsv1.PullOperation) (reason, text string) {
	_, text, ok := strings.Cut(op.GetMessage(), ": ")
	if !ok {
		return "", op.GetMessage()
	}
	if word, rest, ok := strings.Cut(text, ": "); ok && !strings.Contains(word, " ") {
		return word, rest
	}
	return "", text
}

// renewal says when a pull is to get the credentials of the moment again, which may be others.
type renewal struct {
	attempt int32 // that failed
	at      time.Time
	done    bool
}

// note looks at what the node says, and returns how long that holds; 0 means for ever.
func (r *renewal) note(op *opsv1.PullOperation, now time.Time) time.Duration {
	why, _ := whyAgain(op)
	if op.GetReason() != reasonBackOff || op.GetAttempt() == 0 || why != "NotFound" && why != "Unauthorized" {
		return 0
	}
	if r.attempt != op.GetAttempt() {
		*r = renewal{attempt: op.GetAttempt(), at: now.Add(backOffAfter(op.GetAttempt()) - secretsLead)}
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

// triesAgain notes that an attempt of the node's has failed, and lets a reason be told at once that is new. The caller holds the mutex.
func (u *run) triesAgain(m *member, op *opsv1.PullOperation) {
	switch {
	case op.GetReason() == reasonBackOff:
		reason, text := whyAgain(op)
		if m.again = text; reason != "" {
			m.again = reason + ": " + text
		}
		if len(u.told.again) < maxDetails && !slices.Contains(u.told.again, reason) {
			u.told.again = append(u.told.again, reason)
			u.pace.urgent = true
			u.pace.moved(0)
		}
	case op.GetPhase() == opsv1.PullPhase_PULL_FETCHING, op.GetPhase() == opsv1.PullPhase_PULL_UNPACKING:
		m.again = ""
	}
}

// again says how many nodes try again, and what the first says; empty if none does. The caller holds the mutex.
func (u *run) again() string {
	count := 0
	var one *member
	for _, m := range u.members {
		if m.phase == active && m.again != "" {
			if count++; one == nil || m.target.node.Name < one.target.node.Name {
				one = m
			}
		}
	}
	if count == 0 {
		return ""
	}
	return fmt.Sprintf("%s again, node %s says: %s", counted(count, "node tries", "nodes try"), one.target.node.Name, shorten(one.again))
}

func counted(n int, one, many string) string {
	if n == 1 {
		return "1 " + one
	}
	return fmt.Sprintf("%d %s", n, many)
}
