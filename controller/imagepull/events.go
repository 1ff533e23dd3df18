// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package imagepull

import (
	"fmt"
	"strings"

	corev1 "k8s.io/api/core/v1"
	"k8s.io/client-go/tools/events"
	"sigs.k8s.io/controller-runtime/pkg/client"

	"github.com/cri-proxy/cri-proxy/controller/objects"
)

// Reasons of Events. eventFailed is OpenKruise's.
const (
	eventStarted     = "PullStarted"
	eventFailed      = "PullImageFailed"
	eventIncomplete  = "PullIncomplete"
	eventSecrets     = "PullSecretMissing"
	eventInvalidSpec = "InvalidSpec"
	eventBounded     = "PinsBounded"
	eventAction      = "Pull"
)

// maxFailureEvents is how many failed nodes have an Event of their own; the status has the others.
const maxFailureEvents = 10

// reported is what Events have said and are to say.
type reported struct {
	failures []string // not yet written
	count    int
	secrets  string
	pins     string
	// retries are the reasons for which attempts failed that were followed by others.
	retries []string
}

func (r *reported) failed(node, reason, message string) {
	if r.count++; r.count <= maxFailureEvents {
		r.failures = append(r.failures, fmt.Sprintf("node %s: %s: %s", node, reason, message))
	}
}

// writeEvents writes the Events that have come up.
func (j *jobState) writeEvents(recorder events.EventRecorder, job client.Object) {
	t := j.table
	r := &t.reported
	failures := r.failures
	r.failures = nil
	secrets := ""
	if t.keys != nil {
		if text := strings.Join(t.keys.Wrong, "; "); text != r.secrets {
			r.secrets, secrets = text, text
		}
	}
	pins := ""
	if text := t.pinsBounded(); (text == "") != (r.pins == "") { // once, and not for each node
		r.pins, pins = text, text
	}
	if pins != "" {
		writeEvent(recorder, job, corev1.EventTypeWarning, eventBounded, pins)
	}
	if secrets != "" {
		writeEvent(recorder, job, corev1.EventTypeWarning, eventSecrets, "pulling without: "+secrets)
	}
	for _, f := range failures {
		writeEvent(recorder, job, corev1.EventTypeWarning, eventFailed, f)
	}
}

func writeEvent(recorder events.EventRecorder, about client.Object, kind, reason, text string) {
	if recorder == nil {
		return
	}
	recorder.Eventf(about, nil, kind, reason, eventAction, "%s", objects.Clip(text, objects.NoteMax))
}

func (p *pass) event(kind, reason, text string) { writeEvent(p.r.Recorder, p.job, kind, reason, text) }
