// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package chaos

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"syscall"
	"testing"
	"time"

	"github.com/go-logr/logr"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	clientgoscheme "k8s.io/client-go/kubernetes/scheme"
	"k8s.io/client-go/tools/clientcmd"
	"sigs.k8s.io/controller-runtime/pkg/client"
	ctrllog "sigs.k8s.io/controller-runtime/pkg/log"
	"sigs.k8s.io/yaml"

	appsv1alpha1 "github.com/cri-proxy/cri-proxy/api/apps/v1alpha1"
	inplace "github.com/cri-proxy/cri-proxy/api/inplace/v1alpha1"
	"github.com/cri-proxy/cri-proxy/test/chaos/faultproxy"
	"github.com/cri-proxy/cri-proxy/test/testbed"
)

const (
	// namespace holds all pods of a run.
	namespace = "chaos"
	// slotName is the container that is restarted; side is its neighbour.
	slotName = "app"
	sideName = "side"
	// witness is a pod that nothing is done to.
	witness = "witness"
	// firstImage is what pods begin with, otherImage what upgrades give them, and brokenImage one
	// whose process ends at once.
	firstImage, otherImage, brokenImage = "busybox:1.0", "busybox:2.0", "busybox:3.0"
	// podTimeout bounds the start of a batch of pods; no fault is at work then, but perhaps a busy
	// machine.
	podTimeout = 5 * time.Minute
)

// cluster is the one cluster of a run.
type cluster struct {
	bed       *testbed.Bed
	api       client.Client
	disk      *disk
	faults    *faultproxy.Proxy
	socket    string // of the fault proxy
	failpoint string // the file that names the failpoint of the proxy's next start
	scratch   string
	calls     *callLog
	// controller is whether there is one.
	controller bool
}

// start brings the cluster up for the test, with the controller if that is needed.
func start(t *testing.T, controller bool) *cluster {
	t.Helper()
	ctrllog.SetLogger(logr.Discard()) // the client of this package says nothing of interest
	cache, err := testbed.CacheDir()
	must(t, err)
	scratch, err := os.MkdirTemp(cache, "chaos-")
	must(t, err)
	t.Cleanup(func() { must(t, os.RemoveAll(scratch)) })
	program := filepath.Join(scratch, "cri-proxy")
	must(t, testbed.BuildWithFailpoints(t.Context(), program))
	c := &cluster{scratch: scratch, controller: controller, calls: &callLog{path: filepath.Join(scratch, "calls.json")}}
	c.bed, err = testbed.Start(t.Context(), testbed.Options{
		Mode: testbed.ModeCluster, Race: true, Log: os.Stderr, KeepLogs: t.Failed,
		ProxyBinary: program, ProxyArgs: []string{"--record-calls", c.calls.path},
	})
	must(t, err)
	t.Cleanup(func() {
		if err := c.bed.Close(context.WithoutCancel(t.Context())); err != nil {
			t.Error(err)
		}
	})
	// What the bed copied the program to is what runs.
	copied, err := filepath.EvalSymlinks(filepath.Join(c.bed.Bin, "cri-proxy"))
	must(t, err)
	c.failpoint = copied + ".failpoint"
	c.disk, err = mountDisk(filepath.Join(c.bed.NodeDir, "disk"))
	must(t, err)
	t.Cleanup(func() {
		_ = c.bed.KillProxy(context.WithoutCancel(t.Context()), syscall.SIGKILL)
		if err := c.disk.close(); err != nil {
			t.Error(err)
		}
	})
	c.socket = filepath.Join(c.bed.RunDir, "faults.sock")
	c.faults, err = faultproxy.Start(c.socket, c.bed.RuntimeSocket)
	must(t, err)
	t.Cleanup(func() {
		if err := c.faults.Close(); err != nil {
			t.Error(err)
		}
	})
	config, err := clientcmd.BuildConfigFromFlags("", c.bed.Kubeconfig)
	must(t, err)
	config.QPS, config.Burst = 200, 400
	scheme := runtime.NewScheme()
	must(t, errors.Join(clientgoscheme.AddToScheme(scheme), appsv1alpha1.AddToScheme(scheme),
		inplace.AddToScheme(scheme)))
	c.api, err = client.New(config, client.Options{Scheme: scheme})
	must(t, err)
	must(t, c.bed.CreateNamespace(t.Context(), namespace))
	if controller {
		must(t, errors.Join(c.bed.InstallCRDs(t.Context()), c.bed.StartController(t.Context())))
	}
	return c
}

// configure writes the proxy's configuration for its next start.
func (c *cluster) configure(method string, faulty bool) error {
	file := c.bed.ProxyConfig()
	b, err := os.ReadFile(file)
	if err != nil {
		return err
	}
	config := map[string]any{}
	if err := yaml.Unmarshal(b, &config); err != nil {
		return err
	}
	if method == overlap {
		method = gate // of no account: the order decides
	}
	config["stateDir"] = c.disk.state()
	config["restart"] = map[string]any{"method": method, "cdiSpecDir": c.cdi()}
	config["runtimeEndpoint"] = "unix://" + c.bed.RuntimeSocket
	if faulty {
		config["runtimeEndpoint"] = "unix://" + c.socket
	}
	if b, err = yaml.Marshal(config); err != nil {
		return err
	}
	return os.WriteFile(file, b, 0o600)
}

func (c *cluster) cdi() string { return filepath.Join(c.bed.RunDir, "cdi") }

// restartProxy ends the proxy and starts it with a failpoint armed, none if empty. Later starts
// have none.
func (c *cluster) restartProxy(ctx context.Context, sig syscall.Signal, failpoint string) error {
	if err := c.bed.KillProxy(ctx, sig); err != nil {
		return err
	}
	return c.startProxy(ctx, failpoint)
}

func (c *cluster) startProxy(ctx context.Context, failpoint string) error {
	if err := os.WriteFile(c.failpoint, []byte(failpoint), 0o600); err != nil {
		return err
	}
	return errors.Join(c.bed.StartProxy(ctx), os.WriteFile(c.failpoint, nil, 0o600))
}

// heal brings back what a case may have left broken.
func (c *cluster) heal(ctx context.Context) error {
	c.faults.Disarm()
	errs := []error{c.disk.free()}
	if p := c.bed.Process("containerd"); p.Running() {
		errs = append(errs, p.Signal(syscall.SIGCONT))
	} else {
		errs = append(errs, c.bed.StartContainerd(ctx))
	}
	if !c.bed.Process("kubelet").Running() {
		errs = append(errs, c.bed.StartKubelet(ctx))
	}
	if !c.bed.Process("cri-proxy").Running() {
		errs = append(errs, c.startProxy(ctx, ""))
	}
	if c.controller && !c.bed.Process("cri-controller").Running() {
		errs = append(errs, c.bed.StartController(ctx))
	}
	return errors.Join(errs...)
}

// script is what the containers run. The kernel tells whether two are alive at a time: they listen
// on one port of the pod's network, which is free again when its last holder is gone, whichever way
// it went. It costs nothing while it waits.
const script = `echo start >> /work/starts
[ $VERSION != 3.0 ] || exit 3
nc -l -p $PORT >/dev/null 2>>/work/overlaps &
trap 'exit 0' TERM
sleep 2147483647 & wait $!`

// podNamed is a pod with the slot and a neighbour.
func (c *cluster) podNamed(name string) *corev1.Pod {
	grace, no := int64(2), false
	container := func(name, port string) corev1.Container {
		return corev1.Container{
			Name: name, Env: []corev1.EnvVar{{Name: "PORT", Value: port}}, Image: c.bed.Image(firstImage),
			Command:      []string{"sh", "-c", script},
			VolumeMounts: []corev1.VolumeMount{{Name: name, MountPath: "/work"}},
		}
	}
	volume := func(name string) corev1.Volume {
		return corev1.Volume{Name: name, VolumeSource: corev1.VolumeSource{EmptyDir: &corev1.EmptyDirVolumeSource{}}}
	}
	return &corev1.Pod{
		ObjectMeta: metav1.ObjectMeta{Namespace: namespace, Name: name},
		Spec: corev1.PodSpec{
			RestartPolicy: corev1.RestartPolicyAlways, TerminationGracePeriodSeconds: &grace,
			AutomountServiceAccountToken: &no, EnableServiceLinks: &no,
			Containers: []corev1.Container{container(slotName, "7001"), container(sideName, "7002")},
			Volumes:    []corev1.Volume{volume(slotName), volume(sideName)},
		},
	}
}

// volume is the slot's directory on the node.
func (c *cluster) volume(podUID string) string {
	return filepath.Join(c.bed.NodeDir, "kubelet", "pods", podUID, "volumes", "kubernetes.io~empty-dir", slotName)
}

// podFor is the pod of a case.
func (c *cluster) podFor(cs chaosCase, name string) *corev1.Pod {
	p := c.podNamed(name)
	if cs.order == upBack {
		p.Spec.Containers[0].ReadinessProbe = &corev1.Probe{
			PeriodSeconds: 1,
			ProbeHandler: corev1.ProbeHandler{
				Exec: &corev1.ExecAction{Command: []string{"sh", "-c", "test $VERSION != 2.0"}}},
		}
	}
	return p
}

// create creates pods and waits until all run.
func (c *cluster) create(ctx context.Context, pods ...*corev1.Pod) error {
	for _, p := range pods {
		if err := c.api.Create(ctx, p); err != nil {
			return err
		}
	}
	for _, p := range pods {
		n := p.Name
		err := eventually(ctx, podTimeout, func() error {
			p := &corev1.Pod{}
			if err := c.api.Get(ctx, client.ObjectKey{Namespace: namespace, Name: n}, p); err != nil {
				return err
			}
			for _, cond := range p.Status.Conditions {
				if cond.Type == corev1.PodReady && cond.Status == corev1.ConditionTrue {
					return nil
				}
			}
			return fmt.Errorf("pod %s is not ready: %+v", n, p.Status.ContainerStatuses)
		})
		if err != nil {
			return err
		}
	}
	return nil
}

// remove deletes the pod and does not wait.
func (c *cluster) remove(ctx context.Context, name string) error {
	grace := int64(1)
	return client.IgnoreNotFound(c.api.Delete(ctx, c.podNamed(name), &client.DeleteOptions{GracePeriodSeconds: &grace}))
}

// eventually calls cond until it returns nil, at most for the time given, and returns its last
// error.
func eventually(ctx context.Context, timeout time.Duration, cond func() error) error {
	ctx, cancel := context.WithTimeout(ctx, timeout)
	defer cancel()
	tick := time.NewTicker(50 * time.Millisecond) // other processes are polled
	defer tick.Stop()
	for {
		err := cond()
		if err == nil {
			return nil
		}
		select {
		case <-tick.C:
		case <-ctx.Done():
			return fmt.Errorf("not within %s: %w", timeout, err)
		}
	}
}

func must(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}
