// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package ops_test

import (
	"context"
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	opsv1 "github.com/cri-proxy/cri-proxy/api/ops/v1"
	"github.com/cri-proxy/cri-proxy/interceptors/view"
	"github.com/cri-proxy/cri-proxy/ops/switchover"
	"github.com/cri-proxy/cri-proxy/test/fakenode"
)

// gates returns what is in the directory of the gates.
func (n *node) gates() string {
	entries, err := os.ReadDir(filepath.Join(n.state, "gates"))
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		n.t.Error(err)
	}
	var out []string
	for _, e := range entries {
		if e.Name() != "try" { // of a probe that goes on
			out = append(out, e.Name())
		}
	}
	return fakenode.Joined(out)
}

// checkSwap asserts what holds after every operation on a node with processes: what the runtime
// says and what runs agree, no two applications of a slot have run at once, unless that was the
// order, and no gate is left.
func (n *node) checkSwap(t *testing.T, living string) {
	t.Helper()
	n.awaitLiving(living) // applications begin when they do
	n.rt.Mu.Lock()
	overlaps := fakenode.Joined(n.rt.Processes.Overlaps)
	n.rt.Mu.Unlock()
	if overlaps != "" {
		t.Errorf("began beside the one before: %s", overlaps)
	}
	if got := n.gates(); got != "" {
		t.Errorf("gates are left: %s", got)
	}
	if got := n.sees(); got != n.rt.State() {
		t.Errorf("kubelet sees %s, there is %s", got, n.rt.State())
	}
	if !plain(n.t, n.kubelet, n.view) {
		t.Error("something is still hidden or masked")
	}
}

// plain makes kubelet read all there is, and reports whether nothing is hidden or masked then.
func plain(t testing.TB, kubelet runtimeapi.RuntimeServiceClient, view *view.View) bool {
	t.Helper()
	sandboxes, err := kubelet.ListPodSandbox(t.Context(), &runtimeapi.ListPodSandboxRequest{})
	if err != nil {
		t.Fatal(err)
	}
	list, err := kubelet.ListContainers(t.Context(), &runtimeapi.ListContainersRequest{})
	if err != nil {
		t.Fatal(err)
	}
	for _, s := range sandboxes.GetItems() {
		if _, err := kubelet.PodSandboxStatus(t.Context(),
			&runtimeapi.PodSandboxStatusRequest{PodSandboxId: s.GetId()}); err != nil {
			t.Fatal(err)
		}
	}
	for _, c := range list.GetContainers() {
		if _, err := kubelet.ContainerStatus(t.Context(),
			&runtimeapi.ContainerStatusRequest{ContainerId: c.GetId()}); err != nil {
			t.Fatal(err)
		}
	}
	return !view.Active()
}

func TestMethods(t *testing.T) {
	for _, tc := range []struct {
		method string
		late   bool // the runtime tells the end long after the kernel
		calls  string
	}{
		{opsv1.MethodGate, false, "CreateContainer app/1; StartContainer app/1; StopContainer app/0 30s"},
		{opsv1.MethodPidfd, false, "CreateContainer app/1; StopContainer app/0 30s; StartContainer app/1"},
		{opsv1.MethodPlain, false, "CreateContainer app/1; StopContainer app/0 30s; StartContainer app/1"},
		{opsv1.MethodGate, true, "CreateContainer app/1; StartContainer app/1; StopContainer app/0 30s"},
		{opsv1.MethodPidfd, true, "CreateContainer app/1; StopContainer app/0 30s; StartContainer app/1"},
	} {
		name := tc.method
		if tc.late {
			name += ", late runtime"
		}
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			n := newNode(t, podOptions{processes: true, method: tc.method})
			n.runTidied()
			n.rt.TakeCalls()
			if tc.late {
				n.rt.Set(func(f *fakenode.Runtime) {
					f.Processes.Late = func(string) error {
						n.awaitLiving("app/1, web/0")
						return nil
					}
				})
			}
			end := n.relist()
			n.restart("op")
			op := n.finish("op")
			end()
			if got, want := verdict(op), "SUCCEEDED, app SUCCEEDED"; got != want {
				t.Fatalf("operation ended %s (%s)", got, op.GetMessage())
			}
			if got := strings.Join(fakenode.Mutating(n.rt.TakeCalls()), "; "); got != tc.calls {
				t.Errorf("calls are %s\nwant %s", got, tc.calls)
			}
			if got, want := n.rt.State(), "app/0 EXITED, app/1 RUNNING, web/0 RUNNING"; got != want {
				t.Errorf("runtime has %s, want %s", got, want)
			}
			n.checkSwap(t, "app/1, web/0")
			c := op.GetContainers()[0]
			if c.GetMethod() != tc.method || len(c.GetWarnings()) > 0 {
				t.Errorf("method is %s, warnings are %q", c.GetMethod(), c.GetWarnings())
			}
			if c.GetGap().AsDuration() < 0 || c.GetGap().AsDuration() > waitLong {
				t.Errorf("gap is %s", c.GetGap().AsDuration())
			}
		})
	}
}

// awaitLiving waits until just these containers have processes.
func (n *node) awaitLiving(want string) {
	for late := time.Now().Add(waitLong); n.rt.Living() != want; time.Sleep(time.Millisecond) { // asks the kernel
		if time.Now().After(late) {
			n.t.Errorf("alive are %s, want %s", n.rt.Living(), want)
			return
		}
	}
}

// While the successor waits at its gate kubelet must not know of it.
func TestGatedSuccessorIsNotSeen(t *testing.T) {
	n := newNode(t, podOptions{processes: true})
	n.runTidied()
	reached, release := n.hold("StopContainer app/0")
	end := n.relist()
	n.restart("op")
	<-reached
	if got, want := n.rt.Living(), "app/0, app/1 waits, web/0"; got != want {
		t.Errorf("alive are %s, want %s", got, want)
	}
	if got, want := n.sees(), "app/0 RUNNING, web/0 RUNNING"; got != want {
		t.Errorf("kubelet sees %s, want %s", got, want)
	}
	if n.gates() == "" {
		t.Error("there is no gate")
	}
	release()
	n.finish("op")
	end()
	n.checkSwap(t, "app/1, web/0")
}

// Kubelet is told when the application began, by every process of cri-proxy, until the container is
// gone.
func TestStartIsCorrected(t *testing.T) {
	n := newNode(t, podOptions{processes: true})
	n.runTidied()
	reached, release := n.hold("StopContainer app/0")
	n.restart("op")
	<-reached
	stopped := time.Now()
	release()
	n.finish("op")
	id := n.rt.ID(t, "app/1")
	read := func() time.Time {
		t.Helper()
		st, err := n.kubelet.ContainerStatus(t.Context(), &runtimeapi.ContainerStatusRequest{ContainerId: id})
		n.must(err)
		return time.Unix(0, st.GetStatus().GetStartedAt())
	}
	n.sees()
	at := read()
	if at.Before(stopped) || at.After(time.Now()) {
		t.Errorf("kubelet is told %s, the old one was stopped after %s", at, stopped)
	}
	op := n.engine.Lookup("op").Snapshot()
	if got := op.GetContainers()[0].GetStartTime().AsTime(); !got.Equal(at) {
		t.Errorf("the operation tells %s, kubelet is told %s", got, at)
	}
	state := n.copyState()
	n.boot(state)
	n.state = state
	if got := read(); !got.Equal(at) {
		t.Errorf("after a restart of cri-proxy kubelet is told %s, was %s", got, at)
	}
	n.runTidied()
	if got := read(); !got.Equal(at) {
		t.Errorf("once it is tidied kubelet is told %s, was %s", got, at)
	}
	_, err := n.kubelet.RemoveContainer(t.Context(), &runtimeapi.RemoveContainerRequest{ContainerId: id})
	n.must(err)
	if !n.engine.node.Records.Started(id).IsZero() {
		t.Error("the start of a removed container is still recorded")
	}
}

// What goes wrong with the gate does not keep the container from being restarted, and does not
// touch the incumbent.
func TestGateCannotBeUsed(t *testing.T) {
	always := func(f func(*fakenode.Processes)) func(*fakenode.Runtime) {
		return func(rt *fakenode.Runtime) { f(rt.Processes) }
	}
	for _, tc := range []struct {
		name   string
		script func(*fakenode.Runtime)
		edit   func(*node)
		want   string
		method string
		calls  string
		living string
		both   bool // the applications may have run at once
	}{
		{
			name: "CDI is refused", script: always(func(p *fakenode.Processes) { p.CDI = 0 }),
			method: opsv1.MethodPidfd,
			calls:  "CreateContainer app/1; CreateContainer app/1; StopContainer app/0 30s; StartContainer app/1",
		},
		{
			name: "gates cannot be made", edit: func(n *node) {
				dir := filepath.Join(n.state, "gates")
				n.must(errors.Join(os.RemoveAll(dir), os.WriteFile(dir, nil, 0o600)))
				n.t.Cleanup(func() { n.must(os.Remove(dir)) })
			},
			method: opsv1.MethodPidfd, calls: "CreateContainer app/1; StopContainer app/0 30s; StartContainer app/1",
		},
		{
			name: "the container ends at the hook", script: always(func(p *fakenode.Processes) { p.DeadHook = true }),
			method: opsv1.MethodPidfd,
			calls: "CreateContainer app/1; StartContainer app/1; StopContainer app/1 2s; RemoveContainer app/1; " +
				"CreateContainer app/1; StopContainer app/0 30s; StartContainer app/1",
		},
		{
			name: "the hook is not run", script: always(func(p *fakenode.Processes) { p.NoHook = true }), both: true,
			method: opsv1.MethodPidfd,
			calls: "CreateContainer app/1; StartContainer app/1; StopContainer app/1 2s; RemoveContainer app/1; " +
				"CreateContainer app/1; StopContainer app/0 30s; StartContainer app/1",
		},
		{
			name: "the start fails once", script: func(f *fakenode.Runtime) { failStarts(f, 1) },
			method: opsv1.MethodGate,
			calls: "CreateContainer app/1; StartContainer app/1; RemoveContainer app/1; CreateContainer app/1; " +
				"StartContainer app/1; StopContainer app/0 30s",
		},
		{
			name: "the start fails, and then CDI is refused", method: opsv1.MethodPidfd,
			script: func(f *fakenode.Runtime) {
				failStarts(f, 1)
				f.Processes.CDI = 1
			},
			calls: "CreateContainer app/1; StartContainer app/1; RemoveContainer app/1; CreateContainer app/1; " +
				"CreateContainer app/1; StopContainer app/0 30s; StartContainer app/1",
		},
		{
			name: "the start fails twice", script: func(f *fakenode.Runtime) { failStarts(f, 9) },
			method: opsv1.MethodGate,
			want:   "FAILED, app FAILED StartFailed",
			calls: "CreateContainer app/1; StartContainer app/1; RemoveContainer app/1; CreateContainer app/1; " +
				"StartContainer app/1; StopContainer app/1 2s; RemoveContainer app/1", living: "app/0, web/0",
		},
	} {
		t.Run(tc.name, func(t *testing.T) {
			t.Parallel()
			n := newNode(t, podOptions{processes: true})
			n.runTidied()
			n.rt.TakeCalls()
			if tc.script != nil {
				n.rt.Set(tc.script)
			}
			if tc.edit != nil {
				tc.edit(n)
			}
			// The incumbent serves until its own stop.
			early := ""
			n.watchCalls(func(call string) {
				if call == "StopContainer app/0 30s" {
					early = n.rt.Living()
				}
			})
			end := n.relist()
			n.restart("op")
			op := n.finish("op")
			end()
			if tc.want == "" {
				tc.want, tc.living = "SUCCEEDED, app SUCCEEDED", "app/1, web/0"
			}
			if got := verdict(op); got != tc.want {
				t.Errorf("operation ended %s (%s), want %s", got, op.GetMessage(), tc.want)
			}
			if got := strings.Join(fakenode.Mutating(n.rt.TakeCalls()), "; "); got != tc.calls {
				t.Errorf("calls are %s\nwant      %s", got, tc.calls)
			}
			if got := op.GetContainers()[0].GetMethod(); got != tc.method {
				t.Errorf("method is %s, want %s", got, tc.method)
			}
			if tc.living == "app/1, web/0" && tc.edit == nil && !strings.HasPrefix(early, "app/0, ") {
				t.Errorf("before the stop, alive were %s", early)
			}
			if tc.both {
				n.rt.Set(func(f *fakenode.Runtime) { f.Processes.Overlaps = nil })
			}
			if tc.edit == nil {
				n.checkSwap(t, tc.living)
			}
		})
	}
}

// watchCalls calls f before the effect of each call of the engine, beside what the runtime does
// then already.
func (n *node) watchCalls(f func(call string)) {
	n.rt.Set(func(rt *fakenode.Runtime) {
		before := rt.Before
		rt.Before = func(call string) error {
			f(call)
			if before != nil {
				return before(call)
			}
			return nil
		}
	})
}

// The stop fails while the successor waits at its gate: it must go without having begun.
func TestStopFailsWhileGated(t *testing.T) {
	n := newNode(t, podOptions{processes: true})
	n.runTidied()
	n.rt.Set(func(f *fakenode.Runtime) {
		f.Before = func(call string) error {
			if strings.HasPrefix(call, "StopContainer app/0") {
				return status.Error(codes.Unknown, "no such luck")
			}
			return nil
		}
	})
	n.rt.TakeCalls()
	n.restart("op")
	op := n.finish("op")
	if got, want := verdict(op), "FAILED, app FAILED StopFailed"; got != want {
		t.Errorf("operation ended %s, want %s", got, want)
	}
	// With the least grace, for there is no application.
	if got, want := strings.Join(fakenode.Mutating(n.rt.TakeCalls()), "; "),
		"CreateContainer app/1; StartContainer app/1; StopContainer app/0 30s; StopContainer app/1 2s; "+
			"RemoveContainer app/1"; got != want {
		t.Errorf("calls are %s\nwant %s", got, want)
	}
	n.checkSwap(t, "app/0, web/0")
}

// The runtime does not tell the end of the incumbent, but the kernel does: the successor runs, and
// the operation waits for the runtime's word, so that kubelet never sees both running.
func TestStopFailsAfterTheEnd(t *testing.T) {
	n := newNode(t, podOptions{processes: true})
	n.runTidied()
	n.rt.Set(func(f *fakenode.Runtime) {
		f.Processes.Late = func(string) error {
			n.awaitLiving("app/1, web/0")
			return status.Error(codes.Unknown, "no such luck")
		}
	})
	n.restart("op")
	n.log.await(t, "the container's process has ended, but the runtime did not say so")
	if got, want := n.sees(), "app/0 RUNNING, web/0 RUNNING"; got != want {
		t.Errorf("kubelet sees %s, want %s", got, want)
	}
	n.rt.Exit(t, "app/0", 0)
	op := n.finish("op")
	if got, want := verdict(op), "SUCCEEDED, app SUCCEEDED"; got != want {
		t.Errorf("operation ended %s (%s), want %s", got, op.GetMessage(), want)
	}
	n.checkSwap(t, "app/1, web/0")
}

// The incumbent dies by itself while its successor is being brought to the gate: that takes its
// place at once.
func TestIncumbentDiesWhileGated(t *testing.T) {
	for _, at := range []string{"StartContainer app/1", "StopContainer app/0"} {
		t.Run(at, func(t *testing.T) {
			n := newNode(t, podOptions{processes: true})
			n.runTidied()
			n.during(at, func() { n.rt.Exit(t, "app/0", 3) })
			end := n.relist()
			n.restart("op")
			op := n.finish("op")
			end()
			if got, want := verdict(op), "SUCCEEDED, app SUCCEEDED"; got != want {
				t.Errorf("operation ended %s (%s), want %s", got, op.GetMessage(), want)
			}
			if got := op.GetContainers()[0]; got.GetExitCode() != 3 || got.GetMethod() != "gate" {
				t.Errorf("container is %v", got)
			}
			n.checkSwap(t, "app/1, web/0")
		})
	}
}

// The successor is killed at its gate: the restart goes on without one.
func TestGatedSuccessorDies(t *testing.T) {
	n := newNode(t, podOptions{processes: true})
	n.runTidied()
	n.during("StopContainer app/0", func() { n.rt.Exit(t, "app/1", 137) })
	n.restart("op")
	op := n.finish("op")
	if got, want := verdict(op), "SUCCEEDED, app SUCCEEDED"; got != want {
		t.Errorf("operation ended %s (%s), want %s", got, op.GetMessage(), want)
	}
	if got := op.GetContainers()[0].GetMethod(); got != "pidfd" {
		t.Errorf("method is %s", got)
	}
	n.checkSwap(t, "app/1, web/0")
}

// Kubelet takes the slot back at every moment of a gated restart.
func TestTakenBackWhileGated(t *testing.T) {
	for _, tc := range []struct {
		at      string
		noHook  bool
		calls   string
		patient bool
	}{
		{at: "StartContainer app/1",
			calls: "CreateContainer app/1; StartContainer app/1; StopContainer app/1 2s; RemoveContainer app/1"},
		{at: "StopContainer app/0",
			calls: "CreateContainer app/1; StartContainer app/1; StopContainer app/0 30s; StopContainer app/1 2s; " +
				"RemoveContainer app/1"},
	} {
		t.Run(tc.at, func(t *testing.T) {
			n := newNode(t, podOptions{processes: true})
			n.engine.node.Pods = deleting
			n.runTidied()
			n.rt.TakeCalls()
			incumbent := n.rt.ID(t, "app/0")
			var answered func()
			n.during(tc.at, func() {
				answered = n.asKubelet(func(ctx context.Context, k runtimeapi.RuntimeServiceClient) error {
					_, err := k.StopContainer(ctx, &runtimeapi.StopContainerRequest{ContainerId: incumbent, Timeout: 7})
					return err
				})
				n.log.await(t, "takes the slot back")
			})
			n.restart("op")
			op := n.finish("op")
			answered()
			if got, want := verdict(op), "FAILED, app FAILED "+opsv1.ReasonTakenBackByKubelet; got != want {
				t.Errorf("operation ended %s, want %s", got, want)
			}
			var own []string
			for _, c := range fakenode.Mutating(n.rt.TakeCalls()) {
				if !strings.HasPrefix(c, "kubelet:") {
					own = append(own, c)
				}
			}
			if got := strings.Join(own, "; "); got != tc.calls {
				t.Errorf("engine called %s\nwant %s", got, tc.calls)
			}
			n.checkSwap(t, "web/0")
		})
	}
}

// A hook that never comes does not keep kubelet waiting.
func TestTakenBackWhileTheHookIsAwaited(t *testing.T) {
	n := newNode(t, podOptions{processes: true})
	n.engine.node.Pods = deleting
	n.runTidied()
	n.rt.Set(func(f *fakenode.Runtime) { f.Processes.LateHook = true })
	incumbent := n.rt.ID(t, "app/0")
	n.engine.node.Switchover.GateTimeout = time.Hour // the test ends sooner
	var answered func()
	n.rt.Set(func(f *fakenode.Runtime) {
		f.After = func(call string) error {
			if call != "StartContainer app/1" {
				return nil
			}
			answered = n.asKubelet(func(ctx context.Context, k runtimeapi.RuntimeServiceClient) error {
				_, err := k.StopContainer(ctx, &runtimeapi.StopContainerRequest{ContainerId: incumbent, Timeout: 7})
				return err
			})
			n.log.await(t, "takes the slot back")
			return nil
		}
	})
	n.restart("op")
	op := n.finish("op")
	answered()
	if got, want := verdict(op), "FAILED, app FAILED "+opsv1.ReasonTakenBackByKubelet; got != want {
		t.Errorf("operation ended %s, want %s", got, want)
	}
	n.checkSwap(t, "web/0")
}

func (n *node) checkOnlyLiving(t *testing.T, living string) {
	t.Helper()
	n.rt.Set(func(f *fakenode.Runtime) { f.Processes.Overlaps = nil })
	n.checkSwap(t, living)
}

// Two restarts in a row: the second clones a container that had a gate, which was for that one
// only.
func TestGateAfterGate(t *testing.T) {
	n := newNode(t, podOptions{processes: true})
	n.runTidied()
	for i, uid := range []string{"first", "second"} {
		n.restart(uid)
		op := n.finish(uid)
		if got, want := verdict(op), "SUCCEEDED, app SUCCEEDED"; got != want {
			t.Fatalf("%d ended %s (%s)", i, got, op.GetMessage())
		}
		if op.GetContainers()[0].GetMethod() != "gate" {
			t.Errorf("method is %s", op.GetContainers()[0].GetMethod())
		}
	}
	if c := n.rt.Get(t, "app/2").Config; len(c.GetCDIDevices()) != 1 || len(c.GetMounts()) != 2 {
		t.Errorf("the third has %v and %v", c.GetCDIDevices(), c.GetMounts())
	}
	req := n.engine.node.Records.Request(n.rt.ID(t, "app/2"))
	if len(req.GetConfig().GetCDIDevices()) != 0 || len(req.GetConfig().GetMounts()) != 1 {
		t.Errorf("recorded is %v", req)
	}
	n.checkSwap(t, "app/2, web/0")
}

// A gate for each container, and none is taken for another's.
func TestGatesOfTwoContainers(t *testing.T) {
	n := newNode(t, podOptions{processes: true})
	n.runTidied()
	n.restart("op", func(r *opsv1.RestartRequest) {
		r.Containers = append(r.Containers, &opsv1.ContainerRestart{Name: "web"})
	})
	op := n.finish("op")
	if got, want := verdict(op), "SUCCEEDED, app SUCCEEDED, web SUCCEEDED"; got != want {
		t.Errorf("operation ended %s (%s), want %s", got, op.GetMessage(), want)
	}
	n.checkSwap(t, "app/1, web/1")
}

// reboot starts the next process on the state directory that a crash left.
func (n *node) reboot(state string) {
	n.t.Helper()
	n.boot(state)
	n.state = state
	n.rt.Set(func(f *fakenode.Runtime) { f.Before, f.After = nil, nil })
	n.rt.TakeCalls()
}

// crashAt crashes the daemon in the middle of the first call of the engine that begins with prefix,
// before its effect. The caller never gets an answer.
func (n *node) crashAt(prefix string, edit ...func(*opsv1.RestartRequest)) (state string) {
	n.t.Helper()
	crashed := make(chan string, 1)
	d := n.daemon
	n.rt.Set(func(f *fakenode.Runtime) {
		f.Before = func(call string) error {
			if strings.HasPrefix(call, prefix) && d.leash.gone.Load() == nil {
				crashed <- n.crash()
				return status.Error(codes.Unavailable, "the caller is gone")
			}
			return nil
		}
	})
	n.restart("op", edit...)
	select {
	case state = <-crashed:
	case <-time.After(waitLong):
		n.t.Fatal("the moment did not come")
	}
	return state
}

// What the next process finds at the gate.
func TestResumeAtTheGate(t *testing.T) {
	for _, tc := range []struct {
		name   string
		do     func(n *node, state string) // while there is no process
		method string
		calls  string
		same   bool // the successor is that of the process before
	}{
		{name: "it waits", method: opsv1.MethodGate, calls: "StartContainer app/1; StopContainer app/0 30s",
			same: true},
		{
			name: "it has ended", method: opsv1.MethodPidfd,
			do: func(n *node, _ string) { n.rt.Exit(n.t, "app/1", 137) },
			calls: "StartContainer app/1; StopContainer app/1 2s; RemoveContainer app/1; CreateContainer app/1; " +
				"StopContainer app/0 30s; StartContainer app/1",
		},
		{
			name: "its gate is lost", method: opsv1.MethodPidfd,
			do: func(n *node, state string) { n.must(os.RemoveAll(filepath.Join(state, "gates"))) },
			calls: "StopContainer app/1 2s; RemoveContainer app/1; CreateContainer app/1; StopContainer app/0 30s; " +
				"StartContainer app/1",
		},
		{
			name: "the incumbent has ended", method: opsv1.MethodGate, same: true,
			do:    func(n *node, _ string) { n.rt.Exit(n.t, "app/0", 3) },
			calls: "StartContainer app/1; StopContainer app/0 30s",
		},
	} {
		t.Run(tc.name, func(t *testing.T) {
			t.Parallel()
			n := newNode(t, podOptions{processes: true})
			n.runTidied()
			state := n.crashAt("StopContainer app/0")
			if got, want := n.rt.Living(), "app/0, app/1 waits, web/0"; got != want {
				t.Fatalf("alive are %s, want %s", got, want)
			}
			before := n.rt.ID(t, "app/1")
			if tc.do != nil {
				tc.do(n, state)
			}
			n.reboot(state)
			end := n.relist()
			n.run()
			op := n.finish("op")
			end()
			if got, want := verdict(op), "SUCCEEDED, app SUCCEEDED"; got != want {
				t.Errorf("operation ended %s (%s), want %s", got, op.GetMessage(), want)
			}
			if got := op.GetContainers()[0].GetMethod(); got != tc.method {
				t.Errorf("method is %s, want %s", got, tc.method)
			}
			if got := strings.Join(fakenode.Mutating(n.rt.TakeCalls()), "; "); got != tc.calls {
				t.Errorf("calls are %s\nwant      %s", got, tc.calls)
			}
			if same := n.rt.ID(t, "app/1") == before; same != tc.same {
				t.Errorf("the successor is the same one: %t", same)
			}
			n.checkSwap(t, "app/1, web/0")
		})
	}
}

// The process before has opened the gate and died; the runtime is late to know of the incumbent's
// end. The successor serves, and must go on doing that.
func TestResumePastTheGate(t *testing.T) {
	for name, knows := range map[string]bool{"the runtime knows": true, "the runtime is late": false} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			n := newNode(t, podOptions{processes: true})
			n.runTidied()
			crashed := make(chan string, 1)
			n.rt.Set(func(f *fakenode.Runtime) {
				f.Processes.Late = func(string) error {
					n.awaitLiving("app/1, web/0")
					crashed <- n.crash()
					if knows {
						return nil
					}
					return status.Error(codes.Unavailable, "the caller is gone")
				}
			})
			n.restart("op")
			state := <-crashed
			before := n.rt.ID(t, "app/1")
			n.rt.Set(func(f *fakenode.Runtime) { f.Processes.Late = nil })
			n.reboot(state)
			if !knows { // until it is asked for the old one again, or for the new one
				log := n.log
				var asked atomic.Int32
				exit := sync.OnceFunc(func() { n.rt.Exit(t, "app/0", 0) })
				n.watchCalls(func(call string) {
					if !log.has("process not watched") {
						return
					}
					if call == "ContainerStatus app/1" || call == "ContainerStatus app/0" && asked.Add(1) == 2 {
						exit()
					}
				})
			}
			end := n.relist()
			n.run()
			op := n.finish("op")
			end()
			if got, want := verdict(op), "SUCCEEDED, app SUCCEEDED"; got != want {
				t.Errorf("operation ended %s (%s), want %s", got, op.GetMessage(), want)
			}
			if n.rt.ID(t, "app/1") != before {
				t.Error("the successor that served has been replaced")
			}
			n.checkSwap(t, "app/1, web/0")
			// The process before may not have come to write when that began.
			st, err := n.kubelet.ContainerStatus(t.Context(), &runtimeapi.ContainerStatusRequest{ContainerId: before})
			n.must(err)
			if at := st.GetStatus().GetStartedAt(); at <= n.rt.Get(t, "app/1").Status.GetStartedAt() {
				t.Errorf("kubelet is told of a start at %d, which is that of the runtime", at)
			}
		})
	}
}

// A runtime that does not run the hook has let an application run beside the one that it is to
// replace. It does that once, not with every restart.
func TestRuntimeThatRunsNoHooks(t *testing.T) {
	n := newNode(t, podOptions{processes: true})
	var later atomic.Int64 // how much the clock of the methods is ahead
	n.engine.node.Switchover.Now = func() time.Time { return time.Now().Add(time.Duration(later.Load())) }
	n.runTidied()
	n.rt.Set(func(f *fakenode.Runtime) { f.Processes.NoHook = true })
	for _, uid := range []string{"first", "second", "third"} {
		if uid == "third" { // asked anew
			later.Add(int64(switchover.ProbeAge))
		}
		n.rt.Set(func(f *fakenode.Runtime) { f.Processes.Overlaps = nil })
		n.restart(uid)
		op := n.finish(uid)
		if got, want := verdict(op), "SUCCEEDED, app SUCCEEDED"; got != want {
			t.Fatalf("%s ended %s (%s)", uid, got, op.GetMessage())
		}
		if uid != "first" {
			n.rt.Mu.Lock()
			if len(n.rt.Processes.Overlaps) > 0 {
				t.Errorf("%s: began beside the one before: %q", uid, n.rt.Processes.Overlaps)
			}
			n.rt.Mu.Unlock()
		}
	}
	got, why := n.has()
	if got != "pidfd plain" || !strings.Contains(why, "without running its hook") {
		t.Errorf("the node has %s (%s)", got, why)
	}
	n.rt.Set(func(f *fakenode.Runtime) { f.Processes.NoHook = false })
	later.Add(int64(switchover.NoHookAge))
	n.restart("later")
	if op := n.finish("later"); op.GetContainers()[0].GetMethod() != "gate" {
		t.Errorf("method is %s", op.GetContainers()[0].GetMethod())
	}
}

// The runtime answers the stop of a process that has just ended by itself before it knows that it
// has: nothing is shown until it does.
func TestRuntimeIsLateToKnow(t *testing.T) {
	n := newNode(t, podOptions{})
	n.runTidied()
	app := n.rt.Get(t, "app/0")
	state := func(s runtimeapi.ContainerState) { n.rt.Set(func(*fakenode.Runtime) { app.Status.State = s }) }
	looks := -1 // since the stop
	n.rt.Set(func(f *fakenode.Runtime) {
		f.After = func(call string) error {
			if strings.HasPrefix(call, "StopContainer app/0") {
				state(runtimeapi.ContainerState_CONTAINER_RUNNING)
				looks = 0
			}
			return nil
		}
		f.Before = func(call string) error {
			if looks < 0 || call != "ContainerStatus app/0" {
				return nil
			}
			if looks++; looks == 3 {
				if got, want := n.sees(), "app/0 RUNNING, web/0 RUNNING"; got != want {
					t.Errorf("kubelet sees %s, want %s", got, want)
				}
				state(runtimeapi.ContainerState_CONTAINER_EXITED)
			}
			return nil
		}
	})
	n.restart("op")
	if got, want := verdict(n.finish("op")), "SUCCEEDED, app SUCCEEDED"; got != want {
		t.Errorf("operation ended %s, want %s", got, want)
	}
	if got, want := n.sees(), "app/0 EXITED, app/1 RUNNING, web/0 RUNNING"; got != want {
		t.Errorf("kubelet sees %s, want %s", got, want)
	}
}

// Somebody removes the incumbent while it stops, and the runtime has no answer to the stop but that
// it does not know it.
func TestIncumbentRemovedWhileStopping(t *testing.T) {
	for _, processes := range []bool{false, true} {
		t.Run(map[bool]string{false: "plain", true: "gate"}[processes], func(t *testing.T) {
			n := newNode(t, podOptions{processes: processes})
			n.runTidied()
			n.rt.Set(func(f *fakenode.Runtime) {
				f.After = func(call string) error {
					if !strings.HasPrefix(call, "StopContainer app/0") {
						return nil
					}
					app := n.rt.Get(t, "app/0")
					n.rt.Set(func(f *fakenode.Runtime) { f.Remove(app) })
					return status.Error(codes.NotFound, "get container info: not found")
				}
			})
			n.restart("op")
			if got, want := verdict(n.finish("op")), "SUCCEEDED, app SUCCEEDED"; got != want {
				t.Errorf("operation ended %s, want %s", got, want)
			}
			if got, want := n.rt.State(), "app/1 RUNNING, web/0 RUNNING"; got != want {
				t.Errorf("runtime has %s, want %s", got, want)
			}
		})
	}
}
