// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package recreate

import (
	"slices"
	"testing"
	"time"

	"google.golang.org/protobuf/types/known/timestamppb"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	appsv1alpha1 "github.com/cri-proxy/cri-proxy/api/apps/v1alpha1"
	opsv1 "github.com/cri-proxy/cri-proxy/api/ops/v1"
	"github.com/cri-proxy/cri-proxy/controller/recreate/accept"
)

// written writes a container's state as "app Succeeded killed: message".
func written(s *appsv1alpha1.ContainerRecreateRequestContainerRecreateState) string {
	text := s.Name + " " + string(s.Phase)
	if s.IsKilled {
		text += " killed"
	}
	if s.Message != "" {
		text += ": " + s.Message
	}
	return text
}

func TestObserve(t *testing.T) {
	now := time.Date(2026, 1, 1, 12, 0, 0, 0, time.UTC)
	op := func(phase opsv1.Phase, change ...func(*opsv1.ContainerOperation)) *opsv1.ContainerOperation {
		o := &opsv1.ContainerOperation{Name: "app", Phase: phase, IncumbentId: "old", Attempt: 1}
		if phase == opsv1.Phase_PHASE_SUCCEEDED {
			o.SuccessorId, o.StopTime = "new", timestamppb.New(now)
		}
		for _, f := range change {
			f(o)
		}
		return o
	}
	stopped := func(o *opsv1.ContainerOperation) { o.StopTime = timestamppb.New(now) }
	says := func(reason, message string) func(*opsv1.ContainerOperation) {
		return func(o *opsv1.ContainerOperation) { o.Reason, o.Message = reason, message }
	}
	shown := func(id string, restarts int32, ready bool, age time.Duration) *corev1.ContainerStatus {
		return &corev1.ContainerStatus{
			Name: "app", ContainerID: "containerd://" + id, RestartCount: restarts, Ready: ready,
			State: corev1.ContainerState{
				Running: &corev1.ContainerStateRunning{StartedAt: metav1.NewTime(now.Add(-age))}},
		}
	}
	ended := func(code int32) *corev1.ContainerStatus {
		s := shown("new", 1, false, 0)
		s.State = corev1.ContainerState{Terminated: &corev1.ContainerStateTerminated{ExitCode: code,
			Reason: "Completed"}}
		return s
	}
	waiting := shown("new", 1, false, 0)
	waiting.State = corev1.ContainerState{Waiting: &corev1.ContainerStateWaiting{Reason: "CrashLoopBackOff"}}
	always := corev1.ContainerRestartPolicyAlways

	tests := []struct {
		name       string
		before     appsv1alpha1.ContainerRecreateRequestPhase
		op         *opsv1.ContainerOperation
		replaced   bool
		status     *corev1.ContainerStatus
		minStarted time.Duration
		firstSeen  time.Time
		policy     corev1.RestartPolicy
		spec       *corev1.Container
		want       string // as written writes it
		wait       time.Duration
	}{
		{name: "not commanded", want: "app Pending"},
		{name: "not commanded by this controller", before: recreating, want: "app Recreating"},
		{name: "succeeded stays", before: succeeded, op: op(opsv1.Phase_PHASE_FAILED), want: "app Succeeded"},
		{name: "failed stays", before: failed, op: op(opsv1.Phase_PHASE_SUCCEEDED), status: shown("new", 1, true, 0),
			want: "app Failed"},
		{name: "queued", op: op(opsv1.Phase_PHASE_PENDING),
			want: "app Pending: waits for an earlier operation on this container"},
		{name: "staging", op: op(opsv1.Phase_PHASE_STAGING), want: "app Recreating"},
		{name: "preStop runs", op: op(opsv1.Phase_PHASE_STOPPING), want: "app Recreating"},
		{name: "stopped", op: op(opsv1.Phase_PHASE_STARTING, stopped), want: "app Recreating killed"},
		{name: "failed before the stop", op: op(opsv1.Phase_PHASE_FAILED, says("CreateFailed", "no space")),
			want: "app Failed: no space"},
		{name: "failed after it", op: op(opsv1.Phase_PHASE_FAILED, stopped, says("StartFailed", "no such file")),
			want: "app Failed killed: no such file"},
		{name: "failed without a word", op: op(opsv1.Phase_PHASE_FAILED, says("StartFailed", "")),
			want: "app Failed: the node says only: StartFailed"},
		{name: "cancelled", op: op(opsv1.Phase_PHASE_CANCELLED, says("Cancelled", "by ctl")),
			want: "app Failed: not recreated: by ctl"},
		{name: "pod not up to date", op: op(opsv1.Phase_PHASE_SUCCEEDED), status: shown("old", 0, true, time.Hour),
			want: "app Recreating killed"},
		{name: "no status", op: op(opsv1.Phase_PHASE_SUCCEEDED), want: "app Recreating killed"},
		{name: "new and ready", op: op(opsv1.Phase_PHASE_SUCCEEDED), status: shown("new", 1, true, 0),
			want: "app Succeeded killed"},
		{name: "new and not ready", op: op(opsv1.Phase_PHASE_SUCCEEDED), status: shown("new", 1, false, 0),
			want: "app Recreating killed"},
		{name: "a later one of kubelet's", op: op(opsv1.Phase_PHASE_SUCCEEDED), status: shown("newer", 2, true, 0),
			want: "app Succeeded killed"},
		{name: "an unknown one that is not later", op: op(opsv1.Phase_PHASE_SUCCEEDED),
			status: shown("odd", 1, true, 0),
			want:   "app Recreating killed"},
		{name: "too young", op: op(opsv1.Phase_PHASE_SUCCEEDED), status: shown("new", 1, true, 4*time.Second),
			minStarted: 10 * time.Second, want: "app Recreating killed", wait: 6 * time.Second},
		{name: "just old enough", op: op(opsv1.Phase_PHASE_SUCCEEDED), status: shown("new", 1, true, 10*time.Second),
			minStarted: 10 * time.Second, want: "app Succeeded killed"},
		{name: "node clock an hour ahead", op: op(opsv1.Phase_PHASE_SUCCEEDED),
			status:     shown("new", 1, true, -time.Hour),
			minStarted: 10 * time.Second, firstSeen: now.Add(-11 * time.Second), want: "app Succeeded killed"},
		{name: "crash loop", op: op(opsv1.Phase_PHASE_SUCCEEDED), status: waiting,
			want: "app Recreating killed: the new container is waiting (CrashLoopBackOff); waiting for it to " +
				"become ready"},
		{name: "ended, Always", op: op(opsv1.Phase_PHASE_SUCCEEDED), status: ended(0),
			want: "app Recreating killed: the new container exited with code 0; waiting for it to become ready"},
		{name: "ended, Never", op: op(opsv1.Phase_PHASE_SUCCEEDED), status: ended(1), policy: corev1.RestartPolicyNever,
			want: "app Failed killed: the new container ended (exit code 1, Completed) and its restartPolicy does " +
				"not start it again"},
		{name: "ended well, OnFailure", op: op(opsv1.Phase_PHASE_SUCCEEDED), status: ended(0),
			policy: corev1.RestartPolicyOnFailure,
			want: "app Failed killed: the new container ended (exit code 0, Completed) and its restartPolicy does " +
				"not start it again"},
		{name: "ended badly, OnFailure", op: op(opsv1.Phase_PHASE_SUCCEEDED), status: ended(1),
			policy: corev1.RestartPolicyOnFailure,
			want:   "app Recreating killed: the new container exited with code 1; waiting for it to become ready"},
		{name: "ended, Never, but a sidecar", op: op(opsv1.Phase_PHASE_SUCCEEDED), status: ended(0),
			policy: corev1.RestartPolicyNever, spec: &corev1.Container{RestartPolicy: &always},
			want: "app Recreating killed: the new container exited with code 0; waiting for it to become ready"},
		{name: "replaced by another request", op: op(opsv1.Phase_PHASE_SUCCEEDED), replaced: true,
			status: shown("new", 1, true, 0), want: "app Succeeded"},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			c := &container{
				name: "app", op: tt.op, replaced: tt.replaced, status: tt.status, spec: tt.spec,
				firstSeen: tt.firstSeen,
				strategy:  accept.Strategy{MinStarted: tt.minStarted},
				pinned:    accept.Identity{ContainerID: "containerd://old"},
			}
			c.state.Name, c.state.Phase = "app", tt.before
			pod := &corev1.Pod{Spec: corev1.PodSpec{RestartPolicy: tt.policy}}
			wait := c.observe(pod, now)
			if got := written(&c.state); got != tt.want || wait != tt.wait {
				t.Errorf("got %q, wait %s; want %q, wait %s", got, wait, tt.want, tt.wait)
			}
		})
	}
}

func TestDecide(t *testing.T) {
	now := time.Date(2026, 1, 1, 12, 0, 0, 0, time.UTC)
	half := 30 * time.Second
	type c struct {
		phase     appsv1alpha1.ContainerRecreateRequestPhase
		commanded bool
		s         accept.Strategy
		op        *opsv1.ContainerOperation
		ended     bool
	}
	ordered, ignoring, drained, parallel := accept.Strategy{Ordered: true}, accept.Strategy{IgnoreFailure: true},
		accept.Strategy{Unready: &half}, accept.Strategy{Parallel: true}
	at := func(phase opsv1.Phase) *opsv1.ContainerOperation { return &opsv1.ContainerOperation{Phase: phase} }
	stopping, stopped := at(opsv1.Phase_PHASE_STOPPING), at(opsv1.Phase_PHASE_STARTING)
	beside := func(phase opsv1.Phase) *opsv1.ContainerOperation {
		return &opsv1.ContainerOperation{Phase: phase, Method: opsv1.MethodOverlap}
	}
	tests := []struct {
		name            string
		containers      []c // named a, b, c
		gated           bool
		unready         time.Time
		command, cancel []string
		skipped         []string
		drain           bool
		wait            time.Duration
	}{
		{name: "one after another", containers: []c{{phase: pending}, {phase: pending}}, command: []string{"a"}},
		{name: "one is being stopped", containers: []c{{phase: recreating, op: stopping}, {phase: pending}}},
		{name: "one waits on the node",
			containers: []c{{phase: pending, op: at(opsv1.Phase_PHASE_PENDING)}, {phase: pending}}},
		{name: "a later one is being stopped", containers: []c{{phase: pending}, {phase: recreating, op: stopping}}},
		{name: "one is stopped and not back", containers: []c{{phase: recreating, op: stopped}, {phase: pending},
			{phase: pending}}, command: []string{"b"}},
		{name: "one is stopped, with times",
			containers: []c{{phase: recreating, op: &opsv1.ContainerOperation{StopTime: timestamppb.New(now)}},
				{phase: pending}}, command: []string{"b"}},
		{name: "one is not ready yet", containers: []c{{phase: recreating, op: at(opsv1.Phase_PHASE_SUCCEEDED)},
			{phase: pending}}, command: []string{"b"}},
		{name: "one runs beside its successor",
			containers: []c{{phase: recreating, op: beside(opsv1.Phase_PHASE_STARTING)}, {phase: pending}}},
		{name: "one no longer does", containers: []c{{phase: recreating, op: beside(opsv1.Phase_PHASE_REVEALING)},
			{phase: pending}}, command: []string{"b"}},
		{name: "all at once", containers: []c{{phase: pending, s: parallel}, {phase: pending, s: parallel}},
			command: []string{"a", "b"}},
		{name: "only those not commanded", containers: []c{{phase: recreating, commanded: true, s: parallel},
			{phase: pending, s: parallel}}, command: []string{"b"}},
		{name: "all at once, but one is ordered",
			containers: []c{{phase: pending, s: parallel},
				{phase: pending, s: accept.Strategy{Parallel: true, Ordered: true}},
				{phase: pending, s: parallel}}, command: []string{"a", "c"}},
		{name: "one had ended by itself", containers: []c{{phase: failed, ended: true}, {phase: pending}},
			command: []string{"b"}},
		{name: "one had ended by itself, ordered",
			containers: []c{{phase: failed, ended: true, s: ordered}, {phase: pending, s: ordered}},
			skipped:    []string{"b"}},
		{name: "nothing left", containers: []c{{phase: succeeded}, {phase: failed, s: ignoring}}},
		{name: "ordered, first", containers: []c{{phase: pending, s: ordered}, {phase: pending, s: ordered}},
			command: []string{"a"}},
		{name: "ordered, waiting", containers: []c{{phase: recreating, commanded: true, s: ordered},
			{phase: pending, s: ordered}}},
		{name: "ordered, next", containers: []c{{phase: succeeded, s: ordered}, {phase: pending, s: ordered},
			{phase: pending, s: ordered}}, command: []string{"b"}},
		{name: "ordered, failed and ignored",
			containers: []c{{phase: failed, s: accept.Strategy{Ordered: true, IgnoreFailure: true}},
				{phase: pending, s: ordered}}, command: []string{"b"}},
		{name: "only the last is ordered",
			containers: []c{{phase: recreating, op: stopped}, {phase: recreating, op: stopped},
				{phase: pending, s: ordered}}},
		{name: "failed", containers: []c{{phase: failed}, {phase: pending}, {phase: pending}},
			skipped: []string{"b", "c"}},
		{name: "failed later in the list", containers: []c{{phase: pending}, {phase: failed}}, skipped: []string{"a"}},
		{name: "failed with others under way", containers: []c{{phase: failed}, {phase: recreating, commanded: true},
			{phase: pending, commanded: true}}, cancel: []string{"c"}},
		{name: "drain", containers: []c{{phase: pending, s: drained}}, gated: true, drain: true},
		{name: "drain without a gate", containers: []c{{phase: pending, s: drained}}, command: []string{"a"}},
		{name: "draining", containers: []c{{phase: pending, s: drained}}, gated: true,
			unready: now.Add(-10 * time.Second),
			wait:    20 * time.Second},
		{name: "drained", containers: []c{{phase: pending, s: drained}}, gated: true, unready: now.Add(-half),
			command: []string{"a"}},
		{name: "one of two drains", containers: []c{{phase: pending, s: drained}, {phase: pending}}, gated: true,
			unready: now, command: []string{"b"}, wait: half},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			var list []*container
			for i, w := range tt.containers {
				n := &container{name: string(rune('a' + i)), strategy: w.s}
				n.state.Phase, n.op, n.ended = w.phase, w.op, w.ended
				if w.commanded {
					n.op = &opsv1.ContainerOperation{}
				}
				list = append(list, n)
			}
			p := decide(list, tt.gated, tt.unready, now)
			names := func(list []*container) []string {
				var names []string
				for _, n := range list {
					names = append(names, n.name)
				}
				return names
			}
			if got := names(p.command); !slices.Equal(got, tt.command) {
				t.Errorf("command %v, want %v", got, tt.command)
			}
			if got := names(p.cancel); !slices.Equal(got, tt.cancel) {
				t.Errorf("cancel %v, want %v", got, tt.cancel)
			}
			if p.drain != tt.drain || p.wait != tt.wait {
				t.Errorf("drain %v, wait %s; want %v, %s", p.drain, p.wait, tt.drain, tt.wait)
			}
			var skipped []string
			for i, n := range list {
				if n.state.Phase == failed && tt.containers[i].phase != failed {
					skipped = append(skipped, n.name)
				}
			}
			if !slices.Equal(skipped, tt.skipped) {
				t.Errorf("skipped %v, want %v", skipped, tt.skipped)
			}
		})
	}
}

func TestReplacement(t *testing.T) {
	op := func(pod, from, to string, phase opsv1.Phase) *opsv1.Operation {
		return &opsv1.Operation{Pod: &opsv1.PodRef{Uid: pod},
			Containers: []*opsv1.ContainerOperation{{Name: "app", Phase: phase, IncumbentId: from, SuccessorId: to}}}
	}
	ok := opsv1.Phase_PHASE_SUCCEEDED
	tests := []struct {
		name string
		ops  []*opsv1.Operation
		want string
	}{
		{"none", nil, ""},
		{"one", []*opsv1.Operation{op("p", "a", "b", ok)}, "b"},
		{"one after the other, newest first", []*opsv1.Operation{op("p", "b", "c", ok), op("p", "a", "b", ok)}, "c"},
		{"failed", []*opsv1.Operation{op("p", "a", "b", opsv1.Phase_PHASE_FAILED)}, ""},
		{"of another pod", []*opsv1.Operation{op("q", "a", "b", ok)}, ""},
		{"round and round", []*opsv1.Operation{op("p", "a", "b", ok), op("p", "b", "a", ok)}, "a"},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			if got := replacement(tt.ops, "p", "app", "a").GetSuccessorId(); got != tt.want {
				t.Errorf("got %q, want %q", got, tt.want)
			}
		})
	}
}
