// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package e2e

import (
	"fmt"
	"strings"
	"testing"
	"time"

	"google.golang.org/protobuf/types/known/durationpb"
	corev1 "k8s.io/api/core/v1"

	opsv1 "github.com/cri-proxy/cri-proxy/api/ops/v1"
)

// draining is a pod whose container app closes its port when it is asked to stop, and then takes
// some seconds to end.
func draining(ns, name string, policy corev1.RestartPolicy, alone, sidecar bool) string {
	app := fmt.Sprintf(`
  - name: app
    image: "%s"
    command: [sh, -c, 'mkdir -p /www; httpd -f -p 8080 -h /www & h=$!; trap "kill $h; sleep 6; exit 0" TERM; while :; do sleep 0.1; done']
    livenessProbe: {tcpSocket: {port: 8080}, periodSeconds: 1, failureThreshold: 2}`, bed.Image("busybox:1.0"))
	side := fmt.Sprintf(`
  - name: side
    image: "%s"
    command: [sh, -c, 'trap exit TERM; while :; do sleep 0.1; done']`, bed.Image("busybox:1.0"))
	first, rest := "", app+side
	switch {
	case sidecar:
		first, rest = "\n  initContainers:"+app+"\n    restartPolicy: Always", side
	case alone:
		rest = app
	}
	return fmt.Sprintf(`
apiVersion: v1
kind: Pod
metadata: {name: %s, namespace: %s}
spec:
  restartPolicy: %s
  terminationGracePeriodSeconds: 20%s
  containers:%s
---
`, name, ns, policy, first, rest)
}

// TestProbeFailsWhileDraining restarts containers whose liveness probe fails while they end.
// Kubelet stops them too: it gets the new container, whatever the policy, and no pod ends.
func TestProbeFailsWhileDraining(t *testing.T) {
	ns := namespace(t)
	pods := map[string]string{
		"always":      draining(ns, "always", corev1.RestartPolicyAlways, false, false),
		"on-failure":  draining(ns, "on-failure", corev1.RestartPolicyOnFailure, false, false),
		"never":       draining(ns, "never", corev1.RestartPolicyNever, false, false),
		"never-alone": draining(ns, "never-alone", corev1.RestartPolicyNever, true, false),
		"sidecar":     draining(ns, "sidecar", corev1.RestartPolicyNever, false, true),
	}
	for _, pod := range pods {
		apply(t, pod)
	}
	for name := range pods {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			before := ready(t, ns, name)
			seen := watchPhases(t, ns, name, string(before.UID))
			c := restartWith(t, before, "drain", func(*opsv1.ContainerRestart) {})
			if w := strings.Join(c.GetWarnings(), "; "); !strings.Contains(w, "its stop became part of the restart") {
				t.Errorf("kubelet's stop did not join: %v", c)
			}
			eventually(t, "kubelet goes by the new container", func() bool {
				s := container(t, getPod(t, ns, name), "app")
				return s.Ready && strings.HasSuffix(s.ContainerID, c.GetSuccessorId())
			})
			after := getPod(t, ns, name)
			if bad := seen.bad(); len(bad) > 0 {
				t.Errorf("the pod was not running all the time:\n%s", strings.Join(bad, "\n"))
			}
			if s := container(t, after, "app"); s.RestartCount != 1 || after.Status.PodIP != before.Status.PodIP {
				t.Errorf("the pod had address %s, is at %s: %+v", before.Status.PodIP, after.Status.PodIP, s)
			}
			assertOneRunning(t, string(before.UID), "app")
		})
	}
}

// starting is a pod whose container app takes some seconds to listen, and whose liveness probe
// would end it by then.
func starting(ns, name string, policy corev1.RestartPolicy) string {
	return fmt.Sprintf(`
apiVersion: v1
kind: Pod
metadata: {name: %s, namespace: %s}
spec:
  restartPolicy: %s
  terminationGracePeriodSeconds: 5
  containers:
  - name: app
    image: "%s"
    env: [{name: STARTUP_DELAY, value: 8s}]
    startupProbe: {httpGet: {port: 8080, path: /healthz}, periodSeconds: 5, failureThreshold: 60, timeoutSeconds: 5}
    livenessProbe: {httpGet: {port: 8080, path: /healthz}, periodSeconds: 1, failureThreshold: 1, timeoutSeconds: 5}
  - name: neighbour
    image: "%s"
    command: [sh, -c, 'trap exit TERM; while :; do sleep 0.1; done']
---
`, name, ns, policy, bed.Image("app:1"), bed.Image("busybox:1.0"))
}

// TestStartupProbeGatesLiveness replaces containers that take longer to start than their liveness
// probe waits: none is ended by that before its startup probe has passed.
func TestStartupProbeGatesLiveness(t *testing.T) {
	ns := namespace(t)
	told := durationpb.New(7 * time.Second) // the startup probe's period, and two seconds
	restart := func(hold *durationpb.Duration) func(t *testing.T, pod *corev1.Pod) {
		return func(t *testing.T, pod *corev1.Pod) {
			c := restartWith(t, pod, "start", func(c *opsv1.ContainerRestart) { c.HoldProbes = hold })
			if gap := c.GetGap().AsDuration(); gap > 2*time.Second { // far below what the probes are held for
				t.Errorf("gap is %s", gap)
			}
		}
	}
	upgrade := func(t *testing.T, pod *corev1.Pod) {
		commitUpgrade(t,
			prepareUpgrade(t, pod, bed.Image("app:2"), func(c *opsv1.ContainerUpgrade) { c.HoldProbes = told }))
		setImage(t, pod, bed.Image("app:2"))
	}
	for _, tc := range []struct {
		name   string
		policy corev1.RestartPolicy
		do     func(t *testing.T, pod *corev1.Pod)
	}{
		{"restart-always", corev1.RestartPolicyAlways, restart(told)},
		{"restart-never", corev1.RestartPolicyNever, restart(told)},
		{"kubelet-tells", corev1.RestartPolicyNever, restart(nil)},
		{"upgrade-always", corev1.RestartPolicyAlways, upgrade},
		{"upgrade-never", corev1.RestartPolicyNever, upgrade},
	} {
		apply(t, starting(ns, tc.name, tc.policy))
		t.Run(tc.name, func(t *testing.T) {
			t.Parallel()
			before := ready(t, ns, tc.name)
			was := container(t, before, "app")
			tc.do(t, before)
			starts := false // seen not to have started
			eventually(t, "the new container has started", func() bool {
				pod := getPod(t, ns, tc.name)
				c := container(t, pod, "app")
				if c.ContainerID == was.ContainerID {
					return false
				}
				if c.State.Terminated != nil || c.RestartCount > was.RestartCount+1 {
					t.Fatalf("the new container was ended: %+v\n%s", c, events(t, ns, tc.name))
				}
				starts = starts || c.Started != nil && !*c.Started
				return starts && *c.Started && c.Ready
			})
			// A probe that kubelet made for the old container may have found the new one: then
			// kubelet has taken that one over.
			if e := events(t, ns, tc.name); strings.Contains(e, "Failed ") {
				t.Errorf("events: %s", e)
			}
		})
	}
}
