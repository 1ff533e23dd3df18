// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package cases

import (
	"fmt"
	"strings"
	"testing"

	batchv1 "k8s.io/api/batch/v1"
	corev1 "k8s.io/api/core/v1"
	"sigs.k8s.io/controller-runtime/pkg/client"
)

// TestJobs restarts containers of Jobs. The Job's controller, which is the judge, counts the
// restarts of a pod with restartPolicy OnFailure against backoffLimit: a request that would end the
// Job is refused, unless it insists.
func TestJobs(t *testing.T) {
	t.Parallel()
	ns := namespace(t)
	const force = "\n  strategy: {forceRecreate: true}"
	cases := []struct {
		name, policy string
		limit        int
		rest         string   // of the Job's spec
		requests     []string // what they have beyond the container, one after the other
		refused      int      // which of them is refused, from 1; 0 is none
		ends         bool     // the Job fails in the end
	}{
		{name: "zero", policy: "OnFailure", limit: 0, requests: []string{""}, refused: 1},
		{name: "one", policy: "OnFailure", limit: 1, requests: []string{""}, refused: 1},
		{name: "two", policy: "OnFailure", limit: 2, requests: []string{"", ""}, refused: 2},
		{name: "many", policy: "OnFailure", limit: 6, requests: []string{"", ""}},
		{name: "forced", policy: "OnFailure", limit: 0, requests: []string{force}, ends: true},
		{name: "never", policy: "Never", limit: 0, requests: []string{"", ""}},
		{
			name: "never-fail-job", policy: "Never", limit: 0, requests: []string{""},
			rest: "podFailurePolicy: {rules: [{action: FailJob, onExitCodes: {operator: In, values: [3]}}]}",
		},
	}
	jobs := ""
	for _, c := range cases {
		jobs += fmt.Sprintf(`
apiVersion: batch/v1
kind: Job
metadata: {name: %[1]s, namespace: %[2]s}
spec:
  backoffLimit: %[3]d
  %[4]s
  template:
    metadata: {labels: {app: %[1]s}}
    spec:
      restartPolicy: %[5]s
      terminationGracePeriodSeconds: 5
      containers: [{name: app, image: %[6]s, command: [sh, -c, 'trap "exit 3" TERM; sleep 3600 & wait']}]
---
`, c.name, ns, c.limit, c.rest, c.policy, bed.Image("busybox:1.0"))
	}
	create(t, jobs)
	pods := map[string]*corev1.Pod{}
	for _, c := range cases {
		pods[c.name] = podsOf(t, ns, c.name, 1)[0]
	}
	for i := range 2 {
		requests := ""
		for _, c := range cases {
			if i < len(c.requests) {
				requests += recreate(ns, fmt.Sprintf("%s-%d", c.name, i+1), pods[c.name].Name,
					"containers: [{name: app}]"+c.requests[i])
			}
		}
		apply(t, requests)
		for _, c := range cases {
			if i < len(c.requests) {
				completed(t, ns, fmt.Sprintf("%s-%d", c.name, i+1))
			}
		}
	}
	for _, c := range cases {
		t.Run(c.name, func(t *testing.T) {
			done := int32(0)
			for i := range c.requests {
				crr := completed(t, ns, fmt.Sprintf("%s-%d", c.name, i+1))
				f := outcome(crr)
				switch {
				case i+1 == c.refused && (f == "" || !strings.Contains(f, "backoffLimit")):
					t.Errorf("request %d is to be refused for the Job's backoffLimit: %q", i+1, f)
				case i+1 != c.refused && f != "":
					t.Errorf("request %d: %s", i+1, f)
				case f == "":
					done++
				}
			}
			job := &batchv1.Job{}
			get := func() {
				must(t, api.Get(t.Context(), client.ObjectKey{Namespace: ns, Name: c.name}, job))
			}
			if c.ends {
				eventually(t, "the Job has failed", func() bool { get(); return len(job.Status.Conditions) > 0 })
				return
			}
			// The Job's controller has seen the pod as it is.
			p := getPod(t, ns, pods[c.name].Name)
			kubectl(t, "-n", ns, "annotate", "job", c.name, "seen=y")
			kubectl(t, "-n", ns, "label", "pod", p.Name, "seen=y")
			get()
			if len(job.Status.Conditions) > 0 || job.Status.Active != 1 {
				t.Errorf("the Job is %+v", job.Status)
			}
			was, is := container(t, pods[c.name], "app"), container(t, p, "app")
			if p.Status.Phase != corev1.PodRunning || is.RestartCount != done ||
				done == 0 && is.ContainerID != was.ContainerID {
				t.Errorf("%s; %d requests have succeeded", states(p), done)
			}
		})
	}
}

// TestRestartRules restarts a container whose restart rules say what to do at the exit code that it
// has when it is told to stop (KEP-5307, KEP-5532). Its end was wanted, so they do nothing.
func TestRestartRules(t *testing.T) {
	t.Parallel()
	ns := namespace(t)
	pods := ""
	for _, action := range []string{"Restart", "RestartAllContainers"} {
		pods += podWith(ns, strings.ToLower(action), "Never", "5", fmt.Sprintf(`
  containers:
  - name: app
    image: %[1]s
    command: [sh, -c, 'trap "exit 3" TERM; sleep 3600 & wait']
    restartPolicy: Never
    restartPolicyRules: [{action: %[2]s, exitCodes: {operator: In, values: [3]}}]
  - {name: neighbour, image: %[1]s, command: [sh, -c, %[3]s]}`, bed.Image("busybox:1.0"), action, loop))
	}
	create(t, pods)
	for name, before := range allReady(t, ns) {
		t.Run(name, func(t *testing.T) {
			seen := stays(t, before)
			for i := range 2 {
				request := fmt.Sprintf("%s-%d", name, i)
				apply(t, recreate(ns, request, name, "containers: [{name: app}]"))
				if f := outcome(completed(t, ns, request)); f != "" {
					t.Error(f)
				}
			}
			after := restarted(t, before, "app", 2)
			if container(t, after, "neighbour").ContainerID != container(t, before, "neighbour").ContainerID {
				t.Errorf("the neighbour was restarted: %s\n%s", states(after), events(t, ns, name))
			}
			if bad := seen(); len(bad) > 0 {
				t.Errorf("seen: %q", bad)
			}
			assertOneLive(t, ns, name, "app")
		})
	}
}
