// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package invariant

import (
	"maps"
	"slices"
	"strings"
	"testing"

	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/timestamppb"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	opsv1 "github.com/cri-proxy/cri-proxy/api/ops/v1"
)

const (
	createdState = runtimeapi.ContainerState_CONTAINER_CREATED
	runningState = runtimeapi.ContainerState_CONTAINER_RUNNING
	exitedState  = runtimeapi.ContainerState_CONTAINER_EXITED
)

func incumbent() *Facts {
	list := []Container{{ID: "incumbent-0", Sandbox: "sandbox", State: runningState}}
	return &Facts{
		PodUID: "uid", PodIP: "10.0.0.2", Phase: "Running", Runtime: list, Proxy: slices.Clone(list),
		API:        Status{ID: "incumbent-0", Running: true},
		Neighbours: map[string]Status{"pod/side": {ID: "side-0", Running: true}},
		CDI:        []string{StaticSpec}, Leases: []string{"lease-0"},
		Mounts: []string{"/run/incumbent-0/rootfs", "/run/side-0/rootfs"},
		Logs:   []uint32{0}, Links: []string{"incumbent-0"}, Starts: 1, Created: []uint32{0},
	}
}

func operation(phase opsv1.Phase, reason string) *opsv1.Operation {
	return &opsv1.Operation{
		Uid: "op", Phase: phase, FinishTime: timestamppb.Now(), Message: reason,
		Containers: []*opsv1.ContainerOperation{{Name: "app", Phase: phase, Reason: reason, Message: reason,
			IncumbentId: "incumbent-0", SuccessorId: "successor-1", Attempt: 1}},
	}
}

func ended(f *Facts, op *opsv1.Operation) *Facts {
	f.Operation, f.Again = op, proto.Clone(op).(*opsv1.Operation)
	return f
}

// succeeded is a node after a restart.
func succeeded() *Facts {
	f := incumbent()
	f.Runtime = []Container{{ID: "successor-1", Sandbox: "sandbox", Attempt: 1, State: runningState},
		{ID: "incumbent-0", Sandbox: "sandbox", State: exitedState}}
	f.Proxy = []Container{f.Runtime[1], f.Runtime[0]}
	f.API = Status{ID: "successor-1", Restarts: 1, Running: true}
	f.Mounts = []string{"/run/successor-1/rootfs", "/run/side-0/rootfs"}
	f.Logs, f.Links, f.Starts = []uint32{0, 1}, []string{"incumbent-0", "successor-1"}, 2
	return ended(f, operation(opsv1.Phase_PHASE_SUCCEEDED, ""))
}

// undone is a node after a restart that failed before anything was stopped.
func undone() *Facts { return ended(incumbent(), operation(opsv1.Phase_PHASE_FAILED, "CreateFailed")) }

// leftToKubelet is a node where kubelet has started a container after a restart failed.
func leftToKubelet() *Facts {
	f := succeeded()
	f.Created = []uint32{0, 1}
	return ended(f, operation(opsv1.Phase_PHASE_FAILED, "StopFailed"))
}

func TestCheckIsContent(t *testing.T) {
	collected := succeeded()
	collected.Runtime = collected.Runtime[:1]
	collected.Proxy = collected.Proxy[1:]
	collected.Logs, collected.Links = []uint32{1}, []string{"successor-1"}
	for name, tt := range map[string]struct {
		after *Facts
		want  Expect
	}{
		"succeeded":                {succeeded(), Expect{Outcome: Succeeds}},
		"succeeded, old collected": {collected, Expect{Outcome: Succeeds}},
		"undone":                   {undone(), Expect{Outcome: Fails, Untouched: true}},
		"left to kubelet":          {leftToKubelet(), Expect{Outcome: Fails}},
		"either":                   {undone(), Expect{}},
	} {
		t.Run(name, func(t *testing.T) {
			if bad := Check(incumbent(), tt.after, tt.want); len(bad) > 0 {
				t.Errorf("not content: %q", bad)
			}
		})
	}
}

// TestCheckSees spoils a good outcome in one way at a time.
func TestCheckSees(t *testing.T) {
	stray := Container{ID: "stray-2", Sandbox: "sandbox", Attempt: 2, State: createdState}
	for name, tt := range map[string]struct {
		from  func() *Facts // succeeded if nil
		want  Expect
		spoil func(*Facts)
		say   string
	}{
		"nothing runs": {spoil: func(f *Facts) {
			f.Runtime[0].State = exitedState
			f.Proxy[1].State = exitedState
			f.API.Running = false
		}, say: "not exactly one running"},
		"two run": {spoil: func(f *Facts) {
			f.Runtime[1].State = runningState
			f.Proxy[0].State = runningState
		}, say: "not exactly one running"},
		"no container at all": {spoil: func(f *Facts) { f.Runtime, f.Proxy = nil, nil },
			say: "not exactly one running"},
		"a staged one is left": {spoil: func(f *Facts) {
			f.Runtime, f.Proxy = append(f.Runtime, stray),
				append(f.Proxy, stray)
		}, say: "left 2:CREATED"},
		"one is hidden": {spoil: func(f *Facts) { f.Proxy = f.Proxy[:1] }, say: "the proxy shows"},
		"one is masked": {spoil: func(f *Facts) { f.Proxy[0].State = runningState }, say: "the proxy shows"},
		"status is old": {spoil: func(f *Facts) { f.API = Status{ID: "incumbent-0", Running: true} },
			say: "pod's status has"},
		"status is not running":   {spoil: func(f *Facts) { f.API.Running = false }, say: "pod's status has"},
		"restarts are miscounted": {spoil: func(f *Facts) { f.API.Restarts = 0 }, say: "counts 0 restarts"},
		"another pod":             {spoil: func(f *Facts) { f.PodUID = "new" }, say: "became"},
		"another IP":              {spoil: func(f *Facts) { f.PodIP = "10.0.0.3" }, say: "became"},
		"pod has failed":          {spoil: func(f *Facts) { f.Phase = "Failed" }, say: "phase"},
		"another sandbox": {spoil: func(f *Facts) {
			f.Runtime[0].Sandbox, f.Proxy[1].Sandbox = "other",
				"other"
		}, say: "in sandbox"},
		"a gate is left": {spoil: func(f *Facts) { f.Gates = []string{"x"} }, say: "gates are left"},
		"a FIFO is left": {spoil: func(f *Facts) { f.Fifos = []string{"x"} }, say: "named pipes are left"},
		"a process is left": {spoil: func(f *Facts) { f.Processes = []string{"7 runc init"} },
			say: "processes are left"},
		"a CDI file is left": {spoil: func(f *Facts) { f.CDI = append(f.CDI, "cri-proxy-op.json") },
			say: "CDI file"},
		"a lease is left": {spoil: func(f *Facts) { f.Leases = append(f.Leases, "lease-1") },
			say: "leases are left"},
		"a mount is left": {spoil: func(f *Facts) { f.Mounts = append(f.Mounts, "/run/nobody/rootfs") },
			say: "mount /run/nobody"},
		"the old mount is left": {spoil: func(f *Facts) { f.Mounts = append(f.Mounts, "/run/incumbent-0/rootfs") },
			say: "mount /run/incumbent-0"},
		"a log is left": {spoil: func(f *Facts) { f.Logs = append(f.Logs, 2) }, say: "log of attempt 2"},
		"a link is left": {spoil: func(f *Facts) { f.Links = append(f.Links, "nobody") },
			say: "log link of nobody"},
		"operation is missing": {spoil: func(f *Facts) { f.Operation = nil }, say: "has not ended"},
		"operation goes on":    {spoil: func(f *Facts) { f.Operation.FinishTime = nil }, say: "has not ended"},
		"operation is cancelled": {spoil: func(f *Facts) { f.Operation.Phase = opsv1.Phase_PHASE_CANCELLED },
			say: "ended as"},
		"another answer":     {spoil: func(f *Facts) { f.Again.Message = "other" }, say: "same command again"},
		"no answer":          {spoil: func(f *Facts) { f.Again = nil }, say: "same command again"},
		"should have failed": {want: Expect{Outcome: Fails}, spoil: func(*Facts) {}, say: "should fail"},
		"should have succeeded": {from: undone, want: Expect{Outcome: Succeeds}, spoil: func(*Facts) {},
			say: "should succeed"},
		"success with a reason": {spoil: func(f *Facts) { f.Operation.Containers[0].Reason = "StopFailed" },
			say: "did not"},
		"success, wrong ID": {spoil: func(f *Facts) { f.Operation.Containers[0].SuccessorId = "other" },
			say: "runs in place of"},
		"success, wrong attempt": {spoil: func(f *Facts) { f.Operation.Containers[0].Attempt = 2 },
			say: "runs in place of"},
		"success, nothing done": {
			from:  func() *Facts { return ended(incumbent(), operation(opsv1.Phase_PHASE_SUCCEEDED, "")) },
			spoil: func(*Facts) {}, say: "runs in place of"},
		"success by kubelet": {spoil: func(f *Facts) { f.Created = []uint32{0, 1} }, say: "kubelet created"},
		"failure without a reason": {from: undone, spoil: func(f *Facts) { f.Operation.Containers[0].Reason = "" },
			say: "without saying why"},
		"failure that is none": {
			from:  func() *Facts { return ended(succeeded(), operation(opsv1.Phase_PHASE_FAILED, "StopFailed")) },
			spoil: func(*Facts) {}, say: "its successor"},
		"incumbent should be alone": {from: leftToKubelet, want: Expect{Untouched: true}, spoil: func(*Facts) {},
			say: "leave"},
		"undone, exited one left": {from: undone, spoil: func(f *Facts) {
			x := Container{ID: "successor-1", Sandbox: "sandbox", Attempt: 1, State: exitedState}
			f.Runtime, f.Proxy = append(f.Runtime, x), append(f.Proxy, x)
		}, say: "containers came or went"},
		"undone, kubelet created": {from: undone, spoil: func(f *Facts) { f.Created = []uint32{0, 1} },
			say: "kubelet created"},
		"undone, app started": {from: undone, spoil: func(f *Facts) { f.Starts = 2 }, say: "started 2 times"},
		"app never started":   {spoil: func(f *Facts) { f.Starts = 1 }, say: "not started in it"},
		"app overlaps":        {spoil: func(f *Facts) { f.Overlaps = 1 }, say: "twice at a time"},
		"neighbour restarted": {
			spoil: func(f *Facts) { f.Neighbours["pod/side"] = Status{ID: "side-1", Restarts: 1, Running: true} },
			say:   "neighbour pod/side"},
		"neighbour gone": {spoil: func(f *Facts) { clear(f.Neighbours) }, say: "neighbour pod/side"},
	} {
		t.Run(name, func(t *testing.T) {
			from := tt.from
			if from == nil {
				from = succeeded
			}
			after := from()
			after.Neighbours = maps.Clone(after.Neighbours)
			tt.spoil(after)
			bad := Check(incumbent(), after, tt.want)
			if !slices.ContainsFunc(bad, func(s string) bool { return strings.Contains(s, tt.say) }) {
				t.Errorf("says %q, want %q among it", bad, tt.say)
			}
		})
	}
}

func TestOverlapIsAllowedWithStartFirst(t *testing.T) {
	after := succeeded()
	after.Overlaps = 1
	if bad := Check(incumbent(), after, Expect{Outcome: Succeeds, Overlap: true}); len(bad) > 0 {
		t.Errorf("not content: %q", bad)
	}
}
