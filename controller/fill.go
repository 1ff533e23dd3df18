// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package controller

import (
	"context"
	"fmt"

	corev1 "k8s.io/api/core/v1"
	apiequality "k8s.io/apimachinery/pkg/api/equality"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"sigs.k8s.io/controller-runtime/pkg/client"

	appsv1alpha1 "github.com/cri-proxy/cri-proxy/api/apps/v1alpha1"
)

// messageReadOnly is what a user is told who sets what FillRecreate fills in.
const messageReadOnly = "preStop, ports and statusContext are read-only: they are taken from the pod, leave them out"

// FillRecreate fills in a new request what OpenKruise's webhook fills in, so that clients find it in what create returns: the
// labels of an active request, each container's statusContext, preStop hook and, for an httpGet hook, ports, and the pod's
// terminationGracePeriodSeconds if the user has set none. A container that cannot be recreated, or a pod that is not there or on
// no node, gives nothing: CheckRecreate says why. A *SpecError says that the user has set what is read-only.
func FillRecreate(ctx context.Context, from client.Reader, crr *appsv1alpha1.ContainerRecreateRequest) error {
	for _, c := range crr.Spec.Containers {
		if c.PreStop != nil || c.Ports != nil || c.StatusContext != nil {
			return &SpecError{Message: messageReadOnly}
		}
	}
	var pod corev1.Pod
	err := from.Get(ctx, client.ObjectKey{Namespace: crr.Namespace, Name: crr.Spec.PodName}, &pod)
	if err != nil || pod.Spec.NodeName == "" {
		return client.IgnoreNotFound(err)
	}
	crr.Labels = withDefault(crr.Labels)
	label(crr.Labels, string(pod.UID), pod.Spec.NodeName)
	for i := range crr.Spec.Containers {
		c := &crr.Spec.Containers[i]
		context, err := identify(&pod, c.Name)
		if err != nil {
			continue
		}
		c.StatusContext = &context
		c.PreStop, c.Ports = hookCopy(&pod, c.Name)
	}
	if crr.Spec.Strategy == nil {
		crr.Spec.Strategy = &appsv1alpha1.ContainerRecreateRequestStrategy{}
	}
	if s, grace := crr.Spec.Strategy, pod.Spec.TerminationGracePeriodSeconds; s.TerminationGracePeriodSeconds == nil && grace != nil && *grace >= 0 {
		s.TerminationGracePeriodSeconds = grace
	}
	return nil
}

// RefillRecreate puts into a changed request what is gone of what has been filled in, by FillRecreate or by the reconciler: a
// manifest that is put in the place of the request (kubectl replace) has none of it, and changes nothing. It leaves alone what is
// there with another value, which CheckRecreateUpdate and the schema refuse.
func RefillRecreate(ctx context.Context, from client.Reader, before, after *appsv1alpha1.ContainerRecreateRequest) error {
	labels := []string{appsv1alpha1.PodUIDLabel, appsv1alpha1.NodeNameLabel}
	if before.Status.CompletionTime == nil {
		labels = append(labels, appsv1alpha1.ActiveLabel)
	}
	after.Labels = refill(before.Labels, after.Labels, labels...)
	after.Annotations = refill(before.Annotations, after.Annotations,
		acceptedAnnotation, appsv1alpha1.UnreadyAcquiredAnnotation, appsv1alpha1.SyncContainerStatusesAnnotation)

	was := map[string]*appsv1alpha1.ContainerRecreateRequestContainer{}
	for i := range before.Spec.Containers {
		was[before.Spec.Containers[i].Name] = &before.Spec.Containers[i]
	}
	for i := range after.Spec.Containers {
		c := &after.Spec.Containers[i]
		w := was[c.Name]
		if w == nil {
			continue
		}
		if c.StatusContext == nil {
			c.StatusContext = w.StatusContext
		}
		if c.PreStop == nil {
			c.PreStop = w.PreStop
		}
		if c.Ports == nil {
			c.Ports = w.Ports
		}
	}

	if before.Spec.Strategy == nil || before.Spec.Strategy.TerminationGracePeriodSeconds == nil ||
		after.Spec.Strategy != nil && after.Spec.Strategy.TerminationGracePeriodSeconds != nil {
		return nil
	}
	// A period of the user's own, other than the pod's, is not filled in again: without it the request is another one.
	grace := before.Spec.Strategy.TerminationGracePeriodSeconds
	var pod corev1.Pod
	err := from.Get(ctx, client.ObjectKey{Namespace: before.Namespace, Name: before.Spec.PodName}, &pod)
	switch {
	case err != nil && !apierrors.IsNotFound(err):
		return err
	case err == nil && string(pod.UID) == before.Labels[appsv1alpha1.PodUIDLabel] &&
		!apiequality.Semantic.DeepEqual(pod.Spec.TerminationGracePeriodSeconds, grace):
		return nil
	}
	if after.Spec.Strategy == nil {
		after.Spec.Strategy = &appsv1alpha1.ContainerRecreateRequestStrategy{}
	}
	after.Spec.Strategy.TerminationGracePeriodSeconds = grace
	return nil
}

// refill returns after with those of the keys that only before has.
func refill(before, after map[string]string, keys ...string) map[string]string {
	for _, key := range keys {
		value, was := before[key]
		if _, is := after[key]; was && !is {
			after = withDefault(after)
			after[key] = value
		}
	}
	return after
}

// hookCopy is what a request has of the preStop hook of a container of the pod, and the ports if the hook needs them. A sleep has
// no place in a request.
func hookCopy(pod *corev1.Pod, name string) (*appsv1alpha1.ProbeHandler, []corev1.ContainerPort) {
	spec, _ := containerSpec(pod, name)
	if spec == nil || spec.Lifecycle == nil || spec.Lifecycle.PreStop == nil {
		return nil, nil
	}
	hook := spec.Lifecycle.PreStop
	switch {
	case hook.HTTPGet != nil:
		return &appsv1alpha1.ProbeHandler{HTTPGet: hook.HTTPGet}, spec.Ports
	case hook.Exec != nil:
		return &appsv1alpha1.ProbeHandler{Exec: hook.Exec}, nil
	case hook.TCPSocket != nil:
		return &appsv1alpha1.ProbeHandler{TCPSocket: hook.TCPSocket}, nil
	}
	return nil, nil
}

// asFilled is the identity that a container of a request had when the request was created, given the one that it has now. The
// webhook fills it in; where no webhook could be asked nobody has kept the user from writing something else, which is refused.
func asFilled(crr *appsv1alpha1.ContainerRecreateRequest, c *appsv1alpha1.ContainerRecreateRequestContainer, pod *corev1.Pod,
	now appsv1alpha1.ContainerRecreateRequestContainerContext) (appsv1alpha1.ContainerRecreateRequestContainerContext, error) {
	hook, ports := hookCopy(pod, c.Name)
	// OpenKruise fills in a handler of nothing for a sleep.
	if c.PreStop != nil && *c.PreStop != (appsv1alpha1.ProbeHandler{}) && !apiequality.Semantic.DeepEqual(c.PreStop, hook) || c.Ports != nil && !apiequality.Semantic.DeepEqual(c.Ports, ports) {
		return now, fmt.Errorf("container %s: preStop or ports is not what the pod has: %s", c.Name, messageReadOnly)
	}
	if c.StatusContext == nil || *c.StatusContext == now {
		return now, nil
	}
	// It has been replaced since the request was created, or that is somebody's invention.
	if c.StatusContext.RestartCount < now.RestartCount && !startedBefore(containerStatus(pod, c.Name), crr.CreationTimestamp) {
		return *c.StatusContext, nil
	}
	if c.StatusContext.RestartCount < now.RestartCount && crr.Labels[appsv1alpha1.PodUIDLabel] == string(pod.UID) {
		// Filled in, most likely, from what a pod's status said that did not show the restart yet.
		return now, fmt.Errorf("container %s was restarted at about the time of the request: that was made for %s, and it is %s now; create another request",
			c.Name, c.StatusContext.ContainerID, now.ContainerID)
	}
	return now, fmt.Errorf("container %s: statusContext says %s with %d restarts, and the container was %s with %d when the request was created: %s",
		c.Name, c.StatusContext.ContainerID, c.StatusContext.RestartCount, now.ContainerID, now.RestartCount, messageReadOnly)
}

// startedBefore says whether the container that the status shows was started before a time. Both are in whole seconds.
func startedBefore(s *corev1.ContainerStatus, t metav1.Time) bool {
	switch {
	case s.State.Running != nil:
		return s.State.Running.StartedAt.Before(&t)
	case s.State.Terminated != nil:
		return s.State.Terminated.StartedAt.Before(&t)
	case s.LastTerminationState.Terminated != nil:
		return s.LastTerminationState.Terminated.StartedAt.Before(&t)
	}
	return true
}
