// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package ops_test

import (
	"context"
	"strings"
	"testing"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/types/known/durationpb"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	opsv1 "github.com/cri-proxy/cri-proxy/api/ops/v1"
	"github.com/cri-proxy/cri-proxy/ops/criclone"
	"github.com/cri-proxy/cri-proxy/ops/podsapi"
	"github.com/cri-proxy/cri-proxy/ops/swap"
)

// probedFrom is when kubelet begins to probe a container with no initial delay that it is told of
// now. It keeps starts in whole seconds, and counts the time since then in whole seconds
// (prober/worker.go doProbe).
func (n *upNode) probedFrom(name string) time.Time {
	n.t.Helper()
	st, err := n.kubelet.ContainerStatus(n.t.Context(),
		&runtimeapi.ContainerStatusRequest{ContainerId: n.rt.ID(n.t, name)})
	n.must(err)
	at := time.Unix(st.GetStatus().GetStartedAt()/int64(time.Second), 0)
	for from := time.Now(); ; from = from.Add(100 * time.Millisecond) {
		if int32(from.Sub(at).Seconds()) >= 0 {
			return from
		}
	}
}

// wantHeld asserts that kubelet, which is told of the container now for the first time, does not
// probe it for that long, and not much longer.
func (n *upNode) wantHeld(name string, hold time.Duration) {
	n.t.Helper()
	from := n.probedFrom(name)
	if held := time.Until(from); held < hold || held > hold+swap.ProbeCut {
		n.t.Errorf("probes of %s are held for %s, want %s", name, held, hold)
	}
	time.Sleep(time.Minute)
	if again := n.probedFrom(name); time.Until(again) > 0 && again.After(from) {
		n.t.Errorf("probes of %s are held longer, to %s, than was told first, to %s", name, again, from)
	}
}

func holdFor(d time.Duration) func(*opsv1.RestartRequest) {
	return func(r *opsv1.RestartRequest) { r.Containers[0].HoldProbes = durationpb.New(d) }
}

// Kubelet does not probe the successor of a restart before its startup probe has had a turn.
func TestProbesAreHeld(t *testing.T) {
	for _, tc := range []struct {
		name  string
		edit  []func(*opsv1.RestartRequest)
		tells func(*podsapi.Pod)
		hold  time.Duration
	}{
		{name: "no startup probe", tells: func(*podsapi.Pod) {}},
		{name: "told", edit: []func(*opsv1.RestartRequest){holdFor(12 * time.Second)}, hold: 12 * time.Second},
		{name: "told that there is none", edit: []func(*opsv1.RestartRequest){holdFor(0)},
			tells: startsUp(10 * time.Second)},
		{name: "kubelet tells", tells: startsUp(7 * time.Second), hold: 9 * time.Second},
		{name: "kubelet tells of the default", tells: startsUp(0), hold: 12 * time.Second},
		{name: "start first", edit: []func(*opsv1.RestartRequest){startFirst, holdFor(12 * time.Second)},
			hold: 12 * time.Second},
		{name: "nobody tells"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			inUpNode(t, func(t *testing.T, n *upNode) {
				if tc.tells != nil {
					n.kubeletTells(tc.tells)
				}
				_, err := n.api.Restart(t.Context(), restartRequest("op", tc.edit...))
				n.must(err)
				op := n.ends("op", succeeded, upgraded)
				c := op.GetContainers()[0]
				if s := n.rt.Get(t, "app/1").Status.GetStartedAt(); c.GetStartTime().AsTime().UnixNano() != s {
					t.Errorf("the operation says that the container began at %s", c.GetStartTime().AsTime())
				}
				if c.GetGap().AsDuration() > time.Second || len(c.GetWarnings()) > 0 {
					t.Errorf("operation: %v", op)
				}
				time.Sleep(900 * time.Millisecond) // it is a moment until kubelet looks
				if tc.hold == 0 {
					if from := n.probedFrom("app/1"); time.Until(from) > 0 {
						t.Errorf("probes are held until %s", from)
					}
					return
				}
				n.wantHeld("app/1", tc.hold)
				n.rt.Exit(t, "app/1", 3)
				st, err := n.kubelet.ContainerStatus(t.Context(),
					&runtimeapi.ContainerStatusRequest{ContainerId: n.rt.ID(t, "app/1")})
				n.must(err)
				if s := st.GetStatus(); s.GetStartedAt() > s.GetFinishedAt() {
					t.Errorf("it ended before it began: %v", s)
				}
			})
		})
	}
}

func startsUp(period time.Duration) func(*podsapi.Pod) {
	return func(p *podsapi.Pod) { p.StartupPeriods = map[string]time.Duration{"app": period} }
}

// The next process holds the probes that the one before held.
func TestProbesAreHeldByTheNextProcess(t *testing.T) {
	inUpNode(t, func(t *testing.T, n *upNode) {
		_, err := n.api.Restart(t.Context(), restartRequest("op", holdFor(30*time.Second)))
		n.must(err)
		n.ends("op", succeeded, upgraded)
		n.reboot(n.crash())
		n.wantHeld("app/1", 30*time.Second)
		if at := n.engine.node.Records.Started(n.rt.ID(t, "app/1")); !at.IsZero() {
			t.Errorf("the process is said to have begun at %s", at)
		}
	})
}

// Probes of the new container of an upgrade are held, whoever makes it.
func TestProbesAreHeldInUpgrades(t *testing.T) {
	hold := first(func(c *opsv1.ContainerUpgrade) { c.HoldProbes = seconds(12) })
	t.Run("adopted", func(t *testing.T) {
		inUpNode(t, func(t *testing.T, n *upNode) {
			n.armed("op", hold)
			n.must(n.sync(t.Context(), "app", "app:v2"))
			n.ends("op", succeeded, upgraded)
			n.wantHeld("app/1", 12*time.Second)
		})
	})
	t.Run("kubelet tells", func(t *testing.T) {
		inUpNode(t, func(t *testing.T, n *upNode) {
			n.kubeletTells(startsUp(10*time.Second), func(p *podsapi.Pod) { p.Images["app"] = "app:v2" })
			n.armed("op")
			n.must(n.sync(t.Context(), "app", "app:v2"))
			n.ends("op", succeeded, upgraded)
			n.wantHeld("app/1", 12*time.Second)
		})
	})
	t.Run("kubelet makes its own", func(t *testing.T) {
		inUpNode(t, func(t *testing.T, n *upNode) {
			n.armed("op", hold)
			n.must(n.sync(t.Context(), "app", "app:v2", func(c *runtimeapi.ContainerConfig) {
				c.Envs = append(c.Envs, &runtimeapi.KeyValue{Key: "NEW"})
			}))
			op := n.ends("op", succeeded, upgraded)
			if m := op.GetContainers()[0].GetMethod(); m != opsv1.MethodKubelet {
				t.Errorf("method is %s", m)
			}
			n.wantHeld("app/1", 12*time.Second)
		})
	})
	t.Run("only the image is put ready", func(t *testing.T) {
		inUpNode(t, func(t *testing.T, n *upNode) {
			app := n.rt.ID(t, "app/0")
			req := n.engine.node.Records.Request(app)
			req.Config.Annotations[criclone.AnnotationHash] = "of another kubelet"
			n.engine.node.Records.Created(app, wire(t, req))
			n.prepared("op", hold)
			n.commit("op")
			n.until("op")
			// It ends before kubelet has seen the new spec: that one is not meant.
			n.rt.Exit(t, "app/0", 1)
			n.must(n.sync(t.Context(), "app", "app:v1"))
			if from := n.probedFrom("app/1"); time.Until(from) > 0 {
				t.Errorf("probes of the old image are held until %s", from)
			}
			n.must(n.sync(t.Context(), "app", "app:v2"))
			n.wantHeld("app/2", 12*time.Second)
			n.rt.Exit(t, "app/2", 1) // of its own: kubelet has seen it
			n.must(n.sync(t.Context(), "app", "app:v2"))
			if from := n.probedFrom("app/3"); time.Until(from) > 0 {
				t.Errorf("probes of a later container are held until %s", from)
			}
		})
	})
}

// A stop that joins, and the container that kubelet takes over then.
func TestProbesAreHeldAfterAJoinedStop(t *testing.T) {
	for name, edit := range map[string][]func(*runtimeapi.ContainerConfig){
		"adopted":   nil,
		"made anew": {func(c *runtimeapi.ContainerConfig) { c.Envs = nil }},
	} {
		t.Run(name, func(t *testing.T) {
			inUpNode(t, func(t *testing.T, n *upNode) {
				n.draining(holdFor(12 * time.Second))
				n.must(n.probeFails(t.Context(), edit...))
				n.ends("op", succeeded, upgraded)
				n.wantHeld("app/1", 12*time.Second)
			})
		})
	}
}

func TestHoldProbesIsValidated(t *testing.T) {
	inUpNode(t, func(t *testing.T, n *upNode) {
		for _, bad := range []*durationpb.Duration{seconds(-1), seconds(3601), {Nanos: -5, Seconds: 1}} {
			_, err := n.api.Restart(t.Context(),
				restartRequest("r", func(r *opsv1.RestartRequest) { r.Containers[0].HoldProbes = bad }))
			_, uerr := n.api.PrepareUpgrade(context.Background(),
				upgradeRequest("u", first(func(c *opsv1.ContainerUpgrade) { c.HoldProbes = bad })))
			for _, err := range []error{err, uerr} {
				if status.Code(err) != codes.InvalidArgument || !strings.Contains(err.Error(), "hold_probes") {
					t.Errorf("%v: got %v", bad, err)
				}
			}
		}
	})
}
