// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package ops

import (
	"bytes"
	"errors"
	"io/fs"
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
				Labels:  map[string]string{labelContainer: "app", labelPodUID: "u"},
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
	root := t.TempDir()
	dir := filepath.Join(root, "pods", "u", "containers", "app")
	if err := os.MkdirAll(dir, 0o750); err != nil {
		t.Fatal(err)
	}
	config := func(paths ...string) *runtimeapi.ContainerConfig {
		c := &runtimeapi.ContainerConfig{
			Labels:      map[string]string{labelPodUID: "u", labelContainer: "app"},
			Annotations: map[string]string{annotationTerminationPath: "t"}, // kubelet makes it absolute
		}
		for _, path := range paths {
			c.Mounts = append(c.Mounts, &runtimeapi.Mount{ContainerPath: "/t", HostPath: path})
		}
		return c
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
	other := filepath.Join(root, "other")
	if err := errors.Join(os.Symlink(other, filepath.Join(dir, "link")), os.Symlink(dir, filepath.Join(root, "pods", "u", "containers", "web"))); err != nil {
		t.Fatal(err)
	}
	web := config(filepath.Join(root, "pods", "u", "containers", "web", "g"))
	web.Labels[labelContainer] = "web"
	for name, c := range map[string]*runtimeapi.ContainerConfig{
		"no such directory":    config(filepath.Join(root, "no", "pods", "u", "containers", "app", "f")),
		"the file is a link":   config(filepath.Join(dir, "link")),
		"the directory is one": web,
	} {
		if err := makeTerminationFile(c); err == nil || !strings.Contains(err.Error(), "termination message file") {
			t.Errorf("%s: got %v", name, err)
		}
	}
	// A volume that is mounted at the same place: the file of the pod's is left alone, and so is the volume.
	volume := filepath.Join(root, "pods", "u", "volumes", "kubernetes.io~empty-dir", "v")
	for name, c := range map[string]*runtimeapi.ContainerConfig{
		"a volume":                          config(volume),
		"another container's directory":     config(filepath.Join(root, "pods", "u", "containers", "db", "f")),
		"another pod's directory":           config(filepath.Join(root, "pods", "v", "containers", "app", "f")),
		"a directory below the container's": config(filepath.Join(dir, "sub", "f")),
		"no mount":                          config(),
		"nothing":                           {},
	} {
		if m := terminationMount(c); m != nil {
			t.Errorf("%s: taken for kubelet's: %v", name, m)
		}
		if err := makeTerminationFile(c); err != nil {
			t.Errorf("%s: %v", name, err)
		}
	}
	both := config(volume, path) // kubelet's comes last
	if got := terminationMount(both); got != both.Mounts[1] {
		t.Errorf("of two mounts %v is taken", got)
	}
	next, err := cloneFor(&runtimeapi.CreateContainerRequest{Config: withMetadata(both)}, nil, 1, someToken)
	if err != nil || next.Config.Mounts[0].HostPath != volume || next.Config.Mounts[1].HostPath != filepath.Join(dir, someToken[:8]) {
		t.Errorf("the clone mounts %v, %v", next.GetConfig().GetMounts(), err)
	}
	for _, left := range []string{other, filepath.Dir(volume)} {
		if _, err := os.Lstat(left); !errors.Is(err, fs.ErrNotExist) {
			t.Errorf("%s has come about: %v", left, err)
		}
	}
}

func withMetadata(c *runtimeapi.ContainerConfig) *runtimeapi.ContainerConfig {
	c.Metadata = &runtimeapi.ContainerMetadata{Name: "app"}
	return c
}

// What the runtime reports of a container's resources, as containerd does.
func TestReported(t *testing.T) {
	if got := reported(&runtimeapi.ContainerStatus{}, nil); got != nil {
		t.Errorf("of nothing: %v", got)
	}
	hugepages := func(of ...string) (list []*runtimeapi.HugepageLimit) {
		for i, size := range of {
			list = append(list, &runtimeapi.HugepageLimit{PageSize: size, Limit: uint64(i)})
		}
		return list
	}
	for name, tc := range map[string]struct {
		base, tells, want *runtimeapi.LinuxContainerResources
	}{
		"swap by default": {
			tells: &runtimeapi.LinuxContainerResources{MemoryLimitInBytes: 9, MemorySwapLimitInBytes: 9},
			want:  &runtimeapi.LinuxContainerResources{MemoryLimitInBytes: 9},
		},
		"swap that was asked for": {
			base:  &runtimeapi.LinuxContainerResources{MemorySwapLimitInBytes: 7},
			tells: &runtimeapi.LinuxContainerResources{MemoryLimitInBytes: 9, MemorySwapLimitInBytes: 9},
			want:  &runtimeapi.LinuxContainerResources{MemoryLimitInBytes: 9, MemorySwapLimitInBytes: 9},
		},
		"swap of its own": {
			tells: &runtimeapi.LinuxContainerResources{MemoryLimitInBytes: 9, MemorySwapLimitInBytes: 10},
			want:  &runtimeapi.LinuxContainerResources{MemoryLimitInBytes: 9, MemorySwapLimitInBytes: 10},
		},
		"an OOM score that was bounded": {
			tells: &runtimeapi.LinuxContainerResources{OomScoreAdj: -500, CpusetCpus: "1"}, want: &runtimeapi.LinuxContainerResources{CpusetCpus: "1"},
		},
		"huge pages of several updates": {
			tells: &runtimeapi.LinuxContainerResources{HugepageLimits: hugepages("2MB", "1GB", "2MB")},
			want:  &runtimeapi.LinuxContainerResources{HugepageLimits: hugepages("2MB", "1GB", "2MB")[1:]},
		},
	} {
		t.Run(name, func(t *testing.T) {
			st := &runtimeapi.ContainerStatus{Resources: &runtimeapi.ContainerResources{Linux: tc.tells}}
			if got := reported(st, tc.base); !proto.Equal(got, tc.want) {
				t.Errorf("got %v, want %v", got, tc.want)
			}
		})
	}
}

// What kubelet changed while the proxy was not in its path is known to the runtime only.
func TestResourcesChangedPastTheProxy(t *testing.T) {
	n := newNode(t, podOptions{})
	n.run()
	id := n.rt.idOf(t, "app/0")
	update := func(by runtimeapi.RuntimeServiceServer, cpus string, shares int64) {
		t.Helper()
		_, err := by.UpdateContainerResources(t.Context(), &runtimeapi.UpdateContainerResourcesRequest{
			ContainerId: id, Linux: &runtimeapi.LinuxContainerResources{CpusetCpus: cpus, CpuShares: shares},
		})
		n.must(err)
	}
	_, err := n.kubelet.UpdateContainerResources(t.Context(), &runtimeapi.UpdateContainerResourcesRequest{
		ContainerId: id, Linux: &runtimeapi.LinuxContainerResources{CpusetCpus: "1", CpuPeriod: 9},
	})
	n.must(err)
	update(n.rt, "2-3", 200)
	n.rt.set(func(f *fakeRuntime) { f.containers[id].status.Resources.Linux.CpuPeriod = 0 }) // not reported
	n.restart("op")
	if op := n.finish("op"); verdict(op) != "SUCCEEDED, app SUCCEEDED" {
		t.Fatalf("operation ended %v", op)
	}
	want := &runtimeapi.LinuxContainerResources{CpuShares: 200, CpusetCpus: "2-3", CpuPeriod: 9}
	if got := n.rt.get(t, "app/1").config.GetLinux().GetResources(); !proto.Equal(got, want) {
		t.Errorf("got %v, want %v", got, want)
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
			want.Mounts[0].HostPath = filepath.Join(n.terminationDir("app"), token[:8])
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
		"a field of a later CRI": {func(c *fakeContainer) {
			c.told = `{"config":{"metadata":{"name":"app"},"linux":{"Resources":{"cpu_shares":1,"cpu_burst":7}},"mounts":[{"container_path":"/a","gone":null},{"Idmap":{"a":1}}]}}`
		}, "tells of config.linux.Resources.cpu_burst, config.mounts[1].Idmap, which this version"},
		"a field of another type": {func(c *fakeContainer) { c.told = `{"config":{"metadata":7}}` }, "cannot be read"},
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
