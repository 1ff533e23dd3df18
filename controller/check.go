// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package controller

import (
	"context"
	"fmt"

	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	"sigs.k8s.io/controller-runtime/pkg/client"

	appsv1alpha1 "github.com/cri-proxy/cri-proxy/api/apps/v1alpha1"
)

// SpecError is what the user has to correct in an object: its text says what is wrong and what to do.
type SpecError struct {
	Message string
	// Immutable says that the object was right as it was, and must not be changed.
	Immutable bool
}

// Error is the message.
func (e *SpecError) Error() string { return e.Message }

// CheckRecreate says whether a new request could be carried out as the cluster is, by the checks that the reconciler makes when
// it takes the request up. The error is a *SpecError if the user can correct it.
func CheckRecreate(ctx context.Context, from client.Reader, crr *appsv1alpha1.ContainerRecreateRequest) error {
	_, _, err := readAndAccept(ctx, from, from, crr)
	if why := refused(err); why != nil {
		return &SpecError{Message: why.Error()}
	}
	return err
}

// CheckRecreateUpdate says whether a request may be changed: what it was accepted for may not. The schema keeps the spec. The error is a
// *SpecError.
func CheckRecreateUpdate(before, after *appsv1alpha1.ContainerRecreateRequest) error {
	if acceptedOf(before) == nil {
		return nil
	}
	for _, key := range []string{appsv1alpha1.PodUIDLabel, appsv1alpha1.NodeNameLabel} {
		if was := before.Labels[key]; was != "" && after.Labels[key] != was {
			return &SpecError{Immutable: true, Message: fmt.Sprintf("label %s is immutable: it says which pod the request was accepted for; keep its value %q (kubectl apply does, kubectl replace does not)", key, was)}
		}
	}
	for _, a := range []struct {
		key, why string
		add      bool // it may be added
	}{
		{acceptedAnnotation, "it says which containers the request was accepted for", false},
		{appsv1alpha1.UnreadyAcquiredAnnotation, "it says since when the pod is out of service", true},
		{appsv1alpha1.RestartOrderAnnotation, "it was read when the request was accepted", false},
		{appsv1alpha1.ParallelRecreateAnnotation, "it was read when the request was accepted", false},
	} {
		was, there := before.Annotations[a.key]
		if is, still := after.Annotations[a.key]; (is != was || still != there) && (there || !a.add) {
			return &SpecError{Immutable: true, Message: fmt.Sprintf("annotation %s is immutable: %s; leave it as it was, or create another ContainerRecreateRequest", a.key, a.why)}
		}
	}
	return nil
}

// LabelRecreate puts on a new request the labels that it will have when it is accepted, so that clients find them in what create returns.
// The reconciler sets them again. A pod that is not there, or on no node, gives none.
func LabelRecreate(ctx context.Context, from client.Reader, crr *appsv1alpha1.ContainerRecreateRequest) error {
	var pod corev1.Pod
	err := from.Get(ctx, client.ObjectKey{Namespace: crr.Namespace, Name: crr.Spec.PodName}, &pod)
	if err != nil || pod.Spec.NodeName == "" {
		return client.IgnoreNotFound(err)
	}
	crr.Labels = withDefault(crr.Labels)
	label(crr.Labels, string(pod.UID), pod.Spec.NodeName)
	return nil
}

// readAndAccept reads pod and node of a request, and past the cache the Job of the pod, and accepts it. The pod may be there although the
// request is refused.
func readAndAccept(ctx context.Context, from, live client.Reader, crr *appsv1alpha1.ContainerRecreateRequest) (*accepted, *corev1.Pod, error) {
	pod := &corev1.Pod{}
	err := from.Get(ctx, client.ObjectKey{Namespace: crr.Namespace, Name: crr.Spec.PodName}, pod)
	if apierrors.IsNotFound(err) {
		pod = nil
	} else if err != nil {
		return nil, nil, err
	}
	var node *corev1.Node
	if pod != nil && pod.Spec.NodeName != "" {
		node = &corev1.Node{}
		err := from.Get(ctx, client.ObjectKey{Name: pod.Spec.NodeName}, node)
		if apierrors.IsNotFound(err) {
			node = nil
		} else if err != nil {
			return nil, nil, err
		}
	}
	a, err := accept(crr, pod, node)
	if err == nil {
		err = sparesJob(ctx, live, crr, pod)
	}
	return a, pod, err
}

// sparesJob refuses a request that would end the Job of the pod. The error is a *refusal then.
func sparesJob(ctx context.Context, live client.Reader, crr *appsv1alpha1.ContainerRecreateRequest, pod *corev1.Pod) error {
	var names []string
	for _, c := range crr.Spec.Containers {
		if !mayEndJob(crr, strategyOf(crr.Spec.Strategy, c.Strategy)) {
			names = append(names, c.Name)
		}
	}
	if len(names) == 0 {
		return nil
	}
	why, err := WouldEndJob(ctx, live, pod, names)
	if why != "" {
		err = &refusal{message: orForce(why)}
	}
	return err
}

// mayEndJob says that the user wants a container restarted though that ends a Job.
func mayEndJob(crr *appsv1alpha1.ContainerRecreateRequest, s strategy) bool {
	return s.force || crr.Annotations[IgnoreBackoffLimitAnnotation] == "true"
}

// orForce adds to a refusal what requests have besides.
func orForce(why string) string { return why + ", or set spec.strategy.forceRecreate" }
