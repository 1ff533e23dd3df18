// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package nspawn

import (
	"maps"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"
)

// Where kubelet is told what to dial. The node begins as kubeadm's, with the flag in a file of the
// unit's environment; the installs that follow one of these steps find it elsewhere.

const (
	kubeletUnitDir = "/etc/systemd/system/kubelet.service.d/"
	kubeletConfDir = "/etc/kubernetes/kubelet.conf.d/"
)

// endpointInFile is a kubelet that has it in its --config.
func endpointInFile(t *testing.T, n *node) {
	config, line := filepath.Join(n.NodeDir, "etc", "kubelet.yaml"),
		"containerRuntimeEndpoint: unix://"+n.RuntimeSocket+"\n"
	text := n.files(t)[config]
	if !strings.Contains(text, line) {
		t.Fatal(text)
	}
	n.kubeletWith(t, map[string]string{
		kubeadmFlags: `KUBELET_KUBEADM_ARGS="--register-with-taints="` + "\n",
		config: strings.Replace(text, line,
			"# containerd\ncontainerRuntimeEndpoint: \"unix://"+n.RuntimeSocket+"\" # of ours\n", 1),
	}, config)
}

// endpointInDirectory has a --config-dir, too, with somebody's file in it.
func endpointInDirectory(t *testing.T, n *node) {
	n.kubeletWith(t, map[string]string{
		kubeadmFlags: `KUBELET_KUBEADM_ARGS="--register-with-taints= --config-dir=` + kubeletConfDir + `"` + "\n",
		kubeletConfDir + "10-site.conf": "apiVersion: kubelet.config.k8s.io/v1beta1\nkind: " +
			"KubeletConfiguration\nmaxPods: 499\n" +
			"containerRuntimeEndpoint: unix://" + n.RuntimeSocket + "\n",
	}, kubeletConfDir+"99-cri-proxy.conf")
}

// endpointInUnit has flags in a drop-in of its unit: one in a variable, one on a command line of
// several lines.
func endpointInUnit(t *testing.T, n *node) {
	start := strings.Fields(n.must(t, "sed", "-n", "s/^ExecStart=//p", "/etc/systemd/system/kubelet.service"))
	n.kubeletWith(t, map[string]string{
		kubeadmFlags: `KUBELET_KUBEADM_ARGS="--register-with-taints="` + "\n",
		kubeletUnitDir +
			"10-kubeadm.conf": "[Service]\nEnvironment=\"KUBELET_RUNTIME_ARGS=--container-runtime-endpoint=unix://" +
			n.RuntimeSocket + "\"\n" +
			"ExecStart=\nExecStart=" + start[0] + " --image-service-endpoint unix://" + n.RuntimeSocket + " \\\n  " +
			strings.Join(start[1:], " ") + " \\\n  $KUBELET_RUNTIME_ARGS\n",
	}, kubeletUnitDir+"zz-cri-proxy.conf")
}

// kubeletWith restarts kubelet with these files, which dials the runtime as before.
func (n *node) kubeletWith(t *testing.T, files map[string]string, endpoint ...string) {
	t.Helper()
	for path, text := range files {
		if !strings.HasPrefix(path, n.NodeDir) {
			path = n.root + path
		}
		if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(path, []byte(text), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	n.endpoint = endpoint
	n.must(t, "systemctl", "stop", "kubelet.service")
	n.must(t, "systemctl", "daemon-reload")
	n.must(t, "systemctl", "start", "kubelet.service")
	client := &http.Client{Timeout: time.Second, Transport: &http.Transport{DisableKeepAlives: true}}
	await(t, "kubelet", func() bool { return get(client, "http://"+n.KubeletHealthz()+"/healthz") == nil })
}

// pointed checks which of kubelet's files an install has changed, and that they name cri-proxy and
// the runtime no more.
func (n *node) pointed(t *testing.T, before map[string]string) {
	t.Helper()
	after := n.files(t)
	paths := maps.Clone(before)
	maps.Copy(paths, after)
	var changed []string
	for path := range paths {
		for _, dir := range []string{kubeletConfDir, kubeletUnitDir, filepath.Dir(kubeadmFlags), n.NodeDir,
			strings.TrimSuffix(kubeletUnitDir, ".d/")} {
			if strings.HasPrefix(path, dir) && before[path] != after[path] {
				changed = append(changed, path)
				break
			}
		}
	}
	if slices.Sort(changed); !slices.Equal(changed, n.endpoint) {
		t.Fatalf("changed were %q, not %q", changed, n.endpoint)
	}
	for _, path := range changed {
		if text := after[path]; !strings.Contains(text, "unix:///run/cri-proxy/kubelet.sock") ||
			strings.Contains(text, n.RuntimeSocket) {
			t.Errorf("%s:\n%s", path, text)
		}
	}
}
