// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package ops_test

import (
	"context"
	"fmt"
	"slices"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"google.golang.org/protobuf/proto"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	opsv1 "github.com/cri-proxy/cri-proxy/api/ops/v1"
	"github.com/cri-proxy/cri-proxy/ops/podsapi"
	"github.com/cri-proxy/cri-proxy/ops/restart"
	"github.com/cri-proxy/cri-proxy/test/fakenode"
)

// drains makes app's first container take that long to stop.
func (n *upNode) drains(d time.Duration) {
	app := n.rt.ID(n.t, "app/0")
	n.rt.Set(func(f *fakenode.Runtime) {
		f.Find(app).Stubborn = true
		f.Before = func(call string) error {
			if strings.HasPrefix(call, "StopContainer app/0") {
				time.AfterFunc(d, func() { n.rt.Exit(n.t, "app/0", 0) })
			}
			return nil
		}
	})
}

// draining is a node whose container app is being stopped for a restart, and takes 20 s for it.
func (n *upNode) draining(edit ...func(*opsv1.RestartRequest)) {
	n.t.Helper()
	n.drains(20 * time.Second)
	_, err := n.api.Restart(n.t.Context(), restartRequest("op", edit...))
	n.must(err)
	synctest.Wait()
	n.rt.TakeCalls()
}

// probeFails is what kubelet does when a probe of app's first container has failed: it stops it and
// makes the next one.
func (n *upNode) probeFails(ctx context.Context, edit ...func(*runtimeapi.ContainerConfig)) error {
	if err := n.kubeletStops(ctx, n.rt.ID(n.t, "app/0"), 30); err != nil {
		return err
	}
	return n.kubeletMakes(ctx, n.asks("app", "app:v1", 1, edit...))
}

// kubeletTells is kubelet's Pods API: the pod as it is, edited, and the containers by which kubelet
// goes now.
func (n *upNode) kubeletTells(edit ...func(*podsapi.Pod)) {
	n.engine.node.Pods = podsFunc(func(ctx context.Context) (*podsapi.Pod, error) {
		newest, err := n.newest(ctx, "app")
		if err != nil || newest == nil {
			return nil, err
		}
		p := &podsapi.Pod{
			Phase: "Running", Images: map[string]string{"app": "app:v1"},
			Running: map[string]string{"app": "containerd://" + newest.GetId()},
		}
		for _, f := range edit {
			f(p)
		}
		return p, nil
	})
}

// A probe fails while the container drains, and kubelet stops it and makes the next one: it gets
// the successor.
func TestStopJoins(t *testing.T) {
	for _, tells := range []bool{true, false} {
		t.Run(fmt.Sprintf("kubelet tells %v", tells), func(t *testing.T) {
			inUpNode(t, func(t *testing.T, n *upNode) {
				if tells {
					n.kubeletTells()
				}
				n.draining()
				time.Sleep(9 * time.Second)
				took, err := n.inBackground(n.probeFailsNow)()
				n.must(err)
				if took != 11*time.Second {
					t.Errorf("kubelet has waited %s, want until the container has ended", took)
				}
				op := n.ends("op", succeeded, upgraded)
				if got := warnings(op); got != restart.JoinedWarning {
					t.Errorf("warnings are %q", got)
				}
				if got := strings.Join(fakenode.Mutating(n.rt.TakeCalls()), "; "); got != "StartContainer app/1; "+
					"kubelet:StartContainer app/1" {
					t.Errorf("calls are %s", got)
				}
				n.must(n.sync(t.Context(), "app", "app:v1"))
				n.settled(upgraded)
			})
		})
	}
}

func (n *upNode) probeFailsNow(ctx context.Context) error { return n.probeFails(ctx) }

// Kubelet has decided to stop the container before the restart was over, and comes after that: it
// gets the successor if it asks for that, and finds it otherwise.
func TestLateStopAndCreation(t *testing.T) {
	for _, tc := range []struct {
		name, image string
		attempt     uint32
		edit        func(*runtimeapi.ContainerConfig)
		calls       string
		taken       bool
	}{
		{name: "the same", image: "app:v1", attempt: 1,
			calls: "kubelet:StopContainer app/0 30s; kubelet:StartContainer app/1"},
		{
			name: "other resources", image: "app:v1", attempt: 1,
			edit: func(c *runtimeapi.ContainerConfig) { c.Linux.Resources.CpuShares = 512 },
			calls: "kubelet:StopContainer app/0 30s; UpdateContainerResources app/1 cpus=0-3; " +
				"kubelet:StartContainer app/1",
		},
		{name: "another image", image: "app:v2", attempt: 1,
			calls: "kubelet:StopContainer app/0 30s; kubelet:CreateContainer app/1", taken: true},
	} {
		t.Run(tc.name, func(t *testing.T) {
			inUpNode(t, func(t *testing.T, n *upNode) {
				_, err := n.api.Restart(t.Context(), restartRequest("op"))
				n.must(err)
				n.ends("op", succeeded, upgraded)
				n.rt.TakeCalls()
				n.must(n.kubeletStops(t.Context(), n.rt.ID(t, "app/0"), 30))
				var edit []func(*runtimeapi.ContainerConfig)
				if tc.edit != nil {
					edit = append(edit, tc.edit)
				}
				err = n.kubeletMakes(t.Context(), n.asks("app", tc.image, tc.attempt, edit...))
				if taken := err != nil && strings.Contains(err.Error(), "is reserved for"); taken != tc.taken ||
					err != nil && !taken {
					t.Errorf("got %v", err)
				}
				if got := strings.Join(fakenode.Mutating(n.rt.TakeCalls()), "; "); got != tc.calls {
					t.Errorf("calls are %s\nwant %s", got, tc.calls)
				}
				n.settled(upgraded)
			})
		})
	}
}

// A container that is never restarted is not made anew by kubelet, which finds the successor. The
// operation does not wait for long for what does not come.
func TestStopJoinsWithoutCreation(t *testing.T) {
	for tells, within := range map[bool]time.Duration{true: 2 * restart.RecreatePoll, false: restart.RecreateTimeout} {
		t.Run(fmt.Sprintf("kubelet tells %v", tells), func(t *testing.T) {
			inUpNode(t, func(t *testing.T, n *upNode) {
				if tells {
					n.kubeletTells()
				}
				n.draining()
				n.must(n.kubeletStops(t.Context(), n.rt.ID(t, "app/0"), 30))
				if got := n.sees(); got != upgraded {
					t.Errorf("when its stop is answered kubelet sees %s", got)
				}
				began := time.Now()
				n.ends("op", succeeded, upgraded)
				if took := time.Since(began); took > within {
					t.Errorf("the operation went on for %s", took)
				}
				if !tells { // kubelet comes so late
					n.must(n.kubeletMakes(t.Context(), n.asks("app", "app:v1", 1)))
				}
				n.settled(upgraded)
			})
		})
	}
}

// Kubelet gives up a pod that is never restarted when its last container has been stopped for a
// failed probe (kuberuntime_manager.go computePodActions: KillPod). Where it tells that there is no
// other reason, the pod stays.
func TestPodIsKept(t *testing.T) {
	deletes := func(p *podsapi.Pod) { p.Deleting = true }
	for _, tc := range []struct {
		name        string
		tells       bool
		ends        bool // the operation, before kubelet stops the sandbox
		by          func(n *upNode)
		want, state string
		calls       string // from kubelet's stop of the sandbox on
	}{
		{name: "kept", tells: true, want: succeeded, state: upgraded},
		{name: "kept, later", tells: true, ends: true, want: succeeded, state: upgraded},
		{
			name: "deleted meanwhile", tells: true, by: func(n *upNode) { n.kubeletTells(deletes) },
			want: "FAILED, app FAILED TakenBackByKubelet", state: "app/0 EXITED, app/1 EXITED, web/0 EXITED",
			calls: "StopContainer app/1 30s; kubelet:StopPodSandbox",
		},
		{
			name: "kubelet does not tell", want: "FAILED, app FAILED TakenBackByKubelet",
			state: "app/0 EXITED, app/1 EXITED, web/0 EXITED",
			calls: "StopContainer app/1 30s; kubelet:StopPodSandbox",
		},
		{
			name: "the successor has ended", tells: true, by: func(n *upNode) { n.rt.Exit(n.t, "app/1", 1) },
			want: "FAILED, app FAILED TakenBackByKubelet", state: "app/0 EXITED, app/1 EXITED, web/0 EXITED",
			calls: "StopContainer app/1 30s; kubelet:StopPodSandbox",
		},
		{
			name: "the sandbox has ended", tells: true,
			by:   func(n *upNode) { n.rt.Set(func(f *fakenode.Runtime) { f.Sandboxes[n.sandbox].Ready = false }) },
			want: "FAILED, app FAILED TakenBackByKubelet", state: "app/0 EXITED, app/1 EXITED, web/0 EXITED",
			calls: "StopContainer app/1 30s; kubelet:StopPodSandbox",
		},
	} {
		t.Run(tc.name, func(t *testing.T) {
			inUpNode(t, func(t *testing.T, n *upNode) {
				if tc.tells {
					n.kubeletTells()
				}
				n.draining()
				n.must(n.kubeletStops(t.Context(), n.rt.ID(t, "app/0"), 30))
				if tc.ends {
					n.ends("op", tc.want, tc.state)
				}
				if tc.by != nil {
					tc.by(n)
				}
				n.rt.TakeCalls()
				n.must(n.kubeletStopsPod(t.Context()))
				if got := strings.Join(fakenode.Mutating(n.rt.TakeCalls()), "; "); got != tc.calls {
					t.Errorf("calls are %s\nwant %s", got, tc.calls)
				}
				n.ends("op", tc.want, tc.state)
				if tc.calls == "" { // another time it is meant
					n.must(n.kubeletStopsPod(t.Context()))
					n.settled("app/0 EXITED, app/1 EXITED, web/0 EXITED")
				}
			})
		})
	}
}

// A stop that does not join goes on as without the restart, which gives way.
func TestStopDoesNotJoin(t *testing.T) {
	const taken = "FAILED, app FAILED TakenBackByKubelet"
	for _, tc := range []struct {
		name  string
		tells func(*podsapi.Pod)
	}{
		{"deleted", func(p *podsapi.Pod) { p.Deleting = true }},
		{"evicted", func(p *podsapi.Pod) { p.Phase, p.Reason = "Failed", "Evicted" }},
		{"another image in the spec", func(p *podsapi.Pod) { p.Images["app"] = "app:v2" }},
	} {
		t.Run(tc.name, func(t *testing.T) {
			inUpNode(t, func(t *testing.T, n *upNode) {
				n.kubeletTells(tc.tells)
				n.draining()
				n.must(n.kubeletStops(t.Context(), n.rt.ID(t, "app/0"), 30))
				n.ends("op", taken, "app/0 EXITED, web/0 RUNNING")
			})
		})
	}
}

// What kubelet asks for after its stop has joined.
func TestJoinedCreation(t *testing.T) {
	for _, tc := range []struct {
		name, image string
		edit        func(*runtimeapi.ContainerConfig)
		adopted     bool
		calls       string
		says        string
	}{
		{
			name: "other resources", image: "app:v1", adopted: true,
			calls: "UpdateContainerResources app/1 cpus=0-3; kubelet:StartContainer app/1",
			edit:  func(c *runtimeapi.ContainerConfig) { c.Linux.Resources.CpuShares = 512 },
		},
		{
			name: "another environment", image: "app:v1", says: "envs.NEW",
			edit: func(c *runtimeapi.ContainerConfig) { c.Envs = append(c.Envs, &runtimeapi.KeyValue{Key: "NEW"}) },
			calls: "StopContainer app/1 30s; RemoveContainer app/1; kubelet:CreateContainer app/1; " +
				"kubelet:StartContainer app/1",
		},
		{
			name: "another image", image: "app:v2", says: "image",
			calls: "StopContainer app/1 30s; RemoveContainer app/1; kubelet:CreateContainer app/1; " +
				"kubelet:StartContainer app/1",
		},
	} {
		t.Run(tc.name, func(t *testing.T) {
			inUpNode(t, func(t *testing.T, n *upNode) {
				n.draining()
				n.must(n.kubeletStops(t.Context(), n.rt.ID(t, "app/0"), 30))
				successor := n.rt.ID(t, "app/1")
				n.rt.TakeCalls()
				var edit []func(*runtimeapi.ContainerConfig)
				if tc.edit != nil {
					edit = append(edit, tc.edit)
				}
				n.must(n.kubeletMakes(t.Context(), n.asks("app", tc.image, 1, edit...)))
				if got := strings.Join(fakenode.Mutating(n.rt.TakeCalls()), "; "); got != tc.calls {
					t.Errorf("calls are %s\nwant %s", got, tc.calls)
				}
				op := n.ends("op", succeeded, upgraded)
				if adopted := n.rt.ID(t, "app/1") == successor; adopted != tc.adopted {
					t.Errorf("adopted: %v", adopted)
				}
				if c := op.GetContainers()[0]; !strings.Contains(warnings(op), tc.says) ||
					(c.GetMethod() == opsv1.MethodKubelet) == tc.adopted {
					t.Errorf("operation: %v", op)
				}
			})
		})
	}
}

// A stop with less time than is left gets what it asks for: the container does not live longer, and
// what is done beforehand ends.
func TestShorterStopJoins(t *testing.T) {
	for name, hook := range map[string]*opsv1.Hook{
		"": nil, "in preStop": {Action: &opsv1.Hook_Sleep{Sleep: &opsv1.SleepAction{Seconds: 25}}},
	} {
		t.Run(name, func(t *testing.T) {
			inUpNode(t, func(t *testing.T, n *upNode) {
				n.rt.Set(func(f *fakenode.Runtime) {
					for _, c := range f.Containers {
						c.Stubborn = true
					}
				})
				_, err := n.api.Restart(t.Context(),
					restartRequest("op", func(r *opsv1.RestartRequest) { r.Containers[0].PreStop = hook }))
				n.must(err)
				time.Sleep(2 * time.Second)
				began := time.Now()
				n.must(n.kubeletStops(t.Context(), n.rt.ID(t, "app/0"), 5))
				if took := time.Since(began); took != 5*time.Second {
					t.Errorf("kubelet has waited %s", took)
				}
				n.must(n.kubeletMakes(t.Context(), n.asks("app", "app:v1", 1)))
				n.ends("op", succeeded, upgraded)
			})
		})
	}
}

// Kubelet stops more than one container, each of which is being restarted.
func TestStopsOfTwoContainersJoin(t *testing.T) {
	for _, ordered := range []bool{false, true} {
		t.Run(fmt.Sprintf("ordered %v", ordered), func(t *testing.T) {
			inUpNode(t, func(t *testing.T, n *upNode) {
				n.kubeletTells()
				n.draining(func(r *opsv1.RestartRequest) {
					r.Ordered = ordered
					r.Containers = append(r.Containers, &opsv1.ContainerRestart{Name: "web"})
				})
				n.must(n.probeFails(t.Context()))
				op := n.ends("op", "SUCCEEDED, app SUCCEEDED, web SUCCEEDED",
					"app/0 EXITED, app/1 RUNNING, web/0 EXITED, web/1 RUNNING")
				if got := warnings(op); got != restart.JoinedWarning || len(op.GetContainers()[1].GetWarnings()) > 0 {
					t.Errorf("operation: %v", op)
				}
			})
		})
	}
}

// Two stops of one container are both answered: kubelet gives up waiting for the first, and comes
// again.
func TestSecondStopJoins(t *testing.T) {
	inUpNode(t, func(t *testing.T, n *upNode) {
		n.draining()
		ctx, cancel := context.WithTimeout(t.Context(), 5*time.Second)
		defer cancel()
		if _, err := n.kubelet.StopContainer(ctx, &runtimeapi.StopContainerRequest{ContainerId: n.rt.ID(t, "app/0"),
			Timeout: 30}); err == nil {
			t.Error("the first stop was answered")
		}
		n.must(n.probeFails(t.Context()))
		op := n.ends("op", succeeded, upgraded)
		if got := warnings(op); got != restart.JoinedWarning {
			t.Errorf("warnings are %q", got)
		}
	})
}

// The successor does not start: kubelet is answered when the restart has ended, and goes on by its
// own policy.
func TestJoinedRestartFails(t *testing.T) {
	inUpNode(t, func(t *testing.T, n *upNode) {
		n.rt.Set(func(f *fakenode.Runtime) { failStarts(f, 2) })
		n.draining()
		n.must(n.kubeletStops(t.Context(), n.rt.ID(t, "app/0"), 30))
		n.until("op")
		n.must(n.sync(t.Context(), "app", "app:v1"))
		n.ends("op", "FAILED, app FAILED StartFailed", "app/0 EXITED, app/1 EXITED, app/2 RUNNING, web/0 RUNNING")
	})
}

// The process dies after kubelet's stop has joined: the next one takes part in what kubelet does
// from its first call on.
func TestJoinedRestartIsResumed(t *testing.T) {
	for _, at := range []string{"ExecSync app/0 bye 30s", "StopContainer app/0", "StartContainer app/1",
		"ExecSync app/1"} {
		for _, joined := range []bool{true, false} {
			t.Run(fmt.Sprintf("%s, joined before %v", at, joined), func(t *testing.T) {
				inUpNode(t, func(t *testing.T, n *upNode) {
					var state string
					crashed := make(chan struct{})
					n.rt.Set(func(f *fakenode.Runtime) {
						f.Before = func(call string) error {
							if strings.HasPrefix(call, at) && state == "" {
								if joined {
									n.inBackground(
										func(ctx context.Context) error {
											return n.kubeletStops(ctx,
												n.rt.ID(t, "app/0"), 30)
										})
									n.log.await(t, "joins the restart")
								}
								state = n.crash()
								close(crashed)
							}
							return nil
						}
					})
					_, err := n.api.Restart(t.Context(), restartRequest("op", func(r *opsv1.RestartRequest) {
						r.Containers[0].PreStop, r.Containers[0].PostStart = execHook("bye"), execHook("hello")
					}))
					n.must(err)
					<-crashed
					n.rt.Set(func(f *fakenode.Runtime) { f.Before, f.After = nil, nil })
					n.boot(state)
					answered := n.inBackground(n.probeFailsNow) // before the engine runs
					synctest.Wait()
					n.run()
					_, err = answered()
					n.must(err)
					op := n.ends("op", succeeded, upgraded)
					if got := op.GetContainers()[0].GetWarnings(); !slices.Contains(got, restart.JoinedWarning) {
						t.Errorf("warnings are %q", got)
					}
				})
			})
		}
	}
}

// The process dies between the answer to a stop that has joined and the creation that follows.
func TestJoinedCreationOfTheNextProcess(t *testing.T) {
	inUpNode(t, func(t *testing.T, n *upNode) {
		n.draining()
		n.must(n.kubeletStops(t.Context(), n.rt.ID(t, "app/0"), 30))
		n.boot(n.crash())
		answered := n.inBackground(
			func(ctx context.Context) error { return n.kubeletMakes(ctx, n.asks("app", "app:v1", 1)) })
		synctest.Wait()
		n.run()
		_, err := answered()
		n.must(err)
		n.ends("op", succeeded, upgraded)
	})
}

// A container with another image than that of the spec: kubelet asks for the one in the spec.
func TestStopJoinsWithOverride(t *testing.T) {
	inUpNode(t, func(t *testing.T, n *upNode) {
		n.draining(func(r *opsv1.RestartRequest) { r.Containers[0].Image = "app:v2" })
		successor := func() string { return n.rt.ID(t, "app/1") }
		n.must(n.kubeletStops(t.Context(), n.rt.ID(t, "app/0"), 30))
		made := successor()
		n.must(n.kubeletMakes(t.Context(), n.asks("app", "app:v1", 1)))
		n.ends("op", succeeded, upgraded)
		if successor() != made {
			t.Error("kubelet has made its own")
		}
	})
}

// Someone else than kubelet creates in the slot of a restart that no stop has joined: that waits
// for the restart, as ever.
func TestCreationWithoutStop(t *testing.T) {
	inUpNode(t, func(t *testing.T, n *upNode) {
		n.draining()
		req := n.asks("app", "app:v1", 1)
		req.Config = proto.Clone(req.Config).(*runtimeapi.ContainerConfig)
		req.Config.Metadata.Attempt = 7
		n.must(n.kubeletMakes(t.Context(), req))
		n.ends("op", succeeded, "app/0 EXITED, app/1 RUNNING, app/7 RUNNING, web/0 RUNNING")
	})
}
