// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package ops

import (
	"maps"
	"path"
	"slices"

	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/reflect/protoreflect"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/cri-proxy/cri-proxy/interceptors"
	"github.com/cri-proxy/cri-proxy/ops/environment"
)

// differs returns nil if the container that ours has made is the one that kubelet asks for now, else the
// fields in which they differ, sorted: "image", "envs.FOO", "mounts./etc/x", "linux.security_context". Never their values, which may
// be secret.
//
// kubelet builds some lists from Go maps, so that their order means nothing: envs (of two with a name the last
// counts), mounts, devices and CDI_devices. What is ours alone is left out: [interceptors.StagedAnnotation], [environment.PartsAnnotation], and
// the name of the termination message file on the host, which is a random one each time (kubelet_pods.go, kuberuntime_container.go makeMounts).
// linux.resources are not compared, see resourcesDiffer; the sandbox's config neither, it is the sandbox's own.
// All other fields count, those of CRI versions newer than ours too.
func differs(ours, asked *runtimeapi.CreateContainerRequest) []string {
	d := difference{}
	if ours.GetPodSandboxId() != asked.GetPodSandboxId() {
		d.add("pod_sandbox_id")
	}
	d.unknown("", ours.ProtoReflect(), asked.ProtoReflect())
	d.config(ours.GetConfig(), asked.GetConfig())
	if len(d) == 0 {
		return nil
	}
	return slices.Sorted(maps.Keys(d))
}

// resourcesDiffer reports whether the two ask for other CPU, memory and so on. Those of a container that is there
// already can be changed with UpdateContainerResources.
func resourcesDiffer(ours, asked *runtimeapi.CreateContainerRequest) bool {
	of := func(r *runtimeapi.CreateContainerRequest) *runtimeapi.LinuxContainerResources {
		if res := r.GetConfig().GetLinux().GetResources(); res != nil {
			return res
		}
		return &runtimeapi.LinuxContainerResources{}
	}
	return !proto.Equal(of(ours), of(asked))
}

// difference is a set of names of fields.
type difference map[string]struct{}

func (d difference) add(name string) { d[name] = struct{}{} }

func (d difference) config(ours, asked *runtimeapi.ContainerConfig) {
	byKey(d, "envs.", lastOf(ours.GetEnvs()), lastOf(asked.GetEnvs()))
	byKey(d, "mounts.", mountsOf(ours), mountsOf(asked))
	byKey(d, "devices.", listsOf(ours.GetDevices(), (*runtimeapi.Device).GetContainerPath), listsOf(asked.GetDevices(), (*runtimeapi.Device).GetContainerPath))
	byKey(d, "CDI_devices.", listsOf(ours.GetCDIDevices(), (*runtimeapi.CDIDevice).GetName), listsOf(asked.GetCDIDevices(), (*runtimeapi.CDIDevice).GetName))
	d.strings("labels.", ours.GetLabels(), asked.GetLabels())
	d.strings("annotations.", ours.GetAnnotations(), asked.GetAnnotations())
	delete(d, "annotations."+interceptors.StagedAnnotation)
	delete(d, "annotations."+environment.PartsAnnotation)

	d.fields("metadata.", ours.GetMetadata().ProtoReflect(), asked.GetMetadata().ProtoReflect())
	d.fields("linux.", ours.GetLinux().ProtoReflect(), asked.GetLinux().ProtoReflect(), "resources")
	d.fields("", ours.ProtoReflect(), asked.ProtoReflect(),
		"envs", "mounts", "devices", "CDI_devices", "labels", "annotations", "metadata", "linux")
}

// fields compares two messages field by field, but for those left out.
func (d difference) fields(prefix string, a, b protoreflect.Message, without ...protoreflect.Name) {
	all := a.Descriptor().Fields()
	for i := range all.Len() {
		f := all.Get(i)
		if slices.Contains(without, f.Name()) {
			continue
		}
		if a.Has(f) != b.Has(f) || !a.Get(f).Equal(b.Get(f)) {
			d.add(prefix + string(f.Name()))
		}
	}
	d.unknown(prefix, a, b)
}

// unknown compares the fields of two messages that this version of CRI does not know.
func (d difference) unknown(prefix string, a, b protoreflect.Message) {
	only := func(m protoreflect.Message) proto.Message {
		out := m.New()
		out.SetUnknown(m.GetUnknown())
		return out.Interface()
	}
	if !proto.Equal(only(a), only(b)) {
		d.add(prefix + "unknown")
	}
}

func (d difference) strings(prefix string, a, b map[string]string) {
	for k, v := range a {
		if w, ok := b[k]; !ok || v != w {
			d.add(prefix + k)
		}
	}
	for k := range b {
		if _, ok := a[k]; !ok {
			d.add(prefix + k)
		}
	}
}

// byKey compares lists whose order means nothing but among items of the same key.
func byKey[M proto.Message](d difference, prefix string, a, b map[string][]M) {
	same := func(x, y M) bool { return proto.Equal(x, y) }
	for k, v := range a {
		if w, ok := b[k]; !ok || !slices.EqualFunc(v, w, same) {
			d.add(prefix + k)
		}
	}
	for k := range b {
		if _, ok := a[k]; !ok {
			d.add(prefix + k)
		}
	}
}

func listsOf[M proto.Message](list []M, key func(M) string) map[string][]M {
	out := make(map[string][]M, len(list))
	for _, m := range list {
		out[key(m)] = append(out[key(m)], m)
	}
	return out
}

func lastOf(envs []*runtimeapi.KeyValue) map[string][]*runtimeapi.KeyValue {
	out := make(map[string][]*runtimeapi.KeyValue, len(envs))
	for _, kv := range envs {
		out[kv.GetKey()] = []*runtimeapi.KeyValue{kv}
	}
	return out
}

// mountsOf returns the mounts by container path, that of the termination message file without the file's name.
func mountsOf(c *runtimeapi.ContainerConfig) map[string][]*runtimeapi.Mount {
	mounts := slices.Clone(c.GetMounts())
	if i := slices.Index(mounts, terminationMount(c)); i >= 0 {
		m := proto.Clone(mounts[i]).(*runtimeapi.Mount)
		m.HostPath = path.Dir(m.GetHostPath())
		mounts[i] = m
	}
	return listsOf(mounts, (*runtimeapi.Mount).GetContainerPath)
}
