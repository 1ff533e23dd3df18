// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package criclone

import (
	"maps"
	"path"
	"slices"

	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/reflect/protoreflect"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/cri-proxy/cri-proxy/interceptors/view"
	"github.com/cri-proxy/cri-proxy/ops/environment"
)

// Diff returns the sorted names of the fields in which two requests differ: "image", "envs.FOO",
// "mounts./etc/x", "linux.security_context". It returns nil if ours, which created a container,
// creates the container that kubelet asks for. It never returns values, which may be secret.
//
// Kubelet builds some lists from Go maps, so Diff ignores the order of envs (the last of a name
// counts), mounts, devices and CDI_devices. It also ignores what only cri-proxy sets
// ([view.StagedAnnotation], [environment.PartsAnnotation]) and the name of the termination
// message file on the host, which is random (kubelet_pods.go, kuberuntime_container.go makeMounts).
// For linux.resources there is [ResourcesDiffer]; the sandbox's config belongs to the sandbox. All
// other fields count, fields of newer CRI versions too.
func Diff(ours, asked *runtimeapi.CreateContainerRequest) []string {
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

// difference is a set of field names.
type difference map[string]struct{}

func (d difference) add(name string) { d[name] = struct{}{} }

func (d difference) config(ours, asked *runtimeapi.ContainerConfig) {
	byKey(d, "envs.", lastOf(ours.GetEnvs()), lastOf(asked.GetEnvs()))
	byKey(d, "mounts.", mountsOf(ours), mountsOf(asked))
	devicePath, cdiName := (*runtimeapi.Device).GetContainerPath, (*runtimeapi.CDIDevice).GetName
	byKey(d, "devices.", listsOf(ours.GetDevices(), devicePath), listsOf(asked.GetDevices(), devicePath))
	byKey(d, "CDI_devices.", listsOf(ours.GetCDIDevices(), cdiName), listsOf(asked.GetCDIDevices(), cdiName))
	d.strings("labels.", ours.GetLabels(), asked.GetLabels())
	d.strings("annotations.", ours.GetAnnotations(), asked.GetAnnotations())
	delete(d, "annotations."+view.StagedAnnotation)
	delete(d, "annotations."+environment.PartsAnnotation)

	d.fields("metadata.", ours.GetMetadata().ProtoReflect(), asked.GetMetadata().ProtoReflect())
	d.fields("linux.", ours.GetLinux().ProtoReflect(), asked.GetLinux().ProtoReflect(), "resources")
	d.fields("", ours.ProtoReflect(), asked.ProtoReflect(),
		"envs", "mounts", "devices", "CDI_devices", "labels", "annotations", "metadata", "linux")
}

// fields compares two messages field by field, except the fields in without.
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

// unknown compares the fields that this version of CRI does not know.
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

// byKey compares two lists, as listsOf returns them. Order counts only among items of one key.
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

// listsOf groups the items of a list by key.
func listsOf[M proto.Message](list []M, key func(M) string) map[string][]M {
	out := make(map[string][]M, len(list))
	for _, m := range list {
		out[key(m)] = append(out[key(m)], m)
	}
	return out
}

// lastOf keeps the last variable of each name.
func lastOf(envs []*runtimeapi.KeyValue) map[string][]*runtimeapi.KeyValue {
	out := make(map[string][]*runtimeapi.KeyValue, len(envs))
	for _, kv := range envs {
		out[kv.GetKey()] = []*runtimeapi.KeyValue{kv}
	}
	return out
}

// mountsOf returns the mounts by container path, and drops the name of the termination message
// file.
func mountsOf(c *runtimeapi.ContainerConfig) map[string][]*runtimeapi.Mount {
	mounts := slices.Clone(c.GetMounts())
	if i := slices.Index(mounts, terminationMount(c)); i >= 0 {
		m := proto.Clone(mounts[i]).(*runtimeapi.Mount)
		m.HostPath = path.Dir(m.GetHostPath())
		mounts[i] = m
	}
	return listsOf(mounts, (*runtimeapi.Mount).GetContainerPath)
}

// AlignMounts returns ours with those parts of asked's mounts that do not change what is mounted:
// the annotations of images, and host paths that lead to the same file. Kubelet binds a part of a
// volume (subPath) in a directory of its own, while a clone may mount it from the volume itself.
func AlignMounts(ours, asked *runtimeapi.CreateContainerRequest) *runtimeapi.CreateContainerRequest {
	paths := map[string]string{}
	annotations := map[string]map[string]string{}
	for _, m := range asked.GetConfig().GetMounts() {
		paths[m.GetContainerPath()] = m.GetHostPath()
		annotations[m.GetContainerPath()] = m.GetImage().GetAnnotations()
	}
	ours = proto.Clone(ours).(*runtimeapi.CreateContainerRequest)
	for _, m := range ours.GetConfig().GetMounts() {
		if m.GetImage() != nil {
			// The pod's annotations, which change with the patch (kuberuntime_manager.go
			// getImageVolumes).
			m.Image.Annotations = annotations[m.GetContainerPath()]
		}
		host := paths[m.GetContainerPath()]
		if host != "" && host != m.GetHostPath() && environment.SameFile(host, m.GetHostPath()) {
			m.HostPath = host
		}
	}
	return ours
}
