// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"sync"
	"time"

	opsv1 "github.com/cri-proxy/cri-proxy/api/ops/v1"
	"github.com/cri-proxy/cri-proxy/test/testbed"
	"golang.org/x/sys/unix"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	appsv1 "k8s.io/api/apps/v1"
	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	"k8s.io/apimachinery/pkg/api/resource"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"
	kube "sigs.k8s.io/controller-runtime/pkg/client"
)

const (
	gapNamespace = "bench"
	gapContainer = "app"
	gapPort      = "8080"
	// minReady, in seconds, is the new process' time to listen before the old one is stopped.
	minReady = 1
)

// reusePort says how the app listens: "1", with SO_REUSEPORT; "newest", so that all new connections
// are the newest process'.
func reusePort(how string) corev1.EnvVar { return corev1.EnvVar{Name: "REUSEPORT", Value: how} }

// way is one way to get a fresh process in a container.
type way struct {
	name, title string
	// method is what the node should report for ours, else empty.
	method string
	node   *testbed.Node
	// every is in how many rounds it is measured once; 0: in each.
	every int
	// ready makes the node what it must be before each restart; it may be nil.
	ready func(ctx context.Context) error
	// perPod is how often one pod may be restarted before it is replaced; 0: without end.
	perPod int
	create func(ctx context.Context, name string) (*gapPod, error)
	// restart returns when the new process is on its way or there. It calls moved when clients have
	// to go to another address. The operation is nil unless the way is ours.
	restart func(ctx context.Context, p *gapPod, moved func(address string)) (*opsv1.ContainerOperation, error)
}

// gapPod is a pod with one container of the app image.
type gapPod struct {
	name, uid, address string
	image              string
	restarts           int
	spent              bool // to be replaced
	set                bool // it belongs to a StatefulSet of the name before -0
}

func (p *gapPod) restarted(w *way) {
	p.restarts++
	p.spent = p.restarts == w.perPod
}

func (g *gapBench) makeWays(ctx context.Context) error {
	direct := g.bed.Nodes[0]
	plainPod := g.plainPod
	var gate *testbed.Node
	all := []*way{
		// kubelet's back-off has the image in its key: there and back are two first restarts of a
		// pod, the next would wait.
		{name: "kubelet", title: "kubelet alone: image patched, present", node: direct, perPod: 2,
			create: plainPod(direct), restart: g.patchImage},
		{name: "cri-stop", title: "stopped through CRI, kubelet restarts", node: direct, perPod: 1,
			create: plainPod(direct), restart: g.stopThroughCRI},
	}
	for i, method := range gapNodes[1:] {
		n := g.bed.Nodes[i+1]
		ops, err := g.dialOps(ctx, n, method)
		if err != nil {
			return err
		}
		all = append(all, &way{name: method, title: "cri-proxy, " + method, method: method, node: n,
			create: plainPod(n), restart: ops.restart(opsv1.Order_ORDER_STOP_FIRST)})
		if method == "gate" {
			gate = n
			startFirst := ops.restart(opsv1.Order_ORDER_START_FIRST)
			all = append(all,
				// The old process may take connections with it that it has not answered yet.
				&way{name: "overlap", title: "cri-proxy, StartFirst", method: "overlap", node: n,
					create: plainPod(n, reusePort("1")), restart: startFirst},
				// It has had no new one for a while when the newest process takes them all.
				&way{name: "newest", title: "cri-proxy, StartFirst, newest takes all", method: "overlap", node: n,
					create: plainPod(n, reusePort("newest")), restart: startFirst},
				&way{name: "upgrade", title: "cri-proxy, upgrade: image present", method: "gate", node: n, perPod: 2,
					create: plainPod(n), restart: g.upgrade(ops, opsv1.Order_ORDER_STOP_FIRST, g.otherImage)},
				&way{name: "upgrade-newest", title: "cri-proxy, upgrade, StartFirst, newest takes all",
					method: "overlap", node: n, perPod: 2, create: plainPod(n, reusePort("newest")),
					restart: g.upgrade(ops, opsv1.Order_ORDER_START_FIRST, g.otherImage)})
		}
	}
	all = append(all, &way{name: "recreate", title: "pod deleted, recreated by its StatefulSet", node: direct,
		create:  func(ctx context.Context, name string) (*gapPod, error) { return g.createSet(ctx, name, direct) },
		restart: g.deletePod})
	for _, w := range g.addAbsent(direct, gate, all) {
		if wanted(g.only, w.name) {
			g.ways = append(g.ways, w)
			g.report.Ways = append(g.report.Ways, &WayResult{Name: w.name, Title: w.title, Expected: w.method})
		}
	}
	if len(g.ways) == 0 {
		return fmt.Errorf("-ways %q names none of %s", g.only, wayNames)
	}
	return nil
}

// wayNames are for people who choose.
const wayNames = "kubelet, kubelet-absent, cri-stop, plain, pidfd, gate, overlap, newest, upgrade, upgrade-newest, " +
	"upgrade-absent, recreate"

// plainPod returns a way's creation of a pod on a node.
func (g *gapBench) plainPod(n *testbed.Node, env ...corev1.EnvVar) func(context.Context, string) (*gapPod, error) {
	return func(ctx context.Context, name string) (*gapPod, error) { return g.createPod(ctx, name, n, env...) }
}

func (g *gapBench) podSpec(env ...corev1.EnvVar) corev1.PodSpec {
	return corev1.PodSpec{Containers: []corev1.Container{{
		Name: gapContainer, Image: g.bed.Image("app:1"), ImagePullPolicy: corev1.PullIfNotPresent, Env: env,
		// A pod that asks for nothing comes after everything else on the machine. All pods of the
		// series fit on a node of two CPUs.
		Resources: corev1.ResourceRequirements{
			Requests: corev1.ResourceList{corev1.ResourceCPU: resource.MustParse("50m")}},
	}}}
}

// createPod creates a pod on a node and returns it when it runs.
func (g *gapBench) createPod(ctx context.Context, name string, n *testbed.Node, env ...corev1.EnvVar) (*gapPod, error) {
	p := &corev1.Pod{ObjectMeta: metav1.ObjectMeta{Name: name, Namespace: gapNamespace}, Spec: g.podSpec(env...)}
	p.Spec.NodeName = n.NodeName
	if err := g.api.Create(ctx, p); err != nil {
		return nil, err
	}
	return g.awaitPod(ctx, name)
}

// createSet creates a StatefulSet of one pod, which the scheduler can only put on the node.
func (g *gapBench) createSet(ctx context.Context, name string, n *testbed.Node) (*gapPod, error) {
	labels := map[string]string{"app": name}
	s := &appsv1.StatefulSet{
		ObjectMeta: metav1.ObjectMeta{Name: name, Namespace: gapNamespace},
		Spec: appsv1.StatefulSetSpec{
			ServiceName: name, Selector: &metav1.LabelSelector{MatchLabels: labels},
			Template: corev1.PodTemplateSpec{ObjectMeta: metav1.ObjectMeta{Labels: labels}, Spec: g.podSpec()},
		},
	}
	s.Spec.Template.Spec.NodeSelector = map[string]string{corev1.LabelHostname: n.NodeName}
	if err := g.api.Create(ctx, s); err != nil {
		return nil, err
	}
	p, err := g.awaitPod(ctx, name+"-0")
	if err == nil {
		p.set = true
	}
	return p, err
}

// eventually calls a condition until it is true.
func eventually(ctx context.Context, cond func(context.Context) (bool, error)) error {
	ctx, cancel := context.WithTimeout(ctx, timeout)
	defer cancel()
	tick := time.NewTicker(50 * time.Millisecond)
	defer tick.Stop()
	for {
		if done, err := cond(ctx); done || err != nil {
			return err
		}
		select {
		case <-tick.C:
		case <-ctx.Done():
			return context.Cause(ctx)
		}
	}
}

// awaitPod returns a pod when it runs.
func (g *gapBench) awaitPod(ctx context.Context, name string) (*gapPod, error) {
	p := &corev1.Pod{}
	err := eventually(ctx, func(ctx context.Context) (bool, error) {
		err := g.api.Get(ctx, kube.ObjectKey{Namespace: gapNamespace, Name: name}, p)
		return err == nil && running(p), kube.IgnoreNotFound(err)
	})
	if err != nil {
		return nil, fmt.Errorf("pod %s does not run: %w", name, err)
	}
	return &gapPod{name: name, uid: string(p.UID), address: net.JoinHostPort(p.Status.PodIP, gapPort),
		image: p.Spec.Containers[0].Image}, nil
}

// removePod removes a pod and returns when it is gone.
func (g *gapBench) removePod(ctx context.Context, p *gapPod) error {
	if p.set {
		s := &appsv1.StatefulSet{ObjectMeta: metav1.ObjectMeta{Namespace: gapNamespace,
			Name: p.name[:len(p.name)-len("-0")]}}
		return kube.IgnoreNotFound(g.api.Delete(ctx, s, kube.PropagationPolicy(metav1.DeletePropagationBackground)))
	}
	pod := &corev1.Pod{ObjectMeta: metav1.ObjectMeta{Namespace: gapNamespace, Name: p.name}}
	if err := g.api.Delete(ctx, pod); kube.IgnoreNotFound(err) != nil {
		return err
	}
	return eventually(ctx, func(ctx context.Context) (bool, error) {
		err := g.api.Get(ctx, kube.ObjectKeyFromObject(pod), pod)
		return apierrors.IsNotFound(err), kube.IgnoreNotFound(err)
	})
}

// patchImage changes the image in the pod's spec, as `kubectl set image` does.
func (g *gapBench) patchImage(ctx context.Context, p *gapPod, _ func(string)) (*opsv1.ContainerOperation, error) {
	return nil, g.setImage(ctx, p, g.otherImage(p))
}

func (g *gapBench) setImage(ctx context.Context, p *gapPod, image string) error {
	p.image = image
	patch, err := json.Marshal(
		map[string]any{"spec": map[string]any{"containers": []map[string]any{{"name": gapContainer, "image": image}}}})
	if err != nil {
		return err
	}
	pod := &corev1.Pod{ObjectMeta: metav1.ObjectMeta{Namespace: gapNamespace, Name: p.name}}
	return g.api.Patch(ctx, pod, kube.RawPatch("application/strategic-merge-patch+json", patch))
}

// stopThroughCRI stops the container behind kubelet's back, as side-car daemons do that restart
// containers.
func (g *gapBench) stopThroughCRI(ctx context.Context, p *gapPod, _ func(string)) (*opsv1.ContainerOperation, error) {
	cri := g.runtime[g.bed.Nodes[0]]
	id, err := containerID(ctx, cri, p)
	if err != nil {
		return nil, err
	}
	_, err = cri.StopContainer(ctx, &runtimeapi.StopContainerRequest{ContainerId: id, Timeout: 30})
	return nil, err
}

// deletePod deletes the pod and follows the one that comes in its place to its address.
func (g *gapBench) deletePod(ctx context.Context, p *gapPod, moved func(string)) (*opsv1.ContainerOperation, error) {
	events, err := g.api.Watch(ctx, &corev1.PodList{}, kube.InNamespace(gapNamespace),
		kube.MatchingFields{"metadata.name": p.name})
	if err != nil {
		return nil, err
	}
	defer events.Stop()
	if err := g.api.Delete(ctx,
		&corev1.Pod{ObjectMeta: metav1.ObjectMeta{Namespace: gapNamespace, Name: p.name}}); err != nil {
		return nil, err
	}
	for {
		select {
		case e, ok := <-events.ResultChan():
			if !ok {
				return nil, errors.New("the API server ended the watch")
			}
			if pod, ok := e.Object.(*corev1.Pod); ok && string(pod.UID) != p.uid && pod.Status.PodIP != "" {
				p.uid, p.address = string(pod.UID), net.JoinHostPort(pod.Status.PodIP, gapPort)
				moved(p.address)
				return nil, nil
			}
		case <-ctx.Done():
			return nil, context.Cause(ctx)
		}
	}
}

// nodeOps is the command interface of one node.
type nodeOps struct {
	client opsv1.OpsClient
	mu     sync.Mutex
	sent   int // operations so far, guarded by mu
}

func (g *gapBench) dialOps(ctx context.Context, n *testbed.Node, method string) (*nodeOps, error) {
	conn, err := grpc.NewClient("unix://"+n.AdminSocket, grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		return nil, err
	}
	g.conns = append(g.conns, conn)
	o := &nodeOps{client: opsv1.NewOpsClient(conn)}
	g.nodeOps[n] = o
	info, err := o.client.NodeInfo(ctx, &opsv1.NodeInfoRequest{})
	if err != nil {
		return nil, err
	}
	g.report.Versions.CRIProxy = info.GetVersion()
	for _, m := range info.GetRestartMethods() {
		if m.GetName() == method && !m.GetAvailable() {
			g.report.note("the node has no method %s: %s", method, m.GetReason())
		}
	}
	return o, nil
}

// restart returns a way's restart by an operation of the node.
func (o *nodeOps) restart(
	order opsv1.Order,
) func(context.Context, *gapPod, func(string)) (*opsv1.ContainerOperation, error) {
	return func(ctx context.Context, p *gapPod, _ func(string)) (*opsv1.ContainerOperation, error) {
		o.mu.Lock()
		o.sent++
		uid := fmt.Sprintf("bench-%s-%d", p.name, o.sent)
		o.mu.Unlock()
		restart := &opsv1.ContainerRestart{Name: gapContainer, Order: order}
		if order == opsv1.Order_ORDER_START_FIRST {
			restart.MinReadySeconds = minReady
		}
		if _, err := o.client.Restart(ctx, &opsv1.RestartRequest{
			Uid: uid, Requester: "bench", Pod: &opsv1.PodRef{Namespace: gapNamespace, Name: p.name, Uid: p.uid},
			Containers: []*opsv1.ContainerRestart{restart},
		}); err != nil {
			return nil, err
		}
		return o.until(ctx, uid, opsv1.Phase_PHASE_SUCCEEDED)
	}
}

// containerID returns the ID of a pod's running container.
func containerID(ctx context.Context, cri runtimeapi.RuntimeServiceClient, p *gapPod) (string, error) {
	list, err := cri.ListContainers(ctx, &runtimeapi.ListContainersRequest{Filter: &runtimeapi.ContainerFilter{
		State:         &runtimeapi.ContainerStateValue{State: runtimeapi.ContainerState_CONTAINER_RUNNING},
		LabelSelector: map[string]string{"io.kubernetes.pod.uid": p.uid, "io.kubernetes.container.name": gapContainer},
	}})
	if err != nil {
		return "", err
	}
	if n := len(list.GetContainers()); n != 1 {
		return "", fmt.Errorf("pod %s has %d running containers, want one", p.name, n)
	}
	return list.Containers[0].Id, nil
}

// exit waits for the end of one process.
type exit struct {
	end  func()
	done chan struct{}
	at   time.Time // set when done is closed
	err  error     // likewise
}

// watchExit watches the process of a pod's container.
func (g *gapBench) watchExit(ctx context.Context, n *testbed.Node, p *gapPod) (*exit, error) {
	cri := g.runtime[n]
	id, err := containerID(ctx, cri, p)
	if err != nil {
		return nil, err
	}
	status, err := cri.ContainerStatus(ctx, &runtimeapi.ContainerStatusRequest{ContainerId: id, Verbose: true})
	if err != nil {
		return nil, err
	}
	var info struct {
		PID int `json:"pid"`
	}
	if err := json.Unmarshal([]byte(status.GetInfo()["info"]), &info); err != nil || info.PID == 0 {
		return nil, fmt.Errorf("the runtime does not tell the process of container %s: %w", id, err)
	}
	return startExit(ctx, info.PID)
}

func startExit(ctx context.Context, pid int) (*exit, error) {
	fd, err := unix.PidfdOpen(pid, 0)
	if err != nil {
		return nil, fmt.Errorf("watch process %d: %w", pid, err)
	}
	ctx, cancel := context.WithCancel(ctx)
	e := &exit{done: make(chan struct{})}
	e.end = func() { cancel(); <-e.done }
	go func() {
		defer close(e.done)
		defer unix.Close(fd)
		for {
			// The timeout is for a context that ends; an exit is seen at once.
			n, err := unix.Poll([]unix.PollFd{{Fd: int32(fd), Events: unix.POLLIN}}, 100)
			switch {
			case n > 0:
				e.at = time.Now()
				return
			case err != nil && !errors.Is(err, unix.EINTR):
				e.err = err
				return
			case ctx.Err() != nil:
				e.err = context.Cause(ctx)
				return
			}
		}
	}()
	return e, nil
}

// wait returns when the process has ended and the time of that.
func (e *exit) wait(ctx context.Context) (time.Time, error) {
	select {
	case <-e.done:
		return e.at, e.err
	case <-ctx.Done():
		return time.Time{}, fmt.Errorf("the old process has not ended: %w", context.Cause(ctx))
	}
}

func (e *exit) stop() { e.end() }
