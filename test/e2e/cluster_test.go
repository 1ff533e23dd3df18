// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package e2e

import (
	"bufio"
	"context"
	"fmt"
	"io"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"
	"sigs.k8s.io/controller-runtime/pkg/client"

	"github.com/cri-proxy/cri-proxy/test/testbed"
)

// setFailpoint names the failpoint that kills the proxy's next process; none if empty.
func setFailpoint(t testing.TB, point string) {
	t.Helper()
	must(t, os.WriteFile(failpoint, []byte(point), 0o600))
}

// startProxy starts the proxy with the arguments it always has.
func startProxy(t testing.TB) {
	t.Helper()
	must(t, bed.StartProxy(t.Context()))
}

// died waits until the process has ended.
func died(t testing.TB, p *testbed.Process) {
	t.Helper()
	select {
	case <-p.Done():
	case <-time.After(time.Minute):
		t.Fatal("the failpoint was not reached within a minute")
	}
	// So that the bed knows it as stopped.
	_ = bed.KillProxy(t.Context(), syscall.SIGKILL)
}

// assertContainers counts the containers of a slot around the proxy.
func assertContainers(t testing.TB, podUID, name string, all, running int) {
	t.Helper()
	conn, err := bed.DialRuntime()
	must(t, err)
	defer func() { _ = conn.Close() }()
	list, err := runtimeapi.NewRuntimeServiceClient(conn).ListContainers(t.Context(), &runtimeapi.ListContainersRequest{
		Filter: &runtimeapi.ContainerFilter{LabelSelector: map[string]string{"io.kubernetes.pod.uid": podUID,
			"io.kubernetes.container.name": name}},
	})
	must(t, err)
	n := 0
	for _, c := range list.GetContainers() {
		if c.GetState() == runtimeapi.ContainerState_CONTAINER_RUNNING {
			n++
		}
	}
	if len(list.GetContainers()) != all || n != running {
		t.Errorf("containerd has %d containers of the slot, %d running; want %d and %d", len(list.GetContainers()), n,
			all, running)
	}
}

// watchSlot lists the slot through the socket that kubelet dials, over and over, until the returned
// function is called, which says what was there that kubelet must not see. It lists by state, as
// kubelet never does: a list of all is taken for one of kubelet's, which then knows what it has
// shown.
func watchSlot(t testing.TB, podUID, name string) (stop func() []string) {
	t.Helper()
	conn, err := bed.DialCRI()
	must(t, err)
	ctx, cancel := context.WithCancel(context.Background())
	cri := runtimeapi.NewRuntimeServiceClient(conn)
	var bad []string
	done := make(chan struct{})
	go func() {
		defer close(done)
		for ctx.Err() == nil && len(bad) < 10 {
			for state, want := range map[runtimeapi.ContainerState]int{runtimeapi.ContainerState_CONTAINER_RUNNING: 1,
				runtimeapi.ContainerState_CONTAINER_CREATED: 0} {
				list, err := cri.ListContainers(ctx,
					&runtimeapi.ListContainersRequest{Filter: &runtimeapi.ContainerFilter{
						State: &runtimeapi.ContainerStateValue{State: state},
						LabelSelector: map[string]string{"io.kubernetes.pod.uid": podUID,
							"io.kubernetes.container.name": name},
					}})
				if err == nil && len(list.GetContainers()) != want {
					bad = append(bad, fmt.Sprintf("%s: %v", state, list.GetContainers()))
				}
			}
		}
	}()
	end := sync.OnceFunc(func() { cancel(); <-done; _ = conn.Close() })
	t.Cleanup(end)
	return func() []string { end(); return bad }
}

func nodeReady(n *corev1.Node) bool {
	for _, c := range n.Status.Conditions {
		if c.Type == corev1.NodeReady {
			return c.Status == corev1.ConditionTrue
		}
	}
	return false
}

func isNodeReady(t testing.TB) bool {
	t.Helper()
	return nodeReady(getNode(t))
}

func getNode(t testing.TB) *corev1.Node {
	t.Helper()
	n := &corev1.Node{}
	must(t, api.Get(t.Context(), client.ObjectKey{Name: bed.NodeName}, n))
	return n
}

// restartKubelet sends sig to kubelet, starts it anew and waits until the new one has said that the
// node is ready.
func restartKubelet(t testing.TB, sig syscall.Signal) {
	t.Helper()
	must(t, bed.RestartKubeletReady(t.Context(), sig))
}

func assertNodeReady(t testing.TB) {
	t.Helper()
	if !isNodeReady(t) {
		t.Errorf("node %s is not ready", bed.NodeName)
	}
}

// watchNode watches the node until the returned function is called, which says
// what was wrong with it.
func watchNode(t testing.TB) (stop func() []string) {
	t.Helper()
	ctx, cancel := context.WithCancel(context.Background())
	// From now on: a watch without a version may begin with an older state, out of the API server's
	// cache.
	var now corev1.NodeList
	must(t, api.List(ctx, &now))
	w, err := api.Watch(ctx, &corev1.NodeList{},
		&client.ListOptions{Raw: &metav1.ListOptions{ResourceVersion: now.ResourceVersion}})
	must(t, err)
	var bad []string
	done := make(chan struct{})
	go func() {
		defer close(done)
		for e := range w.ResultChan() {
			if n, ok := e.Object.(*corev1.Node); ok && !nodeReady(n) {
				for _, c := range n.Status.Conditions {
					if c.Type == corev1.NodeReady {
						bad = append(bad, c.Message)
					}
				}
			}
		}
	}()
	end := sync.OnceFunc(func() { cancel(); w.Stop(); <-done })
	t.Cleanup(end)
	return func() []string { end(); return bad }
}

// portForward asks the pod's port 8080 through kubectl port-forward.
func portForward(t testing.TB, ns, pod string) string {
	t.Helper()
	ctx, cancel := context.WithCancel(t.Context())
	cmd := exec.CommandContext(ctx, filepath.Join(bed.Bin, "kubectl"), "-n", ns, "port-forward", "pod/"+pod, ":8080")
	cmd.Env = append(os.Environ(), "KUBECONFIG="+bed.Kubeconfig)
	out, err := cmd.StdoutPipe()
	must(t, err)
	must(t, cmd.Start())
	defer func() { cancel(); _ = cmd.Wait() }()
	line, err := bufio.NewReader(out).ReadString('\n') // Forwarding from 127.0.0.1:PORT -> 8080
	must(t, err)
	fields := strings.Fields(line)
	if len(fields) < 3 {
		t.Fatalf("kubectl port-forward: %q", line)
	}
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, "http://"+fields[2], nil)
	must(t, err)
	resp, err := http.DefaultClient.Do(req)
	must(t, err)
	defer func() { _ = resp.Body.Close() }()
	body, err := io.ReadAll(resp.Body)
	must(t, err)
	return string(body)
}
