// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

// Package notice has what rollouts tell people: Events, conditions and metrics.
package notice

import (
	"strings"

	"k8s.io/apimachinery/pkg/api/meta"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/tools/events"
	"sigs.k8s.io/controller-runtime/pkg/client"

	inplace "github.com/cri-proxy/cri-proxy/api/inplace/v1alpha1"
	"github.com/cri-proxy/cri-proxy/controller/objects"
)

// Subject names what has failed: a pod, or a workload.
func Subject(f inplace.PodFailure) string {
	if strings.Contains(f.Pod, " ") {
		return f.Pod
	}
	return "pod " + f.Pod
}

// SetCondition sets a condition. Its time changes only when its status does.
func SetCondition(s *inplace.InPlaceRolloutStatus, kind string, is bool, reason, message string) {
	status := metav1.ConditionFalse
	if is {
		status = metav1.ConditionTrue
	}
	meta.SetStatusCondition(&s.Conditions, metav1.Condition{Type: kind, Status: status, Reason: reason,
		Message: objects.Clip(message, 1000), ObservedGeneration: s.ObservedGeneration})
}

// Reasons of Events, besides those of conditions.
const (
	EventStarted     = "RolloutStarted"
	EventPodFailed   = "PodFailed"
	EventRollingBack = "RollingBack"
	EventBlocked     = "WaitingForBudget"
	EventQueued      = "WaitingForRollout"
	EventInvalid     = "InvalidTarget"
	EventPaused      = "DeploymentPaused"
	EventResumed     = "DeploymentResumed"
	EventFields      = "FieldsNotGivenBack"
	EventHistory     = "NoRolloutHistory"
	EventNotInPlace  = "NotInPlace"
	EventFollowing   = "InPlaceRollout"
	EventSecrets     = "PullSecretMissing"
	EventWarning     = "UpgradeWarning"
	eventAction      = "Rollout"
)

// Announce writes an Event. The recorder may be nil.
func Announce(recorder events.EventRecorder, about client.Object, kind, reason, text string) {
	objects.Announce(recorder, about, kind, reason, eventAction, text)
}

// Describe says in words what happens to the containers.
func Describe(list []inplace.ContainerChange) string {
	var parts []string
	for _, c := range list {
		if c.Image == "" {
			parts = append(parts, "restart "+c.Name)
		} else {
			parts = append(parts, c.Name+" to "+c.Image)
		}
	}
	return strings.Join(parts, ", ")
}
