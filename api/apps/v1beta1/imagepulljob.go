// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package v1beta1

import (
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/util/intstr"
)

// Annotations of an ImagePullJob. An ImageListPullJob hands them on to its children.
const (
	// PinForAnnotation is how long after a pull kubelet's image garbage collection leaves the image
	// alone: a duration such as 36h, at most 744h (31 days) and what the cluster allows (a week by
	// default); 0s does not pin. Without it, 24h.
	PinForAnnotation = "cri-proxy.io/pin-for"
	// BytesPerSecondAnnotation bounds the transfer on each node: a quantity such as 20Mi.
	BytesPerSecondAnnotation = "cri-proxy.io/bytes-per-second"
)

// KeepPinsAnnotation is on a job that is about to be deleted because the time of its list is over:
// what was pulled is to be used.
const KeepPinsAnnotation = "cri-proxy.io/keep-pins"

// Finalizers of an ImagePullJob.
const (
	// PullFinalizer holds a job that is deleted before its end, until its pulls are cancelled and
	// its pins released. A job that has ended holds nothing: the pins of one that is deleted are
	// released if the controller is there, and end by themselves if not.
	PullFinalizer = "cri-proxy.io/image-pull"
	// DeletionProtectionFinalizer is OpenKruise's. It is never set here, but taken off: a job that
	// was made under OpenKruise can be deleted.
	DeletionProtectionFinalizer = "apps.kruise.io/deletion-protection"
)

// Conditions of an ImagePullJob.
const (
	// ConditionComplete is True once the job has ended, well or not; its reason says how.
	ConditionComplete = "Complete"
	// ConditionSucceeded is set with ConditionComplete: True when there are nodes and all have the
	// image.
	ConditionSucceeded = "Succeeded"
	// ConditionPullSecretsFound is False when a secret is missing, cannot be used or has no
	// credentials. It is there only for a job with secrets.
	ConditionPullSecretsFound = "PullSecretsFound"
	// ConditionPinned is there, and False, when the cluster bounds for how long the image is
	// pinned, or a node has no room for its pin.
	ConditionPinned = "Pinned"
	// ConditionSpeedLimitKept is there, and False, when a node pulls, or has pulled, faster than it
	// was told to.
	ConditionSpeedLimitKept = "SpeedLimitKept"
)

// CompletionPolicyType says whether a job ends.
//
// +kubebuilder:validation:Enum=Always;Never
type CompletionPolicyType string

const (
	// Always ends the job when every node has the image or has failed.
	Always CompletionPolicyType = "Always"
	// Never keeps the job: nodes that join later get the image too.
	Never CompletionPolicyType = "Never"
)

// ImagePullPolicy says whether the registry is asked for an image that is there. Any value but
// IfNotPresent is Always.
type ImagePullPolicy string

const (
	// PullAlways asks the registry in any case.
	PullAlways ImagePullPolicy = "Always"
	// PullIfNotPresent leaves an image alone that is there.
	PullIfNotPresent ImagePullPolicy = "IfNotPresent"
)

// ImagePullJobSpec says which image to put on which nodes, and how.
type ImagePullJobSpec struct {
	// image is a reference as in a pod: nginx, nginx:1.29, registry:5000/a/b@sha256:...
	//
	// +kubebuilder:validation:MaxLength=512
	// +kubebuilder:validation:XValidation:rule="self.matches('^((([a-zA-Z0-9]|[a-zA-Z0-9][a-zA-Z0-9-]*[a-zA-Z0-9])([.]([a-zA-Z0-9]|[a-zA-Z0-9][a-zA-Z0-9-]*[a-zA-Z0-9]))*|[[][a-fA-F0-9:]+[]])(:[0-9]+)?/)?[a-z0-9]+(([._]|__|-+)[a-z0-9]+)*(/[a-z0-9]+(([._]|__|-+)[a-z0-9]+)*)*(:[0-9A-Za-z_][0-9A-Za-z_.-]{0,127})?(@[A-Za-z][A-Za-z0-9]*([-_+.][A-Za-z][A-Za-z0-9]*)*:[0-9a-fA-F]{32,})?$')",message="image must be a reference as in a pod: [REGISTRY[:PORT]/]NAME[:TAG][@DIGEST], with the name in lower case"
	// +required
	Image string `json:"image"`

	ImagePullJobTemplate `json:",inline"`
}

// ImagePullJobTemplate is what ImagePullJob and ImageListPullJob have in common.
//
// +kubebuilder:validation:XValidation:rule="!(has(self.selector) && (has(self.selector.names) && size(self.selector.names) > 0 || has(self.selector.matchLabels) && size(self.selector.matchLabels) > 0 || has(self.selector.matchExpressions) && size(self.selector.matchExpressions) > 0) && has(self.podSelector) && (has(self.podSelector.matchLabels) && size(self.podSelector.matchLabels) > 0 || has(self.podSelector.matchExpressions) && size(self.podSelector.matchExpressions) > 0))",message="selector and podSelector exclude each other: choose nodes by one of them, or leave both empty for all nodes"
// +kubebuilder:validation:XValidation:rule="(has(self.pullSecrets) ? self.pullSecrets : []) == (has(oldSelf.pullSecrets) ? oldSelf.pullSecrets : [])",message="pullSecrets is immutable: create another job, or change what is in the secrets"
// +kubebuilder:validation:XValidation:rule="!has(self.completionPolicy.activeDeadlineSeconds) || self.completionPolicy.activeDeadlineSeconds >= (has(self.pullPolicy) && has(self.pullPolicy.timeoutSeconds) ? self.pullPolicy.timeoutSeconds : 600)",message="completionPolicy.activeDeadlineSeconds must not be less than pullPolicy.timeoutSeconds (600 unless set): raise the one or lower the other"
type ImagePullJobTemplate struct {
	// pullSecrets are secrets in the job's namespace, of type kubernetes.io/dockerconfigjson or
	// kubernetes.io/dockercfg, tried together with the imagePullSecrets of the namespace's
	// ServiceAccount default.
	//
	// +kubebuilder:validation:MaxItems=64
	// +kubebuilder:validation:items:MaxLength=253
	// +listType=atomic
	// +optional
	PullSecrets []string `json:"pullSecrets,omitempty"`

	// selector chooses nodes by name or by label. Empty is all nodes.
	//
	// +optional
	Selector *ImagePullJobNodeSelector `json:"selector,omitempty"`

	// podSelector chooses the nodes of the active pods in the job's namespace with these labels.
	// Empty is as if it were not there.
	//
	// +optional
	PodSelector *ImagePullJobPodSelector `json:"podSelector,omitempty"`

	// parallelism is how many nodes pull at once: a number, or a percentage of the nodes, rounded
	// up. 0 pauses the job.
	//
	// +kubebuilder:default=1
	// +kubebuilder:validation:XIntOrString
	// +kubebuilder:validation:XValidation:rule="type(self) == int ? self >= 0 : self.matches('^([0-9]{1,9}|(100|[0-9]{1,2})%)$')",message="parallelism must be a number from 0 or a percentage from 0% to 100%"
	// +optional
	Parallelism *intstr.IntOrString `json:"parallelism,omitempty"`

	// pullPolicy bounds the attempts on a node.
	//
	// +kubebuilder:default={}
	// +optional
	PullPolicy *PullPolicy `json:"pullPolicy,omitempty"`

	// completionPolicy says when the job ends.
	//
	// +required
	CompletionPolicy CompletionPolicy `json:"completionPolicy"`

	// sandboxConfig goes into the sandbox configuration of the runtime's PullImage call.
	//
	// +optional
	SandboxConfig *SandboxConfig `json:"sandboxConfig,omitempty"`

	// imagePullPolicy is IfNotPresent, or Always to ask the registry even if the image is there.
	//
	// +kubebuilder:default=IfNotPresent
	// +optional
	ImagePullPolicy ImagePullPolicy `json:"imagePullPolicy,omitempty"`
}

// ImagePullJobNodeSelector chooses nodes by name or by label.
//
// +kubebuilder:validation:XValidation:rule="!(has(self.names) && size(self.names) > 0 && (has(self.matchLabels) && size(self.matchLabels) > 0 || has(self.matchExpressions) && size(self.matchExpressions) > 0))",message="names excludes matchLabels and matchExpressions: choose nodes by name or by label"
type ImagePullJobNodeSelector struct {
	// names of nodes.
	//
	// +listType=set
	// +optional
	Names []string `json:"names,omitempty"`

	metav1.LabelSelector `json:",inline"`
}

// ImagePullJobPodSelector chooses pods by label.
type ImagePullJobPodSelector struct {
	metav1.LabelSelector `json:",inline"`
}

// PullPolicy bounds the attempts on a node.
type PullPolicy struct {
	// timeoutSeconds bounds one attempt.
	//
	// +kubebuilder:default=600
	// +optional
	TimeoutSeconds *int32 `json:"timeoutSeconds,omitempty"`
	// backoffLimit is how many attempts may follow the first, whatever it has failed for: an image
	// or a secret may come after the job. A negative number is 3.
	//
	// +kubebuilder:default=3
	// +optional
	BackoffLimit *int32 `json:"backoffLimit,omitempty"`
}

// CompletionPolicy says when a job ends.
//
// +kubebuilder:validation:XValidation:rule="!(has(self.type) && self.type == 'Never' && (has(self.activeDeadlineSeconds) || has(self.ttlSecondsAfterFinished)))",message="activeDeadlineSeconds and ttlSecondsAfterFinished can only work with type Always: a job of type Never has no end"
type CompletionPolicy struct {
	// type is Always, which ends the job when every node is done, and as a failure when half a
	// minute after its start there is no node that matches; or Never, which serves nodes that join
	// later.
	//
	// +kubebuilder:default=Always
	// +optional
	Type CompletionPolicyType `json:"type,omitempty"`
	// activeDeadlineSeconds is the time from startTime after which the job ends whatever its state:
	// pulls that run are cancelled, and nodes without the image count as failed. Unset is no
	// deadline.
	//
	// +optional
	ActiveDeadlineSeconds *int64 `json:"activeDeadlineSeconds,omitempty"`
	// ttlSecondsAfterFinished is the time from completionTime after which the job is deleted; its
	// pins live on until they expire. Unset keeps the job for ever.
	//
	// +optional
	TTLSecondsAfterFinished *int32 `json:"ttlSecondsAfterFinished,omitempty"`
}

// SandboxConfig is part of the runtime's PodSandboxConfig.
type SandboxConfig struct {
	// labels of the sandbox.
	//
	// +optional
	Labels map[string]string `json:"labels,omitempty"`
	// annotations of the sandbox.
	//
	// +optional
	Annotations map[string]string `json:"annotations,omitempty"`
}

// ImagePullJobStatus is how far a job has come. It is written from time to time, not for each node.
type ImagePullJobStatus struct {
	// startTime is when the job was taken up.
	//
	// +optional
	StartTime *metav1.Time `json:"startTime,omitempty"`
	// completionTime is when the job ended.
	//
	// +optional
	CompletionTime *metav1.Time `json:"completionTime,omitempty"`

	// desired is the number of nodes chosen.
	//
	// +kubebuilder:default=0
	// +optional
	Desired int32 `json:"desired"`
	// active is the number of nodes that pull.
	//
	// +kubebuilder:default=0
	// +optional
	Active int32 `json:"active"`
	// succeeded is the number of nodes that have the image.
	//
	// +kubebuilder:default=0
	// +optional
	Succeeded int32 `json:"succeeded"`
	// failed is the number of nodes that have given up.
	//
	// +kubebuilder:default=0
	// +optional
	Failed int32 `json:"failed"`
	// skipped is the number of nodes that are left out for now and tried again: not ready, or not
	// to be reached.
	//
	// +kubebuilder:default=0
	// +optional
	Skipped int32 `json:"skipped"`

	// message is for people.
	//
	// +optional
	Message string `json:"message,omitempty"`
	// failedNodes are the names of the failed nodes, 2000 at most.
	//
	// +listType=atomic
	// +optional
	FailedNodes []string `json:"failedNodes,omitempty"`

	// progress is percent as text.
	//
	// +optional
	Progress string `json:"progress,omitempty"`
	// percent of the work done, by bytes: the mean over the nodes of how much of the image each
	// has.
	//
	// +kubebuilder:default=0
	// +optional
	Percent int32 `json:"percent"`
	// bytesDone of the compressed layers are on the nodes, over all nodes.
	//
	// +kubebuilder:default=0
	// +optional
	BytesDone int64 `json:"bytesDone"`
	// bytesTotal is what bytesDone comes to in the end. A node that has not said how much it is
	// counts as the mean of those that have.
	//
	// +kubebuilder:default=0
	// +optional
	BytesTotal int64 `json:"bytesTotal"`

	// slowestNodes are the nodes that have been pulling the longest, 5 at most.
	//
	// +listType=atomic
	// +optional
	SlowestNodes []NodePullProgress `json:"slowestNodes,omitempty"`
	// failures says why nodes failed, 20 of them, some of each reason.
	//
	// +listType=atomic
	// +optional
	Failures []NodePullFailure `json:"failures,omitempty"`
	// failureReasons counts all failed nodes by reason, the most frequent first.
	//
	// +listType=atomic
	// +optional
	FailureReasons []FailureCount `json:"failureReasons,omitempty"`
	// skippedNodes says why nodes are left out for now, the first 20 of them.
	//
	// +listType=atomic
	// +optional
	SkippedNodes []NodePullFailure `json:"skippedNodes,omitempty"`

	// conditions are Complete, Succeeded, PullSecretsFound, Pinned and SpeedLimitKept; and Ready,
	// Reconciling and Stalled, as kstatus reads them.
	//
	// +listType=map
	// +listMapKey=type
	// +optional
	Conditions []metav1.Condition `json:"conditions,omitempty"`
	// observedGeneration is the metadata.generation that this status is about; -1 before anybody
	// has looked.
	//
	// +optional
	ObservedGeneration int64 `json:"observedGeneration,omitempty"`
	// observedWork identifies image, policy and selectors that this status is about. A job that has
	// ended begins again when they are changed.
	//
	// +optional
	ObservedWork string `json:"observedWork,omitempty"`
	// observedEffort identifies parallelism, pullPolicy, completionPolicy (its TTL aside) and
	// annotations that this status is about. A job that has failed begins again when they are
	// changed.
	//
	// +optional
	ObservedEffort string `json:"observedEffort,omitempty"`
}

// NodePullProgress is how far one node has come.
type NodePullProgress struct {
	// node is its name.
	//
	// +required
	Node string `json:"node"`
	// phase is Waiting, Resolving, Fetching or Unpacking.
	//
	// +optional
	Phase string `json:"phase,omitempty"`
	// reason says what it waits for, in one word.
	//
	// +optional
	Reason string `json:"reason,omitempty"`
	// message says more of what it waits for, or why it tries again.
	//
	// +optional
	Message string `json:"message,omitempty"`
	// bytesDone of the compressed layers are on the node.
	//
	// +optional
	BytesDone int64 `json:"bytesDone"`
	// bytesTotal of them there are; 0 as long as that is not known.
	//
	// +optional
	BytesTotal int64 `json:"bytesTotal"`
	// bytesPerSecond is the rate at that moment.
	//
	// +optional
	BytesPerSecond int64 `json:"bytesPerSecond"`
	// attempt counts from 1; 0 before the first.
	//
	// +optional
	Attempt int32 `json:"attempt"`
	// startTime is when the node was commanded.
	//
	// +optional
	StartTime *metav1.Time `json:"startTime,omitempty"`
}

// NodePullFailure is why a node failed or is left out.
type NodePullFailure struct {
	// node is its name.
	//
	// +required
	Node string `json:"node"`
	// reason in one word: the node's, such as NotFound, Unauthorized, Timeout, DiskPressure; or
	// NodeNotReady, NodeUnreachable, NoProxy, ProxyOutdated, NodeRefuses, NodeBusy, NoAddress,
	// InvalidRequest, DeadlineExceeded.
	//
	// +required
	Reason string `json:"reason"`
	// message is for people.
	//
	// +optional
	Message string `json:"message,omitempty"`
}

// FailureCount is how many nodes failed for a reason.
type FailureCount struct {
	// reason as in failures.
	//
	// +required
	Reason string `json:"reason"`
	// count of nodes.
	//
	// +required
	Count int32 `json:"count"`
	// nodes are their names, the first 100 of them.
	//
	// +listType=atomic
	// +optional
	Nodes []string `json:"nodes,omitempty"`
}

// ImagePullJob puts an image on nodes before pods need it.
//
// +kubebuilder:object:root=true
// +kubebuilder:storageversion
// +kubebuilder:subresource:status
// +kubebuilder:metadata:labels="app.kubernetes.io/part-of=cri-proxy"
// +kubebuilder:resource:path=imagepulljobs,scope=Namespaced
// +kubebuilder:printcolumn:name="TOTAL",type="integer",JSONPath=".status.desired",description="Number of all nodes matched by this job"
// +kubebuilder:printcolumn:name="ACTIVE",type="integer",JSONPath=".status.active",description="Number of image pull task active"
// +kubebuilder:printcolumn:name="SUCCEED",type="integer",JSONPath=".status.succeeded",description="Number of image pull tasks succeeded"
// +kubebuilder:printcolumn:name="FAILED",type="integer",JSONPath=".status.failed",description="Number of image pull tasks failed"
// +kubebuilder:printcolumn:name="AGE",type="date",JSONPath=".metadata.creationTimestamp"
// +kubebuilder:printcolumn:name="PROGRESS",type="string",JSONPath=".status.progress",description="How much of the image is on the nodes"
// +kubebuilder:printcolumn:name="IMAGE",type="string",JSONPath=".spec.image",description="The image that is pulled"
// +kubebuilder:printcolumn:name="MESSAGE",type="string",JSONPath=".status.message",description="Summary of status when job is failed"
type ImagePullJob struct {
	metav1.TypeMeta `json:",inline"`
	// +optional
	metav1.ObjectMeta `json:"metadata,omitempty"`

	// spec says which image to put on which nodes, and how.
	//
	// +required
	Spec ImagePullJobSpec `json:"spec"`
	// status says how far that is.
	//
	// +kubebuilder:default={"observedGeneration":-1}
	// +optional
	Status ImagePullJobStatus `json:"status,omitempty"`
}

// ImagePullJobList is a list of ImagePullJob.
//
// +kubebuilder:object:root=true
type ImagePullJobList struct {
	metav1.TypeMeta `json:",inline"`
	metav1.ListMeta `json:"metadata,omitempty"`
	Items           []ImagePullJob `json:"items"`
}
