// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package integration

import (
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"google.golang.org/protobuf/proto"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	opsv1 "github.com/cri-proxy/cri-proxy/api/ops/v1"
)

// looping exits with code 7 on SIGTERM and leaves a termination message.
var looping = []string{"sh", "-c",
	`trap 'echo bye > /dev/termination-log; exit 7' TERM; echo started $RAW; while :; do sleep 0.05; done`}

// started returns what the process says at its start.
func started(log string) string {
	_, rest, _ := strings.Cut(log, "started ")
	line, _, _ := strings.Cut(rest, "\n")
	return line
}

func restartOf(names ...string) *opsv1.RestartRequest {
	req := &opsv1.RestartRequest{Requester: "test"}
	for _, n := range names {
		req.Containers = append(req.Containers, &opsv1.ContainerRestart{Name: n})
	}
	return req
}

func TestRestart(t *testing.T) {
	n := startNode(t)
	must(t, os.Mkdir(filepath.Join(filepath.Dir(n.socket), "containers"), 0o755))
	p := n.runPod(t)
	raw := []byte{0xff, 0xfe, 'a'}
	app := p.run(t, spec{name: "app", command: looping, env: map[string][]byte{"RAW": raw}})
	neighbour := p.run(t, spec{name: "side", command: looping})
	before := n.status(t, neighbour)
	old := n.status(t, app)

	seen := p.watch("app")
	op := n.restart(t, p, restartOf("app"))
	if bad := seen.stop(); len(bad) > 0 {
		t.Errorf("what kubelet must not see:\n%s", strings.Join(bad, "\n"))
	}

	if op.GetPhase() != opsv1.Phase_PHASE_SUCCEEDED {
		t.Fatalf("operation: %v", op)
	}
	c := op.GetContainers()[0]
	if c.GetIncumbentId() != app || c.GetAttempt() != 1 || c.GetExitCode() != 7 {
		t.Errorf("operation tells %v", c)
	}
	t.Logf("gap %s", c.GetGap().AsDuration())
	p.look(t, n.kubelet)
	now := n.status(t, c.GetSuccessorId())
	if got := n.status(t, app); got.GetState() != runtimeapi.ContainerState_CONTAINER_EXITED || got.GetExitCode() != 7 {
		t.Errorf("incumbent is %v", got)
	}
	if now.GetState() != runtimeapi.ContainerState_CONTAINER_RUNNING || now.GetCreatedAt() <= old.GetCreatedAt() {
		t.Errorf("successor is %v", now)
	}
	for key, want := range map[string]string{"io.kubernetes.container.hash": "abcdef",
		"io.kubernetes.container.restartCount": "1"} {
		if now.GetAnnotations()[key] != want {
			t.Errorf("annotation %s is %q", key, now.GetAnnotations()[key])
		}
	}
	if got := n.status(t, neighbour); !proto.Equal(got, before) {
		t.Errorf("neighbour changed: %v", got)
	}
	// The runtime itself passes such bytes on mangled; the clone must not be mangled twice.
	eventually(t, "the new process logs the variable like the old one", func() bool {
		return started(p.log(t, "app", 1)) != "" && started(p.log(t, "app", 1)) == started(p.log(t, "app", 0))
	})
	termination := func(s *runtimeapi.ContainerStatus) string {
		b, err := os.ReadFile(s.GetMounts()[0].GetHostPath())
		must(t, err)
		return strings.TrimSpace(string(b))
	}
	if got := termination(old); got != "bye" {
		t.Errorf("termination message of the incumbent is %q", got)
	}
	if termination(now) != "" || now.GetMounts()[0].GetHostPath() == old.GetMounts()[0].GetHostPath() {
		t.Error("the successor has no termination file of its own")
	}
	link, err := os.Readlink(filepath.Join(filepath.Dir(n.socket), "containers",
		p.name+"_default_app-"+now.GetId()+".log"))
	if err != nil || link != now.GetLogPath() {
		t.Errorf("log symlink leads to %q: %v", link, err)
	}
}

func TestRestartTenTimes(t *testing.T) {
	n := startNode(t)
	p := n.runPod(t)
	p.run(t, spec{name: "app", command: looping})
	seen := p.watch("app")
	for i := range 10 {
		op := n.restart(t, p, restartOf("app"))
		if op.GetPhase() != opsv1.Phase_PHASE_SUCCEEDED || op.GetContainers()[0].GetAttempt() != uint32(i+1) {
			t.Fatalf("restart %d: %v", i, op)
		}
		p.began(t, "app", i+1)
		t.Logf("restart %d: gap %s, whole %s", i, op.GetContainers()[0].GetGap().AsDuration(),
			op.GetFinishTime().AsTime().Sub(op.GetCreateTime().AsTime()).Round(time.Millisecond))
	}
	if bad := seen.stop(); len(bad) > 0 {
		t.Errorf("what kubelet must not see:\n%s", strings.Join(bad, "\n"))
	}
	if running, all := p.running(t, n.direct, "app"); running != 1 || all != 11 {
		t.Errorf("%d running of %d", running, all)
	}
}
