// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package nspawn

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"net/url"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"testing"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	opsv1 "github.com/cri-proxy/cri-proxy/api/ops/v1"
)

// What runs on the node: a Deployment whose pods kubelet probes through the runtime, and a pod that
// is operated on.
const workloads = `
apiVersion: apps/v1
kind: Deployment
metadata: {name: web}
spec:
  replicas: 3
  selector: {matchLabels: {app: web}}
  template:
    metadata: {labels: {app: web}}
    spec:
      nodeName: %[1]s
      terminationGracePeriodSeconds: 1
      containers:
      - name: app
        image: %[2]s
        # One that fails restarts the container; one that is slow, on a busy machine, does not.
        livenessProbe: {exec: {command: [/app, call, /healthz]}, periodSeconds: 2, timeoutSeconds: 10, failureThreshold: 1}
---
apiVersion: v1
kind: Pod
metadata: {name: target}
spec:
  nodeName: %[1]s
  terminationGracePeriodSeconds: 1
  containers:
  - {name: app, image: %[2]s}
---
apiVersion: v1
kind: Pod
metadata: {name: slow}
spec:
  nodeName: %[1]s
  containers:
  - name: app
    image: %[2]s
    lifecycle: {preStop: {exec: {command: [sh, -c, "until [ -e /shared/let-go ]; do sleep 0.05; done"]}}}
    volumeMounts: [{name: shared, mountPath: /shared}]
  volumes: [{name: shared, hostPath: {path: /shared}}]
`

// TestNode installs cri-proxy on a running node with workloads, operates it, and takes it off. The
// steps share the node.
func TestNode(t *testing.T) {
	n := newNode(t)
	if err := n.bed.KubectlApply(t.Context(), fmt.Sprintf(workloads, n.NodeName, n.bed.Image("app:1"))); err != nil {
		t.Fatal(err)
	}
	n.kubectl(t, "rollout", "status", "deployment/web", "--timeout=150s")
	n.kubectl(t, "wait", "--for=condition=Ready", "pod/target", "pod/slow", "--timeout=150s")
	before := n.containers(t)
	if len(before) != 5 {
		t.Fatalf("pods: %v", before)
	}
	notReady := n.watchReady(t)
	traffic := n.traffic(t,
		strings.Fields(n.kubectl(t, "get", "pods", "-l", "app=web", "-o", "jsonpath={.items[*].status.podIP}"))...)

	for _, c := range []struct {
		name string
		test func(*testing.T, *node)
	}{
		{"dry run", installDryRun},
		{"roll back", installRollBack},
		{"install", installOnNode},
		{"restart", restartOnNode},
		{"image upgrade", imageUpgradeOnNode},
		{"upgrade", upgradeOnNode},
		{"bypass", bypassOnNode},
		{"bypass with operations", bypassWithOperations},
		{"commands over TCP", opsSocketOnNode},
		{"traces", tracesOnNode},
		{"uninstall", uninstallOnNode},
		{"the endpoint in kubelet's file", endpointInFile},
		{"killed", killedInstall},
		{"before kubelet", beforeKubelet},
		{"the endpoint in a directory of drop-ins", endpointInDirectory},
		{"DaemonSet", daemonSetOnNode},
		{"the endpoint in kubelet's unit", endpointInUnit},
		{"controller", startController},
		{"package", packageOnNode},
	} {
		ok := t.Run(c.name, func(t *testing.T) {
			began := time.Now()
			c.test(t, n)
			t.Logf("took %s", time.Since(began).Round(time.Millisecond))
		})
		if !ok {
			t.Fatalf("what follows would not tell anything\n%s",
				n.must(t, "sh", "-c",
					"journalctl --no-pager -n 25 -o short-precise -u 'cri-proxy*'; journalctl --no-pager -u "+
						"kubelet.service -o cat | grep ^E | tail -n 5"))
		}
	}

	if bad := notReady(); len(bad) > 0 {
		t.Errorf("the node was not ready: %q", bad)
	}
	calls, failures := traffic()
	if len(failures) > 0 || calls < 100 {
		t.Errorf("%d calls to pods, failed: %q", calls, failures)
	}
	after := n.containers(t)
	for pod, was := range before {
		if is := after[pod]; pod != "target" && pod != "slow" && is != was {
			t.Errorf("%s: was %v, is %v", pod, was, is)
		}
	}
	if target, slow := after["target"].Restarts, after["slow"].Restarts; target != 3 || slow != 1 {
		t.Errorf("target was restarted %d times, slow %d times, asked for were 3 and 1", target, slow)
	}
	t.Logf("%d calls to pods, none failed", calls)
}

// installed checks that kubelet calls through the proxy.
func (n *node) installed(t *testing.T) {
	t.Helper()
	before, _ := n.counted(t)
	await(t, "kubelet's calls through cri-proxy", func() bool { now, _ := n.counted(t); return now > before+3 })
}

func installDryRun(t *testing.T, n *node) {
	before := n.files(t)
	pid := n.show(t, "kubelet.service", "MainPID")
	out := n.does(t, "/shared/cri-proxy", "install", "--dry-run")
	for _, want := range []string{"would write /etc/cri-proxy/config.yaml",
		"would systemctl enable --now cri-proxy.socket", "point kubelet at unix:///run/cri-proxy/kubelet.sock, in " +
			kubeadmFlags, "+KUBELET_KUBEADM_ARGS"} {
		if !strings.Contains(out, want) {
			t.Errorf("not said: %s", want)
		}
	}
	same(t, before, n.files(t))
	if n.show(t, "kubelet.service", "MainPID") != pid {
		t.Error("kubelet was restarted")
	}
	if out := n.does(t, "/shared/cri-proxy", "uninstall"); !strings.Contains(out, "cri-proxy is not installed here") {
		t.Error(out)
	}
}

// installRollBack is one that must put everything back: because kubelet does not come up, and
// because the proxy does not reach the runtime.
func installRollBack(t *testing.T, n *node) {
	before := n.files(t)
	touch(t, n.machine, "break-kubelet")
	out := n.doesNot(t, "/shared/cri-proxy", "install", "--timeout", "30s")
	if err := os.Remove(filepath.Join(n.shared, "break-kubelet")); err != nil {
		t.Fatal(err)
	}
	if !strings.Contains(out, "everything is as it was") {
		t.Error(out)
	}
	same(t, before, n.files(t), "/var/lib/cri-proxy/")
	if err := n.bed.WaitNodeReady(t.Context(), n.NodeName); err != nil {
		t.Error(err)
	}

	dropIn := n.root + "/etc/systemd/system/cri-proxy@.service.d/test.conf"
	if err := os.MkdirAll(filepath.Dir(dropIn), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(dropIn, []byte("[Service]\nInaccessiblePaths="+n.RuntimeSocket+"\n"), 0o644); err != nil {
		t.Fatal(err)
	}
	pid := n.show(t, "kubelet.service", "MainPID")
	out = n.doesNot(t, "/shared/cri-proxy", "install")
	if !strings.Contains(out, "kubelet is left alone") || !strings.Contains(out, "everything is as it was") {
		t.Error(out)
	}
	if n.show(t, "kubelet.service", "MainPID") != pid {
		t.Error("kubelet was restarted")
	}
	if err := os.RemoveAll(filepath.Dir(dropIn)); err != nil {
		t.Fatal(err)
	}
	n.must(t, "systemctl", "daemon-reload")
	same(t, before, n.files(t), "/var/lib/cri-proxy/")
}

func installOnNode(t *testing.T, n *node) {
	before := n.files(t)
	n.does(t, "/shared/cri-proxy", "install")
	n.installed(t)
	n.pointed(t, before)
	config, err := os.ReadFile(n.root + "/etc/cri-proxy/config.yaml")
	if err != nil || !strings.Contains(string(config), "runtimeEndpoint: unix://"+n.RuntimeSocket) ||
		!strings.Contains(string(config), "\nnodeName: \""+n.NodeName+"\"\n") {
		t.Errorf("%v\n%s", err, config)
	}
	// Once more does nothing, with a flag just that.
	before = n.files(t)
	pid := n.show(t, "kubelet.service", "MainPID")
	if out := n.does(t, "cri-proxy", "install"); !strings.Contains(out, "there is nothing to do") {
		t.Error(out)
	}
	same(t, before, n.files(t))
	i, _ := n.serving(t)
	n.does(t, "cri-proxy", "install", "--log-level", "debug")
	now, _ := n.serving(t)
	if now == i || now == "" {
		t.Errorf("%q serves, before it was %q: the configuration was not taken up", now, i)
	}
	after := n.files(t)
	if want := strings.Replace(before["/etc/cri-proxy/config.yaml"], "level: info", "level: debug",
		1); after["/etc/cri-proxy/config.yaml"] != want {
		t.Errorf("configuration:\n%s", after["/etc/cri-proxy/config.yaml"])
	}
	if n.show(t, "kubelet.service", "MainPID") != pid {
		t.Error("kubelet was restarted")
	}
	await(t, "the end of the first process",
		func() bool { return n.show(t, "cri-proxy@"+i, "ActiveState") == "inactive" })
}

// operation is what cri-proxy ctl says of one.
type operation struct {
	Kind       string
	Phase      string
	Containers []struct{ Method string }
}

// method is how the containers of the last operation of that kind were switched over.
func (n *node) method(t *testing.T, kind string) string {
	t.Helper()
	out := n.must(t, "cri-proxy", "ctl", "ops", "-o", "json")
	var list struct{ Operations []operation }
	if err := json.Unmarshal([]byte(out), &list); err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	for _, op := range list.Operations {
		if strings.EqualFold(op.Kind, kind) && len(op.Containers) > 0 {
			return op.Containers[0].Method
		}
	}
	t.Fatalf("no operation %s\n%s", kind, out)
	return ""
}

// restartOnNode is the first restart under the unit's sandbox: everything that it needs must be let
// through.
func restartOnNode(t *testing.T, n *node) {
	was := n.containers(t)["target"]
	n.does(t, "cri-proxy", "ctl", "restart", "default/target", "-c", "app", "--watch")
	await(t, "the restart in the API", func() bool {
		is := n.containers(t)["target"]
		return is.ID != was.ID &&
			is.Restarts == 1
	})
	if m := n.method(t, "Restart"); m != "gate" {
		t.Errorf("the method was %s", m)
	}
}

func imageUpgradeOnNode(t *testing.T, n *node) {
	image := n.bed.Image("app:2")
	n.does(t, "cri-proxy", "ctl", "set-image", "default/target", "-c", "app="+image)
	n.kubectl(t, "set", "image", "pod/target", "app="+image)
	await(t, "the new image in the API", func() bool {
		is := n.containers(t)["target"]
		return is.Image == image &&
			is.Restarts == 2
	})
	if m := n.method(t, "Upgrade"); m != "gate" {
		t.Errorf("the method was %s", m)
	}
}

func upgradeOnNode(t *testing.T, n *node) {
	i, _ := n.serving(t)
	n.does(t, "cri-proxy", "self-update", "--binary", "/shared/cri-proxy-v2")
	if now, _ := n.serving(t); now == i || now == "" {
		t.Errorf("%q serves", now)
	}
	n.installed(t)
	await(t, "the end of the process before",
		func() bool { return n.show(t, "cri-proxy@"+i, "ActiveState") == "inactive" })
}

func bypassOnNode(t *testing.T, n *node) {
	n.does(t, "cri-proxy", "bypass", "on")
	await(t, "the end of kubelet's calls through a proxy that is bypassed", func() bool {
		at, _ := n.counted(t)
		<-time.After(2 * time.Second) // kubelet lists containers every second
		now, _ := n.counted(t)
		return now == at
	})
	n.does(t, "cri-proxy", "bypass", "off", "--restart-kubelet")
	n.installed(t)

	// Pointed at the CRI socket itself, kubelet is out of a bypass's reach, and install puts that
	// right.
	n.must(t, "sed", "-i", "s,/run/cri-proxy/kubelet.sock,/run/cri-proxy/cri.sock,", kubeadmFlags)
	n.must(t, "systemctl", "restart", "kubelet.service")
	n.installed(t)
	if out := n.doesNot(t, "cri-proxy", "bypass", "on"); !strings.Contains(out, "where a bypass does not reach it") {
		t.Error(out)
	}
	if out := n.does(t, "cri-proxy", "bypass", "status"); !strings.Contains(out, "where a bypass does not reach it") ||
		!strings.Contains(out, "off") {
		t.Error(out)
	}
	n.does(t, "cri-proxy", "install")
	if out := n.does(t, "cri-proxy", "bypass", "status"); out != "off\n" {
		t.Error(out)
	}
}

func uninstallOnNode(t *testing.T, n *node) {
	// What nobody would ever take off again: a pin, and the lease of a pull that was cut off.
	image, lease := n.bed.Image("app:3"), "cri-proxy-pull-cut-off"
	n.does(t, "cri-proxy", "ctl", "pull", image, "--pin", "24h")
	n.ctr(t, "leases", "create", "--id", lease)
	if out := n.ctr(t, "images", "ls", "-q", `labels."cri-proxy.io/pinned"`); !strings.HasPrefix(out, "sha256:") {
		t.Fatalf("pinned: %q", out)
	}
	out := n.does(t, "cri-proxy", "uninstall")
	// The image upgrades before have pinned the image that came and the one that went, for the way
	// back.
	if want := fmt.Sprintf("taken off: pins of images: 3 (%s, %s, %s), leases of pulls: 1", n.bed.Image("app:1"),
		n.bed.Image("app:2"), image); !strings.Contains(out, want) {
		t.Error(out)
	}
	if out := n.ctr(t, "images", "ls", "-q", `labels."cri-proxy.io/pinned"`); out != "" {
		t.Errorf("still pinned: %s", out)
	}
	if out := n.ctr(t, "leases", "ls", "-q"); strings.Contains(out, "cri-proxy") {
		t.Errorf("leases: %s", out)
	}
	await(t, "the image, which stays, to be kubelet's to collect", func() bool {
		crictl := []string{filepath.Join(n.bed.Bin, "crictl"), "-r", "unix://" + n.RuntimeSocket, "inspecti", image}
		return strings.Contains(n.must(t, crictl...), `"pinned": false`)
	})
	out = n.ctr(t, "images", "ls", "-q", `labels."io.cri-containerd.pinned"==pinned`)
	if !strings.Contains(out, "pause") {
		t.Errorf("the sandbox image is not pinned any more: %s", out)
	}
	// It is for what was left by an uninstall before this one, too, and when the runtime was away.
	n.ctr(t, "leases", "create", "--id", lease)
	out = n.does(t, "/shared/cri-proxy", "uninstall")
	if !strings.Contains(out, "taken off: pins of images: 0, leases of pulls: 1") {
		t.Error(out)
	}
	flags, err := os.ReadFile(n.root + kubeadmFlags)
	if err != nil || !strings.Contains(string(flags), "--container-runtime-endpoint=unix://"+n.RuntimeSocket+" ") {
		t.Errorf("%v: %s", err, flags)
	}
	for path := range n.files(t) {
		if strings.Contains(path, "cri-proxy") && path != "/etc/cri-proxy/config.yaml" &&
			!strings.HasPrefix(path, "/var/lib/cri-proxy/") && !strings.HasPrefix(path, n.NodeDir) {
			t.Errorf("left: %s", path)
		}
	}
	if out := n.must(t, "sh", "-c", "ls /run/cri-proxy 2>/dev/null || :"); out != "" {
		t.Errorf("left in /run: %s", out)
	}
	await(t, "systemd to forget the units", func() bool {
		return strings.TrimSpace(n.must(t, "systemctl", "list-units", "--all", "--no-legend", "cri-proxy*")) == ""
	})
}

// ctr speaks to containerd itself. What it warns of is left out.
func (n *node) ctr(t *testing.T, args ...string) string {
	t.Helper()
	ctr := []string{filepath.Join(n.bed.Bin, "ctr"), "-a", n.RuntimeSocket, "-n", "k8s.io"}
	return n.must(t, slices.Concat([]string{"sh", "-c", `exec "$@" 2>/dev/null`, "sh"}, ctr, args)...)
}

// killedInstall is one that is killed at one step or another: kubelet works, and uninstall or
// another install go on.
func killedInstall(t *testing.T, n *node) {
	before := n.files(t)
	kill := func(t *testing.T, at string) {
		t.Helper()
		n.does(t, "sh", "-c", `/shared/cri-proxy install >/shared/install.out 2>&1 & p=$!
while ! grep -q "$1" /shared/install.out; do kill -0 $p || { cat /shared/install.out; exit 1; }; sleep 0.01; done
kill -9 $p; wait $p; tail -n 3 /shared/install.out
# What it has called goes on without it, and is in the way of whoever comes next.
while grep -qsx systemctl /proc/[0-9]*/comm; do sleep 0.01; done`, "sh", at)
	}
	kill(t, "enable --now cri-proxy.socket")
	n.does(t, "/shared/cri-proxy", "uninstall")
	same(t, before, n.files(t), "/var/lib/cri-proxy/")

	kill(t, "^point kubelet")
	n.must(t, "sh", "-c", "until systemctl is-active -q kubelet.service; do sleep 0.05; done")
	n.does(t, "/shared/cri-proxy", "install")
	n.installed(t)
	n.pointed(t, before)
	// A kubelet that is down and may have been told elsewhere is in the way of an uninstall; one
	// whose files are known is not.
	n.must(t, "systemctl", "stop", "kubelet.service")
	n.must(t, "mv", n.endpoint[0], n.endpoint[0]+".moved")
	if out := n.doesNot(t, "cri-proxy", "uninstall", "--purge"); !strings.Contains(out,
		n.endpoint[0]+", which told it what to dial, does so no more: start kubelet first") {
		t.Error(out)
	}
	n.must(t, "mv", n.endpoint[0]+".moved", n.endpoint[0])
	n.does(t, "cri-proxy", "uninstall", "--purge")
	n.must(t, "systemctl", "start", "kubelet.service")
	for path := range n.files(t) {
		if strings.Contains(path, "cri-proxy") && !strings.HasPrefix(path, n.NodeDir) {
			t.Errorf("left: %s", path)
		}
	}
	same(t, before, n.files(t), "/etc/cri-proxy/", "/var/lib/cri-proxy/")
	if err := n.bed.WaitNodeReady(t.Context(), n.NodeName); err != nil {
		t.Error(err)
	}
}

// packageOnNode is the way of the Debian package: it does not touch kubelet until it is asked to,
// takes over when it is upgraded, and is not removed from under kubelet.
func packageOnNode(t *testing.T, n *node) {
	before := n.files(t)
	debs := map[string]string{}
	for version, binary := range map[string]string{"1": "cri-proxy", "2": "cri-proxy-v2"} {
		if err := command(t.Context(), "../../packaging/deb/build.sh", filepath.Join(n.shared, binary), runtime.GOARCH,
			version, n.shared); err != nil {
			t.Fatal(err)
		}
		debs[version] = "/shared/cri-proxy_" + version + "_" + runtime.GOARCH + ".deb"
	}
	pid := n.show(t, "kubelet.service", "MainPID")
	if out := n.does(t, "dpkg", "-i", debs["1"]); !strings.Contains(out, "kubelet has not been touched") {
		t.Error(out)
	}
	if n.show(t, "kubelet.service", "MainPID") != pid || n.show(t, "cri-proxy.socket", "ActiveState") != "inactive" {
		t.Error("the package alone does something")
	}

	n.does(t, "/usr/bin/cri-proxy", "install", "--ops-address", ":10260")
	n.installed(t)
	n.pointed(t, before)
	n.commanded(t)
	for path := range n.files(t) {
		if dir, name := filepath.Split(path); dir == "/etc/systemd/system/" && strings.HasPrefix(name, "cri-proxy") {
			t.Errorf("%s is in the way of the package's", path)
		}
	}
	pid = n.show(t, "kubelet.service", "MainPID")
	_, process := n.serving(t)
	n.does(t, "dpkg", "-i", debs["2"])
	if _, now := n.serving(t); now == process || now == "" {
		t.Errorf("process %q serves, before it was %q", now, process)
	}
	if out := n.must(t, "sh", "-c",
		"cmp /usr/bin/cri-proxy /usr/local/bin/cri-proxy && cmp /usr/bin/cri-proxy /shared/cri-proxy-v2"); out != "" {
		t.Error(out)
	}
	n.installed(t)
	if n.show(t, "kubelet.service", "MainPID") != pid {
		t.Error("kubelet was restarted")
	}

	// As long as kubelet cannot be led elsewhere, the package stays.
	n.must(t, "touch", "/shared/break-uninstall")
	n.must(t, "sh", "-c", "mkdir -p /etc/systemd/system/kubelet.service.d; printf '[Service]\nExecStartPre=/bin/sh "+
		"-c \"! test -e /shared/break-uninstall\"\n' >/etc/systemd/system/kubelet.service.d/test.conf")
	n.doesNot(t, "dpkg", "-r", "cri-proxy")
	n.must(t, "rm", "/shared/break-uninstall", "/etc/systemd/system/kubelet.service.d/test.conf")
	n.must(t, "systemctl", "daemon-reload")
	n.must(t, "systemctl", "restart", "kubelet.service")
	if out := n.must(t, "cri-proxy", "version"); out == "" {
		t.Error("no cri-proxy any more")
	}
	n.does(t, "dpkg", "-r", "cri-proxy")
	if err := n.bed.WaitNodeReady(t.Context(), n.NodeName); err != nil {
		t.Error(err)
	}
	n.does(t, "dpkg", "-P", "cri-proxy")
	same(t, before, n.files(t))
	if c, err := net.Dial("tcp", net.JoinHostPort(n.BridgeIP, "10260")); err == nil {
		c.Close()
		t.Error("somebody still takes commands")
	}
}

// beforeKubelet is an install on a node whose kubelet has not been started yet, as cloud-init does
// it, and where /usr is read-only. What kubelet reads is somebody else's, and uninstall changes it
// back all the same.
func beforeKubelet(t *testing.T, n *node) {
	before := n.files(t)
	n.must(t, "systemctl", "stop", "kubelet.service")
	if out := n.doesNot(t, "/shared/cri-proxy", "install"); !strings.Contains(out, "use --no-kubelet") {
		t.Error(out)
	}
	n.must(t, "mount", "--bind", "/usr/local", "/usr/local")
	n.must(t, "mount", "-o", "remount,bind,ro", "/usr/local")
	defer n.must(t, "umount", "/usr/local")
	noKubelet := []string{"/shared/cri-proxy", "install", "--no-kubelet", "--runtime-endpoint", n.RuntimeSocket}
	if out := n.doesNot(t, noKubelet...); !strings.Contains(out,
		"read-only: give another place with --prefix, such as /opt") {
		t.Error(out)
	}
	if out := n.does(t, append(noKubelet, "--prefix", "/opt")...); !strings.Contains(out,
		"must be unix:///run/cri-proxy/kubelet.sock") {
		t.Error(out)
	}
	n.must(t, "sed", "-i", "s,unix://"+n.RuntimeSocket+",unix:///run/cri-proxy/kubelet.sock,", n.endpoint[0])
	n.must(t, "systemctl", "start", "kubelet.service")
	n.installed(t)
	if out := n.does(t, "/shared/cri-proxy", "install", "--dry-run"); strings.Contains(out, "point kubelet") {
		t.Error(out)
	}
	// What comes later finds it there.
	i, _ := n.serving(t)
	n.does(t, "/opt/bin/cri-proxy", "self-update", "--reload")
	if now, _ := n.serving(t); now == i || now == "" {
		t.Errorf("%q serves, before it was %q", now, i)
	}
	if out := n.doesNot(t, "/shared/cri-proxy", "install", "--no-kubelet", "--prefix", "/srv"); !strings.Contains(out,
		"is installed below /opt") {
		t.Error(out)
	}
	n.does(t, "/opt/bin/cri-proxy", "uninstall", "--purge")
	same(t, before, n.files(t))
}

// daemonSetOnNode installs by a DaemonSet: it says what it would do, does it, and takes it off
// again.
func daemonSetOnNode(t *testing.T, n *node) {
	before := n.files(t)
	ctx := t.Context()
	// The image as make image makes it: the binary and nothing else.
	layer := filepath.Join(n.dir, "image")
	if err := command(ctx, "install", "-D", filepath.Join(n.shared, "cri-proxy"),
		filepath.Join(layer, "ko-app", "cri-proxy")); err != nil {
		t.Fatal(err)
	}
	crane := filepath.Join(n.bed.Bin, "crane")
	image := n.bed.Image("cri-proxy:test")
	for _, c := range [][]string{
		{"tar", "-C", layer, "-cf", layer + ".tar", "ko-app"},
		{crane, "append", "--insecure", "--platform", "linux/" + runtime.GOARCH, "--oci-empty-base", "-f",
			layer + ".tar", "-t", image},
		{crane, "mutate", "--insecure", "--set-platform", "linux/" + runtime.GOARCH, "--entrypoint",
			"/ko-app/cri-proxy", "--user", "65532:65532", "-t", image, image},
	} {
		if err := command(ctx, c[0], c[1:]...); err != nil {
			t.Fatal(err)
		}
	}
	for _, file := range []string{"namespace.yaml", "rbac.yaml", "policy.yaml"} {
		n.kubectl(t, "apply", "-f", filepath.Join("../../deploy/installer", file))
	}
	if err := n.bed.WaitNamespace(ctx, "cri-proxy-installer"); err != nil {
		t.Fatal(err)
	}
	daemonSet, err := os.ReadFile("../../deploy/installer/daemonset.yaml")
	if err != nil {
		t.Fatal(err)
	}
	api, err := url.Parse(n.bed.APIServer)
	if err != nil {
		t.Fatal(err)
	}
	// Only on this node, and without kube-proxy the API server has its own address only.
	text := strings.NewReplacer(
		"image: cri-proxy\n", "image: "+image+"\n",
		"{kubernetes.io/os: linux}", "{kubernetes.io/hostname: "+n.NodeName+"}",
		"        env:\n", "        env:\n        - {name: KUBERNETES_SERVICE_HOST, value: "+api.Hostname()+"}\n      "+
			"  - {name: KUBERNETES_SERVICE_PORT, value: \""+api.Port()+"\"}\n",
		"minReadySeconds: 10", "minReadySeconds: 3", "periodSeconds: 5", "periodSeconds: 1",
	).Replace(string(daemonSet))
	if err := n.bed.KubectlApply(ctx, text); err != nil {
		t.Fatal(err)
	}
	rolled := func(want string) {
		t.Helper()
		out, err := n.bed.Kubectl(ctx, "-n", "cri-proxy-installer", "rollout", "status",
			"daemonset/cri-proxy-installer", "--timeout=150s")
		log := n.kubectl(t, "-n", "cri-proxy-installer", "logs", "daemonset/cri-proxy-installer", "--tail=100")
		if err != nil || !strings.Contains(log, want) {
			t.Fatalf("%v: %s\n%s\n%s", err, out, log, n.kubectl(t, "-n", "cri-proxy-installer", "describe", "pods"))
		}
	}
	label := func() string {
		return n.kubectl(t, "get", "node", n.NodeName, "-o", `jsonpath={.metadata.labels.cri-proxy\.io/installed}`)
	}
	rolled("would point kubelet at unix:///run/cri-proxy/kubelet.sock")
	same(t, before, n.files(t), "/usr/local/lib/cri-proxy-installer/")
	n.kubectl(t, "-n", "cri-proxy-installer", "set", "env", "daemonset/cri-proxy-installer", "ACTION=install",
		"ARGS=--log-level=debug --metrics-address=127.0.0.1:9464")
	rolled("install is done")
	n.installed(t)
	n.pointed(t, before)
	if label() != "true" {
		t.Error("the node has no label")
	}
	n.kubectl(t, "-n", "cri-proxy-installer", "set", "env", "daemonset/cri-proxy-installer",
		"ACTION=uninstall", "ARGS=--purge")
	rolled("uninstall is done")
	if label() != "" {
		t.Error("the node still has its label")
	}
	n.kubectl(t, "delete", "-f", "../../deploy/installer/namespace.yaml", "--wait=false")
	same(t, before, n.files(t))
}

// made is how many containers of a pod the runtime has that have not ended.
func (n *node) made(t *testing.T, pod string) (count int) {
	t.Helper()
	conn, err := n.DialRuntime()
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	list, err := runtimeapi.NewRuntimeServiceClient(conn).
		ListContainers(t.Context(), &runtimeapi.ListContainersRequest{Filter: &runtimeapi.ContainerFilter{
			LabelSelector: map[string]string{"io.kubernetes.pod.name": pod},
		}})
	if err != nil {
		t.Fatal(err)
	}
	for _, c := range list.GetContainers() {
		if c.GetState() != runtimeapi.ContainerState_CONTAINER_EXITED {
			count++
		}
	}
	return count
}

// bypassWithOperations: what is under way is waited for, named, or cancelled; what has been
// prepared never comes to kubelet's eyes.
func bypassWithOperations(t *testing.T, n *node) {
	n.must(t, "cri-proxy", "ctl", "restart", "default/slow", "-c", "app")
	if out := n.doesNot(t, "cri-proxy", "bypass", "on", "--wait", "200ms"); !strings.Contains(out,
		"operations are under way: Restart ") || !strings.Contains(out, "default/slow") {
		t.Error(out)
	}
	if out := n.must(t, "cri-proxy", "bypass", "status"); out != "off\n" {
		t.Error(out)
	}
	// The restart, whose preStop hook waits, comes to its end when the command has said that it
	// waits.
	if out := n.does(t, "sh", "-c", `cri-proxy bypass on >/shared/bypass.out 2>&1 & p=$!
until grep -q "waiting for Restart " /shared/bypass.out || ! kill -0 $p 2>/dev/null; do sleep 0.02; done
touch /shared/let-go; wait $p; r=$?; cat /shared/bypass.out; exit $r`); !strings.Contains(out, "waiting for Restart ") {
		t.Error(out)
	}
	if s := n.containers(t)["slow"]; s.Restarts > 1 {
		t.Errorf("slow: %+v", s)
	}
	n.does(t, "cri-proxy", "bypass", "off", "--restart-kubelet")

	image := "app=" + n.bed.Image("app:2")
	n.must(t, "cri-proxy", "ctl", "set-image", "default/slow", "-c", image)
	if out := n.doesNot(t, "cri-proxy", "bypass", "on", "--wait", "200ms"); !strings.Contains(out,
		"operations are under way: Upgrade ") {
		t.Error(out)
	}
	if got := n.made(t, "slow"); got != 2 {
		t.Errorf("%d containers, want the old one and the prepared one", got)
	}
	n.does(t, "cri-proxy", "bypass", "on", "--force")
	if n.made(t, "slow") != 1 {
		t.Error("what was prepared is still there")
	}
	n.does(t, "cri-proxy", "bypass", "off", "--restart-kubelet")

	// Without a daemon, the command takes it away itself. The daemon finds out later.
	i, _ := n.serving(t)
	n.must(t, "cri-proxy", "ctl", "set-image", "default/slow", "-c", image)
	n.must(t, "systemctl", "stop", "cri-proxy.socket", "cri-proxy-admin.socket", "cri-proxy@"+i)
	if out := n.does(t, "cri-proxy", "bypass", "on"); !strings.Contains(out, "removed the staged container") {
		t.Error(out)
	}
	if n.made(t, "slow") != 1 {
		t.Error("what was prepared is still there")
	}
	n.must(t, "systemctl", "start", "cri-proxy.socket", "cri-proxy-admin.socket", "cri-proxy@"+i)
	n.does(t, "cri-proxy", "bypass", "off", "--restart-kubelet")
	n.installed(t)
	await(t, "the end of the upgrade", func() bool {
		return strings.Contains(n.must(t, "cri-proxy", "ctl", "ops", "--active"), "No operations")
	})
}

// opsSocketOnNode: systemd holds the socket for the controller, so that no connection is refused
// while one process follows another.
func opsSocketOnNode(t *testing.T, n *node) {
	address := net.JoinHostPort(n.BridgeIP, "10260")
	n.does(t, "cri-proxy", "install", "--ops-address", address, "--ops-cert-file", n.OpsCert.Cert,
		"--ops-key-file", n.OpsCert.Key,
		"--ops-client-ca-file", n.bed.PKI.OpsCA.Cert, "--ops-allowed-clients", "cri-controller")
	cert, err := tls.LoadX509KeyPair(n.bed.PKI.Controller.Cert, n.bed.PKI.Controller.Key)
	if err != nil {
		t.Fatal(err)
	}
	ca, err := os.ReadFile(n.bed.PKI.OpsCA.Cert)
	if err != nil {
		t.Fatal(err)
	}
	pool := x509.NewCertPool()
	pool.AppendCertsFromPEM(ca)
	config := &tls.Config{Certificates: []tls.Certificate{cert}, RootCAs: pool, ServerName: n.NodeName}
	ask := func() error {
		conn, err := grpc.NewClient(address, grpc.WithTransportCredentials(credentials.NewTLS(config)))
		if err != nil {
			return err
		}
		defer conn.Close()
		ctx, cancel := context.WithTimeout(t.Context(), 10*time.Second)
		defer cancel()
		info, err := opsv1.NewOpsClient(conn).NodeInfo(ctx, &opsv1.NodeInfoRequest{})
		if err == nil && info.GetNodeName() != n.NodeName {
			err = errors.New("another node answers: " + info.GetNodeName())
		}
		return err
	}
	if err := ask(); err != nil {
		t.Fatal(err)
	}
	var refused []string
	connections := 0
	done, over := make(chan struct{}), make(chan struct{})
	go func() { // ends with done
		defer close(over)
		for {
			select {
			case <-done:
				return
			case <-time.After(2 * time.Millisecond):
			}
			c, err := net.DialTimeout("tcp", address, time.Second)
			if connections++; err != nil {
				refused = append(refused, err.Error())
				continue
			}
			c.Close()
		}
	}()
	n.does(t, "cri-proxy", "self-update", "--reload")
	close(done)
	<-over
	if len(refused) > 0 || connections < 50 {
		t.Errorf("%d connections, refused: %q", connections, refused)
	}
	if err := ask(); err != nil {
		t.Error(err)
	}
	t.Logf("%d connections, none refused", connections)
	await(t, "the end of the process before", n.oneRuns(t))
}
