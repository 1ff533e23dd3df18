// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package interceptors

import (
	"context"

	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/cri-proxy/cri-proxy/interceptors/view"
	"github.com/cri-proxy/cri-proxy/proxy"
)

// getContainerEvents keeps events of hidden containers, and the stop of a masked one, back until
// the reveal.
func (a *answers) getContainerEvents(
	ctx context.Context, _ string, raw []byte,
) ([]byte, proxy.StreamFilter, error) {
	return raw, &eventFilter{answers: a, did: decidedIn(ctx), buffer: a.view.Subscribe(showReleased)}, nil
}

// eventFilter is the filter of one GetContainerEvents stream.
type eventFilter struct {
	answers *answers
	did     *decided
	buffer  *view.Buffer
}

// Message implements [proxy.StreamFilter].
func (f *eventFilter) Message(msg []byte) ([][]byte, error) {
	v := f.answers.view
	if !v.Active() && !v.Guarded() && !v.StartsKnown() {
		return [][]byte{msg}, nil
	}
	m, err := decode(msg, &runtimeapi.ContainerEventResponse{})
	if err != nil {
		return nil, err
	}
	if f.hold(m, msg) {
		f.did.add(didHold)
		return nil, nil
	}
	snapshot := f.answers.snapshotFor(f.did)
	defer snapshot.End()
	m.ContainersStatuses = snapshot.showStatuses(m.ContainersStatuses)
	b, err := encode(m)
	if err != nil {
		return nil, err
	}
	return [][]byte{b}, nil
}

// hold keeps the event if kubelet must not see it yet, and reports whether it did.
func (f *eventFilter) hold(m *runtimeapi.ContainerEventResponse, msg []byte) bool {
	var annotations map[string]string
	for _, s := range m.GetContainersStatuses() {
		if s.GetId() == m.GetContainerId() {
			annotations = s.GetAnnotations()
		}
	}
	stopped := m.GetContainerEventType() == runtimeapi.ContainerEventType_CONTAINER_STOPPED_EVENT
	return f.buffer.Hold(m.GetContainerId(), annotations[view.StagedAnnotation], stopped, msg)
}

// showReleased returns an event that was held back as it is to be shown now. It tells of all
// containers of the pod, of which others may still be hidden or masked, and of starts that were not
// known when it was held.
func showReleased(msg []byte, now view.Locked) []byte {
	m, err := decode(msg, &runtimeapi.ContainerEventResponse{})
	if err != nil {
		return msg // it was decoded when it came
	}
	m.ContainersStatuses = without(m.ContainersStatuses, func(s *runtimeapi.ContainerStatus) bool {
		how := now.Verdict(s.GetId(), s.GetAnnotations()[view.StagedAnnotation])
		if how == view.Masked {
			showRunning(s)
		}
		now.Correct(s)
		return how == view.Hidden
	})
	b, err := encode(m)
	if err != nil {
		return msg
	}
	return b
}

// Extra implements [proxy.StreamFilter].
func (f *eventFilter) Extra() <-chan []byte { return f.buffer.Released() }

// Close implements [proxy.StreamFilter].
func (f *eventFilter) Close() { f.buffer.Close() }
