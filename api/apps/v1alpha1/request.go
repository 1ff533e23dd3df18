// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package v1alpha1

import (
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/cri-proxy/cri-proxy/api/apps/v1beta1"
)

// The types below are those of v1beta1: both versions have one schema, which holds the fields of
// either.

type (
	// ContainerRecreateRequestFailurePolicyType is that of v1beta1.
	ContainerRecreateRequestFailurePolicyType = v1beta1.ContainerRecreateRequestFailurePolicyType
	// ContainerRecreateRequestPhase is that of v1beta1.
	ContainerRecreateRequestPhase = v1beta1.ContainerRecreateRequestPhase
	// ContainerRecreateRequestSpec is that of v1beta1.
	ContainerRecreateRequestSpec = v1beta1.ContainerRecreateRequestSpec
	// ContainerRecreateRequestContainer is that of v1beta1.
	ContainerRecreateRequestContainer = v1beta1.ContainerRecreateRequestContainer
	// ProbeHandler is that of v1beta1.
	ProbeHandler = v1beta1.ProbeHandler
	// ContainerRecreateRequestContainerContext is that of v1beta1.
	ContainerRecreateRequestContainerContext = v1beta1.ContainerRecreateRequestContainerContext
	// ContainerRecreateRequestStrategy is that of v1beta1.
	ContainerRecreateRequestStrategy = v1beta1.ContainerRecreateRequestStrategy
	// ContainerRecreateRequestContainerStrategy is that of v1beta1.
	ContainerRecreateRequestContainerStrategy = v1beta1.ContainerRecreateRequestContainerStrategy
	// ContainerRecreateRequestStatus is that of v1beta1.
	ContainerRecreateRequestStatus = v1beta1.ContainerRecreateRequestStatus
	// ContainerRecreateRequestContainerRecreateState is that of v1beta1.
	ContainerRecreateRequestContainerRecreateState = v1beta1.ContainerRecreateRequestContainerRecreateState
	// ContainerRecreateRequestSyncContainerStatus is that of v1beta1.
	ContainerRecreateRequestSyncContainerStatus = v1beta1.ContainerRecreateRequestSyncContainerStatus
)

// The keys and values of v1beta1, where each is explained.
const (
	PodUIDLabel   = v1beta1.PodUIDLabel
	NodeNameLabel = v1beta1.NodeNameLabel
	ActiveLabel   = v1beta1.ActiveLabel

	SyncContainerStatusesAnnotation = v1beta1.SyncContainerStatusesAnnotation
	UnreadyAcquiredAnnotation       = v1beta1.UnreadyAcquiredAnnotation
	UnreadyAcquiredFinalizer        = v1beta1.UnreadyAcquiredFinalizer

	KruisePodReadyConditionType corev1.PodConditionType = v1beta1.KruisePodReadyConditionType

	PreRecreateGraceCondition = v1beta1.PreRecreateGraceCondition

	RestartOrderAnnotation = v1beta1.RestartOrderAnnotation
	RestartOrderStopFirst  = v1beta1.RestartOrderStopFirst
	RestartOrderStartFirst = v1beta1.RestartOrderStartFirst

	ParallelRecreateAnnotation = v1beta1.ParallelRecreateAnnotation

	ContainerRecreateRequestFailurePolicyFail   = v1beta1.ContainerRecreateRequestFailurePolicyFail
	ContainerRecreateRequestFailurePolicyIgnore = v1beta1.ContainerRecreateRequestFailurePolicyIgnore

	ContainerRecreateRequestPending    = v1beta1.ContainerRecreateRequestPending
	ContainerRecreateRequestRecreating = v1beta1.ContainerRecreateRequestRecreating
	ContainerRecreateRequestSucceeded  = v1beta1.ContainerRecreateRequestSucceeded
	ContainerRecreateRequestFailed     = v1beta1.ContainerRecreateRequestFailed
	ContainerRecreateRequestCompleted  = v1beta1.ContainerRecreateRequestCompleted
)

// ContainerRecreateRequest recreates containers of one pod in place: the pod, its
// address and its other containers stay as they are.
//
// +kubebuilder:object:root=true
// +kubebuilder:storageversion
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
	Spec v1beta1.ContainerRecreateRequestSpec `json:"spec"`
	// status says how far that is.
	//
	// +kubebuilder:default={"observedGeneration":-1}
	// +optional
	Status v1beta1.ContainerRecreateRequestStatus `json:"status,omitempty"`
}

// ContainerRecreateRequestList is a list of ContainerRecreateRequest.
//
// +kubebuilder:object:root=true
type ContainerRecreateRequestList struct {
	metav1.TypeMeta `json:",inline"`
	metav1.ListMeta `json:"metadata,omitempty"`
	Items           []ContainerRecreateRequest `json:"items"`
}
