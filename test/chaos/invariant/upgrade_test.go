// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package invariant

import (
	"slices"
	"strings"
	"testing"

	opsv1 "github.com/cri-proxy/cri-proxy/api/ops/v1"
)

func old() *Facts {
	f := incumbent()
	f.Image = "app:1"
	f.Runtime[0].Image, f.Proxy[0].Image = "app:1", "app:1"
	return f
}

// rolledOut is a node after a rollout.
func rolledOut() *Facts {
	f := succeeded()
	f.Image, f.Rollout, f.Created = "app:2", RolledOut, []uint32{0, 1}
	for i, image := range []string{"app:2", "app:1"} {
		f.Runtime[i].Image, f.Proxy[1-i].Image = image, image
	}
	return f
}

// rolledBackAtOnce is a node after a rollout that failed before the pod was changed.
func rolledBackAtOnce() *Facts {
	f := old()
	f.Rollout = RolledBack
	return f
}

// rolledBackLater is a node after a rollout whose container did not work.
func rolledBackLater() *Facts {
	f := rolledOut()
	f.Image, f.Rollout, f.Created, f.Starts = "app:1", RolledBack, []uint32{0, 1, 2}, 3
	f.Runtime[0].State, f.Proxy[1].State = exitedState, exitedState
	third := Container{ID: "third-2", Sandbox: "sandbox", Attempt: 2, State: runningState, Image: "app:1"}
	f.Runtime, f.Proxy = append(f.Runtime, third), append(f.Proxy, third)
	f.API = Status{ID: "third-2", Restarts: 2, Running: true}
	f.Mounts = []string{"/run/third-2/rootfs", "/run/side-0/rootfs"}
	return f
}

// withLog has kept the log of a container that ended beside the incumbent.
func withLog(f *Facts) *Facts {
	f.Logs = append(f.Logs, 1)
	return f
}

func TestCheckUpgradeIsContent(t *testing.T) {
	for name, tt := range map[string]struct {
		after *Facts
		want  Expect
	}{
		"rolled out":          {rolledOut(), Expect{Outcome: Succeeds}},
		"rolled back at once": {rolledBackAtOnce(), Expect{Outcome: Fails, Untouched: true}},
		"rolled back later":   {rolledBackLater(), Expect{Outcome: Fails}},
		"either":              {rolledBackAtOnce(), Expect{}},
		"its log is kept":     {withLog(rolledBackAtOnce()), Expect{Outcome: Fails, Untouched: true, Overlap: true}},
	} {
		t.Run(name, func(t *testing.T) {
			tt.want.Image = "app:2"
			if bad := CheckUpgrade(old(), tt.after, tt.want); len(bad) > 0 {
				t.Errorf("not content: %q", bad)
			}
		})
	}
}

func TestCheckUpgradeSees(t *testing.T) {
	for name, tt := range map[string]struct {
		from  func() *Facts // rolledOut if nil
		want  Expect
		spoil func(*Facts)
		say   string
	}{
		"spec is old":    {spoil: func(f *Facts) { f.Image = "app:1" }, say: "and app:2 runs"},
		"old image runs": {spoil: func(f *Facts) { f.Runtime[0].Image = "app:1" }, say: "and app:1 runs"},
		"another image": {spoil: func(f *Facts) { f.Image, f.Runtime[0].Image = "app:3", "app:3" },
			say: "instead of app:2"},
		"no end":               {spoil: func(f *Facts) { f.Rollout = "Paused" }, say: "ended as"},
		"an image is pinned":   {spoil: func(f *Facts) { f.Pins = []string{"app:1"} }, say: "pinned"},
		"an operation is left": {spoil: func(f *Facts) { f.Active = []string{"op"} }, say: "go on"},
		"operation has no end": {spoil: func(f *Facts) {
			f.Operation.FinishTime, f.Operation.Phase = nil,
				opsv1.Phase_PHASE_STOPPING
		}, say: "not ended"},
		"another container": {spoil: func(f *Facts) { f.Operation.Containers[0].SuccessorId = "other" },
			say: "the operation says"},
		"one container too many": {spoil: func(f *Facts) { f.Runtime[0].Attempt, f.API.Restarts = 2, 2 },
			say: "in place of"},
		"the same attempt": {spoil: func(f *Facts) { f.Runtime[1].Attempt = 1 }, say: "two containers"},
		"created twice":    {spoil: func(f *Facts) { f.Created = []uint32{0, 1, 1} }, say: "twice"},
		"a lease is left": {spoil: func(f *Facts) { f.Leases = append(f.Leases, "lease-1") },
			say: "leases are left"},
		"one is hidden":           {spoil: func(f *Facts) { f.Proxy = f.Proxy[:1] }, say: "the proxy shows"},
		"restarts are miscounted": {spoil: func(f *Facts) { f.API.Restarts = 2 }, say: "counts 2 restarts"},
		"neighbour restarted": {
			spoil: func(f *Facts) { f.Neighbours["pod/side"] = Status{ID: "side-1", Running: true} },
			say:   "neighbour pod/side"},
		"app overlaps":       {spoil: func(f *Facts) { f.Overlaps = 1 }, say: "twice at a time"},
		"should have failed": {want: Expect{Outcome: Fails}, spoil: func(*Facts) {}, say: "should fail"},
		"should have succeeded": {from: rolledBackAtOnce, want: Expect{Outcome: Succeeds}, spoil: func(*Facts) {},
			say: "should succeed"},
		"incumbent should live": {from: rolledBackLater, want: Expect{Untouched: true}, spoil: func(*Facts) {},
			say: "leave"},
		"back to another image": {from: rolledBackLater,
			spoil: func(f *Facts) { f.Image, f.Runtime[2].Image = "app:2", "app:2" }, say: "instead of app:1"},
		"undone, app started": {from: rolledBackAtOnce, spoil: func(f *Facts) { f.Starts = 2 },
			say: "started 2 times"},
	} {
		t.Run(name, func(t *testing.T) {
			from := tt.from
			if from == nil {
				from = rolledOut
			}
			after := from()
			tt.spoil(after)
			tt.want.Image = "app:2"
			bad := CheckUpgrade(old(), after, tt.want)
			if !slices.ContainsFunc(bad, func(s string) bool { return strings.Contains(s, tt.say) }) {
				t.Errorf("says %q, want %q among it", bad, tt.say)
			}
		})
	}
}

// A pod that kubelet changed without help has no operation that could disagree.
func TestCheckUpgradeWithoutOperation(t *testing.T) {
	after := rolledOut()
	after.Operation = nil
	if bad := CheckUpgrade(old(), after, Expect{Outcome: Succeeds, Image: "app:2"}); len(bad) > 0 {
		t.Errorf("not content: %q", bad)
	}
	after = ended(rolledOut(), operation(opsv1.Phase_PHASE_FAILED, "TakenBackByKubelet"))
	after.Operation.Containers[0].SuccessorId = "gone"
	if bad := CheckUpgrade(old(), after, Expect{Outcome: Succeeds, Image: "app:2"}); len(bad) > 0 {
		t.Errorf("not content: %q", bad)
	}
}
