// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package ops_test

import (
	"context"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	opsv1 "github.com/cri-proxy/cri-proxy/api/ops/v1"
	"github.com/cri-proxy/cri-proxy/test/fakenode"
)

// restarts asks for a restart of app, and of others.
func (n *upNode) restarts(uid string, others ...string) {
	n.t.Helper()
	r := &opsv1.RestartRequest{Uid: uid, Pod: podRef()}
	for _, name := range append([]string{"app"}, others...) {
		r.Containers = append(r.Containers, &opsv1.ContainerRestart{Name: name})
	}
	_, err := n.api.Restart(n.t.Context(), r)
	n.must(err)
}

const gaveWay = "CANCELLED, app CANCELLED Cancelled"

// A restart goes before an upgrade that is prepared and that nobody has committed.
func TestRestartGoesFirst(t *testing.T) {
	t.Run("prepared", func(t *testing.T) {
		inUpNode(t, func(t *testing.T, n *upNode) {
			n.prepared("up", func(r *opsv1.PrepareUpgradeRequest) { r.HoldTimeout = seconds(3600) })
			begun := time.Now()
			n.restarts("person")
			op := n.ends("up", gaveWay, upgraded)
			if !strings.Contains(op.GetMessage(), "gave way to restart person") {
				t.Errorf("message %q", op.GetMessage())
			}
			n.ends("person", succeeded, upgraded)
			if took := time.Since(begun); took > time.Minute {
				t.Errorf("the restart took %s", took)
			}
			// And made again.
			n.prepared("again")
			n.commit("again")
			n.until("again", opsv1.Phase_PHASE_ARMED)
		})
	})
	t.Run("being staged", func(t *testing.T) {
		inUpNode(t, func(t *testing.T, n *upNode) {
			create, created := make(chan struct{}), false
			n.rt.Set(func(f *fakenode.Runtime) {
				f.Before = func(call string) error {
					if strings.HasPrefix(call, "CreateContainer app/1") && !created {
						created = true
						<-create
					}
					return nil
				}
			})
			n.begin("up")
			synctest.Wait()
			n.restarts("person")
			synctest.Wait()
			close(create)
			n.ends("up", gaveWay, upgraded)
			n.ends("person", succeeded, upgraded)
		})
	})
	t.Run("both containers", func(t *testing.T) {
		inUpNode(t, func(t *testing.T, n *upNode) {
			n.prepared("up", webToo)
			n.restarts("person")
			n.ends("up", "CANCELLED, app CANCELLED Cancelled, web CANCELLED Cancelled", upgraded)
			n.ends("person", succeeded, upgraded)
		})
	})
	t.Run("the other container", func(t *testing.T) {
		inUpNode(t, func(t *testing.T, n *upNode) {
			n.prepared("up", first(func(c *opsv1.ContainerUpgrade) { c.Name, c.Image = "web", "web:v2" }))
			n.restarts("person")
			n.until("person", opsv1.Phase_PHASE_SUCCEEDED)
			if op := n.engine.Lookup("up").Snapshot(); op.GetPhase() != opsv1.Phase_PHASE_PREPARED {
				t.Errorf("the upgrade is %s", op.GetPhase())
			}
		})
	})
	t.Run("committed", func(t *testing.T) {
		inUpNode(t, func(t *testing.T, n *upNode) {
			n.armed("up")
			n.restarts("person")
			synctest.Wait()
			if op := n.engine.Lookup("person").Snapshot(); op.GetPhase() != opsv1.Phase_PHASE_PENDING {
				t.Errorf("the restart is %s", op.GetPhase())
			}
			n.patched = true
			n.must(n.sync(context.WithoutCancel(t.Context()), "app", "app:v2"))
			n.until("up", opsv1.Phase_PHASE_SUCCEEDED)
			n.ends("person", succeeded, "app/0 EXITED, app/1 EXITED, app/2 RUNNING, web/0 RUNNING")
		})
	})
	t.Run("pulled meanwhile", func(t *testing.T) {
		// It does not get between two restarts.
		inUpNode(t, func(t *testing.T, n *upNode) {
			pull, stop := make(chan struct{}), make(chan struct{})
			n.images.ensure = func(ctx context.Context, _ *opsv1.PullRequest) (*opsv1.PullOperation, error) {
				<-pull
				return &opsv1.PullOperation{Phase: opsv1.PullPhase_PULL_SUCCEEDED}, ctx.Err()
			}
			held := false
			n.rt.Set(func(f *fakenode.Runtime) {
				f.Before = func(call string) error {
					if strings.HasPrefix(call, "StopContainer app/0") && !held {
						held = true
						<-stop
					}
					return nil
				}
			})
			n.restarts("one")
			synctest.Wait()
			n.begin("up") // before the second restart
			close(pull)
			synctest.Wait()
			n.restarts("two")
			synctest.Wait()
			begun := time.Now()
			close(stop)
			n.until("one", opsv1.Phase_PHASE_SUCCEEDED)
			n.until("two", opsv1.Phase_PHASE_SUCCEEDED)
			if took := time.Since(begun); took > time.Minute {
				t.Errorf("the second restart took %s", took)
			}
			op := n.until("up", opsv1.Phase_PHASE_PREPARED, opsv1.Phase_PHASE_CANCELLED)
			if got := n.rt.State(); !strings.Contains(got, "app/2 RUNNING") {
				t.Errorf("runtime has %s, the upgrade is %s", got, verdict(op))
			}
		})
	})
}

// The process that comes after one that had accepted the restart does the same, whatever it had
// come to.
func TestRestartGoesFirstAfterACrash(t *testing.T) {
	inUpNode(t, func(t *testing.T, n *upNode) {
		n.prepared("up", func(r *opsv1.PrepareUpgradeRequest) { r.HoldTimeout = seconds(3600) })
		undo := make(chan struct{})
		n.rt.Set(func(f *fakenode.Runtime) {
			f.Before = func(call string) error {
				if strings.HasPrefix(call, "RemoveContainer app/1") {
					<-undo
				}
				return nil
			}
		})
		n.restarts("person")
		synctest.Wait()
		state := n.crash()
		close(undo)
		n.reboot(state)
		n.ends("up", gaveWay, upgraded)
		n.ends("person", succeeded, upgraded)
	})
}
