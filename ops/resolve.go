// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package ops

import (
	"context"
	"strconv"
	"strings"

	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	opsv1 "github.com/cri-proxy/cri-proxy/api/ops/v1"
)

// target is a container that can be restarted.
type target struct {
	sandbox, incumbent string
	attempt            uint32 // of the successor
}

// sandboxOf returns the pod's running sandbox; an outcome if there is none.
func (e *Engine) sandboxOf(ctx context.Context, pod *opsv1.PodRef) (*runtimeapi.PodSandbox, error) {
	labels := map[string]string{labelPodNamespace: pod.GetNamespace(), labelPodName: pod.GetName()}
	if pod.GetUid() != "" {
		labels[labelPodUID] = pod.GetUid()
	}
	list, err := e.rt.ListPodSandbox(ctx, &runtimeapi.ListPodSandboxRequest{Filter: &runtimeapi.PodSandboxFilter{LabelSelector: labels}})
	if err != nil {
		return nil, err
	}
	var newest *runtimeapi.PodSandbox
	for _, s := range list.GetItems() {
		if s.GetState() == runtimeapi.PodSandboxState_SANDBOX_READY && (newest == nil || s.GetCreatedAt() > newest.GetCreatedAt()) {
			newest = s
		}
	}
	switch {
	case newest != nil:
		return newest, nil
	case len(list.GetItems()) > 0:
		return nil, failf(ReasonPodStopping, "pod %s has no running sandbox on this node: it has ended or is going away", podName(pod))
	case pod.GetUid() != "":
		return nil, failf(ReasonNotFound, "no pod %s with UID %s runs on this node", podName(pod), pod.GetUid())
	default:
		return nil, failf(ReasonNotFound, "no pod %s runs on this node", podName(pod))
	}
}

// resolve finds the running container of the slot and checks the preconditions.
// It returns an outcome for what the caller got wrong, and other errors for the runtime's.
func (e *Engine) resolve(ctx context.Context, pod *opsv1.PodRef, want *opsv1.ContainerRestart, force bool) (*target, error) {
	sandbox, err := e.sandboxOf(ctx, pod)
	if err != nil {
		return nil, err
	}
	list, err := e.rt.ListContainers(ctx, &runtimeapi.ListContainersRequest{Filter: &runtimeapi.ContainerFilter{PodSandboxId: sandbox.GetId()}})
	if err != nil {
		return nil, err
	}
	var newest *runtimeapi.Container
	var names []string
	t := &target{sandbox: sandbox.GetId()}
	for _, c := range list.GetContainers() {
		name := c.GetLabels()[labelContainer]
		if name != want.GetName() {
			if c.GetState() == runtimeapi.ContainerState_CONTAINER_RUNNING {
				names = append(names, name)
			}
			continue
		}
		if newest == nil || c.GetCreatedAt() > newest.GetCreatedAt() {
			newest = c
		}
		t.attempt = max(t.attempt, c.GetMetadata().GetAttempt()+1)
		if n, err := strconv.ParseUint(c.GetAnnotations()[annotationRestartCount], 10, 31); err == nil {
			t.attempt = max(t.attempt, uint32(n)+1)
		}
	}
	if newest == nil {
		return nil, failf(ReasonNotFound, "pod %s has no container %q; running are: %s", podName(pod), want.GetName(), strings.Join(names, ", "))
	}
	t.incumbent = newest.GetId()
	if expected := bareID(want.GetExpectedContainerId()); expected != "" && expected != t.incumbent && !force {
		return nil, failf(ReasonExpectedIDDiffers, "container %q is %s now, not %s: it has been restarted since; ask again without an expected ID, or with force", want.GetName(), t.incumbent, expected)
	}
	if newest.GetState() != runtimeapi.ContainerState_CONTAINER_RUNNING {
		return nil, failf(ReasonNotRunning, "container %q is not running (%s): kubelet starts it by its own policy, a restart would not make it faster", want.GetName(), stateName(newest.GetState()))
	}
	return t, nil
}

// bareID takes the scheme off an ID as the API server shows it: containerd://ID.
func bareID(id string) string {
	if i := strings.Index(id, "://"); i >= 0 {
		return id[i+len("://"):]
	}
	return id
}

func stateName(s runtimeapi.ContainerState) string {
	return strings.ToLower(strings.TrimPrefix(s.String(), "CONTAINER_"))
}
