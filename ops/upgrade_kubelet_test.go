// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package ops_test

import (
	"context"
	"errors"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	opsv1 "github.com/cri-proxy/cri-proxy/api/ops/v1"
	"github.com/cri-proxy/cri-proxy/ops/criclone"
	"github.com/cri-proxy/cri-proxy/ops/podsapi"
	"github.com/cri-proxy/cri-proxy/test/fakenode"
)

// Kubelet drives an upgrade to its end.
func TestUpgradeDrivenByKubelet(t *testing.T) {
	for _, tc := range []struct {
		name  string
		edit  func(*opsv1.PrepareUpgradeRequest)
		calls string
	}{
		{
			name: "stop first", edit: first(func(*opsv1.ContainerUpgrade) {}),
			calls: "CreateContainer app/1; StopContainer app/0 30s; StartContainer app/1; kubelet:StartContainer app/1",
		},
		{
			name: "start first", edit: first(runBeside),
			calls: "CreateContainer app/1; StartContainer app/1; StopContainer app/0 30s; kubelet:StartContainer app/1",
		},
	} {
		t.Run(tc.name, func(t *testing.T) {
			inUpNode(t, func(t *testing.T, n *upNode) {
				n.armed("op", tc.edit)
				if got := n.sees(); got != untouched {
					t.Errorf("armed: kubelet sees %s", got)
				}
				n.must(n.sync(t.Context(), "app", "app:v2"))
				op := n.ends("op", succeeded, upgraded)
				if got := strings.Join(fakenode.Mutating(n.rt.TakeCalls()), "; "); got != tc.calls {
					t.Errorf("calls are %s\nwant %s", got, tc.calls)
				}
				if c := op.GetContainers()[0]; c.GetSuccessorId() != n.rt.ID(t, "app/1") || len(c.GetWarnings()) > 0 {
					t.Errorf("operation: %v", op)
				}
				n.must(n.sync(t.Context(), "app", "app:v2"))
				n.settled(upgraded)
			})
		})
	}
}

// What kubelet's creation of a container means for an upgrade, by what it asks for.
func TestUpgradeAdoption(t *testing.T) {
	const own = "SUCCEEDED, app SUCCEEDED"
	other := func(c *runtimeapi.ContainerConfig) {
		c.Envs = append(c.Envs, &runtimeapi.KeyValue{Key: "NEW", Value: []byte("1")})
	}
	for _, tc := range []struct {
		name        string
		image       string
		attempt     uint32
		edit        func(*runtimeapi.ContainerConfig)
		want, state string
		method      string
		adopted     bool
		says        string
	}{
		{name: "the same", image: "app:v2", attempt: 1, want: own, state: upgraded, method: opsv1.MethodPlain,
			adopted: true},
		{name: "another setting", image: "app:v2", attempt: 1, edit: other, want: own, state: upgraded,
			method: opsv1.MethodKubelet, says: "envs.NEW"},
		{name: "the old image", image: "app:v1", attempt: 1, want: "FAILED, app FAILED TakenBackByKubelet",
			state: upgraded, says: "was the pod's spec patched?"},
		{name: "a third image", image: "app:v3", attempt: 1, want: "FAILED, app FAILED TakenBackByKubelet",
			state: upgraded},
		{name: "the next attempt", image: "app:v2", attempt: 2, want: own,
			state: "app/0 EXITED, app/1 EXITED, app/2 RUNNING, web/0 RUNNING", method: opsv1.MethodPlain},
		{
			// It has found the new container running, with a hash that is not that of its spec, and
			// stopped it.
			name: "the next attempt, with the old image", image: "app:v1", attempt: 2,
			want:  "FAILED, app FAILED TakenBackByKubelet",
			state: "app/0 EXITED, app/1 EXITED, app/2 RUNNING, web/0 RUNNING",
		},
	} {
		t.Run(tc.name, func(t *testing.T) {
			inUpNode(t, func(t *testing.T, n *upNode) {
				n.armed("op")
				n.must(n.kubeletStops(t.Context(), n.rt.ID(t, "app/0"), 30))
				if got := n.sees(); got != upgraded {
					t.Errorf("kubelet sees %s", got)
				}
				successor := n.rt.ID(t, "app/1")
				if tc.attempt > 1 {
					n.must(n.kubeletStops(t.Context(), successor, 30))
				}
				req := n.asks("app", tc.image, tc.attempt)
				if tc.edit != nil {
					tc.edit(req.Config)
				}
				n.must(n.kubeletMakes(t.Context(), req))
				op := n.ends("op", tc.want, tc.state)
				c := op.GetContainers()[0]
				if tc.method != "" && c.GetMethod() != tc.method {
					t.Errorf("method is %s, want %s", c.GetMethod(), tc.method)
				}
				if said := strings.Join(append(c.GetWarnings(), c.GetMessage()), " "); !strings.Contains(said,
					tc.says) {
					t.Errorf("says %q, want %q", said, tc.says)
				}
				newest, err := n.newest(t.Context(), "app")
				n.must(err)
				if adopted := newest.GetId() == successor; adopted != tc.adopted {
					t.Errorf("adopted: %v", adopted)
				}
				made := n.rt.Get(t, fakenode.NameOf(newest)).Config
				if got := made.GetImage().GetUserSpecifiedImage(); got != tc.image {
					t.Errorf("runs %s", got)
				}
				n.must(n.sync(t.Context(), "app", tc.image))
				n.settled(tc.state)
			})
		})
	}
}

// The successor that kubelet does not want is asked to stop, for as long as kubelet's
// CreateContainer waits and no longer.
func TestUpgradeMismatchIsAnsweredInTime(t *testing.T) {
	inUpNode(t, func(t *testing.T, n *upNode) {
		n.slowToStop()
		n.armed("op")
		n.must(n.kubeletStops(t.Context(), n.rt.ID(t, "app/0"), 30))
		n.rt.Set(func(f *fakenode.Runtime) { f.Find(n.successor()).Stubborn = true })
		n.must(n.kubeletMakes(t.Context(), n.asks("app", "app:v1", 1)))
		n.ends("op", "FAILED, app FAILED TakenBackByKubelet", upgraded)
	})
}

// slowToStop gives the pod an hour to stop.
func (n *upNode) slowToStop() {
	n.rt.Set(func(f *fakenode.Runtime) {
		for _, c := range f.Containers {
			c.Status.Annotations[criclone.AnnotationTerminationGrace] = "3600"
		}
	})
}

// successor is the ID of the one container that an operation has made. The caller holds rt.mu.
func (n *upNode) successor() string {
	for id, c := range n.rt.Containers {
		if fakenode.NameOf(c.Status) == "app/1" {
			return id
		}
	}
	return ""
}

// Kubelet stops the container, or the pod, at each state of an upgrade: it is answered in time, and
// nothing is left.
func TestUpgradeGivesWay(t *testing.T) {
	const taken = "FAILED, app FAILED TakenBackByKubelet"
	states := []struct {
		name string
		to   func(n *upNode, edit func(*opsv1.PrepareUpgradeRequest))
	}{
		{"prepared", func(n *upNode, edit func(*opsv1.PrepareUpgradeRequest)) { n.prepared("op", edit) }},
		{"running beside", func(n *upNode, edit func(*opsv1.PrepareUpgradeRequest)) {
			n.prepared("op", edit, first(func(c *opsv1.ContainerUpgrade) { c.MinReadySeconds = 3600 }))
			n.commit("op")
			time.Sleep(time.Minute)
		}},
		{"armed", func(n *upNode, edit func(*opsv1.PrepareUpgradeRequest)) { n.armed("op", edit) }},
	}
	for _, s := range states {
		for order, edit := range map[string]func(*opsv1.PrepareUpgradeRequest){
			"stop first": first(func(*opsv1.ContainerUpgrade) {}), "start first": first(runBeside)} {
			if s.name == "running beside" && order == "stop first" {
				continue
			}
			run := func(name string, f func(t *testing.T, n *upNode)) {
				t.Run(s.name+", "+order+", "+name, func(t *testing.T) {
					inUpNode(t, func(t *testing.T, n *upNode) {
						s.to(n, edit)
						n.rt.TakeCalls()
						f(t, n)
					})
				})
			}
			run("pod stopped", func(t *testing.T, n *upNode) {
				n.must(n.kubeletStopsPod(t.Context()))
				n.ends("op", taken, "app/0 EXITED, web/0 EXITED")
			})
			run("container ends, and kubelet makes it anew", func(t *testing.T, n *upNode) {
				n.rt.Exit(t, "app/0", 3)
				n.must(n.sync(t.Context(), "app", "app:v1"))
				n.ends("op", taken, upgraded)
				if got := n.rt.Get(t, "app/1").Config.GetImage().GetUserSpecifiedImage(); got != "app:v1" {
					t.Errorf("runs %s", got)
				}
			})
			if s.name == "armed" {
				run("container ends, and kubelet has the new spec", func(t *testing.T, n *upNode) {
					n.rt.Exit(t, "app/0", 3)
					n.must(n.sync(t.Context(), "app", "app:v2"))
					n.ends("op", succeeded, upgraded)
				})
				run("pod deleted", func(t *testing.T, n *upNode) {
					n.must(n.kubeletStops(t.Context(), n.rt.ID(t, "app/0"), 40))
					n.must(n.kubeletStopsPod(t.Context()))
					n.ends("op", taken, "app/0 EXITED, app/1 EXITED, web/0 EXITED")
					if got := strings.Join(fakenode.Mutating(n.rt.TakeCalls()), "; "); !strings.Contains(got,
						"StopContainer app/1 40s; kubelet:StopPodSandbox") {
						t.Errorf("calls are %s", got)
					}
				})
				continue
			}
			run("container stopped", func(t *testing.T, n *upNode) {
				n.must(n.kubeletStops(t.Context(), n.rt.ID(t, "app/0"), 40))
				n.ends("op", taken, "app/0 EXITED, web/0 RUNNING")
				if got := strings.Join(fakenode.Mutating(n.rt.TakeCalls()), "; "); s.name == "running beside" &&
					!strings.Contains(got, "StopContainer app/1 40s") {
					t.Errorf("calls are %s", got)
				}
			})
		}
	}
}

// Kubelet's mind about the pod decides whether a stop is that of the upgrade.
func TestUpgradeAsksKubelet(t *testing.T) {
	v2 := map[string]string{"app": "app:v2", "web": "web:v1"}
	for _, tc := range []struct {
		name string
		pod  *podsapi.Pod
		err  error
		hang bool
		want string // empty: goes on
	}{
		{name: "patched", pod: &podsapi.Pod{Images: v2}},
		{name: "not patched", pod: &podsapi.Pod{Images: map[string]string{"app": "app:v1"}},
			want: "TakenBackByKubelet"},
		{name: "deleted", pod: &podsapi.Pod{Images: v2, Deleting: true}, want: "TakenBackByKubelet"},
		{name: "evicted", pod: &podsapi.Pod{Images: v2, Phase: "Failed", Reason: "Evicted"},
			want: "TakenBackByKubelet"},
		{name: "gone", err: podsapi.ErrNotFound, want: "TakenBackByKubelet"},
		{name: "does not tell", err: errors.New("no such socket")},
		{name: "hangs", hang: true},
	} {
		t.Run(tc.name, func(t *testing.T) {
			inUpNode(t, func(t *testing.T, n *upNode) {
				n.engine.node.Pods = podsFunc(func(ctx context.Context) (*podsapi.Pod, error) {
					if tc.hang {
						<-ctx.Done()
						return nil, ctx.Err()
					}
					return tc.pod, tc.err
				})
				n.armed("op")
				began := time.Now()
				n.must(n.kubeletStops(t.Context(), n.rt.ID(t, "app/0"), 30))
				if took := time.Since(began); took > 5*time.Second {
					t.Errorf("kubelet has waited %s", took)
				}
				if tc.want != "" {
					n.ends("op", "FAILED, app FAILED "+tc.want, "app/0 EXITED, web/0 RUNNING")
					return
				}
				n.must(n.sync(t.Context(), "app", "app:v2"))
				n.ends("op", succeeded, upgraded)
			})
		})
	}
}

type podsFunc func(ctx context.Context) (*podsapi.Pod, error)

func (f podsFunc) Pod(ctx context.Context, _ string) (*podsapi.Pod, error) { return f(ctx) }

// An upgrade that takes long to take back what it has prepared does not keep kubelet from stopping
// the container.
func TestKubeletStopsWhileUpgradeIsTakenBack(t *testing.T) {
	t.Run("the successor cannot be removed", func(t *testing.T) {
		inUpNode(t, func(t *testing.T, n *upNode) {
			n.armed("op", func(r *opsv1.PrepareUpgradeRequest) { r.HoldTimeout = seconds(60) })
			back := time.Now().Add(time.Hour)
			n.rt.Set(func(f *fakenode.Runtime) {
				f.Before = func(call string) error {
					if strings.HasPrefix(call, "RemoveContainer") && time.Now().Before(back) {
						return status.Error(codes.Unknown, "device or resource busy")
					}
					return nil
				}
			})
			time.Sleep(2 * time.Minute) // the hold is over
			n.rt.TakeCalls()
			began := time.Now()
			stopped := n.inBackground(
				func(ctx context.Context) error { return n.kubeletStops(ctx, n.rt.ID(t, "app/0"), 30) })
			synctest.Wait()
			calls := fakenode.Mutating(n.rt.TakeCalls())
			if len(calls) == 0 || calls[0] != "kubelet:StopContainer app/0 30s" {
				t.Errorf("calls are %q", calls)
			}
			if _, err := stopped(); err != nil && status.Code(err) != codes.DeadlineExceeded {
				t.Error(err)
			}
			if took := time.Since(began); took > 3*time.Minute {
				t.Errorf("kubelet has waited %s", took)
			}
			n.ends("op", "FAILED, app FAILED HoldTimeout", "app/0 EXITED, web/0 RUNNING")
		})
	})
	t.Run("the successor is slow to stop", func(t *testing.T) {
		inUpNode(t, func(t *testing.T, n *upNode) {
			n.slowToStop()
			n.armed("op", first(runBeside))
			n.rt.Set(func(f *fakenode.Runtime) { f.Find(n.successor()).Stubborn = true })
			aborted := n.inBackground(func(ctx context.Context) error {
				_, err := n.api.AbortUpgrade(ctx, &opsv1.AbortUpgradeRequest{Uid: "op"})
				return err
			})
			time.Sleep(time.Minute)
			began := time.Now()
			n.must(n.kubeletStops(t.Context(), n.rt.ID(t, "app/0"), 10))
			if took := time.Since(began); took != 10*time.Second {
				t.Errorf("kubelet has waited %s", took)
			}
			_, err := aborted()
			n.must(err)
			n.ends("op", "CANCELLED, app CANCELLED Cancelled", "app/0 EXITED, web/0 RUNNING")
		})
	})
}

// A stop of kubelet's with less time than the one under way gets what it asks for, as with the
// runtime alone.
func TestShorterStopDuringUpgrade(t *testing.T) {
	inUpNode(t, func(t *testing.T, n *upNode) {
		n.armed("op")
		app := n.rt.ID(t, "app/0")
		n.rt.Set(func(f *fakenode.Runtime) { f.Find(app).Stubborn = true })
		long := n.inBackground(func(ctx context.Context) error { return n.kubeletStops(ctx, app, 3600) })
		time.Sleep(time.Minute)
		longer := n.inBackground(func(ctx context.Context) error { return n.kubeletStops(ctx, app, 3600) })
		time.Sleep(time.Minute)
		began := time.Now()
		n.must(n.kubeletStops(t.Context(), app, 2))
		if took := time.Since(began); took != 2*time.Second {
			t.Errorf("kubelet has waited %s", took)
		}
		for _, answered := range []func() (time.Duration, error){long, longer} {
			if _, err := answered(); err != nil {
				t.Error(err)
			}
		}
		n.must(n.kubeletStopsPod(t.Context()))
		n.ends("op", "FAILED, app FAILED TakenBackByKubelet", "app/0 EXITED, app/1 EXITED, web/0 EXITED")
	})
}

// Kubelet is restarted in the middle: its calls are cut off, and the next one finds its way.
func TestKubeletRestartsDuringUpgrade(t *testing.T) {
	t.Run("while it stops the container", func(t *testing.T) {
		inUpNode(t, func(t *testing.T, n *upNode) {
			n.armed("op")
			app := n.rt.ID(t, "app/0")
			n.rt.Set(func(f *fakenode.Runtime) { f.Find(app).Stubborn = true })
			ctx, cut := context.WithCancel(t.Context())
			first := n.inBackground(func(context.Context) error { return n.kubeletStops(ctx, app, 30) })
			time.Sleep(time.Second)
			cut()
			if _, err := first(); err == nil {
				t.Error("the call that was cut off has been answered")
			}
			if got := n.sees(); got != untouched {
				t.Errorf("kubelet sees %s", got)
			}
			n.must(n.sync(t.Context(), "app", "app:v2"))
			n.ends("op", succeeded, upgraded)
		})
	})
	t.Run("before it creates the container", func(t *testing.T) {
		inUpNode(t, func(t *testing.T, n *upNode) {
			n.armed("op")
			n.must(n.kubeletStops(t.Context(), n.rt.ID(t, "app/0"), 30))
			n.must(n.sync(t.Context(), "app", "app:v2")) // which is content
			n.ends("op", succeeded, upgraded)
		})
	})
	t.Run("and the pod is gone when it is back", func(t *testing.T) {
		inUpNode(t, func(t *testing.T, n *upNode) {
			n.armed("op")
			n.must(n.kubeletStops(t.Context(), n.rt.ID(t, "app/0"), 30))
			// behind the proxy
			_, err := n.rt.RemovePodSandbox(t.Context(), &runtimeapi.RemovePodSandboxRequest{PodSandboxId: n.sandbox})
			n.must(err)
			n.ends("op", "FAILED, app FAILED TakenBackByKubelet", "")
		})
	})
}

// The process dies while it answers kubelet's CreateContainer with the successor. Kubelet finds
// that running, and the next process does not wait to be asked once more.
func TestUpgradeEndsAfterTheCreateWasCutOff(t *testing.T) {
	inUpNode(t, func(t *testing.T, n *upNode) {
		n.armed("op")
		ctx, dies := context.WithCancel(t.Context())
		defer dies()
		state := ""
		n.watchMoments(func(m moment) error {
			if m.done || !strings.HasPrefix(m.call, "UpdateContainerResources app/1") || state != "" {
				return nil
			}
			dies()
			state = n.crash()
			return status.Error(codes.Unavailable, "the caller is gone")
		})
		cut := n.sync(ctx, "app", "app:v2", func(c *runtimeapi.ContainerConfig) { c.Linux.Resources.CpusetCpus = "3" })
		synctest.Wait()
		if cut == nil || state == "" {
			t.Fatalf("the process has not died in the middle: %v", cut)
		}
		n.reboot(state)
		began := time.Now()
		n.must(n.sync(t.Context(), "app", "app:v2"))
		n.ends("op", succeeded, upgraded)
		if took := time.Since(began); took > time.Second {
			t.Errorf("the operation ended %s after the start of the next process", took)
		}
	})
}

// What kubelet sets on the container while the upgrade waits is set on both, and what it asks for
// in the end counts.
func TestResourcesDuringUpgrade(t *testing.T) {
	for _, edit := range []func(*opsv1.PrepareUpgradeRequest){first(func(*opsv1.ContainerUpgrade) {}),
		first(runBeside)} {
		inUpNode(t, func(t *testing.T, n *upNode) {
			n.armed("op", edit)
			_, err := n.kubelet.UpdateContainerResources(t.Context(), &runtimeapi.UpdateContainerResourcesRequest{
				ContainerId: n.rt.ID(t, "app/0"), Linux: &runtimeapi.LinuxContainerResources{CpusetCpus: "2"},
			})
			n.must(err)
			for _, name := range []string{"app/0", "app/1"} {
				if got := n.rt.Get(t, name).Status.GetResources().GetLinux().GetCpusetCpus(); got != "2" {
					t.Errorf("%s has cpus %s", name, got)
				}
			}
			n.must(n.sync(t.Context(), "app", "app:v2",
				func(c *runtimeapi.ContainerConfig) { c.Linux.Resources.CpusetCpus = "3" }))
			n.ends("op", succeeded, upgraded)
			if got := n.rt.Get(t, "app/1").Status.GetResources().GetLinux().GetCpusetCpus(); got != "3" {
				t.Errorf("the new container has cpus %s", got)
			}
		})
	}
}
