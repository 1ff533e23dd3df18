// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package ops_test

import (
	"context"
	"strings"
	"testing"
	"time"

	"google.golang.org/protobuf/proto"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	opsv1 "github.com/cri-proxy/cri-proxy/api/ops/v1"
	"github.com/cri-proxy/cri-proxy/ops/switchover"
	"github.com/cri-proxy/cri-proxy/test/fakenode"
)

// readyAfter asks for StartFirst and that the successor runs for so long.
func readyAfter(seconds int32) func(*opsv1.RestartRequest) {
	return func(r *opsv1.RestartRequest) {
		startFirst(r)
		r.Containers[0].MinReadySeconds = seconds
	}
}

// calledStop reports whether the engine has stopped the incumbent.
func calledStop(calls []string) bool {
	for _, c := range calls {
		if strings.HasPrefix(c, "StopContainer app/0") {
			return true
		}
	}
	return false
}

// The incumbent is stopped when the successor has run for the time asked for, not before.
func TestMinReady(t *testing.T) {
	newBubble(t).run(func(t *testing.T, n *bubbleNode) {
		var started, stopped time.Time
		n.rt.Set(func(f *fakenode.Runtime) {
			f.Before = func(call string) error {
				switch {
				case strings.HasPrefix(call, "StartContainer"):
					started = time.Now()
				case strings.HasPrefix(call, "StopContainer"):
					stopped = time.Now()
				}
				return nil
			}
		})
		op := n.restart("op", readyAfter(90))
		if got, want := verdict(op), "SUCCEEDED, app SUCCEEDED"; got != want {
			t.Errorf("operation ended %s (%s)", got, op.GetMessage())
		}
		if got := stopped.Sub(started); got != 90*time.Second {
			t.Errorf("stopped %s after the start", got)
		}
		c := op.GetContainers()[0]
		if c.GetMethod() != "overlap" || c.GetGap().AsDuration() > -90*time.Second {
			t.Errorf("method %s, gap %s", c.GetMethod(), c.GetGap().AsDuration())
		}
	})
}

// What happens beside the incumbent leaves it alone.
func TestIncumbentIsNotTouched(t *testing.T) {
	for _, tc := range []struct {
		name string
		edit func(*opsv1.RestartRequest)
		do   func(n *node) // while the successor is to become ready
		want string
		says string
	}{
		{
			name: "the successor ends", edit: readyAfter(3600), want: "FAILED, app FAILED NewContainerExited",
			says: "exit code 7",
			do:   func(n *node) { n.rt.Exit(n.t, "app/1", 7) },
		},
		{
			name: "cancelled", edit: readyAfter(3600), want: "CANCELLED, app CANCELLED Cancelled", says: "enough",
			do: func(n *node) {
				_, err := n.api.CancelOperation(n.t.Context(),
					&opsv1.CancelOperationRequest{Uid: "op", Reason: "enough"})
				n.must(err)
			},
		},
		{
			name: "the successor is removed", edit: readyAfter(3600), want: "FAILED, app FAILED StartFailed",
			says: "not found",
			do: func(n *node) {
				_, err := n.rt.RemoveContainer(n.t.Context(),
					&runtimeapi.RemoveContainerRequest{ContainerId: n.rt.ID(n.t, "app/1")})
				n.must(err)
			},
		},
	} {
		t.Run(tc.name, func(t *testing.T) {
			t.Parallel()
			n := newNode(t, podOptions{processes: true})
			n.runTidied()
			n.rt.TakeCalls()
			end := n.relist()
			n.restart("op", tc.edit)
			n.awaitReadying()
			if got, want := n.sees(), "app/0 RUNNING, web/0 RUNNING"; got != want {
				t.Errorf("kubelet sees %s, want %s", got, want)
			}
			tc.do(n)
			op := n.finish("op")
			end()
			if got := verdict(op); got != tc.want || !strings.Contains(op.GetMessage(), tc.says) {
				t.Errorf("operation ended %s (%s), want %s", got, op.GetMessage(), tc.want)
			}
			if calls := n.rt.TakeCalls(); calledStop(calls) {
				t.Errorf("calls are %q", calls)
			}
			n.checkOnlyLiving(t, "app/0, web/0")
		})
	}
}

// awaitReadying waits until the successor is looked at, beside the incumbent.
func (n *node) awaitReadying() {
	n.t.Helper()
	n.awaitLiving("app/0, app/1, web/0")
	n.until("op",
		func(op *opsv1.Operation) bool { return op.GetContainers()[0].GetPhase() == opsv1.Phase_PHASE_STARTING })
}

// The successor is asked for once more when the preStop hook, which may take long, is over.
func TestSuccessorEndsDuringPreStop(t *testing.T) {
	n := newNode(t, podOptions{processes: true})
	n.runTidied()
	n.rt.TakeCalls()
	n.during("ExecSync app/0", func() { n.rt.Exit(t, "app/1", 7) })
	end := n.relist()
	n.restart("op", startFirst, func(r *opsv1.RestartRequest) { r.Containers[0].PreStop = execHook("bye") })
	op := n.finish("op")
	end()
	if got, want := verdict(op), "FAILED, app FAILED NewContainerExited"; got != want {
		t.Errorf("operation ended %s (%s), want %s", got, op.GetMessage(), want)
	}
	if calls := n.rt.TakeCalls(); calledStop(calls) {
		t.Errorf("calls are %q", calls)
	}
	n.checkOnlyLiving(t, "app/0, web/0")
}

// The incumbent ends by itself while its successor runs: that takes its place at once, and kubelet
// sees no end that it would have to do something about.
func TestIncumbentEndsBesideItsSuccessor(t *testing.T) {
	t.Run("told by the kernel", func(t *testing.T) {
		n := newNode(t, podOptions{processes: true})
		n.runTidied()
		n.restart("op", readyAfter(3600))
		n.awaitReadying()
		n.rt.Exit(t, "app/0", 5)
		op := n.finish("op")
		if got, want := verdict(op), "SUCCEEDED, app SUCCEEDED"; got != want {
			t.Errorf("operation ended %s (%s), want %s", got, op.GetMessage(), want)
		}
		if got := op.GetContainers()[0].GetExitCode(); got != 5 {
			t.Errorf("exit code is %d", got)
		}
		n.checkOnlyLiving(t, "app/1, web/0")
	})
	t.Run("told by nobody", func(t *testing.T) {
		n := newNode(t, podOptions{})
		n.runTidied()
		end := n.relist()
		n.during("StartContainer app/1", func() { n.rt.Exit(t, "app/0", 5) })
		n.restart("op", startFirst)
		op := n.finish("op")
		end()
		if got, want := verdict(op), "SUCCEEDED, app SUCCEEDED"; got != want {
			t.Errorf("operation ended %s (%s), want %s", got, op.GetMessage(), want)
		}
		if got, want := n.sees(), "app/0 EXITED, app/1 RUNNING, web/0 RUNNING"; got != want {
			t.Errorf("kubelet sees %s, want %s", got, want)
		}
	})
	t.Run("before the start", func(t *testing.T) {
		n := newNode(t, podOptions{})
		n.runTidied()
		n.during("CreateContainer app/1", func() { n.rt.Exit(t, "app/0", 5) })
		n.restart("op", startFirst)
		op := n.finish("op")
		if got, want := verdict(op), "FAILED, app FAILED ContainerNotRunning"; got != want {
			t.Errorf("operation ended %s (%s), want %s", got, op.GetMessage(), want)
		}
		if got, want := n.sees(), "app/0 EXITED, web/0 RUNNING"; got != want || n.rt.State() != want {
			t.Errorf("kubelet sees %s, there is %s, want %s", got, n.rt.State(), want)
		}
	})
}

// From the moment that the incumbent has been found running, its end is the operation's to handle,
// even while the disk keeps that waiting.
func TestIncumbentEndsWhileTheJournalIsWritten(t *testing.T) {
	n := newNode(t, podOptions{processes: true})
	n.runTidied()
	watch := n.engine.node.Switchover.Watch
	j := n.engine.disk.Journal
	free := make(chan struct{})
	n.engine.node.Switchover.Watch = func(pid int, container string) (*switchover.Exit, error) {
		w, err := watch(pid, container)
		db, dbErr := j.DB()
		n.must(dbErr)
		tx, txErr := db.Begin(true) // the only one at a time
		n.must(txErr)
		go func() {
			<-free
			_ = tx.Rollback()
		}()
		n.rt.Exit(t, "app/0", 5)
		return w, err
	}
	n.restart("op", startFirst)
	late := time.Now().Add(waitLong)
	for got := ""; got != "app/0 EXITED, app/1 CREATED, web/0 RUNNING"; got = n.rt.State() {
		if time.Now().After(late) {
			t.Fatalf("the runtime has %s", got)
		}
		time.Sleep(time.Millisecond) // the operation goes on by itself
	}
	// The runtime here is as fast as the kernel, so the mask may come a moment later.
	for late = time.Now().Add(waitLong); n.sees() != "app/0 RUNNING, web/0 RUNNING"; time.Sleep(time.Millisecond) {
		if time.Now().After(late) {
			t.Errorf("kubelet sees %s", n.sees())
			break
		}
	}
	close(free)
	op := n.finish("op")
	if got, want := verdict(op), "SUCCEEDED, app SUCCEEDED"; got != want {
		t.Errorf("operation ended %s (%s), want %s", got, op.GetMessage(), want)
	}
	n.checkOnlyLiving(t, "app/1, web/0")
}

// Kubelet takes the slot back while both run: the successor is stopped within kubelet's grace and
// is gone when kubelet is answered.
func TestTakenBackDuringTheOverlap(t *testing.T) {
	for _, tc := range []struct {
		name string
		at   string // empty: while the successor is to become ready
		edit func(*opsv1.RestartRequest)
	}{
		{name: "start", at: "StartContainer app/1"},
		{name: "ready", edit: readyAfter(3600)},
		{name: "postStart", at: "ExecSync app/1",
			edit: func(r *opsv1.RestartRequest) { r.Containers[0].PostStart = execHook("hello") }},
		{name: "preStop", at: "ExecSync app/0",
			edit: func(r *opsv1.RestartRequest) { r.Containers[0].PreStop = execHook("bye") }},
		{name: "stop", at: "StopContainer app/0 30s"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			t.Parallel()
			n := newNode(t, podOptions{processes: true})
			n.engine.node.Pods = deleting
			n.runTidied()
			n.rt.TakeCalls()
			incumbent := n.rt.ID(t, "app/0")
			var answered func()
			ask := func() {
				answered = n.asKubelet(func(ctx context.Context, k runtimeapi.RuntimeServiceClient) error {
					_, err := k.StopContainer(ctx, &runtimeapi.StopContainerRequest{ContainerId: incumbent, Timeout: 7})
					if got := n.rt.Living(); got != "web/0" {
						t.Errorf("when kubelet is answered, alive are %s", got)
					}
					return err
				})
				n.log.await(t, "takes the slot back")
			}
			if tc.at != "" {
				n.during(tc.at, ask)
			}
			if tc.edit == nil {
				tc.edit = func(*opsv1.RestartRequest) {}
			}
			n.restart("op", startFirst, tc.edit)
			if tc.at == "" {
				n.awaitReadying()
				ask()
			}
			op := n.finish("op")
			answered()
			if got, want := verdict(op), "FAILED, app FAILED "+opsv1.ReasonTakenBackByKubelet; got != want {
				t.Errorf("operation ended %s (%s), want %s", got, op.GetMessage(), want)
			}
			if calls := strings.Join(n.rt.TakeCalls(), "; "); !strings.Contains(calls, "; StopContainer app/1 7s; ") {
				t.Errorf("calls are %s", calls)
			}
			n.checkOnlyLiving(t, "web/0")
		})
	}
}

// Cancelling is possible until the incumbent is about to be stopped.
func TestCancelOfStartFirst(t *testing.T) {
	for _, tc := range []struct{ at, want, living string }{
		{"StartContainer app/1", "CANCELLED, app CANCELLED Cancelled", "app/0, web/0"},
		{"ExecSync app/1", "CANCELLED, app CANCELLED Cancelled", "app/0, web/0"},
		{"ExecSync app/0", "SUCCEEDED, app SUCCEEDED", "app/1, web/0"},
		{"StopContainer app/0", "SUCCEEDED, app SUCCEEDED", "app/1, web/0"},
	} {
		t.Run(tc.at, func(t *testing.T) {
			t.Parallel()
			n := newNode(t, podOptions{processes: true})
			n.runTidied()
			n.during(tc.at, func() {
				o := n.engine.Lookup("op")
				if err := o.Cancel("enough"); (err == nil) != strings.HasPrefix(tc.want, "CANCELLED") {
					t.Errorf("cancel is answered %v", err)
				}
			})
			end := n.relist()
			n.restart("op", startFirst, func(r *opsv1.RestartRequest) {
				r.Containers[0].PreStop, r.Containers[0].PostStart = execHook("bye"), execHook("hello")
			})
			op := n.finish("op")
			end()
			if got := verdict(op); got != tc.want {
				t.Errorf("operation ended %s (%s), want %s", got, op.GetMessage(), tc.want)
			}
			n.checkOnlyLiving(t, tc.living)
		})
	}
}

// A cancel that has been answered holds for the next process too.
func TestCancelIsWritten(t *testing.T) {
	for _, tc := range []struct {
		at    string
		edit  func(*opsv1.RestartRequest)
		order string
	}{
		{at: "CreateContainer app/1"},
		{at: "CreateContainer app/1", edit: startFirst, order: "start first, "},
		{at: "StartContainer app/1", edit: startFirst, order: "start first, "},
		{at: "ContainerStatus app/1", edit: readyAfter(3600), order: "ready, "},
	} {
		t.Run(tc.order+tc.at, func(t *testing.T) {
			t.Parallel()
			n := newNode(t, podOptions{processes: true})
			n.runTidied()
			var state string
			crashed := make(chan struct{})
			d := n.daemon
			n.during(tc.at, func() {
				if err := d.engine.Lookup("op").Cancel("enough"); err != nil {
					t.Error(err)
				}
				state = n.crash()
				close(crashed)
			})
			if tc.edit == nil {
				tc.edit = func(*opsv1.RestartRequest) {}
			}
			n.restart("op", tc.edit)
			awaitClosed(t, crashed)

			n.boot(state)
			n.state = state
			n.rt.TakeCalls()
			end := n.relist()
			n.run()
			op := n.finish("op")
			end()
			if got, want := verdict(op), "CANCELLED, app CANCELLED Cancelled"; got != want ||
				op.GetMessage() != "app: enough" {
				t.Errorf("operation ended %s (%s), want %s", got, op.GetMessage(), want)
			}
			for _, c := range n.rt.TakeCalls() {
				if strings.HasPrefix(c, "Start") || strings.HasPrefix(c, "Create") ||
					strings.HasPrefix(c, "StopContainer app/0") {
					t.Errorf("called %s", c)
				}
			}
			n.checkOnlyLiving(t, "app/0, web/0")
		})
	}
}

// A journal that breaks while both run: the incumbent stays, or the swap ends well.
func TestJournalBreaksDuringTheOverlap(t *testing.T) {
	for _, tc := range []struct{ at, want, state string }{
		{"CreateContainer app/1", "FAILED, app FAILED JournalError", "app/0 RUNNING, web/0 RUNNING"},
		{"StartContainer app/1", "FAILED, app FAILED JournalError", "app/0 RUNNING, web/0 RUNNING"},
		{"ExecSync app/1", "FAILED, app FAILED JournalError", "app/0 RUNNING, web/0 RUNNING"},
		{"ExecSync app/0", "FAILED, app FAILED JournalError", "app/0 RUNNING, web/0 RUNNING"},
		{"StopContainer app/0", "SUCCEEDED, app SUCCEEDED", "app/0 EXITED, app/1 RUNNING, web/0 RUNNING"},
	} {
		t.Run(tc.at, func(t *testing.T) {
			t.Parallel()
			n := newNode(t, podOptions{})
			n.runTidied()
			n.during(tc.at, func() { n.must(n.engine.disk.Journal.Close()) })
			end := n.relist()
			n.restart("op", startFirst, func(r *opsv1.RestartRequest) {
				r.Containers[0].PreStop, r.Containers[0].PostStart = execHook("bye"), execHook("hello")
				r.Containers[0].GracePeriodSeconds = proto.Int64(5)
			})
			op := n.finish("op")
			end()
			if got := verdict(op); got != tc.want {
				t.Errorf("operation ended %s (%s), want %s", got, op.GetMessage(), tc.want)
			}
			if got := n.rt.State(); got != tc.state || n.sees() != tc.state {
				t.Errorf("runtime has %s, kubelet sees %s, want %s", got, n.sees(), tc.state)
			}
		})
	}
}
