// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package rollout

import (
	"encoding/json"
	"strings"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"

	inplace "github.com/cri-proxy/cri-proxy/api/inplace/v1alpha1"
)

// mark is the value of PodStateAnnotation: what was changed in a pod, in the same write as the change.
type mark struct {
	Rollout  types.UID `json:"rollout"`
	Revision string    `json:"revision"`
	// Operation is the node's, empty when kubelet makes the container without help.
	Operation string           `json:"operation,omitempty"`
	Time      metav1.MicroTime `json:"time"`
	// Containers are those changed or restarted, as they were.
	Containers map[string]was `json:"containers"`
	// There is what admission makes of the goal's images for containers that had that already.
	There rewrites `json:"there,omitempty"`
}

// was is a container before it was changed.
type was struct {
	// Image of the spec, and the image that a rollback puts back: the one before all unfinished changes.
	Image string `json:"image,omitempty"`
	Base  string `json:"base,omitempty"`
	// ID and ImageID of the status.
	ID      string `json:"id,omitempty"`
	ImageID string `json:"imageID,omitempty"`
	rewrite
}

// markOf reads the annotation; nil when there is none of the right form.
func markOf(pod *corev1.Pod) *mark {
	text := pod.Annotations[inplace.PodStateAnnotation]
	if text == "" {
		return nil
	}
	var m mark
	if json.Unmarshal([]byte(text), &m) != nil {
		return nil
	}
	return &m
}

// by says whether the mark is of the goal.
func (m *mark) by(g goal) bool { return m != nil && m.Rollout == g.rollout && m.Revision == g.revision }

// restartUID is what the node calls the restart of the marked containers that keep their images.
func (m *mark) restartUID(pod *corev1.Pod) string {
	ids := map[string]string{}
	for name, old := range m.Containers {
		if c, _ := containerOf(pod, name); c != nil && c.Image == old.Image && old.ID != "" {
			ids[name] = old.ID
		}
	}
	return operationUID("r", goal{rollout: m.Rollout, revision: m.Revision}, pod, ids, 0)
}

// containerOf finds a container that can be changed in place: a regular one, or an init container with restartPolicy Always.
func containerOf(pod *corev1.Pod, name string) (c *corev1.Container, sidecar bool) {
	for i := range pod.Spec.Containers {
		if pod.Spec.Containers[i].Name == name {
			return &pod.Spec.Containers[i], false
		}
	}
	for i := range pod.Spec.InitContainers {
		c := &pod.Spec.InitContainers[i]
		if c.Name == name && c.RestartPolicy != nil && *c.RestartPolicy == corev1.ContainerRestartPolicyAlways {
			return c, true
		}
	}
	return nil, false
}

func statusOf(pod *corev1.Pod, name string) *corev1.ContainerStatus {
	for _, list := range [][]corev1.ContainerStatus{pod.Status.ContainerStatuses, pod.Status.InitContainerStatuses} {
		for i := range list {
			if list[i].Name == name {
				return &list[i]
			}
		}
	}
	return nil
}

func conditionOf(pod *corev1.Pod, kind corev1.PodConditionType) *corev1.PodCondition {
	for i := range pod.Status.Conditions {
		if pod.Status.Conditions[i].Type == kind {
			return &pod.Status.Conditions[i]
		}
	}
	return nil
}

// bareID takes the runtime's scheme off a container ID.
func bareID(id string) string {
	if _, bare, ok := strings.Cut(id, "://"); ok {
		return bare
	}
	return id
}

// active says that the pod is there to stay and has not ended.
func active(pod *corev1.Pod) bool {
	return pod.DeletionTimestamp == nil && pod.Status.Phase != corev1.PodSucceeded && pod.Status.Phase != corev1.PodFailed
}
