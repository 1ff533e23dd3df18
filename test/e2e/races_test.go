// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package e2e

import (
	"bufio"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	"k8s.io/client-go/tools/clientcmd"
	"k8s.io/client-go/tools/remotecommand"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"
	"sigs.k8s.io/controller-runtime/pkg/client"

	appsv1alpha1 "github.com/cri-proxy/cri-proxy/api/apps/v1alpha1"
	opsv1 "github.com/cri-proxy/cri-proxy/api/ops/v1"
)

// held is a restart that waits at a failpoint of the proxy.
type held struct {
	t   testing.TB
	dir string
}

// scratchDir returns a new directory that goes with the run.
func scratchDir(t testing.TB, name string) string {
	t.Helper()
	dir, err := os.MkdirTemp(filepath.Dir(calls), name+"-")
	must(t, err)
	must(t, os.Chmod(dir, 0o777)) // containers of any user write there
	return dir
}

// hold restarts the proxy so that the next restart waits at the point until it is released.
func hold(t testing.TB, point string) *held {
	t.Helper()
	return holdAt(t, "restart."+point)
}

// holdAt is hold for operations of any kind.
func holdAt(t testing.TB, point string) *held {
	t.Helper()
	h := &held{t: t, dir: scratchDir(t, "hold")}
	setFailpoint(t, point+"=pause:"+h.dir)
	restartProxy(t, syscall.SIGTERM)
	setFailpoint(t, "")
	t.Cleanup(h.release) // a test that fails on the way must not leave the proxy stuck
	return h
}

// reached waits until a restart is at the point.
func (h *held) reached() {
	h.t.Helper()
	eventually(h.t, "the restart has come to the failpoint", func() bool {
		_, err := os.Stat(filepath.Join(h.dir, "reached"))
		return err == nil
	})
}

// release lets the restart go on.
func (h *held) release() {
	h.t.Helper()
	must(h.t, os.WriteFile(filepath.Join(h.dir, "go"), nil, 0o600))
}

// opsClient talks to the node over the admin socket, and waits for a proxy that is away.
func opsClient(t testing.TB) opsv1.OpsClient {
	t.Helper()
	return opsv1.NewOpsClient(adminConn(t))
}

func adminConn(t testing.TB) *grpc.ClientConn {
	t.Helper()
	conn, err := grpc.NewClient("unix://"+bed.AdminSocket, grpc.WithTransportCredentials(insecure.NewCredentials()),
		grpc.WithDefaultCallOptions(grpc.WaitForReady(true)))
	must(t, err)
	t.Cleanup(func() { _ = conn.Close() })
	return conn
}

// account waits for the end of the operation that a request has on the node for one container, and
// returns its account.
func account(t testing.TB, crr *appsv1alpha1.ContainerRecreateRequest, name string) *opsv1.ContainerOperation {
	t.Helper()
	node := opsClient(t)
	var op *opsv1.Operation
	eventually(t, "the operation has ended", func() bool {
		var err error
		op, err = node.GetOperation(t.Context(), &opsv1.GetOperationRequest{Uid: string(crr.UID) + "." + name})
		must(t, err)
		return op.GetFinishTime() != nil
	})
	return op.GetContainers()[0]
}

// runtimeClient talks to containerd around the proxy.
func runtimeClient(t testing.TB) runtimeapi.RuntimeServiceClient {
	t.Helper()
	conn, err := bed.DialRuntime()
	must(t, err)
	t.Cleanup(func() { _ = conn.Close() })
	return runtimeapi.NewRuntimeServiceClient(conn)
}

// succeededAll checks that the request has completed and that every container of it has been
// restarted.
func succeededAll(t testing.TB, ns, name string) *appsv1alpha1.ContainerRecreateRequest {
	t.Helper()
	crr := completed(t, ns, name)
	if len(crr.Status.ContainerRecreateStates) != len(crr.Spec.Containers) {
		t.Fatalf("request %s: %+v", name, crr.Status)
	}
	for _, s := range crr.Status.ContainerRecreateStates {
		if s.Phase != appsv1alpha1.ContainerRecreateRequestSucceeded {
			t.Fatalf("request %s: %+v", name, crr.Status)
		}
	}
	return crr
}

// events returns what has been told about an object, "reason message" by line.
func events(t testing.TB, ns, name string) string {
	t.Helper()
	list := &corev1.EventList{}
	must(t, api.List(t.Context(), list, client.InNamespace(ns)))
	var out []string
	for _, e := range list.Items {
		if e.InvolvedObject.Name == name {
			out = append(out, e.Reason+" "+e.Message)
		}
	}
	return strings.Join(out, "\n")
}

// traced is a pod whose container app writes into a directory of the host when it starts and when
// it is asked to stop.
func traced(ns, name, dir string) string {
	return fmt.Sprintf(`
apiVersion: v1
kind: Pod
metadata: {name: %[1]s, namespace: %[2]s}
spec:
  terminationGracePeriodSeconds: %[5]d
  containers:
  - name: app
    image: "%[3]s"
    command: [sh, -c, 'trap "echo asked \$id >> /trace/%[1]s; exit 0" TERM; id=$(cat /proc/sys/kernel/random/uuid); echo began $id >> /trace/%[1]s; while :; do sleep 0.1; done']
    volumeMounts: [{name: trace, mountPath: /trace}]
  volumes: [{name: trace, hostPath: {path: "%[4]s"}}]
---
`, name, ns, bed.Image("busybox:1.0"), dir, tracedGrace/time.Second)
}

// tracedGrace is far longer than the process takes to end when it is asked to.
const tracedGrace = 40 * time.Second

// TestPodDeletedDuringRestart deletes the pod while a restart of its container is at a step. The
// pod goes away within its grace; every process that had begun has been asked to stop, and nothing
// is left.
func TestPodDeletedDuringRestart(t *testing.T) {
	ns := namespace(t)
	dir := scratchDir(t, "trace")
	points := []string{"created", "staged", "stop", "gated", "stopped", "running", "started", "reveal", "revealed"}
	pods := ""
	for _, point := range points {
		pods += traced(ns, point, dir)
	}
	apply(t, pods)
	// All before the first hold, which restarts the proxy: kubelet must not be starting a pod then.
	for _, point := range points {
		ready(t, ns, point)
	}
	for _, point := range points {
		t.Run(point, func(t *testing.T) {
			pod := ready(t, ns, point)
			h := hold(t, point)
			apply(t, recreate(ns, point, point, "containers: [{name: app}]"))
			h.reached()
			processes := 1
			if slices.Index(points, point) >= slices.Index(points, "running") {
				processes = 2
			}
			// Before it has said how to stop it, the first process of a container takes no notice
			// of being asked.
			eventually(t, "the processes listen to signals", func() bool {
				log, err := os.ReadFile(filepath.Join(dir, point))
				return err == nil && strings.Count(string(log), "began ") == processes
			})
			began := time.Now()
			kubectl(t, "-n", ns, "delete", "pod", point, "--wait=false")
			eventually(t, "kubelet is stopping the container",
				func() bool { return strings.Contains(events(t, ns, point), "Killing") })
			h.release()
			eventually(t, "the pod is gone", func() bool {
				return apierrors.IsNotFound(api.Get(t.Context(), client.ObjectKeyFromObject(pod), &corev1.Pod{}))
			})
			if took := time.Since(began); took > tracedGrace {
				t.Errorf("the pod took %s to go, its process ends when asked", took)
			}
			log, err := os.ReadFile(filepath.Join(dir, point))
			must(t, err)
			for line := range strings.Lines(string(log)) {
				if id, ok := strings.CutPrefix(line, "began "); ok && !strings.Contains(string(log), "asked "+id) {
					t.Errorf("a process was killed without being asked to stop:\n%s", log)
				}
			}
			completed(t, ns, point)
			assertNothingLeft(t, pod)
		})
	}
}

// assertNoGates checks that the proxy has nothing left of gates that were opened or given up. An
// operation that has been taken up again removes its gate at its end.
func assertNoGates(t testing.TB) {
	t.Helper()
	eventually(t, "no gate is left", func() bool {
		left, err := filepath.Glob(filepath.Join(bed.StateDir, "gates", "*", "*"))
		must(t, err)
		return !slices.ContainsFunc(left, func(path string) bool {
			info, err := os.Lstat(path)
			return err == nil && info.Mode()&os.ModeNamedPipe != 0
		})
	})
}

// assertNothingLeft waits until no operation is at work on the node, and checks that the runtime
// has nothing of the pod but what has ended.
func assertNothingLeft(t testing.TB, pod *corev1.Pod) {
	t.Helper()
	node := opsClient(t)
	eventually(t, "no operation is left on the node", func() bool {
		info, err := node.NodeInfo(t.Context(), &opsv1.NodeInfoRequest{})
		must(t, err)
		return len(info.GetActiveSlots()) == 0
	})
	list, err := runtimeClient(t).
		ListContainers(t.Context(), &runtimeapi.ListContainersRequest{Filter: &runtimeapi.ContainerFilter{
			LabelSelector: map[string]string{"io.kubernetes.pod.uid": string(pod.UID)},
		}})
	must(t, err)
	for _, c := range list.GetContainers() {
		if c.GetState() != runtimeapi.ContainerState_CONTAINER_EXITED {
			t.Errorf("left behind: %v", c)
		}
	}
	assertNoGates(t)
}

// probed is a pod whose probes fail, or are answered by nobody, while its containers do not run.
func probed(ns string) string {
	return fmt.Sprintf(`
apiVersion: v1
kind: Pod
metadata: {name: probed, namespace: %s}
spec:
  terminationGracePeriodSeconds: 3
  containers:
  - name: exec
    image: "%s"
    command: [sh, -c, "trap exit TERM; while :; do sleep 0.1; done"]
    livenessProbe: {exec: {command: ["true"]}, periodSeconds: 1, timeoutSeconds: 10, failureThreshold: 1}
  - name: http
    image: "%s"
    livenessProbe: {httpGet: {path: /healthz, port: 8080}, initialDelaySeconds: 3, periodSeconds: 1, timeoutSeconds: 10, failureThreshold: 1}
`, ns, bed.Image("busybox:1.0"), bed.Image("app:1"))
}

// TestLivenessDuringRestart lets liveness probes fail while the old container has stopped and the
// new one does not run yet. Exec probes are answered so that kubelet takes nothing from it. Http
// probes go past the proxy: kubelet stops the container too, which joins the restart, and exactly
// one runs.
func TestLivenessDuringRestart(t *testing.T) {
	ns := namespace(t)
	apply(t, probed(ns))
	pod := ready(t, ns, "probed")

	h := hold(t, "stopped")
	_, probedID, _ := strings.Cut(container(t, pod, "exec").ContainerID, "://")
	discarded := func() (n int) {
		for _, c := range kubeletCalls(t, "ExecSync") {
			if c.ContainerID == probedID && c.Code == "Unavailable" {
				n++
			}
		}
		return n
	}
	apply(t, recreate(ns, "exec", "probed", "containers: [{name: exec}]"))
	h.reached()
	eventually(t, "kubelet has probed twice", func() bool { return discarded() >= 2 })
	h.release()
	succeededAll(t, ns, "exec")
	assertKubeletDidNothing(t, ns, "probed", "exec")

	h = hold(t, "stopped")
	apply(t, recreate(ns, "http", "probed", "containers: [{name: http}]"))
	h.reached()
	eventually(t, "kubelet finds the container dead", func() bool {
		return strings.Contains(events(t, ns, "probed"), "Container http failed liveness probe")
	})
	h.release()
	crr := completed(t, ns, "http")
	t.Logf("request: %+v", crr.Status)
	if c := account(t, crr, "http"); c.GetPhase() != opsv1.Phase_PHASE_SUCCEEDED {
		t.Errorf("operation: %v", c)
	}
	eventually(t, "the container runs again", func() bool {
		c := container(t, getPod(t, ns, "probed"), "http")
		return c.Ready && c.ContainerID != container(t, pod, "http").ContainerID
	})
	assertOneRunning(t, string(pod.UID), "http")
	if c := container(t, getPod(t, ns, "probed"), "exec"); c.RestartCount != 1 {
		t.Errorf("the neighbour was restarted: %+v", c)
	}
}

// assertOneRunning waits until of a slot's containers, around the proxy, one runs and none has only
// been created: a process runs a moment before the runtime says so. Two that run are one too many
// at any time.
func assertOneRunning(t testing.TB, podUID, name string) {
	t.Helper()
	cri := runtimeClient(t)
	eventually(t, "one container of "+name+" runs and none waits", func() bool {
		list, err := cri.ListContainers(t.Context(), &runtimeapi.ListContainersRequest{
			Filter: &runtimeapi.ContainerFilter{LabelSelector: map[string]string{"io.kubernetes.pod.uid": podUID,
				"io.kubernetes.container.name": name}},
		})
		must(t, err)
		running, others := 0, 0
		for _, c := range list.GetContainers() {
			switch c.GetState() {
			case runtimeapi.ContainerState_CONTAINER_RUNNING:
				running++
			case runtimeapi.ContainerState_CONTAINER_EXITED:
			default:
				others++
			}
		}
		if running > 1 {
			t.Fatalf("%d containers of %s run: %v", running, name, list.GetContainers())
		}
		return running == 1 && others == 0
	})
}

// session is a kubectl that stays connected.
type session struct {
	stdin io.WriteCloser
	out   *lockedBuffer
	ended chan struct{}
}

// lockedBuffer collects what a process writes.
type lockedBuffer struct {
	mu  sync.Mutex
	buf strings.Builder // guarded by mu
}

func (b *lockedBuffer) Write(p []byte) (int, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.buf.Write(p)
}

func (b *lockedBuffer) String() string {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.buf.String()
}

// connect runs kubectl until its session ends.
func connect(t testing.TB, args ...string) *session {
	t.Helper()
	cmd := exec.CommandContext(t.Context(), filepath.Join(bed.Bin, "kubectl"), args...)
	cmd.Env = append(os.Environ(), "KUBECONFIG="+bed.Kubeconfig)
	s := &session{out: &lockedBuffer{}, ended: make(chan struct{})}
	cmd.Stdout, cmd.Stderr = s.out, s.out
	var err error
	s.stdin, err = cmd.StdinPipe()
	must(t, err)
	must(t, cmd.Start())
	go func() { // ends with the process, at the latest with the test
		defer close(s.ended)
		_ = cmd.Wait()
	}()
	return s
}

// attachTerminal is kubectl attach -it, which wants a terminal of its own to be called from.
func attachTerminal(t testing.TB, ns, pod, name string) *session {
	t.Helper()
	config, err := clientcmd.BuildConfigFromFlags("", bed.Kubeconfig)
	must(t, err)
	u, err := url.Parse(
		fmt.Sprintf("%s/api/v1/namespaces/%s/pods/%s/attach?container=%s&stdin=true&stdout=true&tty=true",
			bed.APIServer, ns, pod, name))
	must(t, err)
	executor, err := remotecommand.NewSPDYExecutor(config, http.MethodPost, u)
	must(t, err)
	r, w := io.Pipe()
	s := &session{stdin: w, out: &lockedBuffer{}, ended: make(chan struct{})}
	go func() { // ends with the container, at the latest with the test
		defer close(s.ended)
		_ = executor.StreamWithContext(t.Context(), remotecommand.StreamOptions{Stdin: r, Stdout: s.out, Tty: true})
		_ = r.Close()
	}()
	return s
}

// TestSessionsDuringRestart restarts two containers, one of them with a terminal, while kubectl
// exec and attach are open. The sessions end with the container they belong to, and new ones lead
// to the new container.
func TestSessionsDuringRestart(t *testing.T) {
	t.Parallel()
	ns := namespace(t)
	listening :=
		`[sh, -c, 'trap "echo leaving; exit 0" TERM; n=$(cat /proc/sys/kernel/random/uuid); echo first $n; while :; do read -t 1 line && echo heard $line by $n; done']`
	apply(t, fmt.Sprintf(`
apiVersion: v1
kind: Pod
metadata: {name: shell, namespace: %[1]s}
spec:
  terminationGracePeriodSeconds: 2
  containers:
  - {name: pipe, image: "%[2]s", stdin: true, command: %[3]s}
  - {name: terminal, image: "%[2]s", stdin: true, tty: true, command: %[3]s}
`, ns, bed.Image("busybox:1.0"), listening))
	ready(t, ns, "shell")
	name := func(container string) string {
		var name string
		eventually(t, "the process of "+container+" has told its name", func() bool {
			_, rest, _ := strings.Cut(kubectl(t, "-n", ns, "logs", "shell", "-c", container), "first ")
			var whole bool
			name, _, whole = strings.Cut(rest+"\n", "\n")
			name = strings.TrimSpace(name)
			return whole && name != ""
		})
		return name
	}
	open := func(mark string) map[string]*session {
		sessions := map[string]*session{
			"exec":     connect(t, "-n", ns, "exec", "-i", "shell", "-c", "pipe", "--", "cat"),
			"pipe":     connect(t, "-n", ns, "attach", "-i", "shell", "-c", "pipe"),
			"terminal": attachTerminal(t, ns, "shell", "terminal"),
		}
		for what, s := range sessions {
			heard := mark
			if what != "exec" {
				heard = "heard " + mark + " by " + name(what)
			}
			eventually(t, what+" hears what is typed", func() bool {
				_, err := io.WriteString(s.stdin, mark+"\n")
				return err == nil && strings.Contains(s.out.String(), heard)
			})
		}
		return sessions
	}
	old := map[string]string{"pipe": name("pipe"), "terminal": name("terminal")}
	sessions := open("one")
	apply(t, recreate(ns, "restart", "shell", "containers: [{name: pipe}, {name: terminal}]"))
	succeededAll(t, ns, "restart")
	for what, s := range sessions {
		select {
		case <-s.ended:
		case <-time.After(time.Minute):
			t.Errorf("%s did not end with the container: %q", what, s.out)
		}
	}
	for container, old := range old {
		if now := name(container); now == old || now == "" {
			t.Errorf("the new process of %s calls itself %q, the old one %q", container, now, old)
		}
	}
	for _, s := range open("two") {
		must(t, s.stdin.Close())
	}
	assertKubeletDidNothing(t, ns, "shell", "pipe")
	assertKubeletDidNothing(t, ns, "shell", "terminal")
}

// TestResizeDuringRestart resizes a container in place, once while its successor waits and once
// while it has stopped and is masked. The successor has the new limits, in its status and in the
// kernel.
func TestResizeDuringRestart(t *testing.T) {
	ns := namespace(t)
	apply(t, fmt.Sprintf(`
apiVersion: v1
kind: Pod
metadata: {name: sized, namespace: %s}
spec:
  terminationGracePeriodSeconds: 2
  containers:
  - name: app
    image: "%s"
    command: [sh, -c, "trap exit TERM; while :; do sleep 0.1; done"]
    resources: {requests: {cpu: 50m, memory: 32Mi}, limits: {cpu: 200m, memory: 64Mi}}
`, ns, bed.Image("busybox:1.0")))
	pod := ready(t, ns, "sized")
	resize := func(cpu string) {
		kubectl(t, "-n", ns, "patch", "pod", "sized", "--subresource", "resize", "--patch",
			fmt.Sprintf(`{"spec":{"containers":[{"name":"app","resources":{"limits":{"cpu":%q}}}]}}`, cpu))
	}
	updates := func() int { return len(kubeletCalls(t, "UpdateContainerResources")) }
	for i, tc := range []struct {
		point, cpu string
		quota      int64
	}{{"staged", "300m", 30000}, {"stopped", "400m", 40000}} {
		t.Run(tc.point, func(t *testing.T) {
			h := hold(t, tc.point)
			apply(t, recreate(ns, tc.point, "sized", "containers: [{name: app}]"))
			h.reached()
			since := updates()
			resize(tc.cpu)
			eventually(t, "kubelet has resized the container", func() bool { return updates() > since })
			h.release()
			succeededAll(t, ns, tc.point)
			if quota := cpuQuota(t, pod, "app"); quota != tc.quota {
				t.Errorf("the kernel gives the new process a quota of %d, want %d", quota, tc.quota)
			}
			eventually(t, "the pod's status has the new limit", func() bool {
				c := container(t, getPod(t, ns, "sized"), "app")
				return c.Resources != nil && c.Resources.Limits.Cpu().String() == tc.cpu
			})
			if c := container(t, getPod(t, ns, "sized"), "app"); c.RestartCount != int32(i+1) {
				t.Errorf("restarts: %d", c.RestartCount)
			}
		})
	}
	// And one without a resize on the way: the successor of a resized container is its like.
	apply(t, recreate(ns, "again", "sized", "containers: [{name: app}]"))
	succeededAll(t, ns, "again")
	if quota := cpuQuota(t, pod, "app"); quota != 40000 {
		t.Errorf("the next one has a quota of %d, want 40000", quota)
	}
	assertKubeletDidNothing(t, ns, "sized", "app")
}

// cpuQuota returns what the kernel allows the running container, in µs per 100 ms.
func cpuQuota(t testing.TB, pod *corev1.Pod, name string) int64 {
	t.Helper()
	list, err := runtimeClient(t).
		ListContainers(t.Context(), &runtimeapi.ListContainersRequest{Filter: &runtimeapi.ContainerFilter{
			State: &runtimeapi.ContainerStateValue{State: runtimeapi.ContainerState_CONTAINER_RUNNING},
			LabelSelector: map[string]string{"io.kubernetes.pod.uid": string(pod.UID),
				"io.kubernetes.container.name": name},
		}})
	must(t, err)
	if len(list.GetContainers()) != 1 {
		t.Fatalf("running: %v", list.GetContainers())
	}
	// The container's cgroup is named after it, wherever kubelet has put the pod's.
	for _, pattern := range []string{"cpu/%s/*/*/*/%s/cpu.cfs_quota_us", "cpu/%s/*/*/%s/cpu.cfs_quota_us",
		"%s/*/*/*/%s/cpu.max", "%s/*/*/%s/cpu.max"} {
		files, err := filepath.Glob(filepath.Join("/sys/fs/cgroup",
			fmt.Sprintf(pattern, strings.Trim(bed.CgroupParent, "/"), list.GetContainers()[0].GetId())))
		must(t, err)
		if len(files) != 1 {
			continue
		}
		f, err := os.Open(files[0])
		must(t, err)
		defer func() { _ = f.Close() }()
		words := bufio.NewScanner(f)
		words.Split(bufio.ScanWords)
		words.Scan()
		quota, err := strconv.ParseInt(words.Text(), 10, 64)
		must(t, err)
		return quota
	}
	t.Fatalf("the cgroup of container %s is not found", list.GetContainers()[0].GetId())
	return 0
}

// TestKubeletRestartDuringRestart starts kubelet anew while a restart has staged its container, and
// while the old one has stopped and is masked. The new kubelet finds a running container each time
// and leaves it alone.
func TestKubeletRestartDuringRestart(t *testing.T) {
	ns := namespace(t)
	apply(t, threeContainers(ns, "my-pod", corev1.RestartPolicyNever))
	before := ready(t, ns, "my-pod")
	seen := watchPhases(t, ns, "my-pod", string(before.UID))
	for i, point := range []string{"staged", "stopped"} {
		t.Run(point, func(t *testing.T) {
			h := hold(t, point)
			apply(t, recreate(ns, point, "my-pod", "containers: [{name: app}]"))
			h.reached()
			restartKubelet(t, syscall.SIGTERM)
			since := len(kubeletCalls(t, "ListContainers"))
			eventually(t, "the new kubelet has looked at its pods", func() bool {
				return len(kubeletCalls(t, "ListContainers")) > since+2
			})
			h.release()
			succeededAll(t, ns, point)
			if c := container(t, getPod(t, ns, "my-pod"), "app"); c.RestartCount != int32(i+1) ||
				c.State.Running == nil {
				t.Errorf("container app: %+v", c)
			}
			assertOneRunning(t, string(before.UID), "app")
		})
	}
	if bad := seen.bad(); len(bad) > 0 {
		t.Errorf("the pod was not running all the time:\n%s", strings.Join(bad, "\n"))
	}
	assertKubeletDidNothing(t, ns, "my-pod", "app")
}

// TestTwoRequestsOnePod sends requests for two containers of one pod at the same time. Both
// complete, independent of each other: one is held, the other is not.
func TestTwoRequestsOnePod(t *testing.T) {
	ns := namespace(t)
	hook := newHeldHook(t)
	apply(t, hook.preStop(threeContainers(ns, "my-pod", corev1.RestartPolicyAlways)))
	ready(t, ns, "my-pod")
	apply(t, recreate(ns, "slow", "my-pod", "containers: [{name: app}]")+"---"+recreate(ns, "quick", "my-pod",
		"containers: [{name: two}]"))
	<-hook.reached
	succeededAll(t, ns, "quick")
	slow := &appsv1alpha1.ContainerRecreateRequest{}
	must(t, api.Get(t.Context(), client.ObjectKey{Namespace: ns, Name: "slow"}, slow))
	if slow.Status.Phase == appsv1alpha1.ContainerRecreateRequestCompleted {
		t.Errorf("the slow one completed before the quick one: %+v", slow.Status)
	}
	hook.release()
	succeededAll(t, ns, "slow")
	for name, restarts := range map[string]int32{"app": 1, "two": 1, "three": 0} {
		if n := container(t, getPod(t, ns, "my-pod"), name).RestartCount; n != restarts {
			t.Errorf("container %s has restarted %d times, want %d", name, n, restarts)
		}
	}
	for _, name := range []string{"app", "two"} {
		assertKubeletDidNothing(t, ns, "my-pod", name)
	}
}
