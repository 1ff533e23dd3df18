// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package ops_test

import (
	"context"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	opsv1 "github.com/cri-proxy/cri-proxy/api/ops/v1"
	"github.com/cri-proxy/cri-proxy/ops/podsapi"
	"github.com/cri-proxy/cri-proxy/ops/restart"
	"github.com/cri-proxy/cri-proxy/test/fakenode"
)

// during calls f once, before the effect of the first call of the engine that begins with prefix.
func (n *node) during(prefix string, f func()) {
	var once sync.Once
	n.rt.Set(func(rt *fakenode.Runtime) {
		rt.Before = func(call string) error {
			if strings.HasPrefix(call, prefix) {
				once.Do(f)
			}
			return nil
		}
	})
}

// kubelet calls on its own goroutine; the result is awaited by the returned function.
func (n *node) asKubelet(f func(ctx context.Context, k runtimeapi.RuntimeServiceClient) error) (answered func()) {
	done := make(chan error, 1)
	ctx, cancel := context.WithTimeout(context.Background(), waitLong)
	k := n.kubelet
	go func() {
		defer cancel()
		done <- f(ctx, k)
	}()
	return func() {
		n.t.Helper()
		if err := <-done; err != nil {
			n.t.Errorf("kubelet's call: %v", err)
		}
	}
}

// deleting is kubelet that tells of a pod on its way out.
var deleting = podsFunc(func(context.Context) (*podsapi.Pod, error) { return &podsapi.Pod{Deleting: true}, nil })

// Kubelet takes the slot back of a pod that goes away, in every phase of a restart: its call is
// answered OK, the operation fails and says why, and nothing of it is left.
func TestTakenBack(t *testing.T) {
	moments := []struct {
		name string
		at   string // the engine's call during which kubelet comes
		edit func(*opsv1.RestartRequest)
		exec bool // the hook hangs until it is cancelled
		// calls are the engine's mutating calls.
		stop, sandbox string
	}{
		{
			name: "staging", at: "CreateContainer app/1",
			stop:    "CreateContainer app/1; RemoveContainer app/1",
			sandbox: "CreateContainer app/1; RemoveContainer app/1",
		},
		{
			name: "preStop", at: "ExecSync", exec: true,
			edit:    func(r *opsv1.RestartRequest) { r.Containers[0].PreStop = execHook("bye") },
			stop:    "CreateContainer app/1; ExecSync app/0 bye 30s; RemoveContainer app/1",
			sandbox: "CreateContainer app/1; ExecSync app/0 bye 30s; RemoveContainer app/1",
		},
		{
			name: "stop", at: "StopContainer app/0",
			stop:    "CreateContainer app/1; StopContainer app/0 30s; StopContainer app/1 7s; RemoveContainer app/1",
			sandbox: "CreateContainer app/1; StopContainer app/0 30s; StopContainer app/1 2s; RemoveContainer app/1",
		},
		{
			name: "start", at: "StartContainer app/1",
			stop: "CreateContainer app/1; StopContainer app/0 30s; StartContainer app/1; StopContainer app/1 7s; " +
				"RemoveContainer app/1",
			sandbox: "CreateContainer app/1; StopContainer app/0 30s; StartContainer app/1; StopContainer app/1 2s; " +
				"RemoveContainer app/1",
		},
		{
			name: "postStart", at: "ExecSync", exec: true,
			edit: func(r *opsv1.RestartRequest) { r.Containers[0].PostStart = execHook("hello") },
			stop: "CreateContainer app/1; StopContainer app/0 30s; StartContainer app/1; ExecSync app/1 hello 0s; " +
				"StopContainer app/1 7s; RemoveContainer app/1",
			sandbox: "CreateContainer app/1; StopContainer app/0 30s; StartContainer app/1; ExecSync app/1 hello 0s; " +
				"StopContainer app/1 2s; RemoveContainer app/1",
		},
	}
	for _, m := range moments {
		for _, by := range []string{"StopContainer", "StopPodSandbox"} {
			t.Run(m.name+" "+by, func(t *testing.T) {
				t.Parallel()
				n := newNode(t, podOptions{})
				n.engine.node.Pods = deleting
				n.runTidied()
				n.rt.TakeCalls()
				if m.exec {
					n.rt.Set(func(f *fakenode.Runtime) {
						f.OnExec = func(
							ctx context.Context, _ *runtimeapi.ExecSyncRequest,
						) (*runtimeapi.ExecSyncResponse, error) {
							<-ctx.Done()
							return nil, ctx.Err()
						}
					})
				}
				incumbent := n.rt.ID(t, "app/0")
				var answered func()
				n.during(m.at, func() {
					answered = n.asKubelet(func(ctx context.Context, k runtimeapi.RuntimeServiceClient) error {
						if by == "StopContainer" {
							_, err := k.StopContainer(ctx,
								&runtimeapi.StopContainerRequest{ContainerId: incumbent, Timeout: 7})
							return err
						}
						_, err := k.StopPodSandbox(ctx, &runtimeapi.StopPodSandboxRequest{PodSandboxId: n.sandbox})
						return err
					})
					if by == "StopContainer" {
						n.log.await(t, "takes the slot back")
					} else {
						n.log.await(t, "the pod goes away")
					}
				})
				if m.edit != nil {
					n.restart("op", m.edit)
				} else {
					n.restart("op")
				}
				op := n.finish("op")
				answered()
				if got, want := verdict(op), "FAILED, app FAILED "+opsv1.ReasonTakenBackByKubelet; got != want {
					t.Errorf("operation ended %s, want %s", got, want)
				}
				if !strings.Contains(op.GetMessage(), "kubelet called "+by+" ") {
					t.Errorf("message is %q", op.GetMessage())
				}
				var own []string
				for _, c := range fakenode.Mutating(n.rt.TakeCalls()) {
					if !strings.HasPrefix(c, "kubelet:") {
						own = append(own, c)
					}
				}
				want, state := m.stop, "app/0 EXITED, web/0 RUNNING"
				if by == "StopPodSandbox" {
					want, state = m.sandbox, "app/0 EXITED, web/0 EXITED"
				}
				if got := strings.Join(own, "; "); got != want {
					t.Errorf("engine called %s\nwant %s", got, want)
				}
				if got := n.rt.State(); got != state {
					t.Errorf("runtime has %s, want %s", got, state)
				}
				if got := n.sees(); got != state {
					t.Errorf("kubelet sees %s, want %s", got, state)
				}
			})
		}
	}
}

// Kubelet stops the incumbent at every moment of a restart, and makes the next one, as after a
// failed probe. The restart gives way and leaves nothing behind, or the stop joins it, or it is
// over.
func TestStopAtEveryMoment(t *testing.T) {
	for _, s := range scenarios {
		switch s.name {
		case "hooks", "start first, hooks", "start first, processes", "pidfd", "gate, hooks":
			t.Run(s.name, func(t *testing.T) {
				t.Parallel()
				s.stopAtEveryMoment(t)
			})
		}
	}
}

func (s scenario) stopAtEveryMoment(t *testing.T) {
	for _, at := range s.points(t) {
		t.Run(at.String(), func(t *testing.T) {
			t.Parallel()
			for range tries {
				if s.stopAt(t, at) {
					return
				}
			}
			t.Fatal("the moment did not come")
		})
	}
}

// stopAt has kubelet stop the incumbent at that moment, if it comes to it.
func (s scenario) stopAt(t *testing.T, at point) bool {
	t.Helper()
	var n *node
	var ready sync.WaitGroup // n and incumbent are set
	ready.Add(1)
	var incumbent string
	answered := make(chan error, 1)
	stopped := make(chan struct{})
	came := make(chan struct{})
	n = s.begin(t, func(p point) error {
		if !p.is(at) {
			return nil
		}
		ready.Wait()
		close(came)
		go func() {
			ctx, cancel := context.WithTimeout(context.Background(), waitLong)
			defer cancel()
			_, err := n.kubelet.StopContainer(ctx, &runtimeapi.StopContainerRequest{ContainerId: incumbent, Timeout: 2})
			close(stopped)
			if err == nil {
				err = n.kubeletMakesNext(ctx)
			}
			answered <- err
		}()
		select {
		case <-n.log.line(func(l string) bool {
			return strings.Contains(l, "takes the slot back") || strings.Contains(l, "joins the restart")
		}):
		case <-stopped: // nobody holds it (any more)
		case <-time.After(waitLong):
			t.Error("kubelet's stop neither takes back, nor joins, nor ends")
		}
		return nil
	})
	incumbent = n.rt.ID(t, "app/0")
	ready.Done()
	op := n.finish("op")
	select {
	case <-came:
	default:
		s.check(t, n)
		return false
	}
	joined := n.log.has("joins the restart")
	if err := <-answered; err != nil {
		t.Errorf("kubelet's calls: %v", err)
	}
	got := verdict(op) + "; " + n.rt.State()
	switch got {
	case "FAILED, app FAILED TakenBackByKubelet; app/0 EXITED, app/1 RUNNING, web/0 RUNNING":
	case "FAILED, app FAILED ContainerNotRunning; app/0 EXITED, app/1 RUNNING, web/0 RUNNING":
	case "SUCCEEDED, app SUCCEEDED; app/0 EXITED, app/1 RUNNING, web/0 RUNNING":
		if warned := slices.Contains(op.GetContainers()[0].GetWarnings(), restart.JoinedWarning); warned != joined {
			t.Errorf("joined %v, the warnings are %q", joined, op.GetContainers()[0].GetWarnings())
		}
		if !joined && len(fakenode.Mutating([]string{at.call})) > 0 {
			t.Errorf("ended %s, though kubelet came before the reveal", got)
		}
	default:
		t.Errorf("ended %s", got)
	}
	if n.sees() != n.rt.State() {
		t.Errorf("kubelet sees %s, there is %s", n.sees(), n.rt.State())
	}
	if s.pod.processes {
		s.checkProcesses(t, n)
	}
	return true
}

// kubeletMakesNext makes app's next container as kubelet does after it has stopped the first one.
func (n *node) kubeletMakesNext(ctx context.Context) error {
	made, err := n.kubelet.CreateContainer(ctx,
		&runtimeapi.CreateContainerRequest{PodSandboxId: n.sandbox, Config: n.containerConfig("app", 1),
			SandboxConfig: n.sandboxConfig()})
	if err != nil {
		return err
	}
	_, err = n.kubelet.StartContainer(ctx, &runtimeapi.StartContainerRequest{ContainerId: made.GetContainerId()})
	return err
}

// Kubelet's CreateContainer that follows its stop finds the name free.
func TestKubeletRestartsAfterTakingBack(t *testing.T) {
	n := newNode(t, podOptions{})
	n.runTidied()
	incumbent := n.rt.ID(t, "app/0")
	var answered func()
	n.during("CreateContainer app/1", func() {
		answered = n.asKubelet(func(ctx context.Context, k runtimeapi.RuntimeServiceClient) error {
			if _, err := k.StopContainer(ctx,
				&runtimeapi.StopContainerRequest{ContainerId: incumbent, Timeout: 2}); err != nil {
				return err
			}
			return n.kubeletMakesNext(ctx)
		})
		n.log.await(t, "takes the slot back")
	})
	n.restart("op")
	op := n.finish("op")
	answered()
	if got, want := verdict(op), "FAILED, app FAILED "+opsv1.ReasonTakenBackByKubelet; got != want {
		t.Errorf("operation ended %s, want %s", got, want)
	}
	if got, want := n.sees(), "app/0 EXITED, app/1 RUNNING, web/0 RUNNING"; got != want || n.rt.State() != want {
		t.Errorf("kubelet sees %s, the runtime has %s, want %s", got, n.rt.State(), want)
	}
}

// A create of kubelet's own on a busy slot waits for the operation; here the incumbent died by
// itself.
func TestIncumbentExitsBeforeTheMask(t *testing.T) {
	n := newNode(t, podOptions{})
	n.runTidied()
	var answered func()
	n.during("CreateContainer app/1", func() {
		n.rt.Exit(t, "app/0", 3)
		answered = n.asKubelet(func(ctx context.Context, k runtimeapi.RuntimeServiceClient) error {
			_, err := k.CreateContainer(ctx,
				&runtimeapi.CreateContainerRequest{PodSandboxId: n.sandbox, Config: n.containerConfig("app", 1),
					SandboxConfig: n.sandboxConfig()})
			return err
		})
		n.log.await(t, "waiting for the operation on this slot")
	})
	n.restart("op")
	op := n.finish("op")
	answered()
	if got, want := verdict(op), "FAILED, app FAILED "+opsv1.ReasonContainerNotRunning; got != want {
		t.Errorf("operation ended %s, want %s", got, want)
	}
	if !strings.Contains(op.GetMessage(), "exit code 3") {
		t.Errorf("message is %q", op.GetMessage())
	}
	if got, want := n.rt.State(), "app/0 EXITED, app/1 CREATED, web/0 RUNNING"; got != want {
		t.Errorf("runtime has %s, want %s", got, want)
	}
}

// Kubelet has stopped the incumbent before the restart comes to look at it: that it did is what is
// told, not that the container ended.
func TestKubeletStopsBeforeTheMask(t *testing.T) {
	for order, at := range map[opsv1.Order]string{opsv1.Order_ORDER_STOP_FIRST: "stop first",
		opsv1.Order_ORDER_START_FIRST: "start first"} {
		t.Run(at, func(t *testing.T) {
			n := newNode(t, podOptions{})
			n.runTidied()
			incumbent := n.rt.ID(t, "app/0")
			var answered func()
			var once sync.Once
			created := false
			n.rt.Set(func(f *fakenode.Runtime) {
				f.Before = func(call string) error {
					created = created || call == "CreateContainer app/1"
					if created && call == "ContainerStatus app/0" {
						once.Do(func() {
							answered = n.asKubelet(func(ctx context.Context, k runtimeapi.RuntimeServiceClient) error {
								_, err := k.StopContainer(ctx,
									&runtimeapi.StopContainerRequest{ContainerId: incumbent, Timeout: 2})
								return err
							})
							n.log.await(t, "takes the slot back")
							for !strings.Contains(n.rt.State(), "app/0 EXITED") {
								time.Sleep(time.Millisecond) // the call is on its way
							}
						})
					}
					return nil
				}
			})
			n.restart("op", func(r *opsv1.RestartRequest) { r.Containers[0].Order = order })
			op := n.finish("op")
			answered()
			if got, want := verdict(op), "FAILED, app FAILED "+opsv1.ReasonTakenBackByKubelet; got != want {
				t.Errorf("operation ended %s, want %s", got, want)
			}
			if got, want := n.rt.State(), "app/0 EXITED, web/0 RUNNING"; got != want {
				t.Errorf("runtime has %s, want %s", got, want)
			}
		})
	}
}

// A stop that kubelet began before the operation makes the operation refuse.
func TestKubeletIsStoppingAlready(t *testing.T) {
	n := newNode(t, podOptions{})
	n.runTidied()
	incumbent := n.rt.Get(t, "app/0")
	n.rt.Set(func(*fakenode.Runtime) { incumbent.Stubborn = true })
	stopping := make(chan struct{})
	n.during("kubelet:StopContainer", func() { close(stopping) })
	answered := n.asKubelet(func(ctx context.Context, k runtimeapi.RuntimeServiceClient) error {
		_, err := k.StopContainer(ctx, &runtimeapi.StopContainerRequest{ContainerId: incumbent.Status.GetId(),
			Timeout: 10})
		return err
	})
	<-stopping
	n.restart("op")
	op := n.finish("op")
	if got, want := verdict(op), "FAILED, app FAILED "+opsv1.ReasonPodStopping; got != want {
		t.Errorf("operation ended %s, want %s", got, want)
	}
	n.rt.Exit(t, "app/0", 0)
	answered()
	if got, want := n.rt.State(), "app/0 EXITED, web/0 RUNNING"; got != want {
		t.Errorf("runtime has %s, want %s", got, want)
	}
}

// The shorter grace wins when both stop the same container.
func TestKubeletStopsWithLessGrace(t *testing.T) {
	n := newNode(t, podOptions{})
	n.engine.node.Pods = deleting
	n.runTidied()
	incumbent := n.rt.Get(t, "app/0")
	n.rt.Set(func(*fakenode.Runtime) { incumbent.Stubborn = true })
	var answered func()
	n.during("StopContainer app/0 30s", func() {
		answered = n.asKubelet(func(ctx context.Context, k runtimeapi.RuntimeServiceClient) error {
			_, err := k.StopContainer(ctx, &runtimeapi.StopContainerRequest{ContainerId: incumbent.Status.GetId(),
				Timeout: 0})
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
	if got, want := n.sees(), "app/0 EXITED, web/0 RUNNING"; got != want {
		t.Errorf("kubelet sees %s, want %s", got, want)
	}
}

func TestResourcesUpdatedDuringTheRestart(t *testing.T) {
	for _, at := range []string{"CreateContainer app/1", "StopContainer app/0", "StartContainer app/1"} {
		t.Run(at, func(t *testing.T) {
			n := newNode(t, podOptions{})
			n.runTidied()
			incumbent := n.rt.ID(t, "app/0")
			n.during(at, func() {
				n.asKubelet(func(ctx context.Context, k runtimeapi.RuntimeServiceClient) error {
					_, err := k.UpdateContainerResources(ctx,
						&runtimeapi.UpdateContainerResourcesRequest{ContainerId: incumbent,
							Linux: &runtimeapi.LinuxContainerResources{CpusetCpus: "2"}})
					return err
				})()
			})
			n.restart("op")
			if got, want := verdict(n.finish("op")), "SUCCEEDED, app SUCCEEDED"; got != want {
				t.Errorf("operation ended %s", got)
			}
			linux := n.rt.Get(t, "app/1").Status.GetResources().GetLinux()
			if linux.GetCpusetCpus() != "2" || linux.GetCpuShares() != 102 {
				t.Errorf("the new container has %v, want the CPUs that kubelet set meanwhile", linux)
			}
		})
	}
}
