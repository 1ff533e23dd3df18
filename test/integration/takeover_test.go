// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package integration

import (
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/protobuf/proto"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	opsv1 "github.com/cri-proxy/cri-proxy/api/ops/v1"
)

// instances are processes of cri-proxy that share their sockets, one after the other, as the
// instances of the unit do.
type instances struct {
	*node
	dir     string
	sockets []*os.File
	serving *exec.Cmd
	build   build
}

func startInstances(t *testing.T) *instances {
	t.Helper()
	return startInstancesOf(t, failpointBinary, "")
}

// startInstancesOf starts the first process from another binary, with a failpoint.
func startInstancesOf(t *testing.T, b build, failpoint string) *instances {
	t.Helper()
	dir := shortDir(t)
	s := &instances{dir: dir, node: &node{socket: filepath.Join(dir, "cri.sock")}, build: b}
	admin := filepath.Join(dir, "admin.sock")
	for _, path := range []string{s.socket, admin} {
		l, err := net.ListenUnix("unix", &net.UnixAddr{Name: path, Net: "unix"})
		must(t, err)
		l.SetUnlinkOnClose(false)
		f, err := l.File()
		must(t, err)
		must(t, l.Close())
		t.Cleanup(func() { _ = f.Close() })
		s.sockets = append(s.sockets, f)
	}
	config := fmt.Sprintf("listen: {path: %q}\nruntimeEndpoint: unix://%s\nstateDir: %q\nadminSocket: %q\nnodeName: "+
		"it\nimages: {registryHostsDir: %q}\n",
		s.socket, bed.runtime, filepath.Join(dir, "state"), admin, bed.hosts)
	must(t, os.WriteFile(filepath.Join(dir, "config.yaml"), []byte(config), 0o600))
	s.kubelet = dial(t, s.socket, bed.dir)
	s.direct = dial(t, bed.runtime, bed.dir)
	conn, err := grpc.NewClient("unix://"+admin, grpc.WithTransportCredentials(insecure.NewCredentials()))
	must(t, err)
	t.Cleanup(func() { _ = conn.Close() })
	s.ops = opsv1.NewOpsClient(conn)
	s.serving = s.start(t, failpoint)
	t.Cleanup(func() {
		if t.Failed() {
			b, _ := os.ReadFile(filepath.Join(dir, "log"))
			t.Logf("log of cri-proxy:\n%s", b)
		}
	})
	return s
}

// start starts another process, which takes over from the one there is.
func (s *instances) start(t *testing.T, failpoint string) *exec.Cmd {
	t.Helper()
	bin, err := s.build()
	must(t, err)
	log, err := os.OpenFile(filepath.Join(s.dir, "log"), os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o600)
	must(t, err)
	defer func() { _ = log.Close() }()
	cmd := exec.Command("sh", "-c", `LISTEN_PID=$$ exec "$0" "$@"`, bin, "serve", "--config",
		filepath.Join(s.dir, "config.yaml"))
	cmd.Env = append(os.Environ(), "LISTEN_FDS=2", "LISTEN_FDNAMES=cri:admin", "CRI_PROXY_FAILPOINT="+failpoint)
	cmd.ExtraFiles = s.sockets
	cmd.Stdout, cmd.Stderr = log, log
	must(t, cmd.Start())
	t.Cleanup(func() {
		if cmd.ProcessState == nil {
			_ = cmd.Process.Kill()
			_ = cmd.Wait()
		}
	})
	return cmd
}

// next makes another process serve, and waits until the one before is through.
func (s *instances) next(t *testing.T) {
	t.Helper()
	old := s.serving
	s.serving = s.start(t, "")
	over(t, old)
}

// over waits until the process that another one has taken over from ends.
func over(t *testing.T, old *exec.Cmd) {
	t.Helper()
	_ = old.Wait()
	if code := old.ProcessState.ExitCode(); code != 10 {
		t.Fatalf("the process before ended with code %d", code)
	}
}

// end returns the operation when it has ended, whichever process knows that.
func (s *instances) end(t *testing.T, uid string) *opsv1.Operation {
	t.Helper()
	var op *opsv1.Operation
	eventually(t, "the end of "+uid, func() bool {
		var err error
		op, err = s.ops.GetOperation(t.Context(), &opsv1.GetOperationRequest{Uid: uid}, grpc.WaitForReady(true))
		return err == nil && op.GetFinishTime() != nil
	})
	return op
}

// TestTakeoverDuringRestarts lets one process after the other take over, at any moment of a
// restart. Each restart succeeds, once, kubelet sees one running container all the time, and none
// of its calls fails.
func TestTakeoverDuringRestarts(t *testing.T) {
	s := startInstances(t)
	p := s.runPod(t)
	app := p.run(t, spec{name: "app", command: looping})
	var calls, failed atomic.Int64
	var first sync.Once
	var owned sync.WaitGroup
	stop := make(chan struct{})
	for range 4 {
		owned.Go(func() {
			for {
				select {
				case <-stop:
					return
				case <-time.After(10 * time.Millisecond):
				}
				calls.Add(1)
				// No list: one that shows the successor tells kubelet, and who watches below is
				// another kubelet.
				if _, err := s.ContainerStatus(t.Context(),
					&runtimeapi.ContainerStatusRequest{ContainerId: app}); err != nil {
					failed.Add(1)
					first.Do(func() { t.Errorf("a call has failed: %v", err) })
				}
			}
		})
	}
	defer owned.Wait()
	defer sync.OnceFunc(func() { close(stop) })()
	seen := p.watch("app")
	const times = 8
	for i := range times {
		req := restartOf("app")
		// In its preStop, in its stop, starting, or over.
		req.Containers[0].PreStop = &opsv1.Hook{
			Action: &opsv1.Hook_Sleep{Sleep: &opsv1.SleepAction{Seconds: int64(i % 2)}}}
		req.Containers[0].GracePeriodSeconds = proto.Int64(10)
		if i%4 == 3 {
			req.Containers[0].Order = opsv1.Order_ORDER_START_FIRST
			req.Containers[0].MinReadySeconds = 1
		}
		uid := s.begin(t, p, req)
		<-time.After(time.Duration(i) * 60 * time.Millisecond)
		s.next(t)
		op := s.end(t, uid)
		if c := op.GetContainers()[0]; op.GetPhase() != opsv1.Phase_PHASE_SUCCEEDED || int(c.GetAttempt()) != i+1 {
			t.Fatalf("restart %d: %v", i, op)
		}
	}
	if bad := seen.stop(); len(bad) > 0 {
		t.Errorf("what kubelet must not see:\n%s", strings.Join(bad, "\n"))
	}
	t.Logf("%d takeovers, %d calls, %d failed", times, calls.Load(), failed.Load())
}

// TestTakeoverDuringUpgrade hands a prepared upgrade to a process and, armed, to a third one,
// before kubelet comes.
func TestTakeoverDuringUpgrade(t *testing.T) {
	s := startInstances(t)
	p := s.runPod(t)
	app := p.runSpec(t, spec{name: "app", command: versioned})
	seen := p.watch("app")
	uid := s.toVersion2(t, p, nil)
	s.next(t)
	s.arm(t, uid)
	s.next(t)
	if bad := seen.stop(); len(bad) > 0 {
		t.Errorf("what kubelet must not see:\n%s", strings.Join(bad, "\n"))
	}
	_, err := s.StopContainer(t.Context(), stopRequest(app, 5))
	must(t, err)
	resp, err := s.CreateContainer(t.Context(), p.withSpec(t, version2(), 1))
	must(t, err)
	_, err = s.StartContainer(t.Context(), &runtimeapi.StartContainerRequest{ContainerId: resp.GetContainerId()})
	must(t, err)
	op := s.end(t, uid)
	c := op.GetContainers()[0]
	if op.GetPhase() != opsv1.Phase_PHASE_SUCCEEDED || c.GetSuccessorId() != resp.GetContainerId() ||
		c.GetMethod() == "kubelet" {
		t.Errorf("kubelet was given %s by %v", resp.GetContainerId(), op)
	}
	t.Logf("gap %s, method %s", c.GetGap().AsDuration(), c.GetMethod())
}
