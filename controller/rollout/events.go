// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package rollout

import (
	"strings"

	"k8s.io/client-go/tools/events"
	"sigs.k8s.io/controller-runtime/pkg/client"

	inplace "github.com/cri-proxy/cri-proxy/api/inplace/v1alpha1"
)

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
	eventNotInPlace  = "NotInPlace"
	eventFollowing   = "InPlaceRollout"
	eventSecrets     = "PullSecretMissing"
	eventAction      = "Rollout"
)

func (p *pass) event(kind, reason, text string) {
	announce(p.r.Recorder, p.rollout, kind, reason, text)
}

// tell is an event that is told once for a revision and key.
func (p *pass) tell(kind, reason, text, key string) {
	if p.work.told[reason+key] {
		return
	}
	p.work.told[reason+key] = true
	p.event(kind, reason, text)
}

func announce(recorder events.EventRecorder, about client.Object, kind, reason, text string) {
	if recorder == nil {
		return
	}
	recorder.Eventf(about, nil, kind, reason, eventAction, "%s", clip(text, 1000)) // the API's limit is 1024
}

// describe says what happens to the containers.
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
