// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package ops

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"os"
	"path"
	"slices"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"
	"google.golang.org/protobuf/proto"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/cri-proxy/cri-proxy/interceptors"
	"github.com/cri-proxy/cri-proxy/ops/gate"
)

// Labels and annotations that kubelet puts on containers and sandboxes
// (pkg/kubelet/kuberuntime/labels.go, k8s.io/kubelet/pkg/types).
const (
	labelPodName      = "io.kubernetes.pod.name"
	labelPodNamespace = "io.kubernetes.pod.namespace"
	labelPodUID       = "io.kubernetes.pod.uid"
	labelContainer    = "io.kubernetes.container.name"

	annotationRestartCount     = "io.kubernetes.container.restartCount"
	annotationTerminationPath  = "io.kubernetes.container.terminationMessagePath"
	annotationPreStop          = "io.kubernetes.container.preStopHandler"
	annotationPorts            = "io.kubernetes.container.ports"
	annotationTerminationGrace = "io.kubernetes.pod.terminationGracePeriod"
)

// cloneFor returns the request that creates the next attempt of the incumbent: what kubelet
// asked for then, with everything changed that kubelet would change on a
// restart (kuberuntime_container.go generateContainerConfig).
func cloneFor(req *runtimeapi.CreateContainerRequest, applied *runtimeapi.LinuxContainerResources, attempt uint32, token string) (*runtimeapi.CreateContainerRequest, error) {
	next := proto.Clone(req).(*runtimeapi.CreateContainerRequest)
	c := next.GetConfig()
	if c.GetMetadata() == nil {
		return nil, errors.New("the recorded request has no container metadata")
	}
	c.Metadata.Attempt = attempt
	c.LogPath = path.Join(path.Dir(c.GetLogPath()), strconv.FormatUint(uint64(attempt), 10)+".log")
	c.Annotations = maps.Clone(c.GetAnnotations())
	if c.Annotations == nil {
		c.Annotations = map[string]string{}
	}
	c.Annotations[annotationRestartCount] = strconv.FormatUint(uint64(attempt), 10)
	c.Annotations[interceptors.StagedAnnotation] = token
	if c.GetLinux() != nil && applied != nil {
		c.Linux.Resources = overlayResources(c.Linux.Resources, applied)
	}
	if m := terminationMount(c); m != nil {
		m.HostPath = path.Join(path.Dir(m.GetHostPath()), terminationFileName(token))
	}
	return next, nil
}

// terminationFileName is kubelet's form: eight hexadecimal digits.
func terminationFileName(token string) string { return token[:8] }

// terminationMount returns kubelet's mount of the termination message file, or nil.
//
// A volume may be mounted at the same place. kubelet appends its own mount to those of the pod
// (kuberuntime_container.go makeMounts), and its file is in the container's directory,
// <root>/pods/<uid>/containers/<name> (kubelet_getters.go getPodContainerDir). The root is --root-dir,
// which CRI does not tell.
func terminationMount(c *runtimeapi.ContainerConfig) *runtimeapi.Mount {
	at := c.GetAnnotations()[annotationTerminationPath]
	uid, name := c.GetLabels()[labelPodUID], c.GetLabels()[labelContainer]
	if at == "" || uid == "" || name == "" {
		return nil
	}
	if !path.IsAbs(at) {
		at = "/" + at // pkg/volume/util MakeAbsolutePath
	}
	dir := path.Join("/pods", uid, "containers", name)
	for _, m := range slices.Backward(c.GetMounts()) {
		if m.GetContainerPath() == at && strings.HasSuffix(path.Dir(m.GetHostPath()), dir) {
			return m
		}
	}
	return nil
}

// makeTerminationFile creates the successor's termination message file as kubelet does:
// empty and writable for everybody (kuberuntime_container.go makeMounts). What is made is in
// kubelet's directory and nowhere that a link leads to.
func makeTerminationFile(c *runtimeapi.ContainerConfig) error {
	m := terminationMount(c)
	if m == nil {
		return nil
	}
	if err := makeFileIn(path.Split(m.GetHostPath())); err != nil {
		return fmt.Errorf("termination message file: %w", err)
	}
	return nil
}

// makeFileIn makes an empty file that everybody may write, or empties the one that is there.
func makeFileIn(dir, name string) error {
	in, err := unix.Open(path.Clean(dir), unix.O_PATH|unix.O_DIRECTORY|unix.O_NOFOLLOW|unix.O_CLOEXEC, 0)
	if err != nil {
		return &os.PathError{Op: "open", Path: dir, Err: err}
	}
	defer func() { _ = unix.Close(in) }()
	// Not to wait for a reader, if it is a FIFO.
	const flags = unix.O_CREAT | unix.O_WRONLY | unix.O_TRUNC | unix.O_NOFOLLOW | unix.O_NONBLOCK | unix.O_CLOEXEC
	fd, err := unix.Openat(in, name, flags, 0o666)
	if err != nil {
		return &os.PathError{Op: "open", Path: path.Join(dir, name), Err: err}
	}
	f := os.NewFile(uintptr(fd), path.Join(dir, name))
	// The umask may have taken bits away.
	return errors.Join(f.Chmod(0o666), f.Close())
}

// overlayResources returns base with every field that over sets.
func overlayResources(base, over *runtimeapi.LinuxContainerResources) *runtimeapi.LinuxContainerResources {
	switch {
	case over == nil:
		return base
	case base == nil:
		return proto.Clone(over).(*runtimeapi.LinuxContainerResources)
	}
	out := proto.Clone(base).(*runtimeapi.LinuxContainerResources)
	over = proto.Clone(over).(*runtimeapi.LinuxContainerResources)
	if len(over.GetHugepageLimits()) > 0 {
		out.HugepageLimits = nil // a list is replaced, not appended to
	}
	proto.Merge(out, over)
	return out
}

// reported returns the resources that the runtime reports of a container: those of its creation and
// all that has been changed since, by whomever. base is what it is known to have been asked for.
// containerd reads them from the OCI spec (internal/cri/server/helpers.go copyResourcesToStatus), in which
// UpdateContainerResources changes what it is given (internal/cri/opts/spec_linux_opts.go WithResources).
func reported(st *runtimeapi.ContainerStatus, base *runtimeapi.LinuxContainerResources) *runtimeapi.LinuxContainerResources {
	if st.GetResources().GetLinux() == nil {
		return nil
	}
	now := proto.Clone(st.GetResources().GetLinux()).(*runtimeapi.LinuxContainerResources)
	// No update changes it, and containerd may have bounded it to its own (restrict_oom_score_adj).
	now.OomScoreAdj = 0
	if base.GetMemorySwapLimitInBytes() == 0 && now.GetMemorySwapLimitInBytes() == now.GetMemoryLimitInBytes() {
		now.MemorySwapLimitInBytes = 0 // containerd's default for a container with a limit
	}
	// Each update appends its own to those before, and the last of a size counts.
	last := map[string]int{}
	for i, l := range now.GetHugepageLimits() {
		last[l.GetPageSize()] = i
	}
	var limits []*runtimeapi.HugepageLimit
	for i, l := range now.GetHugepageLimits() {
		if last[l.GetPageSize()] == i {
			limits = append(limits, l)
		}
	}
	now.HugepageLimits = limits
	return now
}

// requestOf returns the request that made the container: as recorded, or, for one that is older
// than the proxy, put together from the runtime's verbose status.
func (e *Engine) requestOf(ctx context.Context, id, sandbox string) (*runtimeapi.CreateContainerRequest, error) {
	if req := e.records.request(id); req != nil {
		return req, nil
	}
	st, err := e.rt.ContainerStatus(ctx, &runtimeapi.ContainerStatusRequest{ContainerId: id, Verbose: true})
	if err != nil {
		return nil, fmt.Errorf("reading the container's config: %w", err)
	}
	config := &runtimeapi.ContainerConfig{}
	if err := configIn(st.GetInfo(), config); err != nil {
		return nil, fmt.Errorf("container %s is older than cri-proxy and %w: let kubelet restart it once (delete the pod)", id, err)
	}
	gate.Strip(config)
	for _, m := range config.GetMounts() {
		if m.GetImage() != nil {
			m.HostPath = "" // containerd fills in where it mounted the image volume (container_create.go mutateMounts)
		}
	}
	for _, kv := range config.GetEnvs() {
		if strings.ContainsRune(string(kv.GetValue()), '\ufffd') {
			return nil, fmt.Errorf("container %s is older than cri-proxy and its variable %s is not UTF-8, which the runtime's record cannot tell: let kubelet restart it once (delete the pod)", id, kv.GetKey())
		}
	}
	sb, err := e.rt.PodSandboxStatus(ctx, &runtimeapi.PodSandboxStatusRequest{PodSandboxId: sandbox, Verbose: true})
	if err != nil {
		return nil, fmt.Errorf("reading the sandbox's config: %w", err)
	}
	sandboxConfig := &runtimeapi.PodSandboxConfig{}
	if err := configIn(sb.GetInfo(), sandboxConfig); err != nil {
		return nil, fmt.Errorf("of sandbox %s, which is older than cri-proxy, %w: let kubelet make it anew (delete the pod)", sandbox, err)
	}
	return &runtimeapi.CreateContainerRequest{PodSandboxId: sandbox, Config: config, SandboxConfig: sandboxConfig}, nil
}
