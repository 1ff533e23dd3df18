// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package integration

import (
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	opsv1 "github.com/cri-proxy/cri-proxy/api/ops/v1"
)

// The steps of a restart, in order, at which it can be held.
var (
	stopFirst  = []string{"created", "staged", "stop", "gated", "stopped", "running", "started", "reveal", "revealed"}
	startFirst = []string{"created", "staged", "start", "running", "ready", "stop", "stopped", "started",
		"reveal", "revealed"}
)

// pause holds restarts of a process at its failpoint, one after the other.
type pause struct {
	t   testing.TB
	dir string
}

// startPaused starts cri-proxy so that restarts wait at the step.
func startPaused(t testing.TB, step string) (*process, *pause) {
	t.Helper()
	p := &pause{t: t, dir: shortDir(t)}
	return startProcess(t, "restart."+step+"=pause:"+p.dir), p
}

// held begins a restart and waits until it is at the step.
func (p *pause) held(n *node, pod *pod, req *opsv1.RestartRequest) string {
	p.t.Helper()
	for _, name := range []string{"reached", "go"} {
		if err := os.Remove(filepath.Join(p.dir, name)); err != nil && !os.IsNotExist(err) {
			p.t.Fatal(err)
		}
	}
	uid := n.begin(p.t, pod, req)
	eventually(p.t, "the restart is at its failpoint", func() bool {
		_, err := os.Stat(filepath.Join(p.dir, "reached"))
		return err == nil
	})
	return uid
}

// release lets the restart go on.
func (p *pause) release() {
	p.t.Helper()
	must(p.t, os.WriteFile(filepath.Join(p.dir, "go"), nil, 0o600))
}

// stepTest is a restart that is held at a step.
type stepTest struct {
	n              *process
	hold           *pause
	pod            *pod
	steps          []string
	step           string
	incumbent, uid string
}

// after reports whether the restart has passed the step, or is at it.
func (s *stepTest) after(step string) bool {
	return slices.Index(s.steps, s.step) >= slices.Index(s.steps, step)
}

// TestKubeletAtEachStep makes every call that kubelet makes on a container while a restart of it is
// at every step. Calls that adjust it are answered and come true for its successor; calls that end
// it end the restart, but for a stop of what the restart is bound to stop, which joins it; and what
// runs afterwards is what kubelet wants.
func TestKubeletAtEachStep(t *testing.T) {
	for _, step := range stopFirst {
		t.Run(step, func(t *testing.T) {
			atStep(t, opsv1.Order_ORDER_STOP_FIRST, stopFirst, step, map[string]func(*testing.T, *stepTest){
				"adjusts": kubeletAdjusts, "creates": kubeletCreates, "stops": kubeletStops, "removes": kubeletRemoves,
				"stops the sandbox": kubeletStopsSandbox,
			})
		})
	}
	for _, step := range startFirst[2:9] { // before, and after, there is no difference
		t.Run("start first, "+step, func(t *testing.T) {
			atStep(t, opsv1.Order_ORDER_START_FIRST, startFirst, step, map[string]func(*testing.T, *stepTest){
				"adjusts": kubeletAdjusts, "stops": kubeletStops, "stops the sandbox": kubeletStopsSandbox,
			})
		})
	}
}

// atStep runs tests on restarts that are held at a step, each on a pod of its own.
func atStep(
	t *testing.T, order opsv1.Order, steps []string, step string, tests map[string]func(*testing.T, *stepTest),
) {
	t.Helper()
	n, hold := startPaused(t, step)
	for name, test := range tests {
		t.Run(name, func(t *testing.T) {
			p := n.runPod(t)
			s := &stepTest{n: n, hold: hold, pod: p, steps: steps, step: step,
				incumbent: p.run(t, spec{name: "app", command: looping, grace: unneededGrace})}
			t.Cleanup(hold.release) // a test that fails on the way must not leave the process stuck
			req := restartOf("app")
			req.Containers[0].Order = order
			s.uid = hold.held(n.node, p, req)
			if s.after("running") {
				p.began(t, "app", 1)
			}
			test(t, s)
		})
	}
}

// unneededGrace is what nothing here takes, in seconds, unless a process is not asked to stop.
const unneededGrace = 30

// kubeletAdjusts makes the calls that do not end a container.
func kubeletAdjusts(t *testing.T, s *stepTest) {
	ctx := t.Context()
	dead, shown := s.after("stopped"), s.after("revealed")
	exec, err := s.n.ExecSync(ctx,
		&runtimeapi.ExecSyncRequest{ContainerId: s.incumbent, Cmd: []string{"true"}, Timeout: 30})
	switch code := status.Code(err); {
	case code == codes.OK && !dead && exec.GetExitCode() == 0:
	case code == codes.Unavailable && !shown && s.after("stop"): // which kubelet's prober takes for no result
	case shown && code != codes.OK && code != codes.DeadlineExceeded: // the runtime's own word
	default:
		t.Errorf("exec probe: %v, %v", exec, err)
	}
	if _, err := s.n.ReopenContainerLog(ctx,
		&runtimeapi.ReopenContainerLogRequest{ContainerId: s.incumbent}); err != nil && !shown {
		t.Errorf("log rotation: %v", err)
	}
	_, err = s.n.UpdateContainerResources(ctx, &runtimeapi.UpdateContainerResourcesRequest{
		ContainerId: s.incumbent, Linux: &runtimeapi.LinuxContainerResources{CpuShares: 333, CpusetCpus: "1"},
	})
	if err != nil && !shown {
		t.Errorf("resize: %v", err)
	}
	s.hold.release()
	successor := s.succeeded(t).GetSuccessorId()
	if shown {
		return // kubelet resizes what it then sees
	}
	for i := range 2 { // the successor, and the one after it
		s.pod.began(t, "app", i+1)
		if got := s.n.status(t, successor).GetResources().GetLinux(); got.GetCpuShares() != 333 ||
			got.GetCpusetCpus() != "1" {
			t.Errorf("the successor has %v", got)
		}
		if got := cpus(t, s.n.kubelet, successor); got != "1" {
			t.Errorf("the kernel lets the successor run on CPUs %s", got)
		}
		op := s.n.restart(t, s.pod, restartOf("app"))
		successor = op.GetContainers()[0].GetSuccessorId()
	}
}

// cpus returns the CPUs that the container's process may run on.
func cpus(t testing.TB, k *kubelet, id string) string {
	t.Helper()
	resp, err := k.ExecSync(t.Context(),
		&runtimeapi.ExecSyncRequest{ContainerId: id, Cmd: []string{"grep", "Cpus_allowed_list", "/proc/1/status"},
			Timeout: 10})
	must(t, err)
	_, list, _ := strings.Cut(string(resp.GetStdout()), ":")
	return strings.TrimSpace(list)
}

// kubeletCreates creates the next attempt, as a kubelet does that has taken the incumbent for dead.
// It waits for the restart, whose successor has that name then.
func kubeletCreates(t *testing.T, s *stepTest) {
	created := make(chan error, 1)
	go func() {
		_, err := s.n.CreateContainer(t.Context(), s.pod.request(t, spec{name: "app", command: looping}, 1))
		created <- err
	}()
	if !s.after("revealed") {
		select {
		case err := <-created:
			t.Errorf("answered in the middle of the restart: %v", err)
		case <-time.After(50 * time.Millisecond): // it would have been: the runtime refuses a name at once
		}
	}
	s.hold.release()
	if err := <-created; err == nil || !strings.Contains(err.Error(), "reserve") {
		t.Errorf("created: %v", err)
	}
	s.succeeded(t)
}

// kubeletStops stops the incumbent, with a grace that no process here needs.
func kubeletStops(t *testing.T, s *stepTest) {
	began := time.Now()
	stopped := make(chan error, 1)
	go func() {
		_, err := s.n.StopContainer(t.Context(), stopRequest(s.incumbent, unneededGrace))
		stopped <- err
	}()
	joins := s.after("stop") && !s.after("revealed")
	if joins {
		s.logged(t, s.pod.name, "joins the restart")
	} else {
		s.kubeletArrives(t, "StopContainer")
	}
	s.hold.release()
	must(t, <-stopped)
	if took := time.Since(began); took > unneededGrace*time.Second*9/10 {
		t.Errorf("kubelet waited %s: a process was not asked to stop", took)
	}
	if s.after("revealed") {
		s.succeeded(t) // kubelet, which sees that one, has nothing to say about it yet
		return
	}
	if joins {
		s.counts(t, 1)
		resp, err := s.n.CreateContainer(t.Context(),
			s.pod.request(t, spec{name: "app", command: looping, grace: unneededGrace}, 1))
		must(t, err)
		_, err = s.n.StartContainer(t.Context(), &runtimeapi.StartContainerRequest{ContainerId: resp.GetContainerId()})
		must(t, err)
		if c := s.succeeded(t); c.GetSuccessorId() != resp.GetContainerId() || len(c.GetWarnings()) != 1 {
			t.Errorf("kubelet was given %s: %v", resp.GetContainerId(), c)
		}
		s.counts(t, 1)
		return
	}
	s.counts(t, 0)
	s.takenBack(t)
	s.kubeletGoesOn(t)
}

// kubeletRemoves removes the incumbent, as a kubelet does that restarts all containers of a pod.
func kubeletRemoves(t *testing.T, s *stepTest) {
	removed := make(chan error, 1)
	go func() {
		_, err := s.n.RemoveContainer(t.Context(), &runtimeapi.RemoveContainerRequest{ContainerId: s.incumbent})
		removed <- err
	}()
	select { // until the call waits for the operation
	case err := <-removed:
		removed <- err
	case <-time.After(200 * time.Millisecond):
	}
	s.hold.release()
	must(t, <-removed)
	op := s.n.wait(t, s.uid)
	if op.GetPhase() == opsv1.Phase_PHASE_SUCCEEDED {
		s.counts(t, 1)
		return
	}
	s.counts(t, 0)
	s.kubeletGoesOn(t)
}

// kubeletStopsSandbox ends the pod without having stopped its containers.
func kubeletStopsSandbox(t *testing.T, s *stepTest) {
	stopped := make(chan error, 1)
	go func() {
		_, err := s.n.StopPodSandbox(t.Context(), &runtimeapi.StopPodSandboxRequest{PodSandboxId: s.pod.sandbox})
		stopped <- err
	}()
	s.kubeletArrives(t, "StopPodSandbox")
	s.hold.release()
	must(t, <-stopped)
	s.counts(t, 0)
	if !s.after("revealed") {
		s.takenBack(t)
	}
	resp, err := s.n.PodSandboxStatus(t.Context(), &runtimeapi.PodSandboxStatusRequest{PodSandboxId: s.pod.sandbox})
	must(t, err)
	if resp.GetStatus().GetState() != runtimeapi.PodSandboxState_SANDBOX_NOTREADY {
		t.Errorf("sandbox: %v", resp.GetStatus())
	}
}

// kubeletArrives waits until the operation knows that it has to yield to a call.
func (s *stepTest) kubeletArrives(t *testing.T, method string) {
	t.Helper()
	if s.after("revealed") {
		return // nothing yields any more
	}
	s.logged(t, s.pod.uid, method)
}

// logged waits for a line of the proxy's log with these parts.
func (s *stepTest) logged(t *testing.T, parts ...string) {
	t.Helper()
	eventually(t, "the proxy says so", func() bool {
		log, err := os.ReadFile(filepath.Join(s.n.dir, "log"))
		must(t, err)
		for line := range strings.Lines(string(log)) {
			if !slices.ContainsFunc(parts, func(part string) bool { return !strings.Contains(line, part) }) {
				return true
			}
		}
		return false
	})
}

// kubeletGoesOn creates and starts the next attempt, which nothing is in the way of.
func (s *stepTest) kubeletGoesOn(t *testing.T) {
	t.Helper()
	resp, err := s.n.CreateContainer(t.Context(), s.pod.request(t, spec{name: "app", command: looping}, 1))
	must(t, err)
	_, err = s.n.StartContainer(t.Context(), &runtimeapi.StartContainerRequest{ContainerId: resp.GetContainerId()})
	must(t, err)
	s.counts(t, 1)
}

// takenBack checks that the restart has given way.
func (s *stepTest) takenBack(t *testing.T) {
	t.Helper()
	op := s.n.wait(t, s.uid)
	if op.GetPhase() != opsv1.Phase_PHASE_FAILED || op.GetContainers()[0].GetReason() != "TakenBackByKubelet" {
		t.Errorf("operation: %v", op)
	}
}

// succeeded checks a restart that nothing has come in the way of.
func (s *stepTest) succeeded(t *testing.T) *opsv1.ContainerOperation {
	t.Helper()
	op := s.n.wait(t, s.uid)
	if op.GetPhase() != opsv1.Phase_PHASE_SUCCEEDED {
		t.Fatalf("operation: %v", op)
	}
	s.counts(t, 1)
	return op.GetContainers()[0]
}

// counts checks what runs, as the runtime tells and as kubelet sees it, and that nothing is hidden.
func (s *stepTest) counts(t *testing.T, want int) {
	t.Helper()
	running, all := s.pod.running(t, s.n.direct, "app")
	if running != want {
		t.Errorf("%d running of %d, want %d", running, all, want)
	}
	if shown, listed := s.pod.running(t, s.n.kubelet, "app"); shown != running || listed != all {
		t.Errorf("kubelet sees %d running of %d, the runtime has %d of %d", shown, listed, running, all)
	}
}

// TestResourcesOfClones pins a container to a CPU, as kubelet's static CPU manager does after the
// start, and gives it devices, of the host and by CDI. Each successor has what its predecessor had,
// however often.
func TestResourcesOfClones(t *testing.T) {
	const spec1 = `{"cdiVersion":"0.6.0","kind":"test.example/device","devices":[{"name":"one","containerEdits":{
		"env":["FROM_CDI=yes"],"deviceNodes":[{"path":"/dev/by-cdi","hostPath":"/dev/null"}]}}]}`
	must(t, os.WriteFile(filepath.Join(filepath.Dir(bed.dir), "cdi", "test.json"), []byte(spec1), 0o600))
	n := startNode(t)
	p := n.runPod(t)
	req := p.request(t, spec{name: "app", command: looping}, 0)
	req.Config.Devices = []*runtimeapi.Device{{ContainerPath: "/dev/of-host", HostPath: "/dev/zero", Permissions: "r"}}
	req.Config.CDIDevices = []*runtimeapi.CDIDevice{{Name: "test.example/device=one"}}
	req.Config.Linux.Resources.CpusetCpus = "0-1"
	created, err := n.CreateContainer(t.Context(), req)
	must(t, err)
	id := created.GetContainerId()
	_, err = n.StartContainer(t.Context(), &runtimeapi.StartContainerRequest{ContainerId: id})
	must(t, err)
	_, err = n.UpdateContainerResources(t.Context(),
		&runtimeapi.UpdateContainerResourcesRequest{ContainerId: id,
			Linux: &runtimeapi.LinuxContainerResources{CpusetCpus: "1"}})
	must(t, err)
	attempt := 0
	tell := func() string {
		p.began(t, "app", attempt) // until then /proc/1 is the runtime's
		resp, err := n.ExecSync(t.Context(), &runtimeapi.ExecSyncRequest{
			ContainerId: id, Timeout: 10,
			Cmd: []string{"sh", "-c",
				"ls -ln /dev/by-cdi /dev/of-host | awk '{print $1, $3, $4, $5, $6, $NF}'; head -c1 /dev/of-host | wc " +
					"-c; tr '\\000' '\\n' < /proc/1/environ | sort"},
		})
		must(t, err)
		return string(resp.GetStdout()) + string(resp.GetStderr())
	}
	first := tell()
	for _, want := range []string{"FROM_CDI=yes", "/dev/by-cdi", "/dev/of-host"} {
		if !strings.Contains(first, want) {
			t.Fatalf("%s is not in\n%s", want, first)
		}
	}
	for i := range 3 {
		op := n.restart(t, p, restartOf("app"))
		if op.GetPhase() != opsv1.Phase_PHASE_SUCCEEDED {
			t.Fatalf("operation: %v", op)
		}
		id = op.GetContainers()[0].GetSuccessorId()
		attempt++
		p.began(t, "app", attempt)
		if got := cpus(t, n.kubelet, id); got != "1" {
			t.Errorf("restart %d: the kernel lets it run on CPUs %s", i, got)
		}
		if got := n.status(t, id).GetResources().GetLinux(); got.GetCpusetCpus() != "1" || got.GetCpuShares() != 100 ||
			got.GetMemoryLimitInBytes() != 64<<20 {
			t.Errorf("restart %d: resources %v", i, got)
		}
		gates, err := n.ExecSync(t.Context(),
			&runtimeapi.ExecSyncRequest{ContainerId: id, Timeout: 10,
				Cmd: []string{"grep", "-c", "/dev/.cri-proxy ", "/proc/1/mountinfo"}})
		must(t, err)
		if got := strings.TrimSpace(string(gates.GetStdout())); got != "1" {
			t.Errorf("restart %d: it has been given %s gates", i, got)
		}
		if got := tell(); got != first {
			t.Errorf("restart %d: it was\n%s\nand is\n%s", i, first, got)
		}
	}
}

// TestResourcesChangedPastTheProxy changes a container's resources at the runtime itself, as
// kubelet does while the proxy is bypassed. The successor has what the kernel gave the incumbent
// last, and not what the proxy has recorded.
func TestResourcesChangedPastTheProxy(t *testing.T) {
	for name, before := range map[string]*runtimeapi.LinuxContainerResources{
		"nothing recorded since":      nil,
		"another cpuset by the proxy": {CpusetCpus: "0", MemoryLimitInBytes: 80 << 20},
	} {
		t.Run(name, func(t *testing.T) {
			n := startNode(t)
			p := n.runPod(t)
			req := p.request(t, spec{name: "app", command: looping}, 0)
			req.Config.Linux.Resources.CpusetCpus = "0-1"
			req.Config.Linux.Resources.CpuQuota, req.Config.Linux.Resources.CpuPeriod = 50_000, 100_000
			created, err := n.CreateContainer(t.Context(), req)
			must(t, err)
			id := created.GetContainerId()
			_, err = n.StartContainer(t.Context(), &runtimeapi.StartContainerRequest{ContainerId: id})
			must(t, err)
			p.began(t, "app", 0)
			update := func(k *kubelet, r *runtimeapi.LinuxContainerResources) {
				t.Helper()
				_, err := k.UpdateContainerResources(t.Context(),
					&runtimeapi.UpdateContainerResourcesRequest{ContainerId: id, Linux: r})
				must(t, err)
			}
			if before != nil {
				update(n.kubelet, before)
			}
			update(n.direct, &runtimeapi.LinuxContainerResources{CpusetCpus: "1", MemoryLimitInBytes: 96 << 20,
				CpuQuota: 70_000})
			was := n.inKernel(t, id)
			if !strings.HasPrefix(was, "1 100663296 70000 100000 ") {
				t.Fatalf("the kernel has %s", was)
			}
			for attempt := 1; attempt <= 2; attempt++ {
				op := n.restart(t, p, restartOf("app"))
				if op.GetPhase() != opsv1.Phase_PHASE_SUCCEEDED {
					t.Fatalf("operation: %v", op)
				}
				id = op.GetContainers()[0].GetSuccessorId()
				p.began(t, "app", attempt)
				if got := n.inKernel(t, id); got != was {
					t.Errorf("restart %d: the kernel has %s, want %s", attempt, got, was)
				}
			}
		})
	}
}

// inKernel is what the kernel has of a container's resources: cpuset, memory limit, CPU quota,
// period and shares.
func (k *kubelet) inKernel(t testing.TB, id string) string {
	t.Helper()
	resp, err := k.ContainerStatus(t.Context(), &runtimeapi.ContainerStatusRequest{ContainerId: id, Verbose: true})
	must(t, err)
	var info struct {
		PID int `json:"pid"`
	}
	must(t, json.Unmarshal([]byte(resp.GetInfo()["info"]), &info))
	groups, err := os.ReadFile(fmt.Sprintf("/proc/%d/cgroup", info.PID))
	must(t, err)
	files := []string{"cpuset/cpuset.cpus", "memory/memory.limit_in_bytes", "cpu/cpu.cfs_quota_us",
		"cpu/cpu.cfs_period_us", "cpu/cpu.shares"}
	if cgroupV2() {
		files = []string{"/cpuset.cpus", "/memory.max", "/cpu.max", "/cpu.weight"}
	}
	var told []string
	for _, file := range files {
		controller, name, _ := strings.Cut(file, "/")
		at := ""
		for line := range strings.Lines(string(groups)) {
			if f := strings.SplitN(strings.TrimSpace(line), ":", 3); slices.Contains(strings.Split(f[1], ","),
				controller) {
				at = f[2]
			}
		}
		b, err := os.ReadFile(filepath.Join("/sys/fs/cgroup", controller, at, name))
		must(t, err)
		told = append(told, strings.TrimSpace(string(b)))
	}
	return strings.Join(told, " ")
}
