// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	"fmt"
	"runtime"
	"strings"
	"sync"

	corev1 "k8s.io/api/core/v1"
	kube "sigs.k8s.io/controller-runtime/pkg/client"
)

const namespace = "soak"

// Ports of a pod's first and second container.
const (
	appPort  = 8080
	sidePort = 8081
)

// pod is one pod of the run.
type pod struct {
	name, uid, ip string
	// shared is set when its containers listen with SO_REUSEPORT, so that two of a slot can run at
	// a time. In the others a second process could not listen, and its container would exit.
	shared bool
	slots  []*slot
}

// slot is one container of a pod over all its attempts.
type slot struct {
	pod       *pod
	container string
	port      int
	// first is the ID of the container that kubelet made.
	first  string
	client *client

	mu       sync.Mutex // guards all following fields
	restarts []*restart
}

func (s *slot) String() string { return s.pod.name + "/" + s.container }

// commanded returns the restarts of the slot so far.
func (s *slot) commanded() []*restart {
	s.mu.Lock()
	defer s.mu.Unlock()
	return append([]*restart(nil), s.restarts...)
}

// manifest is the i-th pod. Pods differ in what could disturb a restart: what kubelet does when it
// sees a container exit, an own port or a shared one, a neighbour in the pod, probes that kubelet
// runs meanwhile.
func manifest(i int, image string, cpu int) string {
	var b strings.Builder
	fmt.Fprintf(&b, "---\napiVersion: v1\nkind: Pod\nmetadata: {name: %s, namespace: %s, labels: {app: soak}}\n",
		podName(i), namespace)
	policy := [...]corev1.RestartPolicy{corev1.RestartPolicyAlways, corev1.RestartPolicyNever,
		corev1.RestartPolicyOnFailure}[i%3]
	fmt.Fprintf(&b, "spec:\n  restartPolicy: %s\n  terminationGracePeriodSeconds: 5\n  automountServiceAccountToken: "+
		"false\n  containers:\n", policy)
	one := func(name string, port int, probe string) {
		reuse := "0"
		if shared(i) {
			reuse = "newest"
		}
		fmt.Fprintf(&b, "  - name: %s\n    image: %q\n    env: [{name: PORT, value: %q}, {name: REUSEPORT, value: "+
			"%q}]\n", name, image, fmt.Sprint(port), reuse)
		fmt.Fprintf(&b, "    resources: {requests: {cpu: %dm, memory: 4Mi}, limits: {memory: 64Mi}}\n%s", cpu, probe)
	}
	probe := ""
	switch i % 5 {
	case 1:
		probe = "    livenessProbe: {exec: {command: [/app, version]}, periodSeconds: 10}\n"
	case 2:
		probe = fmt.Sprintf("    readinessProbe: {httpGet: {path: /readyz, port: %d}, periodSeconds: 5}\n", appPort)
	}
	one("app", appPort, probe)
	if i%5 == 0 {
		one("side", sidePort, "")
	}
	return b.String()
}

// share is the CPU that each of the containers asks for, in thousandths: three quarters of the
// machine for all, at most 25. With next to nothing the servers of a loaded machine do not get to
// answer for seconds, and that would be taken for a fault.
func share(pods int) int {
	containers := pods + (pods+4)/5
	return max(1, min(25, 750*runtime.NumCPU()/containers))
}

func podName(i int) string { return fmt.Sprintf("soak-%02d", i) }

func shared(i int) bool { return i%2 == 0 }

// deploy creates the pods, waits until all are ready and fills in s.pods.
func (s *soak) deploy(ctx context.Context) error {
	if err := s.bed.CreateNamespace(ctx, namespace); err != nil {
		return err
	}
	var all strings.Builder
	for i := range s.o.pods {
		all.WriteString(manifest(i, s.bed.Image("app:1"), share(s.o.pods)))
	}
	if err := s.bed.KubectlApply(ctx, all.String()); err != nil {
		return err
	}
	if _, err := s.bed.Kubectl(ctx, "-n", namespace, "wait", "--for=condition=Ready", "pods", "-l", "app=soak",
		"--timeout=300s"); err != nil {
		return err
	}
	list := &corev1.PodList{}
	if err := s.api.List(ctx, list, kube.InNamespace(namespace)); err != nil {
		return err
	}
	if len(list.Items) != s.o.pods {
		return fmt.Errorf("%d pods are there, want %d", len(list.Items), s.o.pods)
	}
	for _, item := range list.Items {
		p := &pod{name: item.Name, uid: string(item.UID), ip: item.Status.PodIP}
		var n int
		if _, err := fmt.Sscanf(item.Name, "soak-%d", &n); err != nil {
			return fmt.Errorf("pod %s is not of this run: %w", item.Name, err)
		}
		p.shared = shared(n)
		for _, c := range item.Status.ContainerStatuses {
			if c.RestartCount != 0 {
				return fmt.Errorf("pod %s: container %s has been restarted before the run began", p.name, c.Name)
			}
			sl := &slot{pod: p, container: c.Name, port: appPort, first: bareID(c.ContainerID)}
			if c.Name == "side" {
				sl.port = sidePort
			}
			p.slots = append(p.slots, sl)
		}
		s.pods = append(s.pods, p)
	}
	return nil
}

func bareID(id string) string {
	if _, bare, found := strings.Cut(id, "://"); found {
		return bare
	}
	return id
}
