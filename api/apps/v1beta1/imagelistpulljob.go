// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package v1beta1

import (
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
)

// TemplateHashLabel on an ImageListPullJob and its children is the hash of the template that the
// children are made from.
const TemplateHashLabel = "controller-revision-hash"

// ImageListPullJobSpec says which images to put on which nodes, and how.
type ImageListPullJobSpec struct {
	// images are references as in a pod, 255 at most. Each is pulled by an ImagePullJob of its own.
	//
	// +kubebuilder:validation:MinItems=1
	// +kubebuilder:validation:MaxItems=255
	// +kubebuilder:validation:items:MaxLength=512
	// +kubebuilder:validation:items:XValidation:rule="self.matches('^((([a-zA-Z0-9]|[a-zA-Z0-9][a-zA-Z0-9-]*[a-zA-Z0-9])([.]([a-zA-Z0-9]|[a-zA-Z0-9][a-zA-Z0-9-]*[a-zA-Z0-9]))*|[[][a-fA-F0-9:]+[]])(:[0-9]+)?/)?[a-z0-9]+(([._]|__|-+)[a-z0-9]+)*(/[a-z0-9]+(([._]|__|-+)[a-z0-9]+)*)*(:[0-9A-Za-z_][0-9A-Za-z_.-]{0,127})?(@[A-Za-z][A-Za-z0-9]*([-_+.][A-Za-z][A-Za-z0-9]*)*:[0-9a-fA-F]{32,})?$')",message="an image must be a reference as in a pod: [REGISTRY[:PORT]/]NAME[:TAG][@DIGEST], with the name in lower case"
	// +listType=set
	// +required
	Images []string `json:"images"`

	ImagePullJobTemplate `json:",inline"`
}

// ImageListPullJobStatus counts the images of a job.
type ImageListPullJobStatus struct {
	// startTime is when the job was taken up.
	//
	// +optional
	StartTime *metav1.Time `json:"startTime,omitempty"`
	// completionTime is when all images were done.
	//
	// +optional
	CompletionTime *metav1.Time `json:"completionTime,omitempty"`

	// desired is the number of images.
	//
	// +kubebuilder:default=0
	// +optional
	Desired int32 `json:"desired"`
	// active is the number of images that a node pulls.
	//
	// +kubebuilder:default=0
	// +optional
	Active int32 `json:"active"`
	// completed is the number of images that all nodes are done with.
	//
	// +kubebuilder:default=0
	// +optional
	Completed int32 `json:"completed"`
	// succeeded is the number of images that all nodes have.
	//
	// +kubebuilder:default=0
	// +optional
	Succeeded int32 `json:"succeeded"`

	// observedGeneration is the metadata.generation that this status is about; -1 before anybody
	// has looked.
	//
	// +optional
	ObservedGeneration int64 `json:"observedGeneration,omitempty"`
	// conditions are Ready, Reconciling and Stalled, as kstatus reads them.
	//
	// +listType=map
	// +listMapKey=type
	// +optional
	Conditions []metav1.Condition `json:"conditions,omitempty"`

	// failedImageStatuses are the images that a node failed to pull.
	//
	// +listType=atomic
	// +optional
	FailedImageStatuses []*FailedImageStatus `json:"failedImageStatuses,omitempty"`
	// observedWork identifies the images and the template that this status is about. A job that has
	// ended begins again when they are changed.
	//
	// +optional
	ObservedWork string `json:"observedWork,omitempty"`
}

// FailedImageStatus is an image that a node failed to pull.
type FailedImageStatus struct {
	// imagePullJob is the name of the image's ImagePullJob.
	//
	// +optional
	ImagePullJob string `json:"imagePullJob,omitempty"`
	// name is the image.
	//
	// +optional
	Name string `json:"name,omitempty"`
	// message is for people.
	//
	// +optional
	Message string `json:"message,omitempty"`
}

// ImageListPullJob puts images on nodes before pods need them, each by an ImagePullJob of its own.
//
// +kubebuilder:object:root=true
// +kubebuilder:storageversion
// +kubebuilder:subresource:status
// +kubebuilder:metadata:labels="app.kubernetes.io/part-of=cri-proxy"
// +kubebuilder:resource:path=imagelistpulljobs,scope=Namespaced
// +kubebuilder:printcolumn:name="TOTAL",type="integer",JSONPath=".status.desired",description="Number of image pull job"
// +kubebuilder:printcolumn:name="SUCCEEDED",type="integer",JSONPath=".status.succeeded",description="Number of image pull job succeeded"
// +kubebuilder:printcolumn:name="COMPLETED",type="integer",JSONPath=".status.completed",description="Number of ImagePullJobs which are finished"
// +kubebuilder:printcolumn:name="AGE",type="date",JSONPath=".metadata.creationTimestamp"
type ImageListPullJob struct {
	metav1.TypeMeta `json:",inline"`
	// +optional
	metav1.ObjectMeta `json:"metadata,omitempty"`

	// spec says which images to put on which nodes, and how.
	//
	// +required
	Spec ImageListPullJobSpec `json:"spec"`
	// status says how far that is.
	//
	// +kubebuilder:default={"observedGeneration":-1}
	// +optional
	Status ImageListPullJobStatus `json:"status,omitempty"`
}

// ImageListPullJobList is a list of ImageListPullJob.
//
// +kubebuilder:object:root=true
type ImageListPullJobList struct {
	metav1.TypeMeta `json:",inline"`
	metav1.ListMeta `json:"metadata,omitempty"`
	Items           []ImageListPullJob `json:"items"`
}
