// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

// Package accept decides whether a ContainerRecreateRequest can be carried out, and pins what the
// request is about. The reconciler and the webhooks use the same checks.
package accept

import (
	"encoding/json"
	"errors"
	"fmt"
	"strings"
	"time"

	corev1 "k8s.io/api/core/v1"

	appsv1alpha1 "github.com/cri-proxy/cri-proxy/api/apps/v1alpha1"
	"github.com/cri-proxy/cri-proxy/controller/objects"
	"github.com/cri-proxy/cri-proxy/controller/pods"
)

// acceptedAnnotation records once what the request was accepted for. The statusContext that clients
// read from the spec is a copy: applying the same manifest again removes it, and must not change
// what is restarted.
const acceptedAnnotation = "cri-proxy.io/accepted"

// Finalizer keeps a deleted request until its operations are cancelled.
const Finalizer = "cri-proxy.io/operation"

// Identity identifies a container of a pod: its ID, and how often it had been restarted.
type Identity = appsv1alpha1.ContainerRecreateRequestContainerContext

// Record is the value of acceptedAnnotation.
type Record struct {
	// Request is the UID of the request: an annotation copied from another request does not count.
	Request    string              `json:"request"`
	PodUID     string              `json:"podUID"`
	NodeName   string              `json:"nodeName"`
	Containers map[string]Identity `json:"containers"`
	// StartFirst is what RestartOrderAnnotation asked for.
	StartFirst bool `json:"startFirst,omitempty"`
	// Parallel is what ParallelRecreateAnnotation asked for.
	Parallel bool `json:"parallel,omitempty"`
}

// Of reads the annotation. It returns nil when the request has not been accepted.
func Of(crr *appsv1alpha1.ContainerRecreateRequest) *Record {
	var a Record
	if json.Unmarshal([]byte(crr.Annotations[acceptedAnnotation]), &a) != nil || a.Request != string(crr.UID) {
		return nil
	}
	return &a
}

// Refusal says why a request cannot be carried out: as a whole, or which containers are wrong.
type Refusal struct {
	message    string
	containers map[string]string
}

// refuse returns a refusal of the whole request.
func refuse(format string, args ...any) *Refusal {
	return &Refusal{message: fmt.Sprintf(format, args...)}
}

// Error implements error.
func (r *Refusal) Error() string {
	if r.message != "" {
		return r.message
	}
	var wrong []string
	for _, name := range objects.SortedKeys(r.containers) {
		wrong = append(wrong, r.containers[name])
	}
	return strings.Join(wrong, "; ")
}

// State is the final state of one container of a refused request.
func (r *Refusal) State(name string) appsv1alpha1.ContainerRecreateRequestContainerRecreateState {
	message := r.containers[name]
	if message == "" {
		message = "not recreated: " + r.Error()
	}
	return appsv1alpha1.ContainerRecreateRequestContainerRecreateState{Name: name,
		Phase: appsv1alpha1.ContainerRecreateRequestFailed, Message: message}
}

// accept checks what only the cluster knows, and pins the pod, the node and the containers. pod and
// node are nil when there is none of that name. The error is a *Refusal that says what is wrong and
// what to do.
func accept(crr *appsv1alpha1.ContainerRecreateRequest, pod *corev1.Pod, node *corev1.Node) (*Record, error) {
	where := crr.Namespace + "/" + crr.Spec.PodName
	switch {
	case pod == nil:
		return nil, refuse("no pod %s: podName must name a pod in the namespace of the request", where)
	case pod.DeletionTimestamp != nil:
		return nil, refuse("pod %s is being deleted: its containers are not recreated", where)
	case pods.Ended(pod):
		return nil, refuse("pod %s has ended (phase %s): only containers of an active pod can be recreated",
			where, pod.Status.Phase)
	case pod.Spec.NodeName == "":
		return nil, refuse("pod %s is not on a node yet (phase %s): create the request once it runs",
			where, pod.Status.Phase)
	case node == nil:
		return nil, refuse("node %s of pod %s does not exist", pod.Spec.NodeName, where)
	}
	startFirst, err := startFirstOf(crr)
	if err != nil {
		return nil, err
	}
	parallel, err := parallelOf(crr)
	if err != nil {
		return nil, err
	}
	a := &Record{
		Request: string(crr.UID), PodUID: string(pod.UID), NodeName: pod.Spec.NodeName,
		StartFirst: startFirst, Parallel: parallel, Containers: map[string]Identity{},
	}
	wrong := map[string]string{}
	for _, c := range crr.Spec.Containers {
		if _, twice := a.Containers[c.Name]; twice {
			wrong[c.Name] = fmt.Sprintf("container %s is listed twice: list it once", c.Name)
			continue
		}
		pinned, err := identify(pod, c.Name)
		if err == nil {
			pinned, err = asFilled(crr, &c, pod, pinned)
		}
		if err != nil {
			wrong[c.Name] = err.Error()
		} else if s := StrategyOf(crr.Spec.Strategy, c.Strategy); startFirst && s.MinStarted > maxMinReady {
			wrong[c.Name] = fmt.Sprintf("container %s: minStartedSeconds is %d, and at most %d with annotation %s: %s",
				c.Name, s.MinStarted/time.Second, maxMinReady/time.Second,
				appsv1alpha1.RestartOrderAnnotation, appsv1alpha1.RestartOrderStartFirst)
		}
		a.Containers[c.Name] = pinned
	}
	if len(wrong) > 0 {
		return nil, &Refusal{containers: wrong}
	}
	return a, nil
}

// maxMinReady is the longest ContainerRestart.min_ready_seconds that a node accepts.
const maxMinReady = time.Hour

// startFirstOf reads RestartOrderAnnotation; the error is a *Refusal.
func startFirstOf(crr *appsv1alpha1.ContainerRecreateRequest) (bool, error) {
	order, ok := crr.Annotations[appsv1alpha1.RestartOrderAnnotation]
	switch {
	case !ok || order == appsv1alpha1.RestartOrderStopFirst:
		return false, nil
	case order == appsv1alpha1.RestartOrderStartFirst:
		return true, nil
	}
	return false, refuse("annotation %s is %q: it must be %s or %s, or left out", appsv1alpha1.RestartOrderAnnotation,
		order, appsv1alpha1.RestartOrderStopFirst, appsv1alpha1.RestartOrderStartFirst)
}

// parallelOf reads ParallelRecreateAnnotation; the error is a *Refusal.
func parallelOf(crr *appsv1alpha1.ContainerRecreateRequest) (bool, error) {
	switch value, ok := crr.Annotations[appsv1alpha1.ParallelRecreateAnnotation]; {
	case !ok || value == "false":
		return false, nil
	case value == "true":
		return true, nil
	default:
		return false, refuse(`annotation %s is %q: it must be "true" or "false", or left out`,
			appsv1alpha1.ParallelRecreateAnnotation, value)
	}
}

// identify returns the identity of a container. The error says why the container cannot be
// recreated.
func identify(pod *corev1.Pod, name string) (Identity, error) {
	var none Identity
	spec, kind := pods.Container(pod, name)
	switch kind {
	case pods.Init:
		return none, fmt.Errorf("container %s is an init container that runs to its end: "+
			"only regular containers and init containers with restartPolicy Always can be recreated", name)
	case pods.Ephemeral:
		return none, fmt.Errorf("container %s is an ephemeral container: it cannot be recreated", name)
	case pods.None:
		others := strings.Join(pods.Names(pod), ", ")
		return none, fmt.Errorf("pod %s has no container %s; it has %s", pod.Name, name, others)
	}
	if spec.Lifecycle != nil {
		if _, err := pods.Hook(spec, spec.Lifecycle.PostStart, ""); err != nil {
			return none, fmt.Errorf("container %s has a postStart handler that kubelet would stop the new "+
				"container for "+
				"(%w): correct it in the pod's template", name, err)
		}
	}
	status := pods.Status(pod, spec.Name)
	if status == nil || status.ContainerID == "" {
		why := "no status"
		if status != nil && status.State.Waiting != nil {
			why = status.State.Waiting.Reason
		}
		return none, fmt.Errorf("container %s has not been started yet (%s): "+
			"there is nothing to recreate, wait until it runs", name, why)
	}
	return Identity{ContainerID: status.ContainerID, RestartCount: status.RestartCount}, nil
}

// Pin writes what was accepted into the request: the annotation, the finalizers, and the labels and
// spec.containers[].statusContext, which the webhook has set if it could be asked. Pin removes what
// a copied manifest brought along.
func Pin(crr *appsv1alpha1.ContainerRecreateRequest, a *Record, drains bool) error {
	value, err := json.Marshal(a)
	if err != nil {
		return err
	}
	crr.Labels, crr.Annotations = objects.Writable(crr.Labels), objects.Writable(crr.Annotations)
	crr.Annotations[acceptedAnnotation] = string(value)
	delete(crr.Annotations, appsv1alpha1.UnreadyAcquiredAnnotation)
	delete(crr.Annotations, appsv1alpha1.SyncContainerStatusesAnnotation)
	label(crr.Labels, a.PodUID, a.NodeName)
	crr.Finalizers = objects.Without(crr.Finalizers, Finalizer, appsv1alpha1.UnreadyAcquiredFinalizer)
	crr.Finalizers = append(crr.Finalizers, Finalizer)
	if drains {
		crr.Finalizers = append(crr.Finalizers, appsv1alpha1.UnreadyAcquiredFinalizer)
	}
	for i := range crr.Spec.Containers {
		pinned := a.Containers[crr.Spec.Containers[i].Name]
		crr.Spec.Containers[i].StatusContext = &pinned
	}
	return nil
}

// label sets the labels of an active request.
func label(labels map[string]string, podUID, node string) {
	labels[appsv1alpha1.PodUIDLabel], labels[appsv1alpha1.NodeNameLabel] = podUID, node
	labels[appsv1alpha1.ActiveLabel] = "true"
}

// Refused returns err if it is a *Refusal, else nil.
func Refused(err error) *Refusal {
	var r *Refusal
	if errors.As(err, &r) {
		return r
	}
	return nil
}
