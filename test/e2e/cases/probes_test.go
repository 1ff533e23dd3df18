// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package cases

import (
	"context"
	"fmt"
	"net/http"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	"sigs.k8s.io/controller-runtime/pkg/client"
)

// probed is a container of the app image that listens on the port after the delay.
func probed(name, image, port, delay, rest string) string {
	return fmt.Sprintf(`
  - name: %s
    image: %s
    env: [{name: PORT, value: "%s"}, {name: STARTUP_DELAY, value: %s}]
    %s`, name, image, port, delay, rest)
}

// podWith is a pod with these containers.
func podWith(ns, name, policy, grace, containers string) string {
	return fmt.Sprintf(`
apiVersion: v1
kind: Pod
metadata: {name: %s, namespace: %s}
spec:
  restartPolicy: %s
  terminationGracePeriodSeconds: %s%s
---
`, name, ns, policy, grace, containers)
}

// serves says whether the pod answers on the port. A slow answer is one.
func serves(ctx context.Context, ip, port string) bool {
	ctx, cancel := context.WithTimeout(ctx, 10*time.Second)
	defer cancel()
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, "http://"+ip+":"+port+"/healthz", nil)
	if err != nil {
		return false
	}
	c := http.Client{Transport: &http.Transport{DisableKeepAlives: true}}
	resp, err := c.Do(req)
	if err != nil {
		return false
	}
	_ = resp.Body.Close()
	return resp.StatusCode == http.StatusOK
}

// stays watches that a pod is the same and keeps running until the returned function is called,
// which tells what else was seen.
func stays(t testing.TB, before *corev1.Pod) func() []string {
	t.Helper()
	ctx, cancel := context.WithCancel(context.Background())
	seen := map[string]bool{}
	done := make(chan struct{})
	go func() {
		defer close(done)
		for ctx.Err() == nil {
			p := &corev1.Pod{}
			if err := api.Get(ctx, client.ObjectKeyFromObject(before), p); err != nil {
				if ctx.Err() == nil {
					seen[err.Error()] = true
				}
			} else if p.UID != before.UID || p.Status.Phase != corev1.PodRunning {
				seen[fmt.Sprintf("pod %s, %s", p.UID, states(p))] = true
			}
			select {
			case <-ctx.Done():
			case <-time.After(200 * time.Millisecond): // polling another process
			}
		}
	}()
	end := sync.OnceFunc(func() { cancel(); <-done })
	t.Cleanup(end)
	return func() []string {
		end()
		var out []string
		for s := range seen {
			out = append(out, s)
		}
		return out
	}
}

// TestSidecar restarts a sidecar, a container beside it, and both in order, under policies Always
// and Never. Both have all kinds of probes, and listen some time after their start: they serve when
// they are said to have been restarted.
func TestSidecar(t *testing.T) {
	t.Parallel()
	ns := namespace(t)
	// A slow machine answers late, a container that does not listen refuses at once.
	probes := func(port string) string {
		return strings.ReplaceAll(`startupProbe: {httpGet: {port: PORT, path: /healthz}, periodSeconds: 1, timeoutSeconds: 5, failureThreshold: 60}
    livenessProbe: {httpGet: {port: PORT, path: /healthz}, periodSeconds: 1, timeoutSeconds: 5, failureThreshold: 4}
    readinessProbe: {httpGet: {port: PORT, path: /readyz}, periodSeconds: 1}`, "PORT", port)
	}
	policies := []string{"Always", "Never"}
	pods := ""
	for _, policy := range policies {
		pods += podWith(ns, strings.ToLower(policy), policy, "5", "\n  initContainers:\n"+
			fmt.Sprintf(`  - {name: setup, image: %s, command: ["true"]}`, bed.Image("busybox:1.0"))+
			probed("mesh", bed.Image("app:1"), "9090", "6s", "restartPolicy: Always\n    "+
				`lifecycle: {preStop: {httpGet: {port: 9090, path: "/hook?name=pre"}}}`+"\n    "+probes("9090"))+
			"\n  containers:"+probed("app", bed.Image("app:1"), "8080", "6s", probes("8080")))
	}
	create(t, pods)
	before := allReady(t, ns)
	seen := map[string]func() []string{}
	for name, p := range before {
		seen[name] = stays(t, p)
	}
	for i, step := range []string{
		"containers: [{name: mesh}]",
		"containers: [{name: app}]",
		"containers: [{name: mesh}, {name: app}]\n  strategy: {orderedRecreate: true, minStartedSeconds: 1}",
	} {
		for name := range before {
			apply(t, recreate(ns, fmt.Sprintf("%s-%d", name, i), name, step))
		}
		for name, p := range before {
			if f := outcome(completed(t, ns, fmt.Sprintf("%s-%d", name, i))); f != "" {
				t.Errorf("%s, %s: %s", name, step, f)
			}
			for _, port := range []string{"8080", "9090"} {
				if !serves(t.Context(), p.Status.PodIP, port) {
					t.Errorf("%s, %s: nobody serves on port %s though the request has completed", name, step, port)
				}
			}
		}
	}
	for name := range before {
		after := ready(t, ns, name)
		for _, c := range []string{"mesh", "app"} {
			if n := container(t, after, c).RestartCount; n != 2 {
				t.Errorf("%s: container %s has been restarted %d times\n%s", name, c, n, events(t, ns, name))
			}
		}
		if n := container(t, after, "setup").RestartCount; n != 0 {
			t.Errorf("%s: the init container has been run again", name)
		}
		if bad := seen[name](); len(bad) > 0 {
			t.Errorf("%s: seen: %q", name, bad)
		}
	}
}

// order is a request to restart app in the pod; or, with an image, a rollout of that, and with
// "restart" for one a rollout that restarts only.
func order(ns, pod, image string) string {
	switch image {
	case "":
		return recreate(ns, pod, pod, "containers: [{name: app}]")
	case "restart":
		image = ""
	}
	return rollout(ns, pod, "{podName: "+pod+"}", image, "progressDeadlineSeconds: 90")
}

// TestDrain has the liveness probe fail while the old container drains: it has closed its port, and
// takes longer to end than the probe waits. The restart ends well under every policy, and
// the pod goes on.
func TestDrain(t *testing.T) {
	t.Parallel()
	ns := namespace(t)
	dir := scratchDir(t)
	httpGet := `{httpGet: {port: 8080, path: /}, periodSeconds: 1, failureThreshold: 2, timeoutSeconds: 1}`
	tcp := `{tcpSocket: {port: 8080}, periodSeconds: 1, failureThreshold: 2}`
	cases := []struct{ name, policy, probe, image string }{
		{"always", "Always", httpGet, ""},
		{"never", "Never", httpGet, ""},
		{"on-failure", "OnFailure", httpGet, ""},
		{"never-tcp", "Never", tcp, ""},
		{"rollout", "Always", tcp, "restart"},
		{"rollout-never", "Never", httpGet, "restart"},
		{"image", "Never", httpGet, bed.Image("busybox:2.0")},
	}
	pods := ""
	for _, c := range cases {
		pods += podWith(ns, c.name, c.policy, "30", fmt.Sprintf(`
  containers:
  - name: app
    image: %[1]s
    command:
    - sh
    - -c
    - |
      mkdir -p /www; echo ok >/www/index.html
      httpd -f -p 8080 -h /www & server=$!
      trap 'echo asked $VERSION >>/trace/%[2]s; kill $server; sleep 8; echo ended $VERSION >>/trace/%[2]s; exit 0' TERM
      echo began $VERSION >>/trace/%[2]s
      while :; do sleep 0.2; done
    volumeMounts: [{name: trace, mountPath: /trace}]
    livenessProbe: %[3]s
  - {name: neighbour, image: %[1]s, command: [sh, -c, %[4]s]}
  volumes: [{name: trace, hostPath: {path: %[5]s}}]`, bed.Image("busybox:1.0"), c.name, c.probe, loop, dir))
	}
	create(t, pods)
	before := allReady(t, ns)
	seen := map[string]func() []string{}
	orders := ""
	for _, c := range cases {
		seen[c.name] = stays(t, before[c.name])
		orders += order(ns, c.name, c.image)
	}
	apply(t, orders)
	for _, c := range cases {
		t.Run(c.name, func(t *testing.T) {
			failure := ""
			then := "began 1.0"
			switch c.image {
			case "":
				failure = outcome(completed(t, ns, c.name))
			case "restart":
				failure = complete(ended(t, ns, c.name))
			default:
				failure, then = complete(ended(t, ns, c.name)), "began 2.0"
			}
			if failure != "" {
				t.Error(failure)
			}
			after := ready(t, ns, c.name)
			if s := container(t, after, "app"); s.RestartCount != 1 || s.State.Running == nil {
				t.Errorf("%s", states(after))
			}
			want, got := []string{"began 1.0", "asked 1.0", "ended 1.0", then}, linesOf(t, dir, c.name)
			if !slices.Equal(got, want) {
				t.Errorf("the pod wrote %q, want %q", got, want)
			}
			if container(t, after, "neighbour").ContainerID != container(t, before[c.name], "neighbour").ContainerID {
				t.Error("the neighbour was restarted")
			}
			if bad := seen[c.name](); len(bad) > 0 {
				t.Errorf("seen: %q", bad)
			}
			if e := events(t, ns, c.name); !strings.Contains(e, "Liveness probe failed") {
				t.Errorf("the test is wrong, the probe has not failed:\n%s", e)
			}
			assertOneLive(t, ns, c.name, "app")
		})
	}
}

// linesOf are the lines of a pod's file.
func linesOf(t testing.TB, dir, pod string) []string {
	t.Helper()
	return strings.Split(strings.TrimSpace(readFile(t, dir+"/"+pod)), "\n")
}

// TestStartup restarts containers that listen long after their start, which only their startupProbe
// waits for. No liveness probe kills them before it has passed, and what asked for the
// restart does not say that it is done before either.
func TestStartup(t *testing.T) {
	t.Parallel()
	ns := namespace(t)
	probes := `startupProbe: {httpGet: {port: 8080, path: /healthz}, periodSeconds: 5, failureThreshold: 60, timeoutSeconds: 5}
    livenessProbe: {httpGet: {port: 8080, path: /healthz}, periodSeconds: 1, failureThreshold: 1, timeoutSeconds: 5}`
	cases := []struct{ name, policy, image string }{
		{"request-always", "Always", ""},
		{"request-on-failure", "OnFailure", ""},
		{"request-never", "Never", ""},
		{"restart-never", "Never", "restart"},
		{"image-always", "Always", bed.Image("app:2")},
		{"image-never", "Never", bed.Image("app:2")},
	}
	pods := ""
	for _, c := range cases {
		pods += podWith(ns, c.name, c.policy, "5",
			"\n  containers:"+probed("app", bed.Image("app:1"), "8080", "8s", probes)+
				fmt.Sprintf("\n  - {name: neighbour, image: %s, command: [sh, -c, %s]}",
					bed.Image("busybox:1.0"), loop))
	}
	create(t, pods)
	before := allReady(t, ns)
	seen := map[string]func() []string{}
	orders := ""
	for _, c := range cases {
		seen[c.name] = stays(t, before[c.name])
		orders += order(ns, c.name, c.image)
	}
	apply(t, orders)
	type end struct {
		failure string
		serves  bool
	}
	ends := make(map[string]chan end, len(cases))
	for _, c := range cases {
		ends[c.name] = make(chan end, 1)
	}
	var wg sync.WaitGroup
	defer wg.Wait()
	for _, c := range cases {
		// Each is asked at the moment when it is said to be done.
		wg.Go(func() {
			defer close(ends[c.name])
			var e end
			if c.image == "" {
				e.failure = outcome(completed(t, ns, c.name))
			} else {
				e.failure = complete(ended(t, ns, c.name))
			}
			e.serves = serves(t.Context(), before[c.name].Status.PodIP, "8080")
			ends[c.name] <- e
		})
	}
	for _, c := range cases {
		t.Run(c.name, func(t *testing.T) {
			e, ok := <-ends[c.name]
			if !ok {
				t.Fatal("it has not ended")
			}
			if e.failure != "" {
				t.Error(e.failure)
			}
			if !e.serves {
				t.Error("it does not serve when it is said to have been restarted")
			}
			after := ready(t, ns, c.name)
			s := container(t, after, "app")
			if s.RestartCount != 1 || s.State.Running == nil {
				t.Errorf("%s\n%s", states(after), events(t, ns, c.name))
			}
			if last := s.LastTerminationState.Terminated; last == nil ||
				last.ContainerID != container(t, before[c.name], "app").ContainerID {
				t.Errorf("another container has ended since: %+v", last)
			}
			if bad := seen[c.name](); len(bad) > 0 {
				t.Errorf("seen: %q", bad)
			}
			// The old container may fail its liveness probe as it ends; what kubelet does for that
			// comes to the new one.
			if told := events(t, ns, c.name); strings.Contains(told, "Failed Error") {
				t.Errorf("kubelet could not do something:\n%s", told)
			}
			assertOneLive(t, ns, c.name, "app")
		})
	}
}

// TestStartupInRollout changes the images of pods that have a startupProbe and no readinessProbe:
// no more of them are out of service at once than may be.
func TestStartupInRollout(t *testing.T) {
	t.Parallel()
	ns := namespace(t)
	const pods, unavailable = 3, 1
	create(t, fmt.Sprintf(`
apiVersion: apps/v1
kind: Deployment
metadata: {name: slow, namespace: %[1]s}
spec:
  replicas: %[2]d
  selector: {matchLabels: {app: slow}}
  template:
    metadata: {labels: {app: slow}}
    spec:
      terminationGracePeriodSeconds: 2
      containers:
      - name: app
        image: %[3]s
        env: [{name: STARTUP_DELAY, value: 5s}]
        startupProbe: {httpGet: {port: 8080, path: /healthz}, periodSeconds: 4, failureThreshold: 60, timeoutSeconds: 5}
---
apiVersion: policy/v1
kind: PodDisruptionBudget
metadata: {name: slow, namespace: %[1]s}
spec: {minAvailable: %[4]d, selector: {matchLabels: {app: slow}}}
---
`, ns, pods, bed.Image("app:1"), pods-unavailable))
	before := podsOf(t, ns, "slow", pods)
	ctx, cancel := context.WithCancel(t.Context())
	fewest := pods
	done := make(chan struct{})
	go func() {
		defer close(done)
		for ctx.Err() == nil {
			n := 0
			for _, p := range before {
				if serves(ctx, p.Status.PodIP, "8080") {
					n++
				}
			}
			if ctx.Err() == nil {
				fewest = min(fewest, n)
			}
		}
	}()
	end := sync.OnceFunc(func() { cancel(); <-done })
	t.Cleanup(end)
	apply(t, rollout(ns, "slow", "{workloadRef: {kind: Deployment, name: slow}}", bed.Image("app:2"),
		"progressDeadlineSeconds: 90, maxUnavailable: 1"))
	if f := complete(ended(t, ns, "slow")); f != "" {
		t.Error(f)
	}
	for _, p := range before {
		if !serves(t.Context(), p.Status.PodIP, "8080") {
			t.Errorf("pod %s does not serve though the rollout is complete", p.Name)
		}
	}
	end()
	if fewest < pods-unavailable {
		t.Errorf("at some moment only %d of %d pods served, %d may be unavailable", fewest, pods, unavailable)
	}
	for i, p := range podsOf(t, ns, "slow", pods) {
		if s := container(t, p, "app"); p.UID != before[i].UID || s.RestartCount != 1 || s.Image != bed.Image("app:2") {
			t.Errorf("pod %s: %s, image %s", p.Name, states(p), s.Image)
		}
	}
}

// podsOf returns the pods of a workload, in order of name, when there are so many and all are
// ready.
func podsOf(t testing.TB, ns, app string, n int) []*corev1.Pod {
	t.Helper()
	var out []*corev1.Pod
	eventually(t, fmt.Sprintf("%d pods of %s are ready", n, app), func() bool {
		list := &corev1.PodList{}
		must(t, api.List(t.Context(), list, client.InNamespace(ns), client.MatchingLabels{"app": app}))
		out = nil
		for i := range list.Items {
			if isReady(&list.Items[i]) {
				out = append(out, &list.Items[i])
			}
		}
		return len(out) == n && len(list.Items) == n
	})
	slices.SortFunc(out, func(a, b *corev1.Pod) int { return strings.Compare(a.Name, b.Name) })
	return out
}
