// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package accept

import (
	"context"
	"fmt"

	corev1 "k8s.io/api/core/v1"
	apiequality "k8s.io/apimachinery/pkg/api/equality"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"sigs.k8s.io/controller-runtime/pkg/client"

	appsv1alpha1 "github.com/cri-proxy/cri-proxy/api/apps/v1alpha1"
	"github.com/cri-proxy/cri-proxy/controller/apierror"
	"github.com/cri-proxy/cri-proxy/controller/objects"
	"github.com/cri-proxy/cri-proxy/controller/pods"
)

// messageReadOnly tells a user who sets what Fill fills in.
const messageReadOnly = "preStop, ports and statusContext are read-only: they are taken from the pod, leave them out"

// Fill fills in a new request what OpenKruise's webhook fills in, so that clients find it in what
// create returns: the labels of an active request, each container's statusContext, preStop hook
// and, for an httpGet hook, ports, and the pod's terminationGracePeriodSeconds if the user has set
// none. A container that cannot be recreated, or a pod that is missing or on no node, gives
// nothing: [Check] says why. A *[apierror.SpecError] says that the user has set what is read-only.
func Fill(ctx context.Context, from client.Reader, crr *appsv1alpha1.ContainerRecreateRequest) error {
	for _, c := range crr.Spec.Containers {
		if c.PreStop != nil || c.Ports != nil || c.StatusContext != nil {
			return &apierror.SpecError{Message: messageReadOnly}
		}
	}
	var pod corev1.Pod
	err := from.Get(ctx, client.ObjectKey{Namespace: crr.Namespace, Name: crr.Spec.PodName}, &pod)
	if err != nil || pod.Spec.NodeName == "" {
		return client.IgnoreNotFound(err)
	}
	crr.Labels = objects.Writable(crr.Labels)
	label(crr.Labels, string(pod.UID), pod.Spec.NodeName)
	for i := range crr.Spec.Containers {
		c := &crr.Spec.Containers[i]
		pinned, err := identify(&pod, c.Name)
		if err != nil {
			continue
		}
		c.StatusContext = &pinned
		c.PreStop, c.Ports = hookCopy(&pod, c.Name)
	}
	if crr.Spec.Strategy == nil {
		crr.Spec.Strategy = &appsv1alpha1.ContainerRecreateRequestStrategy{}
	}
	grace := pod.Spec.TerminationGracePeriodSeconds
	if s := crr.Spec.Strategy; s.TerminationGracePeriodSeconds == nil && grace != nil && *grace >= 0 {
		s.TerminationGracePeriodSeconds = grace
	}
	return nil
}

// Refill puts into a changed request what has gone of what [Fill] or the reconciler filled in: a
// manifest that replaces the request (kubectl replace) has none of it, and changes nothing. Refill
// leaves other values alone; [CheckUpdate] and the schema refuse them.
func Refill(ctx context.Context, from client.Reader, before, after *appsv1alpha1.ContainerRecreateRequest) error {
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
	// Do not fill in the user's own period again, which is not the pod's: the user has changed the
	// request.
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

// refill returns after, with the keys added that only before has.
func refill(before, after map[string]string, keys ...string) map[string]string {
	for _, key := range keys {
		value, was := before[key]
		if _, is := after[key]; was && !is {
			after = objects.Writable(after)
			after[key] = value
		}
	}
	return after
}

// hookCopy returns the preStop hook of a container of the pod in the form that requests have, and
// the ports if the hook needs them. A sleep has no place in a request.
func hookCopy(pod *corev1.Pod, name string) (*appsv1alpha1.ProbeHandler, []corev1.ContainerPort) {
	spec, _ := pods.Container(pod, name)
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

// asFilled returns the Identity that a container of a request had when the request was created,
// given the container's Identity now. The webhook fills it in. Where no webhook could be asked the
// user may have written something else, which asFilled refuses.
func asFilled(
	crr *appsv1alpha1.ContainerRecreateRequest, c *appsv1alpha1.ContainerRecreateRequestContainer,
	pod *corev1.Pod, now Identity,
) (Identity, error) {
	hook, ports := hookCopy(pod, c.Name)
	// OpenKruise fills in a handler of nothing for a sleep.
	otherHook := c.PreStop != nil && *c.PreStop != (appsv1alpha1.ProbeHandler{}) &&
		!apiequality.Semantic.DeepEqual(c.PreStop, hook)
	if otherHook || c.Ports != nil && !apiequality.Semantic.DeepEqual(c.Ports, ports) {
		return now, fmt.Errorf("container %s: preStop or ports is not what the pod has: %s", c.Name, messageReadOnly)
	}
	if c.StatusContext == nil || *c.StatusContext == now {
		return now, nil
	}
	// The container has been replaced since the request was created, or somebody invented the
	// context.
	if c.StatusContext.RestartCount < now.RestartCount &&
		!startedBefore(pods.Status(pod, c.Name), crr.CreationTimestamp) {
		return *c.StatusContext, nil
	}
	if c.StatusContext.RestartCount < now.RestartCount && crr.Labels[appsv1alpha1.PodUIDLabel] == string(pod.UID) {
		// Filled in, most likely, from a pod's status that did not show the restart yet.
		return now, fmt.Errorf("container %s was restarted at about the time of the request: "+
			"that was made for %s, and it is %s now; create another request",
			c.Name, c.StatusContext.ContainerID, now.ContainerID)
	}
	return now, fmt.Errorf("container %s: statusContext says %s with %d restarts, and the container was %s with %d "+
		"when the request was created: %s", c.Name, c.StatusContext.ContainerID, c.StatusContext.RestartCount,
		now.ContainerID, now.RestartCount, messageReadOnly)
}

// startedBefore says whether the container in the status was started before t. Both are in whole
// seconds.
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
