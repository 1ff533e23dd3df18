// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package ops

import (
	"bytes"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"google.golang.org/protobuf/proto"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/cri-proxy/cri-proxy/interceptors"
)

const someToken = "0123456789abcdef0123456789abcdef"

// What a clone changes, and that it changes nothing else.
func TestCloneFor(t *testing.T) {
	full := func() *runtimeapi.CreateContainerRequest {
		req := &runtimeapi.CreateContainerRequest{
			PodSandboxId: "s",
			Config: &runtimeapi.ContainerConfig{
				Metadata: &runtimeapi.ContainerMetadata{Name: "app", Attempt: 3},
				Image:    &runtimeapi.ImageSpec{Image: "sha256:1", UserSpecifiedImage: "app:1"},
				Command:  []string{"a"}, Args: []string{"b"}, WorkingDir: "/",
				Envs:    []*runtimeapi.KeyValue{{Key: "BLOB", Value: []byte{0xff, 0, 'a'}}},
				Labels:  map[string]string{labelContainer: "app"},
				LogPath: "app/3.log",
				Annotations: map[string]string{
					annotationRestartCount: "3", annotationTerminationPath: "/dev/termination-log", "io.kubernetes.container.hash": "abc",
					interceptors.StagedAnnotation: "earlier",
				},
				Mounts: []*runtimeapi.Mount{{ContainerPath: "/data", HostPath: "/d"}, {ContainerPath: "/dev/termination-log", HostPath: "/pods/u/containers/app/0a0b0c0d"}},
				Linux:  &runtimeapi.LinuxContainerConfig{Resources: &runtimeapi.LinuxContainerResources{CpuShares: 1, CpusetCpus: "0"}, SecurityContext: &runtimeapi.LinuxContainerSecurityContext{RunAsUsername: "u"}},
			},
			SandboxConfig: &runtimeapi.PodSandboxConfig{Hostname: "h"},
		}
		req.ProtoReflect().SetUnknown([]byte{0x82, 0xfa, 0x01, 0x01, 'x'})
		req.Config.ProtoReflect().SetUnknown([]byte{0x82, 0xfa, 0x01, 0x01, 'y'})
		return req
	}
	cases := []struct {
		name    string
		edit    func(*runtimeapi.ContainerConfig) // of the recorded
		applied *runtimeapi.LinuxContainerResources
		want    func(*runtimeapi.ContainerConfig)
	}{
		{name: "as recorded"},
		{
			name: "resources applied since", applied: &runtimeapi.LinuxContainerResources{CpusetCpus: "2-3", MemoryLimitInBytes: 9},
			want: func(c *runtimeapi.ContainerConfig) {
				c.Linux.Resources = &runtimeapi.LinuxContainerResources{CpuShares: 1, CpusetCpus: "2-3", MemoryLimitInBytes: 9}
			},
		},
		{
			name: "no resources at first", applied: &runtimeapi.LinuxContainerResources{CpusetCpus: "2"},
			edit: func(c *runtimeapi.ContainerConfig) { c.Linux.Resources = nil },
			want: func(c *runtimeapi.ContainerConfig) {
				c.Linux.Resources = &runtimeapi.LinuxContainerResources{CpusetCpus: "2"}
			},
		},
		{
			name: "huge pages are replaced", applied: &runtimeapi.LinuxContainerResources{HugepageLimits: []*runtimeapi.HugepageLimit{{PageSize: "2MB", Limit: 2}}},
			edit: func(c *runtimeapi.ContainerConfig) {
				c.Linux.Resources.HugepageLimits = []*runtimeapi.HugepageLimit{{PageSize: "2MB", Limit: 1}}
			},
			want: func(c *runtimeapi.ContainerConfig) {
				c.Linux.Resources.HugepageLimits = []*runtimeapi.HugepageLimit{{PageSize: "2MB", Limit: 2}}
			},
		},
		{name: "no Linux part", applied: &runtimeapi.LinuxContainerResources{CpusetCpus: "2"}, edit: func(c *runtimeapi.ContainerConfig) { c.Linux = nil }},
		{name: "no termination file", edit: func(c *runtimeapi.ContainerConfig) { c.Mounts = c.Mounts[:1] }},
	}
	for _, tc := range cases {
		t.Run(tc.name, func(t *testing.T) {
			req := full()
			if tc.edit != nil {
				tc.edit(req.Config)
			}
			recorded := clone(req)
			got, err := cloneFor(req, tc.applied, 4, someToken)
			if err != nil {
				t.Fatal(err)
			}
			if !proto.Equal(req, recorded) {
				t.Error("the recorded request was changed")
			}
			want := recorded
			want.Config.Metadata.Attempt = 4
			want.Config.LogPath = "app/4.log"
			want.Config.Annotations[annotationRestartCount] = "4"
			want.Config.Annotations[interceptors.StagedAnnotation] = someToken
			if m := terminationMount(want.Config); m != nil {
				m.HostPath = "/pods/u/containers/app/01234567"
			}
			if tc.want != nil {
				tc.want(want.Config)
			}
			if !proto.Equal(got, want) {
				t.Errorf("got  %v\nwant %v", got, want)
			}
		})
	}
	for name, req := range map[string]*runtimeapi.CreateContainerRequest{
		"empty": {}, "no metadata": {Config: &runtimeapi.ContainerConfig{}},
	} {
		if _, err := cloneFor(req, nil, 1, someToken); err == nil {
			t.Errorf("%s: no error", name)
		}
	}
	bare, err := cloneFor(&runtimeapi.CreateContainerRequest{Config: &runtimeapi.ContainerConfig{Metadata: &runtimeapi.ContainerMetadata{}}}, nil, 1, someToken)
	if err != nil || bare.GetConfig().GetAnnotations()[interceptors.StagedAnnotation] != someToken {
		t.Errorf("got %v, %v", bare, err)
	}
}

func TestTerminationFile(t *testing.T) {
	dir := t.TempDir()
	config := func(path string) *runtimeapi.ContainerConfig {
		return &runtimeapi.ContainerConfig{
			Annotations: map[string]string{annotationTerminationPath: "/t"},
			Mounts:      []*runtimeapi.Mount{{ContainerPath: "/t", HostPath: path}},
		}
	}
	path := filepath.Join(dir, "f")
	if err := os.WriteFile(path, []byte("old"), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := makeTerminationFile(config(path)); err != nil {
		t.Fatal(err)
	}
	st, err := os.Stat(path)
	if err != nil || st.Mode().Perm() != 0o666 || st.Size() != 0 {
		t.Errorf("got %v, %v; want an empty file of mode 0666", st, err)
	}
	if err := makeTerminationFile(config(filepath.Join(dir, "no", "f"))); err == nil || !strings.Contains(err.Error(), "termination message file") {
		t.Errorf("got %v", err)
	}
	if err := makeTerminationFile(&runtimeapi.ContainerConfig{}); err != nil {
		t.Error(err)
	}
}

// What the runtime gets for the successor, from kubelet's own bytes and from the runtime's record.
func TestSuccessorIsAClone(t *testing.T) {
	for _, older := range []bool{false, true} {
		t.Run(map[bool]string{false: "recorded", true: "older than the proxy"}[older], func(t *testing.T) {
			n := newNode(t, podOptions{hidden: older})
			n.run()
			id := n.rt.idOf(t, "app/0")
			if _, err := n.kubelet.UpdateContainerResources(t.Context(), &runtimeapi.UpdateContainerResourcesRequest{ContainerId: id, Linux: &runtimeapi.LinuxContainerResources{CpusetCpus: "1"}}); err != nil {
				t.Fatal(err)
			}
			if err := os.Mkdir(filepath.Join(n.dir, "links"), 0o700); err != nil {
				t.Fatal(err)
			}
			n.restart("op")
			if op := n.finish("op"); verdict(op) != "SUCCEEDED, app SUCCEEDED" {
				t.Fatalf("operation ended %v", op)
			}
			c := n.rt.get(t, "app/1")
			want := n.containerConfig("app", 1)
			token := c.config.GetAnnotations()[interceptors.StagedAnnotation]
			if len(token) != 32 {
				t.Errorf("token is %q", token)
			}
			want.Annotations[interceptors.StagedAnnotation] = token
			want.Mounts[0].HostPath = filepath.Join(n.dir, token[:8])
			want.Linux.Resources.CpusetCpus = "1"
			if older {
				want.Envs = nil
			} else if !bytes.Equal(c.config.GetEnvs()[0].GetValue(), []byte{0xff, 0xfe, 'a'}) {
				t.Errorf("environment is %q, want kubelet's bytes", c.config.GetEnvs())
			}
			if !proto.Equal(c.config, want) {
				t.Errorf("got  %v\nwant %v", c.config, want)
			}
			if st, err := os.Stat(want.Mounts[0].HostPath); err != nil || st.Mode().Perm() != 0o666 {
				t.Errorf("termination file: %v, %v", st, err)
			}
			link := filepath.Join(n.dir, "links", "shop_default_app-"+c.status.GetId()+".log")
			if to, err := os.Readlink(link); err != nil || to != "/var/log/pods/shop/app/1.log" {
				t.Errorf("log symlink leads to %q, %v", to, err)
			}
			// The successor can be restarted in its turn, from what was recorded of it.
			n.restart("again")
			if op := n.finish("again"); verdict(op) != "SUCCEEDED, app SUCCEEDED" {
				t.Fatalf("operation ended %v", op)
			}
			if got := n.rt.get(t, "app/2").config; got.GetLogPath() != "app/2.log" || got.GetAnnotations()[annotationRestartCount] != "2" || got.GetLinux().GetResources().GetCpusetCpus() != "1" {
				t.Errorf("the next one is %v", got)
			}
		})
	}
}

// Without a record, what JSON cannot tell must not be guessed.
func TestOlderContainerThatCannotBeCloned(t *testing.T) {
	for name, tc := range map[string]struct {
		edit func(*fakeContainer)
		want string
	}{
		"not UTF-8": {func(c *fakeContainer) { c.config.Envs = []*runtimeapi.KeyValue{{Key: "BLOB", Value: []byte{0xff}}} }, "BLOB is not UTF-8"},
		"no config": {func(c *fakeContainer) { c.config = nil }, "does not tell its config"},
	} {
		t.Run(name, func(t *testing.T) {
			n := newNode(t, podOptions{hidden: true})
			n.run()
			c := n.rt.get(t, "app/0")
			n.rt.set(func(*fakeRuntime) { tc.edit(c) })
			n.restart("op")
			op := n.finish("op")
			if got, want := verdict(op), "FAILED, app FAILED CreateFailed"; got != want || !strings.Contains(op.GetMessage(), tc.want) {
				t.Errorf("operation ended %s: %s", got, op.GetMessage())
			}
			if got, want := n.rt.state(), "app/0 RUNNING, web/0 RUNNING"; got != want {
				t.Errorf("runtime has %s", got)
			}
		})
	}
}

func TestLogLinkName(t *testing.T) {
	id := strings.Repeat("0", 64)
	if got, want := logLinkName("p", "n", "c", id), "p_n_c-"+id+".log"; got != want {
		t.Errorf("got %s", got)
	}
	if got := logLinkName(strings.Repeat("p", 253), "n", "c", id); len(got) != 255 || !strings.HasSuffix(got, "p.log") {
		t.Errorf("a long name becomes %q of %d", got, len(got))
	}
}

func TestBareID(t *testing.T) {
	for in, want := range map[string]string{"": "", "a": "a", "containerd://a": "a", "://": ""} {
		if got := bareID(in); got != want {
			t.Errorf("bareID(%q) = %q, want %q", in, got, want)
		}
	}
}
