// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package nspawn

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"maps"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/cri-proxy/cri-proxy/test/testbed"
)

// node is a machine with a real containerd and a real kubelet as units, a node of a real cluster
// whose control plane runs outside.
type node struct {
	*machine
	*testbed.Node
	bed *testbed.Bed
	// endpoint are the files by which an install points kubelet at cri-proxy.
	endpoint []string
}

// timeout bounds what takes a restart of kubelet or two.
const timeout = 3 * time.Minute

const (
	realContainerdUnit = `[Unit]
Description=containerd
[Service]
Type=notify
Environment=PATH=%[1]s:/usr/sbin:/usr/bin:/sbin:/bin
ExecStart=%[1]s/containerd %[2]s
Delegate=yes
KillMode=process
Restart=always
OOMScoreAdjust=0
[Install]
WantedBy=multi-user.target
`
	// As kubeadm's, with its file of flags. With the file break-kubelet in /shared it does not come
	// up behind cri-proxy.
	realKubeletUnit = `[Unit]
Description=kubelet
StartLimitIntervalSec=0
[Service]
Environment=PATH=%[1]s:/usr/sbin:/usr/bin:/sbin:/bin
EnvironmentFile=-/var/lib/kubelet/kubeadm-flags.env
ExecStartPre=/bin/sh -c 'test ! -e /shared/break-kubelet || ! grep -q run/cri-proxy/ /var/lib/kubelet/kubeadm-flags.env'
ExecStart=%[1]s/kubelet %[2]s $KUBELET_KUBEADM_ARGS
Delegate=yes
KillMode=process
Restart=always
RestartSec=1
[Install]
WantedBy=multi-user.target
`
	kubeadmFlags = "/var/lib/kubelet/kubeadm-flags.env"
)

// newNode brings the cluster and the machine up. Kubelet dials containerd.
func newNode(t *testing.T) *node {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), buildTimeout)
	defer cancel()
	bed, err := testbed.Start(ctx, testbed.Options{
		Mode: testbed.ModeCluster, Direct: true, Nodes: 2, Later: 1, Namespaces: true, Race: true, KeepLogs: t.Failed,
	})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := bed.Close(context.Background()); err != nil {
			t.Error(err)
		}
	})
	n := &node{Node: bed.Nodes[1], bed: bed, endpoint: []string{kubeadmFlags}}
	if n.machine, err = makeMachine(ctx); n.machine != nil {
		t.Cleanup(n.stop)
	}
	if err == nil {
		err = n.setUp()
	}
	if err == nil {
		err = n.boot(ctx)
	}
	if err == nil {
		err = n.loosen(ctx)
	}
	if err == nil {
		_, err = n.run(ctx, "systemctl", "start", "containerd.service", "kubelet.service")
	}
	if err == nil {
		err = bed.WaitNodeReady(ctx, n.NodeName)
	}
	if err != nil {
		out, _ := n.run(context.Background(), "journalctl", "--no-pager", "-n", "80")
		t.Fatalf("%v\n%s\n%s", err, n.said(), out)
	}
	return n
}

// setUp writes the units. All of the node's files have the same paths inside and outside.
func (n *node) setUp() error {
	cache, err := testbed.CacheDir()
	if err != nil {
		return err
	}
	n.args = []string{
		"--network-namespace-path=" + n.Netns(), "--bind=" + n.bed.Dir, "--bind=" + n.RunDir,
		"--bind-ro=" + filepath.Join(cache, "components"),
		"--bind=/dev/kmsg", "--capability=all", "--system-call-filter=@known",
	}
	kubelet, err := n.KubeletCommand()
	if err != nil {
		return err
	}
	for path, content := range map[string]string{
		"/etc/systemd/system/containerd.service": fmt.Sprintf(realContainerdUnit, n.bed.Bin,
			strings.Join(n.ContainerdCommand(), " ")),
		"/etc/systemd/system/kubelet.service": fmt.Sprintf(realKubeletUnit, n.bed.Bin, strings.Join(kubelet, " ")),
		kubeadmFlags: fmt.Sprintf(
			"KUBELET_KUBEADM_ARGS=\"--container-runtime-endpoint=unix://%s --register-with-taints=\"\n",
			n.RuntimeSocket),
		"/etc/hosts":       "127.0.0.1 localhost\n",
		"/etc/resolv.conf": "",
	} {
		path = n.root + path
		if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
			return err
		}
		if err := os.WriteFile(path, []byte(content), 0o644); err != nil {
			return err
		}
	}
	// They are started later: a machine that has just come up has its cgroups read-only.
	return nil
}

// loosen lets kubelet and containerd have the cgroups and sysctls of the machine, which nspawn
// gives read-only.
func (n *node) loosen(ctx context.Context) error {
	var st unix.Statfs_t
	if err := unix.Statfs("/sys/fs/cgroup", &st); err != nil {
		return err
	}
	script := "mount -o remount,bind,rw /proc/sys\n"
	if st.Type != unix.CGROUP2_SUPER_MAGIC {
		script += "for d in /sys/fs/cgroup/*/; do d=${d%/}; mount -o remount,bind,rw $d 2>/dev/null; mkdir -p $d" +
			n.CgroupParent + "; done\n"
	} else {
		script += "mkdir -p /sys/fs/cgroup" + n.CgroupParent + "\n"
	}
	// As on a real node, the same mounts everywhere.
	out, err := n.run(ctx, "sh", "-ec", script)
	if err != nil {
		return fmt.Errorf("%w: %s", err, out)
	}
	return nil
}

// does runs a command in the machine that may take as long as kubelet's restarts.
func (n *node) does(t *testing.T, args ...string) string {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), timeout)
	defer cancel()
	began := time.Now()
	out, err := n.run(ctx, args...)
	if err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	t.Logf("%s: %s\n%s", strings.Join(args, " "), time.Since(began).Round(10*time.Millisecond), out)
	return out
}

// doesNot runs a command that must fail.
func (n *node) doesNot(t *testing.T, args ...string) string {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), timeout)
	defer cancel()
	began := time.Now()
	out, err := n.run(ctx, args...)
	if err == nil {
		t.Fatalf("%s has not failed\n%s", strings.Join(args, " "), out)
	}
	t.Logf("%s: %s, %v\n%s", strings.Join(args, " "), time.Since(began).Round(10*time.Millisecond), err, out)
	return out
}

func (n *node) kubectl(t *testing.T, args ...string) string {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), timeout)
	defer cancel()
	out, err := n.bed.Kubectl(ctx, args...)
	if err != nil {
		t.Fatal(err)
	}
	return out
}

// files are those of the machine that an install may touch, with what is in them.
func (n *node) files(t *testing.T) map[string]string {
	t.Helper()
	out := map[string]string{}
	for _, dir := range []string{"/etc", filepath.Dir(kubeadmFlags), "/var/lib/cri-proxy", "/usr/local", "/opt",
		filepath.Join(n.NodeDir, "etc")} {
		at := n.root + dir
		if strings.HasPrefix(dir, n.NodeDir) {
			at = dir
		}
		err := filepath.WalkDir(at, func(path string, d os.DirEntry, err error) error {
			if errors.Is(err, os.ErrNotExist) {
				return nil // no such directory, or gone since its parent was read
			}
			if err != nil || d.IsDir() || d.Type()&(os.ModeSocket|os.ModeNamedPipe) != 0 {
				return err
			}
			b, err := os.ReadFile(path)
			if d.Type()&os.ModeSymlink != 0 {
				var to string
				to, err = os.Readlink(path)
				b = []byte(to)
			}
			if errors.Is(err, os.ErrNotExist) {
				return nil
			}
			out[strings.TrimPrefix(path, n.root)] = string(b)
			return err
		})
		if err != nil {
			t.Fatal(err)
		}
	}
	return out
}

// same checks that no file has changed but those below keep.
func same(t *testing.T, before, after map[string]string, keep ...string) {
	t.Helper()
	all := maps.Clone(before)
	maps.Copy(all, after)
	for path := range all {
		if slices.ContainsFunc(keep, func(k string) bool { return strings.HasPrefix(path, k) }) {
			continue
		}
		was, had := before[path]
		is, has := after[path]
		if had != has || was != is {
			t.Errorf("%s: was there %v, is there %v\n%.300s\n---\n%.300s", path, had, has, was, is)
		}
	}
}

// container is what kubelet says of one.
type container struct {
	ID       string
	Restarts int
	Image    string
}

// containers are those of all pods, by pod.
func (n *node) containers(t *testing.T) map[string]container {
	t.Helper()
	var list struct {
		Items []struct {
			Metadata struct{ Name string }
			Status   struct {
				ContainerStatuses []struct {
					ContainerID  string
					RestartCount int
					Image        string
				}
			}
		}
	}
	if err := json.Unmarshal([]byte(n.kubectl(t, "get", "pods", "-o", "json")), &list); err != nil {
		t.Fatal(err)
	}
	out := map[string]container{}
	for _, p := range list.Items {
		for _, c := range p.Status.ContainerStatuses {
			out[p.Metadata.Name] = container{c.ContainerID, c.RestartCount, c.Image}
		}
	}
	return out
}

// starting is what a kubelet that has just started may say of itself, with or without a proxy,
// until its first Status call and its first relist have come back (pkg/kubelet/runtime.go,
// pkg/kubelet/pleg/generic.go).
var starting = regexp.MustCompile(
	`^False KubeletNotReady \[?(container runtime status check may not have completed yet|PLEG is not healthy: pleg has yet to be successful|, )+\]?$`)

// watchReady notes whenever the node is said not to be ready, until the function that it returns is
// called.
func (n *node) watchReady(t *testing.T) (end func() []string) {
	t.Helper()
	ctx, cancel := context.WithCancel(context.Background())
	var out bytes.Buffer
	cmd := exec.CommandContext(ctx, filepath.Join(n.bed.Bin, "kubectl"), "--kubeconfig", n.bed.Kubeconfig, "get",
		"node", n.NodeName, "-w",
		"-o", `jsonpath={range .status.conditions[?(@.type=="Ready")]}{.status} {.reason} {.message}{"\n"}{end}`)
	cmd.Stdout = &out
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	var once sync.Once
	end = func() (bad []string) {
		once.Do(func() {
			cancel()
			_ = cmd.Wait()
			lines := 0
			for line := range strings.Lines(out.String()) {
				if lines++; !strings.HasPrefix(line, "True ") && !starting.MatchString(strings.TrimSpace(line)) {
					bad = append(bad, strings.TrimSpace(line))
				}
			}
			if lines == 0 {
				bad = append(bad, "the watch has seen nothing")
			}
		})
		return bad
	}
	t.Cleanup(func() { end() })
	return end
}

// traffic calls the pods until the function that it returns is called, which tells of failures.
func (n *node) traffic(t *testing.T, addresses ...string) (end func() (calls int, failures []string)) {
	t.Helper()
	ctx, cancel := context.WithCancel(context.Background())
	var mu sync.Mutex
	var calls int
	var failures []string
	var owned sync.WaitGroup
	client := &http.Client{Timeout: 5 * time.Second, Transport: &http.Transport{DisableKeepAlives: true}}
	for _, a := range addresses {
		owned.Go(func() {
			tick := time.NewTicker(25 * time.Millisecond)
			defer tick.Stop()
			for {
				select {
				case <-tick.C:
				case <-ctx.Done():
					return
				}
				err := get(client, "http://"+net.JoinHostPort(a, "8080")+"/")
				mu.Lock()
				if calls++; err != nil {
					failures = append(failures, time.Now().Format(time.StampMilli)+" "+err.Error())
				}
				mu.Unlock()
			}
		})
	}
	var once sync.Once
	end = func() (int, []string) {
		once.Do(func() {
			cancel()
			owned.Wait()
		})
		return calls, failures
	}
	t.Cleanup(func() { end() })
	return end
}

func get(client *http.Client, url string) error {
	req, err := http.NewRequestWithContext(context.Background(), http.MethodGet, url, nil)
	if err != nil {
		return err
	}
	resp, err := client.Do(req)
	if err != nil {
		return err
	}
	defer resp.Body.Close()
	if _, err := io.Copy(io.Discard, resp.Body); err != nil {
		return err
	}
	if resp.StatusCode != http.StatusOK {
		return errors.New(resp.Status)
	}
	return nil
}
