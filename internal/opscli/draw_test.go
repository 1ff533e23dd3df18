// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package opscli_test

import (
	"bytes"
	"fmt"
	"strings"
	"testing"
	"time"

	"google.golang.org/protobuf/types/known/timestamppb"

	opsv1 "github.com/cri-proxy/cri-proxy/api/ops/v1"
	"github.com/cri-proxy/cri-proxy/internal/opscli"
)

const mib = 1 << 20

// epoch is the time of the tests' operations, and now a bit later.
var epoch = time.Date(2026, 1, 2, 3, 4, 5, 0, time.UTC)

func now() time.Time { return epoch.Add(90 * time.Second) }

// phases is the course of an operation on one container through these phases.
func phases(last string, ps ...opsv1.Phase) []*opsv1.Operation {
	var course []*opsv1.Operation
	for i, p := range ps {
		op := &opsv1.Operation{Uid: "op-2", Pod: &opsv1.PodRef{Namespace: "default", Name: "web"}, Phase: p,
			CreateTime: timestamppb.New(epoch),
			Containers: []*opsv1.ContainerOperation{{Name: "app", Phase: p}}}
		if i == len(ps)-1 && p >= opsv1.Phase_PHASE_SUCCEEDED {
			op.FinishTime = timestamppb.New(epoch)
			op.Message, op.Containers[0].Message = last, last
		}
		course = append(course, op)
	}
	return course
}

// state is the upgrade in a phase.
func state(p opsv1.Phase) *opsv1.Operation {
	op := &opsv1.Operation{
		Uid: "op-3", Kind: "Upgrade", Pod: &opsv1.PodRef{Namespace: "default", Name: "web"}, Phase: p,
		CreateTime: timestamppb.New(epoch), Requester: "ctl/me",
		Containers: []*opsv1.ContainerOperation{
			{Name: "app", Phase: p, Image: "app:v2",
				Pull: &opsv1.PullOperation{Phase: opsv1.PullPhase_PULL_SUCCEEDED}}},
	}
	if p == opsv1.Phase_PHASE_SUCCEEDED || p == opsv1.Phase_PHASE_FAILED || p == opsv1.Phase_PHASE_CANCELLED {
		op.FinishTime = timestamppb.New(epoch.Add(time.Second))
	}
	return op
}

func fetchingImage(percent int64) *opsv1.Operation {
	op := state(opsv1.Phase_PHASE_PULLING)
	op.Containers[0].Pull = &opsv1.PullOperation{Phase: opsv1.PullPhase_PULL_FETCHING, BytesDone: percent * mib,
		BytesTotal: 100 * mib, BytesPerSecond: 20 * mib}
	return op
}

// fetching is a pull of an image with three layers, so many percent of the way.
func fetching(percent int64) *opsv1.PullOperation {
	op := &opsv1.PullOperation{
		Uid: "pull-1", Image: "nginx:1", Resolved: "docker.io/library/nginx:1", Owner: "ctl/alice",
		Phase:     opsv1.PullPhase_PULL_FETCHING,
		BytesDone: percent * mib, BytesTotal: 100 * mib, BytesPerSecond: 20 * mib, Attempt: 1,
		CreateTime: timestamppb.New(epoch),
	}
	left := op.GetBytesDone()
	for i, size := range []int64{50 * mib, 30 * mib, 20 * mib} {
		done := min(left, size)
		left -= done
		op.Layers = append(op.Layers, &opsv1.LayerProgress{Digest: fmt.Sprintf("sha256:%d23456789abcdef", i),
			BytesDone: done, BytesTotal: size})
	}
	if percent == 100 {
		op.Phase, op.BytesPerSecond = opsv1.PullPhase_PULL_UNPACKING, 0
	}
	return op
}

func ended(phase opsv1.PullPhase, reason, message string) *opsv1.PullOperation {
	op := fetching(100)
	op.Phase, op.Reason, op.Message, op.FinishTime, op.ImageId = phase, reason, message,
		timestamppb.New(epoch.Add(time.Minute)), "sha256:fedcba9876543210"
	return op
}

func pulled() *opsv1.PullOperation { return ended(opsv1.PullPhase_PULL_SUCCEEDED, "Pulled", "") }

func TestScreenRedraws(t *testing.T) {
	var out bytes.Buffer
	update := opscli.Screen(&opscli.Printer{Out: &out, Format: opscli.Table, Now: now})
	for _, op := range phases("", opsv1.Phase_PHASE_STAGING, opsv1.Phase_PHASE_SUCCEEDED) {
		if err := update(op); err != nil {
			t.Fatal(err)
		}
	}
	first, second, found := strings.Cut(out.String(), "\x1b[?7l\x1b[2A\x1b[J")
	if !found || !strings.Contains(first, "Staging") || !strings.Contains(second, "Succeeded") {
		t.Errorf("%q", out.String())
	}
}

func TestImageUpdateScreen(t *testing.T) {
	var out bytes.Buffer
	update := opscli.Screen(&opscli.Printer{Out: &out, Format: opscli.Table, Now: now})
	for _, op := range []*opsv1.Operation{fetchingImage(50), state(opsv1.Phase_PHASE_STAGING)} {
		if err := update(op); err != nil {
			t.Fatal(err)
		}
	}
	first, second, found := strings.Cut(out.String(), "\x1b[?7l\x1b[3A\x1b[J")
	if !found || !strings.Contains(first, "\n  [====================>                   ]  50 % app:v2\n") ||
		strings.Contains(second, "[=") {
		t.Errorf("%q", out.String())
	}
}

func TestPullBars(t *testing.T) {
	var out bytes.Buffer
	width, height := 80, 24
	update := opscli.Bars(&out, func() (int, int) { return width, height })
	draw := func(op *opsv1.PullOperation) string {
		out.Reset()
		if err := update(op); err != nil {
			t.Fatal(err)
		}
		return out.String()
	}
	for _, tt := range []struct {
		name, want    string
		width, height int
		op            *opsv1.PullOperation
	}{
		{"begins", "\x1b[?7l" + `nginx:1  Fetching  0 % of 100.0 MiB, 20.0 MiB/s, 5s left
  023456789abc [>                                  ]   0 %         0 B of 50.0 MiB
  123456789abc [>                                  ]   0 %         0 B of 30.0 MiB
  223456789abc [>                                  ]   0 %         0 B of 20.0 MiB
` + "\x1b[?7h", 80, 24, fetching(0)},
		{"draws over itself", "\x1b[?7l\x1b[4A\x1b[J" + `nginx:1  Fetching  65 % of 100.0 MiB, 20.0 MiB/s, 2s left
  023456789abc [========================================] 100 %    50.0 MiB of 50.0 MiB
  123456789abc [====================>                   ]  50 %    15.0 MiB of 30.0 MiB
  223456789abc [>                                       ]   0 %         0 B of 20.0 MiB
` + "\x1b[?7h", 200, 24, fetching(65)},
		{"little room", "\x1b[?7l\x1b[4A\x1b[J" + `nginx:1  Fetching  65 % of 100.0 MiB, 20.0 MiB/s, 2s left
  123456789abc [==>  ]  50 %    15.0 MiB of 30.0 MiB
  and 2 more layers; 1 of 3 are done
` + "\x1b[?7h", 20, 4, fetching(65)},
		{"ends", "\x1b[?7l\x1b[3A\x1b[J" + `nginx:1  Succeeded (Pulled)
` + "\x1b[?7h", 80, 24, pulled()},
	} {
		width, height = tt.width, tt.height
		if got := draw(tt.op); got != tt.want {
			t.Errorf("%s: got\n%q\nwant\n%q", tt.name, got, tt.want)
		}
	}
}

func TestPhaseNames(t *testing.T) {
	for p, want := range map[opsv1.Phase]string{0: "Unknown", opsv1.Phase_PHASE_REVEALING: "Revealing", 99: "99"} {
		if got := opscli.PhaseName(p); got != want {
			t.Errorf("%d: %s", p, got)
		}
	}
}
