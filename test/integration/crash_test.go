// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package integration

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/protobuf/proto"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	opsv1 "github.com/cri-proxy/cri-proxy/api/ops/v1"
	"github.com/cri-proxy/cri-proxy/test/testbed"
)

// process is cri-proxy as a process of its own, which can be killed.
type process struct {
	*node
	dir string
	cmd *exec.Cmd
}

// failpointBinary builds cri-proxy with failpoints, once.
var failpointBinary = sync.OnceValues(func() (string, error) {
	path := filepath.Join(bed.dir, "cri-proxy-failpoint")
	return path, testbed.BuildWithFailpoints(context.Background(), path)
})

func startProcess(t testing.TB, failpoint string) *process {
	t.Helper()
	dir := shortDir(t)
	p := &process{dir: dir, node: &node{socket: filepath.Join(dir, "cri.sock")}}
	config := fmt.Sprintf(`listen: {path: %q, mode: "0600"}
runtimeEndpoint: unix://%s
stateDir: %q
adminSocket: %q
log: {level: debug, format: text}
nodeName: it
images: {registryHostsDir: %q, parallel: 2}
`, p.socket, bed.runtime, filepath.Join(dir, "state"), filepath.Join(dir, "admin.sock"), bed.hosts)
	must(t, os.WriteFile(filepath.Join(dir, "config.yaml"), []byte(config), 0o600))
	p.start(t, failpoint)
	t.Cleanup(func() {
		p.kill(t)
		if t.Failed() {
			b, _ := os.ReadFile(filepath.Join(dir, "log"))
			t.Logf("log of cri-proxy:\n%s", b)
		}
	})
	return p
}

// start starts the process over the state that its directory has.
func (p *process) start(t testing.TB, failpoint string) {
	t.Helper()
	bin, err := failpointBinary()
	must(t, err)
	log, err := os.OpenFile(filepath.Join(p.dir, "log"), os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o600)
	must(t, err)
	defer func() { _ = log.Close() }()
	p.cmd = exec.Command(bin, "serve", "--config", filepath.Join(p.dir, "config.yaml"))
	p.cmd.Env = append(os.Environ(), "CRI_PROXY_FAILPOINT="+failpoint)
	p.cmd.Stdout, p.cmd.Stderr = log, log
	must(t, p.cmd.Start())
	if p.kubelet == nil {
		p.kubelet = dial(t, p.socket, bed.dir)
		p.direct = dial(t, bed.runtime, bed.dir)
		conn, err := grpc.NewClient("unix://"+filepath.Join(p.dir, "admin.sock"), grpc.WithTransportCredentials(insecure.NewCredentials()))
		must(t, err)
		t.Cleanup(func() { _ = conn.Close() })
		p.ops = opsv1.NewOpsClient(conn)
	}
	// The socket files of a killed process stay: only answers tell, on the very connections that the test goes on with.
	eventually(t, "cri-proxy answers", func() bool {
		_, err := p.Version(t.Context(), &runtimeapi.VersionRequest{})
		_, opsErr := p.ops.NodeInfo(t.Context(), &opsv1.NodeInfoRequest{})
		return err == nil && opsErr == nil
	})
}

// kill kills the process and waits for it.
func (p *process) kill(t testing.TB) {
	t.Helper()
	if p.cmd.ProcessState == nil {
		_ = p.cmd.Process.Kill()
		_ = p.cmd.Wait()
	}
}

// died waits until the failpoint has killed the process.
func (p *process) died(t testing.TB) {
	t.Helper()
	done := make(chan error, 1)
	go func() { done <- p.cmd.Wait() }()
	select {
	case err := <-done:
		var exit *exec.ExitError
		if !errors.As(err, &exit) || exit.Sys().(syscall.WaitStatus).Signal() != syscall.SIGKILL {
			t.Fatalf("cri-proxy ended by itself: %v", err)
		}
	case <-time.After(time.Minute):
		t.Fatal("the failpoint was not reached")
	}
}

// TestKillAtEachStep kills cri-proxy at every step of a restart. The next process
// must end the restart with one running container, nothing hidden and nothing left.
func TestKillAtEachStep(t *testing.T) {
	const hook = `{"exec":{"command":["sh","-c","echo hook >/dev/termination-log; true"]}}`
	for _, tc := range []struct{ point, preStop string }{
		{"stage", hook}, {"created", hook}, {"staged", hook}, {"stop", hook}, {"stopped", hook}, {"running", hook},
		{"started", hook}, {"reveal", hook}, {"revealed", hook}, {"done", hook},
		// Without a hook, the point of no return is written with the step stop.
		{"staged", ""}, {"stop", ""}, {"stopped", ""},
	} {
		point, name := tc.point, tc.point
		if tc.preStop == "" {
			name += "-without-hook"
		}
		t.Run(name, func(t *testing.T) {
			n := startProcess(t, "restart."+point)
			p := n.runPod(t)
			app := p.run(t, spec{name: "app", command: looping, preStop: tc.preStop})
			side := p.run(t, spec{name: "side", command: looping})
			before := n.status(t, side)
			uid := "kill-" + name
			req := restartOf("app")
			req.Uid = uid
			req.Pod = &opsv1.PodRef{Namespace: "default", Name: p.name, Uid: p.uid}
			_, _ = n.ops.Restart(t.Context(), req) // the answer may not come: that is the test
			n.died(t)

			n.start(t, "")
			seen := p.watch("app")
			op := n.wait(t, uid)
			if bad := seen.stop(); len(bad) > 0 {
				t.Errorf("what kubelet must not see:\n%s", strings.Join(bad, "\n"))
			}
			if op.GetPhase() != opsv1.Phase_PHASE_SUCCEEDED {
				t.Errorf("operation: %v", op)
			}
			c := op.GetContainers()[0]
			if c.GetIncumbentId() != app {
				t.Errorf("incumbent is %q", c.GetIncumbentId())
			}
			for _, k := range []*kubelet{n.kubelet, n.direct} {
				if running, all := p.running(t, k, "app"); running != 1 || all != 2 {
					t.Errorf("%d running of %d", running, all)
				}
			}
			if got := n.status(t, c.GetSuccessorId()); got.GetMetadata().GetAttempt() != 1 {
				t.Errorf("successor: %v", got)
			}
			if got := n.status(t, side); !proto.Equal(got, before) {
				t.Errorf("neighbour changed: %v", got)
			}
			// The same command again is answered from the journal.
			again, err := n.ops.Restart(t.Context(), req)
			must(t, err)
			if !proto.Equal(again, op) {
				t.Errorf("repeated command: %v", again)
			}
		})
	}
}

// TestKillWhileUndoing kills cri-proxy while it takes a failed restart back.
func TestKillWhileUndoing(t *testing.T) {
	n := startProcess(t, "restart.undo")
	p := n.runPod(t)
	p.run(t, spec{name: "app", command: looping, preStop: `{"sleep":{"seconds":60}}`, grace: 60})
	uid := n.begin(t, p, restartOf("app"))
	n.waitFor(t, uid, func(op *opsv1.Operation) bool { return op.GetPhase() == opsv1.Phase_PHASE_STOPPING })
	go func() {
		_, _ = n.StopPodSandbox(t.Context(), &runtimeapi.StopPodSandboxRequest{PodSandboxId: p.sandbox})
	}()
	n.died(t)
	n.start(t, "")
	op := n.wait(t, uid)
	if op.GetPhase() != opsv1.Phase_PHASE_FAILED || op.GetContainers()[0].GetReason() != "TakenBackByKubelet" {
		t.Errorf("operation: %v", op)
	}
	if _, all := p.running(t, n.direct, "app"); all != 1 {
		t.Errorf("%d containers are left", all)
	}
}

// TestStopWhileStopping ends cri-proxy by SIGTERM while a container takes its time to stop. Kubelet must not
// wait for that: the process leaves, and the next one takes the restart up within the grace that is left.
func TestStopWhileStopping(t *testing.T) {
	n := startProcess(t, "")
	p := n.runPod(t)
	const grace = 12
	p.run(t, spec{name: "app", grace: grace, command: []string{"sh", "-c", `trap 'echo asked-to-stop' TERM; echo started; while :; do sleep 0.05; done`}})
	began := time.Now()
	uid := n.begin(t, p, restartOf("app"))
	eventually(t, "the incumbent has been asked to stop", func() bool { return strings.Contains(p.log(t, "app", 0), "asked-to-stop") })
	asked := time.Now()
	must(t, n.cmd.Process.Signal(syscall.SIGTERM))
	if err := n.cmd.Wait(); err != nil {
		t.Errorf("cri-proxy ended with %v", err)
	}
	if took := time.Since(asked); took > grace*time.Second*3/4 {
		t.Errorf("kubelet would have waited %s", took)
	}
	n.start(t, "")
	seen := p.watch("app")
	op := n.wait(t, uid)
	if bad := seen.stop(); len(bad) > 0 {
		t.Errorf("what kubelet must not see:\n%s", strings.Join(bad, "\n"))
	}
	if op.GetPhase() != opsv1.Phase_PHASE_SUCCEEDED {
		t.Errorf("operation: %v", op)
	}
	if took := time.Since(began); took > (grace+10)*time.Second {
		t.Errorf("the grace of %d s began anew: %s", grace, took)
	}
}
