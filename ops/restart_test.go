// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package ops_test

import (
	"strings"
	"testing"

	opsv1 "github.com/cri-proxy/cri-proxy/api/ops/v1"
	"github.com/cri-proxy/cri-proxy/test/fakenode"
)

func golden(t testing.TB, what string, got []string, want string) {
	t.Helper()
	var lines []string
	for _, l := range strings.Split(strings.TrimSpace(want), "\n") {
		lines = append(lines, strings.TrimSpace(l))
	}
	if g, w := strings.Join(got, "\n"), strings.Join(lines, "\n"); g != w {
		t.Errorf("%s:\n%s\nwant:\n%s", what, g, w)
	}
}

func TestRestart(t *testing.T) {
	n := newNode(t, podOptions{})
	n.run()
	end := n.relist()
	n.restart("r1")
	op := n.finish("r1")
	end()
	if got, want := verdict(op), "SUCCEEDED, app SUCCEEDED"; got != want {
		t.Errorf("operation ended %s (%s), want %s", got, op.GetMessage(), want)
	}
	calls := fakenode.Mutating(n.rt.TakeCalls())
	golden(t, "calls", calls, `
		CreateContainer app/1
		StopContainer app/0 30s
		StartContainer app/1`)
	if got, want := n.rt.State(), "app/0 EXITED, app/1 RUNNING, web/0 RUNNING"; got != want {
		t.Errorf("runtime has %s", got)
	}
	if got := n.sees(); got != n.rt.State() {
		t.Errorf("kubelet sees %s, though the operation is over", got)
	}
	c := op.GetContainers()[0]
	if c.GetIncumbentId() != n.rt.ID(t, "app/0") || c.GetSuccessorId() != n.rt.ID(t, "app/1") ||
		c.GetAttempt() != 1 {
		t.Errorf("IDs or attempt are wrong: %v", c)
	}
	if c.GetGap().AsDuration() <= 0 || c.GetStartTime().AsTime().Sub(c.GetStopTime().AsTime()) != c.GetGap().
		AsDuration() {
		t.Errorf("times are wrong: %v", c)
	}
	if op.GetMessage() != "" || len(c.GetWarnings()) != 0 || op.GetRequester() != "test" || op.GetKind() != "Restart" ||
		op.GetPod().GetUid() != podUID {
		t.Errorf("operation is %v", op)
	}
	if !plain(n.t, n.kubelet, n.view) {
		t.Error("something is still hidden or masked")
	}
	_ = opsv1.Phase_PHASE_SUCCEEDED
}
