// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package rollout

import (
	"strings"

	corev1 "k8s.io/api/core/v1"
	"k8s.io/client-go/tools/events"
	"sigs.k8s.io/controller-runtime/pkg/client"

	inplace "github.com/cri-proxy/cri-proxy/api/inplace/v1alpha1"
	opsv1 "github.com/cri-proxy/cri-proxy/api/ops/v1"
	"github.com/cri-proxy/cri-proxy/controller/nodes"
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
	eventFields      = "FieldsNotGivenBack"
	eventHistory     = "NoRolloutHistory"
	eventNotInPlace  = "NotInPlace"
	eventFollowing   = "InPlaceRollout"
	eventSecrets     = "PullSecretMissing"
	eventWarning     = "UpgradeWarning"
	eventAction      = "Rollout"
)

// maxTold bounds the events of one revision that are about single pods.
const maxTold = 2 * maxFailures

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

// tellWarnings passes on what the node says went wrong in the change of a pod without ending it: once for an operation, on the pod and
// on the rollout.
func (p *pass) tellWarnings(i *item) {
	var done []*opsv1.Operation
	p.work.mu.Lock()
	for _, t := range []*talk{i.m.visit, i.m.restart} {
		if t != nil && !t.inquires && t.op.GetPhase() == opsv1.Phase_PHASE_SUCCEEDED && t.op.GetFinishTime() != nil {
			done = append(done, t.op)
		}
	}
	p.work.mu.Unlock()
	for _, op := range done {
		var notes []string
		for _, c := range op.GetContainers() {
			hook, others := nodes.Warnings(c)
			if hook {
				others = append(others, "its preStop hook failed, what it printed is in the log of cri-proxy on the node")
			}
			if len(others) > 0 {
				notes = append(notes, "container "+c.GetName()+": "+strings.Join(others, "; "))
			}
		}
		key := eventWarning + op.GetUid()
		if len(notes) == 0 || p.work.told[key] || len(p.work.told) >= maxTold {
			continue
		}
		p.work.told[key] = true
		text := strings.Join(notes, "; ")
		announce(p.r.Recorder, i.pod, corev1.EventTypeWarning, eventWarning, text)
		p.event(corev1.EventTypeWarning, eventWarning, "pod "+i.pod.Name+", "+text)
	}
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
