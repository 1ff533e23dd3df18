// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package criclone_test

import (
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"google.golang.org/protobuf/proto"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/cri-proxy/cri-proxy/interceptors/view"
	"github.com/cri-proxy/cri-proxy/ops/criclone"
)

const someToken = "0123456789abcdef0123456789abcdef"

func clone(req *runtimeapi.CreateContainerRequest) *runtimeapi.CreateContainerRequest {
	return proto.Clone(req).(*runtimeapi.CreateContainerRequest)
}

// What a clone changes, and that it changes nothing else.
func TestClone(t *testing.T) {
	full := func() *runtimeapi.CreateContainerRequest {
		req := &runtimeapi.CreateContainerRequest{
			PodSandboxId: "s",
			Config: &runtimeapi.ContainerConfig{
				Metadata: &runtimeapi.ContainerMetadata{Name: "app", Attempt: 3},
				Image:    &runtimeapi.ImageSpec{Image: "sha256:1", UserSpecifiedImage: "app:1"},
				Command:  []string{"a"}, Args: []string{"b"}, WorkingDir: "/",
				Envs:    []*runtimeapi.KeyValue{{Key: "BLOB", Value: []byte{0xff, 0, 'a'}}},
				Labels:  map[string]string{criclone.LabelContainer: "app", criclone.LabelPodUID: "u"},
				LogPath: "app/3.log",
				Annotations: map[string]string{
					criclone.AnnotationRestartCount:    "3",
					criclone.AnnotationTerminationPath: "/dev/termination-log",
					criclone.AnnotationHash:            "abc",
					view.StagedAnnotation:              "earlier",
				},
				Mounts: []*runtimeapi.Mount{
					{ContainerPath: "/data", HostPath: "/d"},
					{ContainerPath: "/dev/termination-log", HostPath: "/pods/u/containers/app/0a0b0c0d"},
				},
				Linux: &runtimeapi.LinuxContainerConfig{
					Resources:       &runtimeapi.LinuxContainerResources{CpuShares: 1, CpusetCpus: "0"},
					SecurityContext: &runtimeapi.LinuxContainerSecurityContext{RunAsUsername: "u"},
				},
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
			name:    "resources applied since",
			applied: &runtimeapi.LinuxContainerResources{CpusetCpus: "2-3", MemoryLimitInBytes: 9},
			want: func(c *runtimeapi.ContainerConfig) {
				c.Linux.Resources = &runtimeapi.LinuxContainerResources{CpuShares: 1, CpusetCpus: "2-3",
					MemoryLimitInBytes: 9}
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
			name: "huge pages are replaced",
			applied: &runtimeapi.LinuxContainerResources{
				HugepageLimits: []*runtimeapi.HugepageLimit{{PageSize: "2MB", Limit: 2}},
			},
			edit: func(c *runtimeapi.ContainerConfig) {
				c.Linux.Resources.HugepageLimits = []*runtimeapi.HugepageLimit{{PageSize: "2MB", Limit: 1}}
			},
			want: func(c *runtimeapi.ContainerConfig) {
				c.Linux.Resources.HugepageLimits = []*runtimeapi.HugepageLimit{{PageSize: "2MB", Limit: 2}}
			},
		},
		{
			name: "no Linux part", applied: &runtimeapi.LinuxContainerResources{CpusetCpus: "2"},
			edit: func(c *runtimeapi.ContainerConfig) { c.Linux = nil },
		},
		{name: "no termination file", edit: func(c *runtimeapi.ContainerConfig) { c.Mounts = c.Mounts[:1] }},
	}
	for _, tc := range cases {
		t.Run(tc.name, func(t *testing.T) {
			req := full()
			if tc.edit != nil {
				tc.edit(req.Config)
			}
			recorded := clone(req)
			got, err := criclone.Clone(req, tc.applied, 4, someToken)
			if err != nil {
				t.Fatal(err)
			}
			if !proto.Equal(req, recorded) {
				t.Error("the recorded request was changed")
			}
			want := recorded
			want.Config.Metadata.Attempt = 4
			want.Config.LogPath = "app/4.log"
			want.Config.Annotations[criclone.AnnotationRestartCount] = "4"
			want.Config.Annotations[view.StagedAnnotation] = someToken
			for _, m := range want.Config.GetMounts() {
				if m.GetContainerPath() == "/dev/termination-log" {
					m.HostPath = "/pods/u/containers/app/01234567"
				}
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
		if _, err := criclone.Clone(req, nil, 1, someToken); err == nil {
			t.Errorf("%s: no error", name)
		}
	}
	bare, err := criclone.Clone(&runtimeapi.CreateContainerRequest{
		Config: &runtimeapi.ContainerConfig{Metadata: &runtimeapi.ContainerMetadata{}},
	}, nil, 1, someToken)
	if err != nil || bare.GetConfig().GetAnnotations()[view.StagedAnnotation] != someToken {
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
			Labels:      map[string]string{criclone.LabelPodUID: "u", criclone.LabelContainer: "app"},
			Annotations: map[string]string{criclone.AnnotationTerminationPath: "t"}, // kubelet makes it absolute
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
	if err := criclone.MakeTerminationFile(config(path)); err != nil {
		t.Fatal(err)
	}
	st, err := os.Stat(path)
	if err != nil || st.Mode().Perm() != 0o666 || st.Size() != 0 {
		t.Errorf("got %v, %v; want an empty file of mode 0666", st, err)
	}
	other := filepath.Join(root, "other")
	err = errors.Join(
		os.Symlink(other, filepath.Join(dir, "link")),
		os.Symlink(dir, filepath.Join(root, "pods", "u", "containers", "web")),
	)
	if err != nil {
		t.Fatal(err)
	}
	web := config(filepath.Join(root, "pods", "u", "containers", "web", "g"))
	web.Labels[criclone.LabelContainer] = "web"
	for name, c := range map[string]*runtimeapi.ContainerConfig{
		"no such directory":    config(filepath.Join(root, "no", "pods", "u", "containers", "app", "f")),
		"the file is a link":   config(filepath.Join(dir, "link")),
		"the directory is one": web,
	} {
		if err := criclone.MakeTerminationFile(c); err == nil ||
			!strings.Contains(err.Error(), "termination message file") {
			t.Errorf("%s: got %v", name, err)
		}
	}
	// The pod mounts a volume at the same place: the volume and the pod's file in it are left
	// alone.
	volume := filepath.Join(root, "pods", "u", "volumes", "kubernetes.io~empty-dir", "v")
	for name, c := range map[string]*runtimeapi.ContainerConfig{
		"a volume":                          config(volume),
		"another container's directory":     config(filepath.Join(root, "pods", "u", "containers", "db", "f")),
		"another pod's directory":           config(filepath.Join(root, "pods", "v", "containers", "app", "f")),
		"a directory below the container's": config(filepath.Join(dir, "sub", "f")),
		"no mount":                          config(),
		"nothing":                           {},
	} {
		if m := movedMounts(t, c); len(m) > 0 {
			t.Errorf("%s: taken for kubelet's: %v", name, m)
		}
		if err := criclone.MakeTerminationFile(c); err != nil {
			t.Errorf("%s: %v", name, err)
		}
	}
	both := config(volume, path) // kubelet's comes last
	if got := movedMounts(t, both); !slices.Equal(got, []int{1}) {
		t.Errorf("of two mounts %v is taken", got)
	}
	next, err := criclone.Clone(&runtimeapi.CreateContainerRequest{Config: withMetadata(both)}, nil, 1, someToken)
	if err != nil || next.Config.Mounts[0].HostPath != volume ||
		next.Config.Mounts[1].HostPath != filepath.Join(dir, someToken[:8]) {
		t.Errorf("the clone mounts %v, %v", next.GetConfig().GetMounts(), err)
	}
	for _, left := range []string{other, filepath.Dir(volume)} {
		if _, err := os.Lstat(left); !errors.Is(err, fs.ErrNotExist) {
			t.Errorf("%s has come about: %v", left, err)
		}
	}
}

// movedMounts returns the indexes of the mounts whose host path a clone changes: of those that are
// taken for kubelet's mount of the termination message file.
func movedMounts(t *testing.T, c *runtimeapi.ContainerConfig) (indexes []int) {
	t.Helper()
	req := clone(&runtimeapi.CreateContainerRequest{Config: c})
	withMetadata(req.Config)
	next, err := criclone.Clone(req, nil, 1, someToken)
	if err != nil {
		t.Fatal(err)
	}
	for i, m := range next.GetConfig().GetMounts() {
		if m.GetHostPath() != c.GetMounts()[i].GetHostPath() {
			indexes = append(indexes, i)
		}
	}
	return indexes
}

func withMetadata(c *runtimeapi.ContainerConfig) *runtimeapi.ContainerConfig {
	c.Metadata = &runtimeapi.ContainerMetadata{Name: "app"}
	return c
}

// What the runtime reports of a container's resources, as containerd does.
func TestReportedResources(t *testing.T) {
	if got := criclone.ReportedResources(&runtimeapi.ContainerStatus{}, nil); got != nil {
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
			tells: &runtimeapi.LinuxContainerResources{OomScoreAdj: -500, CpusetCpus: "1"},
			want:  &runtimeapi.LinuxContainerResources{CpusetCpus: "1"},
		},
		"huge pages of several updates": {
			tells: &runtimeapi.LinuxContainerResources{HugepageLimits: hugepages("2MB", "1GB", "2MB")},
			want:  &runtimeapi.LinuxContainerResources{HugepageLimits: hugepages("2MB", "1GB", "2MB")[1:]},
		},
	} {
		t.Run(name, func(t *testing.T) {
			st := &runtimeapi.ContainerStatus{Resources: &runtimeapi.ContainerResources{Linux: tc.tells}}
			if got := criclone.ReportedResources(st, tc.base); !proto.Equal(got, tc.want) {
				t.Errorf("got %v, want %v", got, tc.want)
			}
		})
	}
}

func TestLogLinkName(t *testing.T) {
	id := strings.Repeat("0", 64)
	if got, want := criclone.LogLinkName("p", "n", "c", id), "p_n_c-"+id+".log"; got != want {
		t.Errorf("got %s", got)
	}
	got := criclone.LogLinkName(strings.Repeat("p", 253), "n", "c", id)
	if len(got) != 255 || !strings.HasSuffix(got, "p.log") {
		t.Errorf("a long name becomes %q of %d", got, len(got))
	}
}
