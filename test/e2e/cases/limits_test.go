// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package cases

import (
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
)

const memoryLimit = 64 << 20

// hog is a pod whose only container holds so many bytes of memory, of 64 MiB, and says in a file
// what happens to it.
func hog(ns, name, dir string, held int, rest string) string {
	return podWith(ns, name, "Always", "20", fmt.Sprintf(`
  containers:
  - name: app
    image: %[1]s
    command:
    - sh
    - -c
    - |
      trap 'echo asked $VERSION >>/trace/%[2]s; exit 0' TERM
      (head -c %[3]d /dev/zero; exec sleep 100000) | tail -c %[3]d &
      echo began $VERSION >>/trace/%[2]s
      while :; do sleep 0.2; done
    volumeMounts: [{name: trace, mountPath: /trace}]
    resources: {requests: {cpu: 10m, memory: 64Mi}, limits: {memory: 64Mi, cpu: "1"}}%[4]s
  volumes: [{name: trace, hostPath: {path: %[5]s}}]`, bed.Image("busybox:1.0"), name, held, rest, dir))
}

// TestNearMemoryLimit restarts and upgrades containers that have most or nearly all of their memory
// in use. The old one is never killed for want of memory: it is asked to stop, and ends by itself.
// What cannot be done is refused, with figures.
func TestNearMemoryLimit(t *testing.T) {
	t.Parallel()
	ns := namespace(t)
	dir := scratchDir(t)
	preStop := "\n    lifecycle: {preStop: {exec: {command: [sh, -c, 'sleep 3; echo hook >>/trace/NAME']}}}"
	cases := []struct {
		name  string
		held  int
		order string // "" is a request, else a rollout's
		image string
		hook  bool
	}{
		{name: "request-roomy", held: 40 << 20},
		{name: "request-close", held: 60_000_000},
		{name: "request-closer", held: 62_000_000},
		{name: "request-full", held: 63_500_000},
		{name: "request-hook", held: 62_000_000, hook: true},
		{name: "upgrade-roomy", held: 40 << 20, order: "StopFirst", image: "busybox:2.0", hook: true},
		{name: "upgrade-closer", held: 62_000_000, order: "StopFirst", image: "busybox:2.0", hook: true},
		{name: "start-first", held: 56_000_000, order: "StartFirst"},
		{name: "start-first-upgrade", held: 56_000_000, order: "StartFirst", image: "busybox:2.0"},
	}
	pods := ""
	for _, c := range cases {
		rest := ""
		if c.hook {
			rest = strings.ReplaceAll(preStop, "NAME", c.name)
		}
		pods += hog(ns, c.name, dir, c.held, rest)
	}
	create(t, pods)
	before := allReady(t, ns)
	for _, c := range cases { // the memory is in use
		pid := pidOf(t, container(t, before[c.name], "app"))
		eventually(t, c.name+" has taken its memory", func() bool { return memoryInUse(t, pid) >= int64(c.held) })
	}
	orders := ""
	for _, c := range cases {
		if c.order == "" {
			orders += recreate(ns, c.name, c.name, "containers: [{name: app}]")
			continue
		}
		image := c.image
		if image != "" {
			image = bed.Image(image)
		}
		orders += rollout(ns, c.name, "{podName: "+c.name+"}", image,
			"progressDeadlineSeconds: 60, minReadySeconds: 1, order: "+c.order)
	}
	apply(t, orders)
	for _, c := range cases {
		t.Run(c.name, func(t *testing.T) {
			if c.order == "" {
				if f := outcome(completed(t, ns, c.name)); f != "" {
					t.Error(f)
				}
			} else if f := complete(ended(t, ns, c.name)); f != "" {
				t.Error(f)
			}
			after := ready(t, ns, c.name)
			s := container(t, after, "app")
			last := s.LastTerminationState.Terminated
			if last == nil || last.ExitCode != 0 || last.Reason != "Completed" || s.RestartCount != 1 {
				t.Errorf("restarts %d, the old container has ended with %+v", s.RestartCount, last)
			}
			want := []string{"began 1.0", "asked 1.0", "began 1.0"}
			if c.image != "" {
				want[2] = "began 2.0"
			}
			if c.order == "StartFirst" {
				want[1], want[2] = want[2], want[1]
			}
			if c.hook {
				want = slices.Insert(want, 1, "hook")
			}
			if got := linesOf(t, dir, c.name); !slices.Equal(got, want) {
				t.Errorf("the pod wrote %q, want %q", got, want)
			}
			pid := pidOf(t, s)
			limit := podCgroupFile(t, pid, "memory.limit_in_bytes")
			if _, err := os.Stat(limit); err != nil {
				limit = podCgroupFile(t, pid, "memory.max")
			}
			eventuallySaying(t, "the pod has its own limit", func() string { return readFile(t, limit) },
				func() bool { return number(t, limit) == memoryLimit })
			op := lastOperation(t, ns, c.name)
			t.Logf("%s, gap %s, warnings %q", op.GetMethod(), op.GetGap().AsDuration(), op.GetWarnings())
			assertOneLive(t, ns, c.name, "app")
		})
	}
}

// memoryInUse is that of the pod of a process.
func memoryInUse(t testing.TB, pid int) int64 {
	t.Helper()
	file := podCgroupFile(t, pid, "memory.usage_in_bytes")
	if _, err := os.Stat(file); err != nil {
		file = podCgroupFile(t, pid, "memory.current")
	}
	return number(t, file)
}

// TestNearPidsLimit restarts a container that has used up nearly all processes that its pod may
// have.
func TestNearPidsLimit(t *testing.T) {
	t.Parallel()
	ns := namespace(t)
	cases := []struct {
		name string
		room int // processes that are left
		says bool
	}{
		{name: "roomy", room: 40},
		{name: "tight", room: 3, says: true},
		{name: "full", room: 1, says: true},
	}
	dir := scratchDir(t)
	pods := ""
	for _, c := range cases {
		must(t, unix.Mkfifo(filepath.Join(dir, c.name), 0o666))
		pods += podWith(ns, c.name, "Always", "5", fmt.Sprintf(`
  containers:
  - name: app
    image: %s
    command: [sh, -c, 'trap "exit 5" TERM; while :; do read -r more </trace/%s; sleep 9999 & done']
    volumeMounts: [{name: trace, mountPath: /trace}]
  volumes: [{name: trace, hostPath: {path: %s}}]`, bed.Image("busybox:1.0"), c.name, dir))
	}
	create(t, pods)
	before := allReady(t, ns)
	requests := ""
	for _, c := range cases {
		pid := pidOf(t, container(t, before[c.name], "app"))
		if got := number(t, podCgroupFile(t, pid, "pids.max")); got != pidsLimit {
			t.Fatalf("the pod may have %d processes", got)
		}
		current := podCgroupFile(t, pid, "pids.current")
		for number(t, current) < int64(pidsLimit-c.room) { // one more
			n := number(t, current)
			must(t, os.WriteFile(filepath.Join(dir, c.name), []byte("more\n"), 0))
			eventually(t, c.name+" has one more process", func() bool { return number(t, current) > n })
		}
		requests += recreate(ns, c.name, c.name, "containers: [{name: app}]")
	}
	apply(t, requests)
	for _, c := range cases {
		t.Run(c.name, func(t *testing.T) {
			if f := outcome(completed(t, ns, c.name)); f != "" {
				t.Fatal(f)
			}
			after := restarted(t, before[c.name], "app", 1)
			if last := container(t, after, "app").LastTerminationState.Terminated; last == nil || last.ExitCode != 5 {
				t.Errorf("the old container has ended with %+v", last)
			}
			op := lastOperation(t, ns, c.name)
			if says := strings.Contains(strings.Join(op.GetWarnings(), " "), "pids") ||
				strings.Contains(strings.Join(op.GetWarnings(), " "), "process"); says != c.says {
				t.Errorf("method %s, warnings %q", op.GetMethod(), op.GetWarnings())
			}
			t.Logf("%s, warnings %q", op.GetMethod(), op.GetWarnings())
			assertOneLive(t, ns, c.name, "app")
		})
	}
}
