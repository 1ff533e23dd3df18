// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package evaluate

import (
	corev1 "k8s.io/api/core/v1"

	"github.com/cri-proxy/cri-proxy/controller/pods"
)

// StartupProbed returns the containers with a startupProbe that run as long as the pod does.
func StartupProbed(pod *corev1.Pod) []*corev1.Container {
	var probed []*corev1.Container
	for _, list := range [][]corev1.Container{pod.Spec.Containers, pod.Spec.InitContainers} {
		for i := range list {
			if list[i].StartupProbe == nil {
				continue
			}
			if c := pods.Changeable(pod, list[i].Name); c != nil {
				probed = append(probed, c)
			}
		}
	}
	return probed
}

// RunningIDs returns the IDs of the containers that run, and whether all of them run.
func RunningIDs(pod *corev1.Pod, names []string) (ids map[string]string, running bool) {
	ids, running = map[string]string{}, pod.Spec.NodeName != ""
	for _, name := range names {
		cs := pods.Status(pod, name)
		if cs == nil || cs.State.Running == nil || cs.ContainerID == "" {
			running = false
			continue
		}
		ids[name] = cs.ContainerID
	}
	return ids, running
}
