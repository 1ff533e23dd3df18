// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package criclone_test

import (
	"fmt"
	"math/rand/v2"
	"slices"
	"strings"
	"testing"

	"google.golang.org/protobuf/encoding/protowire"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/reflect/protoreflect"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/cri-proxy/cri-proxy/interceptors/view"
	"github.com/cri-proxy/cri-proxy/ops/criclone"
)

// filler sets every field of a message to something that no other field has.
type filler struct{ n int }

func (f *filler) message(m protoreflect.Message) {
	fields := m.Descriptor().Fields()
	for i := range fields.Len() {
		fd := fields.Get(i)
		switch {
		case fd.IsMap():
			entries := m.Mutable(fd).Map()
			for range 2 {
				key := f.scalar(fd.MapKey()).MapKey()
				v := entries.NewValue()
				if fd.MapValue().Message() != nil {
					f.message(v.Message())
				} else {
					v = f.scalar(fd.MapValue())
				}
				entries.Set(key, v)
			}
		case fd.IsList():
			list := m.Mutable(fd).List()
			for range 3 {
				f.appendTo(list, fd)
			}
		case fd.Message() != nil:
			f.message(m.Mutable(fd).Message())
		default:
			m.Set(fd, f.scalar(fd))
		}
	}
}

func (f *filler) appendTo(list protoreflect.List, fd protoreflect.FieldDescriptor) {
	if fd.Message() != nil {
		f.message(list.AppendMutable().Message())
		return
	}
	list.Append(f.scalar(fd))
}

func (f *filler) scalar(fd protoreflect.FieldDescriptor) protoreflect.Value {
	f.n++
	switch fd.Kind() {
	case protoreflect.BoolKind:
		return protoreflect.ValueOfBool(true)
	case protoreflect.EnumKind:
		return protoreflect.ValueOfEnum(1)
	case protoreflect.Int32Kind:
		return protoreflect.ValueOfInt32(int32(f.n))
	case protoreflect.Uint32Kind:
		return protoreflect.ValueOfUint32(uint32(f.n))
	case protoreflect.Int64Kind:
		return protoreflect.ValueOfInt64(int64(f.n))
	case protoreflect.Uint64Kind:
		return protoreflect.ValueOfUint64(uint64(f.n))
	case protoreflect.DoubleKind:
		return protoreflect.ValueOfFloat64(float64(f.n))
	case protoreflect.StringKind:
		return protoreflect.ValueOfString(fmt.Sprintf("/s%d", f.n))
	case protoreflect.BytesKind:
		return protoreflect.ValueOfBytes(fmt.Appendf(nil, "b%d", f.n))
	}
	panic("CRI has a new kind of field: " + fd.Kind().String())
}

// filled returns a request in which every field is set. Its first mount is that of the termination
// message file.
func filled() *runtimeapi.CreateContainerRequest {
	req := &runtimeapi.CreateContainerRequest{}
	(&filler{}).message(req.ProtoReflect())
	c := req.Config
	c.Mounts[0].ContainerPath = "/dev/termination-log"
	c.Mounts[0].HostPath = "/var/lib/kubelet/pods/1/containers/app/0a0b0c0d"
	c.Annotations[criclone.AnnotationTerminationPath] = c.Mounts[0].GetContainerPath()
	c.Labels[criclone.LabelPodUID], c.Labels[criclone.LabelContainer] = "1", "app"
	return req
}

// changes makes one change after another to m and everything in it. It calls check after each
// change and takes the change back.
func changes(m protoreflect.Message, path string, f *filler, check func(path string)) {
	unknown := m.GetUnknown()
	m.SetUnknown(protowire.AppendVarint(protowire.AppendTag(slices.Clone(unknown), 1999, protowire.VarintType), 7))
	check(path + "<unknown>")
	m.SetUnknown(unknown)
	fields := m.Descriptor().Fields()
	for i := range fields.Len() {
		fd := fields.Get(i)
		at := path + string(fd.Name())
		if !m.Has(fd) {
			panic(at + " is not set")
		}
		switch {
		case fd.IsMap():
			entries := m.Mutable(fd).Map()
			var keys []protoreflect.MapKey
			entries.Range(func(k protoreflect.MapKey,
				_ protoreflect.Value) bool {
				keys = append(keys, k)
				return true
			})
			for _, k := range keys {
				before := entries.Get(k)
				entries.Clear(k)
				check(at + "[" + k.String() + "] removed")
				if fd.MapValue().Message() == nil {
					entries.Set(k, f.scalar(fd.MapValue()))
					check(at + "[" + k.String() + "]")
				}
				entries.Set(k, before)
			}
			k := f.scalar(fd.MapKey()).MapKey()
			v := entries.NewValue()
			if fd.MapValue().Message() == nil {
				v = f.scalar(fd.MapValue())
			}
			entries.Set(k, v)
			check(at + " added")
			entries.Clear(k)
		case fd.IsList():
			list := m.Mutable(fd).List()
			n := list.Len()
			f.appendTo(list, fd)
			check(at + " added")
			list.Truncate(n)
			last := list.Get(n - 1)
			list.Truncate(n - 1)
			check(at + " removed")
			list.Append(last)
			for j := range n {
				item := fmt.Sprintf("%s[%d]", at, j)
				if fd.Message() != nil {
					changes(list.Get(j).Message(), item+".", f, check)
					continue
				}
				before := list.Get(j)
				list.Set(j, f.scalar(fd))
				check(item)
				list.Set(j, before)
			}
		case fd.Message() != nil:
			changes(m.Mutable(fd).Message(), at+".", f, check)
			before := m.Get(fd)
			m.Clear(fd)
			check(at)
			m.Set(fd, before)
		default:
			before := m.Get(fd)
			m.Clear(fd)
			check(at)
			if fd.Kind() != protoreflect.BoolKind && fd.Kind() != protoreflect.EnumKind {
				m.Set(fd, f.scalar(fd))
				check(at)
			}
			m.Set(fd, before)
		}
	}
}

func TestDiffNoticesEveryField(t *testing.T) {
	ours := filled()
	changed := proto.Clone(ours).(*runtimeapi.CreateContainerRequest)
	seen := 0
	changes(changed.ProtoReflect(), "", &filler{n: 100_000}, func(path string) {
		seen++
		want := true
		switch {
		case strings.HasPrefix(path, "sandbox_config"), strings.HasPrefix(path, "config.linux.resources"):
			want = false // the host path of the first mount is then not in kubelet's directory
		}
		if got := criclone.Diff(ours, changed); want != (got != nil) {
			t.Errorf("%s changed: Diff says %v", path, got)
		}
		if got := criclone.Diff(changed, ours); want != (got != nil) {
			t.Errorf("%s changed, the other way around: Diff says %v", path, got)
		}
		want = strings.HasPrefix(path, "config.linux.resources") || path == "config.linux" || path == "config"
		if got := criclone.ResourcesDiffer(ours, changed); got != want {
			t.Errorf("%s changed: ResourcesDiffer says %v", path, got)
		}
	})
	if !proto.Equal(ours, changed) {
		t.Fatal("the test has not taken its changes back")
	}
	if seen < 300 {
		t.Errorf("only %d changes were tried", seen)
	}
}

func shuffle(r *rand.Rand, c *runtimeapi.ContainerConfig) {
	shuffleList(r, c.GetEnvs())
	shuffleList(r, c.GetMounts())
	shuffleList(r, c.GetDevices())
	shuffleList(r, c.GetCDIDevices())
}

func shuffleList[M any](r *rand.Rand, list []M) {
	r.Shuffle(len(list), func(i, j int) { list[i], list[j] = list[j], list[i] })
}

func TestDiffNotInOrder(t *testing.T) {
	for seed := range uint64(50) {
		ours := filled()
		asked := proto.Clone(ours).(*runtimeapi.CreateContainerRequest)
		shuffle(rand.New(rand.NewPCG(seed, 1)), asked.GetConfig())
		before := proto.Clone(asked)
		if got := criclone.Diff(ours, asked); got != nil {
			t.Fatalf("seed %d: %v", seed, got)
		}
		if !proto.Equal(before, asked) || !proto.Equal(ours, filled()) {
			t.Fatal("an argument was modified")
		}
	}
}

func TestDiffNames(t *testing.T) {
	for _, tt := range []struct {
		name string
		edit func(c *runtimeapi.ContainerConfig)
		want []string
	}{
		{name: "nothing", edit: func(*runtimeapi.ContainerConfig) {}},
		{
			name: "mark of ours",
			edit: func(c *runtimeapi.ContainerConfig) { delete(c.Annotations, view.StagedAnnotation) },
		},
		{
			name: "termination message file",
			edit: func(c *runtimeapi.ContainerConfig) { c.Mounts[1].HostPath = "/pods/1/containers/app/0badcafe" },
		},
		{name: "its path", edit: func(c *runtimeapi.ContainerConfig) {
			c.Annotations[criclone.AnnotationTerminationPath], c.Mounts[1].ContainerPath = "/dev/msg", "/dev/msg"
		}, want: []string{"annotations." + criclone.AnnotationTerminationPath, "mounts./dev/log", "mounts./dev/msg"}},
		{name: "resources", edit: func(c *runtimeapi.ContainerConfig) {
			c.Linux.Resources = &runtimeapi.LinuxContainerResources{CpuShares: 2}
		}},
		{
			name: "value of a variable",
			edit: func(c *runtimeapi.ContainerConfig) { c.Envs[0].Value = []byte("secret") },
			want: []string{"envs.A"},
		},
		{
			name: "variable gone and another there", edit: func(c *runtimeapi.ContainerConfig) { c.Envs[0].Key = "C" },
			want: []string{"envs.A", "envs.C"},
		},
		{name: "variable twice", edit: func(c *runtimeapi.ContainerConfig) {
			c.Envs = append([]*runtimeapi.KeyValue{{Key: "A", Value: []byte("0")}}, c.Envs...)
		}},
		{name: "variable overridden", edit: func(c *runtimeapi.ContainerConfig) {
			c.Envs = append(c.Envs, &runtimeapi.KeyValue{Key: "A", Value: []byte("0")})
		}, want: []string{"envs.A"}},
		{
			name: "host path", edit: func(c *runtimeapi.ContainerConfig) { c.Mounts[0].HostPath = "/other" },
			want: []string{"mounts./etc/x"},
		},
		{
			name: "mount twice", edit: func(c *runtimeapi.ContainerConfig) { c.Mounts = append(c.Mounts, c.Mounts[0]) },
			want: []string{"mounts./etc/x"},
		},
		{
			name: "device", edit: func(c *runtimeapi.ContainerConfig) { c.Devices[0].Permissions = "r" },
			want: []string{"devices./dev/d"},
		},
		{
			name: "CDI device", edit: func(c *runtimeapi.ContainerConfig) { c.CDIDevices = nil },
			want: []string{"CDI_devices.vendor/class=0"},
		},
		{name: "image", edit: func(c *runtimeapi.ContainerConfig) { c.Image.Image = "sha256:b" },
			want: []string{"image"}},
		{
			name: "attempt and log",
			edit: func(c *runtimeapi.ContainerConfig) { c.Metadata.Attempt, c.LogPath = 5, "app/5.log" },
			want: []string{"log_path", "metadata.attempt"},
		},
		{
			name: "annotation", edit: func(c *runtimeapi.ContainerConfig) { c.Annotations["a/b"] = "2" },
			want: []string{"annotations.a/b"},
		},
		{name: "label", edit: func(c *runtimeapi.ContainerConfig) { delete(c.Labels, "l") },
			want: []string{"labels.l"}},
		{name: "user", edit: func(c *runtimeapi.ContainerConfig) {
			c.Linux.SecurityContext = &runtimeapi.LinuxContainerSecurityContext{RunAsUser: &runtimeapi.Int64Value{}}
		}, want: []string{"linux.security_context"}},
		{
			name: "order of arguments", edit: func(c *runtimeapi.ContainerConfig) { slices.Reverse(c.Args) },
			want: []string{"args"},
		},
		{name: "empty instead of absent", edit: func(c *runtimeapi.ContainerConfig) { c.Command = []string{} }},
	} {
		t.Run(tt.name, func(t *testing.T) {
			ours := &runtimeapi.CreateContainerRequest{PodSandboxId: "s", Config: &runtimeapi.ContainerConfig{
				Metadata: &runtimeapi.ContainerMetadata{Name: "app", Attempt: 1},
				Image:    &runtimeapi.ImageSpec{Image: "sha256:a", UserSpecifiedImage: "app:v2"},
				Args:     []string{"x", "y"},
				Envs:     []*runtimeapi.KeyValue{{Key: "A", Value: []byte("1")}, {Key: "B"}},
				Labels:   map[string]string{"l": "1", criclone.LabelPodUID: "1", criclone.LabelContainer: "app"},
				Annotations: map[string]string{
					"a/b": "1", view.StagedAnnotation: "token", criclone.AnnotationTerminationPath: "/dev/log",
				},
				LogPath: "app/1.log",
				Mounts: []*runtimeapi.Mount{
					{ContainerPath: "/etc/x", HostPath: "/x"},
					{ContainerPath: "/dev/log", HostPath: "/pods/1/containers/app/12345678"},
				},
				Devices:    []*runtimeapi.Device{{ContainerPath: "/dev/d", HostPath: "/dev/d", Permissions: "rw"}},
				CDIDevices: []*runtimeapi.CDIDevice{{Name: "vendor/class=0"}},
				Linux:      &runtimeapi.LinuxContainerConfig{},
			}}
			asked := proto.Clone(ours).(*runtimeapi.CreateContainerRequest)
			tt.edit(asked.GetConfig())
			if got := criclone.Diff(ours, asked); !slices.Equal(got, tt.want) {
				t.Errorf("Diff: %v, want %v", got, tt.want)
			}
		})
	}
}

func FuzzDiff(f *testing.F) {
	all, err := proto.Marshal(filled())
	if err != nil {
		f.Fatal(err)
	}
	f.Add(all, []byte{}, uint64(1))
	f.Add([]byte{}, []byte{0x0a, 0x01, 's'}, uint64(2))
	f.Fuzz(func(t *testing.T, a, b []byte, seed uint64) {
		x, y := &runtimeapi.CreateContainerRequest{}, &runtimeapi.CreateContainerRequest{}
		if proto.Unmarshal(a, x) != nil || proto.Unmarshal(b, y) != nil {
			return
		}
		forth, back := criclone.Diff(x, y), criclone.Diff(y, x)
		if !slices.Equal(forth, back) {
			t.Fatalf("Diff says %v one way and %v the other", forth, back)
		}
		if got := criclone.Diff(x, proto.Clone(x).(*runtimeapi.CreateContainerRequest)); got != nil {
			t.Fatalf("a request differs from itself: %v", got)
		}
		if !unique(x.GetConfig()) {
			return
		}
		shuffled := proto.Clone(x).(*runtimeapi.CreateContainerRequest)
		shuffle(rand.New(rand.NewPCG(seed, 1)), shuffled.GetConfig())
		if got := criclone.Diff(x, shuffled); got != nil {
			t.Fatalf("a request differs from itself in another order: %v", got)
		}
	})
}

// unique reports whether no list has two items of the same key, whose order would count.
func unique(c *runtimeapi.ContainerConfig) bool {
	if c == nil {
		return false
	}
	return distinct(c.GetEnvs(), (*runtimeapi.KeyValue).GetKey) &&
		distinct(c.GetMounts(), (*runtimeapi.Mount).GetContainerPath) &&
		distinct(c.GetDevices(), (*runtimeapi.Device).GetContainerPath) &&
		distinct(c.GetCDIDevices(), (*runtimeapi.CDIDevice).GetName)
}

func distinct[M any](list []M, key func(M) string) bool {
	keys := map[string]bool{}
	for _, m := range list {
		keys[key(m)] = true
	}
	return len(keys) == len(list)
}
