// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

// Command demo shows cri-proxy at work: it starts a one-node cluster whose kubelet
// talks to containerd only through the proxy, runs a pod of three containers, restarts one of
// them with a ContainerRecreateRequest, and shows what changed and what did not.
//
// With KEEP=1 in the environment the cluster stays up.
package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"strings"
	"syscall"
	"text/tabwriter"
	"time"

	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/runtime"
	clientgoscheme "k8s.io/client-go/kubernetes/scheme"
	"k8s.io/client-go/tools/clientcmd"
	"sigs.k8s.io/controller-runtime/pkg/client"

	appsv1alpha1 "github.com/cri-proxy/cri-proxy/api/apps/v1alpha1"
	"github.com/cri-proxy/cri-proxy/test/testbed"
)

const (
	namespace = "pod-namespace"
	podName   = "my-pod"
	request   = "example-restart"
	// patience is for pods and requests; both take seconds.
	patience = 2 * time.Minute
)

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	if err := run(ctx, os.Stdout, os.Getenv("KEEP") != ""); err != nil {
		fmt.Fprintln(os.Stderr, "demo:", err)
		stop()
		os.Exit(1)
	}
}

type demo struct {
	out  io.Writer
	bed  *testbed.Bed
	api  client.Client
	root string // of the checkout
}

func run(ctx context.Context, out io.Writer, keep bool) (err error) {
	began := time.Now()
	d := &demo{out: out}
	d.heading("A one-node cluster whose kubelet talks to containerd only through cri-proxy")
	d.bed, err = testbed.Start(ctx, testbed.Options{Mode: testbed.ModeCluster, Log: indent{out}, Detach: keep})
	if err != nil {
		return err
	}
	defer func() {
		if keep && err == nil {
			return
		}
		d.heading("Taking the cluster down")
		closing, cancel := context.WithTimeout(context.WithoutCancel(ctx), patience)
		defer cancel()
		err = errors.Join(err, d.bed.Close(closing))
	}()
	if err := d.install(ctx); err != nil {
		return err
	}
	up := time.Since(began)
	if err := d.restart(ctx); err != nil {
		return err
	}
	d.heading(fmt.Sprintf("Done: %s to a running cluster, %s in all", round(up), round(time.Since(began))))
	if keep {
		d.say("The cluster stays up. To look around:")
		d.say("    export KUBECONFIG=%s PATH=%s:$PATH", d.bed.Kubeconfig, d.bed.Bin)
		d.say("    kubectl -n %s get crr,pods -o wide", namespace)
		d.say("    cri-proxy ctl --admin-socket %s status", d.bed.AdminSocket)
		d.say("To take it down:")
		d.say("    go run ./test/cmd/testbed down %s", d.bed.ID)
	} else {
		d.say("make demo KEEP=1 leaves the cluster up.")
	}
	return nil
}

func (d *demo) install(ctx context.Context) error {
	config, err := clientcmd.BuildConfigFromFlags("", d.bed.Kubeconfig)
	if err != nil {
		return err
	}
	scheme := runtime.NewScheme()
	if err := errors.Join(clientgoscheme.AddToScheme(scheme), appsv1alpha1.AddToScheme(scheme)); err != nil {
		return err
	}
	if d.api, err = client.New(config, client.Options{Scheme: scheme}); err != nil {
		return err
	}
	if d.root, err = testbed.SourceDir(""); err != nil {
		return err
	}
	d.heading("Installing the custom resource definition and the controller")
	if err := d.kubectl(ctx, "", "apply", "-f", filepath.Join(d.root, "deploy", "crds")); err != nil {
		return err
	}
	if _, err := d.bed.Kubectl(ctx, "wait", "--for=condition=Established", "crd/containerrecreaterequests.apps.kruise.io", "--timeout=30s"); err != nil {
		return err
	}
	return d.bed.StartController(ctx)
}

func (d *demo) restart(ctx context.Context) error {
	d.heading("A pod of three containers, restartPolicy Never: what stops in it stays stopped, says Kubernetes")
	if err := d.bed.CreateNamespace(ctx, namespace); err != nil {
		return err
	}
	if err := d.kubectl(ctx, d.pod(), "apply", "-f", "-"); err != nil {
		return err
	}
	if _, err := d.bed.Kubectl(ctx, "-n", namespace, "wait", "--for=condition=Ready", "pod/"+podName, "--timeout=120s"); err != nil {
		return err
	}
	before := &corev1.Pod{}
	if err := d.api.Get(ctx, client.ObjectKey{Namespace: namespace, Name: podName}, before); err != nil {
		return err
	}
	d.table(before, nil)

	d.heading("Restarting the container app")
	file := filepath.Join(d.root, "deploy", "examples", "restart.yaml") // as found in the field
	manifest, err := os.ReadFile(file)
	if err != nil {
		return err
	}
	_, _ = indent{d.out}.Write(manifest)
	d.say("")
	began := time.Now()
	if err := d.kubectl(ctx, "", "apply", "-f", file); err != nil {
		return err
	}
	crr, err := d.follow(ctx, began)
	if err != nil {
		return err
	}
	d.say("")
	if err := d.kubectl(ctx, "", "-n", namespace, "get", "containerrecreaterequest", request); err != nil {
		return err
	}
	for _, s := range crr.Status.ContainerRecreateStates {
		if s.Phase != appsv1alpha1.ContainerRecreateRequestSucceeded {
			return fmt.Errorf("container %s was not restarted: %s", s.Name, s.Message)
		}
	}

	d.heading("Before and after")
	after := &corev1.Pod{}
	if err := d.api.Get(ctx, client.ObjectKey{Namespace: namespace, Name: podName}, after); err != nil {
		return err
	}
	d.table(before, after)
	if err := changes(before, after); err != nil {
		return err
	}

	d.heading("The old container's last words, and what the node tells of the restart")
	if err := d.kubectl(ctx, "", "-n", namespace, "logs", podName, "-c", "app", "--previous"); err != nil {
		return err
	}
	return d.exec(ctx, filepath.Join(d.bed.Bin, "cri-proxy"), "ctl", "--admin-socket", d.bed.AdminSocket, "ops", string(crr.UID)+".app")
}

// pod is a pod whose containers say when they start and when they are asked to stop.
func (d *demo) pod() string {
	var b strings.Builder
	fmt.Fprintf(&b, "apiVersion: v1\nkind: Pod\nmetadata: {name: %s, namespace: %s}\nspec:\n  restartPolicy: Never\n  terminationGracePeriodSeconds: 10\n  containers:\n", podName, namespace)
	for _, name := range []string{"app", "metrics", "proxy"} {
		fmt.Fprintf(&b, "  - name: %s\n    image: %q\n    command: [sh, -c, 'trap \"echo asked to stop, leaving with 7; exit 7\" TERM; echo %s has started; while :; do sleep 0.1; done']\n",
			name, d.bed.Image("busybox:1.0"), name)
	}
	return b.String()
}

// follow prints the request's phases until it is completed.
func (d *demo) follow(ctx context.Context, began time.Time) (*appsv1alpha1.ContainerRecreateRequest, error) {
	ctx, cancel := context.WithTimeout(ctx, patience)
	defer cancel()
	tick := time.NewTicker(20 * time.Millisecond)
	defer tick.Stop()
	last := ""
	for {
		crr := &appsv1alpha1.ContainerRecreateRequest{}
		if err := d.api.Get(ctx, client.ObjectKey{Namespace: namespace, Name: request}, crr); err != nil {
			return nil, err
		}
		now := string(crr.Status.Phase)
		for _, s := range crr.Status.ContainerRecreateStates {
			now += fmt.Sprintf("  %s %s", s.Name, s.Phase)
		}
		if now != last && now != "" {
			d.say("%8s  %s", round(time.Since(began)), now)
			last = now
		}
		if crr.Status.Phase == appsv1alpha1.ContainerRecreateRequestCompleted {
			return crr, nil
		}
		select {
		case <-tick.C:
		case <-ctx.Done():
			return nil, fmt.Errorf("the request is not completed: %w; see the logs of cri-controller and cri-proxy in %s", ctx.Err(), d.bed.Logs)
		}
	}
}

// changes checks what the table shows.
func changes(before, after *corev1.Pod) error {
	if before.UID != after.UID || before.Status.PodIP != after.Status.PodIP || after.Status.Phase != corev1.PodRunning {
		return fmt.Errorf("the pod is not the one it was: UID %s, address %s, %s", after.UID, after.Status.PodIP, after.Status.Phase)
	}
	for i, was := range before.Status.ContainerStatuses {
		is := after.Status.ContainerStatuses[i]
		if restarted := is.ContainerID != was.ContainerID; restarted != (was.Name == "app") {
			return fmt.Errorf("container %s: restarted is %t", was.Name, restarted)
		}
	}
	return nil
}

// table shows a pod, or what became of it.
func (d *demo) table(before, after *corev1.Pod) {
	var b bytes.Buffer // the writer sends cells, indent wants lines
	w := tabwriter.NewWriter(&b, 0, 8, 2, ' ', 0)
	flush := func() {
		_ = w.Flush()
		_, _ = b.WriteTo(indent{d.out})
	}
	row := func(cells ...string) { _, _ = fmt.Fprintln(w, strings.Join(cells, "\t")) }
	if after == nil {
		row("POD", "UID", "ADDRESS", "PHASE")
		row(before.Name, string(before.UID), before.Status.PodIP, string(before.Status.Phase))
		flush()
		d.say("")
		row("CONTAINER", "ID", "STATE", "RESTARTS")
		for _, c := range before.Status.ContainerStatuses {
			row(c.Name, short(c.ContainerID), state(c.State), fmt.Sprint(c.RestartCount))
		}
		flush()
		return
	}
	same := func(a, b string) string {
		if a == b {
			return "same"
		}
		return "CHANGED"
	}
	row("", "BEFORE", "AFTER", "")
	row("pod UID", string(before.UID), string(after.UID), same(string(before.UID), string(after.UID)))
	row("pod address", before.Status.PodIP, after.Status.PodIP, same(before.Status.PodIP, after.Status.PodIP))
	row("pod phase", string(before.Status.Phase), string(after.Status.Phase), same(string(before.Status.Phase), string(after.Status.Phase)))
	for i, was := range before.Status.ContainerStatuses {
		is := after.Status.ContainerStatuses[i]
		row(was.Name+" container ID", short(was.ContainerID), short(is.ContainerID), same(was.ContainerID, is.ContainerID))
		row(was.Name+" restarts", fmt.Sprint(was.RestartCount), fmt.Sprint(is.RestartCount), same(fmt.Sprint(was.RestartCount), fmt.Sprint(is.RestartCount)))
		if last := is.LastTerminationState.Terminated; last != nil {
			row(was.Name+" last state", "-", fmt.Sprintf("exit code %d", last.ExitCode), "")
		}
	}
	flush()
}

func short(id string) string {
	_, id, _ = strings.Cut(id, "://")
	return id[:min(len(id), 13)]
}

func state(s corev1.ContainerState) string {
	switch {
	case s.Running != nil:
		return "running"
	case s.Terminated != nil:
		return "terminated"
	default:
		return "waiting"
	}
}

// kubectl runs kubectl and shows what a person would type and see.
func (d *demo) kubectl(ctx context.Context, stdin string, args ...string) error {
	d.say("$ kubectl %s", strings.Join(args, " "))
	cmd := exec.CommandContext(ctx, filepath.Join(d.bed.Bin, "kubectl"), args...)
	cmd.Env = append(os.Environ(), "KUBECONFIG="+d.bed.Kubeconfig, "HOME="+d.bed.Dir)
	cmd.Stdin = strings.NewReader(stdin)
	return d.show(cmd)
}

func (d *demo) exec(ctx context.Context, program string, args ...string) error {
	d.say("$ %s %s", filepath.Base(program), strings.Join(args, " "))
	return d.show(exec.CommandContext(ctx, program, args...))
}

func (d *demo) show(cmd *exec.Cmd) error {
	out, err := cmd.CombinedOutput()
	_, _ = indent{d.out}.Write(out)
	if err != nil {
		return fmt.Errorf("%s: %w", strings.Join(cmd.Args, " "), err)
	}
	return nil
}

func (d *demo) heading(s string) { _, _ = fmt.Fprintf(d.out, "\n── %s\n\n", s) }

func (d *demo) say(format string, args ...any) {
	_, _ = indent{d.out}.Write([]byte(fmt.Sprintf(format, args...) + "\n"))
}

func round(d time.Duration) time.Duration {
	if d < 10*time.Second {
		return d.Round(10 * time.Millisecond)
	}
	return d.Round(100 * time.Millisecond)
}

// indent sets whole lines off from the headings.
type indent struct{ w io.Writer }

func (i indent) Write(b []byte) (int, error) {
	for line := range strings.Lines(string(b)) {
		if _, err := io.WriteString(i.w, "   "+line); err != nil {
			return 0, err
		}
	}
	return len(b), nil
}
