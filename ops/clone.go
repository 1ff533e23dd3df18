// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package ops

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"os"
	"path"
	"strconv"
	"strings"

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

// terminationMount returns the mount of the termination message file, or nil.
func terminationMount(c *runtimeapi.ContainerConfig) *runtimeapi.Mount {
	at := c.GetAnnotations()[annotationTerminationPath]
	if at == "" {
		return nil
	}
	for _, m := range c.GetMounts() {
		if m.GetContainerPath() == at {
			return m
		}
	}
	return nil
}

// makeTerminationFile creates the successor's termination message file as kubelet does:
// empty and writable for everybody (kuberuntime_container.go makeMounts).
func makeTerminationFile(c *runtimeapi.ContainerConfig) error {
	m := terminationMount(c)
	if m == nil {
		return nil
	}
	f, err := os.OpenFile(m.GetHostPath(), os.O_CREATE|os.O_WRONLY|os.O_TRUNC, 0o666)
	if err != nil {
		return fmt.Errorf("termination message file: %w", err)
	}
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

// requestOf returns the request that made the container: as recorded, or, for one that is older
// than the proxy, put together from the runtime's verbose status.
func (e *Engine) requestOf(ctx context.Context, id, sandbox string) (*runtimeapi.CreateContainerRequest, *runtimeapi.LinuxContainerResources, error) {
	if req := e.records.request(id); req != nil {
		return req, e.records.resources(id), nil
	}
	st, err := e.rt.ContainerStatus(ctx, &runtimeapi.ContainerStatusRequest{ContainerId: id, Verbose: true})
	if err != nil {
		return nil, nil, fmt.Errorf("reading the container's config: %w", err)
	}
	var info struct {
		Config *runtimeapi.ContainerConfig `json:"config"`
	}
	if err := json.Unmarshal([]byte(st.GetInfo()["info"]), &info); err != nil || info.Config == nil {
		return nil, nil, fmt.Errorf("container %s is older than cri-proxy and the runtime does not tell its config: let kubelet restart it once (delete the pod)", id)
	}
	gate.Strip(info.Config)
	for _, m := range info.Config.GetMounts() {
		if m.GetImage() != nil {
			m.HostPath = "" // containerd fills in where it mounted the image volume (container_create.go mutateMounts)
		}
	}
	for _, kv := range info.Config.GetEnvs() {
		if strings.ContainsRune(string(kv.GetValue()), '\ufffd') {
			return nil, nil, fmt.Errorf("container %s is older than cri-proxy and its variable %s is not UTF-8, which the runtime's record cannot tell: let kubelet restart it once (delete the pod)", id, kv.GetKey())
		}
	}
	sb, err := e.rt.PodSandboxStatus(ctx, &runtimeapi.PodSandboxStatusRequest{PodSandboxId: sandbox, Verbose: true})
	if err != nil {
		return nil, nil, fmt.Errorf("reading the sandbox's config: %w", err)
	}
	var sinfo struct {
		Config *runtimeapi.PodSandboxConfig `json:"config"`
	}
	if err := json.Unmarshal([]byte(sb.GetInfo()["info"]), &sinfo); err != nil || sinfo.Config == nil {
		return nil, nil, fmt.Errorf("the runtime does not tell the config of sandbox %s", sandbox)
	}
	applied := st.GetStatus().GetResources().GetLinux()
	if newer := e.records.resources(id); newer != nil {
		applied = newer
	}
	return &runtimeapi.CreateContainerRequest{PodSandboxId: sandbox, Config: info.Config, SandboxConfig: sinfo.Config}, applied, nil
}
