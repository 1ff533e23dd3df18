// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package rollout

import (
	"strings"

	"k8s.io/apimachinery/pkg/api/meta"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/tools/events"
	"sigs.k8s.io/controller-runtime/pkg/client"

	inplace "github.com/cri-proxy/cri-proxy/api/inplace/v1alpha1"
)

// subject names what has failed: a pod, or a workload.
func subject(f inplace.PodFailure) string {
	if strings.Contains(f.Pod, " ") {
		return f.Pod
	}
	return "pod " + f.Pod
}

// setCondition sets a condition. Its time changes only when its status does.
func setCondition(s *inplace.InPlaceRolloutStatus, kind string, is bool, reason, message string) {
	status := metav1.ConditionFalse
	if is {
		status = metav1.ConditionTrue
	}
	meta.SetStatusCondition(&s.Conditions, metav1.Condition{Type: kind, Status: status, Reason: reason, Message: clip(message, 1000), ObservedGeneration: s.ObservedGeneration})
}

// clip returns at most the first bytes of a text.
func clip(text string, most int) string {
	if len(text) <= most {
		return text
	}
	return strings.ToValidUTF8(text[:most], "") + "…"
}

// Reasons of Events, besides those of conditions.
const (
	eventStarted     = "RolloutStarted"
	eventPodFailed   = "PodFailed"
	eventRollingBack = "RollingBack"
	eventBlocked     = "WaitingForBudget"
	eventQueued      = "WaitingForRollout"
	eventInvalid     = "InvalidTarget"
	eventPaused      = "DeploymentPaused"
	eventResumed     = "DeploymentResumed"
	eventFields      = "FieldsNotGivenBack"
	eventHistory     = "NoRolloutHistory"
	eventNotInPlace  = "NotInPlace"
	eventFollowing   = "InPlaceRollout"
	eventSecrets     = "PullSecretMissing"
	eventWarning     = "UpgradeWarning"
	eventAction      = "Rollout"
)

// announce writes an Event. The recorder may be nil.
func announce(recorder events.EventRecorder, about client.Object, kind, reason, text string) {
	if recorder == nil {
		return
	}
	recorder.Eventf(about, nil, kind, reason, eventAction, "%s", clip(text, 1000)) // the API's limit is 1024
}

// describe says in words what happens to the containers.
func describe(list []inplace.ContainerChange) string {
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
