// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package main

import (
	"bytes"
	"context"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"text/tabwriter"
	"time"

	corev1 "k8s.io/api/core/v1"
	"sigs.k8s.io/controller-runtime/pkg/client"

	appsv1alpha1 "github.com/cri-proxy/cri-proxy/api/apps/v1alpha1"
)

// Names in deploy/examples/restart.yaml.
const (
	namespace = "pod-namespace"
	podName   = "my-pod"
	request   = "example-restart"
)

// restart restarts one container of three.
func (d *demo) restart(ctx context.Context) error {
	d.heading("A pod of three containers, restartPolicy Never: what stops in it stays stopped, says Kubernetes")
	if err := d.bed.CreateNamespace(ctx, namespace); err != nil {
		return err
	}
	if err := d.kubectl(ctx, d.pod(), "apply", "-f", "-"); err != nil {
		return err
	}
	if _, err := d.bed.Kubectl(ctx, "-n", namespace, "wait", "--for=condition=Ready", "pod/"+podName,
		"--timeout=120s"); err != nil {
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
	return d.exec(ctx, filepath.Join(d.bed.Bin, "cri-proxy"), "ctl", "--admin-socket", d.bed.AdminSocket, "ops",
		string(crr.UID)+".app")
}

// pod is a pod whose containers say when they start and when they are asked to stop.
func (d *demo) pod() string {
	var b strings.Builder
	fmt.Fprintf(&b, "apiVersion: v1\nkind: Pod\nmetadata: {name: %s, namespace: %s}\nspec:\n  restartPolicy: Never\n "+
		" terminationGracePeriodSeconds: 10\n  containers:\n", podName, namespace)
	for _, name := range []string{"app", "metrics", "proxy"} {
		fmt.Fprintf(&b, "  - name: %s\n    image: %q\n    command: [sh, -c, 'trap \"echo asked to stop, leaving with "+
			"7; exit 7\" TERM; echo %s has started; while :; do sleep 0.1; done']\n",
			name, d.bed.Image("busybox:1.0"), name)
	}
	return b.String()
}

// follow prints the request's phases until it is completed.
func (d *demo) follow(ctx context.Context, began time.Time) (*appsv1alpha1.ContainerRecreateRequest, error) {
	ctx, cancel := context.WithTimeout(ctx, timeout)
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
			return nil, fmt.Errorf("the request is not completed: %w; see the logs of cri-controller and cri-proxy "+
				"in %s", ctx.Err(), d.bed.Logs)
		}
	}
}

// changes checks what the table shows.
func changes(before, after *corev1.Pod) error {
	if before.UID != after.UID || before.Status.PodIP != after.Status.PodIP || after.Status.Phase != corev1.PodRunning {
		return fmt.Errorf("the pod is not the one it was: UID %s, address %s, %s", after.UID, after.Status.PodIP,
			after.Status.Phase)
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
	row("pod phase", string(before.Status.Phase), string(after.Status.Phase),
		same(string(before.Status.Phase), string(after.Status.Phase)))
	for i, was := range before.Status.ContainerStatuses {
		is := after.Status.ContainerStatuses[i]
		row(was.Name+" container ID", short(was.ContainerID), short(is.ContainerID),
			same(was.ContainerID, is.ContainerID))
		row(was.Name+" restarts", fmt.Sprint(was.RestartCount), fmt.Sprint(is.RestartCount),
			same(fmt.Sprint(was.RestartCount), fmt.Sprint(is.RestartCount)))
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
