// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package recreate

import (
	"fmt"
	"strings"

	corev1 "k8s.io/api/core/v1"

	appsv1alpha1 "github.com/cri-proxy/cri-proxy/api/apps/v1alpha1"
	opsv1 "github.com/cri-proxy/cri-proxy/api/ops/v1"
	"github.com/cri-proxy/cri-proxy/controller/nodes"
	"github.com/cri-proxy/cri-proxy/controller/objects"
	"github.com/cri-proxy/cri-proxy/controller/pods"
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

// teller writes the Events of a request.
type teller struct{ *request }

// tell writes the Events for what the status says now and did not say before.
func (t *teller) tell(before *appsv1alpha1.ContainerRecreateRequestStatus) {
	after := &t.crr.Status
	for _, reason := range []string{reasonSilent, reasonUnwilling} {
		if why, ok := strings.CutPrefix(after.Message, reason+": "); ok && before.Message != after.Message {
			t.event(t.requestRef(nil), corev1.EventTypeWarning, reason, "%s", why)
		}
	}
	if t.accepted == nil && after.CompletionTime != nil {
		t.event(t.requestRef(nil), corev1.EventTypeWarning, eventRefused, "%s", after.Message)
		if t.pod != nil {
			t.event(t.podRef(nil), corev1.EventTypeWarning, eventRefused,
				"ContainerRecreateRequest %s: %s", t.crr.Name, after.Message)
		}
		return
	}
	was := map[string]appsv1alpha1.ContainerRecreateRequestPhase{}
	for _, s := range before.ContainerRecreateStates {
		was[s.Name] = s.Phase
	}
	for _, c := range t.containers {
		if c.state.Phase == was[c.name] {
			continue
		}
		pod := t.podRef(c)
		switch c.state.Phase {
		case recreating:
			t.event(pod, corev1.EventTypeNormal, eventRestarting,
				"Restarting container %s in place for ContainerRecreateRequest %s", c.name, t.crr.Name)
		case succeeded:
			t.event(pod, corev1.EventTypeNormal, eventRestarted, "%s", t.restartedNote(c))
			t.tellWarnings(c)
		case failed:
			message := c.state.Message
			if nodes.PostStartFailed(c.op) && !c.replaced {
				t.tellHook(c, eventPostStartFailed, "PostStartHook failed")
			}
			t.event(pod, corev1.EventTypeWarning, eventFailed,
				"ContainerRecreateRequest %s, container %s: %s", t.crr.Name, c.name, message)
			t.event(t.requestRef(c), corev1.EventTypeWarning, eventFailed, "container %s: %s", c.name, message)
			t.tellWarnings(c)
		}
	}
}

func (t *teller) restartedNote(c *container) string {
	note := fmt.Sprintf("Restarted container %s in place for ContainerRecreateRequest %s", c.name, t.crr.Name)
	if c.replaced {
		return note + " (another request had replaced it already)"
	}
	if c.op.GetMethod() == opsv1.MethodOverlap {
		return note + ", the old one was stopped after the new one had started"
	}
	if d := c.op.GetGap(); d != nil {
		note += fmt.Sprintf(", it was down for %s", d.AsDuration().Round(1e6))
	}
	return note
}

// tellWarnings passes on the node's warnings: what went wrong without ending the operation.
func (t *teller) tellWarnings(c *container) {
	if c.replaced {
		return
	}
	hook, others := nodes.Warnings(c.op)
	if hook {
		t.tellHook(c, eventPreStopFailed, "PreStopHook failed")
	}
	if len(others) > 0 {
		note := strings.Join(others, "; ")
		t.event(t.podRef(c), corev1.EventTypeWarning, eventWarning, "%s", note)
		t.event(t.requestRef(c), corev1.EventTypeWarning, eventWarning, "container %s: %s", c.name, note)
	}
}

// tellHook reports a failed hook, on the pod in kubelet's words and on the request. The output of
// the hook stays out of Events, as in kubelet (kuberuntime_container.go): it may hold secrets. The
// node's log has it.
func (t *teller) tellHook(c *container, reason, note string) {
	t.event(t.podRef(c), corev1.EventTypeWarning, reason, "%s", note)
	t.event(t.requestRef(c), corev1.EventTypeWarning, reason, "container %s: %s", c.name, note)
}

// tellUngated says once that the pod is not taken out of service although the request asks for it.
func (t *teller) tellUngated() {
	if t.memory.ungated || pods.HasReadyGate(t.pod) || len(t.crr.Status.ContainerRecreateStates) > 0 {
		return
	}
	for _, c := range t.containers {
		if c.strategy.Unready != nil {
			t.memory.ungated = true
			t.event(t.requestRef(nil), corev1.EventTypeWarning, eventNoReadinessGate,
				"pod %s has no readiness gate %s, so it cannot be taken out of service: "+
					"unreadyGracePeriodSeconds is ignored",
				t.pod.Name, appsv1alpha1.KruisePodReadyConditionType)
			return
		}
	}
}

func (t *teller) event(about *corev1.ObjectReference, kind, reason, note string, args ...any) {
	if about == nil || t.r.Recorder == nil {
		return
	}
	text := objects.Clip(fmt.Sprintf(note, args...), objects.NoteMax)
	t.r.Recorder.Eventf(about, t.requestRef(nil), kind, reason, eventAction, "%s", text)
}

// requestRef refers to a container of the request, or with nil to the request. Events about the
// same object with the same reason become one, with the note of the first (client-go tools/events).
// The path keeps the Events of two containers apart.
func (t *teller) requestRef(c *container) *corev1.ObjectReference {
	ref := &corev1.ObjectReference{
		APIVersion: appsv1alpha1.GroupVersion.String(), Kind: "ContainerRecreateRequest",
		Namespace: t.crr.Namespace, Name: t.crr.Name, UID: t.crr.UID,
	}
	if c != nil {
		ref.FieldPath = "spec.containers{" + c.name + "}"
	}
	return ref
}

// podRef refers to a container of the pod, as kubelet's Events do, or with nil to the pod.
func (t *teller) podRef(c *container) *corev1.ObjectReference {
	if t.pod == nil {
		return nil
	}
	ref := &corev1.ObjectReference{
		APIVersion: "v1", Kind: "Pod", Namespace: t.pod.Namespace, Name: t.pod.Name, UID: t.pod.UID,
	}
	if c != nil {
		ref.FieldPath = "spec.containers{" + c.name + "}"
		if _, kind := pods.Container(t.pod, c.name); kind == pods.Sidecar {
			ref.FieldPath = "spec.initContainers{" + c.name + "}"
		}
	}
	return ref
}
