// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package e2e

import (
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"

	appsv1alpha1 "github.com/cri-proxy/cri-proxy/api/apps/v1alpha1"
)

// limits are the files of the cgroup that kubelet has made for a pod of the class Guaranteed.
type limits struct {
	t                 testing.TB
	limit, used, pids string
}

func limitsOf(t testing.TB, uid string) limits {
	t.Helper()
	group := filepath.Join(bed.CgroupParent, "kubepods", "pod"+uid)
	if _, err := os.Stat("/sys/fs/cgroup/cgroup.controllers"); err == nil {
		dir := filepath.Join("/sys/fs/cgroup", group)
		return limits{t, filepath.Join(dir, "memory.max"), filepath.Join(dir, "memory.current"),
			filepath.Join(dir, "pids.max")}
	}
	dir := filepath.Join("/sys/fs/cgroup/memory", group)
	return limits{t, filepath.Join(dir, "memory.limit_in_bytes"), filepath.Join(dir, "memory.usage_in_bytes"),
		filepath.Join("/sys/fs/cgroup/pids", group, "pids.max")}
}

func (l limits) mib(file string) int {
	l.t.Helper()
	b, err := os.ReadFile(file)
	must(l.t, err)
	n, err := strconv.Atoi(strings.TrimSpace(string(b)))
	must(l.t, err)
	return n >> 20
}

// hog is a pod whose container uses that much of its 64 MiB, and ends with code 7 when it is asked
// to stop.
func hog(ns, name string, mib int) string {
	return fmt.Sprintf(`
apiVersion: v1
kind: Pod
metadata: {name: %s, namespace: %s}
spec:
  terminationGracePeriodSeconds: 10
  containers:
  - name: app
    image: %s
    command: [sh, -c, 'trap "exit 7" TERM; (head -c %d /dev/zero; exec sleep 100000) | tail -c %[4]d & while :; do sleep 0.05; done']
    resources: {limits: {memory: 64Mi, cpu: 500m}}
`, name, ns, bed.Image("busybox:1.0"), mib<<20)
}

// TestNearTheMemoryLimit restarts a container that has nearly all of its pod's memory: by the
// default order, then with both running at once, then with hardly any process IDs left. It always
// ends because it was asked to.
func TestNearTheMemoryLimit(t *testing.T) {
	const uses = 58
	ns := namespace(t)
	apply(t, hog(ns, "hog", uses))
	pod := ready(t, ns, "hog")
	l := limitsOf(t, string(pod.UID))
	if got := l.mib(l.limit); got != 64 {
		t.Fatalf("kubelet has given the pod %d MiB", got)
	}
	for i, tc := range []struct {
		name, order, method string
		before              func()
	}{
		{name: "stop-first", order: "StopFirst", method: "pidfd"},
		{name: "start-first", order: "StartFirst", method: "overlap"},
		{name: "few-pids", order: "StopFirst", method: "pidfd", before: func() {
			dir := filepath.Dir(l.pids)
			b, err := os.ReadFile(filepath.Join(dir, "pids.current"))
			must(t, err)
			n, err := strconv.Atoi(strings.TrimSpace(string(b)))
			must(t, err)
			must(t, os.WriteFile(l.pids, []byte(strconv.Itoa(n+5)), 0)) // podPidsLimit
		}},
	} {
		eventually(t, "the container uses its memory", func() bool { return l.mib(l.used) >= uses })
		if tc.before != nil {
			tc.before()
		}
		apply(t, strings.Replace(recreate(ns, tc.name, "hog",
			"containers: [{name: app}]\n  strategy: {minStartedSeconds: 3}"),
			"name: "+tc.name+"}",
			"name: "+tc.name+", annotations: {"+appsv1alpha1.RestartOrderAnnotation+": "+tc.order+"}}", 1))
		if tc.order == "StartFirst" {
			eventually(t, "both use their memory", func() bool { return l.mib(l.used) >= 2*uses })
			if got := l.mib(l.limit); got != 128 {
				t.Errorf("the pod has %d MiB while both run", got)
			}
		}
		crr := succeededAll(t, ns, tc.name)
		if c := account(t, crr, "app"); c.GetMethod() != tc.method {
			t.Errorf("%s: operation: %v", tc.name, c)
		}
		eventually(t, "kubelet knows of the restart",
			func() bool { return container(t, getPod(t, ns, "hog"), "app").RestartCount == int32(i+1) })
		c := container(t, getPod(t, ns, "hog"), "app")
		if last := c.LastTerminationState.Terminated; last == nil || last.ExitCode != 7 || last.Reason == "OOMKilled" {
			t.Errorf("%s: the old container ended %+v", tc.name, last)
		}
		if got := l.mib(l.limit); got != 64 {
			t.Errorf("%s: the pod has %d MiB in the end", tc.name, got)
		}
	}
}
