// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package pods

import (
	"context"
	"encoding/json"
	"time"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
	"sigs.k8s.io/controller-runtime/pkg/client"

	"github.com/cri-proxy/cri-proxy/controller/retry"
)

// +kubebuilder:rbac:groups="",resources=pods,verbs=patch

// NudgeAnnotation is on a pod that a controller changed so that kubelet looks at the pod again. Its
// value names the container that needed it.
const NudgeAnnotation = "cri-proxy.io/nudge"

// nudgeAfter is how long a new container may be not ready before kubelet is nudged. Where all goes
// well a container takes 20 to 100 ms.
const nudgeAfter = 500 * time.Millisecond

// Nudges makes kubelet probe new containers at once that kubelet has missed to probe.
//
// When kubelet finds a new container it triggers the container's readinessProbe at once, outside of
// its period (prober_manager.go UpdatePodStatus, manualTriggerCh). But kubelet does so before it
// has noted the new container in its own status of the pod (kubelet.go SyncPod:
// generateAPIPodStatus, then statusManager.SetPodStatus), from which the probe's worker reads the
// container. A worker that is quicker finds the old container and does nothing, and the new
// container is not ready until the next period. Any change of the pod makes kubelet look at the pod
// again, and then the worker finds the new container.
//
// A container gets one nudge: one that is not ready after it has a reason of its own. Nudges is not
// safe for concurrent use.
type Nudges struct {
	// since is when a container was first found running, started and not ready, by container ID. It
	// is zero after the nudge.
	since map[string]time.Time
}

// Due returns the container, if any, for which to nudge kubelet now, and how long until it may be
// necessary to nudge for another one. containers are those whose startupProbe has passed.
func (n *Nudges) Due(pod *corev1.Pod, containers []string, now time.Time) (container string, wait time.Duration) {
	for _, name := range containers {
		c, _ := Container(pod, name)
		s := Status(pod, name)
		if c == nil || s == nil || c.ReadinessProbe == nil || pod.DeletionTimestamp != nil {
			continue
		}
		if s.State.Running == nil || s.Ready || s.Started == nil || !*s.Started {
			continue
		}
		// kubelet does not probe a container before its initial delay.
		from := s.State.Running.StartedAt.Add(time.Duration(c.ReadinessProbe.InitialDelaySeconds) * time.Second)
		if left := from.Sub(now); left > 0 {
			wait = retry.Sooner(wait, left)
			continue
		}
		since, known := n.since[s.ContainerID]
		if !known {
			if n.since == nil {
				n.since = map[string]time.Time{}
			}
			since = now
			n.since[s.ContainerID] = now
		}
		if since.IsZero() || pod.Annotations[NudgeAnnotation] == nudgeFor(s) {
			continue
		}
		if left := since.Add(nudgeAfter).Sub(now); left > 0 {
			wait = retry.Sooner(wait, left)
		} else if container == "" {
			container = name
		}
	}
	return container, wait
}

// Nudge writes the annotation, once, and returns the pod as the API server has it then.
func (n *Nudges) Nudge(ctx context.Context, to client.Writer, pod *corev1.Pod, container string) (*corev1.Pod, error) {
	s := Status(pod, container)
	// kubelet looks at the whole pod: the nudge serves all its containers.
	for id, since := range n.since {
		if !since.IsZero() && (id == s.ContainerID || has(pod, id)) {
			n.since[id] = time.Time{}
		}
	}
	patch, err := json.Marshal(map[string]any{"metadata": map[string]any{
		"uid": pod.UID, "annotations": map[string]string{NudgeAnnotation: nudgeFor(s)},
	}})
	if err != nil {
		return nil, err
	}
	after := &corev1.Pod{ObjectMeta: metav1.ObjectMeta{Namespace: pod.Namespace, Name: pod.Name}}
	return after, to.Patch(ctx, after, client.RawPatch(types.StrategicMergePatchType, patch))
}

// has says that the pod has a container of that ID.
func has(pod *corev1.Pod, id string) bool {
	for _, list := range [][]corev1.ContainerStatus{pod.Status.ContainerStatuses, pod.Status.InitContainerStatuses} {
		for i := range list {
			if list[i].ContainerID == id {
				return true
			}
		}
	}
	return false
}

// nudgeFor is the annotation's value: short, and different for each container.
func nudgeFor(s *corev1.ContainerStatus) string {
	id := BareID(s.ContainerID)
	return id[:min(len(id), 12)]
}
