// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package crinode

import (
	"context"
	"strconv"
	"strings"

	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	opsv1 "github.com/cri-proxy/cri-proxy/api/ops/v1"
	"github.com/cri-proxy/cri-proxy/ops/criclone"
	"github.com/cri-proxy/cri-proxy/ops/operation"
)

// Target is a running container that an operation can replace.
type Target struct {
	Sandbox, Incumbent string // their IDs
	Attempt            uint32 // of the successor
}

// Sandbox returns the pod's running sandbox. It returns a [*operation.Outcome] if the pod has none,
// and other errors for the runtime's.
func (c *Client) Sandbox(ctx context.Context, pod *opsv1.PodRef) (*runtimeapi.PodSandbox, error) {
	labels := map[string]string{
		criclone.LabelPodNamespace: pod.GetNamespace(), criclone.LabelPodName: pod.GetName(),
	}
	if pod.GetUid() != "" {
		labels[criclone.LabelPodUID] = pod.GetUid()
	}
	list, err := c.Runtime.ListPodSandbox(ctx, &runtimeapi.ListPodSandboxRequest{
		Filter: &runtimeapi.PodSandboxFilter{LabelSelector: labels},
	})
	if err != nil {
		return nil, err
	}
	var newest *runtimeapi.PodSandbox
	for _, s := range list.GetItems() {
		if s.GetState() != runtimeapi.PodSandboxState_SANDBOX_READY {
			continue
		}
		if newest == nil || s.GetCreatedAt() > newest.GetCreatedAt() {
			newest = s
		}
	}
	switch name := pod.GetNamespace() + "/" + pod.GetName(); {
	case newest != nil:
		return newest, nil
	case len(list.GetItems()) > 0:
		return nil, operation.Failf(opsv1.ReasonPodStopping,
			"pod %s has no running sandbox on this node: it has ended or is going away", name)
	case pod.GetUid() != "":
		return nil, operation.Failf(opsv1.ReasonNotFound, "no pod %s with UID %s runs on this node", name, pod.GetUid())
	default:
		return nil, operation.Failf(opsv1.ReasonNotFound, "no pod %s runs on this node", name)
	}
}

// Resolve finds the running container of the pod that want names, and checks the preconditions.
// With force the container may be another than the one that want expects.
//
// It returns a [*operation.Outcome] for what the caller got wrong, and other errors for the
// runtime's.
func (c *Client) Resolve(
	ctx context.Context, pod *opsv1.PodRef, want *opsv1.ContainerRestart, force bool,
) (*Target, error) {
	sandbox, err := c.Sandbox(ctx, pod)
	if err != nil {
		return nil, err
	}
	list, err := c.Runtime.ListContainers(ctx, &runtimeapi.ListContainersRequest{
		Filter: &runtimeapi.ContainerFilter{PodSandboxId: sandbox.GetId()},
	})
	if err != nil {
		return nil, err
	}
	var newest *runtimeapi.Container
	var names []string
	t := &Target{Sandbox: sandbox.GetId()}
	for _, found := range list.GetContainers() {
		name := found.GetLabels()[criclone.LabelContainer]
		if name != want.GetName() {
			if found.GetState() == runtimeapi.ContainerState_CONTAINER_RUNNING {
				names = append(names, name)
			}
			continue
		}
		if newest == nil || found.GetCreatedAt() > newest.GetCreatedAt() {
			newest = found
		}
		t.Attempt = max(t.Attempt, found.GetMetadata().GetAttempt()+1)
		count := found.GetAnnotations()[criclone.AnnotationRestartCount]
		if n, err := strconv.ParseUint(count, 10, 31); err == nil {
			t.Attempt = max(t.Attempt, uint32(n)+1)
		}
	}
	if newest == nil {
		return nil, operation.Failf(opsv1.ReasonNotFound, "pod %s has no container %q; running are: %s",
			pod.GetNamespace()+"/"+pod.GetName(), want.GetName(), strings.Join(names, ", "))
	}
	t.Incumbent = newest.GetId()
	if expected := bareID(want.GetExpectedContainerId()); expected != "" && expected != t.Incumbent && !force {
		return nil, operation.Failf(opsv1.ReasonExpectedIDDiffers,
			"container %q is %s now, not %s: it has been restarted since; "+
				"ask again without an expected ID, or with force", want.GetName(), t.Incumbent, expected)
	}
	if newest.GetState() != runtimeapi.ContainerState_CONTAINER_RUNNING {
		return nil, operation.Failf(opsv1.ReasonContainerNotRunning, "container %q is not running (%s): "+
			"kubelet starts it by its own policy, a restart would not make it faster",
			want.GetName(), stateName(newest.GetState()))
	}
	return t, nil
}

// bareID removes the scheme from an ID as the API server shows it: containerd://ID.
func bareID(id string) string {
	if i := strings.Index(id, "://"); i >= 0 {
		return id[i+len("://"):]
	}
	return id
}

func stateName(s runtimeapi.ContainerState) string {
	return strings.ToLower(strings.TrimPrefix(s.String(), "CONTAINER_"))
}
