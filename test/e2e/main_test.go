// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package e2e

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/runtime"
	clientgoscheme "k8s.io/client-go/kubernetes/scheme"
	"k8s.io/client-go/tools/clientcmd"
	"sigs.k8s.io/controller-runtime/pkg/client"

	appsv1alpha1 "github.com/cri-proxy/cri-proxy/api/apps/v1alpha1"
	"github.com/cri-proxy/cri-proxy/api/apps/v1beta1"
	inplace "github.com/cri-proxy/cri-proxy/api/inplace/v1alpha1"
	"github.com/cri-proxy/cri-proxy/test/testbed"
)

// The cluster of this run. Tests share it and keep to namespaces of their own.
var (
	bed    *testbed.Bed
	api    client.WithWatch
	failed bool
	// calls is where the proxy records every CRI call of kubelet's.
	calls string
	// failpoint is the file that names the failpoint of the proxy's next start.
	failpoint string
	leaving   departures
)

func TestMain(m *testing.M) {
	code, err := run(m)
	if err != nil {
		fmt.Fprintln(os.Stderr, "e2e:", err)
		code = 1
	}
	os.Exit(code)
}

func run(m *testing.M) (code int, err error) {
	ctx, cancel := context.WithCancel(context.Background())
	defer cancel()
	cache, err := testbed.CacheDir()
	if err != nil {
		return 0, err
	}
	scratch, err := os.MkdirTemp(cache, "e2e-")
	if err != nil {
		return 0, err
	}
	defer func() { err = errors.Join(err, os.RemoveAll(scratch)) }()
	calls = filepath.Join(scratch, "calls.json")
	program := filepath.Join(scratch, "cri-proxy") // which a test can have die at a step
	if err := testbed.BuildWithFailpoints(ctx, program); err != nil {
		return 0, err
	}
	bed, err = testbed.Start(ctx, testbed.Options{
		Mode: testbed.ModeCluster, Race: true, Log: os.Stderr, KeepLogs: func() bool { return failed },
		ProxyBinary: program, ProxyArgs: []string{"--record-calls", calls},
	})
	if err != nil {
		return 0, err
	}
	defer func() { err = errors.Join(err, bed.Close(context.Background())) }()
	if failpoint, err = filepath.EvalSymlinks(filepath.Join(bed.Bin, "cri-proxy")); err != nil {
		return 0, err
	}
	failpoint += ".failpoint"
	if api, err = newClient(bed.Kubeconfig); err != nil {
		return 0, err
	}
	if err := bed.InstallCRDs(ctx); err != nil {
		return 0, err
	}
	if err := restrictController(ctx); err != nil {
		return 0, err
	}
	if err := bed.StartController(ctx); err != nil {
		return 0, err
	}
	code = m.Run()
	if err := leaving.wait(); err != nil {
		fmt.Fprintln(os.Stderr, "e2e:", err)
		code = 1
	}
	failed = code != 0
	return code, nil
}

// departures are what is on its way out: namespaces, for some seconds, and what goes with them. The
// next test can begin meanwhile.
type departures struct {
	wg   sync.WaitGroup
	mu   sync.Mutex
	errs []error // guarded by mu
}

// add removes a namespace with everything in it.
func (d *departures) add(name string) {
	d.wg.Go(func() {
		ctx, cancel := context.WithTimeout(context.Background(), 5*time.Minute)
		defer cancel()
		if _, err := bed.Kubectl(ctx, "delete", "namespace", name, "--wait=true", "--timeout=4m"); err != nil {
			d.mu.Lock()
			defer d.mu.Unlock()
			d.errs = append(d.errs, fmt.Errorf("removing the namespace of test %s: %w", name, err))
		}
	})
}

// await waits until gone says so, which tells of nothing but the cluster.
func (d *departures) await(what string, gone func(context.Context) (bool, error)) {
	d.wg.Go(func() {
		ctx, cancel := context.WithTimeout(context.Background(), 5*time.Minute)
		defer cancel()
		for {
			is, err := gone(ctx)
			if is {
				return
			}
			if ctx.Err() != nil {
				d.mu.Lock()
				defer d.mu.Unlock()
				d.errs = append(d.errs, fmt.Errorf("%s is there still: %w", what, errors.Join(err, ctx.Err())))
				return
			}
			time.Sleep(100 * time.Millisecond) // polling another process
		}
	})
}

// wait waits for all of them and says which did not go.
func (d *departures) wait() error {
	d.wg.Wait()
	d.mu.Lock()
	defer d.mu.Unlock()
	return errors.Join(d.errs...)
}

// restrictController gives the controller the permissions that the manifests give it, and no
// others.
func restrictController(ctx context.Context) error {
	root, err := testbed.SourceDir("")
	if err != nil {
		return err
	}
	for _, f := range []string{"controller/namespace.yaml", "controller/serviceaccount.yaml", "rbac"} {
		if _, err := bed.Kubectl(ctx, "apply", "-f", filepath.Join(root, "deploy", f)); err != nil {
			return err
		}
	}
	bed.ControllerKubeconfig, err = bed.NewKubeconfig("cri-controller",
		"system:serviceaccount:cri-proxy-system:cri-controller", "system:serviceaccounts")
	return err
}

func newClient(kubeconfig string) (client.WithWatch, error) {
	config, err := clientcmd.BuildConfigFromFlags("", kubeconfig)
	if err != nil {
		return nil, err
	}
	config.QPS, config.Burst = 200, 400
	scheme := runtime.NewScheme()
	if err := errors.Join(clientgoscheme.AddToScheme(scheme), appsv1alpha1.AddToScheme(scheme),
		v1beta1.AddToScheme(scheme), inplace.AddToScheme(scheme)); err != nil {
		return nil, err
	}
	return client.NewWithWatch(config, client.Options{Scheme: scheme})
}

// namespace makes a namespace of the test's own and removes it with everything in it.
func namespace(t testing.TB) string {
	t.Helper()
	name := strings.ToLower(strings.NewReplacer("/", "-", "_", "-").Replace(t.Name()))
	must(t, bed.CreateNamespace(t.Context(), name))
	t.Cleanup(func() { leaving.add(name) })
	return name
}

func apply(t testing.TB, documents string) {
	t.Helper()
	must(t, bed.KubectlApply(t.Context(), documents))
}

func kubectl(t testing.TB, args ...string) string {
	t.Helper()
	out, err := bed.Kubectl(t.Context(), args...)
	must(t, err)
	return strings.TrimSpace(out)
}

func getPod(t testing.TB, ns, name string) *corev1.Pod {
	t.Helper()
	p := &corev1.Pod{}
	must(t, api.Get(t.Context(), client.ObjectKey{Namespace: ns, Name: name}, p))
	return p
}

// container returns the status of one container.
func container(t testing.TB, p *corev1.Pod, name string) corev1.ContainerStatus {
	t.Helper()
	for _, list := range [][]corev1.ContainerStatus{p.Status.ContainerStatuses, p.Status.InitContainerStatuses} {
		for _, c := range list {
			if c.Name == name {
				return c
			}
		}
	}
	t.Fatalf("pod %s has no status of container %s", p.Name, name)
	return corev1.ContainerStatus{}
}

// ready waits until the pod is ready and returns it.
func ready(t testing.TB, ns, name string) *corev1.Pod {
	t.Helper()
	var p *corev1.Pod
	eventually(t, "pod "+name+" is ready", func() bool {
		p = getPod(t, ns, name)
		for _, c := range p.Status.Conditions {
			if c.Type == corev1.PodReady {
				return c.Status == corev1.ConditionTrue
			}
		}
		return false
	})
	return p
}

// completed waits until the request is completed and returns it.
func completed(t testing.TB, ns, name string) *appsv1alpha1.ContainerRecreateRequest {
	t.Helper()
	crr := &appsv1alpha1.ContainerRecreateRequest{}
	eventually(t, "request "+name+" is completed", func() bool {
		must(t, api.Get(t.Context(), client.ObjectKey{Namespace: ns, Name: name}, crr))
		return crr.Status.Phase == appsv1alpha1.ContainerRecreateRequestCompleted
	})
	return crr
}

// eventually waits for a condition in the cluster.
func eventually(t testing.TB, what string, cond func() bool) {
	t.Helper()
	deadline := time.Now().Add(2 * time.Minute)
	for !cond() {
		if time.Now().After(deadline) {
			t.Fatalf("not within 2 minutes: %s", what)
		}
		time.Sleep(50 * time.Millisecond) // polling another process
	}
}

// call is a CRI call that kubelet made, as the proxy recorded it.
type call struct {
	Time                             time.Time
	Method, Code                     string
	ContainerID, SandboxID           string
	Container, Pod, Namespace, Image string
	Attempt                          *uint32
}

// kubeletCalls returns the recorded calls of one CRI method.
func kubeletCalls(t testing.TB, method string) []call {
	t.Helper()
	f, err := os.Open(calls)
	must(t, err)
	defer func() { _ = f.Close() }()
	var out []call
	s := bufio.NewScanner(f)
	s.Buffer(nil, 1<<20)
	for s.Scan() {
		var c call
		if json.Unmarshal(s.Bytes(), &c) != nil {
			continue // the last line of a process that was killed
		}
		if strings.HasSuffix(c.Method, "/"+method) {
			out = append(out, c)
		}
	}
	must(t, s.Err())
	return out
}

// kubeletIsThrough waits until kubelet has called through the proxy that runs now: after a restart
// of that it comes when its connection's back-off is over, and what is asked of it before fails.
func kubeletIsThrough(t testing.TB) {
	t.Helper()
	since := len(kubeletCalls(t, "ListContainers"))
	eventually(t, "kubelet lists through the proxy",
		func() bool { return len(kubeletCalls(t, "ListContainers")) > since })
}

// restartProxy ends the proxy with the signal and starts it again.
func restartProxy(t testing.TB, sig syscall.Signal) {
	t.Helper()
	must(t, bed.RestartProxy(t.Context(), sig))
}

func must(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}
