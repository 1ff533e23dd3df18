// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package imagepull

import (
	"fmt"
	"slices"

	opsv1 "github.com/cri-proxy/cri-proxy/api/ops/v1"
	"github.com/cri-proxy/cri-proxy/controller/imagepull/pull"
	"github.com/cri-proxy/cri-proxy/controller/imagepull/report"
)

// noteRetry notes that an attempt has failed and that the node tries again. A reason that is new
// makes the status urgent.
func (t *table) noteRetry(n *nodeState, op *opsv1.PullOperation) {
	switch {
	case op.GetReason() == opsv1.PullReasonBackOff:
		reason, text := pull.FailureOf(op)
		if n.lastFailure = text; reason != "" {
			n.lastFailure = reason + ": " + text
		}
		if len(t.reported.retries) < report.MaxDetails && !slices.Contains(t.reported.retries, reason) {
			t.reported.retries = append(t.reported.retries, reason)
			t.throttle.Urge()
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
