// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package opsv1_test

import (
	"testing"
	"time"

	opsv1 "github.com/cri-proxy/cri-proxy/api/ops/v1"
)

func TestPullBackOff(t *testing.T) {
	for attempt, want := range map[int32]time.Duration{
		0: time.Second, 1: time.Second, 2: 2 * time.Second, 3: 4 * time.Second, 5: 16 * time.Second,
		6: 30 * time.Second, 12: 30 * time.Second, 1 << 30: 30 * time.Second,
	} {
		if got := opsv1.PullBackOff(attempt); got != want {
			t.Errorf("after attempt %d: %s, want %s", attempt, got, want)
		}
	}
}

func TestInQueue(t *testing.T) {
	for _, tt := range []struct {
		name string
		op   *opsv1.PullOperation
		want bool
	}{
		{"before the first attempt", &opsv1.PullOperation{Phase: opsv1.PullPhase_PULL_FETCHING}, true},
		{"for its turn", &opsv1.PullOperation{Attempt: 1, Reason: opsv1.PullReasonInQueue}, true},
		{"for kubelet", &opsv1.PullOperation{Attempt: 1, Reason: opsv1.PullReasonYieldsToKubelet}, true},
		{"for credentials", &opsv1.PullOperation{Attempt: 1, Reason: opsv1.PullReasonCredentialsNeeded}, true},
		{"for its registry", &opsv1.PullOperation{Attempt: 1, Reason: opsv1.PullReasonBackOff}, false},
		{"at work", &opsv1.PullOperation{Attempt: 1, Phase: opsv1.PullPhase_PULL_FETCHING}, false},
	} {
		if got := opsv1.InQueue(tt.op); got != tt.want {
			t.Errorf("%s: %v", tt.name, got)
		}
	}
}
