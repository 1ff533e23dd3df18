// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package controller

import (
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"strings"
	"time"

	corev1 "k8s.io/api/core/v1"

	appsv1alpha1 "github.com/cri-proxy/cri-proxy/api/apps/v1alpha1"
)

// acceptedAnnotation records what the request was accepted for, once. The
// statusContext that clients read from the spec is a copy: applying the same
// manifest again takes that away, and must not change what is restarted.
const acceptedAnnotation = "cri-proxy.io/accepted"

// OperationFinalizer holds a deleted request until its operations are cancelled.
const OperationFinalizer = "cri-proxy.io/operation"

// accepted is the value of acceptedAnnotation.
type accepted struct {
	// Request is the UID of the request: an annotation copied from another one
	// does not count.
	Request    string                                                           `json:"request"`
	PodUID     string                                                           `json:"podUID"`
	NodeName   string                                                           `json:"nodeName"`
	Containers map[string]appsv1alpha1.ContainerRecreateRequestContainerContext `json:"containers"`
	// StartFirst is what RestartOrderAnnotation asked for.
	StartFirst bool `json:"startFirst,omitempty"`
	// Parallel is what ParallelRecreateAnnotation asked for.
	Parallel bool `json:"parallel,omitempty"`
}

// acceptedOf reads the annotation; nil when the request has not been accepted.
func acceptedOf(crr *appsv1alpha1.ContainerRecreateRequest) *accepted {
	var a accepted
	if json.Unmarshal([]byte(crr.Annotations[acceptedAnnotation]), &a) != nil || a.Request != string(crr.UID) {
		return nil
	}
	return &a
}

// refusal says why a request cannot be carried out: as a whole, or which
// containers are wrong.
type refusal struct {
	message    string
	containers map[string]string
}

func (r *refusal) Error() string {
	if r.message != "" {
		return r.message
	}
	var wrong []string
	for _, name := range sortedKeys(r.containers) {
		wrong = append(wrong, r.containers[name])
	}
	return strings.Join(wrong, "; ")
}

// state is the final state of one container of a refused request.
func (r *refusal) state(name string) appsv1alpha1.ContainerRecreateRequestContainerRecreateState {
	message := r.containers[name]
	if message == "" {
		message = "not recreated: " + r.Error()
	}
	return appsv1alpha1.ContainerRecreateRequestContainerRecreateState{Name: name, Phase: failed, Message: message}
}

// accept checks what only the cluster knows and pins the pod, the node and the
// containers. pod and node are nil when there is none of that name; the error is a
// *refusal that says what is wrong and what to do.
func accept(crr *appsv1alpha1.ContainerRecreateRequest, pod *corev1.Pod, node *corev1.Node) (*accepted, error) {
	where := crr.Namespace + "/" + crr.Spec.PodName
	switch {
	case pod == nil:
		return nil, &refusal{message: fmt.Sprintf("no pod %s: podName must name a pod in the namespace of the request", where)}
	case pod.DeletionTimestamp != nil:
		return nil, &refusal{message: fmt.Sprintf("pod %s is being deleted: its containers are not recreated", where)}
	case pod.Status.Phase == corev1.PodSucceeded || pod.Status.Phase == corev1.PodFailed:
		return nil, &refusal{message: fmt.Sprintf("pod %s has ended (phase %s): only containers of an active pod can be recreated", where, pod.Status.Phase)}
	case pod.Spec.NodeName == "":
		return nil, &refusal{message: fmt.Sprintf("pod %s is not on a node yet (phase %s): create the request once it runs", where, pod.Status.Phase)}
	case node == nil:
		return nil, &refusal{message: fmt.Sprintf("node %s of pod %s does not exist", pod.Spec.NodeName, where)}
	}
	startFirst, err := startFirstOf(crr)
	if err != nil {
		return nil, err
	}
	parallel, err := parallelOf(crr)
	if err != nil {
		return nil, err
	}
	a := &accepted{
		Request: string(crr.UID), PodUID: string(pod.UID), NodeName: pod.Spec.NodeName, StartFirst: startFirst, Parallel: parallel,
		Containers: map[string]appsv1alpha1.ContainerRecreateRequestContainerContext{},
	}
	wrong := map[string]string{}
	for _, c := range crr.Spec.Containers {
		if _, twice := a.Containers[c.Name]; twice {
			wrong[c.Name] = fmt.Sprintf("container %s is listed twice: list it once", c.Name)
			continue
		}
		context, err := identify(pod, c.Name)
		if err != nil {
			wrong[c.Name] = err.Error()
		} else if s := strategyOf(crr.Spec.Strategy, c.Strategy); startFirst && s.minStarted > maxMinReady {
			wrong[c.Name] = fmt.Sprintf("container %s: minStartedSeconds is %d, and at most %d with annotation %s: %s",
				c.Name, s.minStarted/time.Second, maxMinReady/time.Second, appsv1alpha1.RestartOrderAnnotation, appsv1alpha1.RestartOrderStartFirst)
		}
		a.Containers[c.Name] = context
	}
	if len(wrong) > 0 {
		return nil, &refusal{containers: wrong}
	}
	return a, nil
}

// maxMinReady is what a node accepts as ContainerRestart.min_ready_seconds.
const maxMinReady = time.Hour

// startFirstOf reads RestartOrderAnnotation; the error is a *refusal.
func startFirstOf(crr *appsv1alpha1.ContainerRecreateRequest) (bool, error) {
	order, ok := crr.Annotations[appsv1alpha1.RestartOrderAnnotation]
	switch {
	case !ok || order == appsv1alpha1.RestartOrderStopFirst:
		return false, nil
	case order == appsv1alpha1.RestartOrderStartFirst:
		return true, nil
	}
	return false, &refusal{message: fmt.Sprintf("annotation %s is %q: it must be %s or %s, or left out",
		appsv1alpha1.RestartOrderAnnotation, order, appsv1alpha1.RestartOrderStopFirst, appsv1alpha1.RestartOrderStartFirst)}
}

// parallelOf reads ParallelRecreateAnnotation; the error is a *refusal.
func parallelOf(crr *appsv1alpha1.ContainerRecreateRequest) (bool, error) {
	switch value, ok := crr.Annotations[appsv1alpha1.ParallelRecreateAnnotation]; {
	case !ok || value == "false":
		return false, nil
	case value == "true":
		return true, nil
	default:
		return false, &refusal{message: fmt.Sprintf(`annotation %s is %q: it must be "true" or "false", or left out`, appsv1alpha1.ParallelRecreateAnnotation, value)}
	}
}

// identify is the identity of a container that can be recreated, or why it cannot.
func identify(pod *corev1.Pod, name string) (appsv1alpha1.ContainerRecreateRequestContainerContext, error) {
	var none appsv1alpha1.ContainerRecreateRequestContainerContext
	spec, kind := containerSpec(pod, name)
	switch kind {
	case kindInit:
		return none, fmt.Errorf("container %s is an init container that runs to its end: only regular containers and init containers with restartPolicy Always can be recreated", name)
	case kindEphemeral:
		return none, fmt.Errorf("container %s is an ephemeral container: it cannot be recreated", name)
	case kindNone:
		return none, fmt.Errorf("pod %s has no container %s; it has %s", pod.Name, name, strings.Join(containerNames(pod), ", "))
	}
	if spec.Lifecycle != nil {
		if _, err := hookOf(spec, spec.Lifecycle.PostStart, ""); err != nil {
			return none, fmt.Errorf("container %s has a postStart handler that kubelet would stop the new container for (%w): correct it in the pod's template", name, err)
		}
	}
	status := containerStatus(pod, spec.Name)
	if status == nil || status.ContainerID == "" {
		why := "no status"
		if status != nil && status.State.Waiting != nil {
			why = status.State.Waiting.Reason
		}
		return none, fmt.Errorf("container %s has not been started yet (%s): there is nothing to recreate, wait until it runs", name, why)
	}
	return appsv1alpha1.ContainerRecreateRequestContainerContext{ContainerID: status.ContainerID, RestartCount: status.RestartCount}, nil
}

// The kinds of containers that differ in whether they can be recreated.
const (
	kindNone = iota
	kindRegular
	kindSidecar
	kindInit
	kindEphemeral
)

// containerSpec finds a container of the pod by name; nil with kindNone and
// kindEphemeral.
func containerSpec(pod *corev1.Pod, name string) (*corev1.Container, int) {
	for i := range pod.Spec.Containers {
		if pod.Spec.Containers[i].Name == name {
			return &pod.Spec.Containers[i], kindRegular
		}
	}
	for i := range pod.Spec.InitContainers {
		if c := &pod.Spec.InitContainers[i]; c.Name == name {
			if c.RestartPolicy != nil && *c.RestartPolicy == corev1.ContainerRestartPolicyAlways {
				return c, kindSidecar
			}
			return c, kindInit
		}
	}
	for i := range pod.Spec.EphemeralContainers {
		if pod.Spec.EphemeralContainers[i].Name == name {
			return nil, kindEphemeral
		}
	}
	return nil, kindNone
}

// containerStatus is the status of a regular container or a sidecar, or nil.
func containerStatus(pod *corev1.Pod, name string) *corev1.ContainerStatus {
	for _, list := range [][]corev1.ContainerStatus{pod.Status.ContainerStatuses, pod.Status.InitContainerStatuses} {
		for i := range list {
			if list[i].Name == name {
				return &list[i]
			}
		}
	}
	return nil
}

// containerNames are the names of the containers that can be recreated.
func containerNames(pod *corev1.Pod) []string {
	var names []string
	for _, c := range pod.Spec.Containers {
		names = append(names, c.Name)
	}
	for _, c := range pod.Spec.InitContainers {
		if c.RestartPolicy != nil && *c.RestartPolicy == corev1.ContainerRestartPolicyAlways {
			names = append(names, c.Name)
		}
	}
	return names
}

// pin writes what was accepted into the request: the annotation, the labels and
// spec.containers[].statusContext that OpenKruise's webhook would set, and the
// finalizers. What a copied manifest brought along is taken away.
func pin(crr *appsv1alpha1.ContainerRecreateRequest, a *accepted, drains bool) error {
	value, err := json.Marshal(a)
	if err != nil {
		return err
	}
	crr.Labels, crr.Annotations = withDefault(crr.Labels), withDefault(crr.Annotations)
	crr.Annotations[acceptedAnnotation] = string(value)
	delete(crr.Annotations, appsv1alpha1.UnreadyAcquiredAnnotation)
	delete(crr.Annotations, appsv1alpha1.SyncContainerStatusesAnnotation)
	label(crr.Labels, a.PodUID, a.NodeName)
	crr.Finalizers = without(crr.Finalizers, OperationFinalizer, appsv1alpha1.UnreadyAcquiredFinalizer)
	crr.Finalizers = append(crr.Finalizers, OperationFinalizer)
	if drains {
		crr.Finalizers = append(crr.Finalizers, appsv1alpha1.UnreadyAcquiredFinalizer)
	}
	for i := range crr.Spec.Containers {
		context := a.Containers[crr.Spec.Containers[i].Name]
		crr.Spec.Containers[i].StatusContext = &context
	}
	return nil
}

// label sets the labels of an active request.
func label(labels map[string]string, podUID, node string) {
	labels[appsv1alpha1.PodUIDLabel], labels[appsv1alpha1.NodeNameLabel], labels[appsv1alpha1.ActiveLabel] = podUID, node, "true"
}

func withDefault(m map[string]string) map[string]string {
	if m == nil {
		return map[string]string{}
	}
	return maps.Clone(m)
}

// refused reports whether err is a *refusal.
func refused(err error) *refusal {
	var r *refusal
	if errors.As(err, &r) {
		return r
	}
	return nil
}
