// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package controller

import (
	"fmt"
	"strings"

	corev1 "k8s.io/api/core/v1"

	appsv1alpha1 "github.com/cri-proxy/cri-proxy/api/apps/v1alpha1"
	opsv1 "github.com/cri-proxy/cri-proxy/api/ops/v1"
)

// Reasons of Events, with reasonSilent and reasonUnwilling. The hook reasons are kubelet's.
const (
	eventRestarting      = "RestartingContainer"
	eventRestarted       = "RestartedContainer"
	eventFailed          = "RestartFailed"
	eventWarning         = "RestartWarning"
	eventPreStopFailed   = "FailedPreStopHook"
	eventPostStartFailed = "FailedPostStartHook"
	eventRefused         = "Refused"
	eventNoReadinessGate = "NoReadinessGate"
	eventAction          = "Recreate"
)

// tell writes the Events for what the status says now and did not say before.
func (p *pass) tell(before *appsv1alpha1.ContainerRecreateRequestStatus) {
	after := &p.crr.Status
	for _, reason := range []string{reasonSilent, reasonUnwilling} {
		if why, ok := strings.CutPrefix(after.Message, reason+": "); ok && before.Message != after.Message {
			p.event(p.requestRef(nil), corev1.EventTypeWarning, reason, "%s", why)
		}
	}
	if p.accepted == nil && after.CompletionTime != nil {
		p.event(p.requestRef(nil), corev1.EventTypeWarning, eventRefused, "%s", after.Message)
		if p.pod != nil {
			p.event(p.podRef(nil), corev1.EventTypeWarning, eventRefused, "ContainerRecreateRequest %s: %s", p.crr.Name, after.Message)
		}
		return
	}
	was := map[string]appsv1alpha1.ContainerRecreateRequestPhase{}
	for _, s := range before.ContainerRecreateStates {
		was[s.Name] = s.Phase
	}
	for _, c := range p.containers {
		if c.state.Phase == was[c.name] {
			continue
		}
		pod := p.podRef(c)
		switch c.state.Phase {
		case recreating:
			p.event(pod, corev1.EventTypeNormal, eventRestarting, "Restarting container %s in place for ContainerRecreateRequest %s", c.name, p.crr.Name)
		case succeeded:
			p.event(pod, corev1.EventTypeNormal, eventRestarted, "%s", p.restartedNote(c))
			p.tellWarnings(c)
		case failed:
			message := c.state.Message
			if c.op.GetReason() == reasonPostStartFailed && !c.replaced {
				p.tellHook(c, eventPostStartFailed, "PostStartHook failed")
			}
			p.event(pod, corev1.EventTypeWarning, eventFailed, "ContainerRecreateRequest %s, container %s: %s", p.crr.Name, c.name, message)
			p.event(p.requestRef(c), corev1.EventTypeWarning, eventFailed, "container %s: %s", c.name, message)
			p.tellWarnings(c)
		}
	}
}

func (p *pass) restartedNote(c *container) string {
	note := fmt.Sprintf("Restarted container %s in place for ContainerRecreateRequest %s", c.name, p.crr.Name)
	if c.replaced {
		return note + " (another request had replaced it already)"
	}
	if c.op.GetMethod() == methodOverlap {
		return note + ", the old one was stopped after the new one had started"
	}
	if d := c.op.GetGap(); d != nil {
		note += fmt.Sprintf(", it was down for %s", d.AsDuration().Round(1e6))
	}
	return note
}

// tellWarnings passes on what the node says went wrong without ending the operation.
func (p *pass) tellWarnings(c *container) {
	if c.replaced {
		return
	}
	hook, others := Warnings(c.op)
	if hook {
		p.tellHook(c, eventPreStopFailed, "PreStopHook failed")
	}
	if len(others) > 0 {
		note := strings.Join(others, "; ")
		p.event(p.podRef(c), corev1.EventTypeWarning, eventWarning, "%s", note)
		p.event(p.requestRef(c), corev1.EventTypeWarning, eventWarning, "container %s: %s", c.name, note)
	}
}

// Warnings are those of an operation on a container, as they may be told in Events: hook says that a preStop hook has
// failed, and what it printed is left out.
func Warnings(c *opsv1.ContainerOperation) (hook bool, others []string) {
	for _, w := range c.GetWarnings() {
		if strings.HasPrefix(w, "preStop") {
			hook = true
		} else {
			others = append(others, w)
		}
	}
	return hook, others
}

// tellHook reports a hook that failed, on the pod in kubelet's words and on the request. What the hook printed stays
// out of Events, as in kubelet (kuberuntime_container.go): there may be secrets in it. The node's log has it.
func (p *pass) tellHook(c *container, reason, note string) {
	p.event(p.podRef(c), corev1.EventTypeWarning, reason, "%s", note)
	p.event(p.requestRef(c), corev1.EventTypeWarning, reason, "container %s: %s", c.name, note)
}

// tellUngated says once that a wished-for drain does not take place.
func (p *pass) tellUngated() {
	if p.memory.ungated || hasReadyGate(p.pod) || len(p.crr.Status.ContainerRecreateStates) > 0 {
		return
	}
	for _, c := range p.containers {
		if c.strategy.unready != nil {
			p.memory.ungated = true
			p.event(p.requestRef(nil), corev1.EventTypeWarning, eventNoReadinessGate,
				"pod %s has no readiness gate %s, so it cannot be taken out of service: unreadyGracePeriodSeconds is ignored", p.pod.Name, appsv1alpha1.KruisePodReadyConditionType)
			return
		}
	}
}

func (p *pass) event(about *corev1.ObjectReference, kind, reason, note string, args ...any) {
	if about == nil || p.r.Recorder == nil {
		return
	}
	p.r.Recorder.Eventf(about, p.requestRef(nil), kind, reason, eventAction, "%s", eventNote(fmt.Sprintf(note, args...)))
}

// eventNote keeps of a text what the note of an event may hold: the API's limit is 1024.
func eventNote(text string) string {
	const most = 1000
	if len(text) > most {
		return strings.ToValidUTF8(text[:most], "") + "…"
	}
	return text
}

// requestRef refers to a container of the request, or with nil to the request. Events about the same thing and with the
// same reason become one, with the note of the first (client-go tools/events): without the path that would be so of two
// containers.
func (p *pass) requestRef(c *container) *corev1.ObjectReference {
	ref := &corev1.ObjectReference{
		APIVersion: appsv1alpha1.GroupVersion.String(), Kind: "ContainerRecreateRequest",
		Namespace: p.crr.Namespace, Name: p.crr.Name, UID: p.crr.UID,
	}
	if c != nil {
		ref.FieldPath = "spec.containers{" + c.name + "}"
	}
	return ref
}

// podRef refers to a container of the pod, as kubelet's Events do, or with nil to
// the pod.
func (p *pass) podRef(c *container) *corev1.ObjectReference {
	if p.pod == nil {
		return nil
	}
	ref := &corev1.ObjectReference{APIVersion: "v1", Kind: "Pod", Namespace: p.pod.Namespace, Name: p.pod.Name, UID: p.pod.UID}
	if c != nil {
		ref.FieldPath = "spec.containers{" + c.name + "}"
		if _, kind := containerSpec(p.pod, c.name); kind == kindSidecar {
			ref.FieldPath = "spec.initContainers{" + c.name + "}"
		}
	}
	return ref
}
