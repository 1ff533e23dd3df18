// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package ops_test

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"

	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	opsv1 "github.com/cri-proxy/cri-proxy/api/ops/v1"
	"github.com/cri-proxy/cri-proxy/ops/cgroup"
	"github.com/cri-proxy/cri-proxy/ops/criclone"
	"github.com/cri-proxy/cri-proxy/ops/swap"
	"github.com/cri-proxy/cri-proxy/test/fakenode"
)

const testMiB = 1 << 20

// fakeRoom gives all containers of a node one pod of cgroup v2 in a tree of files, which no kernel
// keeps.
type fakeRoom struct {
	t    testing.TB
	root string
}

// newRoom has a limit of 64 MiB and 20 MiB in use.
func newRoom(t testing.TB) *fakeRoom {
	t.Helper()
	r := &fakeRoom{t: t, root: t.TempDir()}
	r.set("proc/self/mountinfo", "30 23 0:26 / /sys/fs/cgroup rw - cgroup2 cgroup2 rw")
	r.set("proc/meminfo", "MemTotal: 4194304 kB\nMemAvailable: 2097152 kB")
	r.set("pod/memory.max", strconv.Itoa(64*testMiB))
	r.used(20)
	r.set("pod/pids.max", "1000")
	r.set("pod/pids.current", "10")
	return r
}

func (r *fakeRoom) path(name string) string {
	if rest, is := strings.CutPrefix(name, "pod/"); is {
		return filepath.Join(r.root, "sys/fs/cgroup/kubepods/podu", rest)
	}
	return filepath.Join(r.root, name)
}

func (r *fakeRoom) set(name, content string) {
	r.t.Helper()
	path := r.path(name)
	next := path + ".next" // the kernel never shows half a file
	if err := errors.Join(os.MkdirAll(filepath.Dir(path), 0o755), os.WriteFile(next, []byte(content+"\n"), 0o644),
		os.Rename(next, path)); err != nil {
		r.t.Error(err)
	}
}

func (r *fakeRoom) used(mib int) {
	r.t.Helper()
	r.set("pod/memory.current", strconv.Itoa(mib*testMiB))
}

// cache has 63 MiB in use, 40 of them cache, of which so much is still to be written.
func (r *fakeRoom) cache(dirty int) {
	r.t.Helper()
	r.used(63)
	r.set("pod/memory.stat", fmt.Sprintf("anon %d\ninactive_file %d\nfile_dirty %d", 20*testMiB,
		40*testMiB, dirty*testMiB))
}

// limit is the pod's, in MiB.
func (r *fakeRoom) limit() int {
	b, err := os.ReadFile(r.path("pod/memory.max"))
	if err != nil {
		r.t.Error(err)
	}
	n, err := strconv.Atoi(strings.TrimSpace(string(b)))
	if err != nil {
		r.t.Error(err)
	}
	return n / testMiB
}

// find is [cgroup.System.Find].
func (r *fakeRoom) find(pid int, container string) (*cgroup.Pod, error) {
	r.set(fmt.Sprintf("proc/%d/cgroup", pid), "0::/kubepods/podu/"+container)
	r.set("pod/"+container+"/memory.current", strconv.Itoa(15*testMiB))
	r.set("pod/"+container+"/pids.current", "5")
	return cgroup.System{Root: r.root}.Find(pid, container)
}

// calls returns those that change something, of this test only.
func (n *node) calls() string { return strings.Join(fakenode.Mutating(n.rt.TakeCalls()), "; ") }

func warnings(op *opsv1.Operation) string {
	return strings.Join(op.GetContainers()[0].GetWarnings(), "\n")
}

// limited is a node with a pod of limited room, and with the memory limit of app.
func limited(t *testing.T, o podOptions, limitMiB int64) (*node, *fakeRoom) {
	t.Helper()
	o.processes = true
	o.room = newRoom(t)
	n := newNode(t, o)
	n.withImages()
	if limitMiB > 0 {
		_, err := n.kubelet.UpdateContainerResources(t.Context(), &runtimeapi.UpdateContainerResourcesRequest{
			ContainerId: n.rt.ID(t, "app/0"),
			Linux:       &runtimeapi.LinuxContainerResources{MemoryLimitInBytes: limitMiB * testMiB},
		})
		n.must(err)
	}
	n.runTidied()
	n.rt.TakeCalls()
	return n, o.room
}

// Without room for two, the old container is stopped first, whenever that is noticed.
func TestNoRoomForTheGate(t *testing.T) {
	const stopFirst = "CreateContainer app/1; StopContainer app/0 30s; StartContainer app/1"
	const again = "CreateContainer app/1; RemoveContainer app/1; CreateContainer app/1; StopContainer app/0 30s; " +
		"StartContainer app/1"
	for _, tc := range []struct {
		name   string
		begin  func(*fakeRoom) // before the operation
		before func(*fakeRoom) // before the old container is stopped
		method string
		calls  string
		warns  string
	}{
		{name: "room", method: opsv1.MethodGate,
			calls: "CreateContainer app/1; StartContainer app/1; StopContainer app/0 30s"},
		{
			name: "cache is room", begin: func(r *fakeRoom) {
				r.used(63)
				r.set("pod/memory.stat", fmt.Sprintf("inactive_file %d", 30*testMiB))
			},
			method: opsv1.MethodGate, calls: "CreateContainer app/1; StartContainer app/1; StopContainer app/0 30s",
		},
		{
			name: "cache that the kernel counts a moment later", begin: func(r *fakeRoom) {
				r.cache(40)
				time.AfterFunc(300*time.Millisecond, func() { r.cache(0) })
			},
			method: opsv1.MethodGate, calls: "CreateContainer app/1; StartContainer app/1; StopContainer app/0 30s",
		},
		{
			name: "cache that stays to be written", begin: func(r *fakeRoom) { r.cache(35) }, method: opsv1.MethodPidfd,
			calls: stopFirst,
			warns: "the pod has 6.0 MiB of memory free (limit 64.0 MiB, 63.0 MiB used, of which 5.0 MiB is cache, in " +
				"/kubepods/podu), less than the 16.0 MiB",
		},
		{
			name: "little memory", begin: func(r *fakeRoom) { r.used(60) }, method: opsv1.MethodPidfd, calls: stopFirst,
			warns: "the pod has 4.0 MiB of memory free (limit 64.0 MiB, 60.0 MiB used, in /kubepods/podu), less than " +
				"the 16.0 MiB",
		},
		{
			name: "more than the limit", begin: func(r *fakeRoom) { r.used(65) }, method: opsv1.MethodPidfd,
			calls: stopFirst,
			warns: "the pod has 0.0 MiB of memory free",
		},
		{
			name: "few process IDs", begin: func(r *fakeRoom) { r.set("pod/pids.max", "20") },
			method: opsv1.MethodPidfd, calls: stopFirst,
			warns: "the pod has 10 process IDs free (limit 20, 10 used, in /kubepods/podu), less than the 24",
		},
		{name: "memory that goes", before: func(r *fakeRoom) { r.used(60) }, method: opsv1.MethodPidfd, calls: again,
			warns: "the pod has 4.0 MiB of memory free"},
		{
			name: "process IDs that go", before: func(r *fakeRoom) { r.set("pod/pids.current", "999") },
			method: opsv1.MethodPidfd, calls: again,
			warns: "the pod has 1 process IDs free",
		},
		{
			name: "not known", begin: func(r *fakeRoom) { r.set("pod/memory.max", "much") },
			method: opsv1.MethodGate, calls: "CreateContainer app/1; StartContainer app/1; StopContainer app/0 30s",
		},
	} {
		t.Run(tc.name, func(t *testing.T) {
			t.Parallel()
			n, room := limited(t, podOptions{}, 0)
			if tc.begin != nil {
				tc.begin(room)
			}
			n.rt.Set(func(f *fakenode.Runtime) {
				f.OnExec = func(context.Context, *runtimeapi.ExecSyncRequest) (*runtimeapi.ExecSyncResponse, error) {
					tc.before(room)
					return &runtimeapi.ExecSyncResponse{}, nil
				}
			})
			n.restart("op", func(r *opsv1.RestartRequest) {
				if tc.before != nil {
					r.Containers[0].PreStop = execHook("x")
				}
			})
			op := n.finish("op")
			if got := verdict(op); got != succeeded {
				t.Errorf("operation ended %s (%s)", got, op.GetMessage())
			}
			calls := strings.ReplaceAll(n.calls(), "ExecSync app/0 x 30s; ", "")
			if calls != tc.calls {
				t.Errorf("calls are %s\nwant      %s", calls, tc.calls)
			}
			if got := op.GetContainers()[0].GetMethod(); got != tc.method {
				t.Errorf("method is %s, want %s", got, tc.method)
			}
			if w := warnings(op); (w == "") != (tc.warns == "") || !strings.Contains(w, tc.warns) {
				t.Errorf("warnings are %q, want %q", w, tc.warns)
			}
			n.checkSwap(t, "app/1, web/0")
		})
	}
}

// An upgrade starts nothing before kubelet stops the old container, and no longer leaves it
// waiting, when there is no room.
func TestNoRoomWhenArmed(t *testing.T) {
	for name, tc := range map[string]struct {
		prepared, armed func(*fakeRoom)
		reboot          bool
		want            string // what is alive then
		method          string
	}{
		"at once": {prepared: func(r *fakeRoom) { r.used(60) }, want: "app/0, web/0",
			method: opsv1.MethodPidfd},
		"later": {armed: func(r *fakeRoom) { r.used(60) }, want: "app/0, web/0",
			method: opsv1.MethodPidfd},
		"the next process, it waits": {armed: func(r *fakeRoom) { r.used(50) }, reboot: true,
			want: "app/0, app/1 waits, web/0", method: opsv1.MethodGate},
		"the next process, later": {armed: func(r *fakeRoom) { r.used(60) }, reboot: true,
			want: "app/0, web/0", method: opsv1.MethodPidfd},
		"the next process, nothing waits": {prepared: func(r *fakeRoom) { r.used(60) }, reboot: true,
			want: "app/0, web/0", method: opsv1.MethodPidfd},
		"as much as it takes while it waits": {armed: func(r *fakeRoom) { r.used(55) },
			want: "app/0, app/1 waits, web/0", method: opsv1.MethodGate},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			n, room := limited(t,
				podOptions{annotations: map[string]string{criclone.AnnotationHash: criclone.KubeletHash("app", "")}}, 0)
			_, err := n.api.PrepareUpgrade(t.Context(), upgradeRequest("op"))
			n.must(err)
			n.phase(opsv1.Phase_PHASE_PREPARED)
			if tc.prepared != nil {
				tc.prepared(room)
			}
			_, err = n.api.CommitUpgrade(t.Context(), &opsv1.CommitUpgradeRequest{Uid: "op"})
			n.must(err)
			n.phase(opsv1.Phase_PHASE_ARMED)
			if tc.armed != nil {
				tc.armed(room)
			}
			if tc.reboot {
				n.reboot(n.crash())
				n.withImages()
				n.run()
			}
			if tc.method == opsv1.MethodPidfd && (tc.armed != nil || !tc.reboot) {
				n.until("op", func(op *opsv1.Operation) bool {
					return op.GetContainers()[0].GetMethod() == opsv1.MethodPidfd &&
						strings.Contains(n.rt.State(), "app/1 CREATED") &&
						op.GetContainers()[0].GetSuccessorId() == n.rt.ID(t, "app/1")
				})
			}
			n.awaitLiving(tc.want)
			if calls := n.calls(); tc.prepared != nil && strings.Contains(calls, "StartContainer") {
				t.Errorf("something was started: %s", calls)
			}
			_, err = n.kubelet.StopContainer(t.Context(),
				&runtimeapi.StopContainerRequest{ContainerId: n.rt.ID(t, "app/0"), Timeout: 30})
			n.must(err)
			n.kubeletCreates("app:v2")
			op := n.finish("op")
			if got := verdict(op); got != succeeded || op.GetContainers()[0].GetMethod() != tc.method {
				t.Errorf("operation ended %s by %s (%s)", got, op.GetContainers()[0].GetMethod(), op.GetMessage())
			}
			if w := warnings(op); (tc.method == opsv1.MethodPidfd) != strings.Contains(w, "of memory free") {
				t.Errorf("warnings are %q", w)
			}
			n.checkSwap(t, "app/1, web/0")
		})
	}
}

// The pod has room for the second container while it runs beside the first, and not longer.
func TestRoomToOverlap(t *testing.T) {
	for name, tc := range map[string]struct {
		begin func(*fakeRoom)
		limit int64 // of the container, in MiB
		// during is what happens while both run.
		during func(*fakeRoom)
		fails  bool // the successor does not start
		most   int  // the pod's limit then, in MiB
		end    int
		want   string
		says   string
	}{
		"the container's own limit": {limit: 48, most: 112, end: 64, want: succeeded},
		"no limit of its own":       {most: 64 + 15, end: 64, want: succeeded},
		"it does not start": {limit: 48, fails: true, most: 112, end: 64,
			want: "FAILED, app FAILED StartFailed"},
		"a resize meanwhile": {limit: 48, most: 112,
			during: func(r *fakeRoom) { r.set("pod/memory.max", strconv.Itoa(80*testMiB)) }, end: 80, want: succeeded},
		"a pod that is nearly full": {limit: 48, begin: func(r *fakeRoom) { r.used(63) }, most: 112, end: 64,
			want: succeeded},
		"a pod without a limit": {limit: 48,
			begin: func(r *fakeRoom) { r.set("pod/memory.max", strconv.Itoa(1<<40)) }, most: 1<<20 + 48, end: 1 << 20,
			want: succeeded},
		"the node has less": {limit: 48,
			begin: func(r *fakeRoom) { r.set("proc/meminfo", "MemTotal: 4194304 kB\nMemAvailable: 40960 kB") }, end: 64,
			want: "FAILED, app FAILED InsufficientResources",
			says: "it may use 48.0 MiB, and outside of the pod there is 40.0 MiB of memory free (limit 4096.0 MiB, " +
				"4056.0 MiB used, in the node)"},
		"the pods of the node do": {limit: 48, begin: func(r *fakeRoom) { r.above(1000, 980) }, end: 64,
			want: "FAILED, app FAILED InsufficientResources",
			says: "20.0 MiB of memory free (limit 1000.0 MiB, 980.0 MiB used, in /kubepods)"},
		"few process IDs": {begin: func(r *fakeRoom) { r.set("pod/pids.max", "14") }, end: 64,
			want: "FAILED, app FAILED InsufficientResources",
			says: "the old one has 5 processes and threads, and the pod has 4 process IDs free"},
		"the limit cannot be written": {limit: 48, begin: func(r *fakeRoom) { r.readOnly() }, end: 0,
			want: "FAILED, app FAILED InsufficientResources", says: "the pod's limit cannot be raised"},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			n, room := limited(t, podOptions{}, tc.limit)
			if tc.begin != nil {
				tc.begin(room)
			}
			most := 0
			n.rt.Set(func(f *fakenode.Runtime) {
				f.OnStart = func(c *runtimeapi.ContainerConfig) error {
					most = room.limit()
					if tc.fails {
						return errors.New("exec: no such file or directory")
					}
					if tc.during != nil {
						tc.during(room)
					}
					return nil
				}
			})
			n.restart("op", startFirst)
			op := n.finish("op")
			if got := verdict(op); got != tc.want || !strings.Contains(op.GetMessage(), tc.says) {
				t.Errorf("operation ended %s (%s), want %s (%s)", got, op.GetMessage(), tc.want, tc.says)
			}
			if got := room.limit(); got != tc.end {
				t.Errorf("the limit is %d MiB in the end, want %d", got, tc.end)
			}
			calls := n.calls()
			if strings.HasSuffix(tc.want, opsv1.ReasonInsufficientResources) {
				if strings.Contains(calls, "Start") || strings.Contains(calls, "StopContainer app/0") {
					t.Errorf("calls are %s", calls)
				}
				n.checkOnlyLiving(t, "app/0, web/0")
				return
			}
			if most != tc.most {
				t.Errorf("the limit was %d MiB when it was started, want %d", most, tc.most)
			}
			if w := warnings(op); w != "" && !tc.fails {
				t.Errorf("warnings are %q", w)
			}
		})
	}
}

// above sets limit and use of what is above the pod, in MiB.
func (r *fakeRoom) above(limit, used int) {
	r.t.Helper()
	r.set("sys/fs/cgroup/kubepods/memory.max", strconv.Itoa(limit*testMiB))
	r.set("sys/fs/cgroup/kubepods/memory.current", strconv.Itoa(used*testMiB))
}

// readOnly makes the limit a file that nobody writes.
func (r *fakeRoom) readOnly() {
	r.t.Helper()
	if os.Getuid() != 0 {
		if err := os.Chmod(r.path("pod/memory.max"), 0o400); err != nil {
			r.t.Fatal(err)
		}
		return
	}
	// Root is kept from a file that is a program being run only.
	if err := errors.Join(os.Remove(r.path("pod/memory.max")),
		os.Symlink("/proc/sys/kernel/ngroups_max", r.path("pod/memory.max"))); err != nil {
		r.t.Fatal(err)
	}
}

func TestHugepagesToOverlap(t *testing.T) {
	t.Parallel()
	n, room := limited(t, podOptions{}, 0)
	room.set("pod/hugetlb.2MB.max", strconv.Itoa(8*testMiB))
	room.set("pod/hugetlb.2MB.current", strconv.Itoa(6*testMiB))
	_, err := n.kubelet.UpdateContainerResources(t.Context(), &runtimeapi.UpdateContainerResourcesRequest{
		ContainerId: n.rt.ID(t, "app/0"),
		Linux: &runtimeapi.LinuxContainerResources{HugepageLimits: []*runtimeapi.HugepageLimit{
			{PageSize: "2MB", Limit: 8 * testMiB}, {PageSize: "1GB", Limit: 0},
		}},
	})
	n.must(err)
	n.restart("op", startFirst)
	op := n.finish("op")
	if got := verdict(op); got != "FAILED, app FAILED InsufficientResources" ||
		!strings.Contains(op.GetMessage(), "8.0 MiB of huge pages of 2MB, and the pod has 2.0 MiB left of 8.0 MiB") {
		t.Errorf("operation ended %s (%s)", got, op.GetMessage())
	}
	n.checkOnlyLiving(t, "app/0, web/0")
	n.restart("gate") // which waits before it uses any
	if op := n.finish("gate"); verdict(op) != succeeded || op.GetContainers()[0].GetMethod() != opsv1.MethodGate {
		t.Errorf("operation ended %v", op)
	}
}

// Two containers of one pod are replaced at once.
func TestTwoOverlaps(t *testing.T) {
	t.Parallel()
	n, room := limited(t, podOptions{}, 48)
	most := 0
	n.rt.Set(func(f *fakenode.Runtime) {
		f.OnStart = func(*runtimeapi.ContainerConfig) error {
			most = max(most, room.limit())
			return nil
		}
	})
	n.restart("op", func(r *opsv1.RestartRequest) {
		r.Containers = append(r.Containers, &opsv1.ContainerRestart{Name: "web"})
		for _, c := range r.Containers {
			c.Order, c.MinReadySeconds = opsv1.Order_ORDER_START_FIRST, 1
		}
	})
	if got, want := verdict(n.finish("op")), "SUCCEEDED, app SUCCEEDED, web SUCCEEDED"; got != want {
		t.Errorf("operation ended %s", got)
	}
	if got, want := most, 64+48+15; got != want {
		t.Errorf("the limit was %d MiB at most, want %d", got, want)
	}
	if got := room.limit(); got != 64 {
		t.Errorf("the limit is %d MiB in the end", got)
	}
}

// A start that fails for what the old container has goes on without it, and says so; another
// failure leaves it alone.
func TestStartFailsBesideTheOldOne(t *testing.T) {
	const oci = "OCI runtime create failed: runc create failed: unable to start container process: "
	for name, tc := range map[string]struct {
		says string
		want string
	}{
		"no process IDs": {oci + "error during container init: procReady not received", succeeded},
		"no process IDs yet": {oci + "can't get final child's PID from pipe: EOF; runc init error(s): nsexec-1[2]: " +
			"unable to spawn stage-2: Resource temporarily unavailable", succeeded},
		"no memory": {oci + "container init was OOM-killed (memory limit too low?)", succeeded},
		"a device":  {oci + "error mounting \"/dev/x\": device or resource busy", succeeded},
		"no such program": {oci + `exec: "/app": stat /app: no such file or directory`,
			"FAILED, app FAILED StartFailed"},
		"no such mount":      {oci + `error mounting "/a": not a directory`, "FAILED, app FAILED StartFailed"},
		"not to be executed": {oci + `exec: "/app": permission denied`, "FAILED, app FAILED StartFailed"},
	} {
		for order, edit := range map[string]func(*opsv1.RestartRequest){"gate": func(*opsv1.RestartRequest) {},
			"start first": startFirst} {
			t.Run(name+", "+order, func(t *testing.T) {
				t.Parallel()
				n := newNode(t, podOptions{processes: true})
				n.runTidied()
				old := n.rt.Get(t, "app/0")
				n.rt.Set(func(f *fakenode.Runtime) {
					f.OnStart = func(*runtimeapi.ContainerConfig) error {
						if old.Status.GetState() == runtimeapi.ContainerState_CONTAINER_RUNNING {
							return errors.New(tc.says)
						}
						return nil
					}
				})
				n.restart("op", edit)
				op := n.finish("op")
				if got := verdict(op); got != tc.want {
					t.Errorf("operation ended %s (%s)", got, op.GetMessage())
				}
				if tc.want != succeeded {
					n.checkOnlyLiving(t, "app/0, web/0")
					return
				}
				n.checkSwap(t, "app/1, web/0")
				if w := warnings(op); !strings.Contains(w, tc.says) ||
					!strings.Contains(w, "the old container is stopped before") &&
						!strings.Contains(w, "the old one is stopped before") {
					t.Errorf("warnings are %q", w)
				}
				if got := op.GetContainers()[0].GetMethod(); got != opsv1.MethodPidfd {
					t.Errorf("method is %s", got)
				}
			})
		}
	}
}

// An old container that was killed is never told of as one that ended by itself.
func TestKilledInstead(t *testing.T) {
	for name, tc := range map[string]struct {
		edit func(*opsv1.RestartRequest)
		at   string // of the calls
		code int32
		oom  bool
		want string
	}{
		"at the gate's start": {at: "StartContainer", code: 137, oom: true,
			want: "the old container was killed by the kernel, because memory had run out in its pod (exit code 137, " +
				"OOMKilled) before it was asked to stop, while the new one was being started beside it"},
		"without a reason": {at: "StartContainer", code: 137,
			want: "the old container was killed (exit code 137, Error) before it was asked to stop, while"},
		"start first": {at: "StartContainer", edit: startFirst, code: 137, oom: true,
			want: "the old container was killed by the kernel, because memory had run out in its pod"},
		"in preStop": {at: "ExecSync",
			edit: func(r *opsv1.RestartRequest) { r.Containers[0].PreStop = execHook("x") }, code: 137, oom: true,
			want: "before it was asked to stop: it has not ended gracefully"},
		"in its stop": {at: "StopContainer", code: 137, oom: true,
			want: "the old container was killed by the kernel, because memory had run out in its pod (exit code 137, " +
				"OOMKilled), while the new one was"},
		"another process": {at: "StopContainer", code: 0, oom: true,
			want: "memory had run out in the pod of the old container (exit code 0, OOMKilled), and the kernel has " +
				"killed a process there"},
		"by the runtime": {at: "StopContainer", code: 137},
		"by itself":      {at: "StartContainer", code: 3},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			n := newNode(t, podOptions{processes: true})
			n.runTidied()
			old := n.rt.Get(t, "app/0")
			n.rt.Set(func(f *fakenode.Runtime) {
				f.Before = func(call string) error {
					if !strings.HasPrefix(call, tc.at) {
						return nil
					}
					f.Mu.Lock()
					defer f.Mu.Unlock()
					reason := "Error"
					if tc.oom {
						reason = swap.OOMKilled
					}
					f.End(old, tc.code, reason)
					return nil
				}
			})
			n.restart("op", func(r *opsv1.RestartRequest) {
				if tc.edit != nil {
					tc.edit(r)
				}
			})
			op := n.finish("op")
			if got := verdict(op); got != succeeded {
				t.Errorf("operation ended %s (%s)", got, op.GetMessage())
			}
			if w := warnings(op); (w == "") != (tc.want == "") || !strings.Contains(w, tc.want) {
				t.Errorf("warnings are %q, want %q", w, tc.want)
			}
		})
	}
}
