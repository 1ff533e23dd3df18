// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package cases

import (
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"
)

// traced is a pod whose container app writes, into a file of this machine with the pod's name, when
// it begins, is asked to stop and ends: the event, the version of its image, what it was given, and
// the time. drain is how long it takes to stop. spec is what the container has beyond that, volumes
// what the pod has.
func traced(ns, name, dir, image, drain, spec, volumes string) string {
	return fmt.Sprintf(`
apiVersion: v1
kind: Pod
metadata: {name: %[1]s, namespace: %[2]s, labels: {pod: %[1]s}, annotations: {note: before}}
spec:
  terminationGracePeriodSeconds: 20
  containers:
  - name: app
    image: %[4]s
    command:
    - sh
    - -c
    - |
      say() {
        read -r uptime idle </proc/uptime
        echo "$1 $(cat /etc/version) $SETTING$(cat /setting /setting/version 2>/dev/null) $uptime" >>/trace/%[1]s
      }
      trap 'say asked; sleep %[5]s; say ended; exit 0' TERM
      say began
      while :; do sleep 0.1; done
    volumeMounts:
    - {name: trace, mountPath: /trace}
    %[6]s
  - {name: neighbour, image: %[7]s, command: [sh, -c, %[8]s]}
  volumes:
  - {name: trace, hostPath: {path: %[3]s}}
  %[9]s
---
`, name, ns, dir, image, drain, spec, bed.Image("busybox:1.0"), loop, volumes)
}

// said is a line of a trace.
type said struct {
	what string
	at   time.Duration // since this machine was started
}

// traceOf returns what the pod has written.
func traceOf(t testing.TB, dir, pod string) []said {
	t.Helper()
	var out []said
	for line := range strings.Lines(readFile(t, filepath.Join(dir, pod))) {
		fields := strings.Fields(line)
		at, err := strconv.ParseFloat(fields[len(fields)-1], 64)
		must(t, err)
		out = append(out,
			said{what: strings.Join(fields[:len(fields)-1], " "), at: time.Duration(at * float64(time.Second))})
	}
	return out
}

func whats(trace []said) []string {
	var out []string
	for _, s := range trace {
		out = append(out, s.what)
	}
	return out
}

// readFile returns what is in a file, nothing if there is none.
func readFile(t testing.TB, path string) string {
	t.Helper()
	b, err := os.ReadFile(path)
	if err != nil && !os.IsNotExist(err) {
		t.Fatal(err)
	}
	return string(b)
}

func writeFile(t testing.TB, path, content string) {
	t.Helper()
	must(t, os.MkdirAll(filepath.Dir(path), 0o777))
	must(t, os.WriteFile(path, []byte(content), 0o666)) //nolint:gosec // containers of any user read it
}

// TestUpgradeTakesWhatIsNew changes images in place when other things have changed too since the
// containers were made: each pod has one start of the new image, with what kubelet would give it
// now, right after the old one has ended.
func TestUpgradeTakesWhatIsNew(t *testing.T) {
	t.Parallel()
	ns := namespace(t)
	dir, host := scratchDir(t), scratchDir(t)
	one, two := bed.Image("busybox:1.0"), bed.Image("busybox:2.0")
	writeFile(t, host+"/before/setting", "before")
	writeFile(t, host+"/after/setting", "after")

	stale := moveTag(t, "upgrade-stale:dev", "busybox:2.0")
	pullOnNode(t, stale)
	moveTag(t, "upgrade-stale:dev", "busybox:3.0")
	staleVolume := moveTag(t, "upgrade-volume:dev", "busybox:2.0")
	moving := moveTag(t, "upgrade-moving:1", "busybox:1.0")

	const key = `env: [{name: SETTING, valueFrom: {configMapKeyRef: {name: conf, key: setting}}}]`
	cases := []struct {
		name          string
		spec, volumes string
		from, to      string // images; an empty to only restarts
		drain         string
		began, then   string // what is said of the old container and of the new one
		pdb           bool   // holds the rollout back when it has been prepared
	}{
		{name: "config", spec: key, drain: "4", began: "1.0 before", then: "2.0 after"},
		{name: "service", spec: `env: [{name: SETTING, value: "$(FRESH_SERVICE_PORT)"}]`,
			began: "1.0 $(FRESH_SERVICE_PORT)",
			then:  "2.0 80"},
		{name: "annotation",
			spec:  `env: [{name: SETTING, valueFrom: {fieldRef: {fieldPath: "metadata.annotations['note']"}}}]`,
			began: "1.0 before", then: "2.0 after"},
		{name: "resized", spec: `env: [{name: SETTING, valueFrom: {resourceFieldRef: {resource: limits.memory, divisor: 1Mi}}}]
    resources: {requests: {memory: 40Mi}, limits: {memory: 40Mi}}`, began: "1.0 40", then: "2.0 56"},
		{name: "sub-path", spec: "- {name: conf, mountPath: /setting, subPath: setting}",
			volumes: "- {name: conf, configMap: {name: conf}}",
			began:   "1.0 before", then: "2.0 after"},
		{name: "sub-path-expr", spec: `- {name: host, mountPath: /setting, subPathExpr: $(NOTE)/setting}
    env: [{name: NOTE, valueFrom: {fieldRef: {fieldPath: "metadata.annotations['note']"}}}]`,
			volumes: "- {name: host, hostPath: {path: " + host + "}}", began: "1.0 before", then: "2.0 after"},
		{name: "image-volume", spec: "- {name: part, mountPath: /setting, subPath: etc}",
			volumes: "- {name: part, image: {reference: " + staleVolume + ", pullPolicy: Always}}", began: "1.0 2.0",
			then: "2.0 3.0"},
		{name: "stale", spec: "imagePullPolicy: Always", to: stale, began: "1.0", then: "3.0"},
		{name: "moved", spec: "imagePullPolicy: Always", from: moving, to: "restart", began: "1.0", then: "2.0"},
		{name: "late", spec: strings.Replace(key, "name: conf", "name: late", 1), began: "1.0 before",
			then: "2.0 later", pdb: true},
		{name: "nothing", spec: `env: [{name: SETTING, value: same}]`, began: "1.0 same", then: "2.0 same"},
	}
	conf := func(name, value string) string {
		return fmt.Sprintf("apiVersion: v1\nkind: ConfigMap\nmetadata: {name: %s, namespace: %s}\ndata: "+
			"{setting: %s}\n---\n",
			name, ns, value)
	}
	pods := ""
	for i := range cases {
		c := &cases[i]
		if c.from == "" {
			c.from = one
		}
		if c.to == "" {
			c.to = two
		}
		if c.to == "restart" {
			c.to = ""
		}
		if c.drain == "" {
			c.drain = "0"
		}
		pods += traced(ns, c.name, dir, c.from, c.drain, c.spec, c.volumes)
		if c.pdb {
			apply(t, fmt.Sprintf(`
apiVersion: policy/v1
kind: PodDisruptionBudget
metadata: {name: %[2]s, namespace: %[1]s}
spec: {minAvailable: 1, selector: {matchLabels: {pod: %[2]s}}}
`, ns, c.name))
		}
	}
	apply(t, conf("conf", "before")+conf("late", "before"))
	create(t, pods)
	before := allReady(t, ns)

	apply(t, conf("conf", "after")+conf("late", "after"))
	kubectl(t, "-n", ns, "create", "service", "clusterip", "fresh", "--tcp=80:80")
	kubectl(t, "-n", ns, "patch", "pod", "resized", "--subresource=resize", "-p",
		`{"spec":{"containers":[{"name":"app","resources":{"requests":{"memory":"56Mi"},"limits":{"memory":"56Mi"}}}]}}`)
	moveTag(t, "upgrade-moving:1", "busybox:2.0")
	moveTag(t, "upgrade-volume:dev", "busybox:3.0")
	kubectl(t, "-n", ns, "annotate", "pods", "--all", "--overwrite", "note=after")
	shown(t, ns, before)

	rollouts := ""
	for _, c := range cases {
		rollouts += rollout(ns, c.name, "{podName: "+c.name+"}", c.to, "progressDeadlineSeconds: 60")
	}
	apply(t, rollouts)
	for _, c := range cases {
		if c.pdb {
			eventuallySaying(t, "the budget holds the rollout, which is prepared",
				func() string { return fmt.Sprint(operations(t, ns, c.name)) },
				func() bool {
					ops := operations(t, ns, c.name)
					return len(ops) > 0 && ops[0].GetPhase().String() == "PHASE_PREPARED"
				})
			apply(t, conf("late", "later"))
			kubectl(t, "-n", ns, "delete", "pdb", c.name)
		}
	}
	for _, c := range cases {
		t.Run(c.name, func(t *testing.T) {
			if f := complete(ended(t, ns, c.name)); f != "" {
				t.Error(f)
			}
			want := []string{"began " + c.began, "asked " + c.began, "ended " + c.began, "began " + c.then}
			var trace []said
			eventuallySaying(t, "the new container has begun", func() string { return fmt.Sprint(whats(trace)) },
				func() bool {
					trace = traceOf(t, dir, c.name)
					return len(trace) >= len(want)
				})
			if !slices.Equal(whats(trace), want) {
				t.Fatalf("the pod wrote\n  %q\nwant\n  %q", whats(trace), want)
			}
			after := ready(t, ns, c.name)
			if s := container(t, after, "app"); s.RestartCount != 1 {
				t.Errorf("restarts: %d", s.RestartCount)
			}
			if container(t, after, "neighbour").ContainerID != container(t, before[c.name], "neighbour").ContainerID {
				t.Error("the neighbour was restarted")
			}
			op := lastOperation(t, ns, c.name)
			// Both lines are written while the processes run. The gap is not false by the time of a
			// whole stop or start. by the time of a whole stop or start either.
			outer, told := trace[3].at-trace[2].at, op.GetGap().AsDuration()
			if slack := 5 * time.Second; told > outer+slack || told < outer-slack {
				t.Errorf("the gap is told as %s; from the last line of the old container to the first of the new one "+
					"it is %s",
					told, outer)
			}
			t.Logf("%s, gap %s within %s, warnings %q", op.GetMethod(), told, outer, op.GetWarnings())
			assertOneLive(t, ns, c.name, "app")
		})
	}
}

// TestImages has images that are not on the node any more, or never were.
func TestImages(t *testing.T) {
	t.Parallel()
	ns := namespace(t)
	gone, unknown := bed.Image("images-gone:1"), bed.Image("images-unknown:1")
	for _, image := range []string{gone, unknown} {
		crane(t, "mutate", bed.Image("busybox:2.0"), "-t", image, "--label", "of="+strings.ReplaceAll(image, ":", "-"))
	}
	dir := scratchDir(t)
	create(t, traced(ns, "gone", dir, gone, "0", "", "")+traced(ns, "never", dir, bed.Image("busybox:1.0"), "0",
		"imagePullPolicy: Never", ""))
	before := allReady(t, ns)

	// A request has it pulled again, as kubelet's own restart does.
	removeFromNode(t, gone)
	if f := outcome(restart(t, ns, "gone", "app")); f != "" {
		t.Error(f)
	}
	restarted(t, before["gone"], "app", 1)
	if !onNode(t, gone) {
		t.Errorf("image %s has not been pulled", gone)
	}

	// With policy Never nothing is pulled, and so nothing is changed.
	apply(t, rollout(ns, "never", "{podName: never}", unknown, "progressDeadlineSeconds: 30"))
	r := ended(t, ns, "never")
	if complete(r) == "" || !strings.Contains(complete(r), "is not present with pull policy of Never") {
		t.Errorf("%s; want kubelet's words", complete(r))
	}
	now := getPod(t, ns, "never")
	if onNode(t, unknown) {
		t.Error("the image was pulled")
	}
	if s := container(t, now, "app"); s.ContainerID != container(t, before["never"], "app").ContainerID ||
		now.Spec.Containers[0].Image != bed.Image("busybox:1.0") {
		t.Errorf("the pod was touched: %s, image %s", states(now), now.Spec.Containers[0].Image)
	}
}

func exists(t testing.TB, path string) bool {
	t.Helper()
	_, err := os.Stat(path)
	if err != nil && !os.IsNotExist(err) {
		t.Fatal(err)
	}
	return err == nil
}
