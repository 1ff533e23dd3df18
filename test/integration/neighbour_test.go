// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package integration

import (
	"context"
	"os"
	"testing"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	opsv1 "github.com/cri-proxy/cri-proxy/api/ops/v1"
)

// execUntilEnd runs a command in the container that ends with the container or ctx, and returns
// when it runs. The channel has the answer.
func (n *node) execUntilEnd(ctx context.Context, t testing.TB, id string) <-chan error {
	t.Helper()
	log := n.direct.status(t, id).GetMounts()[0].GetHostPath()
	answered := make(chan error, 1)
	go func() {
		resp, err := n.ExecSync(ctx, &runtimeapi.ExecSyncRequest{
			ContainerId: id, Cmd: []string{"sh", "-c", "echo begun >/dev/termination-log; exec sleep 300"},
		})
		if err == nil && resp.GetExitCode() != 0 {
			err = status.Errorf(codes.Unknown, "exit code %d", resp.GetExitCode())
		}
		answered <- err
	}()
	eventually(t, "the command runs", func() bool {
		b, err := os.ReadFile(log)
		return err == nil && len(b) > 0
	})
	return answered
}

// TestLongCallInAnotherPod restarts a container while kubelet runs a hook in another pod that
// outlasts every timeout: any drain of a node has them.
func TestLongCallInAnotherPod(t *testing.T) {
	n := startNode(t)
	p, neighbour := n.runPod(t), n.runPod(t)
	p.run(t, spec{name: "app", command: looping})
	other := neighbour.run(t, spec{name: "app", command: looping})
	ctx, cancel := context.WithCancel(t.Context())
	answered := n.execUntilEnd(ctx, t, other)

	if op := n.restart(t, p, restartOf("app")); op.GetPhase() != opsv1.Phase_PHASE_SUCCEEDED {
		t.Errorf("operation: %v", op)
	}
	select {
	case err := <-answered:
		t.Errorf("the neighbour's hook has ended: %v", err)
	default:
	}
	cancel()
	if err := <-answered; status.Code(err) != codes.Canceled {
		t.Errorf("the neighbour's hook: %v", err)
	}
}

// TestProbeKilledByTheRestart is an exec probe that has begun before the restart and is killed with
// the incumbent. Were it answered as failed, kubelet would stop a container whose probe may fail
// but once.
func TestProbeKilledByTheRestart(t *testing.T) {
	n := startNode(t)
	p := n.runPod(t)
	app := p.run(t, spec{name: "app", command: looping})
	answered := n.execUntilEnd(t.Context(), t, app)
	// The successor's hook lasts, so that the answer comes behind the mask.
	hook := execHook("sh", "-c", "until grep -q done /dev/termination-log; do sleep 0.05; done")
	uid := n.begin(t, p, &opsv1.RestartRequest{Containers: []*opsv1.ContainerRestart{{Name: "app", PostStart: hook}}})
	op := n.waitFor(t, uid, func(op *opsv1.Operation) bool { return op.GetPhase() == opsv1.Phase_PHASE_STARTING })
	if err := <-answered; status.Code(err) != codes.Unavailable {
		t.Errorf("the probe: %v", err)
	}
	word := n.direct.status(t, op.GetContainers()[0].GetSuccessorId()).GetMounts()[0].GetHostPath()
	must(t, os.WriteFile(word, []byte("done\n"), 0o600))
	if op := n.wait(t, uid); op.GetPhase() != opsv1.Phase_PHASE_SUCCEEDED {
		t.Errorf("operation: %v", op)
	}
}
