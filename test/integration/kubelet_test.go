// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package integration

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/status"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"
)

// kubelet speaks CRI as kubelet does, over the socket that it is given.
type kubelet struct {
	runtimeapi.RuntimeServiceClient
	images runtimeapi.ImageServiceClient
	conn   *grpc.ClientConn
	dir    string // of pod logs and termination messages
}

func dial(t testing.TB, socket, dir string) *kubelet {
	t.Helper()
	conn, err := grpc.NewClient("unix://"+socket, grpc.WithTransportCredentials(insecure.NewCredentials()),
		grpc.WithDefaultCallOptions(grpc.MaxCallRecvMsgSize(16<<20)))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = conn.Close() })
	return &kubelet{
		RuntimeServiceClient: runtimeapi.NewRuntimeServiceClient(conn),
		images:               runtimeapi.NewImageServiceClient(conn), conn: conn, dir: dir,
	}
}

// pod is a pod that a kubelet runs.
type pod struct {
	k         *kubelet
	name, uid string
	sandbox   string
	config    *runtimeapi.PodSandboxConfig
	// relisting is held from a list of everything until the statuses that it is followed by: there
	// is one kubelet, and what one of its lists has shown counts as known.
	relisting sync.Mutex
}

// spec is what a test says of a container.
type spec struct {
	name    string
	image   string // empty: busybox
	command []string
	env     map[string][]byte
	preStop string // JSON of core/v1 LifecycleHandler
	ports   string // JSON of []core/v1 ContainerPort
	grace   int
}

var podNumber struct {
	sync.Mutex
	n int
}

func (k *kubelet) runPod(t testing.TB) *pod {
	t.Helper()
	return k.runPodIn(t, bed.cgroup)
}

// runPodIn is runPod with containers in cgroups below parent.
func (k *kubelet) runPodIn(t testing.TB, parent string) *pod {
	t.Helper()
	podNumber.Lock()
	podNumber.n++
	n := podNumber.n
	podNumber.Unlock()
	p := &pod{k: k, name: fmt.Sprintf("pod-%d", n), uid: fmt.Sprintf("uid-%d-%d", os.Getpid(), n)}
	logs := filepath.Join(k.dir, "logs", p.uid)
	if err := os.MkdirAll(filepath.Join(k.dir, "pods", p.uid), 0o755); err != nil {
		t.Fatal(err)
	}
	p.config = &runtimeapi.PodSandboxConfig{
		Metadata:     &runtimeapi.PodSandboxMetadata{Name: p.name, Namespace: "default", Uid: p.uid},
		LogDirectory: logs,
		Labels: map[string]string{"io.kubernetes.pod.name": p.name, "io.kubernetes.pod.namespace": "default",
			"io.kubernetes.pod.uid": p.uid},
		Linux: &runtimeapi.LinuxPodSandboxConfig{CgroupParent: parent,
			SecurityContext: &runtimeapi.LinuxSandboxSecurityContext{}},
	}
	resp, err := k.RunPodSandbox(t.Context(), &runtimeapi.RunPodSandboxRequest{Config: p.config})
	if err != nil {
		t.Fatal(err)
	}
	p.sandbox = resp.GetPodSandboxId()
	t.Cleanup(func() {
		ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
		defer cancel()
		direct := dial(t, bed.runtime, k.dir) // the proxy under test may be gone
		_, _ = direct.StopPodSandbox(ctx, &runtimeapi.StopPodSandboxRequest{PodSandboxId: p.sandbox})
		// The runtime refuses to remove what has ended by itself, and it is still clearing away.
		// Kubelet tries again as well.
		for {
			_, err := direct.RemovePodSandbox(ctx, &runtimeapi.RemovePodSandboxRequest{PodSandboxId: p.sandbox})
			if err == nil {
				break
			}
			if ctx.Err() != nil {
				t.Errorf("removing the pod: %v", err)
				break
			}
			time.Sleep(50 * time.Millisecond) // polling another process
		}
		// Kubelet removes the links of the containers that it removes.
		links, _ := filepath.Glob(filepath.Join("/var/log/containers", p.name+"_default_*.log"))
		for _, link := range links {
			if to, err := os.Readlink(link); err == nil && strings.HasPrefix(to, logs+"/") {
				_ = os.Remove(link)
			}
		}
	})
	return p
}

// request is what kubelet asks for attempt n of the container.
func (p *pod) request(t testing.TB, s spec, attempt int) *runtimeapi.CreateContainerRequest {
	t.Helper()
	if s.image == "" {
		s.image = bed.busybox
	}
	if s.grace == 0 {
		s.grace = 5
	}
	img, err := p.k.images.ImageStatus(t.Context(),
		&runtimeapi.ImageStatusRequest{Image: &runtimeapi.ImageSpec{Image: s.image}})
	ref := img.GetImage().GetId() // kubelet names an image by its ID
	if err != nil || ref == "" {
		pulled, err := p.k.images.PullImage(t.Context(),
			&runtimeapi.PullImageRequest{Image: &runtimeapi.ImageSpec{Image: s.image}})
		if err != nil {
			t.Fatal(err)
		}
		ref = pulled.GetImageRef()
	}
	term := filepath.Join(p.k.dir, "pods", p.uid, "containers", s.name, fmt.Sprintf("%08x", attempt))
	if err := os.MkdirAll(filepath.Dir(term), 0o750); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(term, nil, 0o666); err != nil {
		t.Fatal(err)
	}
	if err := os.Chmod(term, 0o666); err != nil {
		t.Fatal(err)
	}
	c := &runtimeapi.ContainerConfig{
		Metadata: &runtimeapi.ContainerMetadata{Name: s.name, Attempt: uint32(attempt)},
		Image:    &runtimeapi.ImageSpec{Image: ref, UserSpecifiedImage: s.image},
		Command:  s.command,
		Labels: map[string]string{
			"io.kubernetes.pod.name": p.name, "io.kubernetes.pod.namespace": "default",
			"io.kubernetes.pod.uid": p.uid, "io.kubernetes.container.name": s.name,
		},
		Annotations: map[string]string{
			"io.kubernetes.container.hash":                   "abcdef",
			"io.kubernetes.container.restartCount":           strconv.Itoa(attempt),
			"io.kubernetes.container.terminationMessagePath": "/dev/termination-log",
			"io.kubernetes.pod.terminationGracePeriod":       strconv.Itoa(s.grace),
		},
		LogPath: fmt.Sprintf("%s/%d.log", s.name, attempt),
		Mounts:  []*runtimeapi.Mount{{ContainerPath: "/dev/termination-log", HostPath: term}},
		Linux: &runtimeapi.LinuxContainerConfig{
			Resources: &runtimeapi.LinuxContainerResources{CpuShares: 100, MemoryLimitInBytes: 64 << 20},
			SecurityContext: &runtimeapi.LinuxContainerSecurityContext{
				NamespaceOptions: &runtimeapi.NamespaceOption{Pid: runtimeapi.NamespaceMode_CONTAINER}},
		},
	}
	if s.preStop != "" {
		c.Annotations["io.kubernetes.container.preStopHandler"] = s.preStop
	}
	if s.ports != "" {
		c.Annotations["io.kubernetes.container.ports"] = s.ports
	}
	for k, v := range s.env {
		c.Envs = append(c.Envs, &runtimeapi.KeyValue{Key: k, Value: v})
	}
	return &runtimeapi.CreateContainerRequest{PodSandboxId: p.sandbox, Config: c, SandboxConfig: p.config}
}

// run creates and starts a container and returns its ID. One that says when it has begun has done
// so: before, the first process of a container takes no notice of signals.
func (p *pod) run(t testing.TB, s spec) string {
	t.Helper()
	resp, err := p.k.CreateContainer(t.Context(), p.request(t, s, 0))
	if err != nil {
		t.Fatal(err)
	}
	if _, err := p.k.StartContainer(t.Context(),
		&runtimeapi.StartContainerRequest{ContainerId: resp.GetContainerId()}); err != nil {
		t.Fatal(err)
	}
	if strings.Contains(strings.Join(s.command, " "), "echo started") {
		p.began(t, s.name, 0)
	}
	return resp.GetContainerId()
}

// began waits until the process of an attempt has said so, and with that can be asked to stop.
func (p *pod) began(t testing.TB, name string, attempt int) {
	t.Helper()
	p.logs(t, name, attempt, "started")
}

// logs waits until the attempt has logged the text: what a process writes is in the log a moment
// later.
func (p *pod) logs(t testing.TB, name string, attempt int, text string) {
	t.Helper()
	eventually(t, fmt.Sprintf("attempt %d of %s logs %q", attempt, name, text),
		func() bool { return strings.Contains(p.log(t, name, attempt), text) })
}

func (k *kubelet) status(t testing.TB, id string) *runtimeapi.ContainerStatus {
	t.Helper()
	resp, err := k.ContainerStatus(t.Context(), &runtimeapi.ContainerStatusRequest{ContainerId: id})
	if err != nil {
		t.Fatal(err)
	}
	return resp.GetStatus()
}

// look makes kubelet learn of the pod as its PLEG does: sandboxes are listed, then containers, and
// the sandbox's status is asked for. The statuses of the containers come next, the newest one's
// first; until then, the status of a container that was replaced says that it runs.
func (p *pod) look(t testing.TB, k *kubelet) {
	t.Helper()
	uid := map[string]string{"io.kubernetes.pod.uid": p.uid}
	if _, err := k.ListPodSandbox(t.Context(),
		&runtimeapi.ListPodSandboxRequest{Filter: &runtimeapi.PodSandboxFilter{LabelSelector: uid}}); err != nil {
		t.Fatal(err)
	}
	if _, err := k.ListContainers(t.Context(),
		&runtimeapi.ListContainersRequest{Filter: &runtimeapi.ContainerFilter{LabelSelector: uid}}); err != nil {
		t.Fatal(err)
	}
	if _, err := k.PodSandboxStatus(t.Context(),
		&runtimeapi.PodSandboxStatusRequest{PodSandboxId: p.sandbox}); err != nil {
		t.Fatal(err)
	}
}

// running returns how many containers of the name run, and how many exist, as the socket of k
// tells.
func (p *pod) running(t testing.TB, k *kubelet, name string) (running, all int) {
	t.Helper()
	resp, err := k.ListContainers(t.Context(),
		&runtimeapi.ListContainersRequest{Filter: &runtimeapi.ContainerFilter{LabelSelector: map[string]string{
			"io.kubernetes.pod.uid": p.uid, "io.kubernetes.container.name": name,
		}}})
	if err != nil {
		t.Fatal(err)
	}
	for _, c := range resp.GetContainers() {
		if c.GetState() == runtimeapi.ContainerState_CONTAINER_RUNNING {
			running++
		}
	}
	return running, len(resp.GetContainers())
}

// logFile is where the log of the container's attempt is.
func (p *pod) logFile(name string, attempt int) string {
	return filepath.Join(p.config.GetLogDirectory(), name, strconv.Itoa(attempt)+".log")
}

// log returns what the container's attempt logged; nothing if it has not been started.
func (p *pod) log(t testing.TB, name string, attempt int) string {
	t.Helper()
	b, err := os.ReadFile(p.logFile(name, attempt))
	if err != nil && !os.IsNotExist(err) {
		t.Fatal(err)
	}
	return string(b)
}

// relist watches a pod as kubelet's PLEG does, only much faster, until stopped. Whatever
// kubelet must never see is an error.
type relist struct {
	stop func() []string
}

// watch begins to relist the slot. Errors of the socket itself are passed over, as kubelet does.
func (p *pod) watch(name string) *relist {
	ctx, cancel := context.WithCancel(context.Background())
	var wg sync.WaitGroup
	var mu sync.Mutex
	var bad []string
	report := func(format string, args ...any) {
		mu.Lock()
		defer mu.Unlock()
		if len(bad) < 10 {
			bad = append(bad, fmt.Sprintf(format, args...))
		}
	}
	check := func(filter *runtimeapi.ContainerFilter) {
		if filter.GetState() == nil {
			p.relisting.Lock()
			defer p.relisting.Unlock()
		}
		resp, err := p.k.ListContainers(ctx, &runtimeapi.ListContainersRequest{Filter: filter})
		if err != nil {
			return
		}
		running, alive := 0, 0
		var states []string
		for _, c := range resp.GetContainers() {
			if c.GetLabels()["io.kubernetes.container.name"] != name {
				continue
			}
			states = append(states, fmt.Sprintf("%d=%s", c.GetMetadata().GetAttempt(), c.GetState()))
			if c.GetState() == runtimeapi.ContainerState_CONTAINER_CREATED {
				report("kubelet sees a created container: %s", states)
			}
			if c.GetState() == runtimeapi.ContainerState_CONTAINER_RUNNING {
				running++
				st, err := p.k.ContainerStatus(ctx, &runtimeapi.ContainerStatusRequest{ContainerId: c.GetId()})
				if status.Code(err) == codes.NotFound {
					report("a listed container is not found: %s", c.GetId())
				}
				if err == nil && st.GetStatus().GetState() == runtimeapi.ContainerState_CONTAINER_CREATED {
					report("status of a listed container says created: %s", c.GetId())
				}
				if err != nil || st.GetStatus().GetState() == runtimeapi.ContainerState_CONTAINER_RUNNING {
					alive++
				}
			}
		}
		if running != 1 {
			report("kubelet sees %d running containers of the slot: %s", running, strings.Join(states, " "))
		} else if filter.GetState() == nil && alive == 0 {
			// Kubelet asks for the status of what a whole list shows it, and takes nothing else for
			// the pod's state.
			report("the one container that was listed as running has ended: %s", strings.Join(states, " "))
		}
	}
	for _, f := range []*runtimeapi.ContainerFilter{
		{LabelSelector: map[string]string{"io.kubernetes.pod.uid": p.uid}},
		{PodSandboxId: p.sandbox,
			State: &runtimeapi.ContainerStateValue{State: runtimeapi.ContainerState_CONTAINER_RUNNING}},
	} {
		wg.Go(func() {
			for ctx.Err() == nil {
				check(f)
			}
		})
	}
	return &relist{stop: func() []string {
		cancel()
		wg.Wait()
		return bad
	}}
}

// eventually waits for a condition.
func eventually(t testing.TB, what string, cond func() bool) {
	t.Helper()
	deadline := time.Now().Add(time.Minute)
	for !cond() {
		if time.Now().After(deadline) {
			t.Fatalf("not within a minute: %s", what)
		}
		time.Sleep(5 * time.Millisecond) // polling another process
	}
}
