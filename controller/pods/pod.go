// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

// Package pods reads pods and changes them: their containers, hooks, probes and readiness gates.
package pods

import (
	"strings"

	corev1 "k8s.io/api/core/v1"
)

// Kind is a kind of container. Kinds differ in whether a container can be restarted in place.
type Kind int

// The kinds of containers. None is the kind of a container that the pod does not have.
const (
	None Kind = iota
	Regular
	Sidecar // an init container with restartPolicy Always
	Init
	Ephemeral
)

// Container finds a container of the pod by name. The container is nil for None and Ephemeral.
func Container(pod *corev1.Pod, name string) (*corev1.Container, Kind) {
	for i := range pod.Spec.Containers {
		if pod.Spec.Containers[i].Name == name {
			return &pod.Spec.Containers[i], Regular
		}
	}
	for i := range pod.Spec.InitContainers {
		if c := &pod.Spec.InitContainers[i]; c.Name == name {
			if isSidecar(c) {
				return c, Sidecar
			}
			return c, Init
		}
	}
	for i := range pod.Spec.EphemeralContainers {
		if pod.Spec.EphemeralContainers[i].Name == name {
			return nil, Ephemeral
		}
	}
	return nil, None
}

// Changeable finds a container that can be changed or restarted in place: a regular one or a
// sidecar. It is nil if the pod has no such container.
func Changeable(pod *corev1.Pod, name string) *corev1.Container {
	if c, kind := Container(pod, name); kind == Regular || kind == Sidecar {
		return c
	}
	return nil
}

func isSidecar(c *corev1.Container) bool {
	return c.RestartPolicy != nil && *c.RestartPolicy == corev1.ContainerRestartPolicyAlways
}

// Names returns the names of the containers that can be restarted in place.
func Names(pod *corev1.Pod) []string {
	var names []string
	for i := range pod.Spec.Containers {
		names = append(names, pod.Spec.Containers[i].Name)
	}
	for i := range pod.Spec.InitContainers {
		if c := &pod.Spec.InitContainers[i]; isSidecar(c) {
			names = append(names, c.Name)
		}
	}
	return names
}

// Status returns the status of a regular or init container, or nil.
func Status(pod *corev1.Pod, name string) *corev1.ContainerStatus {
	for _, list := range [][]corev1.ContainerStatus{pod.Status.ContainerStatuses, pod.Status.InitContainerStatuses} {
		for i := range list {
			if list[i].Name == name {
				return &list[i]
			}
		}
	}
	return nil
}

// Condition returns the pod's condition of a type, or nil.
func Condition(pod *corev1.Pod, kind corev1.PodConditionType) *corev1.PodCondition {
	for i := range pod.Status.Conditions {
		if pod.Status.Conditions[i].Type == kind {
			return &pod.Status.Conditions[i]
		}
	}
	return nil
}

// Active says that the pod is not being deleted and has not ended.
func Active(pod *corev1.Pod) bool { return pod.DeletionTimestamp == nil && !Ended(pod) }

// Ended says that the containers of the pod have ended for good.
func Ended(pod *corev1.Pod) bool {
	return pod.Status.Phase == corev1.PodSucceeded || pod.Status.Phase == corev1.PodFailed
}

// BareID takes the runtime's scheme off a container ID of the pod's status.
func BareID(id string) string {
	if _, bare, ok := strings.Cut(id, "://"); ok {
		return bare
	}
	return id
}

// RunAs returns what the pod says of the user of its container c: whether the user may not be root,
// and which user, nil if the image decides. The container's security context goes before the pod's.
func RunAs(pod *corev1.Pod, c *corev1.Container) (nonRoot bool, user *int64) {
	if s := pod.Spec.SecurityContext; s != nil {
		nonRoot, user = s.RunAsNonRoot != nil && *s.RunAsNonRoot, s.RunAsUser
	}
	if s := c.SecurityContext; s != nil {
		if s.RunAsNonRoot != nil {
			nonRoot = *s.RunAsNonRoot
		}
		if s.RunAsUser != nil {
			user = s.RunAsUser
		}
	}
	return nonRoot, user
}
