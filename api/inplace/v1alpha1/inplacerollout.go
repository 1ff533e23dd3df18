// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package v1alpha1

import (
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/util/intstr"
)

// InPlaceRolloutSpec says which containers of which pods get which images, and how.
type InPlaceRolloutSpec struct {
	// target chooses the pods. It cannot be changed.
	//
	// +kubebuilder:validation:XValidation:rule="(has(self.podName) ? self.podName : '') == (has(oldSelf.podName) ? oldSelf.podName : '') && has(self.selector) == has(oldSelf.selector) && (has(self.workloadRef) ? self.workloadRef.kind + '/' + self.workloadRef.name : '') == (has(oldSelf.workloadRef) ? oldSelf.workloadRef.kind + '/' + oldSelf.workloadRef.name : '')",message="the target is immutable: create another InPlaceRollout"
	// +required
	Target Target `json:"target"`

	// containers are what changes: regular containers, and init containers with restartPolicy
	// Always.
	//
	// +kubebuilder:validation:MinItems=1
	// +kubebuilder:validation:MaxItems=64
	// +listType=map
	// +listMapKey=name
	// +required
	Containers []ContainerChange `json:"containers"`

	// strategy says how the pods are changed.
	//
	// +kubebuilder:default={}
	// +optional
	Strategy Strategy `json:"strategy,omitempty"`

	// paused begins no further pods. Those that have been begun are finished.
	//
	// +optional
	Paused bool `json:"paused,omitempty"`

	// ttlSecondsAfterFinished deletes the rollout so long after its end. Without it, it stays.
	//
	// +kubebuilder:validation:Minimum=0
	// +optional
	TTLSecondsAfterFinished *int32 `json:"ttlSecondsAfterFinished,omitempty"`
}

// Target chooses pods.
//
// +kubebuilder:validation:XValidation:rule="[has(self.podName), has(self.selector), has(self.workloadRef)].filter(x, x).size() == 1",message="choose the pods by exactly one of podName, selector and workloadRef"
type Target struct {
	// podName is one pod in the rollout's namespace.
	//
	// +kubebuilder:validation:MinLength=1
	// +kubebuilder:validation:MaxLength=253
	// +optional
	PodName string `json:"podName,omitempty"`

	// selector is all pods with these labels in the rollout's namespace, but static pods, which
	// kubelets make by themselves. What owns the pods is not changed: pods that it makes anew have
	// the old images until the rollout changes them too. Use workloadRef for pods of a workload.
	//
	// +kubebuilder:validation:XValidation:rule="has(self.matchLabels) && size(self.matchLabels) > 0 || has(self.matchExpressions) && size(self.matchExpressions) > 0",message="the selector must name a label: an empty one would choose every pod of the namespace"
	// +optional
	Selector *metav1.LabelSelector `json:"selector,omitempty"`

	// workloadRef is a workload in the rollout's namespace. Its template gets the images first,
	// then its pods.
	//
	// +optional
	WorkloadRef *WorkloadRef `json:"workloadRef,omitempty"`
}

// WorkloadRef names a Deployment, or a StatefulSet or DaemonSet with updateStrategy OnDelete.
type WorkloadRef struct {
	// apiVersion is apps/v1.
	//
	// +kubebuilder:validation:Enum=apps/v1
	// +kubebuilder:default=apps/v1
	// +optional
	APIVersion string `json:"apiVersion,omitempty"`

	// kind of the workload.
	//
	// +kubebuilder:validation:Enum=Deployment;StatefulSet;DaemonSet
	// +required
	Kind string `json:"kind"`

	// name of the workload.
	//
	// +kubebuilder:validation:MinLength=1
	// +kubebuilder:validation:MaxLength=253
	// +required
	Name string `json:"name"`
}

// ContainerChange is what happens to one container.
type ContainerChange struct {
	// name of the container.
	//
	// +kubebuilder:validation:MinLength=1
	// +kubebuilder:validation:MaxLength=63
	// +required
	Name string `json:"name"`

	// image is the new image, a reference as in a pod. Without it the container is restarted only.
	// Where a pod has the image already and imagePullPolicy Always, its tag is pulled again, and
	// the container is restarted if the tag names another image by now.
	//
	// +kubebuilder:validation:MinLength=1
	// +kubebuilder:validation:MaxLength=512
	// +kubebuilder:validation:XValidation:rule="self.matches('^((([a-zA-Z0-9]|[a-zA-Z0-9][a-zA-Z0-9-]*[a-zA-Z0-9])([.]([a-zA-Z0-9]|[a-zA-Z0-9][a-zA-Z0-9-]*[a-zA-Z0-9]))*|[[][a-fA-F0-9:]+[]])(:[0-9]+)?/)?[a-z0-9]+(([._]|__|-+)[a-z0-9]+)*(/[a-z0-9]+(([._]|__|-+)[a-z0-9]+)*)*(:[0-9A-Za-z_][0-9A-Za-z_.-]{0,127})?(@[A-Za-z][A-Za-z0-9]*([-_+.][A-Za-z][A-Za-z0-9]*)*:[0-9a-fA-F]{32,})?$')",message="image must be a reference as in a pod: [REGISTRY[:PORT]/]NAME[:TAG][@DIGEST], with the name in lower case"
	// +optional
	Image string `json:"image,omitempty"`
}

// Order says which of the old and the new container of a pod goes first.
//
// +kubebuilder:validation:Enum=StopFirst;StartFirst
type Order string

const (
	// StopFirst never has both running.
	StopFirst Order = "StopFirst"
	// StartFirst starts the new container beside the old one, which is stopped when the new one has
	// run for minReadySeconds. It is for applications that share their ports (SO_REUSEPORT) or have
	// none.
	StartFirst Order = "StartFirst"
)

// FailurePolicy says what becomes of a rollout in which a pod fails.
//
// +kubebuilder:validation:Enum=Rollback;Pause;Continue
type FailurePolicy string

const (
	// Rollback puts the images of before back, in the template too. What is only restarted cannot
	// be undone: then it is Pause.
	Rollback FailurePolicy = "Rollback"
	// Pause begins no further pods, until the containers, the failure policy or RetryAnnotation are
	// changed.
	Pause FailurePolicy = "Pause"
	// Continue goes on with the other pods. Pods that have failed and are not available count
	// against maxUnavailable.
	Continue FailurePolicy = "Continue"
)

// Strategy says how the pods of a rollout are changed.
//
// +kubebuilder:validation:XValidation:rule="(has(self.progressDeadlineSeconds) ? self.progressDeadlineSeconds : 600) > (has(self.minReadySeconds) ? self.minReadySeconds : 0) + (has(self.drainSeconds) ? self.drainSeconds : 0)",message="progressDeadlineSeconds must be greater than minReadySeconds and drainSeconds together: no pod could be in time"
type Strategy struct {
	// maxUnavailable is how many pods may be unavailable at once, whatever the cause: a number from
	// 1, or a percentage of the pods, rounded down but at least one. PodDisruptionBudgets are kept
	// as well. A pod that is not available anyway is changed first.
	//
	// +kubebuilder:default=1
	// +kubebuilder:validation:XIntOrString
	// +kubebuilder:validation:XValidation:rule="type(self) == int ? self >= 1 : self.matches('^(100|[1-9][0-9]?)%$')",message="maxUnavailable must be a number from 1 or a percentage from 1% to 100%"
	// +optional
	MaxUnavailable *intstr.IntOrString `json:"maxUnavailable,omitempty"`

	// partition is how many pods keep what they have: a number, or a percentage of the pods,
	// rounded up. Of a StatefulSet those with the lowest ordinals keep it. Lower it to go on.
	//
	// +kubebuilder:validation:XIntOrString
	// +kubebuilder:validation:XValidation:rule="type(self) == int ? self >= 0 : self.matches('^(100|[1-9]?[0-9])%$')",message="partition must be a number from 0 or a percentage from 0% to 100%"
	// +optional
	Partition *intstr.IntOrString `json:"partition,omitempty"`

	// order is StopFirst or StartFirst.
	//
	// +kubebuilder:default=StopFirst
	// +optional
	Order Order `json:"order,omitempty"`

	// drainSeconds is how long a pod with a readiness gate cri-proxy.io/in-place-ready (or
	// OpenKruise's InPlaceUpdateReady) is out of service before its containers are stopped.
	//
	// +kubebuilder:default=0
	// +kubebuilder:validation:Minimum=0
	// +kubebuilder:validation:Maximum=3600
	// +optional
	DrainSeconds int32 `json:"drainSeconds,omitempty"`

	// minReadySeconds is how long a pod must have been ready to count as available. A container
	// that ends before fails the pod. Of this and the minReadySeconds of the workload that owns the
	// pods the greater counts.
	//
	// +kubebuilder:default=0
	// +kubebuilder:validation:Minimum=0
	// +kubebuilder:validation:Maximum=3600
	// +optional
	MinReadySeconds int32 `json:"minReadySeconds,omitempty"`

	// progressDeadlineSeconds is how long a pod may take to get the image onto its node, and after
	// that to become available. If the workload's own minReadySeconds leave no time, they are
	// added.
	//
	// +kubebuilder:default=600
	// +kubebuilder:validation:Minimum=1
	// +kubebuilder:validation:Maximum=86400
	// +optional
	ProgressDeadlineSeconds int32 `json:"progressDeadlineSeconds,omitempty"`

	// onFailure is Rollback, Pause or Continue. In any case no further pod is begun before the
	// failure is dealt with.
	//
	// +kubebuilder:default=Rollback
	// +optional
	OnFailure FailurePolicy `json:"onFailure,omitempty"`

	// terminationGracePeriodSeconds is the grace of containers that are restarted only. A container
	// that gets a new image is stopped by kubelet, with the grace of the pod.
	//
	// +kubebuilder:validation:Minimum=0
	// +optional
	TerminationGracePeriodSeconds *int64 `json:"terminationGracePeriodSeconds,omitempty"`
}

// InPlaceRolloutStatus is what has come of a rollout.
type InPlaceRolloutStatus struct {
	// observedGeneration is the generation of the spec that this is about; -1 before anybody has
	// looked.
	//
	// +optional
	ObservedGeneration int64 `json:"observedGeneration,omitempty"`

	// observedRevision identifies the containers that this is about.
	//
	// +optional
	ObservedRevision string `json:"observedRevision,omitempty"`

	// failedRevision is the revision that is being rolled back, or was.
	//
	// +optional
	FailedRevision string `json:"failedRevision,omitempty"`

	// desired is how many pods there should be.
	//
	// +kubebuilder:default=0
	// +optional
	Desired int32 `json:"desired"`

	// updated is how many pods have the target images and run them.
	//
	// +kubebuilder:default=0
	// +optional
	Updated int32 `json:"updated"`

	// ready is how many pods are ready.
	//
	// +kubebuilder:default=0
	// +optional
	Ready int32 `json:"ready"`

	// unavailable is how many pods are not available, or are being changed.
	//
	// +kubebuilder:default=0
	// +optional
	Unavailable int32 `json:"unavailable"`

	// failed is how many pods have failed.
	//
	// +kubebuilder:default=0
	// +optional
	Failed int32 `json:"failed"`

	// failures are the first of them, at most 10.
	//
	// +kubebuilder:validation:MaxItems=10
	// +listType=atomic
	// +optional
	Failures []PodFailure `json:"failures,omitempty"`

	// currentImages are the images in the pods' specs, by container; where pods differ, that of
	// most.
	//
	// +optional
	CurrentImages map[string]string `json:"currentImages,omitempty"`

	// targetImages are what the pods are to get, by container.
	//
	// +optional
	TargetImages map[string]string `json:"targetImages,omitempty"`

	// previousImages are the images of before, by container: what a rollback puts back, and what to
	// name to undo the rollout.
	//
	// +optional
	PreviousImages map[string]string `json:"previousImages,omitempty"`

	// startTime is when the containers were taken up.
	//
	// +optional
	StartTime *metav1.Time `json:"startTime,omitempty"`

	// completionTime is when the rollout ended, well or not.
	//
	// +optional
	CompletionTime *metav1.Time `json:"completionTime,omitempty"`

	// lastSuccessTime is when the pods last all had what they were to get. A rollback undoes what
	// was done after that.
	//
	// +optional
	LastSuccessTime *metav1.MicroTime `json:"lastSuccessTime,omitempty"`

	// message says in a sentence how it stands.
	//
	// +optional
	Message string `json:"message,omitempty"`

	// conditions are Complete, Progressing, Available and Degraded, and for kstatus Ready,
	// Reconciling and Stalled.
	//
	// +listType=map
	// +listMapKey=type
	// +optional
	Conditions []metav1.Condition `json:"conditions,omitempty"`
}

// PodFailure is a pod that has failed.
type PodFailure struct {
	// pod is its name.
	Pod string `json:"pod"`
	// node is where it ran.
	//
	// +optional
	Node string `json:"node,omitempty"`
	// reason is a CamelCase word.
	Reason string `json:"reason"`
	// message is for people.
	//
	// +optional
	Message string `json:"message,omitempty"`
}

// InPlaceRollout changes images of running pods, or restarts containers, in place: the pods keep
// their names, addresses, volumes and other containers.
//
// +kubebuilder:object:root=true
// +kubebuilder:resource:shortName=ipr
// +kubebuilder:subresource:status
// +kubebuilder:metadata:labels="app.kubernetes.io/part-of=cri-proxy"
// +kubebuilder:printcolumn:name="DESIRED",type=integer,JSONPath=`.status.desired`
// +kubebuilder:printcolumn:name="UPDATED",type=integer,JSONPath=`.status.updated`
// +kubebuilder:printcolumn:name="READY",type=integer,JSONPath=`.status.ready`
// +kubebuilder:printcolumn:name="UNAVAILABLE",type=integer,JSONPath=`.status.unavailable`
// +kubebuilder:printcolumn:name="FAILED",type=integer,JSONPath=`.status.failed`
// +kubebuilder:printcolumn:name="STATE",type=string,JSONPath=`.status.conditions[?(@.type=="Progressing")].reason`
// +kubebuilder:printcolumn:name="AGE",type=date,JSONPath=`.metadata.creationTimestamp`
// +kubebuilder:printcolumn:name="CONTAINERS",type=string,priority=1,JSONPath=`.spec.containers[*].name`
// +kubebuilder:printcolumn:name="IMAGES",type=string,priority=1,JSONPath=`.spec.containers[*].image`
// +kubebuilder:printcolumn:name="MESSAGE",type=string,priority=1,JSONPath=`.status.message`
type InPlaceRollout struct {
	metav1.TypeMeta   `json:",inline"`
	metav1.ObjectMeta `json:"metadata,omitempty"`

	// +required
	Spec InPlaceRolloutSpec `json:"spec"`
	// +kubebuilder:default={"observedGeneration":-1}
	// +optional
	Status InPlaceRolloutStatus `json:"status,omitempty"`
}

// InPlaceRolloutList is a list of them.
//
// +kubebuilder:object:root=true
type InPlaceRolloutList struct {
	metav1.TypeMeta `json:",inline"`
	metav1.ListMeta `json:"metadata,omitempty"`

	Items []InPlaceRollout `json:"items"`
}
