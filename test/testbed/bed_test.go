// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package testbed

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"
)

// real skips a test that runs real beds unless TESTBED=1 is set: it needs root, and builds the
// components for minutes the first time.
func real(t *testing.T) {
	t.Helper()
	if os.Getenv("TESTBED") == "" {
		t.Skip("set TESTBED=1 to run real beds")
	}
}

func startBed(t *testing.T, o Options) *Bed {
	t.Helper()
	o.Log, o.KeepLogs = os.Stderr, t.Failed
	b, err := Start(t.Context(), o)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := b.Close(context.Background()); err != nil {
			t.Error(err)
		}
	})
	return b
}

// within bounds what the test waits for.
func within(t *testing.T) context.Context {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 2*time.Minute)
	t.Cleanup(cancel)
	return ctx
}

// runPod runs an app:1 pod through CRI and returns its address.
func runPod(ctx context.Context, b *Bed, name string) (string, error) {
	conn, err := b.DialCRI()
	if err != nil {
		return "", err
	}
	defer conn.Close()
	rt, images := runtimeapi.NewRuntimeServiceClient(conn), runtimeapi.NewImageServiceClient(conn)
	image := &runtimeapi.ImageSpec{Image: "nginx:latest"} // a name of another registry
	if _, err := images.PullImage(ctx, &runtimeapi.PullImageRequest{Image: image}); err != nil {
		return "", err
	}
	sandbox := &runtimeapi.PodSandboxConfig{
		Metadata:     &runtimeapi.PodSandboxMetadata{Name: name, Uid: name, Namespace: "default"},
		LogDirectory: filepath.Join(b.PodLogs, name),
		Linux:        &runtimeapi.LinuxPodSandboxConfig{CgroupParent: b.CgroupParent},
	}
	pod, err := rt.RunPodSandbox(ctx, &runtimeapi.RunPodSandboxRequest{Config: sandbox})
	if err != nil {
		return "", err
	}
	c, err := rt.CreateContainer(ctx, &runtimeapi.CreateContainerRequest{PodSandboxId: pod.PodSandboxId,
		SandboxConfig: sandbox, Config: &runtimeapi.ContainerConfig{
			Metadata: &runtimeapi.ContainerMetadata{Name: "app"}, Image: image, LogPath: "app.log",
		}})
	if err != nil {
		return "", err
	}
	if _, err := rt.StartContainer(ctx, &runtimeapi.StartContainerRequest{ContainerId: c.ContainerId}); err != nil {
		return "", err
	}
	status, err := rt.PodSandboxStatus(ctx, &runtimeapi.PodSandboxStatusRequest{PodSandboxId: pod.PodSandboxId})
	if err != nil {
		return "", err
	}
	addr := net.JoinHostPort(status.Status.Network.Ip, "8080")
	return addr, poll(ctx, func() error { return httpOK(ctx, oneShotClient(), "http://"+addr+"/readyz") })
}

// traces lists all that this machine still has of a bed.
func traces(t *testing.T, id, dir string) []string {
	t.Helper()
	var found []string
	l := ledger{root: runRoot}
	for _, p := range bedProcesses(record{ID: id, Dir: dir}, l.runDir(id)) {
		found = append(found, fmt.Sprintf("process %d %s", p.PID, p.Exe))
	}
	procs, _ := filepath.Glob("/proc/[0-9]*/cmdline")
	for _, p := range procs {
		if b, err := os.ReadFile(p); err == nil && (strings.Contains(string(b), "/"+id+"/") ||
			strings.Contains(string(b), "cri-proxy-test-"+id)) {
			found = append(found, p+" "+strings.ReplaceAll(string(b), "\x00", " "))
		}
	}
	mounts, err := os.ReadFile("/proc/self/mountinfo")
	if err != nil {
		t.Fatal(err)
	}
	for line := range strings.Lines(string(mounts)) {
		if strings.Contains(line, "/"+id+"/") {
			found = append(found, "mount "+strings.TrimSpace(line))
		}
	}
	interfaces, err := net.Interfaces()
	if err != nil {
		t.Fatal(err)
	}
	for _, i := range interfaces {
		if strings.Contains(i.Name, id) {
			found = append(found, "interface "+i.Name)
		}
	}
	_ = filepath.WalkDir(cgroupRoot, func(path string, d fs.DirEntry, err error) error {
		if err == nil && d.IsDir() && strings.Contains(d.Name(), id) {
			found = append(found, "cgroup "+path)
		}
		return nil
	})
	for _, pattern := range []string{"/run/cri-proxy-test/" + id, dir, "/var/lib/cni/*/*" + id + "*",
		"/run/netns/*" + id + "*"} {
		matches, _ := filepath.Glob(pattern)
		found = append(found, matches...)
	}
	links, _ := filepath.Glob(containerLogs + "/*")
	for _, link := range links {
		if target, err := os.Readlink(link); err == nil && strings.Contains(target, "/"+id+"/") {
			found = append(found, link)
		}
	}
	for _, list := range [][]string{{"iptables-save"}, {"nft", "list", "ruleset"}} {
		if out, err := exec.Command(list[0], list[1:]...).Output(); err == nil && strings.Contains(string(out), id) {
			found = append(found, "rules of "+list[0])
		}
	}
	return found
}

// hostFiles lists directories where components keep things by default, down to the second level.
func hostFiles(t *testing.T) []string {
	t.Helper()
	var all []string
	for _, dir := range []string{"/run/containerd", "/run/netns", "/run/nri", "/run/cdi", "/etc/cdi", "/etc/cni",
		"/etc/containerd", "/var/lib/cni", "/var/lib/containerd", "/opt",
		"/var/log/pods", "/var/run/kubernetes", "/usr/libexec/kubernetes"} {
		for _, pattern := range []string{dir, dir + "/*", dir + "/*/*"} {
			matches, err := filepath.Glob(pattern)
			if err != nil {
				t.Fatal(err)
			}
			all = append(all, matches...)
		}
	}
	return all
}

func requireNoTraces(t *testing.T, b *Bed, before []string) {
	t.Helper()
	if left := traces(t, b.ID, b.Dir); len(left) > 0 {
		t.Errorf("left of bed %s:\n%s", b.ID, strings.Join(left, "\n"))
	}
	for _, f := range hostFiles(t) {
		if !slices.Contains(before, f) && !strings.Contains(f, "cri-proxy-test-") { // another bed's CNI results
			t.Errorf("new on the host: %s", f)
		}
	}
}

func TestNodeBed(t *testing.T) {
	real(t)
	before := hostFiles(t)
	b := startBed(t, Options{Mode: ModeNode, Direct: true})
	if _, err := runPod(t.Context(), b, "first"); err != nil {
		t.Fatal(err)
	}
	shims, same := 0, 0
	if err := poll(within(t), func() error { // what starts a pod is gone a moment after it
		now := len(bedProcesses(b.record, b.ledger.runDir(b.ID)))
		if same++; now != shims {
			shims, same = now, 0
		}
		if same < 10 {
			return fmt.Errorf("%d processes, %d times", shims, same)
		}
		return nil
	}); err != nil {
		t.Fatal(err)
	}
	if err := b.StopContainerd(t.Context(), syscall.SIGKILL); err != nil {
		t.Fatal(err)
	}
	if err := b.StartContainerd(t.Context()); err != nil {
		t.Fatal(err)
	}
	if err := poll(within(t), func() error { // what containerd calls while it starts ends by itself
		if got := len(bedProcesses(b.record, b.ledger.runDir(b.ID))); got != shims {
			return fmt.Errorf("%d processes before containerd was killed and restarted, %d after", shims, got)
		}
		return nil
	}); err != nil {
		t.Error(err)
	}
	if err := b.StopRegistry(t.Context()); err != nil {
		t.Fatal(err)
	}
	if err := b.StartRegistry(t.Context()); err != nil {
		t.Fatal(err)
	}
	if err := b.PushLargeImage(t.Context(), "big:1", 2, 1); err != nil {
		t.Fatal(err)
	}
	crictl := exec.Command(filepath.Join(b.Bin, "crictl"), "-r", "unix://"+b.CRISocket, "pull", b.Image("big:1"))
	if out, err := crictl.CombinedOutput(); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	if len(traces(t, b.ID, b.Dir)) < 5 {
		t.Error("the search for traces finds little of a bed that runs")
	}
	if err := b.Close(t.Context()); err != nil {
		t.Fatal(err)
	}
	requireNoTraces(t, b, before)
	if err := b.StartContainerd(t.Context()); err == nil || !strings.Contains(err.Error(), "closed") {
		t.Errorf("start on a closed bed: %v", err)
	}
}

func TestClusterBed(t *testing.T) {
	real(t)
	before := hostFiles(t)
	b := startBed(t, Options{Mode: ModeCluster, Direct: true, Nodes: 2, Later: 1, Namespaces: true,
		KubeletExtra: "maxPods: 17\n"})
	ctx := within(t)
	late := b.Nodes[1]
	if out, err := b.Kubectl(ctx, "get", "nodes", "-o", "name"); err != nil ||
		strings.TrimSpace(out) != "node/"+b.NodeName {
		t.Errorf("nodes at first: %q, %v", out, err)
	}
	if err := late.Join(ctx); err != nil {
		t.Fatal(err)
	}
	here, errHere := os.Readlink("/proc/self/ns/net")
	there, errThere := os.Readlink(fmt.Sprintf("/proc/%d/ns/net", b.Pid("n1-kubelet")))
	if err := errors.Join(errHere, errThere); err != nil || here == there {
		t.Errorf("the second node's kubelet is in %s, this process in %s: %v", there, here, err)
	}
	if err := b.CreateNamespace(ctx, "here"); err != nil {
		t.Fatal(err)
	}
	for _, n := range b.Nodes {
		if err := b.KubectlApply(ctx, fmt.Sprintf(`
apiVersion: v1
kind: Pod
metadata: {name: pod-of-%[1]s, namespace: here}
spec:
  nodeName: %[1]s
  containers:
  - name: app
    image: %[2]s
    readinessProbe: {httpGet: {path: /readyz, port: 8080}, periodSeconds: 1}
`, n.NodeName, b.Image("app:2"))); err != nil {
			t.Fatal(err)
		}
	}
	if _, err := b.Kubectl(ctx, "wait", "-n", "here", "--for=condition=Ready", "pod", "--all",
		"--timeout=100s"); err != nil {
		t.Fatal(err)
	}
	for _, n := range b.Nodes {
		pod := "pod-of-" + n.NodeName
		out, err := b.Kubectl(ctx, "exec", "-n", "here", pod, "--", "/app", "call", "/?env=VERSION")
		if err != nil || !strings.Contains(out, `"VERSION":"2"`) || !strings.Contains(out, pod) {
			t.Errorf("the app answers %q, %v", out, err)
		}
		if out, err = b.Kubectl(ctx, "logs", "-n", "here", pod); err != nil ||
			!strings.Contains(out, "app version=2 listens") {
			t.Errorf("logs: %q, %v", out, err)
		}
		if out, err = b.Kubectl(ctx, "get", "node", n.NodeName, "-o",
			"jsonpath={.status.capacity.pods} {.status.addresses[0].address}"); err != nil || out != "17 "+n.BridgeIP {
			t.Errorf("node: %q, %v", out, err)
		}
	}
	if err := b.RestartKubeletReady(ctx, syscall.SIGTERM); err != nil {
		t.Error(err)
	}
	if _, err := b.Kubectl(ctx, "get", "no-such-kind"); err == nil || !strings.Contains(err.Error(), "no-such-kind") {
		t.Errorf("kubectl's error does not carry its message: %v", err)
	}
	// Pods run while it closes.
	if err := b.Close(t.Context()); err != nil {
		t.Fatal(err)
	}
	requireNoTraces(t, b, before)
}

func TestFailedStartLeavesNothing(t *testing.T) {
	real(t)
	before := ids(t, ledger{root: runRoot})
	_, err := Start(t.Context(), Options{Mode: ModeNode, Direct: true, ContainerdExtra: "this is not TOML",
		Dir: t.TempDir()})
	if err == nil || !strings.Contains(err.Error(), "toml") {
		t.Fatalf("containerd's complaint is not in the error: %v", err)
	}
	// "start bed abcde: ..."
	id := strings.TrimSuffix(strings.Fields(err.Error())[2], ":")
	if len(id) != 5 || slices.Contains(before, id) {
		t.Fatalf("no bed in %q", err)
	}
	if left := traces(t, id, "/nonexistent"); len(left) > 0 {
		t.Errorf("left: %s", strings.Join(left, "\n"))
	}
}

func TestSweepAfterKill(t *testing.T) {
	real(t)
	exe, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command(exe)
	cmd.Env = append(os.Environ(), helperEnv+"=1")
	cmd.Stderr = os.Stderr
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	line, err := bufio.NewReader(out).ReadString('\n')
	if err != nil {
		t.Fatalf("the helper started no bed: %v", errors.Join(err, cmd.Wait()))
	}
	id := strings.TrimSpace(line)
	info, err := List()
	if err != nil {
		t.Fatal(err)
	}
	i := slices.IndexFunc(info, func(i Info) bool { return i.ID == id })
	if i < 0 || info[i].State != "running" || info[i].OwnerPID != cmd.Process.Pid {
		t.Fatalf("bed %s is not listed as running: %v", id, info)
	}
	if err := Destroy(t.Context(), id, os.Stderr); err == nil || !strings.Contains(err.Error(), "which runs") {
		t.Errorf("destroying a bed in use: %v", err)
	}
	// Nobody else sweeps while we look: other tests start beds, too.
	unlock, err := ledger{root: runRoot}.lock(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	defer unlock()
	if err := cmd.Process.Kill(); err != nil {
		t.Fatal(err)
	}
	_ = cmd.Wait()
	// The components die with their owner; containers and shims need the sweep.
	pids, _ := filepath.Glob(filepath.Join(runRoot, id, "pid", "*"))
	if len(pids) == 0 {
		t.Error("no process was recorded")
	}
	if len(traces(t, id, info[i].Dir)) == 0 {
		t.Error("nothing is left to sweep")
	}
	unlock()
	b := startBed(t, Options{Mode: ModeNode, Direct: true})
	if left := traces(t, id, info[i].Dir); len(left) > 0 {
		t.Errorf("left after the sweep:\n%s", strings.Join(left, "\n"))
	}
	if _, err := runPod(t.Context(), b, "next"); err != nil {
		t.Error(err)
	}
}

// TestCRIConformance runs critest on a bed behind the proxy and on one without: the proxy must not
// change any result.
func TestCRIConformance(t *testing.T) {
	real(t)
	if os.Getenv("TESTBED_CRITEST") == "" {
		t.Skip("set TESTBED_CRITEST=1 too: it takes minutes")
	}
	failed := map[bool][]string{}
	for _, direct := range []bool{true, false} {
		b := startBed(t, Options{Mode: ModeNode, Direct: direct})
		args, err := b.PushCRITestImages(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		cmd := exec.CommandContext(t.Context(), filepath.Join(b.Bin, "critest"),
			append(args, "-ginkgo.skip", "digest|benchmark", "-ginkgo.no-color")...)
		cmd.Dir = b.Dir
		out, err := cmd.CombinedOutput()
		for line := range strings.Lines(string(out)) {
			if strings.HasPrefix(strings.TrimSpace(line), "[FAIL]") {
				failed[direct] = append(failed[direct], strings.TrimSpace(line))
			}
			if strings.HasPrefix(line, "Ran ") || strings.HasPrefix(line, "FAIL!") ||
				strings.HasPrefix(line, "SUCCESS!") {
				t.Log(strings.TrimSpace(line))
			}
		}
		if err != nil && len(failed[direct]) == 0 {
			t.Fatalf("critest: %v\n%s", err, out)
		}
		slices.Sort(failed[direct])
	}
	for _, f := range failed[false] {
		if !slices.Contains(failed[true], f) {
			t.Errorf("fails only behind the proxy: %s", f)
		} else {
			t.Logf("fails with and without the proxy: %s", f)
		}
	}
}
