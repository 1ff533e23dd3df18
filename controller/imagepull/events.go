// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package imagepull

import (
	"fmt"
	"strings"

	corev1 "k8s.io/api/core/v1"
	"k8s.io/client-go/tools/events"
	"sigs.k8s.io/controller-runtime/pkg/client"
)

// Reasons of Events. eventFailed is OpenKruise's.
const (
	eventStarted     = "PullStarted"
	eventFailed      = "PullImageFailed"
	eventCompleted   = "PullCompleted"
	eventIncomplete  = "PullIncomplete"
	eventSecrets     = "PullSecretMissing"
	eventInvalidSpec = "InvalidSpec"
	eventBounded     = "PinsBounded"
	eventAction      = "Pull"
)

// maxFailureEvents is how many failed nodes have an Event of their own; the others are in the status.
const maxFailureEvents = 10

// told is what is to be told in Events, and was; it is guarded by the run's mutex.
type told struct {
	failures []string
	count    int
	secrets  string
	pins     string
	// again are the reasons for which attempts failed that were followed by others.
	again []string
}

func (t *told) failed(node, reason, message string) {
	if t.count++; t.count <= maxFailureEvents {
		t.failures = append(t.failures, fmt.Sprintf("node %s: %s: %s", node, reason, message))
	}
}

// announce writes the Events that have come up.
func (u *run) announce(recorder events.EventRecorder, job client.Object) {
	u.mu.Lock()
	failures := u.told.failures
	u.told.failures = nil
	secrets := ""
	if u.keys != nil {
		if text := strings.Join(u.keys.Wrong, "; "); text != u.told.secrets {
			u.told.secrets, secrets = text, text
		}
	}
	pins := ""
	if text := u.unpinned(); (text == "") != (u.told.pins == "") { // once, and not for each node
		u.told.pins, pins = text, text
	}
	u.mu.Unlock()
	if pins != "" {
		announce(recorder, job, corev1.EventTypeWarning, eventBounded, pins)
	}
	if secrets != "" {
		announce(recorder, job, corev1.EventTypeWarning, eventSecrets, "pulling without: "+secrets)
	}
	for _, f := range failures {
		announce(recorder, job, corev1.EventTypeWarning, eventFailed, f)
	}
}

func announce(recorder events.EventRecorder, about client.Object, kind, reason, text string) {
	if recorder == nil {
		return
	}
	if len(text) > 1000 { // the API's limit is 1024
		text = strings.ToValidUTF8(text[:1000], "") + "…"
	}
	recorder.Eventf(about, nil, kind, reason, eventAction, "%s", text)
}

func (p *pass) event(kind, reason, text string) { announce(p.r.Recorder, p.job, kind, reason, text) }
