// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package kubelet_test

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/cri-proxy/cri-proxy/systemd/node/kubelet"
)

const (
	containerd = "unix:///run/containerd/containerd.sock"
	ours       = "unix:///run/cri-proxy/kubelet.sock"
	dropInHead = "# Written by cri-proxy install; cri-proxy uninstall takes it away.\n"
)

// tree writes files into a directory and returns it. DIR in them is that directory.
func tree(t *testing.T, files map[string]string) string {
	t.Helper()
	dir := t.TempDir()
	for name, content := range files {
		path := filepath.Join(dir, name)
		if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(path, []byte(strings.ReplaceAll(content, "DIR", dir)), 0o640); err != nil {
			t.Fatal(err)
		}
	}
	return dir
}

func TestPoint(t *testing.T) {
	const head = "apiVersion: kubelet.config.k8s.io/v1beta1\nkind: KubeletConfiguration\n"
	for _, c := range []struct {
		name  string
		args  string
		files map[string]string
		env   []string // of the files, those that hold variables of the unit
		units []string // and those of the unit
		want  map[string]string
	}{
		{
			name: "flag in kubeadm's file, and what kubeadm puts back",
			args: "--config=DIR/config.yaml --root-dir DIR --container-runtime-endpoint=" + containerd,
			files: map[string]string{
				"kubeadm-flags.env": "KUBELET_KUBEADM_ARGS=\"--container-runtime-endpoint=" + containerd +
					" --pod-infra-container-image=pause:3.10\"\n",
				"config.yaml":          head + "containerRuntimeEndpoint: \"\"\n",
				"instance-config.yaml": "containerRuntimeEndpoint: \"" + containerd + "\"\n",
			},
			env: []string{"kubeadm-flags.env", "is-not-there.env"},
			want: map[string]string{
				"kubeadm-flags.env": "KUBELET_KUBEADM_ARGS=\"--container-runtime-endpoint=" + ours +
					" --pod-infra-container-image=pause:3.10\"\n",
				"instance-config.yaml": "containerRuntimeEndpoint: \"" + ours + "\"\n",
			},
		},
		{
			name: "flag in the unit, with the images' endpoint",
			args: "--container-runtime-endpoint " + containerd + " --image-service-endpoint=" + containerd,
			files: map[string]string{
				"unit": "[Service]\nExecStart=/bin/false\nExecStart=\nExecStart=/usr/bin/kubelet \\\n  " +
					"--container-runtime-endpoint " + containerd + " \\\n" +
					"  --image-service-endpoint=" + containerd + "\n"},
			units: []string{"unit"},
			want: map[string]string{"unit.d/zz-cri-proxy.conf": dropInHead +
				"[Service]\nExecStart=\nExecStart=/usr/bin/kubelet    --container-runtime-endpoint " + ours +
				"    --image-service-endpoint=" + containerd +
				"\nExecStart=\nExecStart=/usr/bin/kubelet    --container-runtime-endpoint " + ours +
				"    --image-service-endpoint=" + ours + "\n"},
		},
		{
			name: "flag in a variable of the unit",
			args: "--container-runtime-endpoint=" + containerd,
			files: map[string]string{
				"unit": "[Service]\nExecStart=/usr/bin/kubelet $ARGS\n",
				"unit.d/10-x": "[Service]\nEnvironment=\"ARGS=--v=2 --container-runtime-endpoint=" + containerd +
					"\"\n",
			},
			units: []string{"unit", "unit.d/10-x"},
			want: map[string]string{"unit.d/zz-cri-proxy.conf": dropInHead +
				"[Service]\nEnvironment=\"ARGS=--v=2 --container-runtime-endpoint=" + ours + "\"\n"},
		},
		{
			name: "drop-in directory",
			args: "--config DIR/config.yaml --config-dir=DIR/conf.d",
			files: map[string]string{"config.yaml": head, "conf.d/10-a.conf": head + "containerRuntimeEndpoint: " +
				containerd + "\nimageServiceEndpoint: unix:///var/run/containerd/containerd.sock\n"},
			want: map[string]string{"conf.d/99-cri-proxy.conf": dropInHead + head + "containerRuntimeEndpoint: " +
				ours + "\nimageServiceEndpoint: " + ours + "\n"},
		},
		{
			name:  "drop-in directory, a late one",
			args:  "--config-dir=DIR/conf.d",
			files: map[string]string{"conf.d/99-local.conf": head + "containerRuntimeEndpoint: " + containerd + "\n"},
			want: map[string]string{"conf.d/zz-cri-proxy.conf": dropInHead + head + "containerRuntimeEndpoint: " +
				ours + "\n"},
		},
		{
			name:  "drop-in directory, the last one",
			args:  "--config-dir=DIR/conf.d",
			files: map[string]string{"conf.d/zzz.conf": head + "containerRuntimeEndpoint: " + containerd + "\n"},
			want:  map[string]string{"conf.d/zzz.conf": head + "containerRuntimeEndpoint: " + ours + "\n"},
		},
		{
			name: "configuration file",
			args: "--config=DIR/config.yaml",
			files: map[string]string{"config.yaml": head + "# the runtime\ncontainerRuntimeEndpoint: " + containerd +
				" # here\n\nmaxPods: 7\n"},
			want: map[string]string{"config.yaml": head + "# the runtime\ncontainerRuntimeEndpoint: " + ours +
				" # here\n\nmaxPods: 7\n"},
		},
		{
			name:  "configuration file in JSON, without the field",
			args:  "--config=DIR/config.json",
			files: map[string]string{"config.json": "{\n  \"kind\": \"KubeletConfiguration\"\n}\n"},
			want: map[string]string{"config.json": "{\n  \"containerRuntimeEndpoint\": \"" + ours +
				"\",\n  \"kind\": \"KubeletConfiguration\"\n}\n"},
		},
		{
			name:  "nothing but flags",
			args:  "--v=2",
			files: map[string]string{"unit": "[Unit]\nX=1\n[Service]\nExecStart=/usr/bin/kubelet --v=2\n"},
			units: []string{"unit"},
			want: map[string]string{"unit.d/zz-cri-proxy.conf": dropInHead +
				"[Service]\nExecStart=\nExecStart=/usr/bin/kubelet --v=2 --container-runtime-endpoint=" + ours + "\n"},
		},
		{
			name:  "another registry of images stays",
			args:  "--config=DIR/config.yaml",
			files: map[string]string{"config.yaml": "imageServiceEndpoint: unix:///run/other.sock\n"},
			want: map[string]string{
				"config.yaml": "imageServiceEndpoint: unix:///run/other.sock\ncontainerRuntimeEndpoint: " + ours +
					"\n"},
		},
		{
			name: "as it should be",
			args: "--config=DIR/config.yaml",
			files: map[string]string{"config.yaml": "containerRuntimeEndpoint: " + strings.TrimPrefix(ours, "unix://") +
				"\n"},
			want: map[string]string{},
		},
	} {
		t.Run(c.name, func(t *testing.T) {
			dir := tree(t, c.files)
			k := &kubelet.Kubelet{Unit: "unit", Args: strings.Fields(strings.ReplaceAll(c.args, "DIR", dir)),
				UnitDir: filepath.Join(dir, "unit.d")}
			for _, f := range c.env {
				k.EnvFiles = append(k.EnvFiles, filepath.Join(dir, f))
			}
			for _, f := range c.units {
				k.UnitFiles = append(k.UnitFiles, filepath.Join(dir, f))
			}
			edits, err := k.Point(ours)
			if err != nil {
				t.Fatal(err)
			}
			got := map[string]string{}
			for _, e := range edits {
				name, err := filepath.Rel(dir, e.Path)
				if err != nil {
					t.Fatal(err)
				}
				got[name] = string(e.After)
				if before, ok := c.files[name]; ok != (e.Before != nil) ||
					ok && (string(e.Before) != before || e.Mode != 0o640) {
					t.Errorf("%s: before %q, mode %o", name, e.Before, e.Mode)
				}
			}
			for name, want := range c.want {
				if got[name] != want {
					t.Errorf("%s is\n%s\nwant\n%s", name, got[name], want)
				}
				delete(got, name)
			}
			for name, after := range got {
				t.Errorf("%s is not to be touched:\n%s", name, after)
			}
		})
	}
}

func TestPointNowhere(t *testing.T) {
	dir := tree(t, map[string]string{"unit": "[Service]\nExecStart=/opt/start-kubelet.sh\n"})
	k := &kubelet.Kubelet{Unit: "unit", Args: []string{"--container-runtime-endpoint=" + containerd},
		UnitFiles: []string{filepath.Join(dir, "unit")}, UnitDir: filepath.Join(dir, "unit.d")}
	if edits, err := k.Point(ours); err == nil || !strings.Contains(err.Error(), "set it to "+ours) {
		t.Errorf("%v, %v", edits, err)
	}
	k.Args = []string{"--config", filepath.Join(dir, "gone.yaml")}
	if _, err := k.Point(ours); err == nil {
		t.Error("a configuration that is not there is no error")
	}
}

func TestDials(t *testing.T) {
	dir := tree(t,
		map[string]string{
			"config.yaml": "containerRuntimeEndpoint: unix:///run/cri-proxy/cri.sock\nimageServiceEndpoint: " +
				"unix:///run/containerd/containerd.sock\nhealthzPort: 1\n"})
	for _, c := range []struct {
		name, args, socket string
		containers, images bool
	}{
		{"default", "", "/run/containerd/containerd.sock", true, true},
		{"default, through /var", "", "/var/run/containerd/containerd.sock", true, true},
		{"file", "--config DIR/config.yaml", "/run/cri-proxy/cri.sock", true, false},
		{"file, images", "--config DIR/config.yaml", "/run/containerd/containerd.sock", false, true},
		{"flag over file", "--config DIR/config.yaml --container-runtime-endpoint=/run/x.sock", "/run/x.sock",
			true, false},
		{"the last flag", "--container-runtime-endpoint=/run/a.sock --container-runtime-endpoint /run/x.sock",
			"/run/x.sock", true, true},
	} {
		t.Run(c.name, func(t *testing.T) {
			k := &kubelet.Kubelet{Args: strings.Fields(strings.ReplaceAll(c.args, "DIR", dir))}
			containers, images, err := k.Dials(c.socket)
			if err != nil || containers != c.containers || images != c.images {
				t.Errorf("%v, %v, %v", containers, images, err)
			}
		})
	}
	k := &kubelet.Kubelet{Args: []string{"--config=config.yaml", "--healthz-bind-address=0.0.0.0"}, Dir: dir}
	if got := k.HealthzAddress(); got != "127.0.0.1:1" {
		t.Error(got)
	}
}

// Drop-ins go to the unit's directory, however the unit is named.
func TestFindUnit(t *testing.T) {
	dir := t.TempDir()
	program, err := exec.LookPath("sleep")
	if err != nil {
		t.Fatal(err)
	}
	cmd := exec.CommandContext(t.Context(), program)
	cmd.Args = []string{"kubelet", "60"}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	defer func() { _, _ = cmd.Process.Kill(), cmd.Wait() }()
	// The kernel tells of the new program a moment before it tells its arguments.
	for late := time.Now().Add(2 * time.Minute); ; time.Sleep(time.Millisecond) {
		if b, _ := os.ReadFile(fmt.Sprintf("/proc/%d/cmdline", cmd.Process.Pid)); strings.HasPrefix(string(b),
			"kubelet\x00") {
			break
		}
		if time.Now().After(late) {
			t.Fatal("no process named kubelet")
		}
	}
	script := fmt.Sprintf("#!/bin/sh\necho MainPID=%d\n", cmd.Process.Pid)
	if err := os.WriteFile(filepath.Join(dir, "systemctl"), []byte(script), 0o700); err != nil {
		t.Fatal(err)
	}
	t.Setenv("PATH", dir+":"+os.Getenv("PATH"))
	for _, name := range []string{"kubelet", kubelet.DefaultUnit} {
		k, err := kubelet.Find(t.Context(), name)
		if err != nil {
			t.Fatal(err)
		}
		if k.Unit != kubelet.DefaultUnit || k.UnitDir != "/etc/systemd/system/kubelet.service.d" {
			t.Errorf("%s: %s in %s", name, k.Unit, k.UnitDir)
		}
	}
}
