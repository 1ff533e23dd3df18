// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package accept

import (
	"context"
	"fmt"

	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	"sigs.k8s.io/controller-runtime/pkg/client"

	appsv1alpha1 "github.com/cri-proxy/cri-proxy/api/apps/v1alpha1"
	"github.com/cri-proxy/cri-proxy/controller/apierror"
	"github.com/cri-proxy/cri-proxy/controller/jobbudget"
)

// Check says whether a new request could be carried out as the cluster is now. It makes the checks
// that the reconciler makes when it accepts a request. The error is a *[apierror.SpecError] if the
// user can correct it.
func Check(ctx context.Context, from client.Reader, crr *appsv1alpha1.ContainerRecreateRequest) error {
	_, _, err := Read(ctx, from, from, crr)
	if why := Refused(err); why != nil {
		return &apierror.SpecError{Message: why.Error()}
	}
	return err
}

// CheckUpdate says whether a request may be changed: what it was accepted for may not. The schema
// keeps the spec from being changed. The error is a *[apierror.SpecError].
func CheckUpdate(before, after *appsv1alpha1.ContainerRecreateRequest) error {
	if Of(before) == nil {
		return nil
	}
	for _, key := range []string{appsv1alpha1.PodUIDLabel, appsv1alpha1.NodeNameLabel} {
		if was := before.Labels[key]; was != "" && after.Labels[key] != was {
			return &apierror.SpecError{Immutable: true, Message: fmt.Sprintf("label %s is immutable: "+
				"it says which pod the request was accepted for; keep its value %q, or create another request", key,
				was)}
		}
	}
	for _, a := range []struct {
		key, why string
		add      bool // the annotation may be added
	}{
		{acceptedAnnotation, "it says which containers the request was accepted for", false},
		{appsv1alpha1.UnreadyAcquiredAnnotation, "it says since when the pod is out of service", true},
		{appsv1alpha1.RestartOrderAnnotation, "it was read when the request was accepted", false},
		{appsv1alpha1.ParallelRecreateAnnotation, "it was read when the request was accepted", false},
	} {
		was, there := before.Annotations[a.key]
		if is, still := after.Annotations[a.key]; (is != was || still != there) && (there || !a.add) {
			return &apierror.SpecError{Immutable: true, Message: fmt.Sprintf("annotation %s is immutable: "+
				"%s; leave it as it was, or create another ContainerRecreateRequest", a.key, a.why)}
		}
	}
	return nil
}

// Read reads the pod and the node of a request, and past the cache the Job of the pod, and
// accepts the request. It may return the pod of a request that it refuses.
func Read(
	ctx context.Context, from, live client.Reader, crr *appsv1alpha1.ContainerRecreateRequest,
) (*Record, *corev1.Pod, error) {
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

// sparesJob refuses, by a *Refusal, a request that would end the Job of the pod.
func sparesJob(
	ctx context.Context, live client.Reader, crr *appsv1alpha1.ContainerRecreateRequest, pod *corev1.Pod,
) error {
	var names []string
	for _, c := range crr.Spec.Containers {
		if !MayEndJob(crr, StrategyOf(crr.Spec.Strategy, c.Strategy)) {
			names = append(names, c.Name)
		}
	}
	if len(names) == 0 {
		return nil
	}
	why, err := jobbudget.WouldEnd(ctx, live, pod, names)
	if why != "" {
		err = &Refusal{message: OrForce(why)}
	}
	return err
}

// MayEndJob says that the user wants a container restarted although that ends a Job.
func MayEndJob(crr *appsv1alpha1.ContainerRecreateRequest, s Strategy) bool {
	return s.Force || crr.Annotations[jobbudget.IgnoreAnnotation] == "true"
}

// OrForce adds to a refusal the other way out that requests have.
func OrForce(why string) string { return why + ", or set spec.strategy.forceRecreate" }
