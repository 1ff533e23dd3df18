// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package e2e

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	"sigs.k8s.io/yaml"

	appsv1alpha1 "github.com/cri-proxy/cri-proxy/api/apps/v1alpha1"
	opsv1 "github.com/cri-proxy/cri-proxy/api/ops/v1"
)

// identify logs all that a process can tell of what it was given, then waits to be stopped. Kubelet
// writes the hosts file of a pod anew for each container that it creates, so that it is empty for a
// moment while the next one is made.
const identify = `trap 'exit 0' TERM
id
hostname
pwd
umask
grep -E '^(Uid|Gid|Groups|Cap|NoNewPrivs|Seccomp:)' /proc/self/status
cat /proc/self/uid_map /proc/self/oom_score_adj /proc/self/limits
for n in net ipc uts user; do readlink /proc/self/ns/$n; done
cut -d' ' -f5,6 /proc/self/mountinfo | sort
env | sort
for f in 0 1 2; do readlink /proc/self/fd/$f | cut -d: -f1; done
stat -c '%a %u %g %s' /dev/termination-log
ls /dev
until grep -q . /etc/hosts; do :; done
cat /etc/hosts /etc/resolv.conf
cat /conf/one /conf/two /single 2>&1
touch /sub/kept 2>&1
ls /img /sub 2>&1
touch /new-file 2>&1 && echo the root file system is writable
echo END
while :; do sleep 0.1; done`

// identity is a pod; rest is what its spec has beyond the usual.
func identity(ns, name, rest string) string {
	return fmt.Sprintf(`
apiVersion: v1
kind: Pod
metadata: {name: %s, namespace: %s, labels: {kept: label}}
spec:
  terminationGracePeriodSeconds: 3%s
---
`, name, ns, rest)
}

// identityOf waits until the container has said who it is, and returns it.
func identityOf(t testing.TB, ns, pod, name string, previous bool) string {
	t.Helper()
	args := []string{"-n", ns, "logs", pod, "-c", name}
	if previous {
		args = append(args, "--previous")
	}
	var id string
	eventually(t, "container "+name+" has said who it is", func() bool {
		out, err := bed.Kubectl(t.Context(), args...)
		var done bool
		id, _, done = strings.Cut(strings.ReplaceAll(out, "\r", ""), "\nEND")
		return err == nil && done
	})
	return id
}

// sameIdentity restarts containers of a pod with one request, and compares what they say of
// themselves.
func sameIdentity(t *testing.T, ns, pod string, method string, names ...string) {
	t.Helper()
	before := ready(t, ns, pod)
	old := map[string]string{}
	list := make([]string, len(names))
	for i, name := range names {
		old[name] = identityOf(t, ns, pod, name, false)
		list[i] = "{name: " + name + "}"
	}
	apply(t, recreate(ns, pod, pod, "containers: ["+strings.Join(list, ", ")+"]"))
	crr := succeededAll(t, ns, pod)
	after := getPod(t, ns, pod)
	for _, name := range names {
		was, is := container(t, before, name), container(t, after, name)
		if is.ContainerID == was.ContainerID || is.RestartCount != 1 || is.State.Running == nil || !is.Ready {
			t.Errorf("container %s was %+v and is %+v", name, was, is)
		}
		if last := is.LastTerminationState.Terminated; last == nil || last.ExitCode != 0 {
			t.Errorf("container %s ended with %+v", name, last)
		} else if is.State.Running != nil && is.State.Running.StartedAt.Before(&last.FinishedAt) {
			t.Errorf("container %s is said to have started at %s, before the old one ended at %s", name,
				is.State.Running.StartedAt, last.FinishedAt)
		}
		got := identityOf(t, ns, pod, name, false)
		if method == "gate" { // which leaves the one trace that a process can find
			const trace = "/dev/.cri-proxy ro,relatime\n"
			if !strings.Contains(got, trace) {
				t.Errorf("container %s has no gate", name)
			}
			got = strings.Replace(got, trace, "", 1)
		}
		if got != old[name] {
			t.Errorf("container %s was\n%s\nand is\n%s", name, old[name], got)
		}
		if got := identityOf(t, ns, pod, name, true); got != old[name] {
			t.Errorf("the previous log of %s has changed:\n%s", name, got)
		}
		if c := account(t, crr, name); c.GetMethod() != method {
			t.Errorf("container %s was restarted by method %q, want %q; warnings %q", name, c.GetMethod(), method,
				c.GetWarnings())
		}
		assertKubeletDidNothing(t, ns, pod, name)
	}
	for _, c := range append(before.Status.ContainerStatuses, before.Status.InitContainerStatuses...) {
		if _, ok := old[c.Name]; !ok && container(t, after, c.Name).ContainerID != c.ContainerID {
			t.Errorf("container %s was restarted as well", c.Name)
		}
	}
}

// locked is a container that may do as little as possible, with every kind of mount.
func locked() string {
	return fmt.Sprintf(`
  - name: locked
    image: "%[1]s"
    command: [sh, -c, %[2]s]
    workingDir: /conf
    env:
    - {name: PLAIN, value: "a b  c"}
    - {name: FROM_MAP, valueFrom: {configMapKeyRef: {name: conf, key: one}}}
    - {name: POD_IP, valueFrom: {fieldRef: {fieldPath: status.podIP}}}
    resources: {limits: {cpu: 300m, memory: 32Mi}}
    securityContext:
      runAsUser: 1000
      runAsGroup: 1000
      runAsNonRoot: true
      readOnlyRootFilesystem: true
      allowPrivilegeEscalation: false
      capabilities: {drop: [ALL]}
      seccompProfile: {type: RuntimeDefault}
    volumeMounts:
    - {name: conf, mountPath: /conf}
    - {name: conf, mountPath: /single, subPath: one}
    - {name: work, mountPath: /sub, subPath: below/here}
    - {name: image, mountPath: /img}
`, bed.Image("busybox:1.0"), strconv.Quote(identify))
}

// volumes are those of locked.
func volumes() string {
	return fmt.Sprintf(`
  volumes:
  - {name: conf, configMap: {name: conf}}
  - {name: work, emptyDir: {}}
  - {name: image, image: {reference: "%s", pullPolicy: IfNotPresent}}
`, bed.Image("app:1"))
}

const conf = `
apiVersion: v1
kind: ConfigMap
metadata: {name: conf, namespace: %s}
data: {one: "first", two: "second"}
---
`

// TestIdentity restarts containers of many kinds. Each new one is what the old one was, to the last
// capability.
func TestIdentity(t *testing.T) {
	t.Parallel()
	ns := namespace(t)
	image, script := bed.Image("busybox:1.0"), strconv.Quote(identify)
	apply(t, fmt.Sprintf(conf, ns)+
		identity(ns, "many", `
  securityContext: {fsGroup: 2000, supplementalGroups: [3000]}
  initContainers:
  - {name: setup, image: "`+image+`", command: ["true"]}
  - name: mesh
    image: "`+image+`"
    restartPolicy: Always
    command: [sh, -c, `+script+`]
    securityContext: {capabilities: {add: [NET_ADMIN]}}
  containers:`+locked()+`
  - {name: term, image: "`+image+`", command: [sh, -c, `+script+`], tty: true, stdin: true}
  - {name: neighbour, image: "`+image+`", command: [sh, -c, `+script+`]}`+volumes())+
		identity(ns, "shared", `
  hostNetwork: true
  shareProcessNamespace: true
  containers:
  - {name: app, image: "`+image+`", command: [sh, -c, `+script+`], securityContext: {privileged: true}}
  - {name: neighbour, image: "`+image+`", command: [sh, -c, `+script+`]}
`))
	t.Run("many", func(t *testing.T) { sameIdentity(t, ns, "many", "gate", "mesh", "locked", "term") })
	t.Run("locked is locked", func(t *testing.T) {
		id := identityOf(t, ns, "many", "locked", false)
		for _, want := range []string{
			"uid=1000", "CapEff:\t0000000000000000", "CapBnd:\t0000000000000000", "NoNewPrivs:\t1", "Seccomp:\t2",
			"Read-only file system",
			"first", "second", "FROM_MAP=first", "PLAIN=a b  c", "kept", "bin\netc",
		} {
			if !strings.Contains(id, want) {
				t.Errorf("%q is not in\n%s", want, id)
			}
		}
	})
	t.Run("shared", func(t *testing.T) { sameIdentity(t, ns, "shared", "gate", "app") })
	t.Run("ephemeral", func(t *testing.T) {
		kubectl(t, "-n", ns, "debug", "many", "--image", image, "--container", "debug", "--profile", "general", "--",
			"sleep", "1")
		apply(t, recreate(ns, "ephemeral", "many", "containers: [{name: debug}]"))
		if crr := completed(t, ns, "ephemeral"); !strings.Contains(crr.Status.Message,
			"container debug is an ephemeral container: it cannot be recreated") {
			t.Errorf("status: %+v", crr.Status)
		}
		apply(t, recreate(ns, "init", "many", "containers: [{name: setup}]"))
		if crr := completed(t, ns, "init"); !strings.Contains(crr.Status.Message,
			"container setup is an init container that runs to its end") {
			t.Errorf("status: %+v", crr.Status)
		}
	})
}

// TestUserNamespace restarts a container of a pod with users of its own, where kubelet, the runtime
// and the kernel have that.
func TestUserNamespace(t *testing.T) {
	ns := namespace(t)
	apply(t, identity(ns, "users", `
  hostUsers: false
  containers:
  - {name: app, image: "`+bed.Image("busybox:1.0")+`", command: [sh, -c, `+strconv.Quote(identify)+`]}
`))
	var why string
	eventually(t, "the pod runs or cannot", func() bool {
		pod := getPod(t, ns, "users")
		if len(pod.Status.ContainerStatuses) > 0 && pod.Status.ContainerStatuses[0].Ready {
			return true
		}
		for line := range strings.Lines(events(t, ns, "users")) {
			if strings.HasPrefix(line, "Failed") {
				why = strings.TrimSpace(line)
			}
		}
		if pod.Status.Phase == corev1.PodFailed {
			why = pod.Status.Reason + " " + pod.Status.Message
		}
		return why != ""
	})
	if why != "" {
		t.Skipf("this machine runs no pod with hostUsers: false: %s", why)
	}
	sameIdentity(t, ns, "users", "gate", "app")
}

// TestRuntimeClasses restarts containers under handlers that are not containerd's default: runc
// under another name, which has the gate, and a runtime of another type, of which nothing is known
// and which does without.
func TestRuntimeClasses(t *testing.T) {
	ns := namespace(t)
	shim, err := filepath.EvalSymlinks(filepath.Join(bed.Bin, "containerd-shim-runc-v2"))
	must(t, err)
	must(t, os.Symlink(shim, filepath.Join(bed.Bin, "containerd-shim-foreign-v2")))
	must(t, os.WriteFile(filepath.Join(bed.NodeDir, "etc", "containerd.d", "handlers.toml"), fmt.Appendf(nil, `version = 3
[plugins."io.containerd.cri.v1.runtime".containerd.runtimes.second]
  runtime_type = "io.containerd.runc.v2"
  [plugins."io.containerd.cri.v1.runtime".containerd.runtimes.second.options]
    BinaryName = %q
    Root = %q
[plugins."io.containerd.cri.v1.runtime".containerd.runtimes.foreign]
  runtime_type = "io.containerd.foreign.v2"
`, filepath.Join(bed.Bin, "runc"), filepath.Join(bed.RunDir, "runc-second")), 0o600))
	must(t, bed.RestartContainerd(t.Context()))
	t.Cleanup(func() { // the foreign runtime gets no options, so it keeps its state in its own default place
		_ = os.Remove("/run/containerd/runc/k8s.io")
		_ = os.Remove("/run/containerd/runc")
	})
	t.Cleanup(func() { kubectlAfter(t, "delete", "runtimeclass", "second", "foreign") })
	for _, handler := range []string{"second", "foreign"} {
		apply(t, fmt.Sprintf("{apiVersion: node.k8s.io/v1, kind: RuntimeClass, metadata: {name: %s}, handler: %s}",
			handler, handler))
		apply(t, identity(ns, handler, `
  runtimeClassName: `+handler+`
  containers:
  - {name: app, image: "`+bed.Image("busybox:1.0")+`", command: [sh, -c, `+strconv.Quote(identify)+`]}
`))
	}
	sameIdentity(t, ns, "second", "gate", "app")
	sameIdentity(t, ns, "foreign", "pidfd", "app")
}

// kubectlAfter runs kubectl when the test's own context has ended.
func kubectlAfter(t testing.TB, args ...string) {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	if _, err := bed.Kubectl(ctx, args...); err != nil {
		t.Error(err)
	}
}

// configureProxy restarts the proxy with a changed configuration until the end of the test.
func configureProxy(t testing.TB, change func(map[string]any)) {
	t.Helper()
	was, err := os.ReadFile(bed.ProxyConfig())
	must(t, err)
	t.Cleanup(func() {
		must(t, os.WriteFile(bed.ProxyConfig(), was, 0o600))
		must(t, bed.RestartProxy(context.Background(), syscall.SIGTERM))
	})
	config := map[string]any{}
	must(t, yaml.Unmarshal(was, &config))
	change(config)
	b, err := yaml.Marshal(config)
	must(t, err)
	must(t, os.WriteFile(bed.ProxyConfig(), b, 0o600))
	restartProxy(t, syscall.SIGTERM)
}

// TestWithoutCDI gives the proxy a directory for CDI specs that the runtime does not read. It says
// so, and restarts containers, locked ones as well, without the gate.
func TestWithoutCDI(t *testing.T) {
	ns := namespace(t)
	elsewhere := scratchDir(t, "cdi")
	configureProxy(t, func(c map[string]any) { c["restart"] = map[string]any{"cdiSpecDir": elsewhere} })
	apply(t, fmt.Sprintf(conf, ns)+identity(ns, "locked", "\n  containers:"+locked()+volumes()))
	sameIdentity(t, ns, "locked", "pidfd", "locked")
	info, err := opsClient(t).NodeInfo(t.Context(), &opsv1.NodeInfoRequest{})
	must(t, err)
	for _, m := range info.GetRestartMethods() {
		if want := m.GetName() != "gate"; m.GetAvailable() != want ||
			(!want && !strings.Contains(m.GetReason(), elsewhere)) {
			t.Errorf("method %v", m)
		}
	}
	left, err := os.ReadDir(elsewhere)
	must(t, err)
	if len(left) > 0 {
		t.Errorf("written where nobody reads it: %v", left)
	}
}

// TestStartFirst asks for a restart in which the new container runs before the old one is asked to
// stop, and for one with an order that there is not.
func TestStartFirst(t *testing.T) {
	ns := namespace(t)
	dir := scratchDir(t, "trace")
	apply(t, traced(ns, "app", dir))
	before := ready(t, ns, "app")
	slot := watchSlot(t, string(before.UID), "app")
	annotated := func(name, order, rest string) string {
		return strings.Replace(recreate(ns, name, "app", rest), "name: "+name+"}",
			"name: "+name+", annotations: {"+appsv1alpha1.RestartOrderAnnotation+": "+order+"}}", 1)
	}
	apply(t, annotated("sideways", "Sideways", "containers: [{name: app}]"))
	if crr := completed(t, ns, "sideways"); !strings.Contains(crr.Status.Message,
		`restart-order is "Sideways": it must be StopFirst or StartFirst`) {
		t.Errorf("status: %+v", crr.Status)
	}
	apply(t, annotated("start-first", "StartFirst", "containers: [{name: app}]\n  strategy: {minStartedSeconds: 2}"))
	crr := succeededAll(t, ns, "start-first")
	if took := crr.Status.CompletionTime.Sub(crr.CreationTimestamp.Time); took > tracedGrace-10*time.Second {
		t.Errorf("took %s, the new container had to run for 2 s once", took)
	}
	if bad := slot(); len(bad) > 0 {
		t.Errorf("kubelet could see: %q", bad)
	}
	log, err := os.ReadFile(filepath.Join(dir, "app"))
	must(t, err)
	lines := strings.Fields(string(log))
	if len(lines) != 6 || lines[0] != "began" || lines[2] != "began" || lines[4] != "asked" || lines[5] != lines[1] {
		t.Errorf("the processes say:\n%s", log)
	}
	if c := account(t, crr, "app"); c.GetMethod() != "overlap" {
		t.Errorf("operation: %v", c)
	}
	if c := container(t, getPod(t, ns, "app"), "app"); c.RestartCount != 1 || c.State.Running == nil {
		t.Errorf("container: %+v", c)
	}
	assertKubeletDidNothing(t, ns, "app", "app")
}
