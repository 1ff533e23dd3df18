// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package v1beta1

import (
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
)

// Labels, annotations and finalizers of a ContainerRecreateRequest. The keys are
// OpenKruise's.
const (
	// PodUIDLabel holds the UID of the pod the request was accepted for.
	PodUIDLabel = "crr.apps.kruise.io/pod-uid"
	// NodeNameLabel holds the name of that pod's node.
	NodeNameLabel = "crr.apps.kruise.io/node-name"
	// ActiveLabel is "true" from acceptance until completion, then removed.
	ActiveLabel = "crr.apps.kruise.io/active"

	// SyncContainerStatusesAnnotation holds a JSON list of
	// ContainerRecreateRequestSyncContainerStatus: what the pod status says of
	// the new containers. It is v1alpha1's form of status.containerStatusSnapshot.
	SyncContainerStatusesAnnotation = "crr.apps.kruise.io/sync-container-statuses"
	// UnreadyAcquiredAnnotation is the RFC 3339 time at which the pod was taken
	// out of service for this request; unreadyGracePeriodSeconds counts from it.
	// It is v1alpha1's form of the condition PreRecreateGraceCondition.
	UnreadyAcquiredAnnotation = "crr.apps.kruise.io/unready-acquired"
	// UnreadyAcquiredFinalizer is held while this request keeps its pod unready.
	UnreadyAcquiredFinalizer = "crr.apps.kruise.io/unready-acquired"

	// KruisePodReadyConditionType is the pod readiness gate and condition with
	// many writers through which a request takes its pod out of service.
	KruisePodReadyConditionType corev1.PodConditionType = "KruisePodReady"
)

// PreRecreateGraceCondition is the condition that is True once the pod has been taken out of
// service for this request, since its lastTransitionTime; its reason is the same word. It is
// v1beta1's form of UnreadyAcquiredAnnotation.
const PreRecreateGraceCondition = "PreRecreateGrace"

// RestartOrderAnnotation on a ContainerRecreateRequest says which goes first, the new container or
// the end of the old one: RestartOrderStopFirst, as without the annotation, or
// RestartOrderStartFirst. A request with any other value is refused. It is read once, when the
// request is accepted.
const RestartOrderAnnotation = "cri-proxy.io/restart-order"

// Values of RestartOrderAnnotation.
const (
	// RestartOrderStopFirst stops the old container, then lets the new one run: never both.
	RestartOrderStopFirst = "StopFirst"
	// RestartOrderStartFirst starts the new container beside the old one, which is stopped when the
	// new one has run for minStartedSeconds (at most 3600). It is for applications that share their
	// ports (SO_REUSEPORT) or have none. A new container that ends before that fails the request
	// and leaves the old one alone.
	RestartOrderStartFirst = "StartFirst"
)

// ParallelRecreateAnnotation on a ContainerRecreateRequest says whether containers are stopped at
// the same time: "true", or "false", as without the annotation, for one after another. A container
// with orderedRecreate waits for those before it all the same. A request with any other value is
// refused. It is read once, when the request is accepted.
const ParallelRecreateAnnotation = "cri-proxy.io/parallel-recreate"

// ContainerRecreateRequestFailurePolicyType says what a failed container means
// for the containers after it.
//
// +kubebuilder:validation:Enum=Fail;Ignore
type ContainerRecreateRequestFailurePolicyType string

const (
	// ContainerRecreateRequestFailurePolicyFail leaves the containers alone that
	// have not been stopped yet.
	ContainerRecreateRequestFailurePolicyFail ContainerRecreateRequestFailurePolicyType = "Fail"
	// ContainerRecreateRequestFailurePolicyIgnore goes on with the others.
	ContainerRecreateRequestFailurePolicyIgnore ContainerRecreateRequestFailurePolicyType = "Ignore"
)

// ContainerRecreateRequestPhase is the phase of a request or of one of its
// containers. A request is Pending, Recreating and then Completed, which says
// nothing about success; a container is Pending, Recreating and then Succeeded
// or Failed.
//
// +kubebuilder:validation:Enum=Pending;Recreating;Succeeded;Failed;Completed
type ContainerRecreateRequestPhase string

const (
	// ContainerRecreateRequestPending has not stopped anything yet.
	ContainerRecreateRequestPending ContainerRecreateRequestPhase = "Pending"
	// ContainerRecreateRequestRecreating is under way.
	ContainerRecreateRequestRecreating ContainerRecreateRequestPhase = "Recreating"
	// ContainerRecreateRequestSucceeded is the end of a container whose
	// successor is running and ready.
	ContainerRecreateRequestSucceeded ContainerRecreateRequestPhase = "Succeeded"
	// ContainerRecreateRequestFailed is the end of a container that was not
	// recreated or whose successor did not become ready; its message says why.
	ContainerRecreateRequestFailed ContainerRecreateRequestPhase = "Failed"
	// ContainerRecreateRequestCompleted is the end of a request.
	ContainerRecreateRequestCompleted ContainerRecreateRequestPhase = "Completed"
)

// ContainerRecreateRequestSpec says which containers of one pod to recreate, and
// how. It cannot be changed after creation.
//
// +kubebuilder:validation:XValidation:rule="self.podName == oldSelf.podName",message="spec is immutable: podName cannot be changed; create another ContainerRecreateRequest instead"
// +kubebuilder:validation:XValidation:rule="self.containers.map(c, c.name) == oldSelf.containers.map(c, c.name)",message="spec is immutable: containers cannot be added, removed or reordered; create another ContainerRecreateRequest instead"
// +kubebuilder:validation:XValidation:rule="has(self.strategy) == has(oldSelf.strategy) && (!has(self.strategy) || self.strategy == oldSelf.strategy)",message="spec is immutable: strategy cannot be changed; create another ContainerRecreateRequest instead"
// +kubebuilder:validation:XValidation:rule="has(self.activeDeadlineSeconds) == has(oldSelf.activeDeadlineSeconds) && (!has(self.activeDeadlineSeconds) || self.activeDeadlineSeconds == oldSelf.activeDeadlineSeconds)",message="spec is immutable: activeDeadlineSeconds cannot be changed; to stop the request early, delete it"
// +kubebuilder:validation:XValidation:rule="has(self.ttlSecondsAfterFinished) == has(oldSelf.ttlSecondsAfterFinished) && (!has(self.ttlSecondsAfterFinished) || self.ttlSecondsAfterFinished == oldSelf.ttlSecondsAfterFinished)",message="spec is immutable: ttlSecondsAfterFinished cannot be changed; to remove the request early, delete it"
type ContainerRecreateRequestSpec struct {
	// podName is the pod whose containers are recreated, in the namespace of
	// the request.
	//
	// +kubebuilder:validation:MaxLength=253
	// +kubebuilder:validation:XValidation:rule="size(self) > 0",message="podName can not be empty: name a pod in the namespace of the request"
	// +required
	PodName string `json:"podName"`

	// containers are the containers to recreate: regular containers and native
	// sidecars (init containers with restartPolicy Always). They are recreated
	// in the order given here.
	//
	// +kubebuilder:validation:MaxItems=256
	// +kubebuilder:validation:XValidation:rule="size(self) > 0",message="containers list can not be empty: name at least one container of the pod"
	// +listType=map
	// +listMapKey=name
	// +patchMergeKey=name
	// +patchStrategy=merge
	// +required
	Containers []ContainerRecreateRequestContainer `json:"containers" patchStrategy:"merge" patchMergeKey:"name"`

	// strategy says how to recreate the containers.
	//
	// +kubebuilder:default={}
	// +optional
	Strategy *ContainerRecreateRequestStrategy `json:"strategy,omitempty"`

	// activeDeadlineSeconds is the time, in seconds from creation, after which
	// the request completes whatever its state: containers that are not
	// recreated by then fail, and those that have not been stopped are left
	// alone. Unset means no deadline.
	//
	// +kubebuilder:validation:XValidation:rule="self >= 3",message="activeDeadlineSeconds can not be less than 3"
	// +optional
	ActiveDeadlineSeconds *int64 `json:"activeDeadlineSeconds,omitempty"`

	// ttlSecondsAfterFinished is the time, in seconds from completion, after
	// which the request is deleted. Unset keeps it for ever.
	//
	// +optional
	TTLSecondsAfterFinished *int32 `json:"ttlSecondsAfterFinished,omitempty"`
}

// ContainerRecreateRequestContainer is one container to recreate.
//
// +kubebuilder:validation:XValidation:rule="!has(self.preStop) || has(oldSelf.preStop) && self.preStop == oldSelf.preStop",message="preStop is read-only: it is taken from the pod, leave it out"
// +kubebuilder:validation:XValidation:rule="!has(self.ports) || has(oldSelf.ports) && self.ports == oldSelf.ports",message="ports is read-only: they are taken from the pod, leave them out"
// +kubebuilder:validation:XValidation:rule="!has(self.statusContext) || !has(oldSelf.statusContext) || self.statusContext == oldSelf.statusContext",message="statusContext is immutable once it is set"
// +kubebuilder:validation:XValidation:rule="has(self.strategy) == has(oldSelf.strategy) && (!has(self.strategy) || self.strategy == oldSelf.strategy)",message="spec is immutable: the strategy of a container cannot be changed; create another ContainerRecreateRequest instead"
type ContainerRecreateRequestContainer struct {
	// name of the container, unique in the list.
	//
	// +kubebuilder:validation:MinLength=1
	// +kubebuilder:validation:MaxLength=63
	// +required
	Name string `json:"name"`

	// strategy overrides the request's strategy for this container, field by
	// field; a field left out is the request's.
	//
	// +optional
	Strategy *ContainerRecreateRequestContainerStrategy `json:"strategy,omitempty"`

	// preStop is read-only: a copy, made at admission, of the hook in the pod's
	// spec, which is the one that runs. A sleep hook has no place in it.
	//
	// +optional
	PreStop *ProbeHandler `json:"preStop,omitempty"`

	// ports is read-only: a copy, made at admission, of the container's ports
	// in the pod's spec, where an httpGet hook looks its port up.
	//
	// +listType=atomic
	// +optional
	Ports []corev1.ContainerPort `json:"ports,omitempty"`

	// statusContext is read-only: the identity of the container when the
	// request was created, filled in at admission. Without webhooks the
	// controller fills it in when it accepts the request.
	//
	// +optional
	StatusContext *ContainerRecreateRequestContainerContext `json:"statusContext,omitempty"`
}

// ProbeHandler is a container hook as OpenKruise copies it from the pod.
type ProbeHandler struct {
	// exec runs a command in the container.
	//
	// +optional
	Exec *corev1.ExecAction `json:"exec,omitempty"`
	// httpGet sends an HTTP request.
	//
	// +optional
	HTTPGet *corev1.HTTPGetAction `json:"httpGet,omitempty"`
	// tcpSocket is not run, as kubelet does not run it either.
	//
	// +optional
	TCPSocket *corev1.TCPSocketAction `json:"tcpSocket,omitempty"`
}

// ContainerRecreateRequestContainerContext identifies a container as it was when
// the request was created.
type ContainerRecreateRequestContainerContext struct {
	// containerID is the pod status's containerID, as in containerd://<id>.
	//
	// +kubebuilder:validation:MaxLength=512
	// +required
	ContainerID string `json:"containerID"`
	// restartCount is the pod status's restartCount.
	//
	// +required
	RestartCount int32 `json:"restartCount"`
}

// ContainerRecreateRequestStrategy says how to recreate the containers of a
// request.
type ContainerRecreateRequestStrategy struct {
	// failurePolicy decides about the other containers when one fails. Fail
	// leaves those alone that have not been stopped yet; Ignore goes on.
	//
	// +kubebuilder:default=Fail
	// +optional
	FailurePolicy ContainerRecreateRequestFailurePolicyType `json:"failurePolicy,omitempty"`

	// orderedRecreate recreates a container only after the one before it is
	// running and ready again. Otherwise they are stopped one after another, in
	// their order, and what takes their place is not waited for; with annotation
	// cri-proxy.io/parallel-recreate "true" all are recreated at the same time.
	//
	// +optional
	OrderedRecreate bool `json:"orderedRecreate,omitempty"`

	// forceRecreate recreates a container even if it has been replaced since
	// the request was accepted, and even if the restart ends the pod's Job: with
	// restartPolicy OnFailure it counts against the Job's backoffLimit.
	//
	// +optional
	ForceRecreate bool `json:"forceRecreate,omitempty"`

	// terminationGracePeriodSeconds bounds the preStop hook and the stop
	// together; values below 2 count as 2. Unset means the pod's own, which is
	// filled in at admission.
	//
	// +kubebuilder:validation:Minimum=0
	// +optional
	TerminationGracePeriodSeconds *int64 `json:"terminationGracePeriodSeconds,omitempty"`

	// unreadyGracePeriodSeconds takes the pod out of service through its
	// readiness gate KruisePodReady and waits that long before it stops a
	// container. Unset, or a pod without that gate, means no wait.
	//
	// +kubebuilder:validation:Minimum=0
	// +optional
	UnreadyGracePeriodSeconds *int64 `json:"unreadyGracePeriodSeconds,omitempty"`

	// minStartedSeconds is how long a new container must have been running, and
	// be ready, before it counts as Succeeded.
	//
	// +kubebuilder:validation:Minimum=0
	// +optional
	MinStartedSeconds int32 `json:"minStartedSeconds,omitempty"`
}

// ContainerRecreateRequestContainerStrategy is the strategy for one container.
// Each field overrides the one of that name in the request's strategy.
type ContainerRecreateRequestContainerStrategy struct {
	// failurePolicy decides what this container's failure means for the others.
	//
	// +optional
	FailurePolicy ContainerRecreateRequestFailurePolicyType `json:"failurePolicy,omitempty"`

	// orderedRecreate makes this container wait for the ones before it in the
	// list to be running and ready again.
	//
	// +optional
	OrderedRecreate *bool `json:"orderedRecreate,omitempty"`

	// forceRecreate recreates this container even if it has been replaced since
	// the request was accepted, and even if the restart ends the pod's Job: with
	// restartPolicy OnFailure it counts against the Job's backoffLimit.
	//
	// +optional
	ForceRecreate *bool `json:"forceRecreate,omitempty"`

	// terminationGracePeriodSeconds bounds the preStop hook and the stop of
	// this container together.
	//
	// +kubebuilder:validation:Minimum=0
	// +optional
	TerminationGracePeriodSeconds *int64 `json:"terminationGracePeriodSeconds,omitempty"`

	// unreadyGracePeriodSeconds is how long the pod is out of service before
	// this container is stopped.
	//
	// +kubebuilder:validation:Minimum=0
	// +optional
	UnreadyGracePeriodSeconds *int64 `json:"unreadyGracePeriodSeconds,omitempty"`

	// minStartedSeconds is how long the new container must have been running,
	// and be ready, before it counts as Succeeded.
	//
	// +kubebuilder:validation:Minimum=0
	// +optional
	MinStartedSeconds *int32 `json:"minStartedSeconds,omitempty"`
}

// ContainerRecreateRequestStatus is where a request stands.
type ContainerRecreateRequestStatus struct {
	// phase of the request: empty, Pending, Recreating, then Completed.
	//
	// +optional
	Phase ContainerRecreateRequestPhase `json:"phase,omitempty"`

	// completionTime is when the request completed; once set, nothing of the
	// status changes any more.
	//
	// +optional
	CompletionTime *metav1.Time `json:"completionTime,omitempty"`

	// message says why the request stands or completed as it did; empty when
	// all went well.
	//
	// +optional
	Message string `json:"message,omitempty"`

	// containerRecreateStates has one entry for each of spec.containers, in
	// that order.
	//
	// +listType=atomic
	// +optional
	ContainerRecreateStates []ContainerRecreateRequestContainerRecreateState `json:"containerRecreateStates,omitempty"`

	// containerStatusSnapshot is what the pod's status says of the new
	// containers. The annotation crr.apps.kruise.io/sync-container-statuses
	// says the same.
	//
	// +listType=atomic
	// +optional
	ContainerStatusSnapshot []ContainerRecreateRequestSyncContainerStatus `json:"containerStatusSnapshot,omitempty"`

	// observedGeneration is the metadata.generation that this status is about; -1 before anybody
	// has looked.
	//
	// +optional
	ObservedGeneration int64 `json:"observedGeneration,omitempty"`
	// conditions are Ready, Reconciling and Stalled, as kstatus reads them, and
	// PreRecreateGrace: True since the pod was taken out of service for this
	// request, as the annotation crr.apps.kruise.io/unready-acquired says.
	//
	// +listType=map
	// +listMapKey=type
	// +optional
	Conditions []metav1.Condition `json:"conditions,omitempty"`
}

// ContainerRecreateRequestContainerRecreateState is where one container stands.
type ContainerRecreateRequestContainerRecreateState struct {
	// name of the container.
	//
	// +required
	Name string `json:"name"`
	// phase of the container: Pending, Recreating, then Succeeded or Failed.
	//
	// +required
	Phase ContainerRecreateRequestPhase `json:"phase"`
	// message says why the container stands as it does.
	//
	// +optional
	Message string `json:"message,omitempty"`
	// isKilled is true once the node has stopped the container for this request.
	//
	// +optional
	IsKilled bool `json:"isKilled,omitempty"`
}

// ContainerRecreateRequestSyncContainerStatus is what the pod's status says of
// one container: an element of status.containerStatusSnapshot and of the
// annotation sync-container-statuses.
type ContainerRecreateRequestSyncContainerStatus struct {
	// name of the container.
	//
	// +required
	Name string `json:"name"`
	// ready as in the pod status.
	//
	// +required
	Ready bool `json:"ready"`
	// restartCount as in the pod status.
	//
	// +required
	RestartCount int32 `json:"restartCount"`
	// containerID as in the pod status, as in containerd://<id>.
	//
	// +optional
	ContainerID string `json:"containerID,omitempty"`
}

// ContainerRecreateRequest recreates containers of one pod in place: the pod, its
// address and its other containers stay as they are.
//
// +kubebuilder:object:root=true
// +kubebuilder:subresource:status
// +kubebuilder:metadata:labels="app.kubernetes.io/part-of=cri-proxy"
// +kubebuilder:resource:path=containerrecreaterequests,shortName=crr,scope=Namespaced
// +kubebuilder:printcolumn:name="PHASE",type="string",JSONPath=".status.phase",description="Phase of this ContainerRecreateRequest."
// +kubebuilder:printcolumn:name="POD",type="string",JSONPath=".spec.podName",description="Pod name of this ContainerRecreateRequest."
// +kubebuilder:printcolumn:name="NODE",type="string",JSONPath=".metadata.labels.crr\\.apps\\.kruise\\.io/node-name",description="Node name of the pod."
// +kubebuilder:printcolumn:name="AGE",type="date",JSONPath=".metadata.creationTimestamp"
type ContainerRecreateRequest struct {
	metav1.TypeMeta `json:",inline"`
	// +optional
	metav1.ObjectMeta `json:"metadata,omitempty"`

	// spec says what to recreate, and how.
	//
	// +required
	Spec ContainerRecreateRequestSpec `json:"spec"`
	// status says how far that is.
	//
	// +kubebuilder:default={"observedGeneration":-1}
	// +optional
	Status ContainerRecreateRequestStatus `json:"status,omitempty"`
}

// ContainerRecreateRequestList is a list of ContainerRecreateRequest.
//
// +kubebuilder:object:root=true
type ContainerRecreateRequestList struct {
	metav1.TypeMeta `json:",inline"`
	metav1.ListMeta `json:"metadata,omitempty"`
	Items           []ContainerRecreateRequest `json:"items"`
}
