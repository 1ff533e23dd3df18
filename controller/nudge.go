// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package controller

import (
	"context"
	"encoding/json"
	"time"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
	"sigs.k8s.io/controller-runtime/pkg/client"
)

// +kubebuilder:rbac:groups="",resources=pods,verbs=patch

// NudgeAnnotation is on a pod whose kubelet was made to look at it again; its value names the
// container that it was for.
const NudgeAnnotation = "cri-proxy.io/nudge"

// nudgeAfter is how long a new container may be not ready until kubelet is nudged. Where all goes
// well it takes 20 to 100 ms.
const nudgeAfter = 500 * time.Millisecond

// Nudges makes kubelet probe new containers at once that it has missed to probe.
//
// When kubelet finds a new container it has its readinessProbe carried out at once, outside of its
// period (prober_manager.go UpdatePodStatus, manualTriggerCh). But it does so before it has noted
// the new container in its own status of the pod (kubelet.go SyncPod: generateAPIPodStatus, then
// statusManager.SetPodStatus), from which the probe's worker takes the container: if the worker is
// quicker, it finds the old one, does nothing, and the new one is not ready until the next period.
// Any change of the pod makes kubelet look at it again, and then the worker finds the new one.
//
// One nudge is all that a container gets: one that is not ready after it has a reason of its own.
// It is not safe for concurrent use.
type Nudges struct {
	// since is when containers were first found running, started and not ready, by their IDs; a
	// zero time is that of one that was nudged for.
	since map[string]time.Time
}

// Due says whether kubelet should be nudged for one of some containers of a pod, and if only time
// is lacking, how long. Of a container whose startupProbe has not passed the caller must not ask.
func (n *Nudges) Due(pod *corev1.Pod, containers []string, now time.Time) (container string, wait time.Duration) {
	for _, name := range containers {
		c, _ := containerSpec(pod, name)
		s := containerStatus(pod, name)
		if c == nil || s == nil || c.ReadinessProbe == nil || pod.DeletionTimestamp != nil {
			continue
		}
		if s.State.Running == nil || s.Ready || !isTrue(s.Started) {
			continue
		}
		// kubelet does not probe it before.
		from := s.State.Running.StartedAt.Add(time.Duration(c.ReadinessProbe.InitialDelaySeconds) * time.Second)
		if left := from.Sub(now); left > 0 {
			wait = sooner(wait, left)
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
			wait = sooner(wait, left)
		} else if container == "" {
			container = name
		}
	}
	return container, wait
}

// Nudge writes the annotation, once. The pod is as the API server has it after that.
func (n *Nudges) Nudge(ctx context.Context, to client.Writer, pod *corev1.Pod, container string) (*corev1.Pod, error) {
	s := containerStatus(pod, container)
	// kubelet looks at the whole pod.
	for id, since := range n.since {
		if !since.IsZero() && (id == s.ContainerID || isOf(pod, id)) {
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

// isOf says that a container ID is one of the pod's that are not ready.
func isOf(pod *corev1.Pod, id string) bool {
	for _, list := range [][]corev1.ContainerStatus{pod.Status.ContainerStatuses, pod.Status.InitContainerStatuses} {
		for i := range list {
			if list[i].ContainerID == id {
				return true
			}
		}
	}
	return false
}

// nudgeFor is the value of the annotation: short, and another one for each container.
func nudgeFor(s *corev1.ContainerStatus) string {
	id := bareID(s.ContainerID)
	return id[:min(len(id), 12)]
}
