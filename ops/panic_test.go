// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package ops_test

import (
	"slices"
	"strings"
	"sync/atomic"
	"testing"
	"testing/synctest"

	opsv1 "github.com/cri-proxy/cri-proxy/api/ops/v1"
	"github.com/cri-proxy/cri-proxy/interceptors/view"
	"github.com/cri-proxy/cri-proxy/test/fakenode"
)

// panicAt makes the engine panic when it calls the method: the first times.
func (l *leash) panicAt(method string, times int64) {
	var left atomic.Int64
	left.Store(times)
	bug := func(called string) {
		if called == method && left.Add(-1) >= 0 {
			panic("a bug at " + method)
		}
	}
	l.bug.Store(&bug)
}

const (
	once   = 1
	always = 1 << 30
)

// A bug in an operation is that operation's end, and nobody else's.
func TestPanicEndsTheOperationOnly(t *testing.T) {
	for _, tc := range []struct {
		name, scenario, method string
		times                  int64
		want, state            string
	}{
		{"the creation", "gate", "CreateContainer", always, "FAILED, app FAILED InternalError",
			"app/0 RUNNING, web/0 RUNNING"},
		{"the start behind the gate", "gate", "StartContainer", always, "FAILED, app FAILED InternalError",
			"app/0 RUNNING, web/0 RUNNING"},
		{"the stop", "gate", "StopContainer", once, "FAILED, app FAILED InternalError", "app/0 RUNNING, web/0 RUNNING"},
		// What ends the operation takes a successor for the one that serves, since the old one has
		// been stopped.
		{"the start in the gap", "plain", "StartContainer", always, "FAILED, app FAILED InternalError",
			"app/0 EXITED, web/0 RUNNING"},
		// The stop panics, and undoing that does as well, until what is left is taken away as if
		// nobody knew it.
		{"the stop, and the undoing", "gate", "StopContainer", 2, "FAILED, app FAILED InternalError",
			"app/0 RUNNING, web/0 RUNNING"},
		{"the overlap", "start first, processes", "StopContainer", once, "FAILED, app FAILED InternalError",
			"app/0 RUNNING, web/0 RUNNING"},
		// What has taken over stays, whatever comes after that.
		{"the postStart hook", "postStart fails", "ExecSync", once, "FAILED, app FAILED InternalError",
			"app/0 EXITED, app/1 RUNNING, web/0 RUNNING"},
		{"a hook", "hooks", "ExecSync", always, "FAILED, app FAILED InternalError", "app/0 RUNNING, web/0 RUNNING"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			t.Parallel()
			n := scenarioNamed(t, tc.scenario).beginWith(t, func(point) error { return nil },
				func(n *node) { n.leash.panicAt(tc.method, tc.times) })
			op := n.finish("op")
			if got := verdict(op); got != tc.want || !strings.Contains(op.GetMessage(), "a bug at "+tc.method) {
				t.Errorf("ended %s: %s", got, op.GetMessage())
			}
			n.leash.bug.Store(nil)
			n.awaitFree(t)
			if got := n.rt.State(); got != tc.state || n.sees() != got || n.gates() != "" {
				t.Errorf("kubelet sees %s, there is %s, gates %q", n.sees(), got, n.gates())
			}
			if !n.log.has("the daemon would have panicked") {
				t.Error("nothing in the log")
			}
			n.restart("next", func(r *opsv1.RestartRequest) { r.Containers[0].Name = "web" })
			if got := verdict(n.finish("next")); got != "SUCCEEDED, web SUCCEEDED" {
				t.Errorf("the next operation ended %s", got)
			}
		})
	}
}

// scenarioNamed is one of those that are cut off by crashes.
func scenarioNamed(t *testing.T, name string) scenario {
	t.Helper()
	for _, s := range scenarios {
		if s.name == name {
			return s
		}
	}
	t.Fatalf("no scenario %q", name)
	return scenario{}
}

// awaitFree waits until nobody holds app's slot.
func (n *node) awaitFree(t *testing.T) {
	t.Helper()
	claim, err := n.view.Claim(t.Context(), view.Slot{PodUID: podUID, Container: "app"})
	n.must(err)
	claim.Release()
}

// A journal whose operation makes each process panic is no crash loop.
func TestPanicOfAResumedOperation(t *testing.T) {
	n := newNode(t, podOptions{processes: true})
	n.runTidied()
	state := n.crashBeforeStop()
	n.rt.Set(func(f *fakenode.Runtime) { f.Before = nil })
	n.boot(state)
	n.state = state
	n.leash.panicAt("StopContainer", always)
	n.run()
	if got := verdict(n.finish("op")); got != "FAILED, app FAILED InternalError" {
		t.Errorf("ended %s", got)
	}
	n.awaitFree(t)
	// Not even taking it away works: then it stays hidden.
	if got := n.sees(); got != "app/0 RUNNING, web/0 RUNNING" {
		t.Errorf("kubelet sees %s", got)
	}
	// The next process finds the operation ended, and what it has left.
	state = n.crash()
	n.boot(state)
	n.state = state
	if got := n.sees(); got != "app/0 RUNNING, web/0 RUNNING" {
		t.Errorf("kubelet sees %s", got)
	}
	n.run()
	if got := verdict(n.finish("op")); got != "FAILED, app FAILED InternalError" {
		t.Errorf("the next process says that it ended %s", got)
	}
	n.log.await(t, "removed a staged container that no operation knows")
	n.awaitFree(t)
	if got := n.sees(); got != "app/0 RUNNING, web/0 RUNNING" || n.rt.State() != got || n.gates() != "" {
		t.Errorf("kubelet sees %s, there is %s, gates %q", got, n.rt.State(), n.gates())
	}
}

// kubelet's stop and creation do not wait for an upgrade that has panicked.
func TestPanicOfAnUpgrade(t *testing.T) {
	for _, method := range []string{"CreateContainer", "StopContainer"} {
		t.Run(method, func(t *testing.T) {
			inUpNode(t, func(t *testing.T, n *upNode) {
				n.leash.panicAt(method, always)
				s := upgradeScenario{}
				err := s.roll(t.Context(), n)
				if method == "StopContainer" && err != nil {
					t.Error(err) // kubelet makes the container
				}
				op := n.until("op")
				if got := verdict(op); got != "FAILED, app FAILED InternalError" {
					t.Errorf("ended %s: %s", got, op.GetMessage())
				}
				synctest.Wait()
				if got := n.sees(); strings.Count(got, "RUNNING") != 2 || strings.Contains(got, "CREATED") {
					t.Errorf("kubelet sees %s", got)
				}
			})
		})
	}
}

// bugAfterStop has the engine panic at the stop of a successor, and the methods once that has been
// asked for: undoing the restart panics as well.
func (l *leash) bugAfterStop(methods ...string) {
	var stops atomic.Int64
	bug := func(called string) {
		if called == "StopContainer" && stops.Add(1) <= 2 || stops.Load() > 0 && slices.Contains(methods, called) {
			panic("a bug at " + called)
		}
	}
	l.bug.Store(&bug)
}

// Where not even what is left can be looked for, the end of the old container is kubelet's to see
// all the same.
func TestPanicOfAnAbandonedOperation(t *testing.T) {
	t.Parallel()
	n := newNode(t, podOptions{processes: true})
	n.runTidied()
	n.leash.bugAfterStop("ListContainers")
	n.restart("op", startFirst)
	if got := verdict(n.finish("op")); got != "FAILED, app FAILED InternalError" {
		t.Errorf("ended %s", got)
	}
	n.leash.bug.Store(nil)
	n.awaitFree(t)
	n.rt.Exit(t, "app/0", 3)
	if got := n.sees(); got != "app/0 EXITED, web/0 RUNNING" {
		t.Errorf("kubelet sees %s", got)
	}
}

// The pod's limit of memory is taken back whatever ends the operation.
func TestPanicLowersTheLimit(t *testing.T) {
	t.Parallel()
	n, room := limited(t, podOptions{}, 48)
	n.leash.bugAfterStop()
	n.restart("op", startFirst)
	if got := verdict(n.finish("op")); got != "FAILED, app FAILED InternalError" {
		t.Errorf("ended %s", got)
	}
	if got := room.limit(); got != 64 {
		t.Errorf("the limit is %d MiB in the end", got)
	}
}
