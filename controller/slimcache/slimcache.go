// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

// Package slimcache keeps of pods and nodes only what the controllers read. The cache of a large
// cluster is otherwise mostly env, volumes and managed fields.
package slimcache

import (
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"sigs.k8s.io/controller-runtime/pkg/cache"
	"sigs.k8s.io/controller-runtime/pkg/client"

	inplace "github.com/cri-proxy/cri-proxy/api/inplace/v1alpha1"
	"github.com/cri-proxy/cri-proxy/controller/nodes"
	"github.com/cri-proxy/cri-proxy/controller/pods"
)

// Options returns the options of the cache.
func Options() cache.Options {
	return cache.Options{
		DefaultTransform: cache.TransformStripManagedFields(),
		ByObject: map[client.Object]cache.ByObject{
			&corev1.Pod{}:  {Transform: slimPod},
			&corev1.Node{}: {Transform: slimNode},
		},
	}
}

// slimPod is a cache transform. It returns any other object as it is.
func slimPod(in any) (any, error) {
	pod, ok := in.(*corev1.Pod)
	if !ok {
		return in, nil
	}
	slim := &corev1.Pod{
		ObjectMeta: slimMeta(&pod.ObjectMeta,
			corev1.MirrorPodAnnotationKey, inplace.PodStateAnnotation, pods.NudgeAnnotation),
	}
	slim.Labels, slim.OwnerReferences, slim.CreationTimestamp = pod.Labels, pod.OwnerReferences, pod.CreationTimestamp
	slim.Spec.ServiceAccountName, slim.Spec.ImagePullSecrets = pod.Spec.ServiceAccountName, pod.Spec.ImagePullSecrets
	if s := pod.Spec.SecurityContext; s != nil {
		slim.Spec.SecurityContext = &corev1.PodSecurityContext{RunAsNonRoot: s.RunAsNonRoot, RunAsUser: s.RunAsUser}
	}
	slim.Spec.TerminationGracePeriodSeconds = pod.Spec.TerminationGracePeriodSeconds
	slim.Spec.NodeName, slim.Spec.RestartPolicy = pod.Spec.NodeName, pod.Spec.RestartPolicy
	slim.Spec.ReadinessGates = pod.Spec.ReadinessGates
	containers := func(list []corev1.Container) []corev1.Container {
		var slim []corev1.Container
		for _, c := range list {
			kept := corev1.Container{
				Name: c.Name, Image: c.Image, ImagePullPolicy: c.ImagePullPolicy, Ports: c.Ports,
				Lifecycle:     c.Lifecycle,
				RestartPolicy: c.RestartPolicy, RestartPolicyRules: c.RestartPolicyRules,
				StartupProbe: slimProbe(c.StartupProbe), ReadinessProbe: slimProbe(c.ReadinessProbe),
			}
			if s := c.SecurityContext; s != nil {
				kept.SecurityContext = &corev1.SecurityContext{RunAsNonRoot: s.RunAsNonRoot, RunAsUser: s.RunAsUser}
			}
			slim = append(slim, kept)
		}
		return slim
	}
	slim.Spec.Containers, slim.Spec.InitContainers = containers(pod.Spec.Containers),
		containers(pod.Spec.InitContainers)
	for _, c := range pod.Spec.EphemeralContainers {
		slim.Spec.EphemeralContainers = append(slim.Spec.EphemeralContainers,
			corev1.EphemeralContainer{EphemeralContainerCommon: corev1.EphemeralContainerCommon{Name: c.Name}})
	}
	statuses := func(list []corev1.ContainerStatus) []corev1.ContainerStatus {
		var slim []corev1.ContainerStatus
		for _, c := range list {
			slim = append(slim, corev1.ContainerStatus{
				Name: c.Name, State: c.State, Ready: c.Ready, Started: c.Started, RestartCount: c.RestartCount,
				ContainerID: c.ContainerID, Image: c.Image, ImageID: c.ImageID,
				LastTerminationState: c.LastTerminationState,
			})
		}
		return slim
	}
	slim.Status.Phase, slim.Status.Conditions, slim.Status.PodIP = pod.Status.Phase,
		pod.Status.Conditions, pod.Status.PodIP
	slim.Status.ContainerStatuses = statuses(pod.Status.ContainerStatuses)
	slim.Status.InitContainerStatuses = statuses(pod.Status.InitContainerStatuses)
	return slim, nil
}

// slimProbe keeps when the probe is due.
func slimProbe(p *corev1.Probe) *corev1.Probe {
	if p == nil {
		return nil
	}
	return &corev1.Probe{PeriodSeconds: p.PeriodSeconds, InitialDelaySeconds: p.InitialDelaySeconds}
}

// slimNode is a cache transform. It returns any other object as it is.
func slimNode(in any) (any, error) {
	node, ok := in.(*corev1.Node)
	if !ok {
		return in, nil
	}
	slim := &corev1.Node{ObjectMeta: slimMeta(&node.ObjectMeta, nodes.AddressAnnotation)}
	slim.Labels = node.Labels
	slim.Status.Addresses, slim.Status.NodeInfo.KubeletVersion = node.Status.Addresses,
		node.Status.NodeInfo.KubeletVersion
	for _, c := range node.Status.Conditions {
		if c.Type == corev1.NodeReady || c.Type == nodes.BypassedCondition {
			// Without the times: a heartbeat is no change.
			slim.Status.Conditions = append(slim.Status.Conditions, corev1.NodeCondition{
				Type: c.Type, Status: c.Status, Reason: c.Reason, Message: c.Message,
			})
		}
	}
	return slim, nil
}

// slimMeta keeps the named annotations, and what identifies the object.
func slimMeta(m *metav1.ObjectMeta, annotations ...string) metav1.ObjectMeta {
	slim := metav1.ObjectMeta{
		Namespace: m.Namespace, Name: m.Name, UID: m.UID, ResourceVersion: m.ResourceVersion,
		DeletionTimestamp: m.DeletionTimestamp,
	}
	for _, key := range annotations {
		if value, ok := m.Annotations[key]; ok {
			if slim.Annotations == nil {
				slim.Annotations = map[string]string{}
			}
			slim.Annotations[key] = value
		}
	}
	return slim
}
