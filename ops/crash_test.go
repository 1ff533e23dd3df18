// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package ops_test

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	opsv1 "github.com/cri-proxy/cri-proxy/api/ops/v1"
	"github.com/cri-proxy/cri-proxy/ops/operation"
	"github.com/cri-proxy/cri-proxy/test/fakenode"
)

func execHook(cmd ...string) *opsv1.Hook {
	return &opsv1.Hook{Action: &opsv1.Hook_Exec{Exec: &opsv1.ExecAction{Command: cmd}}}
}

// scenario is a restart that is cut off at every call it makes.
type scenario struct {
	name   string
	pod    podOptions
	edit   func(*opsv1.RestartRequest)
	script func(*fakenode.Runtime)
	want   string   // the end of the operation
	states []string // of the runtime in the end
	// lost is the end after a crash in the middle of a hook, whose result nobody knows.
	lost       string
	lostStates []string
	// limited is set for a pod of limited memory, see newRoom.
	limited bool
	// dies is set where kubelet is to see a container fail.
	dies bool
}

// failStarts makes the first starts fail, of any successor.
func failStarts(f *fakenode.Runtime, times int) {
	f.OnStart = func(c *runtimeapi.ContainerConfig) error {
		if c.GetMetadata().GetAttempt() == 0 || times == 0 {
			return nil
		}
		times--
		return errors.New("exec: no such file or directory")
	}
}

// failBeside has no container start beside another of its slot.
func failBeside(f *fakenode.Runtime) {
	f.OnStart = func(c *runtimeapi.ContainerConfig) error {
		for _, other := range f.Containers {
			if s := other.Status; s.GetState() == runtimeapi.ContainerState_CONTAINER_RUNNING && s.GetMetadata().
				GetName() == c.GetMetadata().GetName() {
				return errors.New("container init was OOM-killed (memory limit too low?)")
			}
		}
		return nil
	}
}

var scenarios = []scenario{
	{
		name: "plain",
		want: "SUCCEEDED, app SUCCEEDED", states: []string{"app/0 EXITED, app/1 RUNNING, web/0 RUNNING"},
	},
	{
		name: "hooks",
		edit: func(r *opsv1.RestartRequest) {
			r.Containers[0].PreStop, r.Containers[0].PostStart = execHook("bye"), execHook("hello")
		},
		want: "SUCCEEDED, app SUCCEEDED", states: []string{"app/0 EXITED, app/1 RUNNING, web/0 RUNNING"},
	},
	{
		name:   "second start",
		script: func(f *fakenode.Runtime) { failStarts(f, 1) },
		want:   "SUCCEEDED, app SUCCEEDED", states: []string{"app/0 EXITED, app/1 RUNNING, web/0 RUNNING"},
	},
	{
		name: "no start", dies: true,
		script: func(f *fakenode.Runtime) { failStarts(f, 100) },
		want:   "FAILED, app FAILED StartFailed", states: []string{"app/0 EXITED, app/1 EXITED, web/0 RUNNING"},
	},
	{
		name: "postStart fails", dies: true,
		edit: func(r *opsv1.RestartRequest) { r.Containers[0].PostStart = execHook("hello") },
		script: func(f *fakenode.Runtime) {
			f.OnExec = func(context.Context, *runtimeapi.ExecSyncRequest) (*runtimeapi.ExecSyncResponse, error) {
				return &runtimeapi.ExecSyncResponse{ExitCode: 3}, nil
			}
		},
		want: "FAILED, app FAILED PostStartHookFailed", states: []string{"app/0 EXITED, app/1 EXITED, web/0 RUNNING"},
		lost: "SUCCEEDED, app SUCCEEDED", lostStates: []string{"app/0 EXITED, app/1 RUNNING, web/0 RUNNING"},
	},
	{
		name: "ordered",
		edit: func(r *opsv1.RestartRequest) {
			r.Ordered = true
			r.Containers = append(r.Containers, &opsv1.ContainerRestart{Name: "web"})
		},
		want:   "SUCCEEDED, app SUCCEEDED, web SUCCEEDED",
		states: []string{"app/0 EXITED, app/1 RUNNING, web/0 EXITED, web/1 RUNNING"},
	},
	{
		name: "start first", edit: startFirst,
		want: "SUCCEEDED, app SUCCEEDED", states: []string{"app/0 EXITED, app/1 RUNNING, web/0 RUNNING"},
	},
	{
		name: "start first, hooks",
		edit: func(r *opsv1.RestartRequest) {
			startFirst(r)
			r.Containers[0].PreStop, r.Containers[0].PostStart = execHook("bye"), execHook("hello")
		},
		want: "SUCCEEDED, app SUCCEEDED", states: []string{"app/0 EXITED, app/1 RUNNING, web/0 RUNNING"},
	},
	{
		name: "start first, second start", edit: startFirst,
		script: func(f *fakenode.Runtime) { failStarts(f, 1) },
		want:   "SUCCEEDED, app SUCCEEDED", states: []string{"app/0 EXITED, app/1 RUNNING, web/0 RUNNING"},
	},
	{
		name: "start first, no start", edit: startFirst,
		script: func(f *fakenode.Runtime) { failStarts(f, 100) },
		want:   "FAILED, app FAILED StartFailed", states: []string{"app/0 RUNNING, web/0 RUNNING"},
	},
	{
		name: "start first, postStart fails",
		edit: func(r *opsv1.RestartRequest) {
			startFirst(r)
			r.Containers[0].PostStart = execHook("hello")
		},
		script: func(f *fakenode.Runtime) {
			f.OnExec = func(context.Context, *runtimeapi.ExecSyncRequest) (*runtimeapi.ExecSyncResponse, error) {
				return &runtimeapi.ExecSyncResponse{ExitCode: 3}, nil
			}
		},
		want: "FAILED, app FAILED PostStartHookFailed", states: []string{"app/0 RUNNING, web/0 RUNNING"},
		lost: "SUCCEEDED, app SUCCEEDED", lostStates: []string{"app/0 EXITED, app/1 RUNNING, web/0 RUNNING"},
	},
	{
		name: "start first, it exits", pod: podOptions{processes: true},
		edit: func(r *opsv1.RestartRequest) {
			startFirst(r)
			r.Containers[0].MinReadySeconds = 5
		},
		script: func(f *fakenode.Runtime) { f.Processes.Mortal = "app/1" },
		want:   "FAILED, app FAILED NewContainerExited", states: []string{"app/0 RUNNING, web/0 RUNNING"},
	},
	{
		name: "start first, processes", pod: podOptions{processes: true}, edit: startFirst,
		want: "SUCCEEDED, app SUCCEEDED", states: []string{"app/0 EXITED, app/1 RUNNING, web/0 RUNNING"},
	},
	{
		name: "start first, limited memory", pod: podOptions{processes: true}, limited: true, edit: startFirst,
		want: "SUCCEEDED, app SUCCEEDED", states: []string{"app/0 EXITED, app/1 RUNNING, web/0 RUNNING"},
	},
	{
		name: "start first, limited memory, no start", pod: podOptions{processes: true}, limited: true,
		edit:   startFirst,
		script: func(f *fakenode.Runtime) { failStarts(f, 100) },
		want:   "FAILED, app FAILED StartFailed", states: []string{"app/0 RUNNING, web/0 RUNNING"},
	},
	{
		name: "start first, not beside the old one", pod: podOptions{processes: true}, limited: true, edit: startFirst,
		script: failBeside,
		want:   "SUCCEEDED, app SUCCEEDED", states: []string{"app/0 EXITED, app/1 RUNNING, web/0 RUNNING"},
	},
	{
		name: "gate, not beside the old one", pod: podOptions{processes: true}, script: failBeside,
		want: "SUCCEEDED, app SUCCEEDED", states: []string{"app/0 EXITED, app/1 RUNNING, web/0 RUNNING"},
	},
	{
		name: "pidfd", pod: podOptions{processes: true, method: opsv1.MethodPidfd},
		want: "SUCCEEDED, app SUCCEEDED", states: []string{"app/0 EXITED, app/1 RUNNING, web/0 RUNNING"},
	},
	{
		name: "gate", pod: podOptions{processes: true},
		want: "SUCCEEDED, app SUCCEEDED", states: []string{"app/0 EXITED, app/1 RUNNING, web/0 RUNNING"},
	},
	{
		name: "gate, hooks", pod: podOptions{processes: true},
		edit: func(r *opsv1.RestartRequest) {
			r.Containers[0].PreStop, r.Containers[0].PostStart = execHook("bye"), execHook("hello")
		},
		want: "SUCCEEDED, app SUCCEEDED", states: []string{"app/0 EXITED, app/1 RUNNING, web/0 RUNNING"},
	},
	{
		name: "gate, second start", pod: podOptions{processes: true},
		script: func(f *fakenode.Runtime) { failStarts(f, 1) },
		want:   "SUCCEEDED, app SUCCEEDED", states: []string{"app/0 EXITED, app/1 RUNNING, web/0 RUNNING"},
	},
	{
		name: "gate, no start", pod: podOptions{processes: true},
		script: func(f *fakenode.Runtime) { failStarts(f, 100) },
		want:   "FAILED, app FAILED StartFailed", states: []string{"app/0 RUNNING, web/0 RUNNING"},
	},
	{
		name: "gate, refused", pod: podOptions{processes: true},
		script: func(f *fakenode.Runtime) { f.Processes.CDI = 0 },
		want:   "SUCCEEDED, app SUCCEEDED", states: []string{"app/0 EXITED, app/1 RUNNING, web/0 RUNNING"},
	},
	{
		name: "gate, no start and then refused", pod: podOptions{processes: true},
		script: func(f *fakenode.Runtime) {
			failStarts(f, 1)
			f.Processes.CDI = 1
		},
		want: "SUCCEEDED, app SUCCEEDED", states: []string{"app/0 EXITED, app/1 RUNNING, web/0 RUNNING"},
	},
	{
		name: "gate, its hook fails", pod: podOptions{processes: true},
		script: func(f *fakenode.Runtime) { f.Processes.DeadHook = true },
		want:   "SUCCEEDED, app SUCCEEDED", states: []string{"app/0 EXITED, app/1 RUNNING, web/0 RUNNING"},
	},
}

func startFirst(r *opsv1.RestartRequest) { r.Containers[0].Order = opsv1.Order_ORDER_START_FIRST }

// point is a moment of a scenario: before or after the effect of a call of the engine.
type point struct {
	n    int // of all calls, for people
	call string
	nth  int  // of its like
	done bool // after
}

// is compares moments of two runs: processes take their time, so that in one run there may be a
// call more before.
func (p point) is(q point) bool { return p.call == q.call && p.nth == q.nth && p.done == q.done }

func (p point) String() string {
	if p.done {
		return fmt.Sprintf("%02d after %s", p.n, p.call)
	}
	return fmt.Sprintf("%02d before %s", p.n, p.call)
}

// begin readies a node and the operation "op", and calls at before and after each call that the
// engine makes for it.
func (s scenario) begin(t *testing.T, at func(point) error) *node {
	t.Helper()
	return s.beginWith(t, at, func(*node) {})
}

// beginWith is begin, and calls ready when the node is.
func (s scenario) beginWith(t *testing.T, at func(point) error, ready func(*node)) *node {
	t.Helper()
	if s.limited {
		s.pod.room = newRoom(t)
	}
	n := newNode(t, s.pod)
	n.runTidied()
	ready(n)
	var mu sync.Mutex
	count := -1
	numbers := map[string]point{} // of the calls that are not over: some are made at once
	accepted := false
	// Processes take their time, and how often the runtime is asked for them meanwhile differs.
	skip := func(call string) bool {
		return !accepted || strings.HasPrefix(call, "kubelet:") ||
			s.pod.processes && len(fakenode.Mutating([]string{call})) == 0
	}
	n.rt.Set(func(f *fakenode.Runtime) {
		if s.script != nil {
			s.script(f)
		}
		f.Before = func(call string) error {
			mu.Lock()
			if skip(call) {
				mu.Unlock()
				return nil
			}
			count++
			p, again := numbers[call]
			if again {
				p.nth++
			}
			p.n, p.call = count, call
			numbers[call] = p
			mu.Unlock()
			return at(p)
		}
		f.After = func(call string) error {
			mu.Lock()
			if skip(call) {
				mu.Unlock()
				return nil
			}
			p := numbers[call]
			p.done = true
			mu.Unlock()
			return at(p)
		}
	})
	req := restartRequest("op")
	if s.edit != nil {
		s.edit(req)
	}
	pod, err := n.api.Precheck(t.Context(), req) // what Restart does, without its calls being counted
	n.must(err)
	mu.Lock()
	accepted = true
	mu.Unlock()
	_, err = n.engine.Submit(operation.RestartCommand(req, nil), pod)
	n.must(err)
	return n
}

// tries is how often a scenario is run until it comes to a moment. How often processes are looked
// at, and with that some moments, depends on how fast they are.
const tries = 100

// points runs the scenario undisturbed and returns the moments that differ, of those that it comes
// to each time: a call that reads leaves nothing behind.
func (s scenario) points(t *testing.T) []point {
	t.Helper()
	again := s.pointsOnce(t)
	return slices.DeleteFunc(s.pointsOnce(t), func(p point) bool { return !slices.ContainsFunc(again, p.is) })
}

func (s scenario) pointsOnce(t *testing.T) []point {
	t.Helper()
	var mu sync.Mutex
	var all []point
	n := s.begin(t, func(p point) error {
		mu.Lock()
		defer mu.Unlock()
		if !p.done || len(fakenode.Mutating([]string{p.call})) > 0 {
			all = append(all, p)
		}
		return nil
	})
	s.check(t, n)
	mu.Lock()
	defer mu.Unlock()
	return all
}

func (s scenario) check(t *testing.T, n *node) {
	t.Helper()
	op := n.finish("op")
	if got := verdict(op); got != s.want {
		t.Errorf("operation ended %s (%s), want %s", got, op.GetMessage(), s.want)
	}
	if got := n.rt.State(); !slices.Contains(s.states, got) {
		t.Errorf("runtime has %s, want %q", got, s.states)
	}
	if got, want := n.sees(), n.rt.State(); got != want {
		t.Errorf("kubelet sees %s, though there is %s", got, want)
	}
	if !plain(n.t, n.kubelet, n.view) {
		t.Error("something is still hidden or masked")
	}
	if s.pod.processes {
		s.checkProcesses(t, n)
	}
	if n.room != nil && n.room.limit() != 64 {
		t.Errorf("the pod's limit of memory is %d MiB in the end", n.room.limit())
	}
	if !s.dies {
		if err := n.checkView(); err != nil {
			t.Error(err)
		}
	}
}

// checkProcesses asserts that what runs is what the runtime says, and that no two applications of a
// slot have run at once.
func (s scenario) checkProcesses(t *testing.T, n *node) {
	t.Helper()
	var running []string
	for _, c := range strings.Split(n.rt.State(), ", ") {
		if name, is := strings.CutSuffix(c, " RUNNING"); is {
			running = append(running, name)
		}
	}
	n.awaitLiving(fakenode.Joined(running)) // applications begin when they do
	if got := n.gates(); got != "" {
		t.Errorf("gates are left: %s", got)
	}
	req := restartRequest("")
	if s.edit != nil {
		s.edit(req)
	}
	n.rt.Mu.Lock()
	defer n.rt.Mu.Unlock()
	if both := n.rt.Processes.Overlaps; len(both) > 0 &&
		req.GetContainers()[0].GetOrder() == opsv1.Order_ORDER_STOP_FIRST {
		t.Errorf("%q began beside the one before", both)
	}
}

// The process dies without warning at every moment of a restart, and another takes over.
func TestCrashes(t *testing.T) {
	for _, s := range scenarios {
		t.Run(s.name, func(t *testing.T) {
			t.Parallel()
			for _, at := range s.points(t) {
				t.Run(at.String(), func(t *testing.T) {
					t.Parallel()
					for range tries {
						if s.crash(t, at) {
							return
						}
					}
					t.Fatal("the moment did not come")
				})
			}
		})
	}
}

// comesTo waits for the crash. It is false if the operation has ended without that moment.
func (s scenario) comesTo(t *testing.T, n *node, crashed <-chan struct{}) bool {
	t.Helper()
	late := time.NewTimer(waitLong)
	defer late.Stop()
	o := n.engine.Lookup("op")
	for {
		op, changed := o.Watch()
		if op.GetFinishTime() != nil {
			select {
			case <-crashed:
				return true
			default:
				return false
			}
		}
		select {
		case <-crashed:
			return true
		case <-changed:
		case <-late.C:
			t.Fatal("the moment did not come")
		}
	}
}

// crash has the process die at that moment, if it comes to it.
func (s scenario) crash(t *testing.T, at point) bool {
	t.Helper()
	if s.lost != "" && strings.HasPrefix(at.call, "ExecSync") {
		s.want, s.states = s.lost, s.lostStates
	}
	crashed := make(chan struct{})
	var n *node
	var ready sync.WaitGroup // n is set
	ready.Add(1)
	var state string
	n = s.begin(t, func(p point) error {
		if !p.is(at) {
			return nil
		}
		ready.Wait()
		state = n.crash()
		close(crashed)
		if at.done {
			return nil
		}
		return status.Error(codes.Unavailable, "the caller is gone")
	})
	ready.Done()
	if !s.comesTo(t, n, crashed) {
		s.check(t, n)
		return false
	}
	before := n.sees()

	n.boot(state)
	n.state = state
	// Kubelet is served before the engine has done anything.
	if got := n.sees(); got != before {
		t.Errorf("kubelet sees %s after the crash, %s before it", got, before)
	}
	if !s.dies {
		if err := n.checkView(); err != nil {
			t.Errorf("before Run: %v", err)
		}
	}
	n.rt.Set(func(f *fakenode.Runtime) { f.Before, f.After = nil, nil })
	end := func() {}
	if !s.dies {
		end = n.relist()
	}
	n.run()
	n.finish("op")
	end()
	s.check(t, n)
	if w := n.finish("op").GetContainers()[0].GetWarnings(); s.lost == s.want && (len(w) != 1 ||
		!strings.Contains(w[0], "postStart")) {
		t.Errorf("warnings are %q", w)
	}
	return true
}
