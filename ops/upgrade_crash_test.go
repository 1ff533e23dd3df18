// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package ops_test

import (
	"context"
	"fmt"
	"slices"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	opsv1 "github.com/cri-proxy/cri-proxy/api/ops/v1"
	"github.com/cri-proxy/cri-proxy/ops/crinode"
	"github.com/cri-proxy/cri-proxy/test/fakenode"
)

// upgradeScenario is an upgrade whose process dies at every call that it makes.
type upgradeScenario struct {
	name  string
	edit  []func(*opsv1.PrepareUpgradeRequest)
	asks  func(*runtimeapi.ContainerConfig) // what kubelet wants otherwise than the node knows
	ends  bool                              // the incumbent ends by itself when the upgrade is armed
	want  string
	state string
	other string // another state that it may come to
}

var upgradeScenarios = []upgradeScenario{
	{name: "stop first", want: succeeded, state: upgraded},
	{name: "start first", edit: []func(*opsv1.PrepareUpgradeRequest){first(runBeside)}, want: succeeded,
		state: upgraded},
	{
		name: "start first, ready after a while", want: succeeded, state: upgraded,
		edit: []func(*opsv1.PrepareUpgradeRequest){
			first(func(c *opsv1.ContainerUpgrade) { runBeside(c); c.MinReadySeconds = 1 })},
	},
	{
		// the successor has been stopped, and kubelet has seen that
		other: "app/0 EXITED, app/1 EXITED, app/2 RUNNING, web/0 RUNNING",
		name:  "another setting", want: succeeded, state: upgraded,
		asks: func(c *runtimeapi.ContainerConfig) {
			c.Envs = append(c.Envs, &runtimeapi.KeyValue{Key: "NEW", Value: []byte("1")})
		},
	},
	{name: "the old one ends by itself", ends: true, want: succeeded, state: upgraded},
	{
		name: "two", edit: []func(*opsv1.PrepareUpgradeRequest){webToo},
		want:  "SUCCEEDED, app SUCCEEDED, web SUCCEEDED",
		state: "app/0 EXITED, app/1 RUNNING, web/0 EXITED, web/1 RUNNING",
	},
}

// moment is before or after the effect of a call of the engine: its kth of that form.
type moment struct {
	call string
	k    int
	done bool
}

func (m moment) String() string {
	when := "before"
	if m.done {
		when = "after"
	}
	return fmt.Sprintf("%s %s %d", when, m.call, m.k)
}

// TestUpgradeCrashes has the process die without warning at every moment of an upgrade. Its caller
// and kubelet go on with the next one.
func TestUpgradeCrashes(t *testing.T) {
	for _, s := range upgradeScenarios {
		t.Run(s.name, func(t *testing.T) {
			all, again := s.moments(t), s.moments(t)
			for _, m := range all {
				if m.done && len(fakenode.Mutating([]string{m.call})) == 0 {
					continue // what reads leaves nothing behind
				}
				if !slices.Contains(again, m) {
					continue // of what happens at the same instant the order differs, and with it what is asked for
				}
				t.Run(m.String(), func(t *testing.T) {
					crashed := false
					for range tries {
						inUpNode(t, func(t *testing.T, n *upNode) { crashed = s.crashAt(t, n, m) })
						if crashed {
							return
						}
					}
					t.Fatal("the moment did not come")
				})
			}
		})
	}
}

// moments runs the upgrade undisturbed and returns what it comes to.
func (s upgradeScenario) moments(t *testing.T) (all []moment) {
	t.Helper()
	t.Run("undisturbed", func(t *testing.T) {
		inUpNode(t, func(t *testing.T, n *upNode) {
			var mu sync.Mutex
			n.watchMoments(func(m moment) error {
				mu.Lock()
				defer mu.Unlock()
				all = append(all, m)
				return nil
			})
			if err := s.roll(t.Context(), n); err != nil {
				t.Error(err)
			}
			n.ends("op", s.want, s.state)
		})
	})
	return all
}

// watchMoments calls at before and after each call of the engine.
func (n *upNode) watchMoments(at func(moment) error) {
	var mu sync.Mutex
	counts := map[moment]int{}
	tell := func(m moment) error {
		mu.Lock()
		m.k = counts[m]
		counts[moment{call: m.call, done: m.done}]++
		mu.Unlock()
		return at(m)
	}
	n.rt.Set(func(f *fakenode.Runtime) {
		f.Before = func(call string) error { return tell(moment{call: call}) }
		f.After = func(call string) error { return tell(moment{call: call, done: true}) }
	})
}

// crashAt has the process die at that moment, if it comes to it.
func (s upgradeScenario) crashAt(t *testing.T, n *upNode, m moment) bool {
	t.Helper()
	ctx, dies := context.WithCancel(t.Context())
	defer dies()
	crashed, state, before := false, "", ""
	n.watchMoments(func(now moment) error {
		if now != m || crashed {
			return nil
		}
		crashed, before = true, n.sees()
		state = n.crash()
		dies() // whoever has called it is told so, not the other way round
		if now.done {
			return nil
		}
		return status.Error(codes.Unavailable, "the caller is gone")
	})
	err := s.roll(ctx, n)
	synctest.Wait()
	if !crashed {
		if err != nil {
			t.Error(err)
		}
		n.ends("op", s.want, s.state)
		return false
	}
	if err == nil && ctx.Err() == nil {
		t.Error("the process that died has done it all")
	}
	n.boot(state)
	// Kubelet is served before the engine has done anything.
	if got := n.sees(); got != before && !s.revealedMeanwhile(m, before, got) {
		t.Errorf("kubelet sees %s after the crash, %s before it", got, before)
	}
	n.rt.Set(func(f *fakenode.Runtime) {
		f.Before = func(string) error { return n.checkSeen(s) }
		f.After = func(string) error { return n.checkSeen(s) }
	})
	n.run()
	if err := s.roll(t.Context(), n); err != nil {
		t.Error(err)
	}
	state = s.state
	if n.until("op"); n.rt.State() == s.other {
		state = s.other
	}
	n.ends("op", s.want, state)
	if got := n.rt.Get(t, "app/1").Config.GetImage().GetUserSpecifiedImage(); got != "app:v2" {
		t.Errorf("runs %s", got)
	}
	return true
}

// revealedMeanwhile reports whether what kubelet sees differs only by the reveal of another
// container than the one that the call of the moment is about: the two go on at once, and the
// other's reveal may be in the journal by the time that the process dies, which is the promise that
// kubelet gets to see it.
func (s upgradeScenario) revealedMeanwhile(m moment, before, after string) bool {
	of := func(state, container string) string {
		var own []string
		for _, c := range strings.Split(state, ", ") {
			if strings.HasPrefix(c, container+"/") {
				own = append(own, c)
			}
		}
		return strings.Join(own, ", ")
	}
	for _, container := range []string{"app", "web"} {
		was, is := of(before, container), of(after, container)
		mine := strings.Contains(m.call, " "+container+"/")
		if is != was && (mine || is != of(s.state, container)) {
			return false
		}
	}
	return true
}

// checkSeen asserts that kubelet sees one container of each slot running, and none that has not
// been started.
func (n *upNode) checkSeen(s upgradeScenario) error {
	if s.ends || s.asks != nil {
		return nil // then there are moments without
	}
	list, err := n.kubelet.ListContainers(context.Background(), &runtimeapi.ListContainersRequest{})
	if err != nil {
		n.t.Error(err)
	}
	running := map[string]int{}
	for _, c := range list.GetContainers() {
		switch c.GetState() {
		case runtimeapi.ContainerState_CONTAINER_RUNNING:
			running[c.GetMetadata().GetName()]++
		case runtimeapi.ContainerState_CONTAINER_CREATED:
			if c.GetAnnotations()["cri-proxy.io/staged"] != "" {
				n.t.Errorf("kubelet sees %s created", fakenode.NameOf(c))
			}
		}
	}
	if running["app"] != 1 || running["web"] != 1 {
		n.t.Errorf("kubelet sees %v running", running)
	}
	return nil
}

// roll is what the caller and kubelet do until the upgrade is through: both begin again after an
// error, from what they then find.
func (s upgradeScenario) roll(ctx context.Context, n *upNode) error {
	req := upgradeRequest("op", s.edit...)
	patched := n.patched
	for range 60 {
		if err := ctx.Err(); err != nil {
			return err
		}
		if !patched {
			err := unlessGone(ctx, func() (err error) {
				patched, err = s.control(ctx, n, req)
				return err
			})
			if err != nil {
				return err
			}
		}
		n.patched = patched
		if s.ends && patched {
			if c, err := n.newest(ctx, "app"); err == nil && c.GetMetadata().GetAttempt() == 0 {
				n.rt.Exit(n.t, "app/0", 3)
			}
		}
		through := patched
		for _, c := range req.GetContainers() {
			image := c.GetName() + ":v1"
			if patched {
				image = c.GetImage()
			}
			var edit []func(*runtimeapi.ContainerConfig)
			if s.asks != nil && patched {
				edit = append(edit, s.asks)
			}
			err := unlessGone(ctx, func() error { return n.sync(ctx, c.GetName(), image, edit...) })
			through = err == nil && through
		}
		if through {
			return nil
		}
		_ = crinode.Sleep(ctx, time.Second)
	}
	return fmt.Errorf("still %s", n.rt.State())
}

// unlessGone waits for f, unless ctx ends: a process that is gone does not answer.
func unlessGone(ctx context.Context, f func() error) error {
	done := make(chan error, 1)
	go func() { done <- f() }()
	select {
	case err := <-done:
		return err
	case <-ctx.Done():
		return ctx.Err()
	}
}

// control is the caller's part, once: it reports whether the pod's spec may be patched.
func (s upgradeScenario) control(ctx context.Context, n *upNode, req *opsv1.PrepareUpgradeRequest) (bool, error) {
	op, err := n.api.PrepareUpgrade(ctx, clone(req))
	if err != nil {
		return false, ctx.Err() // again
	}
	armed := []opsv1.Phase{opsv1.Phase_PHASE_ARMED, opsv1.Phase_PHASE_STOPPING, opsv1.Phase_PHASE_STARTING,
		opsv1.Phase_PHASE_REVEALING, opsv1.Phase_PHASE_ADOPTING, opsv1.Phase_PHASE_SUCCEEDED}
	switch {
	case slices.Contains(armed, op.GetPhase()):
		return true, nil
	case op.GetFinishTime() != nil:
		return false, fmt.Errorf("operation ended %s: %s", verdict(op), op.GetMessage())
	case op.GetPhase() == opsv1.Phase_PHASE_PREPARED:
		if _, err := n.api.CommitUpgrade(ctx, n.engine.commitRequest(req.GetUid())); err != nil &&
			!strings.Contains(err.Error(), "not prepared yet") {
			return false, err
		}
	}
	return false, nil
}
