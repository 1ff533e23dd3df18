// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package ops_test

import (
	"slices"
	"strings"
	"testing"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	opsv1 "github.com/cri-proxy/cri-proxy/api/ops/v1"
	"github.com/cri-proxy/cri-proxy/test/fakenode"
)

// powerOff leaves of the pod what containerd has of it after the next boot: the sandbox is not
// ready, and containers of which it knows nothing better have ended with exit code 255
// (internal/cri/server/restart.go, unknownExitCode).
func (n *node) powerOff() {
	n.rt.Set(func(f *fakenode.Runtime) {
		for _, s := range f.Sandboxes {
			s.Ready = false
		}
		for _, c := range f.Containers {
			f.End(c, 255, "Unknown")
		}
	})
}

// A restart that the power was cut off from has not succeeded, whatever the runtime has of its
// containers.
func TestPowerOff(t *testing.T) {
	for _, tc := range []struct {
		call string
		done bool
		boot string // that the record is of; empty: the version before kept none
		want string
	}{
		{call: "CreateContainer app/1", done: true, boot: "before", want: "FAILED, app FAILED NodeRestarted"},
		{call: "StopContainer app/0 30s", boot: "before", want: "FAILED, app FAILED NodeRestarted"},
		{call: "StopContainer app/0 30s", done: true, boot: "before", want: "FAILED, app FAILED NodeRestarted"},
		{call: "StopContainer app/0 30s", boot: "", want: "FAILED, app FAILED PodStopping"},
	} {
		when := "before "
		if tc.done {
			when = "after "
		}
		for _, processes := range []bool{false, true} {
			name := when + tc.call + ", boot " + tc.boot
			if processes {
				name += ", gate"
			}
			t.Run(name, func(t *testing.T) {
				t.Parallel()
				n := newNode(t, podOptions{processes: processes})
				n.runTidied()
				crashed, state := make(chan struct{}), ""
				die := func(done bool) func(string) error {
					return func(call string) error {
						if call != tc.call || done != tc.done {
							return nil
						}
						state = n.crash()
						close(crashed)
						return status.Error(codes.Unavailable, "the caller is gone")
					}
				}
				n.rt.Set(func(f *fakenode.Runtime) { f.Before, f.After = die(false), die(true) })
				n.restart("op")
				<-crashed
				n.rt.Set(func(f *fakenode.Runtime) { f.Before, f.After = nil, nil })
				n.powerOff()
				foreignRecord(t, state, "op", func(r map[string]any) {
					delete(r, "boot")
					if tc.boot != "" {
						r["boot"] = tc.boot
					}
				})
				n.boot(state)
				n.state = state
				if got := n.sees(); tc.boot != "" && strings.Contains(got, "RUNNING") {
					t.Errorf("kubelet sees %s after the boot", got)
				}
				n.run()
				op := n.finish("op")
				if got := verdict(op); got != tc.want {
					t.Errorf("ended %s: %s", got, op.GetMessage())
				}
				if one := op.GetContainers()[0]; one.GetExitCode() != 0 || one.GetGap() != nil {
					t.Errorf("it says exit code %d and gap %v", one.GetExitCode(), one.GetGap())
				}
				n.awaitFree(t)
				if got := n.sees(); got != n.rt.State() || slices.Contains(strings.Split(got, ", "), "app/1 CREATED") ||
					n.gates() != "" {
					t.Errorf("kubelet sees %s, there is %s, gates %q", got, n.rt.State(), n.gates())
				}
			})
		}
	}
}

// The gap ends when the application is executed, whatever the runtime's process is called and
// however long it takes after its hook.
func TestGapEndsWithTheEntrypoint(t *testing.T) {
	const takes = 60 * time.Millisecond
	for _, name := range []string{"runc:[2:INIT]", "crun", "youki:INIT"} {
		t.Run(name, func(t *testing.T) {
			n := newNode(t, podOptions{processes: true})
			n.rt.Processes.Rename(n.dir, name)
			n.rt.Set(func(f *fakenode.Runtime) { f.Processes.SlowExec = takes })
			n.runTidied()
			n.restart("op")
			op := n.finish("op")
			if got := verdict(op); got != "SUCCEEDED, app SUCCEEDED" {
				t.Fatalf("ended %s: %s", got, op.GetMessage())
			}
			one := op.GetContainers()[0]
			if one.GetMethod() != opsv1.MethodGate || one.GetGap().AsDuration() < takes {
				t.Errorf("gap %s by method %s, the application began %s after its gate was opened",
					one.GetGap().AsDuration(), one.GetMethod(), takes)
			}
			st, err := n.kubelet.ContainerStatus(t.Context(),
				&runtimeapi.ContainerStatusRequest{ContainerId: one.GetSuccessorId()})
			n.must(err)
			if at := one.GetStartTime().AsTime(); st.GetStatus().GetStartedAt() != at.UnixNano() {
				t.Errorf("kubelet is told of a start at %s, the operation says %s",
					time.Unix(0, st.GetStatus().GetStartedAt()), at)
			}
		})
	}
}
