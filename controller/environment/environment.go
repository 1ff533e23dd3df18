// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package environment

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"syscall"

	"google.golang.org/protobuf/proto"
	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/util/sets"
	"k8s.io/kubectl/pkg/util/fieldpath"
	"k8s.io/kubectl/pkg/util/resource"
	"sigs.k8s.io/controller-runtime/pkg/client"

	opsv1 "github.com/cri-proxy/cri-proxy/api/ops/v1"
	"github.com/cri-proxy/cri-proxy/controller/mirrorpod"
	"github.com/cri-proxy/cri-proxy/controller/pods"
)

// Annotations on the mirror pod of a pod that kubelet has read from a file
// (pkg/kubelet/types/pod_update.go).
const (
	mirrorAnnotation = corev1.MirrorPodAnnotationKey
	configHash       = "kubernetes.io/config.hash"
)

// maxSize is the largest environment of a container that nodes accept, in bytes. Unless somebody
// has changed the limit of the stack, Linux starts no process with more (execve(2)).
const maxSize = 2 << 20

// MissingError says what a container needs and the cluster lacks, or that the container's
// environment is too large. kubelet would not start the container either. The text is kubelet's, or
// Linux's.
type MissingError struct {
	Container string
	Err       error
}

// Error names the container and what is missing.
func (e *MissingError) Error() string {
	if errors.Is(e.Err, syscall.E2BIG) {
		return fmt.Sprintf("container %s could not be started again: %s", e.Container, e.Err)
	}
	return fmt.Sprintf("kubelet could not start container %s again (CreateContainerConfigError): %s",
		e.Container, e.Err)
}

// Unwrap returns the error that says what is missing.
func (e *MissingError) Unwrap() error { return e.Err }

// Reader reads the environments of one pod's containers. It asks the API server for each object
// once, so make one Reader for each command.
type Reader struct {
	from client.Reader
	pod  *corev1.Pod

	objects  map[string]client.Object // by kind and name; nil: there is none
	services []*opsv1.Variable
	listed   bool
	node     *corev1.Node
}

// Of returns a reader for the pod, which must be complete: the pods in the controller's cache are
// not.
func Of(from client.Reader, pod *corev1.Pod) *Reader {
	return &Reader{from: from, pod: pod, objects: map[string]client.Object{}}
}

// Read returns a reader for the pod with the name and UID of the given one, as the pod is now. from
// must read past caches, since changes of a moment ago count.
//
// Errors: the API server's, or that the pod no longer exists.
func Read(ctx context.Context, from client.Reader, of *corev1.Pod) (*Reader, error) {
	pod := &corev1.Pod{}
	if err := from.Get(ctx, client.ObjectKeyFromObject(of), pod); err != nil {
		return nil, fmt.Errorf("reading pod %s/%s: %w", of.Namespace, of.Name, err)
	}
	if pod.UID != of.UID {
		return nil, fmt.Errorf("pod %s/%s is another one by now", of.Namespace, of.Name)
	}
	return Of(from, pod), nil
}

// Pod returns the pod of the reader.
func (r *Reader) Pod() *corev1.Pod { return r.pod }

// Label makes the reader treat the pod as if it had the label. Use it when the pod is about to be
// patched.
func (r *Reader) Label(key, value string) {
	r.pod = r.pod.DeepCopy()
	if r.pod.Labels == nil {
		r.pod.Labels = map[string]string{}
	}
	r.pod.Labels[key] = value
}

// Container returns what kubelet would compute now for the container of that name. The pod must
// have the container.
//
// Errors: a *[MissingError], which does not go away by itself, or the API server's.
func (r *Reader) Container(ctx context.Context, name string) (*opsv1.Environment, error) {
	c, _ := pods.Container(r.pod, name)
	if c == nil {
		return nil, fmt.Errorf("pod %s has no container %s", r.pod.Name, name)
	}
	env := &opsv1.Environment{Command: c.Command, Args: c.Args, DeviceVariables: hasDevices(c)}
	var err error
	if env.Services, err = r.serviceVariables(ctx); err != nil {
		return nil, err
	}
	for _, from := range c.EnvFrom {
		more, err := r.all(ctx, from)
		if err != nil {
			return nil, explained(name, err)
		}
		env.Variables = append(env.Variables, more...)
	}
	for _, v := range c.Env {
		one, err := r.variable(ctx, c, v)
		if err != nil {
			return nil, explained(name, err)
		}
		if one != nil {
			env.Variables = append(env.Variables, one)
		}
	}
	for _, m := range c.VolumeMounts {
		if !strings.HasPrefix(m.MountPath, "/") { // kubelet does so, too (kubelet_pods.go makeMounts)
			m.MountPath = "/" + m.MountPath
		}
		if image := imageOf(r.pod, m.Name); image != nil {
			env.ImageVolumes = append(env.ImageVolumes, &opsv1.ImageVolume{
				ContainerPath: m.MountPath, Reference: image.Reference, PullPolicy: PullPolicy(image.PullPolicy),
			})
		}
		if m.SubPath == "" && m.SubPathExpr == "" {
			continue
		}
		part := &opsv1.SubPath{ContainerPath: m.MountPath, Volume: m.Name, Path: m.SubPath}
		if part.PersistentVolume, part.HostPath, err = r.place(ctx, m.Name); err != nil {
			return nil, explained(name, err)
		}
		if m.SubPathExpr != "" {
			part.Path, part.Expand = m.SubPathExpr, true
		}
		env.SubPaths = append(env.SubPaths, part)
	}
	if n := proto.Size(env); n > maxSize {
		return nil, explained(name,
			missing{fmt.Errorf("its environment has %d bytes, more than a process can be started with (%d): %w", n,
				maxSize, syscall.E2BIG)})
	}
	return env, nil
}

// imageOf returns the source of a volume of type image; nil if the volume is of another type.
func imageOf(pod *corev1.Pod, volume string) *corev1.ImageVolumeSource {
	for _, v := range pod.Spec.Volumes {
		if v.Name == volume {
			return v.Image
		}
	}
	return nil
}

// place returns the name of the PersistentVolume behind a volume of the pod, and its path on the
// host if it is of type hostPath. Each is "" if there is none.
func (r *Reader) place(ctx context.Context, volume string) (persistent, hostPath string, err error) {
	claim := ""
	for _, v := range r.pod.Spec.Volumes {
		switch {
		case v.Name != volume:
		case v.HostPath != nil:
			return "", v.HostPath.Path, nil
		case v.PersistentVolumeClaim != nil:
			claim = v.PersistentVolumeClaim.ClaimName
		case v.Ephemeral != nil:
			claim = r.pod.Name + "-" + v.Name // k8s.io/component-helpers/storage/ephemeral VolumeClaimName
		}
	}
	if claim == "" {
		return "", "", nil
	}
	if mirrorpod.Is(r.pod) {
		return "", "", missing{
			fmt.Errorf("persistentvolumeclaim %q is not read for a static pod, which its node has made",
				claim)}
	}
	var c corev1.PersistentVolumeClaim
	if err := r.from.Get(ctx, client.ObjectKey{Namespace: r.pod.Namespace, Name: claim}, &c); err != nil {
		return "", "", fmt.Errorf("reading persistentvolumeclaim %s/%s: %w", r.pod.Namespace, claim, err)
	}
	var v corev1.PersistentVolume
	if err := r.from.Get(ctx, client.ObjectKey{Name: c.Spec.VolumeName}, &v); err != nil {
		return "", "", fmt.Errorf("reading persistentvolume %s: %w", c.Spec.VolumeName, err)
	}
	if v.Spec.HostPath != nil {
		hostPath = v.Spec.HostPath.Path
	}
	return v.Name, hostPath, nil
}

// PullPolicy translates an imagePullPolicy into the API of the nodes.
func PullPolicy(p corev1.PullPolicy) opsv1.PullPolicy {
	switch p {
	case corev1.PullAlways:
		return opsv1.PullPolicy_PULL_POLICY_ALWAYS
	case corev1.PullNever:
		return opsv1.PullPolicy_PULL_POLICY_NEVER
	default:
		return opsv1.PullPolicy_PULL_POLICY_IF_NOT_PRESENT
	}
}

// missing is the error that the cluster lacks something which the pod's spec names.
type missing struct{ error }

func explained(container string, err error) error {
	var m missing
	if errors.As(err, &m) {
		return &MissingError{Container: container, Err: m.error}
	}
	return err
}

// all returns the variables of a whole ConfigMap or Secret, by name. kubelet makes no variables of
// binaryData.
func (r *Reader) all(ctx context.Context, from corev1.EnvFromSource) ([]*opsv1.Variable, error) {
	var variables []*opsv1.Variable
	add := func(key string, value []byte) {
		variables = append(variables, literal(from.Prefix+key, value))
	}
	switch {
	case from.ConfigMapRef != nil:
		m, err := r.configMap(ctx, from.ConfigMapRef.Name, from.ConfigMapRef.Optional)
		if m == nil {
			return nil, err
		}
		for _, key := range sets.List(sets.KeySet(m.Data)) {
			add(key, []byte(m.Data[key]))
		}
	case from.SecretRef != nil:
		s, err := r.secret(ctx, from.SecretRef.Name, from.SecretRef.Optional)
		if s == nil {
			return nil, err
		}
		for _, key := range sets.List(sets.KeySet(s.Data)) {
			add(key, s.Data[key])
		}
	}
	return variables, nil
}

// variable returns one variable of the spec; nil if the variable is optional and its source does
// not exist.
func (r *Reader) variable(ctx context.Context, c *corev1.Container, v corev1.EnvVar) (*opsv1.Variable, error) {
	if v.Value != "" || v.ValueFrom == nil {
		return &opsv1.Variable{Name: v.Name, Source: &opsv1.Variable_Template{Template: v.Value}}, nil
	}
	switch from := v.ValueFrom; {
	case from.FieldRef != nil:
		value, err := r.field(from.FieldRef.FieldPath)
		if err != nil {
			return nil, missing{err}
		}
		return literal(v.Name, []byte(value)), nil
	case from.ResourceFieldRef != nil:
		value, err := r.resource(ctx, c, from.ResourceFieldRef)
		if err != nil {
			return nil, err
		}
		return literal(v.Name, []byte(value)), nil
	case from.ConfigMapKeyRef != nil:
		ref := from.ConfigMapKeyRef
		m, err := r.configMap(ctx, ref.Name, ref.Optional)
		if m == nil {
			return nil, err
		}
		if value, ok := m.Data[ref.Key]; ok {
			return literal(v.Name, []byte(value)), nil
		}
		return nil, unlessOptional(ref.Optional, "couldn't find key %v in ConfigMap %v/%v", ref.Key,
			r.pod.Namespace, ref.Name)
	case from.SecretKeyRef != nil:
		ref := from.SecretKeyRef
		s, err := r.secret(ctx, ref.Name, ref.Optional)
		if s == nil {
			return nil, err
		}
		if value, ok := s.Data[ref.Key]; ok {
			return literal(v.Name, value), nil
		}
		return nil, unlessOptional(ref.Optional, "couldn't find key %v in Secret %v/%v", ref.Key,
			r.pod.Namespace, ref.Name)
	case from.FileKeyRef != nil:
		ref := from.FileKeyRef
		return &opsv1.Variable{Name: v.Name, Source: &opsv1.Variable_File{File: &opsv1.FileKey{
			Volume: ref.VolumeName, Path: ref.Path, Key: ref.Key, Optional: isTrue(ref.Optional),
		}}}, nil
	}
	return literal(v.Name, nil), nil // kubelet makes an empty one of a source that it does not know
}

func literal(name string, value []byte) *opsv1.Variable {
	return &opsv1.Variable{Name: name, Source: &opsv1.Variable_Value{Value: value}}
}

func unlessOptional(optional *bool, format string, args ...any) error {
	if isTrue(optional) {
		return nil
	}
	return missing{fmt.Errorf(format, args...)}
}

func isTrue(b *bool) bool { return b != nil && *b }

// configMap returns the ConfigMap; nil without an error if it is optional and does not exist.
func (r *Reader) configMap(ctx context.Context, name string, optional *bool) (*corev1.ConfigMap, error) {
	o, err := r.object(ctx, "configmap", name, &corev1.ConfigMap{}, optional)
	m, _ := o.(*corev1.ConfigMap)
	return m, err
}

// secret returns the Secret, by the same rules as configMap.
func (r *Reader) secret(ctx context.Context, name string, optional *bool) (*corev1.Secret, error) {
	o, err := r.object(ctx, "secret", name, &corev1.Secret{}, optional)
	s, _ := o.(*corev1.Secret)
	return s, err
}

func (r *Reader) object(
	ctx context.Context, kind, name string, into client.Object, optional *bool,
) (client.Object, error) {
	if mirrorpod.Is(r.pod) {
		return nil, unlessOptional(optional,
			"%s %q is not read for a static pod, which its node has made; put the value in its manifest", kind, name)
	}
	key := kind + "/" + name
	o, known := r.objects[key]
	if !known {
		err := r.from.Get(ctx, client.ObjectKey{Namespace: r.pod.Namespace, Name: name}, into)
		switch {
		case err == nil:
			o = into
		case !apierrors.IsNotFound(err):
			return nil, fmt.Errorf("reading %s %s/%s: %w", kind, r.pod.Namespace, name, err)
		}
		r.objects[key] = o
	}
	if o == nil {
		// kubelet's own store of objects says it so
		// (pkg/kubelet/util/manager/watch_based_manager.go).
		return nil, unlessOptional(optional, "%s %q not found", kind, name)
	}
	return o, nil
}

// field is kubelet's podFieldSelectorRuntimeValue. It takes the addresses from the pod's status:
// kubelet puts them there, in the order in which it uses them here.
func (r *Reader) field(path string) (string, error) {
	status := r.pod.Status
	switch path {
	// its old name, which the API server and kubelet still accept (core/v1/conversion.go)
	case "spec.nodeName", "spec.host":
		return r.pod.Spec.NodeName, nil
	case "spec.serviceAccountName":
		return r.pod.Spec.ServiceAccountName, nil
	case "status.hostIP":
		return status.HostIP, nil
	case "status.hostIPs":
		var ips []string
		for _, ip := range status.HostIPs {
			ips = append(ips, ip.IP)
		}
		return strings.Join(ips, ","), nil
	case "status.podIP":
		return status.PodIP, nil
	case "status.podIPs":
		var ips []string
		for _, ip := range status.PodIPs {
			ips = append(ips, ip.IP)
		}
		return strings.Join(ips, ","), nil
	case "metadata.uid":
		if hash := r.pod.Annotations[configHash]; hash != "" && r.pod.Annotations[mirrorAnnotation] != "" {
			return hash, nil // kubelet knows a static pod by that, not by the UID of its mirror
		}
	}
	return fieldpath.ExtractFieldPathAsString(r.pod, path)
}

// resource is kubelet's containerResourceRuntimeValue of the resources allocated to the container.
func (r *Reader) resource(ctx context.Context, c *corev1.Container, ref *corev1.ResourceFieldSelector) (string, error) {
	subject, kind := c, pods.None
	if ref.ContainerName != "" {
		if subject, kind = pods.Container(r.pod, ref.ContainerName); subject == nil {
			return "", missing{fmt.Errorf("container %s not found", ref.ContainerName)}
		}
	}
	subject = r.allocated(subject)
	// kubelet sets missing limits to those of the pod or the node: for the container itself, and
	// for regular containers if the reference names another container (kubelet_resources.go
	// defaultPodLimitsForDownwardAPI).
	if ref.ContainerName == "" || kind == pods.Regular {
		limits, err := r.limits(ctx)
		if err != nil {
			return "", err
		}
		for _, name := range []corev1.ResourceName{corev1.ResourceCPU, corev1.ResourceMemory,
			corev1.ResourceEphemeralStorage} {
			most, has := limits[name]
			if set := subject.Resources.Limits[name]; !set.IsZero() || !has {
				continue
			}
			if subject.Resources.Limits == nil {
				subject.Resources.Limits = corev1.ResourceList{}
			}
			subject.Resources.Limits[name] = most
		}
	}
	value, err := resource.ExtractContainerResourceValue(ref, subject)
	if err != nil {
		return "", missing{err}
	}
	return value, nil
}

// limits returns the limits of a container without limits of its own: the pod's, or else the
// node's.
func (r *Reader) limits(ctx context.Context) (corev1.ResourceList, error) {
	if r.node == nil {
		node := &corev1.Node{}
		if err := r.from.Get(ctx, client.ObjectKey{Name: r.pod.Spec.NodeName}, node); err != nil {
			return nil, fmt.Errorf("reading node %s: %w", r.pod.Spec.NodeName, err)
		}
		r.node = node
	}
	limits := r.node.Status.Allocatable.DeepCopy()
	if of := r.pod.Spec.Resources; of != nil {
		for _, name := range []corev1.ResourceName{corev1.ResourceCPU, corev1.ResourceMemory} {
			if _, has := limits[name]; has && !of.Limits.Name(name, "").IsZero() {
				limits[name] = of.Limits[name]
			}
		}
	}
	return limits, nil
}

// allocated returns a copy of the container with the resources that kubelet uses: those of the
// spec, unless a resize is waiting (KEP-1287).
func (r *Reader) allocated(c *corev1.Container) *corev1.Container {
	c = c.DeepCopy()
	waits := slices.ContainsFunc(r.pod.Status.Conditions, func(p corev1.PodCondition) bool {
		return p.Type == corev1.PodResizePending && p.Status == corev1.ConditionTrue
	})
	if !waits {
		return c
	}
	for _, list := range [][]corev1.ContainerStatus{r.pod.Status.ContainerStatuses,
		r.pod.Status.InitContainerStatuses} {
		for _, s := range list {
			if s.Name == c.Name && s.Resources != nil {
				c.Resources.Limits, c.Resources.Requests = s.Resources.Limits.DeepCopy(),
					s.Resources.Requests.DeepCopy()
			}
		}
	}
	return c
}

// hasDevices reports whether a device plugin may serve the container: only device plugins serve
// resources whose names have a domain of their own.
func hasDevices(c *corev1.Container) bool {
	for _, list := range []corev1.ResourceList{c.Resources.Limits, c.Resources.Requests} {
		for name := range list {
			if strings.Contains(string(name), "/") &&
				!strings.HasPrefix(string(name), corev1.ResourceDefaultNamespacePrefix) {
				return true
			}
		}
	}
	return false
}

// serviceVariables returns the variables of the services that the pod's containers learn of
// (kubelet_pods.go getServiceEnvVarMap).
func (r *Reader) serviceVariables(ctx context.Context) ([]*opsv1.Variable, error) {
	if r.listed {
		return r.services, nil
	}
	services := map[string]*corev1.Service{}
	if links := r.pod.Spec.EnableServiceLinks; links == nil || *links {
		var list corev1.ServiceList
		if err := r.from.List(ctx, &list, client.InNamespace(r.pod.Namespace)); err != nil {
			return nil, fmt.Errorf("listing the services of namespace %s: %w", r.pod.Namespace, err)
		}
		for i := range list.Items {
			services[list.Items[i].Name] = &list.Items[i]
		}
	}
	if _, own := services[apiServer]; !own || !hasIP(services[apiServer]) {
		var master corev1.Service
		err := r.from.Get(ctx, client.ObjectKey{Namespace: metav1.NamespaceDefault, Name: apiServer}, &master)
		switch {
		case err == nil:
			services[apiServer] = &master
		case !apierrors.IsNotFound(err):
			return nil, fmt.Errorf("reading service %s/%s: %w", metav1.NamespaceDefault, apiServer, err)
		}
	}
	r.listed = true
	for _, name := range sets.List(sets.KeySet(services)) {
		if hasIP(services[name]) {
			r.services = append(r.services, variablesOf(services[name])...)
		}
	}
	return r.services, nil
}
