// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package evaluate

import (
	"strconv"
	"strings"

	corev1 "k8s.io/api/core/v1"
)

// ContainerOf finds a container that can be changed in place: a regular one, or a sidecar, which is an init container with
// restartPolicy Always.
func ContainerOf(pod *corev1.Pod, name string) (c *corev1.Container, sidecar bool) {
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

func StatusOf(pod *corev1.Pod, name string) *corev1.ContainerStatus {
	for _, list := range [][]corev1.ContainerStatus{pod.Status.ContainerStatuses, pod.Status.InitContainerStatuses} {
		for i := range list {
			if list[i].Name == name {
				return &list[i]
			}
		}
	}
	return nil
}

func ConditionOf(pod *corev1.Pod, kind corev1.PodConditionType) *corev1.PodCondition {
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

// Active returns true if the pod has not ended and is not being deleted.
func Active(pod *corev1.Pod) bool {
	return pod.DeletionTimestamp == nil && pod.Status.Phase != corev1.PodSucceeded && pod.Status.Phase != corev1.PodFailed
}

// StartupProbed are the containers with a startupProbe that run at the same time as the others.
func StartupProbed(pod *corev1.Pod) []*corev1.Container {
	var probed []*corev1.Container
	for _, list := range [][]corev1.Container{pod.Spec.Containers, pod.Spec.InitContainers} {
		for i := range list {
			if list[i].StartupProbe == nil {
				continue
			}
			if c, _ := ContainerOf(pod, list[i].Name); c != nil {
				probed = append(probed, c)
			}
		}
	}
	return probed
}

// ContainersOf returns the names of the containers that can be changed in place.
func ContainersOf(pod *corev1.Pod) []string {
	var names []string
	for _, list := range [][]corev1.Container{pod.Spec.Containers, pod.Spec.InitContainers} {
		for i := range list {
			if c, _ := ContainerOf(pod, list[i].Name); c != nil {
				names = append(names, c.Name)
			}
		}
	}
	return names
}

// IdsOf returns the IDs of the containers that run, and whether all of them run.
func IdsOf(pod *corev1.Pod, names []string) (ids map[string]string, running bool) {
	ids, running = map[string]string{}, pod.Spec.NodeName != ""
	for _, name := range names {
		cs := StatusOf(pod, name)
		if cs == nil || cs.State.Running == nil || cs.ContainerID == "" {
			running = false
			continue
		}
		ids[name] = cs.ContainerID
	}
	return ids, running
}

// OrdinalOf returns the number at the end of a name; -1 if there is none.
func OrdinalOf(name string) int {
	n, err := strconv.Atoi(name[strings.LastIndexByte(name, '-')+1:])
	if err != nil {
		return -1
	}
	return n
}
