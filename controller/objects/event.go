// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package objects

import (
	"k8s.io/client-go/tools/events"
	"sigs.k8s.io/controller-runtime/pkg/client"
)

// Announce writes an Event about an object. A nil recorder writes nothing.
func Announce(recorder events.EventRecorder, about client.Object, kind, reason, action, note string) {
	if recorder != nil {
		recorder.Eventf(about, nil, kind, reason, action, "%s", Clip(note, NoteMax))
	}
}
