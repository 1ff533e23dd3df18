// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package ops_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	opsv1 "github.com/cri-proxy/cri-proxy/api/ops/v1"
	"github.com/cri-proxy/cri-proxy/interceptors/view"
	"github.com/cri-proxy/cri-proxy/test/fakenode"
)

// losses are the ways in which a journal goes, by name.
var losses = []struct {
	name string
	lose func(state string) error
}{
	{"deleted", func(state string) error { return os.Remove(filepath.Join(state, "journal.db")) }},
	{"truncated", func(state string) error { return os.Truncate(filepath.Join(state, "journal.db"), 1000) }},
	{"emptied", func(state string) error { return os.Truncate(filepath.Join(state, "journal.db"), 0) }},
	{"garbage", func(state string) error {
		return os.WriteFile(filepath.Join(state, "journal.db"), bytes.Repeat([]byte("garbage "), 2500), 0o600)
	}},
	{"deleted with the records", func(state string) error {
		return errors.Join(os.Remove(filepath.Join(state, "journal.db")), os.Remove(filepath.Join(state, "records.db")))
	}},
}

// slotSeen asserts what kubelet may see of app: one container that runs at the most, the newest if
// there is one, and none that has been staged and not started.
func slotSeen(list []*runtimeapi.Container) error {
	slices.SortFunc(list, func(a, b *runtimeapi.Container) int { return int(b.GetCreatedAt() - a.GetCreatedAt()) })
	running, newest := 0, true
	for _, c := range list {
		if c.GetMetadata().GetName() != "app" {
			continue
		}
		switch c.GetState() {
		case runtimeapi.ContainerState_CONTAINER_RUNNING:
			if running++; running > 1 || !newest {
				return fmt.Errorf("kubelet sees %v", list)
			}
		case runtimeapi.ContainerState_CONTAINER_CREATED:
			if c.GetAnnotations()[view.StagedAnnotation] != "" {
				return fmt.Errorf("kubelet sees %s created", fakenode.NameOf(c))
			}
		}
		newest = false
	}
	return nil
}

// The process dies at every moment of a restart, and with it the journal. What is left must be what
// kubelet can go by.
func TestCrashesThatLoseTheJournal(t *testing.T) {
	for _, s := range scenarios {
		if !slices.Contains([]string{"plain", "gate", "pidfd", "gate, hooks", "start first", "start first, processes",
			"start first, it exits"}, s.name) {
			continue
		}
		t.Run(s.name, func(t *testing.T) {
			t.Parallel()
			for i, at := range s.points(t) {
				loss := losses[i%len(losses)]
				t.Run(at.String()+", "+loss.name, func(t *testing.T) {
					t.Parallel()
					for range tries {
						if s.crashAndLose(t, at, loss.lose) {
							return
						}
					}
					t.Fatal("the moment did not come")
				})
			}
		})
	}
}

func (s scenario) crashAndLose(t *testing.T, at point, lose func(state string) error) bool {
	t.Helper()
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
	n.rt.Set(func(f *fakenode.Runtime) { f.Before, f.After = nil, nil })
	served := n.serving() // as the runtime has it
	n.must(lose(state))
	n.boot(state)
	n.state = state
	looks := func(when string) {
		list, err := n.list(t.Context())
		if err == nil {
			err = slotSeen(list)
		}
		if err != nil {
			t.Errorf("%s: %v", when, err)
		}
	}
	looks("before Run")
	n.run()
	for late := time.Now().Add(waitLong); ; time.Sleep(time.Millisecond) { // asks the runtime and the kernel
		looks("while what is left is taken away")
		if why := n.leftovers(); why == "" {
			break
		} else if time.Now().After(late) {
			t.Fatalf("%s: the runtime has %s", why, n.rt.State())
		}
	}
	if got, want := n.sees(), n.rt.State(); got != want || !plain(t, n.kubelet, n.view) {
		t.Errorf("kubelet sees %s, though there is %s", got, want)
	}
	if now := n.serving(); served != "" && now != served {
		t.Errorf("%s served after the crash, now %q does", served, now)
	}
	if n.serving() == "" {
		n.makeNext(t) // as kubelet's policy asks for
	}
	if s.pod.processes {
		n.awaitLiving(n.serving() + ", web/0")
	}
	// The slot is as usable as before.
	if n.engine.node.Records.Request(n.rt.ID(t, n.serving())) == nil {
		return true // its environment has a value that the runtime's own record does not keep
	}
	n.restart("again")
	if got, want := verdict(n.finish("again")), "SUCCEEDED, app SUCCEEDED"; got != want {
		t.Errorf("the next restart ended %s", got)
	}
	return true
}

// serving is the oldest container of app that the runtime shows running, or "". The runtime may be
// behind the kernel: one whose process is gone does not count beside one whose process is there.
func (n *node) serving() string {
	living := strings.Fields(strings.ReplaceAll(n.rt.Living(), ",", " "))
	first := ""
	for c := range strings.SplitSeq(n.rt.State(), ", ") {
		name, is := strings.CutSuffix(c, " RUNNING")
		switch {
		case !is || !strings.HasPrefix(name, "app/"):
		case slices.Contains(living, name):
			return name
		case first == "":
			first = name
		}
	}
	return first
}

// leftovers says what is still to be taken away.
func (n *node) leftovers() string {
	state := n.rt.State()
	switch {
	case strings.Contains(state, "CREATED"):
		return "a staged container is left"
	case strings.Count(state, "app/") > 1 && strings.Contains(state, "app/0 RUNNING"):
		return "a successor is left"
	case n.gates() != "":
		return "a gate is left"
	case strings.Contains(n.rt.Living(), "waits"):
		return "a container waits at its gate"
	case n.view.Claimed(view.Slot{PodUID: podUID, Container: "app"}):
		return "the slot is held"
	}
	return ""
}

// makeNext makes the next attempt of app, as kubelet does.
func (n *node) makeNext(t *testing.T) {
	t.Helper()
	n.makeNextAt(t, uint32(strings.Count(n.rt.State(), "app/")))
}

// The same for upgrades. Their caller and kubelet begin again from what they find.
func TestUpgradeCrashesThatLoseTheJournal(t *testing.T) {
	for _, s := range upgradeScenarios {
		if s.asks != nil || s.ends || strings.Contains(s.name, "two") {
			continue
		}
		t.Run(s.name, func(t *testing.T) {
			all, again := s.moments(t), s.moments(t)
			for i, m := range all {
				if m.done && len(fakenode.Mutating([]string{m.call})) == 0 || !slices.Contains(again, m) {
					continue
				}
				loss := losses[i%len(losses)]
				t.Run(m.String()+", "+loss.name, func(t *testing.T) {
					for range tries {
						crashed := false
						inUpNode(t, func(t *testing.T, n *upNode) { crashed = s.crashAndLose(t, n, m, loss.lose) })
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

func (s upgradeScenario) crashAndLose(t *testing.T, n *upNode, m moment, lose func(state string) error) bool {
	t.Helper()
	ctx, dies := context.WithCancel(t.Context())
	defer dies()
	crashed, state := false, ""
	n.watchMoments(func(now moment) error {
		if now != m || crashed {
			return nil
		}
		crashed = true
		dies()
		state = n.crash()
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
		return false
	}
	n.must(lose(state))
	n.boot(state)
	seen := func(string) error {
		list, err := n.kubelet.ListContainers(context.Background(), &runtimeapi.ListContainersRequest{})
		if err == nil {
			err = slotSeen(list.GetContainers())
		}
		if err != nil {
			t.Error(err)
		}
		return nil
	}
	n.rt.Set(func(f *fakenode.Runtime) { f.Before, f.After = nil, nil })
	_ = seen("")
	n.rt.Set(func(f *fakenode.Runtime) { f.Before, f.After = seen, seen })
	n.run()
	if err := s.roll(t.Context(), n); err != nil {
		t.Errorf("%v; there is %s", err, n.rt.State())
	}
	time.Sleep(time.Hour) // whatever is to be taken away is
	synctest.Wait()
	n.rt.Set(func(f *fakenode.Runtime) { f.Before, f.After = nil, nil })
	list, err := n.kubelet.ListContainers(t.Context(), &runtimeapi.ListContainersRequest{})
	n.must(err)
	if err := slotSeen(list.GetContainers()); err != nil {
		t.Error(err)
	}
	if got, want := n.sees(), n.rt.State(); got != want || strings.Contains(got, "CREATED") ||
		strings.Count(got, "RUNNING") != 2 {
		t.Errorf("kubelet sees %s, there is %s", got, want)
	}
	newest, err := n.newest(t.Context(), "app")
	if err != nil ||
		n.rt.Get(t, fakenode.NameOf(newest)).Config.GetImage().GetUserSpecifiedImage() != "app:v2" {
		t.Errorf("%v runs, %v", newest, err)
	}
	return true
}

// An annotation alone says nothing: a container keeps it for life, and its operation is forgotten
// after an hour.
func TestContainersOfForgottenOperationsStay(t *testing.T) {
	n := newNode(t, podOptions{processes: true})
	n.runTidied()
	n.restart("one")
	n.finish("one")
	n.restart("two")
	n.finish("two")
	const want = "app/0 EXITED, app/1 EXITED, app/2 RUNNING, web/0 RUNNING"
	n.awaitLiving("app/2, web/0")
	for _, loss := range losses {
		t.Run(loss.name, func(t *testing.T) {
			state := n.crash()
			n.must(loss.lose(state))
			n.boot(state)
			n.state = state
			if got := n.sees(); got != want {
				t.Errorf("kubelet sees %s", got)
			}
			n.runTidied()
			if got := n.sees(); got != want || n.rt.State() != want {
				t.Errorf("kubelet sees %s, there is %s", got, n.rt.State())
			}
			n.awaitLiving("app/2, web/0")
		})
	}
}

// A runtime that is away at the start keeps nobody from asking for its version, and no list goes
// out before what it has is known.
func TestListsWaitForTheJudge(t *testing.T) {
	n := newNode(t, podOptions{processes: true})
	n.runTidied()
	state := n.crashBeforeStop()
	n.must(os.Remove(filepath.Join(state, "journal.db")))
	n.boot(state)
	n.state = state
	away := status.Error(codes.Unavailable, "the runtime starts")
	n.rt.Set(func(f *fakenode.Runtime) {
		f.Before = func(call string) error {
			if call == "ListContainers" { // the daemon's, not kubelet's
				return away
			}
			return nil
		}
	})
	ctx := t.Context()
	if _, err := n.kubelet.Version(ctx, &runtimeapi.VersionRequest{}); err != nil {
		t.Errorf("Version: %v", err)
	}
	if _, err := n.kubelet.ListContainers(ctx, &runtimeapi.ListContainersRequest{}); status.Code(
		err) != codes.Unavailable {
		t.Errorf("a list before the judge: %v", err)
	}
	id := n.rt.ID(t, "app/1")
	if _, err := n.kubelet.ContainerStatus(ctx, &runtimeapi.ContainerStatusRequest{ContainerId: id}); status.Code(
		err) != codes.Unavailable {
		t.Errorf("a status before the judge: %v", err)
	}
	n.rt.Set(func(f *fakenode.Runtime) { f.Before = nil })
	if got := n.sees(); !strings.Contains(got, "app/0") || strings.Contains(got, "app/1") {
		t.Errorf("kubelet sees %s", got)
	}
	if _, err := n.kubelet.ContainerStatus(ctx, &runtimeapi.ContainerStatusRequest{ContainerId: id}); status.Code(
		err) != codes.NotFound {
		t.Errorf("a status of what is hidden: %v", err)
	}
}

// What the runtime makes after the judge has looked, for a process that is gone, is hidden as well.
func TestLateCreationsAreHidden(t *testing.T) {
	n := newNode(t, podOptions{})
	if got := n.sees(); got != "app/0 RUNNING, web/0 RUNNING" {
		t.Fatal(got)
	}
	config := n.containerConfig("app", 1)
	config.Annotations[view.StagedAnnotation] = someToken
	_, err := n.rt.CreateContainer(t.Context(),
		&runtimeapi.CreateContainerRequest{PodSandboxId: n.sandbox, Config: config, SandboxConfig: n.sandboxConfig()})
	n.must(err)
	if got := n.sees(); got != "app/0 RUNNING, web/0 RUNNING" {
		t.Errorf("kubelet sees %s", got)
	}
	n.engine.node.LateCreate = time.Millisecond
	n.run()
	n.log.await(t, "removed a staged container that no operation knows")
	if got := n.rt.State(); got != "app/0 RUNNING, web/0 RUNNING" {
		t.Errorf("there is %s", got)
	}
}

// A container without a gate is called as one that waits at it until it executes its entrypoint.
// With gates and journal lost it is not taken for one.
func TestLostAtItsEntrypoint(t *testing.T) {
	n := newNode(t, podOptions{processes: true, method: opsv1.MethodPidfd})
	n.runTidied()
	n.rt.Set(func(f *fakenode.Runtime) { f.Processes.SlowExec = 300 * time.Millisecond })
	n.restart("op")
	n.finish("op")
	state := n.crash()
	n.must(errors.Join(os.Remove(filepath.Join(state, "journal.db")), os.RemoveAll(filepath.Join(state, "gates"))))
	n.boot(state)
	n.state = state
	n.runTidied()
	n.awaitLiving("app/1, web/0")
	if got, want := n.sees(), "app/0 EXITED, app/1 RUNNING, web/0 RUNNING"; got != want {
		t.Errorf("kubelet sees %s", got)
	}
}

// The runtime goes on showing a container whose process is gone. Its successor is not a stray
// beside it.
func TestShellsDoNotServe(t *testing.T) {
	n := newNode(t, podOptions{processes: true})
	n.runTidied()
	n.restart("op")
	n.finish("op")
	n.awaitLiving("app/1, web/0")
	old := n.rt.Get(t, "app/0")
	n.rt.Set(func(*fakenode.Runtime) { old.Status.State = runtimeapi.ContainerState_CONTAINER_RUNNING })
	owned := n.rt.Owned
	state := n.crash()
	n.must(os.Remove(filepath.Join(state, "journal.db")))
	n.boot(state)
	n.state = state
	n.engine.node.Switchover.OfContainer = func(pid int, container string) error {
		if container == old.Status.GetId() {
			return fs.ErrNotExist // /proc/PID/cgroup of a process that is gone
		}
		return owned(pid, container)
	}
	n.runTidied()
	if got, want := n.sees(), "app/0 RUNNING, app/1 RUNNING, web/0 RUNNING"; got != want {
		t.Errorf("kubelet sees %s", got)
	}
	n.awaitLiving("app/1, web/0")
}

// An old container that was about to be stopped may end at any time while it is found out what is
// left. Kubelet never sees it ended alone: that is the end of a pod that is never restarted.
func TestTheOldOneEndsMeanwhile(t *testing.T) {
	const both, swapped = "app/0 RUNNING, web/0 RUNNING", "app/0 EXITED, app/1 RUNNING, web/0 RUNNING"
	for _, tc := range []struct {
		name string
		// nth is the list of ours with which it ends, after or before the runtime has answered.
		nth   int
		after bool
		sees  string // what kubelet sees then
	}{
		{"since it was listed", 1, true, swapped},
		{"since it was decided", 2, false, both},
	} {
		t.Run(tc.name, func(t *testing.T) {
			n, state := lostBesideTheOld(t)
			lists, saw := 0, ""
			ends := func(call string, now bool) error {
				if call != "ListContainers" || now != tc.after {
					return nil
				}
				if lists++; lists == tc.nth {
					n.rt.Exit(t, "app/0", 0)
					if !now {
						saw = n.sees()
					}
				}
				return nil
			}
			n.rt.Set(func(f *fakenode.Runtime) {
				f.Before = func(call string) error { return ends(call, false) }
				f.After = func(call string) error { return ends(call, true) }
			})
			n.boot(state)
			n.state = state
			if first := n.sees(); tc.after {
				saw = first
			} else if first != both {
				t.Errorf("kubelet sees %s at first", first)
			}
			n.run()
			n.awaitTidy()
			if saw != tc.sees {
				t.Errorf("kubelet saw %q, want %q", saw, tc.sees)
			}
			if got := n.sees(); got != swapped || n.rt.State() != swapped {
				t.Errorf("kubelet sees %s, there is %s", got, n.rt.State())
			}
			n.awaitLiving("app/1, web/0")
		})
	}
}

// lostBesideTheOld returns a node whose process died when a successor had started beside its
// incumbent, with its state directory, from which the journal is gone.
func lostBesideTheOld(t *testing.T) (n *node, state string) {
	t.Helper()
	n = newNode(t, podOptions{processes: true})
	n.runTidied()
	state = n.crashBeforeStop(startFirst)
	n.must(os.Remove(filepath.Join(state, "journal.db")))
	n.rt.Set(func(f *fakenode.Runtime) { f.Before, f.After = nil, nil })
	return n, state
}

// judgedBesideTheOld is such a node whose next process has judged what is left, and does not run
// yet.
func judgedBesideTheOld(t *testing.T) *node {
	t.Helper()
	n, state := lostBesideTheOld(t)
	n.boot(state)
	n.state = state
	if got := n.sees(); got != "app/0 RUNNING, web/0 RUNNING" {
		t.Errorf("kubelet sees %s at first", got)
	}
	return n
}

// crashBeforeStop has the process die when it is about to stop app/0 for a restart, and returns its
// state directory.
func (n *node) crashBeforeStop(edit ...func(*opsv1.RestartRequest)) (state string) {
	n.t.Helper()
	crashed := make(chan struct{})
	n.rt.Set(func(f *fakenode.Runtime) {
		f.Before = func(call string) error {
			if !strings.HasPrefix(call, "StopContainer app/0") {
				return nil
			}
			state = n.crash()
			close(crashed)
			return status.Error(codes.Unavailable, "the caller is gone")
		}
	})
	n.restart("op", edit...)
	<-crashed
	return state
}

// awaitTidy waits until nothing is left of what is to be taken away.
func (n *node) awaitTidy() {
	n.t.Helper()
	for late := time.Now().Add(waitLong); n.leftovers() != ""; time.Sleep(time.Millisecond) {
		if time.Now().After(late) {
			n.t.Fatalf("%s: the runtime has %s", n.leftovers(), n.rt.State())
		}
	}
}

// Kubelet that stops the old container, because of a failed probe perhaps, finds it ended and
// nothing beside it.
func TestKubeletStopsTheOldOneMeanwhile(t *testing.T) {
	n := judgedBesideTheOld(t)
	stopped := make(chan error, 1)
	go func() {
		_, err := n.kubelet.StopContainer(t.Context(),
			&runtimeapi.StopContainerRequest{ContainerId: n.rt.ID(t, "app/0"), Timeout: 5})
		stopped <- err
	}()
	eventually := time.Now().Add(waitLong)
	for !strings.Contains(n.rt.State(), "app/0 EXITED") && time.Now().Before(eventually) {
		time.Sleep(time.Millisecond)
	}
	n.run()
	n.must(<-stopped)
	if got := n.sees(); got != "app/0 EXITED, web/0 RUNNING" {
		t.Errorf("kubelet sees %s once its stop is over", got)
	}
	n.awaitTidy()
	n.makeNext(t)
	if got := n.sees(); got != "app/0 EXITED, app/1 RUNNING, web/0 RUNNING" {
		t.Errorf("kubelet sees %s", got)
	}
}

// A runtime that does not answer at the start keeps what is left from being taken away as long
// only.
func TestLostIsClearedOnceTheRuntimeAnswers(t *testing.T) {
	n := judgedBesideTheOld(t)
	var lists atomic.Int64
	n.rt.Set(func(f *fakenode.Runtime) {
		f.Before = func(call string) error {
			if call == "ListContainers" && lists.Add(1) <= 3 {
				return status.Error(codes.Unavailable, "the runtime starts")
			}
			return nil
		}
	})
	n.engine.node.LateCreate = time.Millisecond
	n.run()
	n.awaitTidy()
	if got := n.sees(); got != "app/0 RUNNING, web/0 RUNNING" || n.rt.State() != got {
		t.Errorf("kubelet sees %s, there is %s", got, n.rt.State())
	}
}

// What cannot be taken away stays hidden. Its slot is given up, and the end of the old container is
// kubelet's to see.
func TestPanicWhileLostIsCleared(t *testing.T) {
	n := judgedBesideTheOld(t)
	n.leash.panicAt("ContainerStatus", always)
	n.run()
	n.log.await(t, "the daemon would have panicked")
	n.awaitFree(t)
	n.rt.Exit(t, "app/0", 3)
	if got := n.sees(); got != "app/0 EXITED, web/0 RUNNING" {
		t.Errorf("kubelet sees %s", got)
	}
}

// One that takes over without its gate, which is lost as well, does not wait for ever: kubelet's
// policy is for one that has ended.
func TestLostGateOfTheOneThatTakesOver(t *testing.T) {
	n := newNode(t, podOptions{processes: true})
	n.runTidied()
	state := n.crashAt("StopContainer app/0")
	n.must(os.Remove(filepath.Join(state, "journal.db")))
	n.must(os.RemoveAll(filepath.Join(state, "gates")))
	n.reboot(state)
	if got := n.sees(); got != "app/0 RUNNING, web/0 RUNNING" { // judged
		t.Errorf("kubelet sees %s at first", got)
	}
	n.rt.Exit(t, "app/0", 3)
	n.run()
	n.awaitTidy()
	if got, want := n.sees(), "app/0 EXITED, app/1 EXITED, web/0 RUNNING"; got != want || n.rt.State() != want {
		t.Errorf("kubelet sees %s, there is %s", got, n.rt.State())
	}
}
