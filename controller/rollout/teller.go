// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package rollout

import (
	"strings"

	corev1 "k8s.io/api/core/v1"
	"k8s.io/client-go/tools/events"

	inplace "github.com/cri-proxy/cri-proxy/api/inplace/v1alpha1"
	opsv1 "github.com/cri-proxy/cri-proxy/api/ops/v1"
	"github.com/cri-proxy/cri-proxy/controller/nodes"
	"github.com/cri-proxy/cri-proxy/controller/rollout/notice"
)

// teller writes Events about a rollout and its pods.
type teller struct {
	// recorder may be nil.
	recorder events.EventRecorder
	rollout  *inplace.InPlaceRollout
	// reported are the Events that must not be repeated.
	reported map[string]bool
}

// maxReported bounds the events of one revision that are about single pods.
const maxReported = 2 * maxFailures

// event writes an Event about the rollout.
func (t *teller) event(kind, reason, text string) {
	notice.Announce(t.recorder, t.rollout, kind, reason, text)
}

// tell writes an Event once for a revision and key.
func (t *teller) tell(kind, reason, text, key string) {
	if t.reported[reason+key] {
		return
	}
	t.reported[reason+key] = true
	t.event(kind, reason, text)
}

// warnings writes Events about what went wrong in the change of a pod without ending it, as the
// node says: once for an operation, on the pod and on the rollout.
func (t *teller) warnings(pod *corev1.Pod, done []*opsv1.Operation) {
	for _, op := range done {
		var notes []string
		for _, c := range op.GetContainers() {
			hook, others := nodes.Warnings(c)
			if hook {
				others = append(others,
					"its preStop hook failed, what it printed is in the log of cri-proxy on the node")
			}
			if len(others) > 0 {
				notes = append(notes, "container "+c.GetName()+": "+strings.Join(others, "; "))
			}
		}
		key := notice.EventWarning + op.GetUid()
		if len(notes) == 0 || t.reported[key] || len(t.reported) >= maxReported {
			continue
		}
		t.reported[key] = true
		text := strings.Join(notes, "; ")
		notice.Announce(t.recorder, pod, corev1.EventTypeWarning, notice.EventWarning, text)
		t.event(corev1.EventTypeWarning, notice.EventWarning, "pod "+pod.Name+", "+text)
	}
}
