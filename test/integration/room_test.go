// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package integration

import (
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"

	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	opsv1 "github.com/cri-proxy/cri-proxy/api/ops/v1"
)

const mebi = 1 << 20

// cgroupV2 reports whether this machine has nothing but cgroup v2.
func cgroupV2() bool {
	_, err := os.Stat("/sys/fs/cgroup/cgroup.controllers")
	return err == nil
}

// limitedPod is a pod whose cgroup has limits, as kubelet makes it.
type limitedPod struct {
	*pod
	t            testing.TB
	memory, pids string // directories
}

func (n *node) limitedPod(t testing.TB) *limitedPod {
	t.Helper()
	parent := fmt.Sprintf("%s/pod%d", bed.cgroup, nodeNumber.Add(1))
	p := &limitedPod{pod: n.runPodIn(t, parent), t: t, memory: "/sys/fs/cgroup/memory" + parent,
		pids: "/sys/fs/cgroup/pids" + parent}
	if cgroupV2() {
		p.memory, p.pids = "/sys/fs/cgroup"+parent, "/sys/fs/cgroup"+parent
	}
	return p
}

// file is the one of two that is there, of v1 and of v2.
func (p *limitedPod) file(v1, v2 string) string {
	if cgroupV2() {
		return filepath.Join(p.memory, v2)
	}
	return filepath.Join(p.memory, v1)
}

func (p *limitedPod) number(file string) int {
	p.t.Helper()
	b, err := os.ReadFile(file)
	must(p.t, err)
	n, err := strconv.Atoi(strings.TrimSpace(string(b)))
	must(p.t, err)
	return n
}

func (p *limitedPod) limit(mib int) {
	p.t.Helper()
	must(p.t, os.WriteFile(p.limitFile(), []byte(strconv.Itoa(mib*mebi)), 0))
}

func (p *limitedPod) limitFile() string { return p.file("memory.limit_in_bytes", "memory.max") }

func (p *limitedPod) used() int {
	p.t.Helper()
	return p.number(p.file("memory.usage_in_bytes", "memory.current")) / mebi
}

// settled returns the MiB that the pod uses, the last one begun counted, once that is no longer
// growing.
func (p *limitedPod) settled() int {
	p.t.Helper()
	used := p.used()
	eventually(p.t, "the pod's use of memory has settled", func() bool {
		before := used
		time.Sleep(200 * time.Millisecond)
		used = p.used()
		return used == before
	})
	return used + 1
}

// graceful asserts that the container has ended because it was asked to. In v1 the kernel tells
// every container of a pod when it kills a process of any of them, and containerd has that as the
// reason.
func (n *node) graceful(t testing.TB, id string) {
	t.Helper()
	if st := n.direct.status(t, id); st.GetExitCode() != 7 || st.GetReason() == "OOMKilled" {
		t.Errorf("it ended with exit code %d, %s", st.GetExitCode(), st.GetReason())
	}
}

// hog uses that much memory, beside its first process, which ends gracefully.
func hog(mib int) []string {
	return []string{"sh", "-c",
		fmt.Sprintf(
			`trap 'echo asked; exit 7' TERM; (head -c %d /dev/zero; exec sleep 100000) | tail -c %d & echo started; while :; do sleep 0.05; done`, mib*mebi, mib*mebi)}
}

// runHog runs app in the pod and waits until it uses its memory.
func (p *limitedPod) runHog(mib int) string {
	p.t.Helper()
	id := p.runSpec(p.t, spec{name: "app", command: hog(mib)})
	eventually(p.t, "the container uses its memory", func() bool { return p.used() >= mib })
	return id
}

func ended(t testing.TB, op *opsv1.Operation) *opsv1.ContainerOperation {
	t.Helper()
	if op.GetPhase() != opsv1.Phase_PHASE_SUCCEEDED {
		t.Fatalf("operation: %v", op)
	}
	return op.GetContainers()[0]
}

// TestNearTheMemoryLimit restarts a container that has left less than runc needs, and one that
// leaves enough.
func TestNearTheMemoryLimit(t *testing.T) {
	for _, tc := range []struct {
		left   int
		method string
	}{{24, "gate"}, {12, "pidfd"}, {4, "pidfd"}, {2, "pidfd"}} {
		t.Run(fmt.Sprintf("%d MiB left", tc.left), func(t *testing.T) {
			n := startNode(t)
			p := n.limitedPod(t)
			id := p.runHog(40)
			// not before: on its way there a process may need more than it has in the end
			p.limit(p.settled() + tc.left)
			c := ended(t, n.restart(t, p.pod, restartOf("app")))
			if c.GetMethod() != tc.method || (tc.method == "gate") != (len(c.GetWarnings()) == 0) {
				t.Errorf("method %s, warnings %q", c.GetMethod(), c.GetWarnings())
			}
			n.graceful(t, id)
			p.logs(t, "app", 0, "asked")
			p.began(t, "app", 1)
			t.Log(c.GetMethod(), c.GetGap().AsDuration(), c.GetWarnings())
		})
	}
}

// TestCacheIsRoom restarts a container whose pod is full of the cache of files that it has read.
// Beside a busy disk the kernel may show that cache as still to be written, for up to two seconds.
func TestCacheIsRoom(t *testing.T) {
	n := startNode(t)
	p := n.limitedPod(t)
	p.limit(64)
	id := p.run(t,
		spec{name: "app",
			command: []string{"sh", "-c",
				`trap 'exit 7' TERM; head -c 90000000 /dev/zero >/tmp/f; sync; cat /tmp/f >/dev/null; echo started; while :; do sleep 0.05; done`}})
	if used := p.used(); used < 50 {
		t.Fatalf("%d MiB are in use", used)
	}
	c := ended(t, n.restart(t, p.pod, restartOf("app")))
	if c.GetMethod() != "gate" || len(c.GetWarnings()) > 0 {
		t.Errorf("method %s, warnings %q", c.GetMethod(), c.GetWarnings())
	}
	n.graceful(t, id)
}

// TestNearThePidsLimit restarts a container whose pod has fewer process IDs left than runc needs.
func TestNearThePidsLimit(t *testing.T) {
	for _, left := range []int{0, 2, 5, 7, 12} {
		t.Run(fmt.Sprintf("%d left", left), func(t *testing.T) {
			n := startNode(t)
			p := n.limitedPod(t)
			id := p.run(t,
				spec{name: "app",
					command: []string{"sh", "-c",
						`trap 'exit 7' TERM; for i in 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15 16 17 18 19 20; do sleep 9999 & done; echo started; wait; wait`}})
			must(t, os.WriteFile(filepath.Join(p.pids, "pids.max"),
				[]byte(strconv.Itoa(p.number(filepath.Join(p.pids, "pids.current"))+left)), 0))
			c := ended(t, n.restart(t, p.pod, restartOf("app")))
			if c.GetMethod() != "pidfd" ||
				!strings.Contains(strings.Join(c.GetWarnings(), "\n"),
					fmt.Sprintf("the pod has %d process IDs free", left)) {
				t.Errorf("method %s, warnings %q", c.GetMethod(), c.GetWarnings())
			}
			n.graceful(t, id)
			p.began(t, "app", 1)
		})
	}
}

// TestOverlapNearTheMemoryLimit has two containers run at once in a pod with room for one.
func TestOverlapNearTheMemoryLimit(t *testing.T) {
	n := startNode(t)
	p := n.limitedPod(t)
	p.limit(64)
	id := p.runHog(50)
	before := p.number(p.limitFile())
	req := restartOf("app")
	req.Containers[0].Order, req.Containers[0].MinReadySeconds = opsv1.Order_ORDER_START_FIRST, 2
	uid := n.begin(t, p.pod, req)
	eventually(t, "both use their memory", func() bool { return p.used() >= 100 })
	if got := p.number(p.limitFile()); got != before+64*mebi {
		t.Errorf("the limit is %d while both run, it was %d", got, before)
	}
	c := ended(t, n.wait(t, uid))
	if c.GetMethod() != "overlap" || len(c.GetWarnings()) > 0 {
		t.Errorf("method %s, warnings %q", c.GetMethod(), c.GetWarnings())
	}
	if got := p.number(p.limitFile()); got != before {
		t.Errorf("the limit is %d in the end, it was %d", got, before)
	}
	n.graceful(t, id)
}

// TestNoRoomToOverlap has the cgroup above the pod too full for a second container.
func TestNoRoomToOverlap(t *testing.T) {
	n := startNode(t)
	parent := fmt.Sprintf("%s/kubepods%d", bed.cgroup, nodeNumber.Add(1))
	p := &limitedPod{pod: n.runPodIn(t, parent+"/pod"), t: t, memory: "/sys/fs/cgroup/memory" + parent + "/pod"}
	if cgroupV2() {
		p.memory = "/sys/fs/cgroup" + parent + "/pod"
	}
	p.limit(64)
	above := &limitedPod{t: t, memory: filepath.Dir(p.memory)}
	above.limit(100)
	id := p.runHog(50)
	req := restartOf("app")
	req.Containers[0].Order = opsv1.Order_ORDER_START_FIRST
	op := n.restart(t, p.pod, req)
	if c := op.GetContainers()[0]; op.GetPhase() != opsv1.Phase_PHASE_FAILED ||
		c.GetReason() != "InsufficientResources" ||
		!strings.Contains(c.GetMessage(), "it may use 64.0 MiB, and outside of the pod there is") {
		t.Errorf("operation: %v", op)
	} else {
		t.Log(c.GetMessage())
	}
	if running, all := p.running(t, n.direct, "app"); running != 1 || all != 1 || n.direct.status(t, id).
		GetState() != runtimeapi.ContainerState_CONTAINER_RUNNING {
		t.Errorf("%d of %d run", running, all)
	}
	if got := p.number(p.limitFile()); got != 64*mebi {
		t.Errorf("the limit is %d", got)
	}
}

// TestLimitIsSetBackAfterKill kills the proxy while both containers run, or are about to.
func TestLimitIsSetBackAfterKill(t *testing.T) {
	for _, step := range []string{"raised", "running", "ready", "stop", "started", "reveal", "revealed"} {
		t.Run(step, func(t *testing.T) {
			n := startProcess(t, "restart."+step)
			parent := fmt.Sprintf("%s/pod%d", bed.cgroup, nodeNumber.Add(1))
			p := &limitedPod{pod: n.runPodIn(t, parent), t: t, memory: "/sys/fs/cgroup/memory" + parent}
			if cgroupV2() {
				p.memory = "/sys/fs/cgroup" + parent
			}
			p.limit(64)
			p.runHog(20)
			before := p.number(p.limitFile())
			req := restartOf("app")
			req.Containers[0].Order = opsv1.Order_ORDER_START_FIRST
			uid := "limit-" + step
			req.Uid, req.Pod = uid, &opsv1.PodRef{Namespace: "default", Name: p.name, Uid: p.uid}
			_, _ = n.ops.Restart(t.Context(), req) // the answer may not come
			n.died(t)
			if step == "raised" || step == "running" || step == "ready" {
				if got := p.number(p.limitFile()); got != before+64*mebi {
					t.Errorf("the limit is %d when it dies", got)
				}
			}
			n.start(t, "")
			ended(t, n.wait(t, uid))
			if got := p.number(p.limitFile()); got != before {
				t.Errorf("the limit is %d in the end, it was %d", got, before)
			}
		})
	}
}

// TestUpgradeNearTheMemoryLimit arms an upgrade in a pod without room, and in one that comes to
// have none.
func TestUpgradeNearTheMemoryLimit(t *testing.T) {
	for _, uses := range []int{40, 60} {
		t.Run(fmt.Sprintf("%d of 64 MiB", uses), func(t *testing.T) {
			n := startNode(t)
			p := n.limitedPod(t)
			p.limit(64)
			id := p.runHog(uses)
			uid := n.toVersion2(t, p.pod, nil)
			n.arm(t, uid)
			state := func() (string, runtimeapi.ContainerState) {
				op, err := n.ops.GetOperation(t.Context(), &opsv1.GetOperationRequest{Uid: uid})
				must(t, err)
				c := op.GetContainers()[0]
				st, err := n.direct.ContainerStatus(t.Context(),
					&runtimeapi.ContainerStatusRequest{ContainerId: c.GetSuccessorId()})
				if err != nil {
					return c.GetMethod(), runtimeapi.ContainerState_CONTAINER_UNKNOWN // just being replaced
				}
				return c.GetMethod(), st.GetStatus().GetState()
			}
			if uses == 40 {
				if method, is := state(); method != "gate" || is != runtimeapi.ContainerState_CONTAINER_RUNNING {
					t.Fatalf("armed by %s, the new container is %s", method, is)
				}
				p.limit(50)
			}
			eventually(t, "nothing waits beside the old container", func() bool {
				method, is := state()
				return method == "pidfd" && is == runtimeapi.ContainerState_CONTAINER_CREATED
			})
			p.replace(t, id, spec{name: "app", image: bed.busybox2, command: hog(uses)})
			ended(t, n.wait(t, uid))
			n.graceful(t, id)
		})
	}
}

// TestKilledByTheKernel has the kernel kill the old container while its preStop hook runs.
func TestKilledByTheKernel(t *testing.T) {
	n := startNode(t)
	p := n.limitedPod(t)
	p.limit(64)
	id := p.run(t, spec{
		name: "app",
		command: []string{"awk",
			`BEGIN { s = sprintf("%40000000s", "x"); print "started"; fflush(); while (1) system("sleep 0.05") }`},
		preStop: `{"exec":{"command":["sh","-c","head -c 60000000 /dev/zero | tail -c 60000000 >/dev/null; sleep 1"]}}`,
	})
	c := ended(t, n.restart(t, p.pod, restartOf("app")))
	st := n.direct.status(t, id)
	if st.GetExitCode() != 137 || st.GetReason() != "OOMKilled" {
		t.Fatalf("the kernel has not killed it: exit code %d, %s", st.GetExitCode(), st.GetReason())
	}
	if w := strings.Join(c.GetWarnings(), "\n"); !strings.Contains(w, "exit code 137") ||
		!strings.Contains(w, "before it was asked to stop") {
		t.Errorf("warnings are %q", w)
	}
	t.Log(c.GetWarnings())
}
