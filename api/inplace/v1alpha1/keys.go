// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package v1alpha1

import corev1 "k8s.io/api/core/v1"

// Readiness gates that take a pod out of service while it is changed, and put it back when it is
// ready. A pod that has one in its spec gets the condition as soon as it is there.
const (
	// ReadyGate is cri-proxy's own.
	ReadyGate corev1.PodConditionType = "cri-proxy.io/in-place-ready"
	// KruiseReadyGate is OpenKruise's. It is left to OpenKruise on pods of workloads of its own.
	KruiseReadyGate corev1.PodConditionType = "InPlaceUpdateReady"
)

const (
	// InPlaceAnnotation on a StatefulSet or DaemonSet with updateStrategy OnDelete, set to "true",
	// lets the pods follow the images of the workload's template in place, by an InPlaceRollout
	// that is owned by the workload.
	InPlaceAnnotation = "cri-proxy.io/in-place"
	// StrategyAnnotation on such a workload is the strategy of that rollout, in JSON, as in its
	// spec. Without it the rollout has the defaults, or what people have written there.
	StrategyAnnotation = "cri-proxy.io/in-place-strategy"
	// RetryAnnotation on an InPlaceRollout begins anew with every new value, though the containers
	// are the same as before: after a failure, or to restart once more. On a workload with
	// InPlaceAnnotation it does that to the workload's rollout.
	RetryAnnotation = "cri-proxy.io/retry"
	// PodStateAnnotation is on a pod that was changed: by which rollout, and from what. It is
	// written together with the images.
	PodStateAnnotation = "cri-proxy.io/in-place-state"
	// PausedByAnnotation is on a Deployment that a rollout has paused, with the UID of the rollout.
	PausedByAnnotation = "cri-proxy.io/paused-by"
	// TemplateAnnotation is on a workload whose template a rollout has written: which one, and what
	// it has left there. What somebody else writes over that stays.
	TemplateAnnotation = "cri-proxy.io/template-of"
	// RolloutFinalizer holds a deleted rollout until its pods are in service, its operations taken
	// back, its pins released and its Deployment goes on.
	RolloutFinalizer = "cri-proxy.io/in-place-rollout"
)

// Conditions of an InPlaceRollout.
const (
	// ConditionComplete is True once every pod has the new images and is available. It is False as
	// long as pods are held back by the partition, and after a rollback.
	ConditionComplete = "Complete"
	// ConditionProgressing is True while pods are being changed, as with Deployments.
	ConditionProgressing = "Progressing"
	// ConditionAvailable is True while no more pods are unavailable than maxUnavailable allows.
	ConditionAvailable = "Available"
	// ConditionDegraded is True when pods have failed; its reason says what was made of that.
	ConditionDegraded = "Degraded"
)

// Reasons of conditions.
const (
	ReasonRollingOut     = "RollingOut"
	ReasonRolledOut      = "RolledOut"
	ReasonPartitioned    = "Partitioned"
	ReasonPaused         = "Paused"
	ReasonPodsFailed     = "PodsFailed"
	ReasonRollingBack    = "RollingBack"
	ReasonRolledBack     = "RolledBack"
	ReasonStopped        = "StoppedOnFailure"
	ReasonInvalidTarget  = "InvalidTarget"
	ReasonNoPods         = "NoPods"
	ReasonWaiting        = "WaitingForWorkload"
	ReasonQueued         = "WaitingForRollout"
	ReasonBudget         = "DisruptionBudget"
	ReasonStuck          = "ProgressDeadlineExceeded"
	ReasonNotInPlace     = "NotInPlace"
	ReasonAPIError       = "APIServerError"
	ReasonDenied         = "AdmissionDenied"
	ReasonRewritten      = "ImageRewritten"
	ReasonSuperseded     = "Superseded"
	ReasonNotRetried     = "NotTriedAgain"
	ReasonAsExpected     = "AsExpected"
	ReasonMinimumAvail   = "MinimumPodsAvailable"
	ReasonMinimumUnavail = "MinimumPodsUnavailable"
)
