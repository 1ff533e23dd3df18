// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package testbed

import (
	"bytes"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"testing"

	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"
)

// TestContainerdConfig has every way to say what containerd reads.
func TestContainerdConfig(t *testing.T) {
	const mirrors = `[plugins."io.containerd.grpc.v1.cri".registry.mirrors."docker.io"]` + "\n"
	for name, tt := range map[string]struct {
		o              Options
		begins, merged string // first lines of the file and of the one merged over it
		has            string // NODE is the node's directory
		hasNot         string
	}{
		"default": {Options{}, "version = 3", "", `config_path = "NODE/etc/certs.d"`, "grpc.v1.cri"},
		"merged over it": {Options{ContainerdExtra: "oom_score = 1"}, "version = 3", "version = 3",
			`imports = ["NODE/etc/containerd.d/*.toml"]`, "grpc.v1.cri"},
		"containerd 1.7": {
			Options{Containerd17: true, ContainerdExtra: "oom_score = 1"}, "version = 2", "version = 2",
			`config_path = "NODE/etc/certs.d"`, "cri.v1.images",
		},
		"mirrors in the file": {
			Options{ContainerdConfig: func(p ContainerdPaths) string {
				p.RegistryConfig = ""
				return ContainerdV2(p) + mirrors
			}}, "version = 2", "", mirrors, " config_path",
		},
		"two directories": {
			Options{ContainerdConfig: func(p ContainerdPaths) string {
				p.RegistryConfig += ":/etc/more"
				return ContainerdV3(p)
			}}, "version = 3", "", `config_path = "NODE/etc/certs.d:/etc/more"`, "grpc.v1.cri",
		},
		"no version": {
			Options{ContainerdConfig: func(ContainerdPaths) string { return "oom_score = 1\n" },
				ContainerdExtra: "oom_score = 2"},
			"oom_score = 1", "version = 1", "", "version",
		},
	} {
		t.Run(name, func(t *testing.T) {
			dir := t.TempDir()
			n := &Node{NodeDir: dir, RunDir: filepath.Join(dir, "r"),
				bed: &Bed{Bin: "/bin", Registry: "198.18.0.1:5000", options: tt.o}}
			if err := os.MkdirAll(n.etc("containerd.d"), 0o755); err != nil {
				t.Fatal(err)
			}
			if err := n.writeContainerd(); err != nil {
				t.Fatal(err)
			}
			raw, err := os.ReadFile(n.ContainerdConfigFile())
			if err != nil {
				t.Fatal(err)
			}
			got := string(raw)
			if !strings.HasPrefix(got, tt.begins+"\n") ||
				!strings.Contains(got, strings.ReplaceAll(tt.has, "NODE", dir)) || strings.Contains(got, tt.hasNot) ||
				strings.Contains(got, "${") {
				t.Errorf("got\n%s", got)
			}
			extra, err := os.ReadFile(filepath.Join(n.etc("containerd.d"), "extra.toml"))
			first, _, _ := strings.Cut(string(extra), "\n")
			if first != tt.merged || (err == nil) != (tt.merged != "") {
				t.Errorf("the merged file begins with %q, %v", first, err)
			}
		})
	}
}

// TestContainerdOptions has both containerds read a configuration of a test's own, with mirrors and
// what is merged over it.
func TestContainerdOptions(t *testing.T) {
	real(t)
	const proxy = "HTTPS_PROXY=http://198.18.255.1:3128"
	for _, older := range []bool{false, true} {
		t.Run(fmt.Sprintf("1.7 %v", older), func(t *testing.T) {
			b := startBed(t, Options{
				Direct: true, Containerd17: older, ContainerdEnv: []string{proxy},
				ContainerdConfig: func(p ContainerdPaths) string {
					p.RegistryConfig = ""
					return ContainerdV2(p) + fmt.Sprintf(`[plugins."io.containerd.grpc.v1.cri".registry.mirrors."mirrored.test"]
  endpoint = ["http://%s"]
[plugins."io.containerd.grpc.v1.cri".containerd]
  discard_unpacked_layers = true
`, p.Registry)
				},
				ContainerdExtra: "[debug]\n  level = \"debug\"\n",
			})
			environ, err := os.ReadFile(fmt.Sprintf("/proc/%d/environ", b.Pid("containerd")))
			if err != nil || !bytes.Contains(environ, []byte("\x00"+proxy+"\x00")) {
				t.Errorf("containerd's environment is %q, %v", environ, err)
			}
			if environ, err = os.ReadFile(fmt.Sprintf("/proc/%d/environ", b.Pid("registry"))); err != nil ||
				bytes.Contains(environ, []byte(proxy)) {
				t.Errorf("the registry's environment is %q, %v", environ, err)
			}
			dump, err := exec.CommandContext(t.Context(), filepath.Join(b.Bin, "containerd"),
				append(b.ContainerdCommand(), "config", "dump")...).CombinedOutput()
			if err != nil || !bytes.Contains(dump, []byte("discard_unpacked_layers = true")) ||
				!regexp.MustCompile(`level = .debug`).Match(dump) {
				t.Errorf("containerd has read %s, %v", dump, err)
			}
			conn, err := b.DialRuntime()
			if err != nil {
				t.Fatal(err)
			}
			defer conn.Close()
			version, err := runtimeapi.NewRuntimeServiceClient(conn).Version(t.Context(), &runtimeapi.VersionRequest{})
			if err != nil || strings.HasPrefix(strings.TrimPrefix(version.GetRuntimeVersion(), "v"), "1.7.") != older {
				t.Errorf("this is %v, %v", version, err)
			}
			image := &runtimeapi.ImageSpec{Image: "mirrored.test/busybox:1.0"}
			if _, err := runtimeapi.NewImageServiceClient(conn).
				PullImage(t.Context(), &runtimeapi.PullImageRequest{Image: image}); err != nil {
				t.Error(err)
			}
		})
	}
}
